"""LEGEND: ranks by block, depths by hand, moving averages, absurd reports, waiting time, and no clock in a simulation."""

from __future__ import annotations

import itertools
import re
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import CONFIGS, backbone
from flwr.app import ConfigRecord, MetricRecord
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from runs_helper import config, prepare, start

from fedara_flwr.engine import InProcessGrid
from fedara_flwr.keys import ConfigError
from fedara_flwr.model.spec import ModelSpec, ModuleSpec, ParameterSpec
from fedara_flwr.server.fleet import PROFILES
from fedara_flwr.strategies.allocation import Capacity, depths, last_blocks, rank_distribution
from fedara_flwr.strategies.base import Client, Reply
from fedara_flwr.strategies.legend import Legend
from fedara_flwr.tasks import read_settings

laws = hypothesis_settings(deadline=None, max_examples=100)


# -- ranks ------------------------------------------------------------
@pytest.mark.parametrize(
    ("blocks", "mean", "step", "expected"),
    [
        (6, 12, 2, [7, 9, 11, 13, 15, 17]),
        (3, 4, 2, [2, 4, 6]),
        (4, 12, 2, [9, 11, 13, 15]),
        (1, 12, 2, [12]),
        (1, 1, 5, [1]),
        (6, 1, 2, [1] * 6),
        (6, 12, 0, [12] * 6),
        (2, 3, 100, [1, 5]),  # the step is cut to 4
        (3, 2, 2, [1, 2, 3]),  # to 1
        (4, 2, 2, [1, 1, 2, 4]),  # to 2/3: 1, 1.67, 2.33, 3; the one that rounding leaves goes to the last
        (4, 12, 1, [10, 11, 13, 14]),  # 10.5, 11.5, 12.5, 13.5: two left
        (12, 12, 2, list(range(1, 24, 2))),
        (24, 12, 2, None),
        (1000, 12, 2, None),
        (1000, 1024, 0.001, None),
    ],
)
def test_rank_distribution(blocks, mean, step, expected):
    ranks = rank_distribution(blocks, mean, step)
    assert expected is None or ranks == expected
    assert len(ranks) == blocks and sum(ranks) == blocks * mean and min(ranks) >= 1 and ranks == sorted(ranks)


@laws
@given(st.integers(1, 200), st.integers(1, 1024), st.one_of(st.floats(0, 50), st.sampled_from([1e-10, 1e300])))
def test_ranks_rise_and_keep_their_sum(blocks, mean, step):
    ranks = rank_distribution(blocks, mean, step)
    assert sum(ranks) == blocks * mean and min(ranks) >= 1 and ranks == sorted(ranks)


# -- depths by hand ------------------------------------------------------------
SENT = [128, 256, 384, 512]
"""A head of 128 bytes and 128 bytes for each of three blocks; u = 1/128 is 1 + k seconds."""
QUICK = Capacity(1.0, 1.0, 1 / 128, 3.0)
"""Two steps: 2·(1 + k) + 1 + k = 3 + 3k: 6, 9, 12 seconds at depth 1, 2, 3."""
MIDDLE = Capacity(2.0, 2.0, 1 / 128, 3.0)
"""2·(2 + 2k) + 1 + k = 5 + 5k: 10, 15, 20."""
SLOW = Capacity(4.0, 6.0, 3 / 128, 3.0)
"""2·(4 + 6k) + 3·(1 + k) = 11 + 15k: 26, 41, 56."""
THREE = [QUICK, MIDDLE, SLOW]


def seconds(devices, chosen):
    return [device.seconds(k, 2, SENT[k]) for device, k in zip(devices, chosen, strict=True)]


def test_the_devices_times():
    assert [seconds([device] * 3, [1, 2, 3]) for device in THREE] == [[6, 9, 12], [10, 15, 20], [26, 41, 56]]


