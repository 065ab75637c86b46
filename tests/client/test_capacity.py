"""FLOPs against a formula, the calibration batch, and that neither leaves a trace."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from conftest import CONFIGS, LABELS, TASKS, backbone, mean_loss, random_arrays, random_batch
from runs_helper import config, prepare, start
from test_session import PadOnly, client, plan, run

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.learner import Learner
from fedara_flwr.client import session
from fedara_flwr.client.capacity import FlopCounter, backward_blocks, measure
from fedara_flwr.client.train import ClientData, train
from fedara_flwr.model.parts import LORA
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.strategies.legend import last_blocks
from fedara_flwr.tasks.base import Encoded

TASK = TASKS["classification"]
H, INNER, LAYERS, ROWS, LENGTH, RANK = 16, 24, 3, 4, 7, 2  # conftest's tiny BERT, and `random_batch`
TOKENS = ROWS * LENGTH
FULL = RankMask.full([RANK] * 6 * LAYERS)


def forward_flops(blocks: int) -> int:
    """A forward pass with adapters in `blocks` blocks; a product of (a, b) and (b, c) has 2abc.

    Per block four H·H layers, H·INNER and INNER·H for every token, QKᵀ and its product with V; an adapter has RANK·(in + out).
    On the first token of each row BERT's pooler, H·H, and the classifier.
    """
    linear = 2 * TOKENS * (4 * H * H + 2 * H * INNER)
    attention = 2 * 2 * ROWS * LENGTH * LENGTH * H
    adapters = 2 * TOKENS * RANK * (4 * 2 * H + 2 * (H + INNER))
    top = 2 * ROWS * (H * H + H * len(LABELS))
    return LAYERS * (linear + attention) + blocks * adapters + top


def backward_flops(blocks: int) -> int:
    """The backward pass through `blocks` blocks, with the head trained.

    A frozen layer has one product, for its input's gradient; an adapter's two layers and the classifier have two each;
    attention five (it makes the scores once more). In the lowest block the input of query, key and value needs no gradient:
    three H·H fewer, and three adapters' RANK·H.
    """
    linear = 2 * TOKENS * (4 * H * H + 2 * H * INNER)
    attention = 5 * 2 * ROWS * LENGTH * LENGTH * H
    adapters = 2 * 2 * TOKENS * RANK * (4 * 2 * H + 2 * (H + INNER))
    lowest = 2 * TOKENS * 3 * (H * H + RANK * H)
    top = 2 * ROWS * 2 * H * len(LABELS)
    if not blocks:
        return top // 2  # the classifier's own gradient alone: its input needs none
    return top + 2 * ROWS * H * H + blocks * (linear + attention + adapters) - lowest


@pytest.fixture(scope="module")
def adapted(tiny_models):
    return AdaptedModel(backbone(tiny_models["bert"]))


def load(adapted, blocks, parts=frozenset({"B", "A", "head"})):
    mask = last_blocks(adapted.spec, FULL, blocks)
    adapted.load(random_arrays(adapted.spec, mask), mask, (1.0,) * len(FULL.ranks), parts)


def counted(adapted):
    batch = random_batch(rows=ROWS, length=LENGTH)
    with FlopCounter() as forward:
        loss = mean_loss(TASK, adapted.outputs(batch), batch)
    with FlopCounter() as backward:
        loss.backward()
    return forward.total, backward.total


# -- FLOPs ------------------------------------------------------------
@pytest.mark.parametrize("blocks", range(LAYERS + 1))
def test_flops_equal_the_formula(adapted, blocks):
    load(adapted, blocks)
    assert counted(adapted) == (forward_flops(blocks), backward_flops(blocks))
    assert backward_blocks(adapted, LORA) == blocks
    assert backward_blocks(adapted, frozenset({"backbone", "head"})) == LAYERS


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_fewer_blocks_cost_less_on_every_architecture(tiny_models, architecture):
    model = AdaptedModel(backbone(tiny_models[architecture]))
    mask = RankMask.full([RANK] * len(model.spec.modules))
    costs = []
    for blocks in range(LAYERS + 1):
        sub = last_blocks(model.spec, mask, blocks)
        arrays = random_arrays(model.spec, sub)
        model.load(arrays, sub, (1.0,) * len(mask.ranks), frozenset({"B", "A", "head"}))
        costs.append(counted(model))
        assert backward_blocks(model, LORA) == blocks
    forwards, backwards = zip(*costs, strict=True)
    assert list(forwards) == sorted(set(forwards)) and list(backwards) == sorted(set(backwards))
    steps = np.diff(backwards)
    assert steps[1] == steps[2] > steps[0] / 2, "each further block costs the same"


def test_training_reports_the_rounds_flops(adapted):
    """All rows have LENGTH tokens, so three steps cost three times the formula; the loss's own terms have none."""
    mask = last_blocks(adapted.spec, FULL, 2)
    rows = np.random.default_rng(0).integers(5, 97, (12, LENGTH)).tolist()
    data = ClientData(Encoded(rows, [0, 1, 2] * 4), Encoded([], []))
    orders = plan(mask, batch_size=ROWS, dropout=False, vote=None, sent=LORA)
    arrays = random_arrays(adapted.spec, mask)
    update = train(Learner(adapted, TASK, PadOnly()), data, orders, arrays, "1", simulated=True)
    assert update.metrics["flops-forward"] == pytest.approx(3 * forward_flops(2))
    assert update.metrics["flops-backward"] == pytest.approx(3 * backward_flops(2))
    assert update.metrics["blocks"] == 2 and update.metrics["tokens"] == 3 * TOKENS


