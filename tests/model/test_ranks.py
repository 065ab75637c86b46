"""Rank masks: hand-worked examples, and the laws that every mask obeys."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedara_flwr.model.ranks import RankMask, pack_bits, rank_order, select_top, unpack_bits

laws = settings(deadline=None, max_examples=150)
lengths = st.lists(st.integers(0, 6), min_size=1, max_size=5)
scores = st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.5, -3.0, math.inf, -math.inf, math.nan]) | st.floats(), max_size=30)


@st.composite
def masks(draw, count=1):
    """`count` masks of the same modules."""
    ranks = tuple(draw(lengths))
    bits = st.lists(st.booleans(), min_size=sum(ranks), max_size=sum(ranks))
    return tuple(RankMask(ranks, np.array(draw(bits), dtype=bool)) for _ in range(count))


@st.composite
def nested(draw):
    """(mask, sub, widths): `mask` covers `sub`; widths as of a part."""
    mask, other = draw(masks(2))
    widths = draw(st.lists(st.integers(1, 4), min_size=len(mask.ranks), max_size=len(mask.ranks)))
    return mask, mask.intersect(other), widths


def mask(ranks, *bits):
    return RankMask(tuple(ranks), np.array(bits, dtype=bool))


# -- one mask by hand ------------------------------------------------------------
EXAMPLE = mask((2, 0, 3), 1, 0, 1, 1, 0)


def test_counts_by_hand():
    """Module 0 has bits 1 0, module 1 has none, module 2 has 1 1 0: 3 alive, of them 1, 0 and 2; module 1 is dead."""
    assert EXAMPLE.count == 3
    assert EXAMPLE.alive.tolist() == [1, 0, 2]
    assert EXAMPLE.dead_modules == 1
    assert EXAMPLE.modules.tolist() == [0, 0, 2, 2, 2]
    assert [EXAMPLE.module(i).tolist() for i in range(3)] == [[True, False], [], [True, True, False]]


def test_length_by_hand():
    """Widths 3, 5, 2: 1·3 + 0·5 + 2·2 = 7 numbers."""
    assert EXAMPLE.length([3, 5, 2]) == 7


def test_full_has_every_slot():
    full = RankMask.full([2, 0, 3])
    assert (full.count, full.alive.tolist(), full.ranks) == (5, [2, 0, 3], (2, 0, 3))


def test_no_slots_at_all():
    """Method `head`: every mask has length 0."""
    none = RankMask.full([0, 0])
    assert (none.count, none.dead_modules, none.length([3, 3]), none.to_bytes()) == (0, 2, 0, b"")
    assert RankMask.from_bytes([0, 0], b"") == none
    assert none.elements([3, 3], none).tolist() == []


@pytest.mark.parametrize("ranks, bits", [((2, 1), 2), ((2, 1), 4), ((), 1), ((3, -1), 2)])
def test_refuses_bits_that_do_not_fit(ranks, bits):
    with pytest.raises(ValueError):
        RankMask(ranks, np.ones(bits, dtype=bool))


def test_refuses_bits_of_two_dimensions():
    with pytest.raises(ValueError, match="shape"):
        RankMask((2, 2), np.ones((2, 2), dtype=bool))


def test_is_a_value():
    """A mask neither follows the array it was made from nor lets its bits be written."""
    bits = np.array([True, False])
    made = RankMask((2,), bits)
    bits[:] = False
    assert made.bits.tolist() == [True, False]
    with pytest.raises(ValueError):
        made.bits[0] = False


def test_equality_and_hash():
    assert mask((2, 1), 1, 0, 1) == mask((2, 1), 1, 0, 1)
    assert hash(mask((2, 1), 1, 0, 1)) == hash(mask((2, 1), 1, 0, 1))
    assert mask((2, 1), 1, 0, 1) != mask((2, 1), 1, 1, 1)
    assert mask((2, 1), 1, 0, 1) != mask((1, 2), 1, 0, 1)
    assert mask((1,), 1) != "mask"


# -- algebra ------------------------------------------------------------
def test_algebra_by_hand():
    """a = 11|01, b = 10|11: both have slots 0 and 3; of a's slots 0, 1, 3 the first and last live in b."""
    a, b = mask((2, 2), 1, 1, 0, 1), mask((2, 2), 1, 0, 1, 1)
    assert a.intersect(b) == mask((2, 2), 1, 0, 0, 1)
    assert b.within(a).tolist() == [True, False, True]
    assert a.keep(np.array([False, True, True])) == mask((2, 2), 0, 1, 0, 1)
    assert not a.covers(b) and not b.covers(a)
    assert a.covers(mask((2, 2), 0, 1, 0, 0))


