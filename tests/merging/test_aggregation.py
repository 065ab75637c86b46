"""Mergers: the weighted mean, the padded mean, the stack, its splitting by SVD, and the error of averaged factors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as numpy_arrays

from fedara_flwr.merging.factors import delta_norm, module_factors, split_product, split_svd
from fedara_flwr.merging.mean import FactorError, PaddedMean, SlotMean
from fedara_flwr.merging.stack import FactorStack
from fedara_flwr.model.deltas import pack_factors
from fedara_flwr.model.parts import BUILT_IN, SLOT_PARTS
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import ModelSpec, ModuleSpec, ParameterSpec
from fedara_flwr.wire.plan import Update

laws = settings(deadline=None, max_examples=60)
SPEC = ModelSpec(
    "f" * 64,
    (ModuleSpec("m0", 2, 1, 0), ModuleSpec("m1", 1, 3, 1)),
    (ParameterSpec("weight", (1, 2)),),
    (ParameterSpec("embeddings", (2, 1)),),
)
FULL = RankMask.full([2, 1])  # slots (0,0), (0,1), (1,0): 2 + 2 + 1 numbers in B, 1 + 1 + 1 in E, 1 + 1 + 3 in A
PARTS = tuple(BUILT_IN)
finite = st.floats(-(2.0**60), 2.0**60, width=32)
weights = st.integers(1, 10**6)


def f32(*values):
    return np.array(values, dtype=np.float32)


def global_arrays():
    return {"B": f32(1, 2, 3, 4, 5), "E": f32(6, 7, 8), "A": f32(9, 10, 11, 12, 13), "head": f32(14, 15), "backbone": f32(0, 0)}


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


# -- factors ------------------------------------------------------------
WIDE = ModelSpec(
    "f" * 64,
    (ModuleSpec("m0", 5, 4, 0), ModuleSpec("m1", 3, 6, 0), ModuleSpec("m2", 4, 4, 1)),
    (ParameterSpec("weight", (1, 2)),),
)
SLOTS = RankMask.full([3, 2, 3])
masks = st.lists(st.booleans(), min_size=8, max_size=8).map(lambda bits: RankMask(SLOTS.ranks, np.array(bits)))


def wide_update(seed, mask=SLOTS, parts=("B", "A", "head"), spread=1.0):
    """Random values under `mask`; parts without a slot are left out, as on the wire."""
    rng = np.random.default_rng(seed)
    sent = [part for part in parts if part == "head" or mask.count]
    return Update({part: rng.normal(0, spread, WIDE.length(part, mask)).astype(np.float32) for part in sent}, mask, 1, {})


def products(item):
    """B·diag(E)·A of every module."""
    return [left @ right for left, right in module_factors(WIDE, item.mask, item.arrays)]


def test_module_factors_by_hand():
    """m0 (2 by 1) holds B = (1, 2), (3, 4), E = 6, 7 and A = 9, 10; m1 (1 by 3) B = 5, E = 8, A = 11 12 13."""
    (left, right), (left1, right1) = module_factors(SPEC, FULL, global_arrays())
    assert left.tolist() == [[6, 21], [12, 28]] and right.tolist() == [[9], [10]]
    assert left1.tolist() == [[40]] and right1.tolist() == [[11, 12, 13]]
    assert left.dtype == right.dtype == np.float64


def test_module_factors_without_a_slot():
    """A dead module has factors of rank 0; where no slot lives at all, B and A did not even travel."""
    last = RankMask((2, 1), np.array([0, 0, 1], dtype=bool))
    (left, right), (left1, _) = module_factors(SPEC, last, {"B": f32(5), "A": f32(1, 2, 3)})
    assert left.shape == (2, 0) and right.shape == (0, 1) and left1.tolist() == [[5]]
    none = RankMask((2, 1), np.zeros(3, dtype=bool))
    assert [(a.shape, b.shape) for a, b in module_factors(SPEC, none, {"head": f32(0, 0)})] == [
        ((2, 0), (0, 1)),
        ((1, 0), (0, 3)),
    ]
    assert delta_norm(SPEC, update(none, head=f32(0, 0))) == 0


@laws
@given(st.integers(0, 2**32), masks)
def test_pack_is_the_inverse_of_module_factors(seed, mask):
    item = wide_update(seed, mask, ("B", "A"))
    packed = pack_factors(module_factors(WIDE, mask, item.arrays))
    assert all(np.array_equal(packed[part], item.arrays.get(part, f32())) for part in ("B", "A"))


@laws
@given(st.integers(0, 2**32), masks, st.booleans())
def test_delta_norm_is_the_norm_of_all_products(seed, mask, with_e):
    item = wide_update(seed, mask, ("B", "E", "A") if with_e else ("B", "A"))
    expected = np.linalg.norm(np.concatenate([product.reshape(-1) for product in products(item)]))
    assert delta_norm(WIDE, item) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_delta_norm_by_hand():
    """B·A of m0 is (3, 0)ᵀ, of m1 (0, 0, 4): 5 together."""
    assert delta_norm(SPEC, update(B=f32(1, 0, 0, 0, 2), A=f32(3, 7, 0, 0, 2))) == 5


# -- PaddedMean ------------------------------------------------------------
def padded(*updates, norm=lambda item: item.metrics["norm"], cap=0.0):
    merger = PaddedMean(SPEC, FULL, global_arrays(), norm, cap)
    for number, (item, weight) in enumerate(updates):
        merger.add(str(number), item, weight)
    return merger.result(), merger.report()


def normed(norm, mask=FULL, **parts):
    return Update(parts, mask, 1, {"norm": norm})


FIRST = RankMask((2, 1), np.array([1, 0, 1], dtype=bool))


def test_padded_mean_by_hand():
    """Norms 1 and 3 weigh the slots, examples 1 and 1 the head; client a holds (0,0) and (1,0), b all three.

    B of (0,0): (1·4 + 3·8)/4 = 7, (1·0 + 3·4)/4 = 3 | (0,1), b's alone, is padded with 0: 3·4/4 = 3, 3·8/4 = 6 |
    (1,0): (1·8 + 3·0)/4 = 2. A: 1·4/4 = 1 | 3·4/4 = 3 | (1·4 + 3·4)/4 = 4, 0, (0 + 3·4)/4 = 3. Head: means 1 and 3.
    """
    merged, report = padded(
        (normed(1.0, FIRST, B=f32(4, 0, 8), A=f32(4, 4, 0, 0), head=f32(0, 2)), 1),
        (normed(3.0, B=f32(8, 4, 4, 8, 0), A=f32(0, 4, 4, 0, 4), head=f32(2, 4)), 1),
    )
    assert merged["B"].tolist() == [7, 3, 3, 6, 2]
    assert merged["A"].tolist() == [1, 3, 4, 0, 3]
    assert merged["head"].tolist() == [1, 3]
    assert merged["E"].tolist() == [6, 7, 8]
    assert report == {}


@pytest.mark.parametrize(("cap", "share"), [(0.0, 41 / 50), (3.0, 3 / 12), (1.0, 1 / 10)])
def test_who_sends_large_factors_weighs_a_multiple_of_the_median(cap, share):
    """Nine clients of norm 1 send B = 0, one of norm 41 sends B = 1: its share of 50 without a cap, else of 9 + cap."""
    honest = [(normed(1.0, B=np.zeros(5, np.float32)), 1)] * 9
    merged, _ = padded(*honest, (normed(41.0, B=np.ones(5, np.float32)), 1), cap=cap)
    assert merged["B"] == pytest.approx([share] * 5)


def test_padded_slot_that_nobody_sent_keeps_its_value():
    """Only clients of low rank were drawn: (0,1) is not their concern, and B = A = 0 could never learn again."""
    merged, _ = padded((normed(2.0, FIRST, B=f32(4, 0, 8), A=f32(4, 4, 0, 0), head=f32(0, 2)), 1))
    assert merged["B"].tolist() == [4, 0, 3, 4, 8]
    assert merged["A"].tolist() == [4, 10, 4, 0, 0]


def test_padded_mean_of_clients_whose_adapters_are_zero_changes_no_slot():
    merged, _ = padded((normed(0.0, B=f32(0, 0, 0, 0, 0), A=f32(1, 1, 1, 1, 1), head=f32(0, 2)), 1))
    assert same(merged, global_arrays() | {"head": f32(0, 2)})


def test_client_without_a_slot_does_not_end_the_merge():
    none = RankMask((2, 1), np.zeros(3, dtype=bool))
    good = normed(1.0, B=f32(1, 1, 1, 1, 1), A=f32(1, 1, 1, 1, 1), head=f32(0, 0))
    merged, _ = padded((normed(0.0, none, head=f32(4, 4)), 3), (good, 1), norm=lambda item: delta_norm(SPEC, item))
    assert merged["B"].tolist() == [1, 1, 1, 1, 1] and merged["head"].tolist() == [3, 3]


@laws
@given(st.lists(st.tuples(st.integers(0, 2**32), st.floats(0.125, 8)), min_size=1, max_size=4))
def test_padded_mean_is_the_weighted_mean_when_all_own_all(drawn):
    items = [(wide_update(seed), norm) for seed, norm in drawn]
    start = wide_update(1).arrays
    left, right = PaddedMean(WIDE, SLOTS, start, lambda item: item.metrics["norm"]), SlotMean(WIDE, SLOTS, start)
    for item, norm in items:
        left.add("k", Update(item.arrays, SLOTS, 1, {"norm": norm}), 1)
        right.add_weighted(item, norm)
    one, two = left.result(), right.result()
    assert all(np.allclose(one[part], two[part], rtol=1e-6, atol=1e-7) for part in ("B", "A"))


# -- Stack ------------------------------------------------------------
def test_stack_by_hand():
    """Scales 2 and 4, weights 1 and 3: a's B weighs 2·1/4 = 1/2 in m0 and 1 in m1, b's 3/2 and 3; A is as it came."""
    stack = FactorStack(SPEC, FULL, global_arrays(), (2.0, 4.0))
    stack.add("a", update(FIRST, B=f32(4, 0, 8), A=f32(4, 1, 2, 3), head=f32(0, 0)), 1)
    stack.add("b", update(B=f32(2, 4, 6, 8, 1), A=f32(5, 6, 7, 8, 9), head=f32(4, 4)), 3)
    (left, right), (left1, right1) = stack.stacked()
    assert left.tolist() == [[2, 3, 9], [0, 6, 12]] and right.tolist() == [[4], [5], [6]]
    assert left1.tolist() == [[8, 3]] and right1.tolist() == [[1, 2, 3], [7, 8, 9]]
    assert stack.result()["head"].tolist() == [3, 3]


@laws
@given(st.lists(st.tuples(st.integers(0, 2**32), masks, st.integers(1, 1000), st.booleans()), min_size=1, max_size=4))
def test_stack_is_the_exact_weighted_sum(drawn):
    items = [(wide_update(seed, mask, ("B", "E", "A") if e else ("B", "A")), weight) for seed, mask, weight, e in drawn]
    scales, total = (2.0, 0.5, 3.0), sum(weight for _, weight in items)
    start = wide_update(0, parts=("B", "E", "A", "head")).arrays
    stack = FactorStack(WIDE, SLOTS, start, scales)
    for item, weight in items:
        stack.add("k", item, weight)
    for m, (left, right) in enumerate(stack.stacked()):
        expected = sum(scales[m] * weight / total * products(item)[m] for item, weight in items)
        assert np.allclose(left @ right, expected, rtol=1e-12, atol=1e-12)


# -- splitting by SVD ------------------------------------------------------------
def test_split_svd_by_hand():
    """diag(8, 2) with scale 2 and rank 1: √(8/2) = 2 on both sides, signs open; what is left out is the 2."""
    b, a = split_svd(np.diag([8.0, 2.0]), 1, 2.0)
    assert np.allclose(np.abs(b), [[2], [0]]) and np.allclose(np.abs(a), [[2, 0]])
    assert np.allclose(2.0 * b @ a, [[8, 0], [0, 0]])


@st.composite
def thin_factors(draw):
    rows, columns, rank = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return rng.normal(size=(rows, rank)), rng.normal(size=(rank, columns))


@laws
@given(thin_factors(), st.integers(1, 6), st.floats(0.25, 8))
def test_split_by_qr_equals_the_dense_split_and_is_the_best_approximation(factors, rank, scale):
    """Eckart-Young: what rank r misses are the singular values from r on; √S stands on both sides, orthogonal otherwise."""
    left, right = factors
    b, a = split_product(left, right, rank, scale)
    b2, a2 = split_svd(left @ right, rank, scale)
    singular = np.linalg.svd(left @ right, compute_uv=False)
    room = 1e-9 * (1 + singular[0])
    missed = np.linalg.norm(left @ right - scale * b @ a)
    assert missed == pytest.approx(np.linalg.norm(singular[rank:]), abs=room)
    assert np.linalg.norm(left @ right - scale * b2 @ a2) == pytest.approx(missed, abs=room)
    for gram in (b.T @ b, a @ a.T):
        assert np.allclose(gram * scale, np.diag(singular[: len(gram)]), atol=room)


def test_split_by_qr_and_dense_give_the_same_product():
    """12 by 10 of rank 3: 2·3 < 10, so by QR; a sum of four such ones is dense. Rank 4 keeps all of the first."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(12, 3)), rng.normal(size=(3, 10))
    thin, thick = split_product(left, right, 4, 2.0), split_product(np.tile(left, 4), np.tile(right, (4, 1)), 4, 2.0)
    assert thin[0].shape == (12, 3) and thick[0].shape == (12, 4)
    assert np.allclose(2 * thin[0] @ thin[1], left @ right) and np.allclose(2 * thick[0] @ thick[1], 4 * left @ right)


