"""Deltas, what both sides draw, and how pieces of a delta travel."""

from __future__ import annotations

import hashlib
import weakref

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedara_flwr.model.deltas import DeltaLog, Holding, Piece, as_dense, compose, dense, factors, from_factors
from fedara_flwr.model.draws import draw, lora_a, sparse_positions
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import ModelSpec, ModuleSpec, ParameterSpec
from fedara_flwr.training import LocalTraining
from fedara_flwr.wire.arrays import Rejected
from fedara_flwr.wire.meter import ByteMeter, payload
from fedara_flwr.wire.plan import TrainPlan
from fedara_flwr.wire.records import lacks_delta, need_delta, plan_from_content, plan_to_content, read_pieces

SHAPES = ((3, 2), (2, 4), (1, 5))
SPEC = ModelSpec("", tuple(ModuleSpec(f"m{i}", *s, i) for i, s in enumerate(SHAPES)), (ParameterSpec("h", (2,)),))
DENSE_BYTES = 4 * (6 + 8 + 5)


def piece_of(ranks, seed):
    """Small whole numbers, whose sums and products float32 holds exactly."""
    rng = np.random.default_rng(seed)

    def some(n):
        return rng.integers(-3, 4, n).astype(np.float32)

    if not ranks:
        return Piece((), {"dense": some(19)})
    return Piece(tuple(ranks), {"B": some(np.dot(ranks, (3, 2, 1))), "A": some(np.dot(ranks, (2, 4, 5)))})


ranks = st.one_of(st.just(()), st.tuples(*[st.integers(0, 2)] * 3))
pieces = st.builds(piece_of, ranks, st.integers(0, 10**6))


def flat(matrices):
    return np.concatenate([m.ravel() for m in matrices]).tolist()


# -- arithmetic -----------------------------------------------------------------------------------------------------
def test_one_piece_by_hand():
    """Rank 2 on a 3 x 2 matrix, B's columns (1, 2, 3), (0, 1, 0), A's rows (1, -1), (5, 7); rank 0; rank 1 on 1 x 5."""
    piece = Piece(
        (2, 0, 1),
        {
            "B": np.array([1, 2, 3, 0, 1, 0, 2], np.float32),
            "A": np.array([1, -1, 5, 7, 1, 2, 3, 4, 5], np.float32),
        },
    )
    first, second, third = dense([piece], SPEC)
    assert first.tolist() == [[1, -1], [2 + 5, -2 + 7], [3, -3]]
    assert second.tolist() == [[0] * 4] * 2 and third.tolist() == [[2, 4, 6, 8, 10]]
    assert piece.nbytes == 4 * 16
    assert piece.lengths(SPEC) == {"B": 7, "A": 9}
    assert flat(dense([piece, piece], SPEC)) == [2 * x for x in flat(dense([piece], SPEC))]


@given(pieces)
def test_factors_and_from_factors_are_inverse(piece):
    assert {name: len(vector) for name, vector in piece.arrays.items()} == piece.lengths(SPEC)
    if not piece.ranks:
        assert as_dense(dense([piece], SPEC)).arrays["dense"].tolist() == piece.arrays["dense"].tolist()
        return
    pairs = factors(piece, SPEC)
    again = from_factors(pairs)
    assert again.ranks == piece.ranks and again.digest == piece.digest
    for (left, right), matrix, shape in zip(pairs, dense([piece], SPEC), SHAPES, strict=True):
        assert matrix.shape == shape
        assert (left @ right).tolist() == matrix.tolist()


@given(st.lists(pieces, max_size=4))
def test_composed_is_the_sum_and_factors_only_while_they_are_short(some):
    whole = compose(some, SPEC)
    if not some:
        assert whole is None
        return
    expected = np.zeros(19)
    for piece in some:
        expected += flat(dense([piece], SPEC))
    assert flat(dense([whole], SPEC)) == flat(dense(some, SPEC)) == expected.tolist()
    short = all(p.ranks for p in some) and 2 * sum(p.nbytes for p in some) <= DENSE_BYTES
    assert bool(whole.ranks) == short
    if short:
        assert whole.ranks == tuple(np.sum([p.ranks for p in some], axis=0))