@pytest.mark.parametrize(
    ("devices", "target", "slack", "expected"),
    [
        # target 12 s, of QUICK at full depth: MIDDLE has 10 at depth 1 and 15 at 2; SLOW never fits and gets 1
        (THREE, "fastest", 0.0, [3, 1, 1]),
        (THREE, "fastest", 0.25, [3, 2, 1]),  # up to 15 s, which MIDDLE needs at depth 2
        (THREE, "fastest", 0.24, [3, 1, 1]),
        (THREE, "fastest", 2.5, [3, 3, 2]),  # up to 42 s
        # QUICK's memory has room for two blocks: the target is 9 s, and MIDDLE's 10 at depth 1 is above
        ([replace(QUICK, depth=2.0), MIDDLE, SLOW], "fastest", 0.0, [2, 1, 1]),
        # for one: 6 s; with a slack of 1.5 up to 15 s, and QUICK itself still has room for one block only
        ([replace(QUICK, depth=1.9), MIDDLE, SLOW], "fastest", 1.5, [1, 2, 1]),
        # no room even for one block: one it is
        ([replace(QUICK, depth=0.2), MIDDLE, SLOW], "fastest", 0.0, [1, 1, 1]),
        # MIDDLE's memory does not change the target of 12 s; a slack of 2 would give it three blocks
        ([QUICK, replace(MIDDLE, depth=2.0), SLOW], "fastest", 2.0, [3, 2, 1]),
        # the median of 12, 20 and 56 s is MIDDLE's 20
        (THREE, "median", 0.0, [3, 3, 1]),
        (THREE, "median", 0.3, [3, 3, 1]),  # exactly 26 s would do, 1.3·20 in floats
        # the median of 12, 10 (MIDDLE at depth 1) and 26 (SLOW at depth 1) s is QUICK's 12
        ([QUICK, replace(MIDDLE, depth=1.0), replace(SLOW, depth=1.0)], "median", 0.0, [3, 1, 1]),
        # of an even number the higher middle one
        ([QUICK, SLOW], "median", 0.0, [3, 3]),
        ([SLOW], "fastest", 0.0, [3]),
        # the fastest is who does the same work soonest, not who has least of it: QUICK, not SLOW with memory for one block
        ([replace(SLOW, depth=1.0), QUICK], "fastest", 0.0, [1, 3]),
        # upload counts: with QUICK's processor and a link 16 times slower it is 2·(1 + k) + 16·(1 + k) = 18 + 18k
        ([QUICK, replace(QUICK, upload=16 / 128)], "fastest", 0.0, [3, 1]),
        ([QUICK, replace(QUICK, upload=16 / 128)], "fastest", 3.5, [3, 2]),
    ],
)
def test_depths_by_hand(devices, target, slack, expected):
    found = depths(devices, 3, 2, SENT, target, slack)
    assert found == expected
    order = [2, 0, 1][: len(devices)] if len(devices) == 3 else list(range(len(devices)))[::-1]
    assert depths([devices[i] for i in order], 3, 2, SENT, target, slack) == [expected[i] for i in order]


def test_waiting_falls_by_hand():
    """Full depth: 12, 20, 56 s, so the others wait 44 + 36 + 0. By LEGEND: 12, 10, 26 s, they wait 14 + 16 + 0."""
    times = seconds(THREE, [3, 3, 3]), seconds(THREE, depths(THREE, 3, 2, SENT))
    assert [sum(max(t) - each for each in t) for t in times] == [80, 30]


amounts = st.floats(1e-6, 1e6)
devices_drawn = st.lists(st.builds(Capacity, amounts, amounts, amounts, st.floats(0, 40)), min_size=1, max_size=8)
options = {"target": st.sampled_from(["fastest", "median"]), "slack": st.floats(0, 3)}


def sizes(blocks):
    return [100 + 1000 * k for k in range(blocks + 1)]


@laws
@given(devices_drawn, st.integers(1, 30), st.integers(1, 20), st.fixed_dictionaries(options))
def test_nobody_exceeds_its_memory_or_takes_longer_than_at_full_depth(devices, blocks, steps, how):
    sent = sizes(blocks)
    found = depths(devices, blocks, steps, sent, **how)
    for device, depth in zip(devices, found, strict=True):
        most = max(1, min(blocks, int(device.depth)))
        assert 1 <= depth <= most
        assert device.seconds(depth, steps, sent[depth]) <= device.seconds(most, steps, sent[most])


@laws
@given(devices_drawn, st.data(), st.integers(1, 30), st.fixed_dictionaries(options))
def test_who_is_slower_in_everything_never_gets_more(devices, data, blocks, how):
    device, factor = devices[0], st.floats(1, 100)
    slower = Capacity(
        device.forward * data.draw(factor),
        device.backward * data.draw(factor),
        device.upload * data.draw(factor),
        device.depth / data.draw(factor),
    )
    found = depths([*devices, slower], blocks, 3, sizes(blocks), **how)
    assert found[-1] <= found[0]