# -- FactorError ------------------------------------------------------------
def factor_error(items, spec=WIDE, mask=SLOTS, parts=("B", "A", "head")):
    """(merged, report) of updates under `mask`."""
    mean = SlotMean(spec, mask, {part: np.zeros(spec.length(part, mask), dtype=np.float32) for part in parts})
    for item, weight in items:
        mean.add("k", item, weight)
    merged = mean.result()
    return merged, mean.report()


def exact_error(items, merged, spec, mask):
    total = sum(weight for _, weight in items)
    off, size = 0.0, 0.0
    ours = module_factors(spec, mask, merged)
    theirs = [module_factors(spec, mask, item.arrays) for item, _ in items]
    for m, (left, right) in enumerate(ours):
        mean = sum(weight / total * f[m][0] @ f[m][1] for (_, weight), f in zip(items, theirs, strict=True))
        off, size = off + np.sum((left @ right - mean) ** 2), size + np.sum(mean**2)
    return (off / size) ** 0.5


def test_factor_error_by_hand():
    """B = A = 1 and B = A = 3, single numbers: mean of products 5, product of means 4, off by 1/5 whatever the probe."""
    spec = ModelSpec("f" * 64, (ModuleSpec("m", 1, 1, 0),), SPEC.head)
    mask = RankMask.full([1])
    items = [(Update({"B": f32(v), "A": f32(v)}, mask, 1, {}), 1) for v in (1, 3)]
    assert factor_error(items, spec, mask)[1]["factor-error"] == pytest.approx(0.2)


