"""`legend` (LEGEND, arXiv 2412.20004): a LoRA depth for each device, and ranks that rise toward the output.

Stated by the paper: each device adapts its last k_i blocks only; one global rank distribution r_1 ≤ … ≤ r_L; devices report
what forward pass, backward pass and upload take, and their free memory, which go into moving averages; a greedy algorithm
sets the depths anew each round; layers are aggregated over the devices that own them. This project's reading: ranks rise by a
fixed step about `adapter.rank`, with alpha_l in proportion to r_l; a round costs device i t_i(k) = steps·(f_i + k·g_i) +
u_i·bytes(k); the target is the time of the fastest device (or the median one) at the full depth that its memory allows, every
other device takes the largest k with t_i(k) ≤ (1 + slack)·target, at least 1. f, g and memory come from one calibration batch
before a node's first round, then from each update. Simulated devices: their profile times counted FLOPs.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

import numpy as np
from pydantic import Field

from fedara_flwr.config import Group
from fedara_flwr.ranks import RankMask
from fedara_flwr.server.roster import Node
from fedara_flwr.spec import ModelSpec
from fedara_flwr.strategies import register
from fedara_flwr.strategies.fedlora import FedLoRA
from fedara_flwr.wire.plan import Update

UPLOADS = 5  # upload times of which the median counts
POLLING = 3.0  # seconds; a stock SuperNode sleeps so long after an empty pull


class LegendOptions(Group):
    """Keys of legend."""

    rank_step: float = Field(
        2.0, ge=0, description="ranks added from block to block, λ; smaller where rank 1 would not be reached"
    )
    target: Literal["fastest", "median"] = Field("fastest", description="whose time at full depth the others must keep to")
    slack: float = Field(0.1, ge=0, description="share by which a device may exceed the target, ε")
    smoothing: float = Field(0.5, gt=0, le=1, description="weight of the newest report in the moving averages")


@dataclass(frozen=True)
class Capacity:
    """What a device can do, by the moving averages of its reports.

    Attributes:
        forward: seconds per step of the forward pass.
        backward: seconds per step and block of the backward pass.
        upload: seconds per uploaded byte.
        depth: blocks that its memory allows to train.
    """

    forward: float
    backward: float
    upload: float
    depth: float

    def seconds(self, depth: int, steps: int, sent: int) -> float:
        """t(k) for `sent` bytes."""
        return steps * (self.forward + depth * self.backward) + self.upload * sent


def rank_distribution(blocks: int, mean: int, step: float) -> list[int]:
    """Ranks r_1 ≤ … ≤ r_L by an arithmetic sequence with that mean, each at least 1, Σ r_l = L·mean.

    6 blocks, mean 12, step 2: 7, 9, 11, 13, 15, 17. The step is cut to what keeps the lowest rank at 1; what rounding leaves
    goes to the highest blocks.
    """
    step = min(step, 2 * (mean - 1) / (blocks - 1)) if blocks > 1 else 0.0
    exact = [mean + step * (block - (blocks - 1) / 2) for block in range(blocks)]
    ranks = [int(value + 1e-9) for value in exact]
    for block in range(blocks - (blocks * mean - sum(ranks)), blocks):
        ranks[block] += 1
    return ranks


def depths(
    devices: Sequence[Capacity], blocks: int, steps: int, sent: Sequence[int], target: str = "fastest", slack: float = 0.0
) -> list[int]:
    """Greedy depth of each device (LCD, this project's reading above); pure.

    Args:
        blocks: L.
        sent: bytes of an update at depth 0, 1, …, L.
        target: "fastest" or "median" device's time at the depth that its memory allows.
    """
    most = [int(max(1, min(blocks, device.depth))) for device in devices]
    times = [device.seconds(k, steps, sent[k]) for device, k in zip(devices, most, strict=True)]
    # the fastest device is the one that does the same work in the least time
    if target == "fastest":
        same = [device.seconds(blocks, steps, sent[blocks]) for device in devices]
        limit = times[same.index(min(same))]
    else:
        limit = statistics.median_high(times)
    chosen = []
    for device, top in zip(devices, most, strict=True):
        fitting = [k for k in range(1, top + 1) if device.seconds(k, steps, sent[k]) <= (1 + slack) * limit]
        chosen.append(max(fitting, default=1))
    return chosen


@register
class Legend(FedLoRA):
    """FedLoRA in which client i holds the last k_i blocks."""

    name = "legend"
    title = "LoRA depth by each device's capacity, ranks that rise toward the output"
    paper = "arXiv 2412.20004"
    Options = LegendOptions

    @property
    def calibration(self) -> Mapping[str, int]:  # type: ignore[override]
        """One batch as in training."""
        return {"calibrate-batch": self.settings.train.batch_size, "calibrate-rank": self.settings.adapter.rank}

    def start_mask(self) -> RankMask:
        """Rising ranks, the same for all modules of a block."""
        self.depth: dict[str, int] = {}
        assert isinstance(self.options, LegendOptions)
        ranks = rank_distribution(self.spec.blocks, self.settings.adapter.rank, self.options.rank_step)
        return RankMask.full([ranks[module.block] for module in self.spec.modules])

    def scales(self) -> tuple[float, ...]:
        """alpha_l / r_l, the same for all blocks."""
        return (self.settings.adapter.alpha / self.settings.adapter.rank,) * len(self.spec.modules)

    def ready(self, node: Node, metrics: Mapping[str, float]) -> None:
        """A first report, from the calibration batch, and the depth that the node's memory allows."""
        profile = self.profile(node)
        free = profile.memory if profile is not None else metrics.get("bytes-free", 0.0)
        per_block = metrics.get("bytes-block", 0.0)
        fits = free / per_block if per_block > 0 else 1.0
        self.state.clients[node.key] = {"depth": max(1.0, min(fits, float(self.spec.blocks))), "uploads": []}
        self._report(node.key, metrics, 1, self.spec.blocks)

    def take(self, client_key: str, update: Update, weight: int) -> None:
        """What the round took the device joins its moving averages."""
        super().take(client_key, update, weight)
        if self.profile(self.roster.nodes[client_key]) is None:
            sent = 4 * sum(len(values) for values in update.arrays.values())
            elapsed, busy = (update.metrics.get(f"seconds-{name}", 0.0) for name in ("elapsed", "all"))
            uploads = self.state.clients[client_key]["uploads"]
            uploads.append(max(0.0, elapsed - busy - POLLING) / sent)
            del uploads[:-UPLOADS]
        steps = self.settings.train.steps or update.metrics.get("steps", 0)
        self._report(client_key, update.metrics, steps, self.depth[client_key])

    def _report(self, client_key: str, metrics: Mapping[str, float], steps: float, blocks: int) -> None:
        """Seconds per step; of a simulated device counted FLOPs over its profile's speed, never this machine's clock.

        A report with anything but finite numbers above 0 does not count: as 0 it would make its device the fastest.
        """
        profile, known = self.profile(self.roster.nodes[client_key]), self.state.clients[client_key]
        assert isinstance(self.options, LegendOptions)
        share = self.options.smoothing
        if not 1 <= steps < inf:
            return
        unit, speed = ("seconds", 1.0) if profile is None else ("flops", profile.flops)
        over = {"forward": steps, "backward": steps * blocks}
        values = {way: metrics.get(f"{unit}-{way}", 0.0) / speed / count for way, count in over.items()}
        if not all(0 < value < inf for value in values.values()):
            return
        for way, value in values.items():
            known[way] = (1 - share) * known[way] + share * value if way in known else value

    def capacity(self, node: Node) -> Capacity | None:
        """The moving averages of one node; None before its first report."""
        known, profile = self.state.clients.get(node.key, {}), self.profile(node)
        if "forward" not in known:
            return None
        uploads = [1.0 / profile.up] if profile is not None else known["uploads"]
        return Capacity(known["forward"], known["backward"], statistics.median(uploads or [0.0]), known["depth"])

    def prepare(self, server_round: int, nodes: Sequence[Node]) -> None:
        """Depths of this round's nodes; one without a report trains one block."""
        assert isinstance(self.options, LegendOptions)
        blocks, train = self.spec.blocks, self.settings.train
        sent = [self._bytes(depth) for depth in range(blocks + 1)]
        found = {node.key: capacity for node in nodes if (capacity := self.capacity(node)) is not None}
        if not train.steps:  # by epochs each device has steps of its own, here they are one
            for key, capacity in found.items():
                steps = train.epochs * -(-self.roster.examples.get(key, 1) // train.batch_size)
                found[key] = replace(capacity, forward=steps * capacity.forward, backward=steps * capacity.backward)
        self.depth = dict.fromkeys((node.key for node in nodes), 1)
        if found:
            chosen = depths(list(found.values()), blocks, train.steps or 1, sent, self.options.target, self.options.slack)
            self.depth |= dict(zip(found, chosen, strict=True))

    def _bytes(self, depth: int) -> int:
        """Bytes of an update at that depth."""
        mask = last_blocks(self.spec, self.state.mask, depth)
        return 4 * sum(self.spec.length(part, mask) for part in self.trainable)

    def client_mask(self, client_key: str) -> RankMask:
        """The last k_i blocks, whole."""
        return last_blocks(self.spec, self.state.mask, self.depth.get(client_key, 1))


def last_blocks(spec: ModelSpec, mask: RankMask, depth: int) -> RankMask:
    """The alive slots of `mask` in the last `depth` blocks."""
    block = np.array([module.block for module in spec.modules], dtype=np.int64)
    return RankMask(mask.ranks, mask.bits & (block >= spec.blocks - depth)[mask.modules])