@laws
@given(st.builds(Capacity, amounts, amounts, amounts, st.just(99.0)), st.integers(1, 8), st.fixed_dictionaries(options))
def test_equals_all_get_full_depth(device, count, how):
    assert depths([device] * count, 6, 3, sizes(6), **how) == [6] * count


@pytest.mark.parametrize("depth", [-1e300, -1.0, 0.0, 1e300, float("inf"), float("-inf")])
def test_memory_beyond_reason(depth):
    assert depths([replace(QUICK, depth=depth), QUICK], 3, 2, SENT)[0] == (3 if depth > 3 else 1)


# -- the method ------------------------------------------------------------
SPEC = ModelSpec(
    "f" * 64,
    tuple(ModuleSpec(f"layer.{block}.{name}", 4, 4, block) for block in range(3) for name in ("query", "value")),
    (ParameterSpec("weight", (2, 4)), ParameterSpec("bias", (2,))),
)


class Port:
    """A model port without a model."""

    def __init__(self, spec=SPEC):
        self.spec = spec


class Driven:
    """The method and its state, driven by hand: there is no server."""

    def __init__(self, text="", spec=SPEC, **flat):
        values = {"method": "legend", "adapter.rank": 4, "train.steps": 2, "strategy.options": text, "train.cache": "off"}
        settings = read_settings(
            {"wire.down": "float32", "wire.up": "float32"}
            | values
            | {name.replace("__", "."): value for name, value in flat.items()}
        )
        self.method = Legend(settings, Port(spec))
        self.state = self.method.start()

    def join(self, key, metrics, device=None, examples=0):
        """A client that answered whether it is ready."""
        client = Client(key, examples, device)
        self.method.ready(self.state, client, metrics)
        return client

    def depths(self, *clients):
        """What a round with these clients begins with."""
        self.method.prepare(self.state, clients)
        return {client.key: self.state.clients[client.key]["depth"] for client in clients}

    def answer(self, client, **metrics):
        """A round of which one good update is left, of a client at its present depth."""
        mask = self.method.client_mask(self.state, client)
        said = {name.replace("_", "-"): value for name, value in metrics.items()}
        self.method.next(self.state, self.state.arrays, [Reply(client, 5, mask, said)], None)

    def capacity(self, client):
        return self.method.capacity(self.state, client)


def calibration(forward, backward, blocks=3.0, free=1e9, per_block=1e6, unit="seconds"):
    return {
        f"{unit}-forward": forward,
        f"{unit}-backward": backward,
        "blocks": blocks,
        "bytes-free": free,
        "bytes-block": per_block,
    }


def test_start_by_hand():
    """Ranks 2, 4, 6 and one scale alpha / rank for all: alpha_l = 2·r_l."""
    legend = Driven(adapter__alpha=8.0)
    assert legend.state.mask.ranks == (2, 2, 4, 4, 6, 6)
    assert legend.method.scales(legend.state.mask) == (2.0,) * 6
    assert legend.method.calibration == {"calibrate-batch": 16, "calibrate-rank": 4}


def sent_at(run, depth):
    """Bytes of an update of the last `depth` blocks; `run` has a method and a state."""
    return run.method._bytes(last_blocks(run.method.spec, run.state.mask, depth))


def test_bytes_of_an_update():
    """Head 10 numbers; a slot 4 + 4; the last block has 12 slots, the one before 8, the first 4."""
    assert [sent_at(Driven(), depth) for depth in range(4)] == [40, 40 + 384, 40 + 640, 40 + 768]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slack = -0.1", "slack"),
        ("smoothing = 0.0", "smoothing"),
        ("smoothing = 1.1", "smoothing"),
        ("target = 'slowest'", "target"),
        ("rank-step = -1.0", "rank-step"),
        ("lambda = 1.0", "there is no such key"),
    ],
)
def test_impossible_options(text, message):
    with pytest.raises(ConfigError, match=message):
        Driven(text)