@pytest.mark.parametrize("parts", [("B", "A"), ("B", "E", "A")])
def test_factor_error_is_near_the_exact_one(parts):
    """Over 40 models of ten modules: the estimates' mean square is within 15% of the exact errors', and none is off by 2.

    A module's estimate has one probe of 30 numbers, so it scatters; two modules are probed of each model.
    """
    spec = ModelSpec("f" * 64, tuple(ModuleSpec(f"m{i}", 20, 30, i) for i in range(10)), SPEC.head)
    mask, pairs = RankMask.full([4] * 10), []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        items = []
        for weight in (1, 2, 5):
            drawn = {part: rng.normal(size=spec.length(part, mask)).astype(np.float32) for part in parts}
            items.append((Update(drawn, mask, 1, {}), weight))
        merged, report = factor_error(items, spec, mask, parts)
        pairs.append((report["factor-error"], exact_error(items, merged, spec, mask)))
    estimated, exact = np.array(pairs).T
    assert np.mean(estimated**2) == pytest.approx(np.mean(exact**2), rel=0.15)
    assert (estimated < 2 * exact).all() and (estimated > exact / 2).all()


def test_factor_error_is_zero_where_all_send_the_same_factors():
    item = wide_update(3)
    _, report = factor_error([(item, 1), (item, 3), (item, 7)])
    assert report["factor-error"] == pytest.approx(0, abs=1e-6)


