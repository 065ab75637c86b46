"""Clients trained together: each gets what it would get alone, whatever the others are; and who goes together in a run."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import LABELS, TASKS, pairs, random_arrays, some_rows
from flwr.app import RecordDict
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from runs_helper import WALL_CLOCK, config, start
from test_session import PadOnly, plan

from fedara_flwr.adapters import stack as stacks
from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.backbone import Backbone
from fedara_flwr.adapters.layer import stacked_linear
from fedara_flwr.adapters.learner import Learner
from fedara_flwr.adapters.stack import Stack, loaded, problem
from fedara_flwr.client import session, together
from fedara_flwr.client.step import Spent, backward, backward_together
from fedara_flwr.client.together import allows, train_together
from fedara_flwr.client.train import ClientData, Job, train
from fedara_flwr.engine import InProcessGrid
from fedara_flwr.model.deltas import Piece
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.server.loop import RunFailed
from fedara_flwr.strategies.allocation import last_blocks
from fedara_flwr.tasks import Encoded

NONE = Encoded([], [])
ROWS = (12, 9, 3)
SLOW = {"bytes-free", "peak-memory-mb", "seconds-all", "seconds-train", "seconds-forward", "seconds-backward"}


def model(path, task="classification", dtype="float32", cache="off"):
    return AdaptedModel(Backbone(str(path), TASKS[task], LABELS, dtype=dtype, pad_token_id=0), cache, 16)


def rows(seed, task, count):
    """Rows of 3 to 9 tokens with labels."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(5, 97, size=rng.integers(3, 10)).tolist() for _ in range(count)]
    return some_rows(TASKS[task], ids, rng)


def jobs(adapted, task, mask, counts=ROWS, **changes):
    """Clients that differ in their rows and in what they received."""
    orders = plan(mask, **{"dropout": False, "e_lr_factor": 0.5, **changes})
    data = [ClientData(rows(i, task, count), rows(i + 50, task, 5)) for i, count in enumerate(counts)]
    return [Job(own, orders, random_arrays(adapted.spec, mask, i), str(i)) for i, own in enumerate(data)]


def alone(adapted, task, job):
    return train(Learner(adapted, TASKS[task], PadOnly()), job.data, job.plan, job.arrays, job.client_key, True, job.guard)


def agree(first, second, atol=2e-5):
    assert first.arrays.keys() == second.arrays.keys() and first.mask == second.mask
    for part in first.arrays:
        np.testing.assert_allclose(first.arrays[part], second.arrays[part], atol=atol, err_msg=part)
    assert first.num_examples == second.num_examples and first.metrics.keys() == second.metrics.keys()
    for name in first.metrics.keys() - SLOW:
        assert first.metrics[name] == pytest.approx(second.metrics[name], rel=50 * atol), name
    assert first.reports == second.reports


def compare(adapted, task, orders, atol=2e-5, idle=0):
    """`idle`: how many last numbers of the head no loss depends on; Adam moves them by the sign of rounding."""
    found = train_together(Learner(adapted, TASKS[task], PadOnly()), orders)
    expected = [alone(adapted, task, job) for job in orders]
    for update in (*found, *expected):
        update.arrays["head"][update.arrays["head"].size - idle :] = 0
    for job, first, second in zip(orders, found, expected, strict=True):
        agree(first, second, atol)
        last = "head" if second.arrays["head"].size else "B"
        assert np.abs(second.arrays[last] - job.arrays[last]).max() > 100 * atol, "training did something to compare"
    assert len({update.metrics["loss"] for update in found}) == len(found)
    return found


def some(adapted, rank=2):
    """Two thirds of the slots, and modules without any."""
    full = RankMask.full([rank] * len(adapted.spec.modules))
    return full.keep((np.arange(full.count) % 3 != 0) & (np.arange(full.count) > 5))


