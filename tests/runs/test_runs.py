"""Whole runs on a tiny model, in-process: the rounds, and FedARA's allocation. What all methods share is in test_methods."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from flwr.serverapp.strategy import Strategy
from runs_helper import CLIENTS, WALL_CLOCK, ShuffledGrid, config, prepare, start

from fedara_flwr.keys import ConfigError
from fedara_flwr.model.parts import SLOT_PARTS
from fedara_flwr.strategies.base import Client


def same(first, second) -> bool:
    return set(first) == set(second) and all(np.array_equal(first[p], second[p]) for p in first)


@pytest.mark.parametrize("head", ["statistics", "random"])
def test_order_of_replies_does_not_matter(tiny_bert, head):
    flat = config(tiny_bert, num_server_rounds=3, data__client_validation=0.2, head__start=head)
    plain = start(flat)
    shuffled, grid = prepare(flat, ShuffledGrid, seed=5)
    shuffled.start(grid, shuffled.initial_arrays(), 3)
    assert same(plain.state.arrays, shuffled.state.arrays)
    assert plain.state.mask == shuffled.state.mask
    assert plain.meter.total == shuffled.meter.total
    lines = [[{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in s.lines] for s in (plain, shuffled)]
    assert lines[0] == lines[1]
    asked = [node for line in shuffled.lines if line["type"] == "round" for node in line["sampled"]]
    trained = [str(node - 1000) for node in grid.order]
    assert sorted(asked) == sorted(trained) and asked != trained


@pytest.mark.parametrize("method", ["fedara", "federa", "flora", "legend", "slora"])
def test_flowers_own_start_drives_the_same_run(tiny_bert, method):
    """But for a head that is solved: Flower's start has no place before round 1."""
    flat = config(tiny_bert, method=method, num_server_rounds=2, fedara__warmup_rounds=0, fedara__final_rounds=0)
    ours = start(flat)
    theirs, grid = prepare(flat)
    result = Strategy.start(theirs, grid, theirs.initial_arrays(), num_rounds=2)
    assert same(ours.state.arrays, theirs.state.arrays)
    assert ours.state.mask == theirs.state.mask
    assert result.arrays is not None


@pytest.mark.parametrize("method", ["fedara", "fedara-static", "fedlora", "head"])
def test_bytes_equal_the_formula(tiny_bert, method):
    """Each way and client: 4 bytes per number, d_out + d_in (+ 1 where E travels) numbers per alive slot, and the head."""
    strategy = start(config(tiny_bert, method=method))
    spec, parts, rounds = strategy.spec, strategy.method.parts, [line for line in strategy.lines if line["type"] == "round"]
    per_slot = {"B": spec.widths("B"), "E": spec.widths("E"), "A": spec.widths("A")}
    alive = strategy.method.start_mask().alive
    for line in rounds:
        for part in SLOT_PARTS:
            sent = part in parts
            expected = 4 * int(np.dot(alive, per_slot[part])) * line["good"] if sent else 0
            assert line["bytes"][f"down.{part}"] == line["bytes"][f"up.{part}"] == expected
        assert line["bytes"]["down.head"] == line["bytes"]["up.head"] == 4 * spec.size("head") * line["good"]
        alive = np.array(line["alive-per-module"])


def test_fedara_prunes_by_its_budget_and_for_good(tiny_bert):
    strategy = start(config(tiny_bert, num_server_rounds=6))
    rounds = [line for line in strategy.lines if line["type"] == "round"]
    modules = len(strategy.spec.modules)
    assert [line["alive"] for line in rounds] == [strategy.method.budget(strategy.state, t) for t in range(1, 7)]
    assert rounds[0]["alive"] == 4 * modules and rounds[-1]["alive"] == modules
    counts = np.array([line["alive-per-module"] for line in rounds])
    assert (np.diff(counts, axis=0) <= 0).all()
    assert rounds[-1]["bytes"]["up.B"] < rounds[0]["bytes"]["up.B"] / 2


