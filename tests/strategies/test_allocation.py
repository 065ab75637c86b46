"""How the budget falls and who gets it, by hand and by law."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedara_flwr.model.ranks import RankMask
from fedara_flwr.strategies.allocation import (
    Vote,
    arbitrate_budget,
    arbitrate_threshold,
    arbitration_order,
    budget,
    mean_scores,
    vote_shares,
)

laws = settings(deadline=None, max_examples=150)


# -- the schedule ------------------------------------------------------------
def test_schedule_by_hand():
    """36 slots to 6 in 10 rounds, one of warm-up, one final: b(t) = floor(6 + 30·((9 - t)/8)³) between.

    (7/8)³·30 = 20.09, (6/8)³·30 = 12.65, (5/8)³·30 = 7.32, (4/8)³·30 = 3.75, (3/8)³·30 = 1.58, (2/8)³·30 = 0.46,
    (1/8)³·30 = 0.05.
    """
    assert [budget(t, 10, 36, 6, 1, 1) for t in range(1, 11)] == [36, 26, 18, 13, 9, 7, 6, 6, 6, 6]


def test_schedule_without_warm_up_or_final_rounds():
    """8 to 0 in 2 rounds: half-way is 8·(1/2)³ = 1, and the last round has the final budget."""
    assert [budget(t, 2, 8, 0, 0, 0) for t in (1, 2)] == [1, 0]
    assert budget(1, 1, 8, 2, 0, 0) == 2


def test_schedule_floors_exactly():
    """64·(3/4)³ = 27 exactly: no rounding error may make it 26."""
    assert budget(1, 4, 64, 0, 0, 0) == 27


@st.composite
def schedules(draw):
    rounds = draw(st.integers(1, 60))
    warmup = draw(st.integers(0, rounds - 1))
    last = draw(st.integers(0, rounds - 1 - warmup))
    final = draw(st.integers(0, 500))
    return rounds, final + draw(st.integers(0, 5000)), final, warmup, last


@laws
@given(schedules())
def test_schedule_falls_from_first_to_final(schedule):
    rounds, first, final, warmup, last = schedule
    values = [budget(t, rounds, first, final, warmup, last) for t in range(1, rounds + 1)]
    assert values[:warmup] == [first] * warmup
    assert values[rounds - last - 1 :] == [final] * (last + 1)
    assert all(a >= b for a, b in zip(values, values[1:], strict=False))
    assert all(final <= value <= first for value in values)


def traffic_ratio(rounds, modules=10_000):
    """Slots without allocation over slots with it: round t travels under b(t - 1), the first one under all slots."""
    first, final, tenth = 12 * modules, 2 * modules, round(0.1 * rounds)
    sent = [first] + [budget(t, rounds, first, final, tenth, tenth) for t in range(1, rounds)]
    return rounds * first / sum(sent)


@pytest.mark.parametrize("rounds, ratio", [(10, 2.17), (20, 2.28), (50, 2.35)])
def test_traffic_of_12_to_2(rounds, ratio):
    """Traffic ratios of 12 → 2 by hand: each round travels under the mask of the one before."""
    assert round(traffic_ratio(rounds), 2) == ratio


def test_traffic_of_12_to_2_in_a_long_run():
    """A tenth at 12, a tenth at 2, and the cubic between averages 2 + 10/4 = 4.5: 1.2 + 0.2 + 3.6 = 5, and 12/5 = 2.4."""
    assert round(traffic_ratio(2000), 2) == 2.40


# -- arbitration by hand ------------------------------------------------------------
MASK = RankMask((3, 3), np.array([1, 0, 1, 1, 1, 1], dtype=bool))  # five alive, numbered 0..4 below


def vote(ranks, allowed, weight=1):
    return Vote(weight, np.array(ranks, dtype=np.int64), allowed)


def three_clients():
    """Clients of weight 3, 2 and 1 that may each keep 2 of the 5 alive slots.

    ========  =====  =====================  ==============
    client    n_k    rank of slots 0..4     votes for
    ========  =====  =====================  ==============
    a         3      0 1 2 3 4              0 and 1
    b         2      4 3 2 1 0              3 and 4
    c         1      2 0 3 1 4              1 and 3
    ========  =====  =====================  ==============

    Shares Σ n_k·vote_k:        3, 3 + 1 = 4, 0, 2 + 1 = 3, 2; of 6 in all.
    Scores Σ n_k·(5 - rank_k):  15 + 2 + 3 = 20, 12 + 4 + 5 = 21, 9 + 6 + 2 = 17, 6 + 8 + 4 = 18, 3 + 10 + 1 = 14.
    Order: 1 (share 4); 0 and 3 have 3 each and 0 the higher score; 4 (share 2); 2.
    """
    return [vote([0, 1, 2, 3, 4], 2, 3), vote([4, 3, 2, 1, 0], 2, 2), vote([2, 0, 3, 1, 4], 2, 1)]


def survivors(mask):
    """Numbers of MASK's alive slots that live in `mask`, a sub-mask of it."""
    assert MASK.covers(mask)
    return np.flatnonzero(mask.within(MASK)).tolist()