def test_a_digest_is_that_of_ranks_and_values():
    """Equal bytes under other ranks, other values and other names are other pieces."""
    piece = piece_of((1, 1, 0), 1)
    total = hashlib.sha256(b"(1, 1, 0)")
    total.update(b"A" + piece.arrays["A"].tobytes() + b"B" + piece.arrays["B"].tobytes())
    assert piece.digest == total.hexdigest()
    values = np.ones(19, np.float32)
    changed = values.copy()
    changed[7] = np.nextafter(np.float32(1), np.float32(2))
    others = [Piece((1, 0, 1), piece.arrays), Piece((), {"dense": values}), Piece((), {"dense": changed})]
    assert len({p.digest for p in [piece, *others]}) == 4
    assert Piece((), {"dense": values[::-1]}).digest == others[1].digest  # not contiguous, the same numbers


def test_composing_many_pieces_holds_one_of_them_at_a_time():
    """Two pieces of 34 bytes' worth fit beside each other; from then on the sum is dense, and the rest is not kept."""
    alive, most = weakref.WeakSet(), 0

    def stream():
        nonlocal most
        for seed in range(30):
            piece = piece_of((1, 0, 0), seed)
            alive.add(piece)
            most = max(most, len(alive))
            yield piece

    whole = compose(stream(), SPEC)
    assert flat(dense([whole], SPEC)) == flat(dense([piece_of((1, 0, 0), seed) for seed in range(30)], SPEC))
    assert most <= 3  # the one that is made, and those that the caller and `compose` still name


# -- the log --------------------------------------------------------------------------------------------------------
@given(st.lists(st.tuples(pieces, st.sets(st.integers(0, 2))), min_size=1, max_size=8))
def test_whoever_fetches_whenever_holds_the_sum_for_the_fewest_bytes(rounds):
    """Three nodes, of which some fetch after each new piece; every node fetches at the end."""
    log, expected, added = DeltaLog(SPEC), np.zeros(19), []
    have = {node: Holding() for node in range(3)}
    stores: dict[int, dict[str, Piece]] = {node: {} for node in range(3)}

    def fetch(node):
        missing = sum(p.nbytes for p in added[have[node].version :])
        before, kept = have[node], log.nbytes(have[node].digests)
        have[node], sent = log.fetch(before)
        stores[node] |= {p.digest: p for p in sent}
        assert have[node].version == log.version == len(added)
        # a node never keeps more than two dense pieces' bytes: then it gets one dense piece in place of all
        least = min(missing, DENSE_BYTES) if kept + missing <= 2 * DENSE_BYTES else DENSE_BYTES
        assert sum(p.nbytes for p in sent) == (least if before.version < log.version else 0)
        assert log.nbytes(have[node].digests) <= 2 * DENSE_BYTES
        assert flat(dense([stores[node][d] for d in have[node].digests], SPEC)) == expected.tolist()
        assert log.fetch(have[node]) == (have[node], [])

    assert log.composed() is None
    for piece, nodes in rounds:
        log.add(piece)
        added.append(piece)
        expected += flat(dense([piece], SPEC))
        assert flat(dense([log.composed()], SPEC)) == expected.tolist()
        assert sum(p.nbytes for p in log._newest.values()) <= DENSE_BYTES
        for node in nodes:
            fetch(node)
    for node in range(3):
        fetch(node)


def test_a_new_node_gets_factors_until_a_dense_piece_is_smaller():
    """Pieces of (1, 1, 1) have 4·17 = 68 bytes, dense are 76: one goes as factors, two as one dense piece."""
    log = DeltaLog(SPEC)
    log.add(piece_of((1, 1, 1), 1))
    first, sent = log.fetch(Holding())
    assert [p.ranks for p in sent] == [(1, 1, 1)] and first.digests == (sent[0].digest,)
    log.add(piece_of((1, 1, 1), 2))
    second, sent = log.fetch(first)
    assert [p.ranks for p in sent] == [(1, 1, 1)] and second.digests == (*first.digests, sent[0].digest)
    fresh, sent = log.fetch(Holding())
    assert [p.ranks for p in sent] == [()] and fresh.digests == (sent[0].digest,)