def test_moving_averages_by_hand():
    """One step of calibration: forward 2 s, backward 6 s through 3 blocks, so f = 2, g = 2.

    Round 1: 4 steps, 16 s forward, 8 s backward through 2 blocks: 4 and 1 per step; halves: f = 3, g = 1.5.
    Round 2: 2 steps, 2 s and 3 s through 1 block: 1 and 1.5. The 1 counts as 1.5, half of 3: f = 2.25, g = 1.5.
    """
    legend = Driven("smoothing = 0.5", train__steps=0)
    node = legend.join("0", calibration(2.0, 6.0, free=5e6, per_block=2e6))
    assert legend.capacity(node) == Capacity(2.0, 2.0, 0.0, 2.5)
    assert legend.depths(node) == {"0": 2}
    legend.answer(node, steps=4, seconds_forward=16.0, seconds_backward=8.0, seconds_all=25.0, seconds_elapsed=28.0)
    assert legend.capacity(node) == Capacity(3.0, 1.5, 0.0, 2.5)
    legend.state.clients["0"]["depth"] = 1
    legend.answer(node, steps=2, seconds_forward=2.0, seconds_backward=3.0, seconds_all=6.0, seconds_elapsed=9.0)
    assert legend.capacity(node) == Capacity(2.25, 1.5, 0.0, 2.5)


def test_kept_outputs_make_the_forward_pass_as_short_as_the_backward_pass():
    """Calibration: 6 s and 9 s through 3 blocks, so g = 2 + 3. Then one step of 2 s and 3 s through 1 block: the same."""
    legend = Driven(train__cache="exact", train__steps=0)
    node = legend.join("0", calibration(6.0, 9.0))
    assert legend.capacity(node) == Capacity(0.0, 5.0, 0.0, 3.0)
    legend.state.clients["0"]["depth"] = 1
    legend.answer(node, steps=1, seconds_forward=2.0, seconds_backward=3.0, seconds_all=6.0, seconds_elapsed=9.0)
    assert legend.capacity(node) == Capacity(0.0, 5.0, 0.0, 3.0)


def test_smoothing_is_the_newest_reports_weight():
    """f = 8, then 4 (8 s in two steps): at 1/4 it is 7, at 1 it is 4."""
    for text, expected in (("smoothing = 0.25", 7.0), ("smoothing = 1.0", 4.0)):
        legend = Driven(text)
        node = legend.join("0", calibration(8.0, 3.0))
        legend.depths(node)
        legend.answer(node, seconds_forward=8.0, seconds_backward=3.0)
        assert legend.capacity(node).forward == expected


def test_upload_is_the_median_of_the_last_five():
    """Depth 2 sends 680 bytes. Elapsed less busy less 3 s of polling: 68, 6.8, 13.6, 0 (not below), 20.4, 27.2 s, so per byte
    .1, .01, .02, 0, .03, .04; the first is forgotten: the median of the rest is .02.
    """
    legend = Driven()
    node = legend.join("0", calibration(1.0, 3.0, free=2e6))
    assert legend.depths(node) == {"0": 2}
    for elapsed in (78.0, 16.8, 23.6, 5.0, 30.4, 37.2):
        report = {"seconds_forward": 1.0, "seconds_backward": 3.0, "seconds_all": 7.0}
        legend.answer(node, seconds_elapsed=elapsed, **report)
    assert legend.state.clients["0"]["uploads"] == pytest.approx([0.01, 0.02, 0, 0.03, 0.04])
    assert legend.capacity(node).upload == pytest.approx(0.02)


def test_simulated_devices_by_their_profile():
    """FLOPs over the profile's speed, its memory and its link; seconds that this machine took do not count."""
    legend = Driven()
    phone = PROFILES["phone"]
    metrics = calibration(3e9, 6e9, unit="flops", per_block=phone.memory / 2, free=1.0) | {"seconds-forward": 1e9}
    node = legend.join("0", metrics, PROFILES["phone"])
    expected = Capacity(3e9 / phone.flops, 6e9 / phone.flops / 3, 1 / phone.up, 2.0)
    assert legend.capacity(node) == expected
    legend.depths(node)
    clock = {"seconds_forward": 7.0, "seconds_backward": 7.0, "seconds_all": 1.0, "seconds_elapsed": 99.0}
    legend.answer(node, flops_forward=6e9, flops_backward=8e9, **clock)
    assert legend.capacity(node).forward == expected.forward
    assert legend.capacity(node).backward == pytest.approx(2e9 / phone.flops)
    assert legend.state.clients["0"]["uploads"] == []


