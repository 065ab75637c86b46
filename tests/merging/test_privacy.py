"""Central differential privacy: clip, noise, divisor, sensitivity, ε; what a private run asks, keeps and refuses."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
from flwr.app import MetricRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as numpy_arrays
from runs_helper import TamperedGrid, config, prepare, start

from fedara_flwr.config import PrivacySettings
from fedara_flwr.engine import run
from fedara_flwr.keys import ConfigError
from fedara_flwr.merging import private
from fedara_flwr.merging.private import PrivateMean, epsilon, ledger
from fedara_flwr.model.ranks import RankMask, pack_order, rank_order
from fedara_flwr.model.spec import ModelSpec, ModuleSpec, ParameterSpec
from fedara_flwr.node.guard import Guard
from fedara_flwr.node.settings import NodeSettings
from fedara_flwr.seeds import secure_normal
from fedara_flwr.strategies import find
from fedara_flwr.tasks import read_settings
from fedara_flwr.wire.plan import Update

SPEC = ModelSpec("f" * 64, (ModuleSpec("m0", 2, 1, 0), ModuleSpec("m1", 1, 3, 1)), (ParameterSpec("weight", (1, 2)),))
FULL = RankMask.full([2, 1])  # slots (0,0), (0,1), (1,0): 5 numbers in B, 3 in E, 5 in A
PARTS = frozenset({"B", "E", "A", "head"})
LENGTHS = {part: SPEC.length(part, FULL) for part in PARTS}


def f32(*values):
    return np.array(values, dtype=np.float32)


def zeros(mask=FULL):
    return {part: np.zeros(SPEC.length(part, mask), dtype=np.float32) for part in PARTS}


def merger(arrays=None, clip=1.0, noise=0.0, planned=1, parts=PARTS, normal=np.zeros):
    return PrivateMean(SPEC, FULL, zeros() if arrays is None else arrays, parts, clip, noise, planned, normal)


def update(mask=FULL, **parts):
    return Update({**zeros(mask), **parts}, mask, 1, {})


def moved(by):
    return math.sqrt(sum(float(values @ values) for values in by.values()))


# -- the mean -----------------------------------------------------------------------------------------------------------
def test_a_difference_is_cut_over_all_parts_together():
    # (3, 4) in the head and 12 in E: length 13, cut to 6.5, so every number is halved
    merging = merger(clip=6.5, planned=2)
    merging.add("a", update(head=f32(3, 4), E=f32(0, 12, 0)), 1)
    merged = merging.result()
    assert merged["head"].tolist() == [0.75, 1.0] and merged["E"].tolist() == [0, 3, 0]
    assert merged["head"].dtype == np.float32


def test_a_short_difference_is_not_lengthened_and_what_counts_is_the_difference():
    sent = {**zeros(), "head": f32(100, 200)}
    merging = merger(sent, clip=6.5, planned=1)
    merging.add("a", update(head=f32(101, 202)), 1)
    assert merging.result()["head"].tolist() == [101, 202]


def test_the_divisor_is_the_planned_number_and_weights_do_not_count():
    merging = merger(clip=10.0, planned=4)
    merging.add("a", update(head=f32(4, 0)), 1)
    merging.add("b", update(head=f32(0, 8)), 10**6)
    assert merging.result()["head"].tolist() == [1, 2]  # of 4, though 2 came


def test_slots_that_were_not_sent_count_as_unchanged():
    sent = {**zeros(), "E": f32(1, 2, 3)}
    first = RankMask(FULL.ranks, np.array([True, False, False]))
    merging = merger(sent, clip=10.0, planned=2)
    merging.add("a", update(first, E=f32(5)), 1)
    assert merging.result()["E"].tolist() == [3, 2, 3]


def test_noise_has_the_clip_times_the_multiplier_on_every_number_of_the_sum():
    merging = merger(clip=3.0, noise=2.0, planned=4, normal=np.ones)
    merging.add("a", update(E=f32(0, 1, 0)), 1)
    merged = merging.result()
    assert merged["E"].tolist() == [1.5, 1.75, 1.5]  # (sum + 6) / 4
    assert merged["B"].tolist() == [1.5] * 5 and merged["head"].tolist() == [1.5] * 2
    assert merging.report() == {"planned": 4, "noise": 1.5}


def test_an_empty_round_is_noise_alone():
    merged = merger(clip=3.0, noise=2.0, planned=4, normal=np.ones).result()
    assert all((values == 1.5).all() for values in merged.values())


def test_parts_that_are_not_trained_get_no_noise():
    merged = merger(clip=3.0, noise=2.0, parts=frozenset({"head"}), normal=np.ones).result()
    assert merged["head"].any() and not merged["A"].any()


def test_a_difference_that_is_not_finite_adds_nothing():
    merging = merger()
    merging.add("a", update(head=f32(np.nan, 1)), 1)
    merging.add("b", update(head=f32(np.inf, 1)), 1)
    assert not merging.result()["head"].any()


def test_the_noise_is_normal_and_never_the_same():
    draws = secure_normal(200_001)
    assert abs(draws.mean()) < 0.015 and abs(draws.std() - 1) < 0.01  # six standard errors
    assert abs((draws**4).mean() - 3) < 0.15  # kurtosis
    inside = {1: 0.6827, 2: 0.9545, 3: 0.9973}
    assert all(abs((np.abs(draws) < bound).mean() - share) < 0.007 for bound, share in inside.items())
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.015
    assert not np.array_equal(secure_normal(10), secure_normal(10))


# -- sensitivity --------------------------------------------------------------------------------------------------------
values = st.one_of(st.floats(-2, 2, width=32), st.floats(-(2.0**40), 2.0**40, width=32), st.floats(-1e-30, 1e-30))


@st.composite
def updates(draw, most=5):
    found = []
    for _ in range(draw(st.integers(1, most))):
        mask = RankMask(FULL.ranks, draw(numpy_arrays(np.bool_, 3)))
        parts = {p: draw(numpy_arrays(np.float32, SPEC.length(p, mask), elements=values)) for p in sorted(PARTS)}
        found.append(Update(parts, mask, draw(st.integers(1, 10**6)), {}))
    return found


@st.composite
def sent_values(draw):
    return {p: draw(numpy_arrays(np.float32, LENGTHS[p], elements=values)) for p in sorted(PARTS)}


@settings(deadline=None, max_examples=100)
@given(updates(), sent_values(), st.floats(1e-3, 1e6), st.data())
def test_one_client_moves_the_sum_by_no_more_than_the_clip(found, sent, clip, data):
    """The noise is scaled by this bound: with or without one client, anywhere among the others."""
    out = data.draw(st.integers(0, len(found) - 1))
    sums = []
    for leave_out in (None, out):
        merging = merger(sent, clip=clip)
        for number, item in enumerate(found):
            if number != leave_out:
                merging.add(str(number), item, item.num_examples)
        sums.append(merging.sums)
    difference = moved({part: sums[0][part] - sums[1][part] for part in PARTS})
    assert difference <= clip * (1 + 1e-9)


@settings(deadline=None, max_examples=30)
@given(updates(most=1), sent_values(), st.floats(1e-3, 1e6))
def test_the_bound_is_reached_by_a_long_update(found, sent, clip):
    far = {part: vector + np.float32(2.0**40) for part, vector in found[0].arrays.items()}
    merging = merger(sent, clip=clip)
    merging.add("a", Update(far, found[0].mask, 1, {}), 1)
    assert moved(merging.sums) == pytest.approx(clip, rel=1e-9)


# -- the account --------------------------------------------------------------------------------------------------------
def counted():
    return pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install 'fedara-flwr[privacy]')")


def exact_delta(sigma, eps):
    """δ of the Gaussian mechanism of sensitivity 1, Balle and Wang, arXiv 1805.06530, theorem 8."""
    phi = lambda x: math.erfc(-x / math.sqrt(2)) / 2  # noqa: E731
    return phi(1 / (2 * sigma) - eps * sigma) - math.exp(eps) * phi(-1 / (2 * sigma) - eps * sigma)


def test_epsilon_agrees_with_the_formula_and_a_published_value():
    counted()
    assert epsilon(3.730631634815942, 1, 1e-5) == pytest.approx(1.0, rel=1e-9)  # the analytic mechanism's σ for (1, 1e-5)
    for noise, rounds, delta in [(1.0, 20, 1e-5), (5.0, 100, 1e-6), (0.8, 1, 1e-3)]:
        assert exact_delta(noise / math.sqrt(rounds), epsilon(noise, rounds, delta)) == pytest.approx(delta, rel=1e-6)


def test_epsilon_lies_below_renyi_by_hand_and_agrees_with_the_privacy_loss_accountant():
    accounting = counted()
    from dp_accounting.pld import PLDAccountant

    noise, rounds, delta = 4.0, 20, 1e-5
    # T rounds have Rényi divergence α·T/(2z²) = 0.625·α; conversion of arXiv 2004.00010, proposition 12, at α = 5:
    # 3.125 + ln(4/5) + (ln(1e5) - ln 5)/4 = 3.125 - 0.22314 + (11.51293 - 1.60944)/4 = 5.37773
    renyi = accounting.rdp.RdpAccountant(orders=[5], neighboring_relation=accounting.NeighboringRelation.REPLACE_SPECIAL)
    renyi.compose(accounting.GaussianDpEvent(noise), rounds)
    assert renyi.get_epsilon(delta) == pytest.approx(5.37773, abs=1e-5)
    loss = PLDAccountant(neighboring_relation=accounting.NeighboringRelation.REPLACE_SPECIAL)
    loss.compose(accounting.GaussianDpEvent(noise), rounds)
    found = epsilon(noise, rounds, delta)
    assert found < 5.37773 and found == pytest.approx(loss.get_epsilon(delta), rel=1e-3)


@settings(deadline=None, max_examples=60)
@given(st.floats(0.01, 1e3), st.integers(1, 10_000), st.floats(1e-12, 0.1))
def test_epsilon_rises_with_rounds_and_falls_with_noise_and_delta(noise, rounds, delta):
    counted()
    here = epsilon(noise, rounds, delta)
    assert math.isfinite(here) and here >= 0 and epsilon(noise, 0, delta) == 0
    near = 1 + 1e-9
    assert epsilon(noise, rounds + 1, delta) * near >= here
    assert epsilon(noise * 1.1, rounds, delta) <= here * near
    assert epsilon(noise, rounds, delta * 1.1) <= here * near


def test_the_ledger():
    counted()
    settings = PrivacySettings(clip=0.5, noise_multiplier=4.0, delta=1e-5)
    facts = ledger(settings, 20, 100)
    assert facts["epsilon"] == epsilon(4.0, 20, 1e-5)
    assert {name: facts[name] for name in ("clip", "noise-multiplier", "planned", "rounds", "delta")} == {
        "clip": 0.5,
        "noise-multiplier": 4.0,
        "planned": 100,
        "rounds": 20,
        "delta": 1e-5,
    }
    assert "zero-out" in facts["adjacency"] and "no amplification" in facts["accounting"]


def test_without_the_library_a_run_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedara-flwr\[privacy\]'"):
        private.epsilon(1.0, 1, 1e-5)


# -- settings -----------------------------------------------------------------------------------------------------------
ON = {"privacy.clip": 0.5, "privacy.noise-multiplier": 1.0, "strategy.weighting": "uniform", "head.start": "random"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"privacy.noise-multiplier": 0.0}, "privacy.noise-multiplier = 0.0: with privacy.clip = 0.5 allowed is 0.01 or more"),
        ({"privacy.clip": 0.0}, "privacy.clip = 0.0: privacy.noise-multiplier = 1.0 needs"),
        ({"head.start": "means"}, "head.start = 'means': with privacy.clip allowed is 'random'"),
        ({"strategy.weighting": "examples"}, "strategy.weighting = 'examples': with privacy.clip allowed is 'uniform'"),
        ({"strategy.robust": "median"}, "strategy.robust = 'median': with privacy.clip allowed is 'mean'"),
        ({"data.client-validation": 0.1}, "data.client-validation = 0.1: with privacy.clip allowed is 0.0"),
        ({"run.checkpoint-every": 5}, "run.checkpoint-every = 5: with privacy.clip allowed is 1 or 0"),
    ],
)
def test_what_cannot_be_combined_is_refused(changes, words):
    read_settings(ON)
    with pytest.raises(ConfigError) as error:
        read_settings(ON | changes)
    assert words in str(error.value)


@pytest.mark.parametrize("option", ["upload-mask = 'local'", "arbitration = 'threshold'"])
def test_options_of_fedara_that_cannot_be_combined_are_refused(option):
    """By the method, before there is a model."""
    check = find("fedara").check
    check(read_settings(ON))
    check(read_settings({"strategy.options": option}))
    with pytest.raises(ConfigError) as error:
        check(read_settings(ON | {"strategy.options": option}))
    words = "privacy.clip = 0.5: with strategy.options allowed are upload-mask = 'global' and arbitration = 'budget'"
    assert str(error.value) == words


def test_a_private_run_must_say_that_its_head_is_drawn():
    """By default it would be solved from sums that have no noise."""
    with pytest.raises(ConfigError) as error:
        read_settings({key: value for key, value in ON.items() if key != "head.start"})
    assert str(error.value) == "head.start = 'statistics': with privacy.clip allowed is 'random'"


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ConfigError, match="head.start.*weighting.*robust"):
        read_settings({"privacy.clip": 0.5, "privacy.noise-multiplier": 1.0, "strategy.robust": "median"})


# -- runs ---------------------------------------------------------------------------------------------------------------
RUN = {"privacy__clip": 1.0, "privacy__noise_multiplier": 2.0, "strategy__weighting": "uniform"}
CLIENT_LINE = {"type", "round", "client", "bytes-down", "bytes-up"}


def test_slots_are_ranked_by_their_size():
    # |E|·‖B‖·‖A‖: (0,0): 2·5·1, (0,1): 1·1·3, (1,0): 0.5·2·3
    arrays = {"B": f32(3, 4, 1, 0, 2), "E": f32(-2, 1, 0.5), "A": f32(1, -3, 1, 2, 2)}
    assert SPEC.slot_sizes(arrays, FULL).tolist() == [10, 3, 3]
    second = RankMask(FULL.ranks, np.array([False, True, True]))
    assert SPEC.slot_sizes(SPEC.slice(arrays, FULL, second), second).tolist() == [3, 3]


def test_a_private_run_of_fedara(tiny_bert):
    counted()
    seen = []

    def look(server_round, index, reply):
        seen.append(set(reply.content.config_records["reply"]))
        return reply

    loop = start(config(tiny_bert, **RUN), TamperedGrid, tamper=look)
    lines = {kind: [line for line in loop.lines if line["type"] == kind] for kind in ("round", "client")}
    assert all(keys == {"protocol", "round"} for keys in seen) and len(seen) == 12  # no votes
    assert [line["alive"] for line in lines["round"]] == [loop.method.budget(loop.state, t) for t in range(1, 5)]
    assert lines["round"][-1]["alive"] < lines["round"][0]["alive"]
    assert all(set(line) == CLIENT_LINE for line in lines["client"]) and len(lines["client"]) == 12
    for line in lines["round"]:
        assert line["planned"] == 3 and line["noise"] == pytest.approx(2 / 3)
        assert not {"client-loss", "factor-error", "modelled-seconds"} & set(line)
    assert not loop.state.norms
    # every number of every part has noise of 2/3 a round: E was 0 and is not
    assert np.std(loop.state.arrays["head"]) > 0.5 and np.all(loop.state.arrays["E"])


def test_the_noise_does_not_follow_from_the_seed(tiny_bert):
    counted()
    first, second = (start(config(tiny_bert, **RUN, method="head", num_server_rounds=1)) for _ in range(2))
    assert not np.array_equal(first.state.arrays["head"], second.state.arrays["head"])


@pytest.mark.parametrize("form", ["float32", "int4"])
def test_missing_replies_do_not_change_the_divisor_and_drops_tell_no_figures(tiny_bert, monkeypatch, form):
    counted()
    monkeypatch.setattr(PrivateMean.__init__, "__defaults__", (np.zeros,))
    wire = {"wire__down": form, "wire__up": form}
    flat = config(tiny_bert, **RUN, **wire, method="head", num_server_rounds=1, strategy__fraction_train=1.0)

    def lose(lost, server_round, index, reply):
        reply.content["metrics"] = MetricRecord({"num-examples": 10**12 if index == lost else 1})
        return reply

    heads = []
    for lost in (None, 1):
        loop = start(flat, TamperedGrid, clients=3, tamper=partial(lose, lost))
        heads.append(loop.state.arrays["head"].astype(np.float64))
    drop = {"client": "1", "reason": "num-examples", "detail": "not told: the run is private"}
    assert loop.lines[1]["dropped"] == [drop] and loop.lines[1]["good"] == 2
    # divided by 3 both times, so three times the models differ by the lost client's part of the sum, no longer than the clip
    assert 0 < 3 * np.linalg.norm(heads[0] - heads[1]) <= 1.0 + 1e-5


@pytest.mark.parametrize("method", ["hetlora", "flexlora", "flora", "fedex-lora", "legend", "fedsa-lora"])
def test_methods_that_merge_otherwise_ask_devices_or_keep_parts_on_them_are_refused(tiny_bert, method):
    ways = {"legend": "goes by what devices report", "fedsa-lora": "keeps trained parts on the clients"}
    way = ways.get(method, "merges in its own way")
    with pytest.raises(ConfigError, match=rf"privacy.clip = 1.0: method '{method}' {way}"):
        prepare(config(tiny_bert, **RUN, method=method))


@pytest.mark.parametrize(
    "method", ["slora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ffa-lora", "federa", "full"))]
)
def test_other_methods_can_be_private(tiny_bert, method):
    counted()
    quiet = {**RUN, "privacy__noise_multiplier": 0.01, "privacy__clip": 0.01}
    loop = start(config(tiny_bert, **quiet, method=method, num_server_rounds=3))
    assert [line["good"] for line in loop.lines if line["type"] == "round"] == [3, 3, 3]


def test_a_factor_that_is_frozen_gets_no_noise(tiny_bert):
    """RoLoRA's first round trains B and the head: A keeps its bits, though the noise is large."""
    counted()
    loop, grid = prepare(config(tiny_bert, **RUN, method="rolora", num_server_rounds=2))
    first = {part: values.copy() for part, values in loop.state.arrays.items()}
    loop.start(grid, loop.initial_arrays(), 1)
    assert np.array_equal(loop.state.arrays["A"], first["A"])
    assert all(np.std(loop.state.arrays[part] - first[part]) > 0.5 for part in ("B", "head"))