def test_shares_scores_and_order_by_hand():
    """Derived in `three_clients`."""
    assert vote_shares(three_clients(), 5).tolist() == [3, 4, 0, 3, 2]
    assert mean_scores(three_clients(), 5).tolist() == [20, 21, 17, 18, 14]
    assert arbitration_order(three_clients(), 5).tolist() == [1, 0, 3, 4, 2]


@pytest.mark.parametrize(
    "slots, alive",
    [(0, []), (1, [1]), (2, [0, 1]), (3, [0, 1, 3]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])],
)
def test_budget_arbitration_by_hand(slots, alive):
    """The first of the order 1, 0, 3, 4, 2 (`three_clients`)."""
    assert survivors(arbitrate_budget(MASK, three_clients(), slots)) == alive


def test_a_dead_slot_between_the_alive_ones_stays_dead():
    """Slot (0, 1) is dead; the alive 0 and 1 are (0, 0) and (0, 2)."""
    assert arbitrate_budget(MASK, three_clients(), 2).bits.tolist() == [True, False, True, False, False, False]


def test_ties_in_share_and_score_go_by_position():
    """Two clients vote for slots 1, 3 and 1, 4: 1 leads; 3 and 4 have ranks 1 + 2 both and 3 comes first; 0 and 2, 3 + 4."""
    votes = [vote([3, 0, 4, 1, 2], 2), vote([4, 0, 3, 2, 1], 2)]
    assert arbitration_order(votes, 5).tolist() == [1, 3, 4, 0, 2]


def test_share_comes_before_score():
    """Budget 1, four slots. Two clients of weight 1 put slot 1 first and slot 2 second, a third slot 2 first and slot 1 last.

    Third at weight 1: slot 1 has share 2 and score 4 + 4 + 1 = 9, slot 2 has share 1 and score 3 + 3 + 4 = 10: slot 1 stays.
    At weight 2 both have share 2, and slot 2 has 3 + 3 + 8 = 14 against 4 + 4 + 2 = 10: slot 2 stays.
    """
    mask = RankMask.full([2, 2])

    def kept(weight):
        votes = [vote([2, 0, 1, 3], 1), vote([2, 0, 1, 3], 1), vote([1, 3, 0, 2], 1, weight)]
        return np.flatnonzero(arbitrate_budget(mask, votes, 1).bits).tolist()

    assert [kept(1), kept(2)] == [[1], [2]]


def test_equal_share_and_score_go_by_position():
    """Two clients in opposite orders: each slot scores (3 - r) + (1 + r) = 4, slots 0 and 2 have a vote each."""
    mask = RankMask.full([1, 2])
    assert np.flatnonzero(arbitrate_budget(mask, [vote([0, 1, 2], 1), vote([2, 1, 0], 1)], 1).bits).tolist() == [0]


@pytest.mark.parametrize(
    "threshold, alive",
    [
        (0.25, [0, 1, 3, 4]),  # 1.5 of 6 or more
        (0.5, [0, 1, 3]),  # exactly 3 of 6 is enough: slots 0 and 3
        (0.5 + 2**-19, [1]),  # just above it is not
        (0.625, [1]),  # 3.75 or more
        (0.75, []),  # 4.5 or more: nobody
    ],
)
def test_threshold_arbitration_by_hand(threshold, alive):
    """Shares 3, 4, 0, 3, 2 of 6 (`three_clients`), nothing to refill."""
    assert survivors(arbitrate_threshold(MASK, three_clients(), threshold, 0)) == alive


@pytest.mark.parametrize(
    "threshold, least, alive",
    [
        (0.75, 1, [1]),
        (0.75, 2, [0, 1]),
        (0.625, 3, [0, 1, 3]),
        (0.5, 3, [0, 1, 3]),
        (0.5, 4, [0, 1, 3, 4]),
        (1.0, 5, [0, 1, 2, 3, 4]),
        (1.0, 50, [0, 1, 2, 3, 4]),
    ],
)
def test_threshold_refills_in_arbitration_order(threshold, least, alive):
    """Order 1, 0, 3, 4, 2 (`three_clients`), up to `least` or all that live."""
    assert survivors(arbitrate_threshold(MASK, three_clients(), threshold, least)) == alive


def test_unanimous_vote_survives_threshold_one():
    votes = [vote([0, 1, 2, 3, 4], 2, weight) for weight in (5, 1, 7)]
    assert survivors(arbitrate_threshold(MASK, votes, 1.0, 0)) == [0, 1]


# -- arbitration by law ------------------------------------------------------------
@st.composite
def ballots(draw):
    """(mask, votes): one to five clients with whole weights, each a permutation and its best slots."""
    ranks = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=5)))
    size = sum(ranks)
    mask = RankMask(ranks, np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=bool))
    allowed = draw(st.integers(0, mask.count))
    count = draw(st.integers(1, 5))
    votes = [
        vote(draw(st.permutations(range(mask.count))), allowed, draw(st.integers(1, 4) | st.integers(1, 10**6)))
        for _ in range(count)
    ]
    return mask, votes