def test_options_reach_the_depths():
    """The hand-worked fleet; the bytes are 424, 680 and 808 here, the links infinitely fast: 4 + 2k·g against the target."""
    for text, expected in (
        ("slack = 0.0", [3, 1, 1]),
        ("slack = 0.8", [3, 2, 1]),
        ("target = 'median'\nslack = 0.0", [3, 3, 1]),
    ):
        legend = Driven(text)
        times = ((1.0, 3.0), (2.0, 6.0), (4.0, 18.0))  # 2(1 + k): 4, 6, 8 | 2(2 + 2k): 8, 12, 16 | 2(4 + 6k): 20, 32, 44
        nodes = [legend.join(str(i), calibration(*pair)) for i, pair in enumerate(times)]
        assert list(legend.depths(*nodes).values()) == expected


def test_by_epochs_each_device_has_its_own_steps():
    """Two passes over 8 or 33 examples in batches of 16: 2 or 6 steps. At equal speed that is 2 + 2k s and 6 + 6k s: the
    limit of 1.5·8 s is the second one's depth 1. What an update reports is per step, whatever their number.
    """
    legend = Driven("slack = 0.5", train__steps=0, train__epochs=2)
    few, many = (legend.join(key, calibration(1.0, 3.0), examples=count) for key, count in (("0", 8), ("1", 33)))
    assert legend.depths(few, many) == {"0": 3, "1": 1}
    legend.answer(many, steps=6, seconds_forward=6.0, seconds_backward=6.0)
    assert legend.capacity(many).forward == legend.capacity(many).backward == 1.0


def test_only_the_rounds_nodes_count():
    legend = Driven("slack = 0.0")
    quick, slow, slower = (legend.join(str(i), calibration(10.0**i, 3 * 10.0**i)) for i in range(3))
    assert legend.depths(slow, slower) == {"1": 3, "2": 1}
    assert legend.depths(quick, slow) == {"0": 3, "1": 1}


ABSURD = (-1.0, 0.0, float("nan"), float("inf"), float("-inf"), 1e300, 1.7e308, None)


@pytest.mark.parametrize(
    "name", ["seconds-forward", "seconds-backward", "blocks", "bytes-free", "bytes-block", "steps", "seconds-all"]
)
@pytest.mark.parametrize("value", ABSURD, ids=str)
@pytest.mark.parametrize("simulated", [False, True], ids=["real", "simulated"])
@pytest.mark.parametrize("target", ["fastest", "median"])
def test_absurd_reports_change_no_other_devices_depth(name, value, simulated, target):
    """Of the calibration batch, then of an update; four sound devices keep their depths, and none reaches beyond 1 to 3."""
    legend = Driven(f"slack = 0.0\ntarget = '{target}'")
    unit, scale = ("flops", 1e10) if simulated else ("seconds", 1.0)
    name = name.replace("seconds", unit)

    def report(factor, **more):
        return calibration(factor * scale, 3 * factor * scale, unit=unit) | {"steps": 1.0} | more

    def broken(sound):
        return {k: v for k, v in (sound | {name: value}).items() if v is not None}

    device = PROFILES["raspberry-pi-5"] if simulated else None
    sound = [legend.join(str(i), report(factor), device) for i, factor in enumerate((1.0, 2.0, 3.0, 8.0))]
    expected = legend.depths(*sound)
    assert expected["0"] == 3 and expected["3"] < 3
    odd = legend.join("9", broken(report(2.5)), device)
    for _ in range(3):
        found = legend.depths(*sound, odd)
        assert 1 <= found.pop("9") <= 3
        assert target == "median" or found == expected
        mask = legend.method.client_mask(legend.state, odd)
        said = broken(report(2.5)) | {"seconds-elapsed": 1e300}
        legend.method.next(legend.state, legend.state.arrays, [Reply(odd, 5, mask, said)], None)


@pytest.mark.parametrize("metrics", [{}, {"num-examples": 5.0}, calibration(0.0, 3.0), {"seconds-forward": 1.0}])
def test_a_device_without_a_report_trains_one_block_until_its_first_update(metrics):
    legend = Driven()
    node, other = legend.join("0", metrics), legend.join("1", calibration(1.0, 3.0))
    assert legend.depths(node) == {"0": 1} and legend.capacity(node) is None
    assert legend.depths(node, other) == {"0": 1, "1": 3}
    legend.answer(node, seconds_forward=2.0, seconds_backward=2.0, seconds_all=4.0, seconds_elapsed=7.0)
    found = legend.capacity(node)
    assert (found.forward, found.backward, found.upload) == (1.0, 1.0, 0.0)
    assert found.depth == (3.0 if "bytes-block" in metrics else 1.0)


