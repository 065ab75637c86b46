"""How far training can move a number: AdamW's own bound, and updates that go beyond it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from runs_helper import CLIENTS, TamperedGrid, config, prepare, start

from fedara_flwr.client.train import make_optimizer
from fedara_flwr.merging import norms
from fedara_flwr.merging.norms import Norms
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.training import BETAS, SETTLED, LocalTraining, farthest
from fedara_flwr.wire.plan import TrainPlan

RATE = 0.01


def plan(sent=("head",), **train):
    values = {"learning_rate": RATE, "head_learning_rate": RATE, "steps": 6} | train
    return TrainPlan(1, 0, RankMask.full([]), (), LocalTraining(**values), frozenset(sent))


def moved(gradients, warmup=0):
    """How far AdamW as clients have it takes numbers from 0; `gradients` of shape (steps, numbers)."""
    parameter = torch.nn.Parameter(torch.zeros(gradients.shape[1]))
    optimizer, scheduler = make_optimizer(plan(warmup_steps=warmup), lambda name: [parameter] if name == "head" else [])
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
        scheduler.step()
    return np.abs(parameter.detach().numpy())


# -- the bound --------------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 2**32), st.floats(-6, 6))
def test_no_gradients_take_adamw_further(steps, warmup, seed, size):
    """Of one sign, of any, mostly 0, growing, falling: each in columns of their own."""
    rng = np.random.default_rng(seed)
    plain = rng.standard_normal((steps, 4))
    sparse = plain * (rng.random((steps, 4)) < 0.2)
    growing = np.abs(plain) * 10.0 ** (np.linspace(0, size, steps))[:, None]
    tight = tightest(steps)[:, None]
    gradients = np.concatenate([plain, np.abs(plain), sparse, growing, np.ones((steps, 1)), tight], axis=1)
    assert (moved(gradients, warmup) <= RATE * farthest(steps, warmup) * (1 + 1e-5)).all()


def tightest(steps):
    """Gradients in proportion to a_i/b_i, with which the last step is as long as one can be."""
    first, second = BETAS
    return (first / second) ** np.arange(steps - 1, -1, -1)


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_the_last_step_is_reached(steps):
    gradients = tightest(steps)[:, None]
    before = moved(gradients[:-1])[0] if steps > 1 else 0.0
    assert moved(gradients)[0] - before == pytest.approx(RATE * (farthest(steps) - farthest(steps - 1)), rel=1e-3)


def test_the_bound_by_hand():
    """One step moves a number by the rate. Half of it in the first of two with one step of warm-up."""
    assert farthest(0) == 0.0 and farthest(1) == pytest.approx(1.0)
    assert farthest(2) == pytest.approx(2.0014, abs=1e-4) and farthest(2, 1) == pytest.approx(1.5014, abs=1e-4)
    assert farthest(6) == pytest.approx(6.038, abs=1e-3)
    assert farthest(SETTLED + 1) - farthest(SETTLED) == pytest.approx(7.27, abs=0.01)
    assert np.isfinite(farthest(2**63))


def test_each_part_goes_by_its_own_rate_and_format():
    """E by its factor, the head by its own; feedback adds up to a sixth; a backbone may be held in bfloat16."""
    found = norms.reach(plan(("A", "E", "head", "backbone"), e_lr_factor=3.0, head_learning_rate=0.001, steps=1), 5)
    assert found == pytest.approx({"A": 0.0101, "E": 0.0303, "head": 0.00101, "backbone": 0.0202 + 2**-7})
    by_epochs = norms.reach(plan(("A",), steps=0, epochs=2, batch_size=10), 35)  # 4 steps in each epoch
    assert by_epochs["A"] == pytest.approx(RATE * farthest(8) * 1.01)


# -- cutting ----------------------------------------------------------------------------------------------------------
def test_what_is_beyond_is_cut_and_said():
    before = {"head": np.array([1, 1, 1, 1], np.float32)}
    arrays = {"head": np.array([1.05, 9, -1e12, 0.95], np.float32)}
    whole, said = Norms(20.0, {}).cut(arrays, before, {"head": 0.1})
    assert whole["head"] == pytest.approx([1.05, 1.1, 0.9, 0.95], abs=1e-5) and whole["head"].dtype == np.float32
    assert said == ["2 of head moved up to 1e+12, its steps reach 0.1"]
    assert Norms(20.0, {}).cut(arrays, before, {})[1] == []  # of a part that stayed with the node nothing is known
    usual = Norms(20.0, {"head": [2.0, 2.0, 2.0]})  # as behind noise: five times what is usual
    assert usual.cut(arrays, before, {"head": 0.1})[0]["head"] == pytest.approx([1.05, 9, -9, 0.95], abs=1e-4)


def spiked(value, part="head", count=1):
    def tamper(number, node, reply):
        if node == 2:
            arrays = {name: array.numpy().copy() for name, array in reply.content.array_records["arrays"].items()}
            arrays[part][:count] += value
            reply.content["arrays"] = ArrayRecord({name: Array(values) for name, values in arrays.items()})
        return reply

    return tamper


@pytest.mark.parametrize(
    ("part", "flat"),
    [
        ("head", {}),  # one number, the first round's own median
        ("A", {"train__steps": 1}),  # honest A does not move in the first step, so there is no median
        ("B", {"strategy__fraction_train": 0.4}),  # a round of two
    ],
)
def test_one_number_far_away_goes_no_further_than_steps_do(tiny_bert, part, flat, caplog):
    """In round 1, by far too far for the part's length, and just not too far for it."""
    base = {"strategy__fraction_train": 1.0, "num_server_rounds": 1, "method": "fedara-static"} | flat
    for value in (1e9, 0.2):
        with caplog.at_level(logging.WARNING):
            loop = start(config(tiny_bert, **base), TamperedGrid, tamper=spiked(value, part))
        (line,) = [line for line in loop.lines if line["type"] == "round"]
        if "2" not in line["sampled"]:
            pytest.fail("choose a seed under which client 2 is asked")
        rate = loop.settings.train.local(loop.method.learning_rate)
        rate = rate.head_learning_rate if part == "head" else rate.learning_rate
        start_of = loop.method.start().arrays[part]
        far = float(np.abs(loop.state.arrays[part] - start_of).max())
        assert far <= rate * farthest(loop.settings.train.steps) * 1.02
        cut, dropped = line.get("cut", {}), [drop["client"] for drop in line["dropped"]]
        assert (list(cut), dropped) in ((["2"], []), ([], ["2"])) and (value == 1e9 or cut)
        assert not cut or f"1 of {part} moved up to" in cut["2"][0]
    assert "update of client 2 cut: 1 of" in caplog.text


