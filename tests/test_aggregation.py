"""SlotMean: the weighted mean of every number over the clients that sent it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as numpy_arrays

from fedara_flwr.ranks import RankMask
from fedara_flwr.spec import PARTS, SLOT_PARTS, ModelSpec, ModuleSpec, ParameterSpec
from fedara_flwr.strategies.aggregation import SlotMean
from fedara_flwr.wire.plan import Update

laws = settings(deadline=None, max_examples=100)
SPEC = ModelSpec(
    "f" * 64,
    (ModuleSpec("m0", 2, 1, 0), ModuleSpec("m1", 1, 3, 1)),
    (ParameterSpec("weight", (1, 2)),),
)
FULL = RankMask.full([2, 1])  # slots (0,0), (0,1), (1,0): 2 + 2 + 1 numbers in B, 1 + 1 + 1 in E, 1 + 1 + 3 in A
finite = st.floats(-(2.0**60), 2.0**60, width=32)
weights = st.integers(1, 10**6)


def f32(*values):
    return np.array(values, dtype=np.float32)


def global_arrays():
    return {"B": f32(1, 2, 3, 4, 5), "E": f32(6, 7, 8), "A": f32(9, 10, 11, 12, 13), "head": f32(14, 15)}


def merge(*updates, mask=FULL, arrays=None):
    """The result of (update, weight) pairs, added in this order."""
    merger = SlotMean(SPEC, mask, global_arrays() if arrays is None else arrays)
    for number, (update, weight) in enumerate(updates):
        merger.add(str(number), update, weight)
    return merger.result()


def update(mask=FULL, **parts):
    return Update(parts, mask, 1, {})


def same(left, right):
    return set(left) == set(right) and all(
        left[part].dtype == np.float32 and np.array_equal(left[part], right[part]) for part in left
    )


# -- by hand ------------------------------------------------------------
def test_weighted_mean():
    """Weights 1 and 3: (0 + 3·4)/4 = 3, (4 + 3·0)/4 = 1; B's first number (8 + 3·0)/4 = 2."""
    one = update(head=f32(0, 4), B=f32(8, 0, 0, 0, 4))
    two = update(head=f32(4, 0), B=f32(0, 4, 8, 0, 0))
    merged = merge((one, 1), (two, 3))
    assert merged["head"].tolist() == [3, 1]
    assert merged["B"].tolist() == [2, 3, 6, 0, 1]


def test_unequal_masks():
    """Client a (weight 1) sends slots (0,0) and (1,0), client b (weight 3) sends (0,0) and (0,1).

    Slot (0,0) is the mean of both, (0,1) is b's alone, (1,0) is a's alone.
    B: (1·2 + 3·6)/4 = 5, (1·4 + 3·0)/4 = 1 | b: 20, 30 | a: 7. E: (1·1 + 3·5)/4 = 4 | b: 9 | a: 2.
    A: (1·8 + 3·0)/4 = 2 | b: 3 | a: 40, 50, 60. Head: (1·0 + 3·4)/4 = 3, (1·8 + 3·8)/4 = 8.
    """
    a = RankMask((2, 1), np.array([1, 0, 1], dtype=bool))
    b = RankMask((2, 1), np.array([1, 1, 0], dtype=bool))
    merged = merge(
        (update(a, B=f32(2, 4, 7), E=f32(1, 2), A=f32(8, 40, 50, 60), head=f32(0, 8)), 1),
        (update(b, B=f32(6, 0, 20, 30), E=f32(5, 9), A=f32(0, 3), head=f32(4, 8)), 3),
    )
    assert merged["B"].tolist() == [5, 1, 20, 30, 7]
    assert merged["E"].tolist() == [4, 9, 2]
    assert merged["A"].tolist() == [2, 3, 40, 50, 60]
    assert merged["head"].tolist() == [3, 8]


def test_slot_that_nobody_sent_keeps_its_value():
    """Both send (1,0) only: B's last number is (1·1 + 1·3)/2 = 2, the four numbers of module 0 stay 1, 2, 3, 4."""
    last = RankMask((2, 1), np.array([0, 0, 1], dtype=bool))
    merged = merge((update(last, B=f32(1), E=f32(0)), 1), (update(last, B=f32(3), E=f32(2)), 1))
    assert merged["B"].tolist() == [1, 2, 3, 4, 2]
    assert merged["E"].tolist() == [6, 7, 1]


def test_part_that_nobody_trained_keeps_its_value():
    merged = merge((update(head=f32(0, 0)), 5), (update(head=f32(2, 4)), 5))
    assert same(merged, global_arrays() | {"head": f32(1, 2)})


def test_part_that_one_of_two_trained_is_that_ones():
    merged = merge((update(head=f32(0, 0)), 5), (update(head=f32(2, 4), E=f32(1, 2, 3)), 5))
    assert same(merged, global_arrays() | {"head": f32(1, 2), "E": f32(1, 2, 3)})


def test_nobody_at_all_changes_nothing():
    assert same(merge(), global_arrays())


def test_pruned_global_mask():
    """The global model lives on (0,1) and (1,0), B = 3 4 5; a client that sends only (1,0) changes the 5 alone."""
    mask = RankMask((2, 1), np.array([0, 1, 1], dtype=bool))
    sent = RankMask((2, 1), np.array([0, 0, 1], dtype=bool))
    merged = merge((update(sent, B=f32(50)), 2), mask=mask, arrays={"B": f32(3, 4, 5), "head": f32(0, 0)})
    assert same(merged, {"B": f32(3, 4, 50), "head": f32(0, 0)})