def test_what_a_private_run_leaves(tiny_bert, tmp_path, capsys):
    counted()
    flat = config(tiny_bert, **RUN, run__dir=str(tmp_path), run__name="private", num_server_rounds=3)
    directory = run(flat, 6)
    facts = json.loads((directory.path / "federated.json").read_text())
    assert facts["privacy"] == ledger(PrivacySettings(clip=1.0, noise_multiplier=2.0), 3, 3)
    assert "partition" not in facts and facts["simulated"]
    shown = f"{facts['privacy']['epsilon']:.3g}"
    assert f"privacy: ε = {shown} at δ = 1e-05 after 3 rounds" in capsys.readouterr().out
    page = (directory.path / "report.html").read_text()
    assert f"ε = {shown}" in page and "zero-out" in page
    card = (directory.path / "adapter" / "README.md").read_text()
    assert f"ε = {shown}" in card and "dealt out to simulated clients" in card
    # a round may have been seen that was not kept: going on counts as one more
    directory = run({**flat, "run.name": "", "run.resume": "private", "num-server-rounds": 4}, 6)
    assert json.loads((directory.path / "federated.json").read_text())["privacy"]["rounds"] == 5


# -- a client's own choice ----------------------------------------------------------------------------------------------
def test_a_client_cuts_and_noises_its_difference():
    received = {"head": f32(100, 200), "E": f32(1)}
    trained = {"head": f32(103, 204), "E": f32(13)}  # a difference of length 13
    assert Guard().protect(trained, received) is trained
    cut = Guard(clip=6.5).protect(trained, received)
    assert cut["head"].tolist() == [101.5, 202] and cut["E"].tolist() == [7]
    assert Guard(clip=20.0).protect(trained, received)["head"].tolist() == [103, 204]
    noised = Guard(clip=6.5, noise=2.0).protect(trained, received, np.ones)
    assert noised["head"].tolist() == [114.5, 215] and noised["E"].tolist() == [20] and noised["E"].dtype == np.float32
    assert not np.array_equal(*(Guard(clip=1.0, noise=1.0).protect(trained, received)["E"] for _ in range(2)))


