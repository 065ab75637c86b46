"""Every architecture of docs/models.md: training, batches, and each export in stock libraries."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from architecture_helper import ARCHITECTURES, DECODERS, SPEAKERS, published, save_architecture
from conftest import LABELS, mean_loss, some_fast
from peft import PeftModel
from test_session import plan

from fedara_flwr.adapters.export import save_adapters, save_model
from fedara_flwr.adapters.learner import Learner, open_learner
from fedara_flwr.client.train import ClientData, train
from fedara_flwr.keys import ConfigError
from fedara_flwr.model.deltas import Weights
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.tasks import Encoded, read_settings

FAST = {"albert", "deberta-v2", "esm", "modernbert", "xlm-roberta", "bart", "t5", "gpt2", "deepseek_v3", "gemma3_text", "qwen3"}
FAST |= {"mixtral", "smollm3", "olmoe"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("architectures")

    def make(name: str) -> Path:
        return root / name if (root / name).exists() else save_architecture(name, root / name)

    return make


def opened(folder: Path, task: str, labels: tuple[str, ...] = LABELS, **more) -> Learner:
    named = {"model.name": str(folder), "data.task": task, "data.max-length": 24, "model.dtype": "float32", **more}
    return open_learner(read_settings(named), labels)


def some_data(learner: Learner) -> Encoded:
    """Texts of several lengths, of whose tokens the tokenizer knows all."""
    texts = (
        ["LAGV", "SERTIDPKQ", "NF"]
        if type(learner.tokenizer).__name__ == "EsmTokenizer"
        else ["the red fox", "nothing jumps over the lazy green apples", "brown dog"]
    )
    ids = [learner.tokenizer(text)["input_ids"] for text in texts]
    assert len({len(row) for row in ids}) > 1 and all(len(row) > 2 for row in ids)
    unknown = learner.tokenizer.unk_token_id
    assert unknown is None or not any(unknown in row[1:-1] for row in ids)
    causal = learner.task.head == "none"
    return Encoded(ids, [list(row) for row in ids] if causal else [0, 1, 2])


def some_weights(learner: Learner, head: bool, seed: int = 0) -> Weights:
    """Random values, without E, of all modules but the first."""
    spec, rng = learner.adapted.spec, np.random.default_rng(seed)
    mask = RankMask.full([0, *[2] * (len(spec.modules) - 1)])
    parts = ("B", "A", "head") if head else ("B", "A")
    arrays = {part: rng.normal(0, 0.3, spec.length(part, mask)).astype(np.float32) for part in parts}
    return Weights(arrays, mask, (1.5,) * len(mask.ranks))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    largest = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * largest)


def stock_is_equal(learner: Learner, folder: Path, out: Path, weights: Weights, inputs, labels: int) -> None:
    """Each export in stock PEFT and transformers, on the same batch."""
    adapted = learner.adapted
    adapted.load(weights.arrays, weights.mask, weights.scales)
    with torch.no_grad():
        expected = adapted.outputs(inputs).logits.float()
    task_type = learner.task.peft_type(learner.tokenizer)
    e = {"E": np.ones(adapted.spec.length("E", weights.mask), np.float32)}
    formats = {"peft": (replace(weights, arrays=weights.arrays | e), False), "lora": (weights, False), "one": (weights, True)}
    pad = {"pad_token_id": learner.tokenizer.pad_token_id}
    for kind, (values, plain) in formats.items():
        try:
            save_adapters(out / kind, adapted.backbone, values, task_type, plain)
        except ConfigError as error:
            assert plain and "peft#3711" in str(error)
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(fan_in_fan_out|missing|did not match)")
            warnings.filterwarnings("ignore", "The following rank_pattern keys")  # the card explains it
            model = PeftModel.from_pretrained(published(folder.name, folder, labels, **pad), out / kind).eval()
        with torch.no_grad():
            close(model(**inputs).logits.float(), expected)
    save_model(out / "merged", adapted)
    with torch.no_grad():
        close(published(folder.name, out / "merged", labels).eval()(**inputs).logits.float(), expected)


def without_labels(batch):
    return {name: values for name, values in batch.items() if not name.startswith("labels")}


@pytest.mark.parametrize("name", some_fast([name for name in ARCHITECTURES if name not in SPEAKERS], FAST))
def test_classification(folders, tmp_path, name):
    folder = folders(name)
    learner = opened(folder, "classification", **{"train.cache": "exact", "train.checkpointing": True})
    adapted, data = learner.adapted, some_data(learner)
    mask = RankMask.full([2] * len(adapted.spec.modules))
    rng = np.random.default_rng(0)
    start = {part: rng.normal(0, 0.3, adapted.spec.length(part, mask)).astype(np.float32) for part in ("B", "E", "A", "head")}
    update = train(learner, ClientData(data, Encoded([], [])), plan(mask), start, "1")
    assert np.isfinite(update.metrics["loss"])
    rows = [adapted.spec.rows(arrays, mask) for arrays in (update.arrays, start)]
    for module, after, before in zip(adapted.spec.modules, *rows, strict=True):
        # of the last block some see nothing that the head reads: Longformer's local attention, whatever is no first token
        assert module.block or not np.array_equal(after["B"], before["B"]), f"{module.name} learns nothing"

    weights = some_weights(learner, head=True)
    adapted.load(weights.arrays, weights.mask, weights.scales)
    adapted.model.eval()
    batch = learner.batch(data, range(3))
    with torch.no_grad():
        together = adapted.outputs(batch).logits
        alone = torch.cat([adapted.outputs(learner.batch(data, [row])).logits for row in range(3)])
    close(together, alone)
    stock_is_equal(learner, folder, tmp_path, weights, without_labels(batch), len(LABELS))


@pytest.mark.parametrize("name", some_fast([*DECODERS, *SPEAKERS], FAST))
def test_causal_lm(folders, tmp_path, name):
    folder = folders(name)
    learner = opened(folder, "causal-lm", ())
    adapted, data = learner.adapted, some_data(learner)
    weights = some_weights(learner, head=False)
    adapted.load(weights.arrays, weights.mask, weights.scales, frozenset({"A", "B"}))
    batch = learner.batch(data, range(3))
    loss = mean_loss(learner.task, learner.task.outputs(learner, batch), batch)
    loss.backward()
    assert all(values["B"].grad is not None and values["B"].grad.any() for _, values in adapted.alive())
    with torch.no_grad():
        expected = adapted.model(**without_labels(batch), labels=batch["labels"]).loss
    assert abs(float(loss.detach() - expected)) < 1e-4
    stock_is_equal(learner, folder, tmp_path, weights, without_labels(batch), 0)