# -- parts ------------------------------------------------------------
def test_stacked_linear_by_hand():
    """Client 0 reads the first number and adds 10, client 1 twice the second and adds 20."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    weight, bias = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]]), torch.tensor([[10.0], [20.0]])
    assert stacked_linear(x, weight, bias).tolist() == [[11], [13], [32], [36]]
    assert stacked_linear(x[:, None], weight, None).tolist() == [[[1]], [[3]], [[12]], [[16]]]


@hypothesis_settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_stacked_linear_is_each_clients_own(clients, each, length, d_in, d_out, biased):
    torch.manual_seed(0)
    x, weight = torch.randn(clients * each, length, d_in), torch.randn(clients, d_out, d_in)
    bias = torch.randn(clients, d_out) if biased else None
    found = stacked_linear(x, weight, bias)
    for i, own in enumerate(x.split(each)):
        expected = torch.nn.functional.linear(own, weight[i], None if bias is None else bias[i])
        torch.testing.assert_close(found[i * each : (i + 1) * each], expected, rtol=1e-5, atol=1e-5)


def test_numbers_of_steps():
    """10 rows in batches of 4 are 3 steps, twice; 3 rows make batches of 3."""
    orders = plan(RankMask.full([1]), steps=0, epochs=2, batch_size=4)
    assert [orders.train.optimiser_steps(n) for n in (10, 8, 4, 3, 1)] == [6, 4, 2, 2, 2]
    assert plan(RankMask.full([1]), steps=5, epochs=2, batch_size=4).train.optimiser_steps(10) == 5


def test_what_cannot_be_trained_together():
    def order(**changes):
        return plan(RankMask.full([1]), **{"dropout": False, **changes})

    assert allows(order()) and allows(order(terms={"prox": {"mu": 1.0}}, clip_norm=1.0))
    everything, head = order().sent | {"backbone"}, frozenset({"head"})
    for change in ({"dropout": True}, {"batch_tokens": 64}, {"sent": everything}, {"carries": everything}, {"kept": head}):
        assert not allows(order(**change))


def test_a_stack_shows_one_client(tiny_models):
    """What is done to the model's parameters and gradients is done to that client's slices alone."""
    adapted = model(tiny_models["bert"])
    mask = some(adapted)
    values = []
    for seed in range(3):
        parts = frozenset({"B", "A", "head"})
        adapted.load(random_arrays(adapted.spec, mask, seed), mask, (1.0,) * len(mask.ranks), parts)
        values.append(loaded(adapted))
    stack = Stack(adapted, values)
    stack.show(1)
    expected = random_arrays(adapted.spec, mask, 1)
    for part, vector in adapted.collect(frozenset(expected)).items():
        assert np.array_equal(vector, expected[part])
    for part in ("B", "E", "A", "head"):
        for own, every in zip(adapted.parameters(part), stack.parameters(part), strict=True):
            assert (own.grad is None) == (every.grad is None) == (part == "E")
            if own.grad is not None:
                own.grad.fill_(3.0)
                own.data.zero_()
                assert every.grad is not None
                assert [g.unique().tolist() for g in every.grad] == [[0], [3], [0]]
                assert every[1].abs().max() == 0 and min(every[0].abs().max(), every[2].abs().max()) > 0


# -- every architecture ------------------------------------------------------------
@pairs()
def test_as_one_after_the_other(tiny_models, name, task):
    """DeBERTa's query and key layers also take the relative positions, which are the same rows for all.

    A bias that moves a start's logits at all places alike changes no probability of a span.
    """
    adapted = model(tiny_models[name], task.name)
    why = problem(adapted)
    if name == "deberta-v3":
        assert why
        return
    assert not why
    idle = 2 if task.auto_class == "AutoModelForQuestionAnswering" else 0
    compare(adapted, task.name, jobs(adapted, task.name, some(adapted)), idle=idle)


OPTIONS = {
    "epochs": {"steps": 0, "epochs": 2},
    "one-step": {"steps": 1, "clip_norm": 0.05},
    "clipped": {"clip_norm": 0.05, "warmup_steps": 2},
    "terms": {
        "terms": {"prox": {"mu": 0.5}, "orthogonality": {"weight": 0.3}},
        "vote": {"budget": 5.0, "importance": "magnitude"},
    },
    "tail": {"terms": {"tail-penalty": {"weight": 0.05, "gamma": 0.5}}, "vote": None, "report": frozenset({"kept"})},
    "local": {"report": frozenset({"slot-vote", "kept"}), "evaluate": True},
    "frozen": {"sent": frozenset({"B", "head"})},
    "head": {"sent": frozenset({"head"}), "vote": None},
}


@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_whatever_the_plan_says(tiny_models, option):
    """By epochs with 12, 9 and 11 rows all have three batches of up to 4, not all of them whole."""
    adapted = model(tiny_models["bert"])
    mask = some(adapted) if option != "head" else RankMask.full([0] * len(adapted.spec.modules))
    counts = (12, 9, 11) if option == "epochs" else ROWS
    compare(adapted, "classification", jobs(adapted, "classification", mask, counts, **OPTIONS[option]))


def test_above_a_kept_prefix_and_an_delta(tiny_models):
    adapted = model(tiny_models["bert"], cache="exact")
    spec = adapted.spec
    rng = np.random.default_rng(0)
    ranks = tuple(int(i % 2) for i in range(len(spec.modules)))
    arrays = {p: rng.normal(0, 0.3, spec.length(p, RankMask.full(ranks))).astype(np.float32) for p in ("B", "A")}
    adapted.set_delta(Piece(ranks, arrays))
    assert not problem(adapted)
    mask = last_blocks(spec, RankMask.full([2] * len(spec.modules)), 2)
    found = compare(adapted, "classification", jobs(adapted, "classification", mask))
    assert adapted.boundary == 1 and {update.metrics["blocks"] for update in found} == {2}
    adapted.set_delta(None)
    other = train_together(Learner(adapted, TASKS["classification"], PadOnly()), jobs(adapted, "classification", mask))
    assert abs(other[0].metrics["loss"] - found[0].metrics["loss"]) > 1e-4, "the delta was in it"


def test_bfloat16_to_its_own_rounding(tiny_models):
    """8 bits of mantissa: losses agree to a few thousandths. Adam's steps do not, they follow the signs of small gradients."""
    adapted = model(tiny_models["bert"], dtype="bfloat16")
    assert not problem(adapted)
    orders = jobs(adapted, "classification", some(adapted))
    found = train_together(Learner(adapted, TASKS["classification"], PadOnly()), orders)
    for job, update in zip(orders, found, strict=True):
        assert update.metrics["loss"] == pytest.approx(alone(adapted, "classification", job).metrics["loss"], rel=1e-2)


