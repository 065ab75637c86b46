"""Robust rules, the bound on lengths, the cap on weights: by hand, by law, and in whole runs with attackers among clients."""

from __future__ import annotations

import logging
import random
from collections import Counter

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from runs_helper import config, prepare, start

from fedara_flwr import client_app, log
from fedara_flwr.client import session
from fedara_flwr.client.train import ClientData
from fedara_flwr.engine import InProcessGrid
from fedara_flwr.keys import ConfigError
from fedara_flwr.merging.norms import ENOUGH, LENGTHS_KEPT, Norms
from fedara_flwr.merging.robust import RULES
from fedara_flwr.model.difference import difference, root_mean_squares
from fedara_flwr.model.parts import SLOT_PARTS
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import ModelSpec, ModuleSpec, ParameterSpec
from fedara_flwr.node.settings import NodeSettings
from fedara_flwr.server import loop as loops
from fedara_flwr.server.checkpoint import decode, encode
from fedara_flwr.server.roster import Expected, Roster
from fedara_flwr.server.told import last_line
from fedara_flwr.strategies.allocation import Vote, arbitrate_budget, arbitration_order, counts, outvoted
from fedara_flwr.strategies.base import Client, Reply
from fedara_flwr.tasks import Encoded, read_settings
from fedara_flwr.wire import PROTOCOL
from fedara_flwr.wire.meter import ByteMeter
from fedara_flwr.wire.plan import Update

laws = settings(deadline=None, max_examples=30)
ROBUST = ("median", "trimmed-mean", "norm-clip", "multi-krum")
SPEC = ModelSpec(
    "f" * 64,
    (ModuleSpec("m0", 2, 1, 0), ModuleSpec("m1", 1, 3, 1)),
    (ParameterSpec("weight", (1, 2)),),
)
FULL = RankMask.full([2, 1])  # slots (0,0), (0,1), (1,0): 2 + 2 + 1 numbers in B, 1 + 1 + 1 in E, 1 + 1 + 3 in A
FIRST, LAST = (RankMask((2, 1), np.array(bits, dtype=bool)) for bits in ([1, 0, 0], [0, 0, 1]))
PARTS = (*SLOT_PARTS, "head")


def f32(*values):
    return np.array(values, dtype=np.float32)


def global_arrays():
    return {"B": f32(1, 2, 3, 4, 5), "E": f32(6, 7, 8), "A": f32(9, 10, 11, 12, 13), "head": f32(14, 15)}


def update(mask=FULL, **parts):
    return Update(parts, mask, 1, {})


def heads(*values):
    """Updates that move the head's first number only."""
    return [update(head=f32(value, 15)) for value in values]


def merge(rule, updates, attackers=0.2, weights=None, arrays=None):
    """(result, report) of updates added in this order, clients "0", "1", …"""
    merger = RULES[rule](SPEC, FULL, global_arrays() if arrays is None else arrays, attackers)
    for number, found in enumerate(updates):
        merger.add(str(number), found, 1 if weights is None else weights[number])
    return merger.result(), merger.report()


def first_head(rule, *values, **options):
    return merge(rule, heads(*values), **options)[0]["head"].tolist()[0]


def same(left, right):
    return set(left) == set(right) and all(
        left[part].dtype == np.float32 and np.array_equal(left[part], right[part]) for part in left
    )


# -- rules by hand --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "trim", "expected"),
    [
        ([1, 2, 3, 4, 100], 0.2, 3.0),  # one of five is cut at each end: (2 + 3 + 4)/3
        ([1, 2, 3, 4], 0.2, 2.5),  # floor(0.8) = 0: the mean
        ([-1e9, 1, 2, 3, 1e9], 0.4, 2.0),  # two of five: the middle one
        ([4, 1, 7], 0.4, 4.0),  # floor(1.2) = 1 of three
        ([1, 5], 0.4, 3.0),
        ([7], 0.4, 7.0),
        ([5, 5, 5, 1, 9], 0.2, 5.0),
        ([1, 1, 9, 9], 0.25, 5.0),  # ties on both sides: 1 and 9 are left
    ],
)
def test_trimmed_mean_by_hand(values, trim, expected):
    assert first_head("trimmed-mean", *values, attackers=trim) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7], 7),
        ([1, 5], 3),
        ([1, 100, 2], 2),
        ([1, 2, 4, 1e9], 3),
        ([3, 3, 3], 3),
        ([0, 8, 8, 0, 8], 8),
        ([1, 2, 4, 8, 9, 50], 6),
    ],
)
def test_median_by_hand(values, expected):
    assert first_head("median", *values) == expected


def test_median_counts_no_weights():
    assert first_head("median", 1, 2, 9, weights=[1, 1, 10**6]) == 2
    assert first_head("trimmed-mean", 1, 2, 9, weights=[1, 1, 10**6]) == 4


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_each_number_is_judged_among_those_who_sent_it(rule):
    """Slot (0,0) comes from all five clients, (0,1) from nobody, (1,0) from clients 2, 3 and 4.

    E of (0,0): of 1, 2, 3, 4, 100 the middle is 3, and (2 + 3 + 4)/3 = 3. E of (1,0): of 10, 20, 60 the middle is 20; a fifth
    of three is less than one, so nothing is trimmed: 30. Slot (0,1) keeps its 7.
    """
    both = RankMask((2, 1), np.array([1, 0, 1], dtype=bool))
    updates = [update(FIRST, E=f32(1)), update(FIRST, E=f32(100))]
    updates += [update(both, E=f32(*pair)) for pair in ((2, 10), (3, 60), (4, 20))]
    merged, _ = merge(rule, updates)
    assert merged["E"].tolist() == [3, 7, 20 if rule == "median" else 30]
    assert same({"B": merged["B"]}, {"B": global_arrays()["B"]})  # a part that nobody sent


