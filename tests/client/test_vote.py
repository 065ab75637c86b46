"""FedARA's votes: the client's score of each slot by hand, what its term tells of it, and what it does not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import TASKS, backbone, mean_loss, random_arrays, random_batch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_session import PadOnly, client, plan

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.learner import Learner
from fedara_flwr.client import terms
from fedara_flwr.client.train import train
from fedara_flwr.client.vote import IMPORTANCES, SlotVote
from fedara_flwr.model.parts import LORA, SVD
from fedara_flwr.model.ranks import RankMask, rank_order, unpack_order
from fedara_flwr.node.guard import Guard

TASK = TASKS["classification"]


@pytest.fixture(scope="module")
def adapted(tiny_models):
    return AdaptedModel(backbone(tiny_models["bert"]))


def some(spec, rank=3):
    """Two thirds of the slots, and modules without any."""
    full = RankMask.full([rank] * len(spec.modules))
    return full.keep((np.arange(full.count) % 3 != 0) & (np.arange(full.count) > 2 * rank))


def load(adapted, mask, parts=SVD, **values):
    arrays = random_arrays(adapted.spec, mask)
    if "E" not in parts:
        del arrays["E"]
    adapted.load(arrays | values, mask, (2.0,) * len(mask.ranks), parts)


def scores_by_hand(adapted, gradients):
    """Σ of |w·∂L/∂w| for E, and means of it over B's column and A's row; number by number."""
    found = []
    for (_, values), given_ in zip(adapted.alive(), gradients, strict=True):
        b, e, a = (values[part].detach().double() for part in ("B", "E", "A"))
        for i in range(len(e)):
            score = 0.0
            for gb, ge, ga in given_:
                score += abs(float(e[i, 0] * ge[i, 0]))
                score += sum(abs(float(b[row, i] * gb[row, i])) for row in range(len(b))) / len(b)
                score += sum(abs(float(a[i, column] * ga[i, column])) for column in range(a.shape[1])) / a.shape[1]
            found.append(score)
    return np.array(found)


def put_gradients(adapted, seed):
    """Random ones; returns those of each living module."""
    rng, found = torch.Generator().manual_seed(seed), []
    for _, values in adapted.alive():
        triplet = [torch.randn(values[part].shape, generator=rng) for part in ("B", "E", "A")]
        for part, gradient in zip(("B", "E", "A"), triplet, strict=True):
            values[part].grad = gradient.clone()
        found.append(triplet)
    return found


# -- scores ------------------------------------------------------------
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_gradient_product_by_hand(adapted, steps):
    """The first step is left out, unless it is the only one: from E = 0 it gives A and B no gradient."""
    mask = some(adapted.spec)
    load(adapted, mask)
    vote = SlotVote(adapted, budget=7.0)
    taken = []
    for seed in range(steps):
        taken.append(put_gradients(adapted, seed))
        vote.after_backward()
        vote.after_step()
    counted = taken[1:] or taken
    by_module = [[step[module] for step in counted] for module in range(len(taken[0]))]
    expected = scores_by_hand(adapted, by_module)
    np.testing.assert_allclose(vote.scores(), expected, rtol=1e-5)
    assert vote.scores().shape == (mask.count,)
    vote.finish()
    ranks = rank_order(expected)
    assert np.array_equal(unpack_order(vote.report(), mask.count), ranks)
    assert np.array_equal(vote.kept(), ranks < 7) and vote.kept().sum() == 7


def test_one_module_in_numbers(adapted):
    """B = 2, A = 3, E = (1, -2), gradients 1 in step 2 alone: |E·1| + 2·1 + 3·1; and step 1 counts for nothing."""
    ranks = tuple(2 if i == 4 else 0 for i in range(len(adapted.spec.modules)))
    mask = RankMask.full(ranks)
    shapes = {part: adapted.spec.length(part, mask) for part in "BA"}
    fixed = {"B": np.full(shapes["B"], 2, np.float32), "A": np.full(shapes["A"], 3, np.float32)}
    load(adapted, mask, E=np.array([1, -2], np.float32), **fixed)
    vote = SlotVote(adapted, budget=1.0)
    for size in (100.0, 1.0):
        for part in "BEA":
            for parameter in adapted.parameters(part):
                parameter.grad = torch.full_like(parameter, size)
        vote.after_backward()
    assert vote.scores().tolist() == [6, 7]
    vote.finish()
    assert unpack_order(vote.report(), 2).tolist() == [1, 0] and vote.kept().tolist() == [False, True]
    assert len(vote.report()) == 2 * 2, "two bytes a slot"


def test_magnitude_by_hand(adapted):
    """|E|·‖B‖·‖A‖ of the values at the end, whatever gradients there were; as the server would count them."""
    mask = some(adapted.spec)
    load(adapted, mask)
    vote = SlotVote(adapted, budget=5.0, importance="magnitude")
    put_gradients(adapted, 0)
    vote.after_backward()
    with torch.no_grad():
        for part in "BEA":
            for parameter in adapted.parameters(part):
                parameter.add_(0.1)
    expected = [
        abs(values["E"][i].item()) * float(values["B"][:, i].norm()) * float(values["A"][i].norm())
        for _, values in adapted.alive()
        for i in range(len(values["E"]))
    ]
    np.testing.assert_allclose(vote.scores(), expected, rtol=1e-5)
    np.testing.assert_allclose(vote.scores(), adapted.spec.slot_sizes(adapted.collect(SVD), mask), rtol=1e-5)


def test_weights_are_those_before_the_step(adapted):
    """What an optimiser does after `after_backward` changes nothing in what was counted."""
    mask = some(adapted.spec)
    load(adapted, mask)
    vote = SlotVote(adapted, budget=5.0)
    put_gradients(adapted, 0)
    vote.after_backward()
    before = vote.scores()
    with torch.no_grad():
        for part in "BEA":
            for parameter in adapted.parameters(part):
                parameter.mul_(3.0)
    assert np.array_equal(vote.scores(), before)


def test_first_step_from_zero_gives_a_and_b_no_gradient(adapted):
    """Why it does not count: with E = 0 the scores of one step are all E's, and those are 0."""
    mask = some(adapted.spec)
    load(adapted, mask, E=np.zeros(mask.count, np.float32))
    batch = random_batch()
    mean_loss(TASK, adapted.outputs(batch), batch).backward()
    vote = SlotVote(adapted, budget=5.0)
    vote.after_backward()
    assert not vote.scores().any()
    assert all(values["E"].grad.abs().max() > 0 for _, values in adapted.alive())


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_lora_has_the_scores_of_an_e_that_is_frozen_at_one(adapted, importance):
    """E is frozen and has no gradient, so that its own share is nothing; A's and B's are what they are beside it."""
    mask = some(adapted.spec)
    found = []
    for parts, values in ((LORA, {}), (SVD - {"E"}, {"E": np.ones(mask.count, np.float32)})):
        if values:
            arrays = random_arrays(adapted.spec, mask) | values
            adapted.load(arrays, mask, (2.0,) * len(mask.ranks), parts)
        else:
            load(adapted, mask, parts)
        vote = SlotVote(adapted, budget=5.0, importance=importance)
        batch = random_batch()
        for _ in range(2):
            mean_loss(TASK, adapted.outputs(batch), batch).backward()
            vote.after_backward()
        assert all(values["E"].grad is None for _, values in adapted.alive())
        vote.finish()
        found.append((vote.scores(), vote.report(), vote.kept()))
    (first, report, kept), (second, again, also) = found
    assert np.array_equal(first, second) and report == again and np.array_equal(kept, also)
    assert first.min() > 0


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_of_a_model_without_slots_there_is_nothing_to_rank(adapted, importance):
    mask = RankMask.full([0] * len(adapted.spec.modules))
    load(adapted, mask)
    vote = SlotVote(adapted, budget=5.0, importance=importance)
    vote.after_backward()
    vote.finish()
    assert vote.scores().shape == (0,) and vote.report() == b"" and vote.kept().shape == (0,)