# -- the pass ------------------------------------------------------------
@pytest.mark.parametrize("shifts", [(None, None), (torch.tensor([0.0, -2.0, 1.0]), torch.tensor([-1e9, 0.5, 0.0]))])
def test_gradients_are_each_clients_own(tiny_models, shifts):
    """Of one step, without an optimiser to hide their size; padding and rows that do not count add nothing."""
    adapted, task = model(tiny_models["llama"]), TASKS["classification"]
    mask = some(adapted)
    orders = jobs(adapted, "classification", mask, (4, 4))
    values, batches, expected = [], [], []
    for job, count, shift in zip(orders, (4, 2), shifts, strict=True):
        adapted.load(job.arrays, mask, job.plan.scales, job.plan.trained)
        values.append(loaded(adapted))
        batches.append(Learner(adapted, task, PadOnly()).batch(job.data.train, range(count)))
        loss = backward(Learner(adapted, task, None), batches[-1:], [], Spent(), shift)
        expected.append((loss, [p.grad.clone() for part in stacks.STACKED_PARTS for p in adapted.parameters(part)]))
    joined = Encoded(
        orders[0].data.train.ids + orders[1].data.train.ids, [*orders[0].data.train.labels, *orders[1].data.train.labels]
    )
    stack, learner = Stack(adapted, values), Learner(adapted, task, PadOnly())
    losses, seconds = backward_together(learner, stack, learner.batch(joined, range(8)), [4, 2], shifts)
    assert min(seconds.values()) > 0
    for i, (loss, gradients) in enumerate(expected):
        stack.show(i)
        torch.testing.assert_close(losses[i], loss)
        for p, gradient in zip((p for part in stacks.STACKED_PARTS for p in adapted.parameters(part)), gradients, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-6)