@pytest.mark.parametrize("operation", [RankMask.intersect, RankMask.covers, RankMask.within])
def test_masks_of_different_modules_do_not_mix(operation):
    with pytest.raises(ValueError, match="different modules"):
        operation(mask((2, 1), 1, 1, 1), mask((1, 2), 1, 1, 1))


@pytest.mark.parametrize("votes", [[True], [True] * 5, [[True, True, True]]])
def test_keep_refuses_votes_of_another_length(votes):
    with pytest.raises(ValueError, match="3 slots are alive"):
        EXAMPLE.keep(np.array(votes))


@laws
@given(masks(3))
def test_intersection_laws(three):
    a, b, c = three
    assert a.intersect(b) == b.intersect(a)
    assert a.intersect(a) == a
    assert a.intersect(b).intersect(c) == a.intersect(b.intersect(c))
    assert a.intersect(RankMask.full(a.ranks)) == a


@laws
@given(masks(3))
def test_covers_is_set_inclusion(three):
    a, b, c = three
    assert a.covers(b) == (a.intersect(b) == b)
    assert a.covers(b) == set(np.flatnonzero(b.bits)).issubset(np.flatnonzero(a.bits))
    assert a.covers(a.intersect(b)) and RankMask.full(a.ranks).covers(a)
    assert (a.covers(b) and b.covers(a)) == (a == b)
    assert a.intersect(b).covers(a.intersect(b).intersect(c))


@laws
@given(masks(2))
def test_keep_of_within_is_the_intersection(two):
    a, b = two
    assert a.keep(b.within(a)) == a.intersect(b)


@laws
@given(masks(), st.data())
def test_keep_keeps_exactly_the_votes(one, data):
    (a,) = one
    votes = np.array(data.draw(st.lists(st.booleans(), min_size=a.count, max_size=a.count)), dtype=bool)
    kept = a.keep(votes)
    assert a.covers(kept)
    assert kept.count == votes.sum()
    assert np.array_equal(kept.within(a), votes)


@laws
@given(masks(2))
def test_within_by_a_loop(two):
    a, b = two
    assert a.within(b).tolist() == [bool(a.bits[i]) for i in range(len(b.bits)) if b.bits[i]]


# -- packed parts ------------------------------------------------------------
def test_slice_and_scatter_by_hand():
    """Alive: slots (0,0), (2,0), (2,1); widths 3, 5, 2, so the part is aaa bb cc. Without (2,0) it is aaa cc."""
    part = np.array([1, 2, 3, 4, 5, 6, 7], dtype=np.float32)
    sub = mask((2, 0, 3), 1, 0, 0, 1, 0)
    assert EXAMPLE.elements([3, 5, 2], sub).tolist() == [True] * 3 + [False] * 2 + [True] * 2
    assert EXAMPLE.slice(part, [3, 5, 2], sub).tolist() == [1, 2, 3, 6, 7]
    back = EXAMPLE.scatter(np.array([-1, -2, -3, -6, -7], dtype=np.float32), [3, 5, 2], sub, part)
    assert back.tolist() == [-1, -2, -3, 4, 5, -6, -7]
    assert part.tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_slice_refuses_dead_slots():
    with pytest.raises(ValueError, match="dead"):
        EXAMPLE.slice(np.zeros(7, dtype=np.float32), [3, 5, 2], RankMask.full([2, 0, 3]))


@laws
@given(masks(2), st.data())
def test_elements_against_a_loop(two, data):
    a, sub = two
    widths = data.draw(st.lists(st.integers(0, 4), min_size=len(a.ranks), max_size=len(a.ranks)))
    expected, slot = [], 0
    for module, rank in enumerate(a.ranks):
        for _ in range(rank):
            if a.bits[slot]:
                expected += [bool(sub.bits[slot])] * widths[module]
            slot += 1
    assert a.elements(widths, sub).tolist() == expected
    assert len(expected) == a.length(widths)


@laws
@given(nested(), st.integers(0, 2**32 - 1))
def test_slice_then_scatter_is_the_identity(case, seed):
    a, sub, widths = case
    part = np.random.default_rng(seed).normal(size=a.length(widths)).astype(np.float32)
    cut = a.slice(part, widths, sub)
    assert len(cut) == sub.length(widths)
    assert np.array_equal(a.scatter(cut, widths, sub, part), part)