def test_a_piece_larger_than_the_dense_one_is_not_kept():
    log = DeltaLog(SPEC)
    log.add(piece_of((2, 2, 2), 1))
    assert not log._newest
    assert log.fetch(Holding())[1][0].ranks == ()


def test_a_piece_of_the_wrong_length_is_refused():
    log = DeltaLog(SPEC)
    with pytest.raises(ValueError, match=r"A has shape \(16,\), expected \(11,\)"):
        log.add(Piece((1, 1, 1), {"B": np.zeros(6, np.float32), "A": np.zeros(16, np.float32)}))
    assert log.version == 0 and log.composed() is None


# -- what both sides draw -------------------------------------------------------------------------------------------
@given(st.lists(st.booleans(), min_size=9, max_size=9), st.integers(0, 2**31))
def test_lora_a_is_cut_from_the_full_draw_whatever_the_mask(bits, seed):
    full = RankMask.full((3, 3, 3))
    mask = RankMask(full.ranks, np.array(bits))
    whole = lora_a(SPEC, full, seed)
    assert np.array_equal(lora_a(SPEC, mask, seed), full.slice(whole, SPEC.widths("A"), mask))
    assert np.array_equal(draw(SPEC, mask, frozenset({"A"}), seed, 0)["A"], lora_a(SPEC, mask, seed))
    for m, d_in in enumerate((2, 4, 5)):
        start = 3 * sum((2, 4, 5)[:m])
        assert np.abs(whole[start : start + 3 * d_in]).max() <= np.float32(d_in**-0.5)


def test_lora_a_has_kaimings_spread_and_follows_the_seed():
    """U(-b, b) has the standard deviation b/√3; here b = 1/10."""
    spec = ModelSpec("", (ModuleSpec("m", 7, 100, 0),), ())
    a = lora_a(spec, RankMask.full([200]), 0)
    assert a.std() == pytest.approx(0.1 / 3**0.5, rel=0.01) and abs(a.mean()) < 0.002 and a.dtype == np.float32
    assert not np.array_equal(a, lora_a(spec, RankMask.full([200]), 1))


@given(st.integers(1, 19), st.integers(0, 2**31))
def test_sparse_positions_are_distinct_and_ascending(count, seed):
    positions = sparse_positions(SPEC, count, seed)
    assert len(positions) == count and (np.diff(positions) > 0).all() and positions[0] >= 0 and positions[-1] < 19
    assert np.array_equal(positions, sparse_positions(SPEC, count, seed))


def test_every_position_is_equally_likely():
    """2,000 draws of 5 of 19: each is expected 526 times, with a standard deviation below 20."""
    counts = sum(np.bincount(sparse_positions(SPEC, 5, seed), minlength=19) for seed in range(2000))
    assert np.abs(counts - 2000 * 5 / 19).max() < 90


@pytest.mark.parametrize("count", [0, 20])
def test_impossible_numbers_of_positions_are_refused(count):
    with pytest.raises(ValueError, match=f"{count} positions among 19 weights"):
        sparse_positions(SPEC, count, 0)


def test_other_drawn_parts_are_zero():
    mask = RankMask(((2,) * 3), np.array([1, 0, 0, 1, 0, 0], bool))
    drawn = draw(SPEC, mask, frozenset({"B", "E", "backbone"}), 5, entries=4)
    assert {part: vector.tolist() for part, vector in drawn.items()} == {"B": [0] * 5, "E": [0] * 2, "backbone": [0] * 4}


# -- the wire -------------------------------------------------------------------------------------------------------
def plan(*digests):
    values = {"server_round": 2, "seed": 1, "mask": RankMask.full([0] * 3), "scales": (1.0,) * 3, "train": LocalTraining()}
    return TrainPlan(**values, sent=frozenset({"head"}), carries=frozenset({"head"}), delta=digests)