@pytest.mark.parametrize("rule", RULES)
def test_slots_sent_by_none_one_and_two(rule):
    """(1,0) of client 0 alone, (0,0) of clients 0 and 1, (0,1) of nobody; whole slots, so with all three parts."""
    both = RankMask((2, 1), np.array([1, 0, 1], dtype=bool))
    one = update(both, B=f32(2, 4, 50), E=f32(1, 2), A=f32(8, 40, 50, 60), head=f32(0, 8))
    two = update(FIRST, B=f32(4, 8), E=f32(3), A=f32(10), head=f32(2, 4))
    merged, _ = merge(rule, [one, two])
    if rule == "norm-clip":  # of two the longer one is cut to their mean: only the untouched slots are plain
        assert merged["E"][1] == 7 and merged["B"][2:4].tolist() == [3, 4]
        return
    assert merged["B"].tolist() == [3, 6, 3, 4, 50]
    assert merged["E"].tolist() == [2, 7, 2]
    assert merged["A"].tolist() == [9, 10, 40, 50, 60]
    assert merged["head"].tolist() == [1, 6]


@pytest.mark.parametrize("rule", RULES)
def test_nobody_at_all_changes_nothing(rule):
    assert same(merge(rule, [])[0], global_arrays())


@pytest.mark.parametrize("rule", RULES)
def test_one_client_is_the_result(rule):
    assert first_head(rule, 20) == 20


def test_multi_krum_by_hand():
    """f = 1, two neighbours. Squares: 0: 1 + 4, 1: 1 + 1, 2: 1 + 1, 3: 1 + 4, 50: 47² + 48². Client 4 is out; weights count."""
    merged, report = merge("multi-krum", heads(0, 1, 2, 3, 50), weights=[1, 1, 1, 3, 10**6])
    assert merged["head"].tolist() == [2, 15] and report == {"left-out-by-krum": ["4"]}


def test_multi_krum_of_few():
    """floor(0.2·4) = 0: all count. floor(0.4·3) = 1, one neighbour: 50 is out. Of equals the last one added is out."""
    assert first_head("multi-krum", 0, 1, 2, 97) == 25
    assert first_head("multi-krum", 0, 50, 2, attackers=0.4) == 1
    assert first_head("multi-krum", 0, 50, attackers=0.4) == 25
    assert merge("multi-krum", heads(4, 4, 4, 4, 4))[1] == {"left-out-by-krum": ["4"]}


def test_two_equal_attackers_of_five_are_not_each_others_only_neighbours():
    """f = 2, K - f - 2 = 1: with one neighbour the twins at 50 would have the smallest score of all, 0."""
    merged, report = merge("multi-krum", heads(50, 0, 1, 50, 2), attackers=0.4)
    assert merged["head"][0] == 1 and report == {"left-out-by-krum": ["0", "3"]}


def test_multi_krum_of_unequal_updates():
    """Slots do not make a client far: the distance is a mean over what both sent. Client 4's head is 30 off."""
    updates = [update(FIRST, E=f32(6), head=f32(14 + i, 15)) for i in range(2)]
    updates += [update(E=f32(6, 7, 8), head=f32(14 + i, 15)) for i in range(2)]
    updates += [update(FIRST, E=f32(6), head=f32(44, 15))]
    assert merge("multi-krum", updates)[1] == {"left-out-by-krum": ["4"]}


def test_norm_clip_by_hand():
    """The head is (14, 15). Changes of 3, 5 (a 3-4-5 triangle) and 100: the last is cut to the median 5.

    First numbers 17, 17, 19, the mean is 53/3; second 15, 19, 15, the mean is 49/3.
    """
    merged, report = merge("norm-clip", [update(head=f32(*pair)) for pair in ((17, 15), (17, 19), (114, 15))])
    assert np.allclose(merged["head"], [53 / 3, 49 / 3], rtol=1e-7)
    assert report["clipped"] == 1


def test_norm_clip_does_not_count_free_riders():
    """Changes 0, 0, 0, 4, 4: the median of those that moved is 4 and nothing is cut: (0 + 0 + 0 + 4 + 4)/5 = 1.6."""
    merged, report = merge("norm-clip", heads(14, 14, 14, 18, 18))
    assert np.allclose(merged["head"], [15.6, 15]) and report["clipped"] == 0


# -- rules by law ---------------------------------------------------------------------------------------------------
@st.composite
def update_lists(draw, least=1, most=8, bound=2.0**20, equal=False):
    """Updates of any masks, of numbers from a small pool, so that there are ties; `equal`: all hold all slots."""
    pool = np.array(draw(st.lists(st.floats(-bound, bound), min_size=1, max_size=6)), dtype=np.float32)
    count, rng = draw(st.integers(least, most)), np.random.default_rng(draw(st.integers(0, 2**32)))
    masks = [FULL if equal else FULL.keep(rng.random(3) < 0.6) for _ in range(count)]
    return [Update({p: rng.choice(pool, SPEC.length(p, mask)) for p in PARTS}, mask, 1, {}) for mask in masks]


def spread(updates, part):
    """Shape (clients, numbers), NaN where a client did not send."""
    whole = np.full((len(updates), len(global_arrays()[part])), np.nan)
    for row, found in zip(whole, updates, strict=True):
        row[FULL.elements(SPEC.widths(part), found.mask) if part in SLOT_PARTS else slice(None)] = found.arrays[part]
    return whole


