"""RoLoRA: one factor at a time, so the mean of products is the product of means."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from runs_helper import Callback, InProcessGrid, config, prepare

from fedara_flwr.merging.factors import module_factors
from fedara_flwr.model.kept import Kept
from fedara_flwr.node.kept import KeptStore
from fedara_flwr.node.settings import NodeSettings
from fedara_flwr.strategies.base import Client
from fedara_flwr.wire.records import plan_from_content
from fedara_flwr.wire.upload import residue_of

ROUNDS = 4


class WatchedGrid(InProcessGrid):
    """Remembers the plans, and what went down and came up."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen = []

    def _call(self, message):
        reply = super()._call(message)
        if message.metadata.message_type == "train":
            assert not reply.has_error(), reply.error.reason
            number = message.content.config_records["plan"]["round"]
            self.seen.append((number, message.metadata.dst_node_id - 1000, message.content, reply.content))
        return reply


class Rounds(Callback):
    """The server's values after each round."""

    def __init__(self):
        self.arrays = []

    def after_round(self, loop):
        self.arrays.append({part: values.copy() for part, values in loop.state.arrays.items()})


def play(flat):
    loop, grid = prepare(flat, WatchedGrid)
    after = Rounds()
    loop.callbacks.append(after)
    after.arrays.append({part: values.copy() for part, values in loop.state.arrays.items()})
    loop.start(grid, loop.initial_arrays(), ROUNDS)
    return loop, grid, after.arrays


@pytest.fixture(scope="module")
def whole(tiny_bert):
    return play(config(tiny_bert, method="rolora", num_server_rounds=ROUNDS))


def turn(number):
    """(the factor of this round, the frozen one)."""
    return ("B", "A") if number % 2 else ("A", "B")


def test_one_factor_is_sent_in_each_round(whole):
    """B in odd rounds, since A has no gradient while B = 0; both go down in all."""
    loop, grid, _ = whole
    assert [number for number, *_ in grid.seen] == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    for number, _, down, up in grid.seen:
        moves, _ = turn(number)
        plan = plan_from_content(down, len(loop.spec.modules))
        assert plan.sent == plan.trained == {moves, "head"} and not plan.kept and not plan.drawn
        assert set(down.array_records["arrays"]) == {"A", "B", "head"}
        assert set(up.array_records["arrays"]) == {moves, "head"}


def test_bytes_are_counted(whole):
    loop, *_ = whole
    size = {part: 4 * loop.spec.length(part, loop.state.mask) for part in ("A", "B", "head")}
    for line in (line for line in loop.lines if line["type"] == "round"):
        moves, still = turn(line["round"])
        assert {part: line["bytes"][f"down.{part}"] for part in size} == {part: 3 * size[part] for part in size}
        assert (line["bytes"][f"up.{moves}"], line["bytes"][f"up.{still}"]) == (3 * size[moves], 0)
        assert line["bytes"]["up.head"] == 3 * size["head"]


def test_b_moves_in_odd_rounds_and_a_in_even_ones(whole):
    """The frozen one keeps its bits."""
    _, _, after = whole
    for number, (before, now) in enumerate(zip(after, after[1:], strict=False), 1):
        moves, still = turn(number)
        assert np.array_equal(now[still], before[still])
        assert np.abs(now[moves] - before[moves]).max() > 1e-4 and not np.array_equal(now["head"], before["head"])


def test_averaging_is_exact(whole):
    """Of every module the merged product is the weighted mean of the clients' products; so there is no error to report."""
    loop, grid, after = whole
    for number in range(1, ROUNDS + 1):
        moves, still = turn(number)
        replies = [up for found, _, _, up in grid.seen if found == number]
        weights = [up.metric_records["metrics"]["num-examples"] for up in replies]
        products = []
        for up in replies:
            arrays = {moves: up.array_records["arrays"][moves].numpy(), still: after[number - 1][still]}
            products.append([left @ right for left, right in module_factors(loop.spec, loop.state.mask, arrays)])
        merged = [left @ right for left, right in module_factors(loop.spec, loop.state.mask, after[number])]
        for m, product in enumerate(merged):
            mean = np.average([found[m] for found in products], axis=0, weights=weights)
            np.testing.assert_allclose(product, mean, rtol=1e-5, atol=1e-8)
    assert all("factor-error" not in line for line in loop.lines)


def test_what_rounding_took_of_a_factor_waits_for_its_turn(tiny_bert, tmp_path, monkeypatch):
    """With error feedback: round 4 leaves the residue of B as round 3 did, and changes A's, which waited since round 2."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    flat = config(tiny_bert, method="rolora", num_server_rounds=ROUNDS, strategy__fraction_train=1.0, wire__up="int4")
    loop, *_ = play(flat | {"wire.feedback": True})
    store = KeptStore(NodeSettings.read({}).store / "residues", loop.run_id, "0")
    fourth, third = store.take(5), store.take(4)  # looking back removes what is later
    assert set(third.arrays) == set(fourth.arrays) == {"A", "B", "head"}
    assert all(values.any() for kept in (third, fourth) for values in kept.arrays.values())
    assert np.array_equal(fourth.arrays["B"], third.arrays["B"])
    assert not np.array_equal(fourth.arrays["A"], third.arrays["A"])


def test_the_residue_that_waited_is_added(tiny_bert):
    """Of what a node kept, all that may be fed back is under the next plan's mask: what is sent, and what has to wait."""
    loop, _ = prepare(config(tiny_bert, method="rolora", num_server_rounds=ROUNDS))
    spec, mask = loop.spec, loop.state.mask
    kept = Kept({part: np.full(spec.length(part, mask), 0.5, np.float32) for part in ("A", "B", "head")}, mask)
    fewer = mask.keep(np.arange(mask.count) % 2 == 0)
    plan = replace(loop.method.plan(loop.state, Client("0")), mask=fewer, feedback=frozenset({"B", "head"}))
    found = residue_of(kept, plan, spec)
    assert {part: values.shape for part, values in found.arrays.items()} == {
        part: (spec.length(part, fewer),) for part in ("A", "B", "head")
    }
    assert all((values == 0.5).all() for values in found.arrays.values())
    # another draw: what was learnt beside other values means something else
    other = residue_of(kept, replace(plan, draw_seed=9), spec)
    assert set(other.arrays) == {"B", "head"} and not other.arrays["B"].any() and other.arrays["head"].all()
