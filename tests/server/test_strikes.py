"""Nodes that fail again and again, are silent or slow: what they cost the others, and for how long."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from runs_helper import CLIENTS, ShuffledGrid, config, prepare, turn_into_error

from fedara_flwr.engine import InProcessGrid
from fedara_flwr.keys import ConfigError
from fedara_flwr.server.checkpoint import decode, encode
from fedara_flwr.server.loop import RoundLoop
from fedara_flwr.server.messages import simulates
from fedara_flwr.server.strikes import Strikes

ALL = {"method": "fedara-static", "strategy__fraction_train": 1.0}
SILENT = 1002


class Real(InProcessGrid):
    """As of a deployment: replies are there before they are looked for, those of `silent` kinds from one node never."""

    simulation = runs_clients = False

    def __init__(self, *args, silent=(), there=lambda: True, **options):
        super().__init__(*args, **options)
        self.silent, self.there, self.asked, self.ready = silent, there, [], {}

    def get_node_ids(self):
        return [node for node in super().get_node_ids() if node != SILENT or self.there()]

    def push_messages(self, messages):
        messages = list(messages)
        ids = list(super().push_messages(messages))
        for message_id, metadata in zip(ids, (message.metadata for message in messages), strict=True):
            bad = metadata.dst_node_id == SILENT
            self.asked += [metadata.message_type] * bad
            if not (bad and metadata.message_type in self.silent):
                self.ready[message_id] = super().pull_messages([message_id])
        return ids

    def pull_messages(self, message_ids):
        return [reply for message_id in message_ids for reply in self.ready.pop(message_id, [])]


def rounds(loop):
    return [line for line in loop.lines if line["type"] == "round"]


def sampled(loop, key="2"):
    return [line["round"] for line in rounds(loop) if key in line["sampled"]]


def begun(tiny_bert, number=6, grid_class=Real, changes=(), **options):
    loop, grid = prepare(config(tiny_bert, num_server_rounds=number, **{**ALL, **dict(changes)}), grid_class, **options)
    loop._validate = lambda number, arrays: None
    return loop, grid


def test_failures_in_a_row_double_the_rest():
    strikes, asked = Strikes(2), []
    for strikes.round in range(1, 40):
        if not strikes.sits_out("a"):
            asked.append(strikes.round)
            strikes.settle([("a", "timeout"), ("a", "error-2")], ["b"])
    assert asked == [1, 2, 4, 7, 12, 21, 38]
    strikes.settle([], ["a"])
    assert not strikes.sits_out("a") and not strikes.sitting(39)
    for strikes.round in (40, 41):
        strikes.settle([("a", "norm")], [])
    assert strikes.sitting(42) == {"a": "failed 2 times in a row (norm), and sits out until round 43"}


def test_one_that_counts_and_fails_in_one_round_has_not_failed():
    """Such as by a second reply."""
    kept = {}
    strikes = Strikes(1, kept)
    strikes.settle([("a", "duplicate"), ("b", "timeout")], ["a"])
    assert list(kept) == ["b"]


def test_a_node_that_is_silent_in_training_costs_fewer_and_fewer_rounds(tiny_bert, caplog):
    loop, grid = begun(tiny_bert, 6, silent=["train"], changes={"strategy__round_timeout": 0.6})
    began = time.monotonic()
    loop.start(grid, loop.initial_arrays(), 6)
    assert sampled(loop) == [1, 2, 4] and grid.asked.count("train") == 3
    assert [line["sitting-out"] for line in rounds(loop)] == [[], [], ["2"], [], ["2"], ["2"]]
    assert all(line["good"] == CLIENTS - 1 for line in rounds(loop))
    assert "client 2 failed 3 times in a row (timeout), and sits out until round 7" in caplog.text
    assert loop.roster.left_out() == {}, "it is asked again in the next round"
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("grid_class", [InProcessGrid, ShuffledGrid])
def test_who_sits_out_does_not_depend_on_the_order_of_replies(tiny_bert, grid_class):
    """Three clients fail in turns of their own."""

    class Failing(grid_class):
        def _call(self, message):
            reply = super()._call(message)
            number = message.content.config_records.get("plan", {}).get("round", 0)
            if number and message.metadata.dst_node_id in FAILS.get(number, ()):
                turn_into_error(reply)
            return reply

    loop, grid = begun(tiny_bert, 6, Failing)
    loop.start(grid, loop.initial_arrays(), 6)
    assert [line["sitting-out"] for line in rounds(loop)] == [[], [], ["1"], ["2"], ["1"], ["1"]]
    assert [line["good"] for line in rounds(loop)] == [5, 4, 4, 4, 5, 5]
    assert loop.state.strikes == {"1": [3, 7, "error-2"]}


FAILS = {1: {1001}, 2: {1001, 1002}, 3: {1002}, 4: {1001}}


def test_nobody_sits_out_where_too_few_are_left(tiny_bert):
    """Fewer than min-train-nodes: it is no client's fault alone."""

    class Failing(InProcessGrid):
        def _call(self, message):
            reply = super()._call(message)
            if message.metadata.message_type == "train" and message.content.config_records["plan"]["round"] < 4:
                turn_into_error(reply)
            return reply

    loop, grid = begun(tiny_bert, 5, Failing, {"strategy__max_failed_rounds": 9})
    loop.start(grid, loop.initial_arrays(), 5)
    assert [(len(line["sampled"]), line["good"]) for line in rounds(loop)] == [(6, 0)] * 3 + [(6, 6)] * 2
    assert not any(line["sitting-out"] for line in rounds(loop)) and not loop.state.strikes


