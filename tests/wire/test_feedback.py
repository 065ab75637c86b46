"""Error feedback: two rounds by hand, what the sums over rounds keep, the node's files, and whole runs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs_helper import CLIENTS, ShuffledGrid, TamperedGrid, config, prepare, start, stopped_in_round, written
from test_checkpoint import assert_same_end
from test_wire import MASK, PARTS, PLAN, SPEC, random_arrays

from fedara_flwr import engine, strategies
from fedara_flwr.keys import ConfigError
from fedara_flwr.merging.private import PrivateMean
from fedara_flwr.model.kept import Kept
from fedara_flwr.model.parts import SLOT_PARTS
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.node.kept import KeptStore
from fedara_flwr.server.dispatch import Dispatch
from fedara_flwr.tasks import read_settings
from fedara_flwr.wire.codec import CODECS
from fedara_flwr.wire.plan import Update
from fedara_flwr.wire.upload import code_update, residue_of

laws = settings(deadline=None, max_examples=60)
FED = replace(PLAN, up="int4", feedback=frozenset(PARTS), run="5" * 32)
METHODS = sorted(strategies.built_in())
OPTIONS = dict.fromkeys(("hetlora", "flexlora", "flora", "fedex-lora"), "ranks = [1, 2, 4]") | {"slora": "sparse-rounds = 0.5"}


def upload(plan, changes, residue, mask=None, key="k"):
    """Code `changes`, packed under `mask` (or the plan's), and decode them again; (decoded, what is said)."""
    mask = mask or plan.mask
    received = {part: np.zeros(SPEC.length(part, plan.mask, plan.entries), dtype=np.float32) for part in changes}
    arrays = {part: np.array(values, dtype=np.float32) for part, values in changes.items()}
    coded, said = code_update(Update(arrays, mask, 5, {}), plan, SPEC, received, key, residue)
    decode = CODECS[plan.up].decode
    return {part: decode(coded[part], SPEC.row_lengths(part, mask, plan.entries)) for part in arrays}, said


def empty(plan=FED):
    return residue_of(None, plan, SPEC)


# -- by hand ------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
def test_two_rounds_by_hand(seed):
    """E of m0 is a row of two. (7, 0.5): scale 1; 0.5 becomes 0 and leaves 0.5, or 1 and leaves -0.5. The next (7, 0.5) is then
    (7, 1) or (7, 0), which int4 has exactly: two halves have come to one, whatever the draw, and nothing is left."""
    plan, residue = replace(FED, seed=seed, feedback=frozenset({"E"})), empty()
    first, said = upload(plan, {"E": [7, 0.5, 0, 0]}, residue)
    assert said["feedback-norm"] == 0 and said["coding-error"] == pytest.approx((0.25 / 49.25) ** 0.5)
    assert residue.arrays["E"].tolist() == [0, 0.5 - first["E"][1], 0, 0] and abs(residue.arrays["E"][1]) == 0.5
    second, said = upload(replace(plan, server_round=8), {"E": [7, 0.5, 0, 0]}, residue)
    assert first["E"][1] + second["E"][1] == 1 and not residue.arrays["E"].any()
    assert said == {"coding-error": 0.0, "feedback-norm": pytest.approx((0.25 / 49.25) ** 0.5)}


def test_without_feedback_two_halves_may_come_to_two():
    sums = set()
    for seed in range(20):
        both = [upload(replace(FED, seed=seed, server_round=n), {"E": [7, 0.5, 0, 0]}, None)[0]["E"][1] for n in (7, 8)]
        sums.add(float(sum(both)))
    assert sums == {0, 1, 2}


def test_slots_by_hand():
    """Slots 0 and 1 of m0, 1 of m1, 1 of m2 are alive. Slot 1 of m0 dies, and m2's. E's residues stay with their slots; under
    a mask on which a slot is back it starts at zero."""
    residue = Kept({"E": np.array([1, 2, 3, 4], np.float32), "head": np.ones(6, np.float32)}, MASK)
    after = MASK.keep(np.array([True, False, True, False]))
    fitted = residue_of(residue, replace(FED, mask=after, feedback=frozenset({"E", "head"})), SPEC)
    assert fitted.arrays["E"].tolist() == [1, 3] and fitted.arrays["head"].tolist() == [1] * 6
    assert residue_of(fitted, replace(FED, feedback=frozenset({"E"})), SPEC).arrays["E"].tolist() == [1, 0, 3, 0]


@pytest.mark.parametrize(
    "changes, kept",
    [
        ({}, set(PARTS)),
        ({"feedback": frozenset({"B", "head"})}, {"B", "head"}),
        ({"sent": frozenset({"head"})}, set(PARTS)),
        ({"sent": frozenset({"head"}), "kept": frozenset({"B"})}, set(PARTS)),
        ({"sent": frozenset({"A", "head"}), "feedback": frozenset({"head"})}, set(PARTS) - {"A"}),
        ({"sent": frozenset({"head"}), "draw_seed": 1}, {"head"}),
        ({"draw_seed": 1}, {"head"}),
        ({"entries": 5}, {"head"}),
        ({"mask": RankMask.full([2, 2, 1])}, set()),
    ],
    ids=["all", "asked for", "waits", "waits, kept", "waits, asked for", "waits, drawn", "drawn", "entries", "other ranks"],
)
def test_what_means_something_else_is_dropped(changes, kept):
    plan = replace(FED, **changes)
    fitted = residue_of(Kept(random_arrays(MASK), MASK), plan, SPEC)
    assert set(fitted.arrays) == (plan.feedback & plan.sent) | kept
    for part, values in fitted.arrays.items():
        assert values.shape == (SPEC.length(part, plan.mask, plan.entries),) and values.any() == (part in kept)


def test_what_a_round_does_not_send_waits_for_its_turn():
    """E's residues go through a round that sends the head alone: untouched by its coding, the dead slot's is gone."""
    residue = Kept({"E": np.array([1, 2, 3, 4], np.float32), "head": np.zeros(6, np.float32)}, MASK)
    after = MASK.keep(np.array([True, True, False, True]))
    plan = replace(FED, mask=after, sent=frozenset({"head"}), feedback=frozenset({"head"}))
    fitted = residue_of(residue, plan, SPEC)
    decoded, _ = upload(plan, {"head": [7, 0.5, 0, 0, 0, 0]}, fitted)
    assert set(decoded) == {"head"} and fitted.arrays["head"].any()
    turn = residue_of(fitted, replace(plan, sent=frozenset({"E"}), feedback=frozenset({"E"})), SPEC)
    assert turn.arrays["E"].tolist() == [1, 2, 4]
    assert np.array_equal(turn.arrays["head"], fitted.arrays["head"])


def test_a_residue_of_other_lengths_is_dropped():
    residue = Kept({"A": np.ones(3, np.float32), "head": np.ones(7, np.float32)}, MASK)
    assert not any(values.any() for values in residue_of(residue, FED, SPEC).arrays.values())


# -- laws ------------------------------------------------------------
@st.composite
def courses(draw):
    """Masks that only shrink, of each a sub-mask that is sent, and a spread of the differences."""
    bits, course = np.ones(6, dtype=bool), []
    for _ in range(draw(st.integers(1, 6))):
        bits = bits & ~np.array(draw(st.lists(st.sampled_from([False, False, False, True]), min_size=6, max_size=6)))
        sent = np.array(draw(st.lists(st.sampled_from([True, True, True, False]), min_size=6, max_size=6)))
        course.append((RankMask((2, 2, 2), bits), RankMask((2, 2, 2), bits & sent), draw(st.sampled_from([1e-6, 1.0, 1e3]))))
    return course


@laws
@given(courses(), st.sampled_from(("float16", "int8", "int4")), st.integers(0, 99))
def test_all_that_was_sent_is_all_that_was_learnt_but_for_the_last_residue(course, up, seed):
    rng, residue, full = np.random.default_rng(seed), empty(), RankMask.full((2, 2, 2))
    sums = {part: np.zeros((2, SPEC.length(part, full))) for part in PARTS}
    for number, (mask, sent, spread) in enumerate(course):
        plan = replace(FED, mask=mask, up=up, seed=seed, server_round=number)
        residue = residue_of(residue, plan, SPEC)
        parts = [part for part in PARTS if part not in SLOT_PARTS or sent.count]
        changes = {part: rng.normal(0, spread, SPEC.length(part, sent)).astype(np.float32) for part in parts}
        decoded, _ = upload(plan, changes, residue, sent)
        for part in parts:
            for row, values in enumerate((changes[part], decoded[part])):
                where = full.elements(SPEC.widths(part), sent) if part in SLOT_PARTS else slice(None)
                sums[part][row, where] += values
    for part in PARTS:
        alive = full.elements(SPEC.widths(part), mask) if part in SLOT_PARTS else slice(None)
        exact, decoded = sums[part][:, alive]
        np.testing.assert_allclose(decoded, exact - residue.arrays[part], atol=4e-6 * max(s for *_, s in course), rtol=1e-5)


@laws
@given(st.integers(0, 999), st.sampled_from((("int8", 126), ("int4", 6))))
def test_a_residue_stays_a_share_of_the_largest_difference(seed, form):
    """Also where a row has one large number among small ones, which an error bound by lengths would not cover."""
    (up, share), residue, rng = form, empty(), np.random.default_rng(seed)
    rows = SPEC.row_lengths("B", MASK)
    starts, largest = np.cumsum(rows) - rows, np.zeros(len(rows))
    for number in range(8):
        change = (rng.normal(size=rows.sum()) ** 5 * 10.0 ** rng.integers(-3, 3)).astype(np.float32)
        largest = np.maximum(largest, np.maximum.reduceat(np.abs(change), starts))
        upload(replace(FED, up=up, seed=seed, server_round=number), {"B": change}, residue)
        assert (np.maximum.reduceat(np.abs(residue.arrays["B"]), starts) <= largest / share * (1 + 1e-5)).all()


# -- whole runs ------------------------------------------------------------
def flat(model, method="fedara", **more):
    return config(
        model,
        method=method,
        **{
            "num_server_rounds": 3,
            "strategy__fraction_train": 1.0,
            **({"strategy__options": OPTIONS[method]} if method in OPTIONS else {}),
            "fedara__warmup_rounds": 0,
            "fedara__final_rounds": 0,
            "wire__down": "int8",
            "wire__up": "int4",
            "wire__feedback": True,
            **more,
        },
    )


def of(strategy, kind="client"):
    return [line for line in strategy.lines if line["type"] == kind]


@pytest.mark.parametrize("method", METHODS)
def test_every_method(tiny_bert, method):
    """Every node is drawn in both rounds, so that all have something to add in the second."""
    fed = start(flat(tiny_bert, method, num_server_rounds=2))
    assert all((line["feedback-norm"] > 0) == (line["round"] > 1) for line in of(fed)) and len(of(fed)) == 2 * CLIENTS
    assert 0 < of(fed, "round")[1]["client-feedback-norm"] < 0.5
    assert all(np.isfinite(vector).all() for vector in fed.state.arrays.values())


def test_without_feedback_the_first_round_is_the_same(tiny_bert):
    """There is nothing to add yet: the same merged values, of the same sizes but for the plan's own keys."""
    fed, plain = (start(flat(tiny_bert, num_server_rounds=1, wire__feedback=on)) for on in (True, False))
    assert all(np.array_equal(fed.state.arrays[part], plain.state.arrays[part]) for part in fed.state.arrays)
    sent = [[line["bytes-up"] | line["bytes-down"] | {"other": 0} for line in of(run)] for run in (fed, plain)]
    assert sent[0] == sent[1] and not any("feedback-norm" in line for line in of(plain))


def test_slots_that_are_made_anew_have_no_residue(tiny_bert, monkeypatch):
    """flora draws A and B afresh each round: only the head's rounding comes along."""
    strategy, grid = prepare(flat(tiny_bert, "flora"))
    seen, pack = [], Dispatch.pack
    monkeypatch.setattr(Dispatch, "pack", lambda *args: (seen.append(pack(*args)), seen[-1])[1])
    strategy.start(grid, strategy.initial_arrays(), 1)
    assert {plan.feedback for plan, _ in seen} == {frozenset({"head"})}
    assert {plan.run for plan, _ in seen} == {strategy.run_id}


def test_order_of_replies_is_irrelevant(tiny_bert):
    one, two = start(flat(tiny_bert)), start(flat(tiny_bert), ShuffledGrid)
    assert all(np.array_equal(one.state.arrays[part], two.state.arrays[part]) for part in one.state.arrays)


def test_a_run_that_goes_on_and_another_beside_it(tiny_bert, tmp_path, monkeypatch):
    """Stopped when clients had trained round 3 already: they start it from the residues of round 2 again. The runs share the
    nodes' folder."""

    def named(name, **more):
        return flat(tiny_bert, "fedara", run__dir=str(tmp_path), run__name=name, **more)

    engine.run(named("whole"), CLIENTS)
    with stopped_in_round(monkeypatch, 3):
        engine.run(named("cut"), CLIENTS)
    engine.run(named("", run__resume="cut"), CLIENTS)
    assert_same_end(tmp_path / "cut", tmp_path / "whole")
    norms = [line["client-feedback-norm"] for line in written(tmp_path / "cut")[0] if line["type"] == "round"]
    assert norms[0] == 0 and norms[2] > 0


def test_a_node_that_cuts_its_updates_keeps_nothing(tiny_bert):
    """Else it would send what was cut away, or the noise of other rounds."""
    strategy, grid = prepare(flat(tiny_bert))
    grid.contexts[1000].node_config["update-clip"] = 1e-3
    strategy.start(grid, strategy.initial_arrays(), 1)
    assert {line["client"] for line in of(strategy) if "feedback-norm" not in line} == {"0"}
    root = Path(os.environ["FLWR_HOME"]) / "fedara-store" / "residues"
    mine = [KeptStore(root, strategy.run_id, str(key)).take(2) is not None for key in range(CLIENTS)]
    assert mine == [False] + [True] * (CLIENTS - 1)


def test_a_lost_reply_leaves_the_residue_of_what_was_sent(tiny_bert):
    """Node 0's reply of round 2 is refused. What it adds in round 3 is what that upload left, not what the first one did."""

    def tamper(number, node, reply):
        if (number, node) == (2, 0):
            reply.content["metrics"]["num-examples"] = -1
        return reply

    strategy = start(flat(tiny_bert), TamperedGrid, tamper=tamper)
    assert [drop["client"] for line in of(strategy, "round") for drop in line["dropped"]] == ["0"]
    assert [line["feedback-norm"] > 0 for line in of(strategy) if line["client"] == "0"] == [False, True]
    store = KeptStore(Path(os.environ["FLWR_HOME"]) / "fedara-store" / "residues", strategy.run_id, "0")
    assert {file.name for file in store.folder.iterdir()} == {"1.safetensors", "2.safetensors", "3.safetensors"}


def test_a_private_run_takes_it(tiny_bert):
    """Nothing is told of the residue."""
    private = {"privacy__clip": 0.5, "privacy__noise_multiplier": 1.0, "strategy__weighting": "uniform"}
    strategy = start(flat(tiny_bert, num_server_rounds=2, **private))
    assert len(of(strategy)) == 2 * CLIENTS and not any("feedback-norm" in line for line in of(strategy))


def test_a_private_mean_moves_by_no_more_than_its_clip_whatever_the_residue():
    residue = Kept({part: values * 1e6 for part, values in random_arrays(MASK).items()}, MASK)
    decoded, said = upload(FED, random_arrays(MASK, seed=1), residue)
    still = {part: np.zeros_like(values) for part, values in decoded.items()}
    mean = PrivateMean(SPEC, MASK, still, frozenset(PARTS), clip=0.5, noise_multiplier=1.0, planned=2, normal=np.zeros)
    mean.add("k", Update(decoded, MASK, 5, {}), 1)
    moved = np.concatenate(list(mean.result().values()))
    assert said["feedback-norm"] > 1e5 and np.linalg.norm(moved) == pytest.approx(0.5 / 2, rel=1e-5)


def test_settings():
    assert not read_settings({"wire.up": "int4"}).wire.feedback
    with pytest.raises(ConfigError, match="wire.feedback = True: wire.up = 'float32' .* allowed with it are .*'int4'"):
        read_settings({"wire.feedback": True, "wire.down": "int4", "wire.up": "float32"})