@pytest.mark.parametrize("changes", [{}, {"terms": {"prox": {"mu": 0.1}}, "clip_norm": 0.1}, {"dropout": False}])
def test_counting_changes_nothing(adapted, changes):
    arrays = random_arrays(adapted.spec, FULL)
    orders = plan(FULL, **changes)
    plain, other = (
        train(Learner(adapted, TASK, PadOnly()), client(1), orders, arrays, "1", simulated=count) for count in (False, True)
    )
    assert all(np.array_equal(plain.arrays[part], other.arrays[part]) for part in plain.arrays)
    assert plain.reports == other.reports and len(plain.reports["slot-vote"]) == 2 * FULL.count
    assert plain.metrics["loss"] == other.metrics["loss"]
    assert not [name for name in plain.metrics if name.startswith("flops")]


# -- the calibration batch ------------------------------------------------------------
def calibrate(adapted, batch=ROWS, length=LENGTH, rank=RANK, rows=64, tokens=0):
    ids = np.random.default_rng(0).integers(5, 97, (rows, length)).tolist()
    return measure(Learner(adapted, TASK, PadOnly()), Encoded(ids, [0] * rows), batch, tokens, rank)


def test_calibration_reports_the_formula(adapted):
    found = calibrate(adapted)
    assert (found["flops-forward"], found["flops-backward"]) == (forward_flops(LAYERS), backward_flops(LAYERS))
    assert found["blocks"] == LAYERS and found["bytes-free"] > 0
    assert found["seconds-forward"] > 0 and found["seconds-backward"] > 0
    assert all(np.isfinite(value) for value in found.values())


def test_a_client_with_fewer_examples_than_a_batch(adapted):
    assert calibrate(adapted, batch=100, rows=ROWS)["flops-forward"] == forward_flops(LAYERS)


def test_bytes_of_a_block_grow_with_batch_length_and_rank(adapted):
    """At least what autograd must keep of a block: the inputs of the six adapters' A and of their B, 4 bytes each."""
    for sizes in ({"batch": b} for b in (2, 4, 8, 16)), ({"length": n} for n in (4, 8, 16)), ({"rank": r} for r in (1, 4, 8)):
        found = [calibrate(adapted, **size)["bytes-block"] for size in sizes]
        assert found == sorted(set(found)) and all(isinstance(value, int) for value in found)
    least = 4 * TOKENS * (3 * H + INNER + 6 * RANK)
    assert least < calibrate(adapted)["bytes-block"] < 20 * least
    assert calibrate(adapted)["bytes-block"] == calibrate(adapted)["bytes-block"]


def test_calibration_leaves_nothing_to_the_next_client(tiny_models):
    fresh, used = (AdaptedModel(backbone(tiny_models["bert"])) for _ in range(2))
    mask = last_blocks(fresh.spec, FULL, 2)
    arrays = random_arrays(fresh.spec, mask)
    expected = run(fresh, "2", mask, arrays)
    weights = [layer.base_layer.weight.clone() for layer in used.layers]
    state = torch.get_rng_state()
    calibrate(used)
    assert torch.equal(torch.get_rng_state(), state), "no random number is drawn"
    again = run(used, "2", mask, arrays)
    assert all(np.array_equal(again.arrays[part], expected.arrays[part]) for part in expected.arrays)
    assert again.metrics["loss"] == expected.metrics["loss"]
    assert all(torch.equal(layer.base_layer.weight, value) for layer, value in zip(used.layers, weights, strict=True))
    frozen = [p for name, p in used.model.named_parameters() if "base_layer" in name or "embeddings" in name]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_calibration_frees_what_it_kept(adapted):
    def tensors():
        gc.collect()
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    calibrate(adapted)
    before = tensors()
    for _ in range(5):
        calibrate(adapted)
    assert tensors() <= before + 5


def test_calibration_does_not_see_the_delta_of_a_run_before(tiny_bert):
    """One process, a run of flora and then two of legend with the same model and data: as if flora had not been."""
    changes = {"num_server_rounds": 1, "fedara__warmup_rounds": 0, "fedara__final_rounds": 0}

    def reports():
        strategy, grid = prepare(config(tiny_bert, method="legend", **changes))
        strategy.configure_train(1, strategy.initial_arrays(), None, grid)
        return {key: (known["forward"], known["backward"]) for key, known in strategy.state.clients.items()}

    session._resident.clear()
    first = reports()
    flora = start(config(tiny_bert, method="flora", **changes | {"num_server_rounds": 2, "adapter__rank": 1}))
    (resident,) = session._resident.values()
    assert flora.state.delta.version and resident.adapted._delta.ranks, "a delta of factors is in the resident model"
    assert reports() == first
