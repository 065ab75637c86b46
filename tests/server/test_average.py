"""The average over rounds: what is evaluated and exported, while training goes on from the last round."""

from __future__ import annotations

import numpy as np
import pytest
from runs_helper import config, start

from fedara_flwr.keys import ConfigError
from fedara_flwr.model.deltas import DeltaLog
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import ModelSpec, ModuleSpec
from fedara_flwr.server.checkpoint import decode, encode
from fedara_flwr.server.state import ServerState
from fedara_flwr.tasks import read_settings

SPEC = ModelSpec("", (ModuleSpec("layer.0.query", 1, 1, 0),), ())
WHOLE, CUT = RankMask.full([2]), RankMask((2,), np.array([False, True]))


def state(values, mask):
    return ServerState({"E": np.array(values, dtype=np.float32)}, mask, DeltaLog(SPEC))


def test_by_hand_over_three_rounds_with_a_slot_that_dies():
    """Share a half: (2, 4), then (1, 5) from (0, 6), then of the slot that is left (5 + 1) / 2 = 3."""
    now = state([2, 4], WHOLE)
    now.take_average(SPEC, 0.5, WHOLE, 0)
    np.testing.assert_array_equal(now.average["E"], [2, 4])
    now.arrays = {"E": np.array([0, 6], dtype=np.float32)}
    now.take_average(SPEC, 0.5, WHOLE, 0)
    np.testing.assert_array_equal(now.average["E"], [1, 5])
    now.arrays, now.mask = {"E": np.array([1], dtype=np.float32)}, CUT
    now.take_average(SPEC, 0.5, WHOLE, 0)
    np.testing.assert_array_equal(now.average["E"], [3])
    assert now.shown().arrays is now.average and now.arrays["E"].tolist() == [1]


def test_without_a_share_there_is_none():
    now = state([2, 4], WHOLE)
    now.take_average(SPEC, 0.0, WHOLE, 0)
    assert now.average == {} and now.shown() is now


def test_another_backbone_begins_anew():
    now = state([2, 4], WHOLE)
    now.average = {"E": np.array([9, 9], dtype=np.float32)}
    now.take_average(SPEC, 0.5, WHOLE, version=7)
    np.testing.assert_array_equal(now.average["E"], [2, 4])


@pytest.mark.parametrize("method", ["fedara", "fedlora", "slora", "fedex-lora"])
def test_training_does_not_see_it(tiny_bert, method):
    last, mean = (start(config(tiny_bert, method=method, strategy__average=share)) for share in (0.0, 0.5))
    assert last.state.mask == mean.state.mask
    for part, values in last.state.arrays.items():
        np.testing.assert_array_equal(values, mean.state.arrays[part])
    lines = [[line["loss"] for line in loop.lines if line["type"] == "round"] for loop in (last, mean)]
    assert lines[0][0] == lines[1][0]
    changes = method != "fedex-lora"  # whose residual changes the backbone each round: there is nothing to average with
    assert (lines[0] != lines[1]) == changes


@pytest.mark.parametrize("method", ["flora", "flexlora"])
def test_factors_that_are_made_anew_are_not_averaged(tiny_bert, method):
    loop = start(config(tiny_bert, method=method, strategy__average=0.5, num_server_rounds=2))
    assert loop.method.averaged == 0.0 and loop.state.average == {}


def test_a_checkpoint_has_it(tiny_bert):
    loop = start(config(tiny_bert, strategy__average=0.5, num_server_rounds=3))
    back = decode(loop.spec, *encode(loop.state))
    assert back.average.keys() == loop.state.average.keys() == loop.state.arrays.keys()
    for part, values in loop.state.average.items():
        np.testing.assert_array_equal(back.average[part], values)


def test_a_share_of_one_is_refused():
    with pytest.raises(ConfigError, match="strategy.average"):
        read_settings({"strategy.average": 1.0})