def test_frozen_layers_run_once_for_all(tiny_models):
    adapted = model(tiny_models["bert"])
    orders = jobs(adapted, "classification", some(adapted))
    ran: list[int] = []
    hooks = [layer.base_layer.register_forward_hook(lambda _, args, y: ran.append(len(y))) for layer in adapted.layers]
    train_together(Learner(adapted, TASKS["classification"], PadOnly()), orders)
    for hook in hooks:
        hook.remove()
    # passes of one row count the floating-point operations
    assert [count for count in ran if count > 1] == [3 * 4] * 3 * len(adapted.layers), (
        "three clients' four rows, in three steps"
    )


def test_a_bad_client_costs_the_others_nothing(tiny_models):
    adapted = model(tiny_models["bert"])
    orders = jobs(adapted, "classification", some(adapted), clip_norm=1.0)
    bad = replace(orders[1], arrays={part: v * np.float32(1e30) for part, v in orders[1].arrays.items()})
    found = train_together(Learner(adapted, TASKS["classification"], PadOnly()), [orders[0], bad, orders[2]])
    assert isinstance(found[1], FloatingPointError)
    for i in (0, 2):
        agree(found[i], alone(adapted, "classification", orders[i]))


def test_nothing_is_left_behind(tiny_models):
    fresh, used = model(tiny_models["bert"]), model(tiny_models["bert"])
    orders = jobs(used, "classification", some(used))
    train_together(Learner(used, TASKS["classification"], PadOnly()), orders)
    first, second = (alone(adapted, "classification", orders[0]) for adapted in (fresh, used))
    assert all(np.array_equal(first.arrays[part], second.arrays[part]) for part in first.arrays)


def test_a_head_that_is_not_linear(tiny_models):
    class Cosine(torch.nn.Linear):
        pass

    adapted = model(tiny_models["bert"])
    adapted.model.classifier.__class__ = Cosine
    assert problem(adapted) == "classifier of its head is not a linear layer"


# -- whole runs ------------------------------------------------------------
@pytest.fixture
def groups(monkeypatch):
    """Of each call of `train_together` its jobs."""
    seen: list[list[Job]] = []

    def spy(learner, orders):
        seen.append(list(orders))
        return train_together(learner, orders)

    monkeypatch.setattr(together, "train_together", spy)
    return seen


def keys(groups):
    return [[job.client_key for job in group] for group in groups]


def lines(strategy):
    return [{name: value for name, value in line.items() if name not in WALL_CLOCK} for line in strategy.lines]


def close(first, second, rel=1e-3):
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, float):
            assert second[name] == pytest.approx(value, rel=rel, abs=1e-4), name
        elif not isinstance(value, dict | list):
            assert second[name] == value, name


def test_a_run_with_clients_together(tiny_bert, groups):
    """Six of eight clients a round: groups of four and two."""
    flat = config(tiny_bert, strategy__fraction_train=0.75, train__warmup_steps=1)
    expected = start(flat, clients=8)
    assert not groups
    strategy = start(flat | {"run.together": 4}, clients=8)
    assert [len(group) for group in groups] == [4, 2] * 4
    assert strategy.state.mask == expected.state.mask and strategy.state.mask.count < strategy.state.mask.bits.size
    for part, vector in expected.state.arrays.items():
        np.testing.assert_allclose(strategy.state.arrays[part], vector, atol=1e-3, err_msg=part)
    for found, line in zip(lines(strategy), lines(expected), strict=True):
        close(found, line)