def test_votes_travel_only_when_the_budget_falls(tiny_bert):
    """Warm-up and final rounds ask for none: their upstream mask bytes are 0. A vote has two bytes for each alive slot.

    Who sends back what it voted for alone adds a bit for each, which says what that is.
    """
    for upload_mask, bits in (("global", 0), ("local", 1)):
        changes = {"fedara__warmup_rounds": 2, "fedara__final_rounds": 2, "fedara__upload_mask": upload_mask}
        strategy = start(config(tiny_bert, num_server_rounds=6, **changes))
        up = [line["bytes"]["up.mask"] for line in strategy.lines if line["type"] == "round"]
        assert up[0] == up[1] == up[4] == up[5] == 0
        alive = 4 * len(strategy.spec.modules)
        assert up[2] == 3 * (bits * -(-alive // 8) + 2 * alive)


def test_every_importance_reading_gives_its_own_valid_mask(tiny_bert):
    masks = []
    for importance in ("gradient-product", "magnitude"):
        strategy = start(config(tiny_bert, fedara__importance=importance, train__steps=3))
        assert strategy.state.mask.count == strategy.method.final_budget
        masks.append(strategy.state.mask)
    assert masks[0] != masks[1]


def test_threshold_arbitration_keeps_at_least_the_final_budget(tiny_bert):
    lenient = start(config(tiny_bert, fedara__arbitration="threshold", fedara__threshold=0.01))
    strict = start(config(tiny_bert, fedara__arbitration="threshold", fedara__threshold=1.0))
    assert strict.method.final_budget <= strict.state.mask.count < lenient.state.mask.count


def test_local_upload_sends_less_and_keeps_unsent_slots(tiny_bert):
    whole = start(config(tiny_bert, num_server_rounds=3))
    local = start(config(tiny_bert, num_server_rounds=3, fedara__upload_mask="local"))
    sent = [[line["bytes"]["up.B"] for line in s.lines if line["type"] == "round"] for s in (whole, local)]
    assert sent[1][1] < sent[0][1] and sent[1][0] == sent[0][0]
    assert all(np.isfinite(v).all() for v in local.state.arrays.values())


def test_a_single_step_still_scores(tiny_bert):
    """With E = 0 only E has a gradient in step 1; it must decide, not the order of modules."""
    strategy = start(config(tiny_bert, train__steps=1))
    alive = strategy.state.mask.alive
    assert strategy.state.mask.count == strategy.method.final_budget
    assert (alive[-len(alive) // 3 :] > 0).any()


def test_seed_decides_everything(tiny_bert):
    first, second, other = (start(config(tiny_bert, seed=seed, head__start="statistics")) for seed in (7, 7, 8))
    assert same(first.state.arrays, second.state.arrays)
    assert not same(first.state.arrays, other.state.arrays)
    samples = [[line["sampled"] for line in s.lines if line["type"] == "round"] for s in (first, other)]
    assert samples[0] != samples[1]


def test_clients_evaluate_what_they_receive_and_the_final_model(tiny_bert):
    strategy = start(config(tiny_bert, data__client_validation=0.2))
    rounds = [line for line in strategy.lines if line["type"] == "round"]
    clients = [line for line in strategy.lines if line["type"] == "client"]
    final = [line for line in strategy.lines if line["type"] == "client-evaluation"]
    assert all(0 <= line["client-eval-accuracy"] <= 1 for line in rounds)
    assert all(line["eval-examples"] >= 1 and 0 <= line["eval-macro-f1"] <= 1 for line in clients)
    assert len(final) == 1 and final[0]["clients"] >= 3


def test_clients_may_hold_out_more_than_they_train_on(tiny_bert):
    strategy = start(config(tiny_bert, data__client_validation=0.8, num_server_rounds=3))
    assert [line["clients"] for line in strategy.lines if line["type"] == "client-evaluation"][0] >= 3


def test_more_slots_than_a_vote_can_rank_are_refused(tiny_bert, monkeypatch):
    """Ranks travel in 16 bits; 18 modules of rank 4 are 72 slots."""
    monkeypatch.setattr("fedara_flwr.strategies.fedara.MAX_SLOTS", 71)
    with pytest.raises(ConfigError, match=r"adapter.rank = 4: with this model allowed is up to 3"):
        prepare(config(tiny_bert))


def test_proximal_term_and_orthogonality_change_the_result(tiny_bert):
    plain, prox, orthogonal = (
        start(config(tiny_bert, method="fedara-static", num_server_rounds=2, **term))
        for term in ({}, {"train__prox_mu": 10.0}, {"train__orthogonality": 0.5})
    )
    assert not same(plain.state.arrays, prox.state.arrays)
    assert not same(plain.state.arrays, orthogonal.state.arrays)


def test_epochs_warmup_and_clipping(tiny_bert):
    strategy = start(config(tiny_bert, train__steps=0, train__epochs=1, train__warmup_steps=2, train__clip_norm=0.01))
    clients = [line for line in strategy.lines if line["type"] == "client"]
    assert all(line["steps"] == -(-line["num-examples"] // 4) for line in clients)


def test_empty_clients_are_left_out_and_reported(tiny_bert):
    """20 clients on few rows at α = 0.01 leave some without examples; the run goes on with the others."""
    strategy = start(config(tiny_bert, data__dirichlet_alpha=0.01, num_server_rounds=3), clients=20)
    assert strategy.roster.unfit
    assert all("too small to train" in reason for reason in strategy.roster.unfit.values())
    assert not set(strategy.roster.unfit) & {line["client"] for line in strategy.lines if line["type"] == "client"}


@pytest.mark.parametrize("head, first", [("statistics", 0), ("means", 0), ("random", 1)])
def test_a_solved_head_has_a_row_of_its_own_in_the_table(tiny_bert, caplog, head, first):
    """Row 0, with the nodes that told their sums of all; a drawn head has none, and no client's line of round 0."""
    with caplog.at_level(logging.INFO, "fedara_flwr"):
        loop = start(config(tiny_bert, method="fedlora", num_server_rounds=2, head__start=head))
    rows = [line.split() for entry in caplog.messages for line in entry.split("\n") if line.split()[0].endswith("/2")]
    assert [row[0] for row in rows] == [f"{number}/2" for number in range(first, 3)]
    told = 0 if first else CLIENTS
    replies = {"0/2": f"{told}/{told}"} | dict.fromkeys(("1/2", "2/2"), "3/3")
    assert all(row[8] == replies[row[0]] for row in rows)
    before, *_ = loop.lines
    assert before["type"] == "start" and (before["good"], len(before["sampled"])) == (told, told)
    assert ("head" in before) == bool(told) == bool(before["bytes"]["up.statistics"])
    of_round_0 = [line["client"] for line in loop.lines if line["type"] == "client" and line["round"] == 0]
    assert of_round_0 == [str(key) for key in range(told)]


def test_sampling_is_of_client_keys_not_node_ids(tiny_bert):
    strategy = start(config(tiny_bert))
    sampled = [key for line in strategy.lines if line["type"] == "round" for key in line["sampled"]]
    assert set(sampled) <= {str(i) for i in range(CLIENTS)}
    assert all(len(line["sampled"]) == 3 for line in strategy.lines if line["type"] == "round")


def test_every_method_has_its_own_rate_and_the_setting_wins(tiny_bert):
    for method, rate in (("fedara", 1e-2), ("fedlora", 2e-3)):
        for changes, expected in (({}, rate), ({"train__learning_rate": 0.5}, 0.5)):
            loop, _ = prepare(config(tiny_bert, method=method, **changes))
            assert loop.method.plan(loop.state, Client("0")).train.learning_rate == expected