@laws
@given(st.sampled_from(["mean", "median", "trimmed-mean", "multi-krum"]), update_lists(), st.floats(0, 0.49))
def test_result_lies_between_the_senders_values(rule, updates, attackers):
    merged, _ = merge(rule, updates, attackers)
    for part, values in merged.items():
        assert values.dtype == np.float32 and np.isfinite(values).all()
        rows = spread(updates, part)
        for number, value in enumerate(values):
            sent = rows[:, number][~np.isnan(rows[:, number])]
            if not len(sent) or rule == "multi-krum":  # whom krum chose may not hold a slot
                sent = np.append(sent, global_arrays()[part][number])
            assert sent.min() <= value <= sent.max()


@laws
@given(update_lists(bound=1e12))
def test_clipped_result_lies_between_the_senders_values_and_what_was_sent(updates):
    merged, report = merge("norm-clip", updates)
    assert report["clipped"] <= len(updates) / 2
    for part, values in merged.items():
        rows = np.concatenate([spread(updates, part), [global_arrays()[part]]])
        slack = 1e-6 * np.nanmax(np.abs(rows), axis=0)
        assert np.isfinite(values).all()
        assert (np.nanmin(rows, axis=0) - slack <= values).all() and (values <= np.nanmax(rows, axis=0) + slack).all()


@laws
@given(st.sampled_from(ROBUST), update_lists(), st.floats(0, 0.49), st.randoms(use_true_random=False))
def test_the_order_of_clients_does_not_matter(rule, updates, attackers, rng):
    """Exactly for median and trimmed mean; norm-clip adds in another order. Multi-krum: see the next law."""
    if rule == "multi-krum":
        return
    one, _ = merge(rule, updates, attackers)
    other, _ = merge(rule, rng.sample(updates, len(updates)), attackers)
    for part in one:
        exact = rule != "norm-clip"
        assert np.array_equal(one[part], other[part]) if exact else np.allclose(one[part], other[part], rtol=1e-5, atol=1e-2)


@laws
@given(st.permutations([0.0, 1.0, 3.0, 7.0, 90.0, -50.0]), st.sampled_from([0.2, 0.34]))
def test_whom_krum_leaves_out_does_not_depend_on_the_order(values, attackers):
    _, report = merge("multi-krum", heads(*values), attackers)
    expected = {90.0} if attackers == 0.2 else {90.0, -50.0}
    assert {values[int(key)] for key in report["left-out-by-krum"]} == expected


@laws
@given(st.data(), st.sampled_from(["median", "trimmed-mean"]), update_lists(least=2, most=7, equal=True))
def test_a_minority_cannot_move_a_number_out_of_the_good_ones_range(data, rule, good):
    """Arbitrary values up to 1e12 from fewer than the trimmed share, or fewer than half."""
    most = len(good) - 1
    bad = data.draw(update_lists(least=1, most=most, bound=1e12, equal=True))
    share = len(bad) / (len(good) + len(bad))
    merged, _ = merge(rule, data.draw(st.permutations(good + bad)), attackers=share)
    for part, values in merged.items():
        rows = spread(good, part)
        assert (rows.min(axis=0) <= values).all() and (values <= rows.max(axis=0)).all()


@laws
@given(st.data(), st.integers(2, 8), st.booleans())
def test_multi_krum_never_chooses_a_far_minority(data, count, together):
    """Good ones within 1 of each other, bad ones 100 away or more, alone or all in one place; f of K are reckoned with."""
    bad = data.draw(st.integers(1, count - 1))
    attackers = (bad + 1e-6) / (count + bad)
    near = st.floats(0, 1, width=32)
    good = [update(head=f32(data.draw(near), data.draw(near))) for _ in range(count)]
    far = [update(head=f32(100 + (0 if together else 1000 * i), -200)) for i in range(bad)]
    placed = data.draw(st.permutations([(found, False) for found in good] + [(found, True) for found in far]))
    _, report = merge("multi-krum", [found for found, _ in placed], attackers)
    assert {int(key) for key in report["left-out-by-krum"]} == {i for i, (_, is_bad) in enumerate(placed) if is_bad}


@laws
@given(update_lists(), st.data())
def test_with_nothing_to_do_a_rule_is_the_mean(updates, data):
    """Trim 0 and krum that reckons with none give SlotMean's bits; so does the clip of changes of one length."""
    weights = [data.draw(st.integers(1, 10**6)) for _ in updates]
    expected, _ = merge("mean", updates, weights=weights)
    assert same(merge("multi-krum", updates, 0.0, weights)[0], expected)
    plain, _ = merge("mean", updates)
    trimmed, _ = merge("trimmed-mean", updates, 0.0)
    for part in plain:  # sorted before they are added, so float64's last bits may differ
        assert np.allclose(
            trimmed[part], plain[part], rtol=1e-6, atol=1e-6 * max(1.0, float(np.abs(plain[part]).max(initial=0)))
        )
    alike = [updates[0]] * len(updates)
    assert same(merge("norm-clip", alike, weights=weights)[0], merge("mean", alike, weights=weights)[0])


@pytest.mark.parametrize("rule", RULES)
def test_the_largest_allowed_values_stay_finite(rule):
    values = [
        update(**{part: np.full(SPEC.length(part, FULL), sign * 1e12, np.float32) for part in PARTS}) for sign in (1, -1, 1)
    ]
    merged, _ = merge(rule, values, weights=[2**31] * 3)
    assert all(np.isfinite(vector).all() and vector.dtype == np.float32 for vector in merged.values())


@pytest.mark.parametrize("rule", RULES)
def test_what_a_rule_holds_is_said(rule):
    assert RULES[rule](SPEC, FULL, global_arrays(), 0.2).memory == ("one" if rule == "mean" else "all")