def test_free_memory_is_a_moving_average():
    """6 MB at first, 2 MB after a round: 4 MB, and with 2 MB a block the depth falls from 3 to 2."""
    legend = Driven("smoothing = 0.5")
    node = legend.join("0", calibration(1.0, 3.0, free=6e6, per_block=2e6))
    assert legend.depths(node) == {"0": 3}
    legend.answer(node, seconds_forward=1.0, seconds_backward=3.0, bytes_free=2e6)
    assert legend.capacity(node).depth == 2.0


def test_asked_again_a_device_keeps_its_averages():
    legend = Driven()
    node = legend.join("0", calibration(1.0, 3.0))
    legend.depths(node)
    legend.answer(node, seconds_forward=5.0, seconds_backward=9.0, seconds_elapsed=99.0)
    known = legend.capacity(node)
    legend.method.ready(legend.state, node, calibration(100.0, 300.0))
    assert legend.capacity(node) == known


@pytest.mark.parametrize("claimed", [1e-9, 1e-300])
def test_a_device_that_claims_to_be_absurdly_fast_does_not_move_the_median_target(claimed):
    legend = Driven("target = 'median'\nslack = 0.0")
    nodes = [legend.join(str(i), calibration(1.0, 3.0)) for i in range(3)]
    assert legend.depths(*nodes, legend.join("9", calibration(claimed, claimed))) == {"0": 3, "1": 3, "2": 3, "9": 3}


# -- blocks ------------------------------------------------------------
@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_blocks_are_found_from_the_structure(tiny_models, architecture):
    """The number of the block is the first number in a module's name, of three blocks; ranks 2, 4, 6 rise with it."""
    spec = backbone(tiny_models[architecture]).spec
    numbers = [int(re.search(r"\.(\d+)\.", module.name)[1]) for module in spec.modules]
    assert spec.blocks == 3 and set(numbers) == {0, 1, 2} and numbers == sorted(numbers)
    mask = Driven(spec=spec).state.mask
    assert list(mask.ranks) == [2 + 2 * number for number in numbers]
    for depth in range(4):
        alive = last_blocks(spec, mask, depth).alive
        assert [count > 0 for count in alive] == [number >= 3 - depth for number in numbers]
        assert all(count in (0, rank) for count, rank in zip(alive, mask.ranks, strict=True))


# -- whole runs ------------------------------------------------------------
ALL = {"num_server_rounds": 2, "strategy__fraction_train": 1.0, "fedara__warmup_rounds": 0, "fedara__final_rounds": 0}


def depths_of(loop):
    return {key: known["depth"] for key, known in loop.state.clients.items()}


def lines(loop, kind):
    return [line for line in loop.lines if line["type"] == kind]


@pytest.fixture(scope="module")
def finished(tiny_bert):
    """Two rounds of six clients on phones, Raspberry Pis and Orins."""
    return start(config(tiny_bert, method="legend", **ALL))


def test_depth_is_known_before_the_first_round(tiny_bert, finished):
    """Six devices, at least two kinds of them: the slower ones get fewer blocks at once, by the calibration batch."""
    loop, grid = prepare(config(tiny_bert, method="legend", **ALL))
    loop.configure_train(1, loop.initial_arrays(), ConfigRecord(), grid)
    speeds = {key: loop.profile(node).flops for key, node in loop.roster.nodes.items()}
    depth = depths_of(loop)
    assert len(set(depth.values())) > 1
    assert depth[max(speeds, key=speeds.get)] == 3 and depth[min(speeds, key=speeds.get)] < 3
    for node, plan in zip(loop.work.asked, loop.work.plans, strict=True):
        assert plan.mask == last_blocks(loop.spec, loop.state.mask, depth[node.key])
    trained = {line["client"]: line["blocks"] for line in lines(finished, "client") if line["round"] == 1}
    assert trained == depth


def test_bytes_follow_the_depth(finished):
    for line in lines(finished, "client"):
        mask = last_blocks(finished.spec, finished.state.mask, int(line["blocks"]))
        for part in ("B", "A"):
            assert line["bytes-up"][part] == line["bytes-down"][part] == 4 * finished.spec.length(part, mask)
        assert sum(line["bytes-up"].get(part, 0) for part in ("B", "A", "head")) == sent_at(finished, int(line["blocks"]))