def test_importance_outside_the_list(adapted):
    mask = some(adapted.spec)
    load(adapted, mask)
    for importance in ("sensitivity", "", "Magnitude"):
        with pytest.raises(ValueError, match=f"importance is '{importance}', allowed are gradient-product, magnitude"):
            SlotVote(adapted, budget=5.0, importance=importance)


def test_it_is_a_term_that_a_node_finds_by_name():
    assert terms.find("slot-vote") is SlotVote and "slot-vote" in terms.names()


# -- in a round ------------------------------------------------------------
def updated(adapted, guard=None, **changes):
    mask = some(adapted.spec)
    orders = plan(mask, **{"dropout": False, **changes})
    arrays = random_arrays(adapted.spec, mask)
    return train(Learner(adapted, TASK, PadOnly()), client(1), orders, arrays, "1", guard=guard)


def test_clipping_does_not_change_the_score(adapted):
    """It is of the gradients as they come. In one step all arrays then differ, and the vote does not."""
    plain, clipped = (updated(adapted, steps=1, clip_norm=norm) for norm in (0.0, 1e-9))
    assert plain.reports == clipped.reports
    assert not np.allclose(plain.arrays["B"], clipped.arrays["B"], atol=1e-4)


def test_terms_that_change_gradients_or_values_afterwards_do_not_change_the_score(adapted, monkeypatch):
    """Whatever else the plan names, before or after it by name, in one step; penalties are part of the loss, and count."""

    class Meddler(terms.Term):
        def after_backward(self):
            for _, values in self.adapted.alive():
                for i, parameter in enumerate(values.values()):
                    parameter.grad.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))

        def after_step(self):
            with torch.no_grad():
                for _, values in self.adapted.alive():
                    for parameter in values.values():
                        parameter.zero_()

    monkeypatch.setitem(terms.TERMS, "a-meddler", Meddler)
    monkeypatch.setitem(terms.TERMS, "z-meddler", Meddler)
    plain = updated(adapted, steps=1)
    other = updated(adapted, steps=1, terms={"a-meddler": {}, "z-meddler": {}})
    assert plain.reports == other.reports and not other.arrays["B"].any()
    # from what was received the proximal term has no gradient yet
    assert updated(adapted, steps=1, terms={"prox": {"mu": 5.0}}).reports == plain.reports