# -- the bound on lengths -------------------------------------------------------------------------------------------
def test_sizes_by_hand():
    """√((3² + 4²)/2) and √(4·0.25/4); an empty part has no length."""
    sent = {"head": f32(1, 1), "B": f32(1, 1, 1, 1), "E": f32()}
    found = root_mean_squares(difference({"head": f32(4, 5), "B": f32(1.5, 0.5, 1.5, 0.5), "E": f32()}, sent))
    assert found == {"head": pytest.approx(12.5**0.5), "B": 0.5}


def judge(bound, history, found, beside=()):
    return Norms(bound, {"B": history}).excess({"B": found}, [{"B": other} for other in beside])


def test_first_round_is_judged_by_its_own_median():
    """Median of 1, 2, 3 and 100 is 2.5: 50 is just allowed at bound 20, 100 is not."""
    assert judge(20.0, [], 50.0, (1.0, 2.0, 3.0, 50.0)) == ""
    text = judge(20.0, [], 100.0, (1.0, 2.0, 3.0, 100.0))
    assert text == "B moved 100 (root mean square), allowed is 20 times the median 2.5"


def test_fewer_than_three_say_nothing():
    assert judge(20.0, [], 1e9, (1.0, 1e9)) == ""
    assert judge(20.0, [1.0, 1.0], 1e9) == "" and judge(20.0, [1.0] * 3, 1e9) != ""
    assert judge(20.0, [], 1e9, (0.0, 0.0, 1.0, 1e9)) == ""  # those that changed nothing are no witnesses
    assert not Norms(20.0, {"B": [1.0, 1.0]}).known({"B": 1.0})


def test_history_judges_where_there_is_enough():
    assert judge(20.0, [1.0, 1.0, 1.0], 21.0, (21.0, 21.0, 21.0)) != ""
    assert judge(20.0, [1.0, 1.0, 1.0], 20.0) == ""


def test_no_bound_lets_everything_pass():
    norms = Norms(0.0, {"B": [1.0] * 9})
    assert norms.known({"new": 1.0}) and norms.excess({"B": 1e12}) == ""


def test_parts_are_judged_apart():
    """A head 1000 times as long cannot hide behind a large backbone, nor one part's history stand for another's."""
    norms = Norms(20.0, {"B": [1.0] * 5, "head": [1e-3] * 5})
    assert norms.excess({"B": 1.0, "head": 1.0}).startswith("head moved 1 ")
    assert norms.excess({"B": 1.0, "head": 1e-3}) == ""
    assert norms.excess({"other": 1e12}, [{"other": 1e12}]) == "" and not norms.known({"other": 1.0})


def test_updates_that_change_nothing_do_not_lower_the_bound():
    history: dict = {}
    norms = Norms(20.0, history)
    norms.learn([{"B": 0.0}] * 50 + [{"B": 2.0}] * 3)
    assert history == {"B": [2.0] * 3} and norms.excess({"B": 40.0}) == ""


def test_history_is_bounded():
    history: dict = {}
    norms = Norms(20.0, history)
    norms.learn([{"B": float(i)} for i in range(1, 200)])
    assert history["B"] == [float(i) for i in range(200 - LENGTHS_KEPT, 200)]
    assert ENOUGH == 3


positive = st.floats(1e-6, 1e6)


@laws
@given(st.lists(positive, min_size=3, max_size=20), st.floats(2, 100), st.floats(1e-6, 1e12), st.randoms(use_true_random=False))
def test_order_of_the_replies_is_irrelevant(lengths, bound, found, rng):
    other = rng.sample(lengths, len(lengths))
    assert judge(bound, [], found, lengths) == judge(bound, [], found, other) == judge(bound, lengths, found)


@laws
@given(st.lists(positive, min_size=3, max_size=20), st.data())
def test_a_minority_moves_the_bound_only_within_the_good_lengths(good, data):
    """Whatever fewer than half claim, who keeps to bound · smallest good length passes, beyond bound · largest nobody does."""
    bad = data.draw(st.lists(st.floats(1e-9, 1e12), max_size=len(good) - 1))
    assert judge(20.0, good + bad, 20.0 * min(good)) == ""
    assert judge(20.0, good + bad, 20.1 * max(good)) != ""


# -- attackers in whole runs ----------------------------------------------------------------------------------------
ALL = {"strategy__fraction_train": 1.0}
TWO = ALL | {"num_server_rounds": 2, "fedara__warmup_rounds": 0, "fedara__final_rounds": 0}


class SeeingGrid(InProcessGrid):
    """`change(round, node index, message, reply) -> reply` for every reply to TRAIN; `whoami` and `ready` as they are."""

    def __init__(self, *args, change, **options):
        super().__init__(*args, **options)
        self.change = change

    def _call(self, message):
        reply = super()._call(message)
        if message.metadata.message_type != "train":
            return reply
        number = message.content.config_records["plan"]["round"]
        return self.change(number, message.metadata.dst_node_id - 1000, message, reply)


def arrays_of(message):
    return {part: array.numpy() for part, array in message.content.array_records["arrays"].items()}


def scaled(factor, only=None):
    """The update's change times `factor`, of one part or of all."""

    def change(message, reply):
        sent, found = arrays_of(message), arrays_of(reply)
        for part, values in found.items():
            if only in (None, part):
                found[part] = (sent[part] + factor * (values - sent[part])).astype(np.float32)
        reply.content["arrays"] = ArrayRecord({part: Array(values) for part, values in found.items()})
        return reply

    return change


def by(bad, what):
    """Only these nodes change their replies."""
    return lambda number, node, message, reply: what(message, reply) if node in bad else reply


