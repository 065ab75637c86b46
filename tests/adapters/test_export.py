"""What a run leaves loads in stock PEFT and transformers, in a process without this package."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import backbone, random_arrays, random_batch
from export_helper import stock_logits
from safetensors.numpy import load_file

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.export import revision, save_lora, save_model, save_peft, save_plain_lora
from fedara_flwr.model.deltas import Weights, from_factors
from fedara_flwr.model.ranks import RankMask


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


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_plain_lora_of_one_rank(tiny_models, tmp_path, name):
    """Dead slots, dead modules, unequal mask lengths and scales: folded and filled up, without a pattern."""
    adapted = AdaptedModel(backbone(tiny_models[name], pooling="identity"))
    modules = adapted.spec.modules
    ranks = tuple(1 + m % 4 for m in range(len(modules)))
    bits = np.random.default_rng(5).random(sum(ranks)) < 0.4
    mask = RankMask(ranks, bits)
    assert 0 in mask.alive and 0 < mask.count < len(bits)
    weights = Weights(random_arrays(adapted.spec, mask), mask, tuple((m + 1) / 10 for m in range(len(modules))))
    batch, expected = random_batch(), logits(adapted, weights, random_batch())
    save_plain_lora(tmp_path, adapted.backbone, weights, "SEQ_CLS")
    np.testing.assert_allclose(stock_logits("lora", tiny_models[name], tmp_path, batch), expected, atol=5e-6)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and not config["rank_pattern"] and not config["alpha_pattern"]
    assert config["r"] == config["lora_alpha"] == max(mask.alive)
    living = {module.name for module, count in zip(modules, mask.alive, strict=True) if count}
    assert set(config["target_modules"]) == living
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {len(value) for key, value in tensors.items() if key.endswith("lora_A.weight")} == {config["r"]}


def test_plain_lora_without_e(tiny_models, tmp_path):
    adapted = AdaptedModel(backbone(tiny_models["bert"]))
    weights = unequal(adapted.spec)
    del weights.arrays["E"]
    batch, expected = random_batch(), logits(adapted, weights, random_batch())
    save_plain_lora(tmp_path, adapted.backbone, weights, "SEQ_CLS")
    np.testing.assert_allclose(stock_logits("lora", tiny_models["bert"], tmp_path, batch), expected, atol=5e-6)


def logits(adapted, weights, batch):
    adapted.load(weights.arrays, weights.mask, weights.scales)
    with torch.no_grad():
        return adapted.outputs(batch).logits.numpy()


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
    head = np.random.default_rng(0).normal(size=adapted.spec.size("head")).astype(np.float32)
    weights = Weights({"head": head}, mask, (1.0,) * len(mask.ranks))
    batch, expected = random_batch(), logits(adapted, weights, random_batch())
    save_model(tmp_path, adapted)
    np.testing.assert_allclose(stock_logits("merged", "", tmp_path, batch), expected, atol=1e-6)
    with pytest.raises(ValueError, match="export the model instead"):
        save_peft(tmp_path, adapted.backbone, weights, "SEQ_CLS")


@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_merged_adapters_have_the_same_logits_in_stock_transformers(tiny_models, tmp_path, name):
    """Adapters and a delta of factors, merged; loading again takes the merge back."""
    adapted = AdaptedModel(backbone(tiny_models[name]))
    weights, rng = unequal(adapted.spec), np.random.default_rng(1)
    spec = adapted.spec
    adapted.set_delta(from_factors([(rng.normal(0, 0.2, (m.d_out, 2)), rng.normal(0, 0.2, (2, m.d_in))) for m in spec.modules]))
    batch, expected = random_batch(), logits(adapted, weights, random_batch())
    save_model(tmp_path, adapted)
    np.testing.assert_allclose(stock_logits("merged", "", tmp_path, batch), expected, atol=5e-6)
    np.testing.assert_array_equal(logits(adapted, weights, batch), expected)


def test_the_revision_is_the_commit_in_the_cache(tiny_models, tmp_path, monkeypatch):
    """A folder has none; what came from the Hub lies in a folder that has the commit's name."""
    local = backbone(tiny_models["bert"])
    assert revision(local) is None
    cached = str(tmp_path / "snapshots" / "0123abcd" / "config.json")
    monkeypatch.setattr("fedara_flwr.adapters.export.try_to_load_from_cache", lambda name, file: cached)
    local.name = "somebody/a-model"
    assert revision(local) == "0123abcd"