def test_waiting_falls_against_uniform_full_depth(tiny_bert, finished):
    """The same seed, fleet and number of slots: fedlora's devices wait longer, and its rounds take longer."""
    uniform = start(config(tiny_bert, method="fedlora", **ALL))
    assert uniform.state.mask.count == finished.state.mask.count
    for mine, theirs in zip(lines(finished, "round"), lines(uniform, "round"), strict=True):
        assert sorted(mine["sampled"]) == sorted(theirs["sampled"]) and mine["good"] == theirs["good"] == 6
        assert 0 < mine["modelled-waiting"] < 0.7 * theirs["modelled-waiting"]
        assert mine["modelled-seconds"] < theirs["modelled-seconds"]
        assert mine["modelled-joules"] < theirs["modelled-joules"]


def test_this_machines_clock_does_not_matter(tiny_bert, finished, monkeypatch):
    """Again with a clock that jumps ahead by up to a day at every look: all but what is named after seconds is the same."""
    random, ticks = np.random.default_rng(0), itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) + 86400 * random.random() + 1e6)
    again = start(config(tiny_bert, method="legend", **ALL))
    assert all(np.array_equal(again.state.arrays[part], finished.state.arrays[part]) for part in ("B", "A", "head"))
    assert again.state.clients == finished.state.clients and depths_of(again)

    def timeless(line):
        machine = {"peak-memory-mb", "bytes-free"}
        return {k: v for k, v in line.items() if not k.startswith("seconds") and k not in machine}

    assert [timeless(line) for line in again.lines] == [timeless(line) for line in finished.lines]


def test_layers_that_nobody_trained_keep_their_values(tiny_bert, monkeypatch):
    """Everyone at depth 1: A and B of the two lower blocks stay bit for bit, the last block's and the head do not."""

    def lowest(self, state, clients):
        for client in clients:
            state.clients[client.key]["depth"] = 1

    monkeypatch.setattr(Legend, "prepare", lowest)
    loop, grid = prepare(config(tiny_bert, method="legend", **ALL))
    before = {part: vector.copy() for part, vector in loop.state.arrays.items()}
    loop.start(grid, loop.initial_arrays(), 2)
    mask, spec = loop.state.mask, loop.spec
    for part in ("B", "A"):
        top = mask.elements(spec.widths(part), last_blocks(spec, mask, 1))
        assert np.array_equal(loop.state.arrays[part][~top], before[part][~top])
        assert not np.array_equal(loop.state.arrays[part][top], before[part][top])
    assert not np.array_equal(loop.state.arrays["head"], before["head"])


class OddGrid(InProcessGrid):
    """Node 1002's reports are changed by `odd`, of the calibration batch and of training; all nodes are real devices."""

    simulation = False

    def __init__(self, *args, odd, **options):
        super().__init__(*args, **options)
        self.odd = odd

    def _call(self, message):
        reply = super()._call(message)
        if message.metadata.dst_node_id == 1002 and "metrics" in reply.content.metric_records:
            sound = dict(reply.content.metric_records["metrics"])
            reply.content["metrics"] = MetricRecord(self.odd(sound))
        return reply


def reported(value):
    def odd(sound):
        names = ("seconds-", "bytes-", "flops-", "blocks", "steps")
        changed = {name: value if name.startswith(names) else number for name, number in sound.items()}
        return {name: number for name, number in changed.items() if number is not None}

    return odd


@pytest.mark.parametrize("value", [-1.0, float("nan"), 1e300, None], ids=str)
def test_absurd_reports_do_not_end_a_run(tiny_bert, value):
    """What is not finite, or beyond 1e100, is no update; the others' rounds go on, at least one of them at full depth."""
    flat = config(tiny_bert, method="legend", **ALL | {"strategy__fraction_train": 0.5})
    loop, grid = prepare(flat, OddGrid, odd=reported(value), clients=4)
    loop.roster.secret = 1  # else who is drawn is the machine's choice
    loop.start(grid, loop.initial_arrays(), 2)
    drops = {(drop["client"], drop["reason"]) for line in lines(loop, "round") for drop in line["dropped"]}
    assert drops <= {("2", "not-finite")}
    assert any(node == "2" for line in lines(loop, "round") for node in line["sampled"])
    assert all(np.isfinite(vector).all() for vector in loop.state.arrays.values())
    for line in lines(loop, "round"):
        depth = {other["client"]: other["bytes-up"]["B"] for other in lines(loop, "client") if other["round"] == line["round"]}
        full = 4 * loop.spec.length("B", loop.state.mask)
        assert max(number for key, number in depth.items() if key != "2") == full