def rounds(loop):
    return [line for line in loop.lines if line["type"] == "round"]


def dropped(loop):
    return [(line["round"], drop["client"], drop["reason"]) for line in rounds(loop) for drop in line["dropped"]]


def same_model(one, other):
    return one.state.mask == other.state.mask and same(one.state.arrays, other.state.arrays)


@pytest.fixture(scope="module")
def without_node_two(tiny_bert):
    """A run in which every reply of node 2 is refused on arrival."""
    loop = start(config(tiny_bert, **TWO), SeeingGrid, change=by({2}, scaled(np.nan)))
    assert dropped(loop) == [(number, "2", "not-finite") for number in (1, 2)]
    return loop


@pytest.mark.parametrize("factor", [1000.0, -60.0])
def test_a_scaled_update_is_dropped_in_every_round(tiny_bert, factor, without_node_two):
    loop = start(config(tiny_bert, **TWO), SeeingGrid, change=by({2}, scaled(factor)))
    assert dropped(loop) == [(number, "2", "norm") for number in (1, 2)]
    details = [drop["detail"] for line in rounds(loop) for drop in line["dropped"]]
    assert all("(root mean square), allowed is 20 times the median" in detail for detail in details)
    assert same_model(loop, without_node_two) and loop.state.norms == without_node_two.state.norms


def test_a_small_part_cannot_hide(tiny_bert):
    """Only E is scaled: a few dozen numbers among thousands. In round 1, from E = 0, all clients' E moves alike."""
    loop = start(config(tiny_bert, **TWO), SeeingGrid, change=by({4}, scaled(1000.0, "E")))
    assert dropped(loop) == [(1, "4", "norm"), (2, "4", "norm")]
    assert all(drop["detail"].startswith("E moved") for line in rounds(loop) for drop in line["dropped"])


def test_without_the_bound_it_counts(tiny_bert):
    loop = start(config(tiny_bert, **TWO, strategy__norm_bound=0.0), SeeingGrid, change=by({2}, scaled(1000.0)))
    assert dropped(loop) == [] and np.abs(loop.state.arrays["head"]).max() > 0.5


def test_a_free_rider_counts_and_lowers_no_bound(tiny_bert):
    """It sends back what it received: its length is 0, and the history is that of the others alone."""
    loop = start(config(tiny_bert, **TWO), SeeingGrid, change=by({1}, scaled(0.0)))
    assert dropped(loop) == [] and [line["good"] for line in rounds(loop)] == [6, 6]
    assert all(len(lengths) == 10 and min(lengths) > 0 for lengths in loop.state.norms.values())


def test_replies_in_any_order_give_the_same_bits(tiny_bert):
    """Held, judged and merged in the round's order, in the first round, which its own median judges, and in the second."""
    flat = config(tiny_bert, **TWO, method="fedara")
    found = []
    for seed in range(2):
        loop, grid = prepare(flat, SeeingGrid, change=by({2}, scaled(1000.0)))
        arrays = loop.initial_arrays()
        for number in (1, 2):
            replies = list(grid.send_and_receive(loop.configure_train(number, arrays, ConfigRecord(), grid)))
            random.Random(seed).shuffle(replies)
            arrays, _ = loop.aggregate_train(number, replies)
            assert [(drop.client, drop.reason) for drop in loop.work.drops] == [("2", "norm")]
        found.append(loop)
    assert all(same_model(found[0], other) and found[0].state.norms == other.state.norms for other in found[1:])


def test_a_checkpoint_carries_the_history(without_node_two):
    state = without_node_two.state
    assert set(state.norms) == {"B", "E", "A", "head"} and all(len(lengths) == 10 for lengths in state.norms.values())
    assert decode(without_node_two.spec, *encode(state)).norms == state.norms


@pytest.mark.parametrize("rule", ROBUST)
def test_every_rule_runs_and_says_what_it_did(tiny_bert, rule):
    loop = start(config(tiny_bert, **TWO, strategy__robust=rule), SeeingGrid, change=by({2}, scaled(6.0)))
    assert dropped(loop) == [] and [line["good"] for line in rounds(loop)] == [6, 6]
    for line in rounds(loop):
        if rule == "multi-krum":
            assert line["left-out-by-krum"] == ["2"]
        if rule == "norm-clip":
            assert 1 <= line["clipped"] <= 3
    assert all(np.isfinite(vector).all() for vector in loop.state.arrays.values())


@pytest.mark.parametrize(
    ("rule", "unequal"), [("multi-krum", {"fedara__upload_mask": "local"}), ("median", {"method": "legend"})]
)
def test_rules_with_updates_of_unequal_slots(tiny_bert, rule, unequal):
    loop = start(config(tiny_bert, **TWO, strategy__robust=rule, **unequal))
    assert dropped(loop) == [] and all(np.isfinite(vector).all() for vector in loop.state.arrays.values())
    assert len({line["bytes-up"]["B"] for line in loop.lines if line["type"] == "client" and line["round"] == 2}) > 1


@pytest.mark.parametrize("method", ["flora", "hetlora", "flexlora", "fedex-lora"])
def test_a_method_that_merges_in_its_own_way_refuses_a_rule(tiny_bert, method):
    with pytest.raises(ConfigError) as error:
        prepare(config(tiny_bert, method=method, strategy__robust="median"))
    assert str(error.value) == f"strategy.robust = 'median': method '{method}' merges in its own way, allowed is 'mean'"


def test_honest_clients_of_very_unequal_data_all_count(tiny_bert):
    """Dirichlet 0.1 by epochs: one client takes a few steps where another takes dozens."""
    flat = config(tiny_bert, **TWO | {"train__steps": 0, "train__batch_size": 16}, data__dirichlet_alpha=0.1)
    loop = start(flat, clients=10)
    steps = [line["steps"] for line in loop.lines if line["type"] == "client"]
    assert dropped(loop) == [] and max(steps) >= 4 * min(steps)