def test_a_client_lets_out_the_metrics_it_names():
    found = {"loss": 1.0, "steps": 2, "labels-3": 17, "eval-loss": 0.5, "eval-examples": 9, "eval-label-2-f1": 0.1}
    assert Guard().let_out(found) == {"loss": 1.0, "steps": 2, "eval-loss": 0.5, "eval-examples": 9}
    assert NodeSettings.read({"metrics": "loss, seconds-train"}).guard.let_out(found) == {"loss": 1.0}
    assert NodeSettings.read({"metrics": ""}).guard.let_out(found) == {}
    assert NodeSettings.read({}).guard == Guard()
    assert NodeSettings.read({"update-clip": 2, "update-noise": 0.5}).guard == Guard(clip=2.0, noise=0.5)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"metrics": "los"}, "metrics = 'los': there is no metric 'los'; did you mean 'loss'?"),
        ({"update-clip": -1.0}, "update-clip = -1.0: input should be greater than or equal to 0"),
        ({"update-clip": "much"}, "update-clip = 'much'"),
        ({"update-noise": 1.0}, "update-noise = 1.0: needs update-clip above 0"),
    ],
)
def test_a_node_that_is_set_wrongly_says_so(node, words):
    with pytest.raises(ConfigError) as error:
        NodeSettings.read(node)
    assert words in str(error.value)


