"""Which whole blocks leave the model after warm-up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs_helper import config, start

from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import ModelSpec, ModuleSpec
from fedara_flwr.strategies.allocation import Vote, depth_values, last_blocks, lowest_block, votes_within

SPEC = ModelSpec("", tuple(ModuleSpec(f"layer.{b}.{kind}", 2, 2, b) for b in range(3) for kind in ("query", "dense")), ())
MASK = RankMask.full([1] * 6)  # slots: block 0 query, dense; block 1 query, dense; block 2 query, dense


def vote(*ranks):
    return Vote(np.array(ranks), len(ranks))


def test_worth_is_the_place_among_slots_of_the_same_kind():
    """Queries rank 5, 3, 1 from the lowest block: worth 1/3, 2/3, 1; denses 4, 2, 0 the same. The best two of each depth."""
    values = depth_values(SPEC, MASK, [vote(5, 4, 3, 2, 1, 0)], slots=2)
    np.testing.assert_allclose(values, [2, 2, 2])
    values = depth_values(SPEC, MASK, [vote(5, 4, 3, 2, 1, 0)], slots=4)
    np.testing.assert_allclose(values, [2 + 4 / 3, 2 + 4 / 3, 2])


def test_one_kind_that_scores_high_everywhere_does_not_decide():
    """All denses are ahead of all queries; among themselves the lowest block's are best."""
    values = depth_values(SPEC, MASK, [vote(3, 0, 4, 1, 5, 2)], slots=2)
    np.testing.assert_allclose(values, [2, 4 / 3, 2 / 3])


def test_a_minority_moves_no_depth():
    """Two of ten turn their order round: the trimmed mean is the others' own. Of two the second is half."""
    honest, liar = vote(5, 4, 3, 2, 1, 0), vote(1, 0, 3, 2, 5, 4)
    alone = depth_values(SPEC, MASK, [honest], slots=2)
    np.testing.assert_allclose(depth_values(SPEC, MASK, [honest] * 8 + [liar] * 2, slots=2), alone)
    np.testing.assert_allclose(depth_values(SPEC, MASK, [honest, liar], slots=2), [4 / 3] * 3)


@pytest.mark.parametrize(("slack", "lowest"), [(0.0, 1), (0.05, 1), (0.1, 2), (0.39, 2), (0.4, 3)])
def test_the_highest_boundary_that_keeps_enough(slack, lowest):
    assert lowest_block(np.array([10.0, 10.0, 9.0, 6.0]), slack) == lowest


def test_votes_on_what_is_left_keep_their_order():
    upper = last_blocks(SPEC, MASK, 1)
    (one,) = votes_within([vote(5, 4, 3, 2, 0, 1)], MASK, upper)
    assert one.ranks.tolist() == [0, 1] and one.budget == 6


@settings(deadline=None, max_examples=100)
@given(st.lists(st.permutations(range(6)), min_size=1, max_size=4), st.integers(1, 6), st.floats(0, 0.99))
def test_deeper_is_never_worth_more_and_something_is_left(orders, slots, slack):
    values = depth_values(SPEC, MASK, [vote(*order) for order in orders], slots)
    assert (np.diff(values) <= 1e-12).all()
    assert 0 <= lowest_block(values, slack) < SPEC.blocks


def test_low_blocks_leave_at_once_and_the_budget_falls_over_the_rest(tiny_bert):
    lines = [line for line in start(config(tiny_bert, fedara__depth_slack=0.9)).lines if line["type"] == "round"]
    blocks = [np.reshape(line["alive-per-module"], (2, -1)).sum(axis=1) for line in lines]
    assert blocks[0].all(), "warm-up"
    assert all(low == 0 and high > 0 for low, high in blocks[1:])
    whole = start(config(tiny_bert, fedara__depth_slack=0.0))
    assert whole.state.mask.alive.reshape(2, -1)[0].any()