def test_parameters_of_the_plan_reach_the_term(adapted):
    first, second, third = (
        updated(adapted, vote={"budget": 9.0, "importance": i}, report=frozenset({"slot-vote", "kept-slots"}))
        for i in (*IMPORTANCES, IMPORTANCES[0])
    )
    assert first.reports == third.reports != second.reports
    for update in (first, second):
        ranks = unpack_order(update.reports["slot-vote"], some(adapted.spec).count)
        assert np.array_equal(update.mask.within(some(adapted.spec)), ranks < 9)


# -- privacy ------------------------------------------------------------
@hypothesis_settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**20))
def test_private_report_depends_on_the_released_arrays_alone(adapted, seed):
    mask = some(adapted.spec)
    released = random_arrays(adapted.spec, mask, seed=seed)
    expected = rank_order(adapted.spec.slot_sizes(released, mask))
    for own, importance in ((1, "gradient-product"), (2, "magnitude"), (3, "gradient-product")):
        load(adapted, mask, **random_arrays(adapted.spec, mask, seed=own))
        vote = SlotVote(adapted, budget=5.0, importance=importance)
        put_gradients(adapted, own)
        vote.after_backward()
        vote.finish()
        assert np.array_equal(unpack_order(vote.private_report(released), mask.count), expected)


def test_behind_noise_a_client_tells_what_follows_from_its_noised_arrays(adapted):
    mask, guard = some(adapted.spec), Guard(clip=1.0, noise=0.5)
    update = updated(adapted, guard, report=frozenset({"slot-vote", "kept-slots"}))
    expected = rank_order(adapted.spec.slot_sizes(update.arrays, mask))
    assert np.array_equal(unpack_order(update.reports["slot-vote"], mask.count), expected)
    assert update.mask == mask, "nor does it choose what it sends"
