"""How the budget falls and who gets it, by hand and by law."""

from __future__ import annotations

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
    counts,
    middle,
    outvoted,
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


def vote(ranks, allowed):
    return Vote(np.array(ranks, dtype=np.int64), allowed)


def four_clients():
    """Four clients that may each keep 2 of the 5 alive slots; one of them cannot settle anything alone.

    ========  =====================  ==============
    client    rank of slots 0..4     votes for
    ========  =====================  ==============
    a         0 1 2 3 4              0 and 1
    b         4 3 2 1 0              3 and 4
    c         2 0 3 1 4              1 and 3
    d         1 0 4 2 3              0 and 1
    ========  =====================  ==============

    Votes: 2, 3, 0, 2, 1. Slot 1 has three of four and leads; 2 and 4 have no more than one and come last.
    Ranks without the best and the worst: 1 + 2 = 3, 0 + 1 = 1, 2 + 3 = 5, 1 + 2 = 3, 3 + 4 = 7. Order: 1, 0, 3, 2, 4.
    """
    return [vote([0, 1, 2, 3, 4], 2), vote([4, 3, 2, 1, 0], 2), vote([2, 0, 3, 1, 4], 2), vote([1, 0, 4, 2, 3], 2)]


def survivors(mask):
    """Numbers of MASK's alive slots that live in `mask`, a sub-mask of it."""
    assert MASK.covers(mask)
    return np.flatnonzero(mask.within(MASK)).tolist()


def test_votes_ranks_and_order_by_hand():
    """Derived in `four_clients`."""
    votes = four_clients()
    assert counts(votes, 5).tolist() == [2, 3, 0, 2, 1]
    assert middle(np.stack([item.ranks for item in votes])).tolist() == [3, 1, 5, 3, 7]
    assert arbitration_order(votes, 5).tolist() == [1, 0, 3, 2, 4]


@pytest.mark.parametrize("voters, most", [(1, 0), (2, 0), (3, 1), (4, 1), (7, 1), (8, 2), (10, 2), (20, 5)])
def test_how_many_cannot_settle_a_slot(voters, most):
    assert outvoted(voters) == most


@pytest.mark.parametrize(
    "slots, alive",
    [(0, []), (1, [1]), (2, [0, 1]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])],
)
def test_budget_arbitration_by_hand(slots, alive):
    """The first of the order 1, 0, 3, 2, 4 (`four_clients`)."""
    assert survivors(arbitrate_budget(MASK, four_clients(), slots)) == alive


def test_a_dead_slot_between_the_alive_ones_stays_dead():
    """Slot (0, 1) is dead; the alive 0 and 1 are (0, 0) and (0, 2)."""
    assert arbitrate_budget(MASK, four_clients(), 2).bits.tolist() == [True, False, True, False, False, False]


def test_ties_go_by_position():
    """Two clients vote for slots 1, 3 and 1, 4: 1 leads; 3 and 4 have ranks 1 + 2 both and 3 comes first; 0 and 2, 3 + 4."""
    votes = [vote([3, 0, 4, 1, 2], 2), vote([4, 0, 3, 2, 1], 2)]
    assert arbitration_order(votes, 5).tolist() == [1, 3, 4, 0, 2]


def test_agreement_comes_before_ranks():
    """Budget 1 of three slots, five clients: four want slot 1, and put slot 2 second. The fifth puts slot 1 last.

    Ranks without best and worst are 0 and 3 of slots 1 and 2. With three clients for slot 1 and two for slot 2 it is the ranks.
    """
    votes = [vote([2, 0, 1], 1)] * 4 + [vote([0, 2, 1], 1)]
    assert arbitration_order(votes, 3).tolist() == [1, 2, 0]
    votes = [vote([1, 0, 2], 1)] * 3 + [vote([1, 2, 0], 1)] * 2
    assert arbitration_order(votes, 3).tolist() == [1, 2, 0]


def test_equal_votes_and_ranks_go_by_position():
    """Two clients in opposite orders: each slot has ranks r and 2 - r, slots 0 and 2 have a vote each."""
    mask = RankMask.full([1, 2])
    assert np.flatnonzero(arbitrate_budget(mask, [vote([0, 1, 2], 1), vote([2, 1, 0], 1)], 1).bits).tolist() == [0]