@laws
@given(nested(), st.integers(0, 2**32 - 1))
def test_scatter_writes_its_slots_and_no_others(case, seed):
    a, sub, widths = case
    rng = np.random.default_rng(seed)
    into, part = rng.normal(size=a.length(widths)), rng.normal(size=sub.length(widths))
    out = a.scatter(part, widths, sub, into)
    rest = a.keep(~sub.within(a))
    assert np.array_equal(a.slice(out, widths, sub), part)
    assert np.array_equal(a.slice(out, widths, rest), a.slice(into, widths, rest))


@laws
@given(nested(), st.data())
def test_slicing_twice_is_slicing_once(case, data):
    a, sub, widths = case
    small = sub.keep(np.array(data.draw(st.lists(st.booleans(), min_size=sub.count, max_size=sub.count)), dtype=bool))
    part = np.arange(a.length(widths), dtype=np.float32)
    assert np.array_equal(sub.slice(a.slice(part, widths, sub), widths, small), a.slice(part, widths, small))


# -- the wire ------------------------------------------------------------
def test_packing_by_hand():
    """1 0 1 1 0 and three bits of padding is 1011 0000 = 0xB0; a ninth bit starts the second byte."""
    assert EXAMPLE.to_bytes() == b"\xb0"
    assert pack_bits(np.array([True] * 9)) == b"\xff\x80"
    assert unpack_bits(b"\xff\x80", 9).tolist() == [True] * 9


@laws
@given(masks())
def test_pack_round_trip(one):
    (a,) = one
    data = a.to_bytes()
    assert len(data) == -(-sum(a.ranks) // 8)
    assert RankMask.from_bytes(a.ranks, data) == a


@pytest.mark.parametrize("data", [b"", b"\xb0\x00", b"\x00" * 9])
def test_from_bytes_refuses_a_wrong_length(data):
    with pytest.raises(ValueError, match="5 bits need 1 bytes"):
        RankMask.from_bytes((2, 0, 3), data)


@pytest.mark.parametrize("bit", [0, 1, 2])
def test_from_bytes_refuses_padding(bit):
    with pytest.raises(ValueError, match="padding"):
        RankMask.from_bytes((2, 0, 3), bytes([0xB0 | 1 << bit]))


@laws
@given(lengths, st.binary(max_size=5))
def test_from_bytes_takes_only_what_packing_gives(ranks, data):
    try:
        read = RankMask.from_bytes(ranks, data)
    except ValueError:
        size = sum(ranks)
        padding = int.from_bytes(data, "big") & ((1 << (8 * len(data) - size)) - 1) if 8 * len(data) > size else 0
        assert len(data) != -(-size // 8) or padding
    else:
        assert read.to_bytes() == data


# -- ranking ------------------------------------------------------------
def test_rank_order_by_hand():
    """4 is best, the two 2s follow in their order, then -1; NaN counts as -inf and comes last, behind the earlier -inf."""
    given_scores = np.array([2.0, -np.inf, 4.0, np.nan, 2.0, -1.0])
    assert rank_order(given_scores).tolist() == [1, 4, 0, 5, 2, 3]


def test_nan_ties_with_minus_infinity_by_position():
    assert rank_order(np.array([np.nan, -np.inf, np.nan])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [0.0, 7.0, np.nan, -np.inf, np.inf])
def test_ties_go_by_position(value):
    assert select_top(np.full(8, value), 3).tolist() == [True] * 3 + [False] * 5


@laws
@given(scores)
def test_rank_order_against_python_sorting(values):
    keys = [-math.inf if math.isnan(v) else v for v in values]
    best_first = sorted(range(len(values)), key=lambda i: (-keys[i], i))
    ranks = rank_order(np.array(values, dtype=np.float64))
    assert [best_first.index(i) for i in range(len(values))] == ranks.tolist()


@laws
@given(scores, st.integers(0, 40))
def test_select_top_keeps_exactly_the_budget(values, budget):
    values = np.array(values, dtype=np.float64)
    kept = select_top(values, budget)
    assert kept.sum() == min(budget, len(values))
    assert np.array_equal(kept, rank_order(values) < budget)
    least = np.where(np.isnan(values), -np.inf, values)
    if kept.any() and not kept.all():
        assert least[kept].min() >= least[~kept].max()
