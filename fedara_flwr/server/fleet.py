"""Simulated devices: what each one is, and the modelled clock that turns FLOPs and bytes into seconds and joules.

Everything that comes from here is MODELLED, never measured; whoever logs a value keeps that word in its name
(`modelled_seconds`, `modelled_joules`). The model, for one client in one round:

    seconds = bytes_down / down + flops / flops_per_second + bytes_up / up      one after the other, nothing overlaps
    joules  = watts_busy · computing + watts_radio · transferring               plus watts_idle while others still work

It has no latency, no sharing of a link, no throttling over time and no limit by memory bandwidth: good for comparing
methods under one fleet, not for predicting a device to a few percent. `measured` below is somebody's reading, quoted with
its place; `assumed` is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import fsum, isfinite

from fedara_flwr.keys import ConfigError, nearest
from fedara_flwr.seeds import generator


@dataclass(frozen=True)
class Profile:
    """What one kind of device can do; ValueError unless every number is above 0 and waiting costs least power.

    Attributes:
        name: how `fleet.profiles` names it.
        title: how a page names it.
        flops: FLOP/s that it sustains in float32 PyTorch training of small transformers on all its cores, not its peak;
            a multiply-add is two.
        down: bytes/s towards the device.
        up: bytes/s from the device.
        memory: bytes free for training once system, interpreter and libraries are loaded.
        watts_busy: power of the whole device while it trains.
        watts_radio: power of the whole device while it transfers, in either direction.
        watts_idle: power of the whole device while it waits.
    """

    name: str
    title: str
    flops: float
    down: float
    up: float
    memory: int
    watts_busy: float
    watts_radio: float
    watts_idle: float

    def __post_init__(self) -> None:
        for field in fields(self)[2:]:
            value = getattr(self, field.name)
            if not 0 < value < float("inf"):
                raise ValueError(f"profile {self.name!r}: {field.name} must be above 0, got {value}")
        # otherwise a device with more to do would make the round cheaper
        if self.watts_idle > min(self.watts_busy, self.watts_radio):
            raise ValueError(f"profile {self.name!r}: watts_idle must not exceed watts_busy or watts_radio")


# Medians of the world, Speedtest Global Index, December 2025 (techafricanews.com): down, up in bytes/s.
FIXED = 118.59e6 / 8, 59.45e6 / 8
MOBILE = 105.70e6 / 8, 14.78e6 / 8

# Share of the float32 peak that a Jetson sustains. Measured: cuBLAS reaches 61% in float32 on an Orin Nano, 1282 of
# 2089 GFLOP/s (github.com/Cre4T3Tiv3/jetson-orin-matmul-analysis). Assumed: a training step runs at half the speed of its
# matrix products, the rest goes to normalisation, softmax, optimiser and kernel launches. TF32 is off, as is PyTorch's default.
JETSON_SHARE = 0.5 * 0.61

# Assumed: what Python, PyTorch and a CUDA context hold before training starts, in bytes.
LIBRARIES = 1_000_000_000

_PROFILES = (
    # flops: peak 5.3 TFLOP/s (2048 cores, 1.3 GHz; NVIDIA Jetson AGX Orin Series Technical Brief).
    # memory: 7517 of 62841 MiB in use at rest (tegrastats of a 64 GB board, github.com/ooshyun/llm_profiling).
    # watts_idle: 7.0 W over the four module rails in the same reading (2.4 GPU/SOC, 0.4 CPU, 3.8 SYS_5V0, 0.4 VDDQ) and 1 W for
    #   the carrier board (see orin-nano). watts_busy: the GPU/SOC rail at 40.4 W in a GPU stress test in mode MAXN (measured
    #   on a 32 GB board, forums.developer.nvidia.com/t/323456) in place of its 2.4 W; below the module's limit of 60 W.
    # watts_radio: 0.8 W for gigabit Ethernet (see orin-nano). down, up: assumed a wired line of the world's median.
    Profile(
        name="agx-orin",
        title="Jetson AGX Orin 64 GB",
        flops=JETSON_SHARE * 5.3e12,
        down=FIXED[0],
        up=FIXED[1],
        memory=(62_841 - 7_517) * 2**20 - LIBRARIES,
        watts_busy=46.0,
        watts_radio=8.8,
        watts_idle=8.0,
    ),
    # Power mode 15W, without the later "Super" clocks.
    # flops: peak 1.28 TFLOP/s (1024 cores · 2 · 625 MHz; NVIDIA Jetson Orin Nano Series data sheet).
    # memory: about 5.2 GB left after the system (measured, ericxliu.me, "Why Your Jetson Orin Nano's 40 TOPS Goes Unused").
    # watts: VDD_IN in mode 15W at 5.2 W idle and 11.7 W under GPU load (language-model inference), up to 0.8 W more under an
    #   iperf3 flood over Ethernet, about 1 W more at the supply than at VDD_IN (measured, github.com/picocluster/PicoClaw,
    #   docs/benchmark-report.md).
    # down, up: assumed a wired line of the world's median.
    Profile(
        name="orin-nano",
        title="Jetson Orin Nano 8 GB, 15 W",
        flops=JETSON_SHARE * 1.28e12,
        down=FIXED[0],
        up=FIXED[1],
        memory=5_200_000_000 - LIBRARIES,
        watts_busy=12.7,
        watts_radio=7.0,
        watts_idle=6.2,
    ),
    # flops: float32 products at 57 GFLOP/s with four threads at 2.8 GHz (measured, github.com/geerlingguy/sbc-reviews #21), so
    #   49 at the stock 2.4 GHz; fits 30.2 GFLOP/s in float64 HPL (measured, github.com/geerlingguy/top500-benchmark #18).
    #   Assumed: half of that in training, as for the Jetsons.
    # memory: 861 of 8048 MiB in use at rest (measured on a Pi 500, the same chip, geerlingguy/sbc-reviews #60).
    # watts: 11 W during HPL (top500-benchmark #18), 3.1 W idle (sbc-reviews #60), measured at the wall. Assumed: 1 W for Wi-Fi,
    #   between receiving (0.5 W) and sending (1.4 W) in the power profile that Google ships for the Pixel 4a.
    # down, up: assumed a line of the world's median; the Pi's own Wi-Fi is faster (226 to 262 Mbit/s measured at half a metre,
    #   github.com/fairscope/PlanktoScope #865).
    Profile(
        name="raspberry-pi-5",
        title="Raspberry Pi 5, 8 GB",
        flops=0.5 * 49e9,
        down=FIXED[0],
        up=FIXED[1],
        memory=(8_048 - 861) * 2**20 - LIBRARIES,
        watts_busy=11.0,
        watts_radio=4.1,
        watts_idle=3.1,
    ),
    # Snapdragon 778G, in many mid-range phones of 2021 and 2022; training on the CPU, screen off.
    # flops: assumed the Pi's per GHz, as four Cortex-A78 at 2.4 + 3 · 2.2 GHz (konsyse.com) have SIMD units as wide as the Pi's
    #   four A76 at 2.4 GHz; of that 82%, to which a Pixel 7 Pro throttles under sustained load (measured, dotninjatech.com).
    # memory: assumed a quarter of 8 GB, what Android may leave to an app in the background.
    # watts: 0.49 W at rest and 0.73, 0.73, 0.73, 0.79 W more for the four big cores at 2.4 GHz (measured one core at a time in
    #   CoreMark, github.com/kdrag0n/freqbench, sm7325; float arithmetic may draw more). Sending over the modem at middle level
    #   draws 292 mA at 3.7 V (power profile that Google ships for the Pixel 5, another mid-range chip).
    # down, up: the world's median mobile line.
    Profile(
        name="phone",
        title="mid-range phone (Snapdragon 778G)",
        flops=0.82 * (9.0 / 9.6) * 0.5 * 49e9,
        down=MOBILE[0],
        up=MOBILE[1],
        memory=2_000_000_000,
        watts_busy=3.5,
        watts_radio=1.6,
        watts_idle=0.5,
    ),
)
PROFILES: dict[str, Profile] = {profile.name: profile for profile in _PROFILES}
"""The built-in profiles by name, fastest first."""


def read_profiles(text: str) -> tuple[Profile, ...]:
    """The fleet that `fleet.profiles` describes: names separated by commas, a repeated name weighs more; '' is no fleet.

    Raises:
        ConfigError: for a name that is not in PROFILES.
    """
    if not text.strip():
        return ()
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PROFILES:
            allowed = ", ".join(PROFILES)
            raise ConfigError(
                f"fleet.profiles = {text!r}: there is no profile {name!r}, allowed are {allowed}{nearest(name, PROFILES)}"
            )
    return tuple(PROFILES[name] for name in names)


def assign(profiles: Sequence[Profile], seed: int, client_key: str) -> Profile:
    """The profile of one client, drawn uniformly from `profiles`; depends on nothing but these three.

    Raises:
        ValueError: when `profiles` is empty.
    """
    if not profiles:
        raise ValueError("there is no profile to draw from")
    return profiles[int(generator(seed, "fleet", client_key).integers(len(profiles)))]


@dataclass(frozen=True)
class DeviceCost:
    """What one round costs one client, MODELLED.

    Attributes:
        profile: name of its profile.
        seconds_compute: seconds of training.
        seconds_down: seconds of receiving.
        seconds_up: seconds of sending.
        joules: energy of training and transfers; waiting is not in it.
        watts_idle: power while it waits for slower clients.
    """

    profile: str
    seconds_compute: float
    seconds_down: float
    seconds_up: float
    joules: float
    watts_idle: float

    @property
    def seconds(self) -> float:
        """Seconds from the server's first byte to the client's last one."""
        return self.seconds_compute + self.seconds_down + self.seconds_up


def device_cost(profile: Profile, flops: float, bytes_down: int, bytes_up: int) -> DeviceCost:
    """MODELLED cost of training with `flops` FLOPs in all and of moving that many bytes.

    Raises:
        ValueError: when an amount is negative or not finite.
    """
    for name, amount in (("flops", flops), ("bytes_down", bytes_down), ("bytes_up", bytes_up)):
        if not isfinite(amount) or amount < 0:
            raise ValueError(f"{name} must be 0 or more, got {amount}")
    compute, down, up = flops / profile.flops, bytes_down / profile.down, bytes_up / profile.up
    joules = profile.watts_busy * compute + profile.watts_radio * (down + up)
    return DeviceCost(profile.name, compute, down, up, joules, profile.watts_idle)


@dataclass(frozen=True)
class RoundCost:
    """What one synchronous round costs all its clients, MODELLED.

    Attributes:
        seconds: of the slowest client; 0.0 without clients.
        waiting: seconds that a client waits for the slowest one, mean over clients.
        joules: energy of all clients, waiting included.
    """

    seconds: float
    waiting: float
    joules: float


def round_cost(costs: Sequence[DeviceCost]) -> RoundCost:
    """MODELLED cost of a round that ends with its slowest client; the order of `costs` does not matter."""
    if not costs:
        return RoundCost(0.0, 0.0, 0.0)
    slowest = max(cost.seconds for cost in costs)
    waits = [slowest - cost.seconds for cost in costs]
    # fsum: the same bits in any order
    joules = fsum(amount for cost, wait in zip(costs, waits, strict=True) for amount in (cost.joules, cost.watts_idle * wait))
    return RoundCost(slowest, fsum(waits) / len(waits), joules)
