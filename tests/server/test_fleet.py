"""Simulated devices: the profiles, who gets which, and the modelled clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedara_flwr.keys import ConfigError
from fedara_flwr.server.fleet import PROFILES, DeviceCost, Profile, RoundCost, assign, device_cost, read_profiles, round_cost

laws = settings(deadline=None, max_examples=200)

# bytes/s down and up, then bytes of memory, then watts busy, transferring, waiting
FAST = Profile("fast", "fast", 100.0, 10.0, 5.0, 1000, 20.0, 8.0, 4.0)
SLOW = Profile("slow", "slow", 10.0, 10.0, 2.0, 1000, 6.0, 3.0, 2.0)
FAR = Profile("far", "far", 50.0, 1.0, 1.0, 1000, 10.0, 5.0, 1.0)


# -- the clock, by hand ------------------------------------------------------------
@pytest.mark.parametrize(
    ("profile", "compute", "down", "up", "joules"),
    [
        # 200/100 + 20/10 + 10/5 = 6 s; 20 W · 2 s + 8 W · 4 s = 72 J
        (FAST, 2.0, 2.0, 2.0, 72.0),
        # 200/10 + 20/10 + 10/2 = 27 s; 6 W · 20 s + 3 W · 7 s = 141 J
        (SLOW, 20.0, 2.0, 5.0, 141.0),
        # 200/50 + 20/1 + 10/1 = 34 s; 10 W · 4 s + 5 W · 30 s = 190 J
        (FAR, 4.0, 20.0, 10.0, 190.0),
    ],
)
def test_device_cost_by_hand(profile, compute, down, up, joules):
    cost = device_cost(profile, 200, 20, 10)
    assert cost == DeviceCost(profile.name, compute, down, up, joules, profile.watts_idle)
    assert cost.seconds == compute + down + up


def test_round_cost_by_hand():
    """6, 27 and 34 s: the others wait 28 and 7 s, 35/3 on average over three, and draw 4 W · 28 s + 2 W · 7 s = 126 J."""
    costs = [device_cost(profile, 200, 20, 10) for profile in (FAST, SLOW, FAR)]
    assert round_cost(costs) == RoundCost(34.0, 35 / 3, 72 + 141 + 190 + 126)


def test_round_of_none_or_one():
    assert round_cost([]) == RoundCost(0.0, 0.0, 0.0)
    assert round_cost([device_cost(SLOW, 200, 20, 10)]) == RoundCost(27.0, 0.0, 141.0)


def test_nothing_to_do_costs_nothing():
    cost = device_cost(FAST, 0, 0, 0)
    assert (cost.seconds, cost.joules) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("amounts", "message"),
    [
        ((-1, 0, 0), "flops must be 0 or more, got -1"),
        ((float("nan"), 0, 0), "flops must be 0 or more, got nan"),
        ((float("inf"), 0, 0), "flops must be 0 or more, got inf"),
        ((0, -1, 0), "bytes_down must be 0 or more, got -1"),
        ((0, 0, -1), "bytes_up must be 0 or more, got -1"),
    ],
)
def test_impossible_amounts(amounts, message):
    with pytest.raises(ValueError, match=message):
        device_cost(FAST, *amounts)


# -- the clock, by law ------------------------------------------------------------
known = st.sampled_from(list(PROFILES.values()))
work = st.tuples(st.floats(0, 1e16), st.integers(0, 10**11), st.integers(0, 10**11))
devices = st.builds(lambda profile, amounts: device_cost(profile, *amounts), known, work)


@laws
@given(st.lists(devices, min_size=1, max_size=12), st.randoms())
def test_a_round_ends_with_its_slowest_client(costs, random):
    cost = round_cost(costs)
    assert cost.seconds == max(c.seconds for c in costs)
    assert 0 <= cost.waiting <= cost.seconds
    assert cost.joules >= sum(c.joules for c in costs) * (1 - 1e-12)
    random.shuffle(costs)
    assert round_cost(costs) == cost


@laws
@given(devices, st.integers(1, 12))
def test_equal_devices_never_wait(cost, count):
    together = round_cost([cost] * count)
    assert together.seconds == cost.seconds
    assert together.waiting == 0.0
    assert together.joules == pytest.approx(count * cost.joules)


@laws
@given(known, work, work, st.lists(devices, max_size=6))
def test_more_work_is_never_cheaper(profile, amounts, more, others):
    less = device_cost(profile, *amounts)
    greater = device_cost(profile, *(a + b for a, b in zip(amounts, more, strict=True)))
    assert greater.seconds >= less.seconds
    assert greater.joules >= less.joules
    before, after = round_cost([less, *others]), round_cost([greater, *others])
    assert after.seconds >= before.seconds
    assert after.joules >= before.joules * (1 - 1e-12)


# -- the profiles ------------------------------------------------------------
@pytest.mark.parametrize("name", PROFILES)
def test_profiles_are_whole(name):
    profile = PROFILES[name]
    assert profile.name == name
    assert profile.title
    assert all(value > 0 for value in astuple(profile)[2:])
    assert isinstance(profile.memory, int)
    assert profile.watts_idle < min(profile.watts_busy, profile.watts_radio)


def test_profiles_by_speed():
    agx, nano, pi, phone = (PROFILES[name] for name in ("agx-orin", "orin-nano", "raspberry-pi-5", "phone"))
    assert agx.flops > nano.flops > 10 * max(pi.flops, phone.flops)
    assert list(PROFILES.values()) == sorted(PROFILES.values(), key=lambda profile: -profile.flops)
    assert agx.flops < 5.3e12 and nano.flops < 1.28e12, "sustained, not peak"
    assert agx.memory < 64e9 and max(nano.memory, pi.memory, phone.memory) < 8e9, "free, not total"
    assert phone.up < min(profile.up for profile in (agx, nano, pi))


@pytest.mark.parametrize("field", ["flops", "down", "up", "memory", "watts_busy", "watts_radio", "watts_idle"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_impossible_profiles(field, value):
    with pytest.raises(ValueError, match=f"profile 'fast': {field} must be above 0"):
        replace(FAST, **{field: value})


@pytest.mark.parametrize("field", ["watts_busy", "watts_radio"])
def test_waiting_costs_least_power(field):
    with pytest.raises(ValueError, match="watts_idle must not exceed"):
        replace(FAST, **{field: 3.9})


# -- the fleet ------------------------------------------------------------
def test_read_profiles():
    assert read_profiles("agx-orin") == (PROFILES["agx-orin"],)
    assert [p.name for p in read_profiles("orin-nano, phone,phone")] == ["orin-nano", "phone", "phone"]
    assert read_profiles("") == read_profiles("  ") == ()


@pytest.mark.parametrize(
    ("text", "wrong", "hint"),
    [
        ("agx-orin,orin-nanno", "'orin-nanno'", "; did you mean 'orin-nano'?"),
        ("raspberry-pi", "'raspberry-pi'", "; did you mean 'raspberry-pi-5'?"),
        ("Phone", "'Phone'", "; did you mean 'phone'?"),
        ("toaster", "'toaster'", ""),
        ("phone,", "''", ""),
        ("phone\nphone", r"'phone\nphone'", "; did you mean 'phone'?"),
    ],
)
def test_unknown_profiles(text, wrong, hint):
    with pytest.raises(ConfigError) as caught:
        read_profiles(text)
    allowed = "agx-orin, orin-nano, raspberry-pi-5, phone"
    assert str(caught.value) == f"fleet.profiles = {text!r}: there is no profile {wrong}, allowed are {allowed}{hint}"


def test_assign_draws_by_weight():
    """Three in four are phones; 2,000 draws lie within four standard deviations (77) of 1,500."""
    profiles = read_profiles("phone,agx-orin,phone,phone")
    counts = Counter(assign(profiles, 42, f"client {i}").name for i in range(2000))
    assert set(counts) == {"phone", "agx-orin"}
    assert abs(counts["phone"] - 1500) < 4 * 19.4


def test_assign_differs_by_seed():
    profiles = tuple(PROFILES.values())
    fleets = {tuple(assign(profiles, seed, str(key)).name for key in range(20)) for seed in range(10)}
    assert len(fleets) == 10


@laws
@given(st.integers(0, 2**62 - 1), st.lists(st.text(max_size=8), min_size=1, unique=True), st.randoms())
def test_assign_depends_on_seed_and_key_alone(seed, keys, random):
    profiles = tuple(PROFILES.values())
    drawn = {key: assign(profiles, seed, key) for key in keys}
    random.shuffle(keys)
    assert all(assign(profiles, seed, key) is drawn[key] for key in keys)


def test_assign_from_nothing():
    with pytest.raises(ValueError, match="no profile to draw from"):
        assign((), 42, "0")
