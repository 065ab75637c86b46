"""The logit-adjusted loss: what is added, and what it does to a client that lacks classes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs_helper import config, start

from fedara_flwr.client.step import ABSENT, _outputs, log_shares
from fedara_flwr.tasks.base import UNLABELLED, Encoded
from fedara_flwr.tasks.registry import tasks


def learner(labels):
    backbone = SimpleNamespace(labels=tuple("abcdefgh"[:labels]))
    return SimpleNamespace(adapted=SimpleNamespace(backbone=backbone, device=torch.device("cpu"), below=lambda batch: None))


def shift(labels, of_all=(), count=3):
    return log_shares(learner(count), Encoded([[1]] * len(labels), labels), of_all)


def test_own_shares_over_those_of_all():
    """Three of four rows are a, one is b: log(3/4) - log(1/2) and log(1/4) - log(1/4); c is not there."""
    found = shift([0, 0, 1, 0], (0.5, 0.25, 0.25))
    np.testing.assert_allclose(found[:2], [np.log(1.5), 0.0], rtol=1e-6)
    assert found[2] == ABSENT


def test_without_the_shares_of_all_each_class_counts_as_often():
    np.testing.assert_allclose(shift([0, 0, 1, 0])[:2], np.log([0.75, 0.25]), rtol=1e-6)


def test_places_without_a_label_do_not_count():
    rows = [[0, UNLABELLED, 1], [UNLABELLED, 0]]
    np.testing.assert_allclose(shift(rows, (0.5, 0.5), count=2), np.log([4 / 3, 2 / 3]), rtol=1e-6)


def test_shares_of_another_number_of_classes_are_not_used():
    np.testing.assert_allclose(shift([0, 1], (1.0,), count=2), np.log([0.5, 0.5]), rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 3)])
def test_every_prediction_of_a_row_gets_the_row_s_own(shape):
    logits = torch.zeros(shape)
    model = learner(3)
    model.task = SimpleNamespace(outputs=lambda *_: SimpleNamespace(logits=logits))
    rows = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    found = _outputs(model, {}, rows).logits
    assert found.shape == shape
    for row, expected in zip(found, rows, strict=True):
        assert (row.view(-1, 3) == expected).all()
    assert (_outputs(model, {}, rows[0]).logits == rows[0]).all()
    assert (_outputs(model, {}, None).logits == 0).all()


def test_a_client_with_one_class_learns_nothing_of_it():
    """All its rows are certain once the other classes are out: no gradient, where the plain loss pushes its label."""
    for added, moves in ((torch.zeros(3), True), (shift([1, 1], (0.4, 0.3, 0.3)), False)):
        logits = torch.tensor([[0.5, -1.0, 2.0], [0.0, 3.0, 1.0]], requires_grad=True)
        torch.nn.functional.cross_entropy(logits + added, torch.tensor([1, 1])).backward()
        assert bool(logits.grad.any()) is moves


@pytest.mark.parametrize("method", ["fedlora", "fedara"])
def test_the_loss_is_the_client_s_own_and_the_key_chooses(tiny_bert, method):
    plain, adjusted = (start(config(tiny_bert, method=method, train__loss=loss)) for loss in ("plain", "logit-adjusted"))
    losses = [[line["loss"] for line in loop.lines if line["type"] == "client"] for loop in (plain, adjusted)]
    assert losses[0][0] != losses[1][0]
    assert all(np.isfinite(losses[1]))


def test_only_tasks_with_classes_are_adjusted():
    assert [name for name, task in tasks().items() if task.classes] == ["classification", "token-classification"]