# -- honest clients ---------------------------------------------------------------------------------------------------
SHORT = {"num_server_rounds": 2, "fedara__warmup_rounds": 0, "strategy__fraction_train": 0.5, "data__test": 0.95}


@pytest.mark.parametrize(
    "flat",
    [
        {"wire__up": "int4", "wire__down": "int8", "head__start": "statistics"},
        {"wire__up": "int4", "wire__down": "int4", "wire__feedback": True, "train__final_rate": 0.5},
        {"wire__up": "float16", "wire__down": "float16", "train__e_lr_factor": 5.0, "train__warmup_steps": 1},
        {"wire__up": "int8", "train__steps": 0, "train__epochs": 2, "train__prox_mu": 0.1, "train__clip_norm": 1.0},
        {"method": "full", "wire__up": "int8", "wire__down": "int8"},
        {"method": "full", "model__dtype": "bfloat16"},
        {"method": "flora", "wire__up": "int4"},
        {"method": "slora", "strategy__options": "sparse-rounds = 0.5"},
        {"method": "hetlora", "strategy__options": "ranks = [1, 4]"},
        {"method": "fedsa-lora"},
        {"method": "federa"},
    ],
    ids=str,
)
def test_nothing_of_honest_clients_is_cut(tiny_bert, flat):
    loop = start(config(tiny_bert, **{"method": "fedara"} | SHORT | flat))
    lines = [line for line in loop.lines if line["type"] == "round"]
    assert all(line["good"] == len(line["sampled"]) == CLIENTS // 2 and "cut" not in line for line in lines)


@pytest.mark.parametrize("up", ["int4", "int8"])
def test_a_residue_of_larger_steps_is_not_cut(tiny_bert, up):
    """Rates fall to a hundredth, and what rounding took at the first ones comes with the next update."""
    coded = {"wire__up": up, "wire__down": "int8", "wire__feedback": True, "train__final_rate": 0.01, "train__steps": 6}
    loop = start(config(tiny_bert, **SHORT | coded | {"method": "fedlora", "strategy__fraction_train": 1.0}), clients=2)
    lines = [line for line in loop.lines if line["type"] == "round"]
    assert [line["good"] for line in lines] == [2, 2] and not any("cut" in line for line in lines)


def test_noise_of_a_whole_fleet_is_not_cut_away(tiny_bert):
    """Three nodes or more that add noise of far more than their steps reach set what is usual, in round 1, too."""
    loop, grid = prepare(config(tiny_bert, **SHORT | {"strategy__fraction_train": 1.0, "method": "fedlora"}))
    for context in grid.contexts.values():
        context.node_config |= {"update-clip": 1.0, "update-noise": 0.5}
    loop.start(grid, loop.initial_arrays(), 2)
    lines = [line for line in loop.lines if line["type"] == "round"]
    assert all(line["good"] == CLIENTS for line in lines)
    cut = [int(words.split()[0]) for line in lines for said in line.get("cut", {}).values() for words in said]
    assert sum(cut) < 20  # of some 200,000 numbers