def test_strikes_leave_as_many_as_must_reply(tiny_bert):
    """One client fails in every round, one in the first two: of the other four alone no round could count."""

    class Failing(InProcessGrid):
        def _call(self, message):
            reply = super()._call(message)
            number = message.content.config_records.get("plan", {}).get("round", 0)
            if (message.metadata.dst_node_id == SILENT and number) or (
                message.metadata.dst_node_id == 1003 and number in (1, 2)
            ):
                turn_into_error(reply)
            return reply

    loop, grid = begun(tiny_bert, 4, Failing, {"strategy__min_replies": 5})
    loop.start(grid, loop.initial_arrays(), 4)
    assert [line["good"] for line in rounds(loop)] == [4, 4, 5, 5]


class Broken(InProcessGrid):
    """One client always fails."""

    def _call(self, message):
        reply = super()._call(message)
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == SILENT:
            turn_into_error(reply)
        return reply


def test_a_run_that_goes_on_remembers_who_sits_out(tiny_bert):
    """A run that was stopped and went on is the one that was not."""
    whole, grid = begun(tiny_bert, 5, Broken)
    whole.start(grid, whole.initial_arrays(), 5)
    first, grid = begun(tiny_bert, 5, Broken)
    first.start(grid, first.initial_arrays(), 2)
    tensors, facts = encode(first.state)
    second, grid = begun(tiny_bert, 5, Broken)
    state = decode(second.spec, tensors, json.loads(json.dumps(facts)))
    loop = RoundLoop(second.settings, second.method, state, second.roster.expected, second.callbacks)
    loop._validate = second._validate
    loop.start(grid, loop.initial_arrays(), 5)
    assert [line["sitting-out"] for line in rounds(whole)] == [[], [], ["2"], [], ["2"]]
    assert [line["sitting-out"] for line in rounds(second)] == [["2"], [], ["2"]]
    assert loop.state.strikes == whole.state.strikes == {"2": [3, 7, "error-2"]}
    assert all(np.array_equal(vector, whole.state.arrays[part]) for part, vector in loop.state.arrays.items())
    assert loop.roster.left_out() == {"2": "failed 3 times in a row (error-2), and sits out until round 7"}


def test_a_newcomer_that_does_not_say_who_it_is_holds_up_no_round(tiny_bert, monkeypatch):
    """It leaves and comes again after every round; it is asked less and less, and each time beside the round."""
    monkeypatch.setattr("fedara_flwr.server.roster.NEWCOMERS", 0.3)
    loop, grid = begun(tiny_bert, 8, silent=["query.whoami"], changes={"strategy__node_timeout": 1.0})
    grid.there = lambda: 1 <= len(rounds(loop))
    began = time.monotonic()
    loop.start(grid, loop.initial_arrays(), 8)
    assert all(line["good"] == CLIENTS - 1 for line in rounds(loop))
    assert 1 <= grid.asked.count("query.whoami") <= 4 and time.monotonic() - began < 60


def test_a_node_silent_at_the_start_is_waited_for_once(tiny_bert):
    loop, grid = begun(tiny_bert, 2, silent=["query.whoami"], changes={"strategy__node_timeout": 1.0})
    loop.start(grid, loop.initial_arrays(), 2)
    assert [line["good"] for line in rounds(loop)] == [CLIENTS - 1] * 2