def test_what_two_clients_of_one_attacker_can_do(tiny_bert):
    """Under keys of their own they count as two, but go no further than steps do; under one key they are one (test_round)."""
    run = start(config(tiny_bert, **TWO), SeeingGrid, change=by({0, 1}, scaled(7.0)))  # two of six
    assert dropped(run) == [] and [sorted(line["cut"]) for line in rounds(run)] == [["0", "1"]] * 2
    rate, sent = run.settings.train.local(run.method.learning_rate).head_learning_rate, run.method.start().arrays["head"]
    assert np.abs(run.state.arrays["head"] - sent).max() <= 1.02 * 2 * rate * run.settings.train.reach(1)


# -- weights --------------------------------------------------------------------------------------------------------
class Boasting(InProcessGrid):
    """Node 1000 declares 2^31 examples, first and in every reply."""

    def _call(self, message):
        reply = super()._call(message)
        kind, node = message.metadata.message_type, message.metadata.dst_node_id
        if node == 1000 and kind in ("query.ready", "train"):
            metrics = dict(reply.content.metric_records["metrics"])
            reply.content["metrics"] = MetricRecord(metrics | {"num-examples": 2**31})
        return reply


@pytest.mark.parametrize(("cap", "weighting"), [(2.5, "examples"), (0.0, "examples"), (10.0, "uniform")])
def test_who_declares_much_weighs_a_multiple_of_the_median(tiny_bert, cap, weighting, monkeypatch):
    flat = config(tiny_bert, **TWO, strategy__weight_cap=cap, strategy__weighting=weighting)
    loop, grid = prepare(flat, Boasting)
    seen, make = {}, loops.merger_of

    def spied(*given):
        merger = make(*given)
        add = merger.add
        merger.add = lambda key, update, weight: (seen.setdefault(key, weight), add(key, update, weight))[1]
        return merger

    monkeypatch.setattr(loops, "merger_of", spied)
    loop.start(grid, loop.initial_arrays(), 1)
    declared = loop.roster.examples
    median = sorted(declared.values())[2]  # the lower one of six
    assert declared["0"] == 2**31
    expected = {key: min(count, int(cap * median)) if cap else count for key, count in declared.items()}
    assert seen == (expected if weighting == "examples" else dict.fromkeys(declared, 1))
    assert {reply.client.key: reply.weight for reply in loop.work.replies} == seen  # what a method sees of it
    assert [line["num-examples"] for line in loop.lines if line.get("client") == "0"] == [2**31]


# -- votes ----------------------------------------------------------------------------------------------------------
MASK = RankMask.full([4, 4])


def vote(order, budget):
    """A vote by the order of slots, best first."""
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[np.array(order)] = np.arange(len(order))
    return Vote(ranks, budget)


def alive(mask):
    return np.flatnonzero(mask.bits).tolist()


def test_one_of_five_cannot_keep_its_own_slots_or_kill_a_module():
    """Four clients want slots 0, 1, 2 and 4; one wants module 1 to live and module 0 to die. It gets nothing."""
    honest = [vote([0, 1, 2, 4, 3, 5, 6, 7], 4)] * 4
    liar = vote([7, 6, 5, 4, 3, 2, 1, 0], 4)
    assert alive(arbitrate_budget(MASK, [*honest, liar], 4)) == [0, 1, 2, 4]


def test_what_one_of_five_can_do_is_to_settle_what_the_others_disagree_on():
    """Slots 2 and 4 have two votes and ranks 2, 2, 4, 4 each: whom the fifth puts first comes first."""
    honest = [vote([0, 1, 2, 3, 4, 5, 6, 7], 3)] * 2 + [vote([0, 1, 4, 3, 2, 5, 6, 7], 3)] * 2
    assert alive(arbitrate_budget(MASK, [*honest, vote([0, 1, 2, 3, 4, 5, 6, 7], 3)], 3)) == [0, 1, 2]
    assert alive(arbitrate_budget(MASK, [*honest, vote([4, 7, 6, 5, 3, 2, 1, 0], 3)], 3)) == [0, 1, 4]


@laws
@given(st.integers(3, 12), st.integers(1, 7), st.data())
def test_what_all_honest_clients_want_is_ahead_of_what_none_wants(voters, budget, data):
    """Whatever a quarter of the voters sends, one of three."""
    orders = [data.draw(st.permutations(range(8))) for _ in range(voters)]
    votes = [vote(order, budget) for order in orders]
    honest = counts(votes[outvoted(voters) :], 8)
    place = np.argsort(arbitration_order(votes, 8))
    wanted, unwanted = place[honest == voters - outvoted(voters)], place[honest == 0]
    assert wanted.max(initial=-1) < unwanted.min(initial=8)


def poisoned_votes(order_of):
    """A well-formed vote in an order of the attacker's choice."""

    def change(message, reply):
        record = reply.content.config_records["reply"]
        if "report.slot-vote" not in record:
            return reply
        honest = np.frombuffer(record["report.slot-vote"], dtype="<u2")
        ranks = np.empty(len(honest), dtype="<u2")
        ranks[order_of(len(honest))] = np.arange(len(honest))
        reply.content["reply"] = ConfigRecord({**record, "report.slot-vote": ranks.tobytes()})
        return reply

    return change


def same_votes(count):
    return np.arange(count)