def test_global_arrays_are_not_written():
    arrays = global_arrays()
    merge((update(head=f32(0, 0), B=f32(0, 0, 0, 0, 0)), 1), arrays=arrays)
    assert same(arrays, global_arrays())


def test_result_may_be_asked_for_on_the_way():
    merger = SlotMean(SPEC, FULL, global_arrays())
    merger.add("a", update(head=f32(0, 8)), 1)
    assert merger.result()["head"].tolist() == [0, 8]
    merger.add("b", update(head=f32(4, 0)), 3)
    assert merger.result()["head"].tolist() == [3, 2]


def test_sums_are_kept_in_float64():
    """(2^24 + 3 - 2^24)/3 = 1, while in float32 2^24 + 3 is 2^24 + 4 and the mean 4/3."""
    merged = merge(*((update(head=f32(value, 0)), 1) for value in (2.0**24, 3, -(2.0**24))))
    assert merged["head"].tolist() == [1, 0]


# -- by law ------------------------------------------------------------
def parts_under(mask):
    """Strategy: all parts, packed under `mask`."""
    return st.fixed_dictionaries({part: numpy_arrays(np.float32, SPEC.length(part, mask), elements=finite) for part in PARTS})


@st.composite
def updates(draw, same_mask):
    """One to five (update, weight), each under all slots or under slots of its own."""
    drawn = []
    for _ in range(draw(st.integers(1, 5))):
        bits = [True] * 3 if same_mask else draw(st.lists(st.booleans(), min_size=3, max_size=3))
        mask = RankMask((2, 1), np.array(bits, dtype=bool))
        drawn.append((update(mask, **draw(parts_under(mask))), draw(weights)))
    return drawn


def close(left, right, scale):
    """Equal to a float32's last bit or two, where `scale` is the largest number that went into the mean."""
    return np.allclose(left, right, rtol=3e-7, atol=1e-13 * scale + 1e-38)


def largest(drawn):
    return max(float(np.abs(values).max(initial=0.0)) for item, _ in drawn for values in item.arrays.values())


@laws
@given(updates(same_mask=True))
def test_is_numpy_average_when_all_own_all(drawn):
    merged = merge(*drawn)
    for part in PARTS:
        stacked = np.stack([item.arrays[part].astype(np.float64) for item, _ in drawn])
        expected = np.average(stacked, axis=0, weights=[weight for _, weight in drawn])
        assert merged[part].dtype == np.float32
        assert close(merged[part], expected, largest(drawn))


@laws
@given(updates(same_mask=False))
def test_every_slot_is_the_average_over_its_owners(drawn):
    merged, before = merge(*drawn), global_arrays()
    for part in SLOT_PARTS:
        for slot in range(3):
            only = RankMask((2, 1), np.arange(3) == slot)
            owners = [(item, weight) for item, weight in drawn if item.mask.bits[slot]]
            widths = SPEC.widths(part)
            values = [item.mask.slice(item.arrays[part], widths, only).astype(np.float64) for item, _ in owners]
            expected = np.average(values, axis=0, weights=[w for _, w in owners]) if owners else None
            got = FULL.slice(merged[part], widths, only)
            if owners:
                assert close(got, expected, largest(drawn))
            else:
                assert np.array_equal(got, FULL.slice(before[part], widths, only))


@laws
@given(
    st.fixed_dictionaries(
        {
            part: numpy_arrays(
                np.float32, SPEC.length(part, FULL), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
            )
            for part in PARTS
        }
    ),
    st.integers(1, 2**40),
)
def test_one_update_comes_back_exactly(parts, weight):
    assert same(merge((update(**parts), weight)), parts)


@laws
@given(updates(same_mask=False), st.data())
def test_splitting_a_client_changes_nothing(drawn, data):
    """One client of weight v + w and two of v and w with its values, anywhere in the order, give the same model."""
    item, weight = drawn[0]
    extra = data.draw(weights)
    rest = data.draw(st.permutations([(item, weight), (item, extra), *drawn[1:]]))
    whole, split = merge((item, weight + extra), *drawn[1:]), merge(*rest)
    assert all(close(whole[part], split[part], largest(drawn)) for part in PARTS)


@laws
@given(updates(same_mask=False), st.integers(2, 1000))
def test_only_relative_weights_matter(drawn, factor):
    scaled = [(item, weight * factor) for item, weight in drawn]
    whole, other = merge(*drawn), merge(*scaled)
    assert all(close(whole[part], other[part], largest(drawn)) for part in PARTS)


@laws
@given(updates(same_mask=False))
def test_mean_lies_between_what_was_sent(drawn):
    merged = merge(*drawn)["head"]
    heads = np.stack([item.arrays["head"] for item, _ in drawn]).astype(np.float64)
    room = 3e-7 * np.abs(heads).max() + 1e-38
    assert (merged >= heads.min(axis=0) - room).all() and (merged <= heads.max(axis=0) + room).all()


@pytest.mark.parametrize("part", PARTS)
def test_refuses_a_part_of_another_length(part):
    """Arrival checks come before, yet a vector that does not fit must not be spread over the model."""
    values = {part: np.ones(SPEC.length(part, FULL) + 1, dtype=np.float32)}
    with pytest.raises(ValueError):
        merge((update(**values), 1))