@laws
@given(ballots(), st.integers(0, 25))
def test_budget_keeps_exactly_that_many(case, slots):
    mask, votes = case
    kept = arbitrate_budget(mask, votes, slots)
    assert kept.count == min(slots, mask.count)
    assert mask.covers(kept)


@laws
@given(ballots())
def test_order_against_python_sorting(case):
    """By share, then by the weighted mean of 1 - rank/alive as an exact fraction, then by position."""
    mask, votes = case
    total, alive = sum(item.weight for item in votes), mask.count

    def key(slot):
        share = Fraction(sum(item.weight for item in votes if item.keep[slot]), total)
        score = sum(item.weight * (1 - Fraction(int(item.ranks[slot]), alive)) for item in votes) / total
        return (-share, -score, slot)

    assert arbitration_order(votes, alive).tolist() == sorted(range(alive), key=key)


@laws
@given(ballots(), st.integers(0, 25))
def test_budgets_nest(case, slots):
    """A larger budget keeps what a smaller one keeps."""
    mask, votes = case
    assert arbitrate_budget(mask, votes, slots + 1).covers(arbitrate_budget(mask, votes, slots))


@laws
@given(ballots(), st.floats(0.01, 1.0), st.integers(0, 25))
def test_threshold_against_exact_fractions(case, threshold, least):
    """Kept: slots whose share reaches the fraction nearest to the threshold, and min(least, alive) in arbitration order."""
    mask, votes = case
    total = sum(item.weight for item in votes)
    step = Fraction(threshold).limit_denominator(2**20)
    shares = [sum(item.weight for item in votes if item.keep[i]) for i in range(mask.count)]
    passed = {i for i in range(mask.count) if Fraction(shares[i], total) >= step}
    kept = arbitrate_threshold(mask, votes, threshold, least)
    chosen = set(np.flatnonzero(kept.within(mask)).tolist())
    assert mask.covers(kept)
    assert passed <= chosen
    assert len(chosen) == max(len(passed), min(least, mask.count))
    assert all(shares[i] >= shares[j] for i in chosen for j in range(mask.count) if j not in chosen)


@laws
@given(ballots(), st.randoms(use_true_random=False), st.integers(0, 25), st.floats(0.01, 1.0))
def test_order_of_votes_does_not_matter(case, random, slots, threshold):
    mask, votes = case
    shuffled = random.sample(votes, len(votes))
    assert arbitrate_budget(mask, shuffled, slots) == arbitrate_budget(mask, votes, slots)
    assert arbitrate_threshold(mask, shuffled, threshold, slots) == arbitrate_threshold(mask, votes, threshold, slots)


@laws
@given(ballots(), st.integers(2, 1000), st.integers(0, 25), st.floats(0.01, 1.0))
def test_only_relative_weights_matter(case, factor, slots, threshold):
    mask, votes = case
    scaled = [replace(item, weight=item.weight * factor) for item in votes]
    assert arbitrate_budget(mask, scaled, slots) == arbitrate_budget(mask, votes, slots)
    assert arbitrate_threshold(mask, scaled, threshold, slots) == arbitrate_threshold(mask, votes, threshold, slots)


@laws
@given(ballots(), st.integers(1, 25))
def test_one_client_gets_its_own_vote(case, weight):
    mask, votes = case
    alone = replace(votes[0], weight=weight)
    assert np.array_equal(arbitrate_budget(mask, [alone], int(alone.keep.sum())).within(mask), alone.keep)
    assert np.array_equal(arbitrate_threshold(mask, [alone], 0.5, 0).within(mask), alone.keep)


@laws
@given(ballots(), st.lists(st.integers(0, 25), min_size=2, max_size=5), st.integers(0, 2**32 - 1), st.booleans())
def test_dead_slots_stay_dead_over_rounds(case, budgets, seed, by_threshold):
    """Later rounds vote afresh, each over what the last one left, with whatever budget."""
    mask, votes = case
    rng = np.random.default_rng(seed)
    dead = ~mask.bits
    for slots in budgets:
        mask = arbitrate_threshold(mask, votes, 0.5, slots) if by_threshold else arbitrate_budget(mask, votes, slots)
        assert not (mask.bits & dead).any()
        dead = ~mask.bits
        votes = [vote(rng.permutation(mask.count), slots, int(rng.integers(1, 9))) for _ in range(3)]


@pytest.mark.parametrize("threshold, yes, of", [(0.6, 3, 5), (0.8, 4, 5), (0.3, 3, 10), (0.1, 1, 10)])
def test_a_share_equal_to_a_decimal_threshold_survives(threshold, yes, of):
    """0.6 as a float lies below 3/5 and 0.3 above 3/10; three of five and three of ten votes must do."""
    mask = RankMask.full([1])
    votes = [vote([0], int(i < yes)) for i in range(of)]
    assert arbitrate_threshold(mask, votes, threshold, 0).count == 1
    fewer = [vote([0], int(i < yes - 1)) for i in range(of)]
    assert arbitrate_threshold(mask, fewer, threshold, 0).count == 0