def test_factor_error_is_zero_where_all_share_one_factor():
    """FFA-LoRA's point: with one A the mean of B is exact."""
    a = wide_update(3).arrays["A"]
    items = [(Update(wide_update(seed).arrays | {"A": a}, SLOTS, 1, {}), seed) for seed in (1, 2, 3)]
    assert factor_error(items)[1]["factor-error"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "items",
    [
        [],
        [(wide_update(1, parts=("B", "head")), 1), (wide_update(2, parts=("B", "head")), 1)],
        [(wide_update(1), 1), (wide_update(2, parts=("B", "head")), 1)],
        [(wide_update(1), 1), (wide_update(2, RankMask(SLOTS.ranks, np.arange(8) % 2 > 0)), 1)],
        [(wide_update(1, parts=("head",)), 1)],
        [(wide_update(1, spread=0.0), 1), (wide_update(2, spread=0.0), 1)],
        [(wide_update(1, spread=1e38), 1), (wide_update(2, spread=1e38), 1)],
    ],
    ids=["nobody", "only B", "one only B", "parts of modules", "only head", "all zero", "overflow"],
)
def test_no_factor_error(items):
    assert factor_error(items)[1] == {}


def test_factor_error_of_a_mask_without_slots():
    assert FactorError(WIDE, RankMask(SLOTS.ranks, np.zeros(8, dtype=bool))).value is None