@pytest.mark.parametrize("quorum, timeout, reason", [(0.8, 60.0, "straggler"), (1.0, 1.0, "timeout")])
def test_a_round_closes_soon_after_the_quorum(tiny_bert, quorum, timeout, reason):
    changes = {"strategy__quorum": quorum, "strategy__straggler_timeout": 0.3, "strategy__round_timeout": timeout}
    loop, grid = begun(tiny_bert, 1, silent=["train"], changes=changes)
    loop.start(grid, loop.initial_arrays(), 1)
    (line,) = rounds(loop)
    assert [(drop["client"], drop["reason"]) for drop in line["dropped"]] == [("2", reason)]
    assert line["good"] == CLIENTS - 1 and line["seconds"] < 30
    assert loop.state.strikes == {"2": [1, 1, reason]}


class FailsAt(Real):
    """Node 1000 fails at one kind of message."""

    def __init__(self, *args, kind, **options):
        super().__init__(*args, **options)
        self.kind = kind

    def _call(self, message):
        reply = super()._call(message)
        if message.metadata.message_type == self.kind and message.metadata.dst_node_id == 1000:
            turn_into_error(reply)
        return reply


def test_bad_replies_are_no_quorum(tiny_bert):
    """Of six, one is silent and one fails: four of the five that are wanted."""

    changes = {"strategy__quorum": 0.8, "strategy__straggler_timeout": 0.0, "strategy__round_timeout": 2.0}
    loop, grid = begun(tiny_bert, 1, FailsAt, changes, silent=["train"], kind="train")
    loop.start(grid, loop.initial_arrays(), 1)
    assert sorted(drop["reason"] for drop in rounds(loop)[0]["dropped"]) == ["error-2", "timeout"]


def test_bad_evaluations_are_no_quorum(tiny_bert):
    """Of six, one is silent and one fails at once: the four that are good are waited for."""

    class Failing(FailsAt):
        def pull_messages(self, message_ids):
            replies = super().pull_messages(message_ids)
            late = [
                reply for reply in replies if reply.metadata.message_type == "evaluate" and reply.metadata.src_node_id == 1005
            ]
            if late and self.looks < 2:
                self.looks += 1
                self.ready |= dict.fromkeys(message_ids, replies)
                return []
            return replies

        looks = 0

    changes = {"strategy__quorum": 0.65, "strategy__straggler_timeout": 0.0, "data__client_validation": 0.2}
    loop, grid = begun(tiny_bert, 1, Failing, changes, silent=["evaluate"], kind="evaluate")
    loop.start(grid, loop.initial_arrays(), 1)
    assert next(line["clients"] for line in loop.lines if line["type"] == "client-evaluation") == 4


def test_a_deployment_waits_for_as_many_nodes_as_its_owner_says(tiny_bert):
    """Whatever the first one says of partitions; in a simulation all that there are come."""
    loop, grid = begun(tiny_bert, 1, changes={"strategy__min_available_nodes": 6, "strategy__node_timeout": 60.0})
    came = iter([[1000], [1000, 1001]])
    everybody = list(grid.contexts)
    grid.get_node_ids = lambda: next(came, everybody)
    for context in grid.contexts.values():
        context.node_config["num-partitions"] = 1
    loop.roster.wait(grid)
    assert len(loop.roster.nodes) == 6 and not simulates(grid)


@pytest.mark.parametrize("real", [True, False])
def test_a_client_whose_data_changed_while_the_run_was_stopped(tiny_bert, real, caplog):
    loop, grid = begun(tiny_bert, 1, Real if real else InProcessGrid)
    loop.roster.wait(grid)
    loop.roster.sample(grid, 1, CLIENTS)
    before = {**loop.roster.examples, "1": loop.roster.examples["1"] + 7}
    if real:
        assert loop.roster.rejoin(grid, before, {}, {}) == {"1": [before["1"], before["1"] - 7]}
        assert f"client 1 has {before['1'] - 7} examples, it had {before['1']}: it trains on them from now on" in caplog.text
    else:
        with pytest.raises(ConfigError, match="run.resume: client 1 has"):
            loop.roster.rejoin(grid, before, {}, {})


def test_a_simulation_is_known_by_its_grid():
    """Which is named, not imported."""
    from flwr.superlink.grid import HttpGrid, InMemoryGrid

    assert [simulates(cls.__new__(cls)) for cls in (InMemoryGrid, HttpGrid, InProcessGrid)] == [True, False, True]