def test_one_poisoned_voter_of_five_in_a_run_changes_nothing_where_four_agree(tiny_bert):
    """Four vote for the first slots, so that what is right is known; the fifth for the last ones, round after round."""
    flat = config(tiny_bert, **ALL, num_server_rounds=3, strategy__weighting="uniform", fedara__warmup_rounds=0)
    agreed = poisoned_votes(same_votes)
    liar = poisoned_votes(lambda count: np.arange(count)[::-1])

    def change(number, node, message, reply):
        return (liar if node == 3 else agreed)(message, reply)

    poisoned = start(flat, SeeingGrid, clients=5, change=change)
    expected = start(flat, SeeingGrid, clients=5, change=lambda number, node, message, reply: agreed(message, reply))
    assert dropped(poisoned) == [] and poisoned.state.mask == expected.state.mask
    kept = poisoned.state.mask.count
    assert alive(poisoned.state.mask) == list(range(kept)) and kept < sum(poisoned.state.mask.ranks)


def honest_orders(rng, voters, blocks, per):
    """Orders of slots that agree in part, with blocks that are worth more and less, as trained ones do."""
    common = rng.standard_normal(blocks * per) + np.repeat(rng.standard_normal(blocks) / 2, per)
    return [np.argsort(-(common + rng.standard_normal(blocks * per))) for _ in range(voters)]


@pytest.mark.parametrize(("voters", "bad"), [(5, 1), (10, 2)])
def test_how_many_slots_liars_give_their_favourite_block(voters, bad):
    """Of 72 slots in three blocks 36 live on. The block that honest voters leave fewest has 8 to 9 of 24; the liars vote for
    all of it, first for what others value least, and for nothing that is wanted elsewhere. By votes that weighed the sizes
    that liars claim, up to three medians, it had 18 of 24 then, at most 23, and 13 to 15 slots of the 36 were others.
    """
    budget, found = 36, []
    for seed in range(40):
        orders = honest_orders(np.random.default_rng(seed), voters - bad, 3, 24)
        votes = [vote(order, budget) for order in orders]
        mask = RankMask.full([24] * 3)
        honest = arbitrate_budget(mask, votes, budget)
        block = int(np.argmin(honest.alive))
        mean, inside = np.mean([item.ranks for item in votes], axis=0), mask.modules == block
        liar = vote(np.lexsort((np.where(inside, mean, -mean), ~inside)), budget)
        after = arbitrate_budget(mask, votes + [liar] * bad, budget)
        found.append((honest.alive[block], after.alive[block], int((honest.bits & ~after.bits).sum())))
    before, after, replaced = np.array(found).T
    assert before.mean() < 9 and after.mean() < 12 and after.max() <= 17
    assert replaced.mean() < 4 and replaced.max() <= 6


def test_whom_krum_leaves_out_has_no_vote(tiny_bert):
    """One of six sends a model far away, and votes for the last slots; the five agree on the first."""
    flat = config(tiny_bert, **TWO, strategy__robust="multi-krum")
    agreed, liar = poisoned_votes(same_votes), poisoned_votes(lambda count: np.arange(count)[::-1])
    far = scaled(6.0)

    def change(number, node, message, reply):
        return liar(message, far(message, reply)) if node == 3 else agreed(message, reply)

    loop, grid = prepare(flat, SeeingGrid, change=change)
    voters, next_mask = [], loop.method.next_mask

    def spied(state, replies):
        voters.append(sorted(reply.client.key for reply in replies if "slot-vote" in reply.reports))
        return next_mask(state, replies)

    loop.method.next_mask = spied
    loop.start(grid, loop.initial_arrays(), 2)
    asked = [line for line in rounds(loop) if line["left-out-by-krum"]]
    assert asked and all(line["left-out-by-krum"] == ["3"] for line in asked)
    assert voters == [["0", "1", "2", "4", "5"]] * 2


# -- capacity -------------------------------------------------------------------------------------------------------
def legend(model, **changes):
    """(method, state) of a run's start."""
    loop = prepare(config(model, method="legend", **TWO, **changes))[0]
    return loop.method, loop.state


def know(state, key, forward, backward):
    state.clients[key] = {"uploads": [0.0] * 5, "block": 1e6, "free": 1e9, "forward": forward, "backward": backward}


def test_a_device_that_starts_to_lie_is_believed_slowly(tiny_bert):
    """A report below half of the average counts as that half, and half at that: at most a quarter less in a round."""
    method, state = legend(tiny_bert)
    know(state, "0", 1.0, 2.0)
    lies = Reply(Client("0"), 1, state.mask, {"seconds-forward": 1e-9, "seconds-backward": 1e-9})
    for number in range(1, 17):
        method.next(state, state.arrays, [lies], None)
        for way, first in (("forward", 1.0), ("backward", 2.0)):
            assert state.clients["0"][way] == pytest.approx(first * 0.75**number)
    assert state.clients["0"]["forward"] > 1 / 100  # what FASTEST allows at once takes 17 rounds of lies


def depth_of_others(method, state, claimed):
    """Depths of five equal devices beside one that claims to take so many seconds."""
    for key in "012345":
        know(state, key, 1.0, 1.0)
    know(state, "5", claimed, claimed)
    method.prepare(state, [Client(key) for key in "012345"])
    return [state.clients[key]["depth"] for key in "01234"]


@pytest.mark.parametrize(("target", "expected"), [("median", [3] * 5), ("fastest", [1] * 5)])
def test_what_a_device_that_lied_from_the_start_can_do(tiny_bert, target, expected):
    """By the median device's time it changes nobody's depth. By the fastest's (default) it sets everybody's to 1, the least
    there is: never to none, and no claim gives another device more work than its memory and the honest target allow."""
    method, state = legend(tiny_bert, strategy__options=f"target = '{target}'")
    assert depth_of_others(method, state, 1.0) == [3] * 5
    assert depth_of_others(method, state, 1e-9) == depth_of_others(method, state, 1e-300) == expected
    assert depth_of_others(method, state, 1e9) == [3] * 5


