"""What a run leaves loads in stock PEFT and transformers, in a process without this package."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import backbone, random_arrays, random_batch

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.export import save_lora, save_model, save_peft
from fedara_flwr.offsets import Weights, from_factors
from fedara_flwr.ranks import RankMask

STOCK = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification
kind, base, folder, labels, ids = sys.argv[1:6]
if kind == "peft":
    from peft import PeftModel
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=int(labels), pad_token_id=0)
    model = PeftModel.from_pretrained(model, folder)
else:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
assert not any(name.startswith("fedara") for name in sys.modules)
ids = torch.tensor(json.loads(ids))
with torch.no_grad():
    print(json.dumps(model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.tolist()))
"""


def stock_logits(kind, base, folder, batch, labels=3):
    ids = json.dumps(batch["input_ids"].tolist())
    done = subprocess.run(
        [sys.executable, "-c", STOCK, kind, str(base), str(folder), str(labels), ids], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return np.array(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name, lora", [("bert", False), ("bert", True), ("distilbert", False), ("llama", False)])
def test_adapter_directory_has_the_same_logits_in_stock_peft(tiny_models, tmp_path, name, lora):
    """A mask with dead slots and dead modules, the head, and for BERT a pooler at the identity; LoRA is E = 1."""
    adapted = AdaptedModel(backbone(tiny_models[name], pooling="identity"))
    spec = adapted.spec
    bits = np.random.default_rng(3).random(4 * len(spec.modules)) < 0.4
    bits[:8] = False
    mask = RankMask((4,) * len(spec.modules), bits)
    weights = Weights(random_arrays(spec, mask), mask, (6.0 / 4,) * len(spec.modules))
    if lora:
        del weights.arrays["E"]
    batch, expected = random_batch(), logits(adapted, weights, random_batch())
    save_peft(tmp_path, adapted.backbone, weights, "SEQ_CLS")
    np.testing.assert_allclose(stock_logits("peft", tiny_models[name], tmp_path, batch), expected, atol=2e-6)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sum(map(sum, config["rank_pattern"].values())) == mask.count
    assert all(type(bit) is bool for row in config["rank_pattern"].values() for bit in row)


def logits(adapted, weights, batch):
    adapted.load(weights.arrays, weights.mask, weights.scales)
    with torch.no_grad():
        return adapted.logits(batch).numpy()


def unequal(spec):
    """Module m has length 1 + m mod 3 and scale (m + 1)/10."""
    mask = RankMask.full([1 + m % 3 for m in range(len(spec.modules))])
    return Weights(random_arrays(spec, mask), mask, tuple((m + 1) / 10 for m in range(len(spec.modules))))


def test_unequal_mask_lengths_and_scales_are_folded_into_e(tiny_models, tmp_path):
    """PEFT's AdaLoRA knows one rank and one scale."""
    adapted = AdaptedModel(backbone(tiny_models["bert"]))
    weights = unequal(adapted.spec)
    batch, expected = random_batch(), logits(adapted, weights, random_batch())
    save_peft(tmp_path, adapted.backbone, weights, "SEQ_CLS")
    np.testing.assert_allclose(stock_logits("peft", tiny_models["bert"], tmp_path, batch), expected, atol=5e-6)


@pytest.mark.parametrize("name", ["bert", "deberta-v3", "qwen"])
def test_plain_lora_with_unequal_ranks_and_scales(tiny_models, tmp_path, name):
    """E is folded into B; names of layers that are endings of others' must not meet: patterns are whole."""
    adapted = AdaptedModel(backbone(tiny_models[name]))
    weights = unequal(adapted.spec)
    batch, expected = random_batch(), logits(adapted, weights, random_batch())
    save_lora(tmp_path, adapted.backbone, weights, "SEQ_CLS")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    np.testing.assert_allclose(stock_logits("peft", tiny_models[name], tmp_path, batch), expected, atol=5e-6)


def test_a_model_without_adapters_is_saved_whole(tiny_models, tmp_path):
    adapted = AdaptedModel(backbone(tiny_models["bert"], pooling="identity"))
    mask = RankMask.full([0] * len(adapted.spec.modules))
    head = np.random.default_rng(0).normal(size=adapted.spec.head_size).astype(np.float32)
    weights = Weights({"head": head}, mask, (1.0,) * len(mask.ranks))
    batch, expected = random_batch(), logits(adapted, weights, random_batch())
    save_model(tmp_path, adapted)
    np.testing.assert_allclose(stock_logits("whole", "", tmp_path, batch), expected, atol=1e-6)
    with pytest.raises(ValueError, match="export the model instead"):
        save_peft(tmp_path, adapted.backbone, weights, "SEQ_CLS")


@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_merged_adapters_have_the_same_logits_in_stock_transformers(tiny_models, tmp_path, name):
    """Adapters and an offset of factors, merged; loading again takes the merge back."""
    adapted = AdaptedModel(backbone(tiny_models[name]))
    weights, rng = unequal(adapted.spec), np.random.default_rng(1)
    spec = adapted.spec
    adapted.set_offset(
        from_factors([(rng.normal(0, 0.2, (m.d_out, 2)), rng.normal(0, 0.2, (2, m.d_in))) for m in spec.modules])
    )
    batch, expected = random_batch(), logits(adapted, weights, random_batch())
    save_model(tmp_path, adapted)
    np.testing.assert_allclose(stock_logits("whole", "", tmp_path, batch), expected, atol=5e-6)
    np.testing.assert_array_equal(logits(adapted, weights, batch), expected)