def test_nodes_with_choices_of_their_own_in_a_run(tiny_bert):
    """One node noises what it sends and tells nothing, one is set wrongly and is left out, the others are as ever."""
    kept = []

    def look(server_round, index, reply):
        if index == 0 and server_round == 2:
            mask = loop.work.plans[0].mask
            record = reply.content.array_records["arrays"]
            arrays = {part: record[part].numpy() for part in ("B", "E", "A")}
            ranked = rank_order(loop.spec.slot_sizes(arrays, mask))
            kept.append(reply.content.config_records["reply"]["report.slot-vote"] == pack_order(ranked))
        return reply

    flat = config(tiny_bert, num_server_rounds=3, strategy__fraction_train=1.0, strategy__norm_bound=0.0)
    loop, grid = prepare(flat, TamperedGrid, clients=3, tamper=look)
    grid.contexts[1000].node_config.update({"metrics": "", "update-clip": 0.5, "update-noise": 2.0})
    grid.contexts[1001].node_config["metrics"] = "los"
    loop.start(grid, loop.initial_arrays(), 3)
    names = {line["client"]: set(line) - CLIENT_LINE for line in loop.lines if line["type"] == "client"}
    assert names["0"] == {"num-examples", "seconds-elapsed"} and "loss" in names["2"] and "1" not in names
    assert "there is no metric 'los'" in loop.state.unfit["1"]
    assert kept == [True]  # the vote follows from what was sent
    assert np.std(loop.state.arrays["head"]) > 0.1