def content_of(*some):
    return plan_to_content(plan(*(p.digest for p in some)), {"head": np.zeros(2, np.float32)}, some)


@given(st.lists(pieces, max_size=3, unique_by=lambda p: p.digest))
def test_pieces_travel_with_the_plan(some):
    content = RecordDict(dict(content_of(*some).items()))
    assert plan_from_content(content, 3).delta == tuple(p.digest for p in some)
    came = {p.digest: p for p in read_pieces(content, SPEC)}
    assert set(came) == {p.digest for p in some}
    for piece in some:
        assert came[piece.digest].ranks == piece.ranks
        assert all(np.array_equal(came[piece.digest].arrays[name], vector) for name, vector in piece.arrays.items())


@given(st.lists(pieces, max_size=3, unique_by=lambda p: p.digest))
def test_pieces_are_counted_as_delta(some):
    content, meter = content_of(*some), ByteMeter()
    expected = sum(p.nbytes for p in some)
    assert payload(content)["delta"] == meter.count("down", content)["delta"] == expected
    assert sum(payload(content).values()) == sum(record.count_bytes() for record in content.values())
    assert meter.total["down.delta"] == expected and meter.total["down.head"] == 8
    taken = meter.take_round()
    assert taken["down.delta"] == expected and taken["down"] == sum(payload(content).values())
    assert meter.take_round()["down.delta"] == 0 and meter.total["down.delta"] == expected


def tampered(piece, arrays=None, ranks=None, digest=None):
    content, digest = content_of(piece), digest or piece.digest
    del content["delta." + piece.digest]
    content["delta." + digest] = ArrayRecord({name: Array(v) for name, v in (arrays or piece.arrays).items()})
    content["delta-ranks." + digest] = ConfigRecord({"ranks": list(piece.ranks) if ranks is None else ranks})
    return content


PIECE = piece_of((1, 1, 1), 3)
SPOILT = PIECE.arrays | {"A": np.full(11, np.nan, np.float32)}


@pytest.mark.parametrize(
    "content, reason",
    [
        (tampered(PIECE, digest="0" * 64), "delta"),
        (tampered(PIECE, digest="../../etc/passwd"), "delta"),
        (tampered(PIECE, arrays=PIECE.arrays | {"B": PIECE.arrays["B"] + 1}), "delta"),
        (tampered(PIECE, arrays=PIECE.arrays | {"B": PIECE.arrays["B"][:5]}), "shape"),
        (tampered(PIECE, arrays=PIECE.arrays | {"B": PIECE.arrays["B"].astype(np.float64)}), "shape"),
        (tampered(PIECE, arrays=SPOILT), "not-finite"),
        (tampered(PIECE, arrays={"B": PIECE.arrays["B"]}), "parts"),
        (tampered(PIECE, arrays={"dense": np.zeros(19, np.float32)}), "parts"),
        (tampered(PIECE, ranks=[1, 1]), "delta"),
        (tampered(PIECE, ranks=[2**40, 1, 1]), "shape"),
        (tampered(PIECE, ranks=[-1, 4, 1]), "delta"),
        (tampered(PIECE, ranks=["one", "1", "1"]), "delta"),
    ],
)
def test_a_piece_that_is_not_what_was_announced_is_refused(content, reason):
    with pytest.raises(Rejected) as error:
        read_pieces(content, SPEC)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    "missing, lacks",
    [
        (["a"], True),
        (["a", "b"], True),
        (["c"], False),
        (["a", "c"], False),
        ([], False),
        (None, False),
        ("a", False),
        (7, False),
    ],
)
def test_only_pieces_of_the_plan_can_be_missing(missing, lacks):
    reply = {} if missing is None else {"need-delta": missing}
    assert lacks_delta(RecordDict({"reply": ConfigRecord(reply)}), plan("a", "b")) is lacks
    assert not lacks_delta(RecordDict({"reply": ConfigRecord(reply)}), plan())
    assert not lacks_delta(RecordDict(), plan("a"))


def test_need_delta_is_what_lacks_delta_reads():
    assert lacks_delta(need_delta(("a",), 2), plan("a", "b"))