def test_groups_are_of_one_plan(tiny_bert, groups):
    """HetLoRA gives clients 1, 2 or 4 slots a module."""
    options = {"method": "hetlora", "strategy__options": "ranks = [1, 2, 4]", "strategy__fraction_train": 1.0}
    strategy = start(config(tiny_bert, num_server_rounds=1, run__together=9, **options))
    assert strategy.state.server_round == 1 and len([line for line in strategy.lines if line["type"] == "client"]) == 6
    assert groups and all(len({job.plan.mask for job in group}) == 1 for group in groups)
    masks = [group[0].plan.mask for group in groups]
    assert len(set(masks)) == len(masks), "those of one mask are in one group"


def test_groups_are_of_one_number_of_steps(tiny_bert, groups):
    """By epochs, in batches of 64; who has a number of steps of its own goes alone."""
    flat = config(tiny_bert, num_server_rounds=1, strategy__fraction_train=1.0, train__steps=0, run__together=9)
    flat |= {"train.batch-size": 64, "method": "head", "strategy.options": ""}
    strategy = start(flat)
    steps = {line["client"]: line["steps"] for line in strategy.lines if line["type"] == "client"}
    assert len(steps) == 6 and len(set(steps.values())) > 1
    numbers = list(steps.values())
    expected = {frozenset(k for k in steps if steps[k] == n) for n in numbers if numbers.count(n) > 1}
    assert expected and {frozenset(group) for group in keys(groups)} == expected


class Robbed(InProcessGrid):
    """What node 1 is sent to train with comes without its values."""

    def push_messages(self, messages):
        messages = list(messages)
        for message in messages:
            if message.metadata.message_type == "train" and message.metadata.dst_node_id == 1001:
                message.content = RecordDict({"plan": message.content["plan"]})
        return super().push_messages(messages)


def test_one_bad_client_in_a_run(tiny_bert, groups):
    strategy = start(
        config(tiny_bert, num_server_rounds=1, strategy__fraction_train=1.0, fedara__warmup_rounds=0, fedara__final_rounds=0)
        | {"run.together": 9},
        Robbed,
    )
    (line,) = [line for line in strategy.lines if line["type"] == "round"]
    assert line["good"] == 5 and [drop["client"] for drop in line["dropped"]] == ["1"]
    assert [sorted(group) for group in keys(groups)] == [["0", "2", "3", "4", "5"]]


def of_engine(caplog):
    """What the engine logged."""
    return [record.message for record in caplog.records if record.name == "fedara_flwr.engine"]


def test_where_a_group_fails_as_a_whole(tiny_bert, monkeypatch, caplog):
    """One after the other, so the run is bit for bit the one without groups."""
    flat = config(tiny_bert, num_server_rounds=2, fedara__warmup_rounds=0, fedara__final_rounds=0)
    expected = start(flat)

    def full(*_):
        raise MemoryError("no more")

    monkeypatch.setattr(together, "train_together", full)
    with caplog.at_level(logging.WARNING, "fedara_flwr.engine"):
        strategy = start(flat | {"run.together": 3})
    assert lines(strategy) == lines(expected)
    assert all(np.array_equal(strategy.state.arrays[part], vector) for part, vector in expected.state.arrays.items())
    assert [line.split(":", 1)[1] for line in of_engine(caplog)] == [" MemoryError: no more"] * 2


def test_a_model_that_cannot_says_so_once(tiny_bert, groups, monkeypatch, caplog):
    monkeypatch.setattr(session, "problem", lambda adapted: "it is odd")
    session._resident.clear()
    flat = config(tiny_bert, num_server_rounds=2, fedara__warmup_rounds=0, fedara__final_rounds=0)
    with caplog.at_level(logging.WARNING, "fedara_flwr.engine"):
        start(flat | {"run.together": 3})
    session._resident.clear()
    assert not groups
    assert of_engine(caplog) == ["run.together = 3: one after the other instead: it is odd"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_clients_compute_where_the_run_says(tiny_bert):
    with pytest.raises(RunFailed, match="device = 'cuda': torch sees no GPU here"):
        start(config(tiny_bert, run__device="cuda"))