@pytest.mark.parametrize("claimed", [1e-9, 0.2])
def test_by_the_fastest_a_liar_needs_to_look_only_a_few_times_as_fast(tiny_bert, claimed):
    """With three blocks 1 + k·1 seconds: a device five times as fast asks 1.1·0.8 s of all, less than one block takes."""
    assert depth_of_others(*legend(tiny_bert), claimed) == [1] * 5


# -- words from clients ---------------------------------------------------------------------------------------------
FORGED = "x\nround 7: all is well\r\x1b[2J\x1b[31mred\x07\u202eevil\u2028\x85tail\ud800"


def check_line(text):
    assert text and text.isprintable(), repr(text)


class Shouting(InProcessGrid):
    """Node 1001 has a hostile key, 1002 raises with a hostile message, 1003 cannot train for a hostile reason."""

    def _call(self, message):
        kind, node = message.metadata.message_type, message.metadata.dst_node_id
        reply = super()._call(message)
        if kind == "train" and node == 1002:
            return self._fail(message)
        if kind == "query.ready" and node == 1003:
            reply.content["ready"] = ConfigRecord({"error": FORGED})
        if kind == "query.ready" and node == 1004:
            return self._fail(message)
        return reply

    def _fail(self, message):
        reply = Message(Error(2, f"Traceback\n  ValueError: {FORGED}"), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
        return reply


def test_words_of_clients_forge_no_lines(tiny_bert, caplog):
    loop, grid = prepare(config(tiny_bert, **TWO, strategy__node_timeout=20.0), Shouting)
    grid.contexts[1001].node_config["client-key"] = FORGED
    with caplog.at_level(logging.INFO, logger="fedara_flwr"):
        loop.start(grid, loop.initial_arrays(), 2)
    formatter = log._Lines()
    shown = [formatter.format(record) for record in caplog.records]
    assert any("x?round 7: all is well??" in line for line in shown)
    for line in shown:
        for piece in line.split("\n"):  # a round's headings stand above its line
            check_line(piece)
        assert not any(piece.startswith("round 7") for piece in line.splitlines())
    keys = [key for key in loop.roster.nodes if key.startswith("x")]
    assert len(keys) == 1 and keys[0].isprintable() and len(keys[0]) <= 64
    assert rounds(loop)[0]["good"] >= 2
    for line in rounds(loop):
        for drop in line["dropped"]:
            check_line(drop["detail"])
    for key, reason in loop.roster.unfit.items():
        check_line(key)
        check_line(reason)


def test_a_key_of_nothing_visible_is_still_a_key():
    assert last_line("a\n\x1b[31mb\x00") == "?[31mb?"
    assert log.printable("Ärger in 東京, 5 °C") == "Ärger in 東京, 5 °C"
    roster = Roster(read_settings({}).strategy, 0, Expected("", "", "", (), frozenset()), ByteMeter(Counter()))
    for node, key in enumerate(["\x1b[0m\n", "", FORGED * 9]):
        roster._admit(
            node,
            ConfigRecord({"protocol": PROTOCOL, "terms": ""} | ({"client-key": key} if key else {})),
        )
    assert [len(key) <= 64 and key.isprintable() for key in roster.nodes] == [True] * 3
    assert list(roster.nodes)[:2] == ["?[0m?", "node-1"]


# -- what a server may make a device open ---------------------------------------------------------------------------
SERVER_SAYS = {
    "data.path": "/etc/shadow",
    "data.name": "evil/data",
    "model.name": "/srv/evil",
    "run.dir": "/etc",
    "run.name": "x",
}


@pytest.mark.parametrize("node_config", [{}, {"data-path": "/data/mine.parquet", "models": "/srv/evil=mine/model"}])
def test_a_device_opens_only_what_its_own_configuration_names(monkeypatch, node_config):
    """The whole way of a real device's context: no path and no name of the server's reaches what loads model and data."""
    seen = []

    class Resident:
        def __init__(self, settings, labels, device):
            self.settings = settings

        def client_data(self, *arguments):
            seen.append(arguments)
            return ClientData(Encoded([], []), Encoded([], []))

    monkeypatch.setattr(session, "resident", Resident)
    context = Context(1, 5, {"client-key": "me", **node_config}, RecordDict(), SERVER_SAYS)
    assert not client_app.in_simulation(context)
    node = NodeSettings.read(context.node_config)
    assert not str(node.store).startswith(("/etc", "/srv"))
    if not node_config:
        with pytest.raises(ConfigError, match="'/srv/evil' is not among them"):
            client_app._open(context, node, ("a", "b"))
        return
    resident, _ = client_app._open(context, node, ("a", "b"))
    assert seen == [("me", 0, 1, "/data/mine.parquet")]
    assert (resident.settings.data.path, resident.settings.data.name) == ("/data/mine.parquet", "docstrings")
    assert resident.settings.model.name == "mine/model"
    text = resident.settings.model_dump_json(include={"model": True, "data": True, "seed": True, "adapter": True})
    assert "evil" not in text and "/etc" not in text


def test_only_the_nodes_own_configuration_makes_it_trust_the_server():
    """`engine` and `trusted` in what the server sends are no settings at all."""
    context = Context(1, 5, {}, RecordDict(), {"engine": "inprocess"})
    assert not client_app.in_simulation(context)
    with pytest.raises(ConfigError, match="engine"):
        read_settings(context.run_config)