@pytest.mark.parametrize(
    "threshold, alive",
    [
        (0.25, [0, 1, 3, 4]),  # one of four or more
        (0.5, [0, 1, 3]),  # exactly two are enough: slots 0 and 3
        (0.5 + 2**-19, [1]),  # just above it they are not
        (0.75, [1]),
        (0.76, []),  # nobody
    ],
)
def test_threshold_arbitration_by_hand(threshold, alive):
    """Votes 2, 3, 0, 2, 1 of 4 (`four_clients`), nothing to refill."""
    assert survivors(arbitrate_threshold(MASK, four_clients(), threshold, 0)) == alive


@pytest.mark.parametrize(
    "threshold, least, alive",
    [
        (0.8, 1, [1]),
        (0.8, 2, [0, 1]),
        (0.7, 3, [0, 1, 3]),
        (0.5, 3, [0, 1, 3]),
        (0.5, 4, [0, 1, 2, 3]),
        (1.0, 5, [0, 1, 2, 3, 4]),
        (1.0, 50, [0, 1, 2, 3, 4]),
    ],
)
def test_threshold_refills_in_arbitration_order(threshold, least, alive):
    """Order 1, 0, 3, 2, 4 (`four_clients`), up to `least` or all that live."""
    assert survivors(arbitrate_threshold(MASK, four_clients(), threshold, least)) == alive


def test_unanimous_vote_survives_threshold_one():
    votes = [vote([0, 1, 2, 3, 4], 2)] * 3
    assert survivors(arbitrate_threshold(MASK, votes, 1.0, 0)) == [0, 1]


# -- arbitration by law ------------------------------------------------------------
@st.composite
def ballots(draw):
    """(mask, votes): one to five clients, each a permutation and its best slots."""
    ranks = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=5)))
    size = sum(ranks)
    mask = RankMask(ranks, np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=bool))
    allowed = draw(st.integers(0, mask.count))
    count = draw(st.integers(1, 5))
    votes = [vote(draw(st.permutations(range(mask.count))), allowed) for _ in range(count)]
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
    """By who agrees, then by the trimmed mean of ranks, then by position."""
    mask, votes = case
    alive, bad = mask.count, outvoted(len(votes))

    def key(slot):
        voted = sum(bool(item.keep[slot]) for item in votes)
        ranks = sorted(int(item.ranks[slot]) for item in votes)[bad : len(votes) - bad]
        return (voted < len(votes) - bad, voted <= bad, sum(ranks), slot)

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
    step = Fraction(threshold).limit_denominator(2**20)
    voted = [sum(bool(item.keep[i]) for item in votes) for i in range(mask.count)]
    passed = {i for i in range(mask.count) if Fraction(voted[i], len(votes)) >= step}
    kept = arbitrate_threshold(mask, votes, threshold, least)
    chosen = set(np.flatnonzero(kept.within(mask)).tolist())
    assert mask.covers(kept)
    assert passed <= chosen
    assert len(chosen) == max(len(passed), min(least, mask.count))
    order = [slot for slot in arbitration_order(votes, mask.count).tolist() if slot not in passed]
    assert chosen - passed == set(order[: len(chosen) - len(passed)])


@laws
@given(ballots(), st.randoms(use_true_random=False), st.integers(0, 25), st.floats(0.01, 1.0))
def test_order_of_votes_does_not_matter(case, random, slots, threshold):
    mask, votes = case
    shuffled = random.sample(votes, len(votes))
    assert arbitrate_budget(mask, shuffled, slots) == arbitrate_budget(mask, votes, slots)
    assert arbitrate_threshold(mask, shuffled, threshold, slots) == arbitrate_threshold(mask, votes, threshold, slots)


@laws
@given(ballots())
def test_one_client_gets_its_own_vote(case):
    mask, votes = case
    alone = votes[0]
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
        votes = [vote(rng.permutation(mask.count), slots) for _ in range(3)]


@pytest.mark.parametrize("threshold, yes, of", [(0.6, 3, 5), (0.8, 4, 5), (0.3, 3, 10), (0.1, 1, 10)])
def test_a_share_equal_to_a_decimal_threshold_survives(threshold, yes, of):
    """0.6 as a float lies below 3/5 and 0.3 above 3/10; three of five and three of ten votes must do."""
    mask = RankMask.full([1])
    votes = [vote([0], int(i < yes)) for i in range(of)]
    assert arbitrate_threshold(mask, votes, threshold, 0).count == 1
    fewer = [vote([0], int(i < yes - 1)) for i in range(of)]
    assert arbitrate_threshold(mask, fewer, threshold, 0).count == 0
