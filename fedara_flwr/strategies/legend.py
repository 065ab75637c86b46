"""`legend` (LEGEND, arXiv 2412.20004): a LoRA depth for each device, and ranks that rise toward the output.

Stated by the paper: each device adapts its last k_i blocks only; one global rank distribution r_1 ≤ … ≤ r_L; devices report
what forward pass, backward pass and upload take, and their free memory, which go into moving averages; a greedy algorithm
sets the depths anew each round; layers are aggregated over the devices that own them. This project's reading: ranks rise by a
fixed step about `adapter.rank`, with alpha_l in proportion to r_l; a round costs device i t_i(k) = steps·(f_i + k·g_i) +
u_i·bytes(k); the target is the time of the fastest device (or the median one) at the full depth that its memory allows, every
other device takes the largest k with t_i(k) ≤ (1 + slack)·target, at least 1. f, g and memory come from one calibration batch
before a node's first round, then from each update. Simulated devices: their profile times counted FLOPs. With `train.cache`
the forward pass too goes through the trained blocks alone, f_i = 0 and g_i has both ways.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any, Literal

from pydantic import Field

from fedara_flwr.keys import Group
from fedara_flwr.merging.merger import Merger
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import Arrays
from fedara_flwr.strategies.allocation import Capacity, depths, last_blocks, rank_distribution
from fedara_flwr.strategies.base import Client, Reply, State
from fedara_flwr.strategies.fedlora import FedLoRA
from fedara_flwr.strategies.registry import register
from fedara_flwr.wire.codec import nbytes

UPLOADS = 5  # upload times of which the median counts
FASTEST = 100.0  # times the median speed of a round's devices, what a report may claim
LEAP = 2.0  # times faster than its average that a device may say it is: one that lies needs many rounds to be believed
POLLING = 3.0  # seconds; a stock SuperNode sleeps so long after an empty pull


class LegendOptions(Group):
    """Keys of `strategy.options` for legend."""

    rank_step: float = Field(
        2.0, ge=0, description="ranks added from block to block, λ; smaller where rank 1 would not be reached"
    )
    target: Literal["fastest", "median"] = Field("fastest", description="whose time at full depth the others must keep to")
    slack: float = Field(0.1, ge=0, description="share by which a device may exceed the target, ε")
    smoothing: float = Field(0.5, gt=0, le=1, description="weight of the newest report in the moving averages")


@register
class Legend(FedLoRA):
    """FedLoRA in which client i holds the last k_i blocks."""

    name = "legend"
    title = "LoRA depth by each device's capacity, ranks that rise toward the output"
    paper = "arXiv 2412.20004"
    by_reports = True
    Options = LegendOptions
    options: LegendOptions

    @property
    def calibration(self) -> Mapping[str, int]:
        """Ask for one timed batch, as large as in training."""
        return {"calibrate-batch": self.settings.train.batch_size, "calibrate-rank": self.settings.adapter.rank}

    def start_mask(self) -> RankMask:
        """All slots, in ranks that rise from block to block and are the same for all modules of a block."""
        ranks = rank_distribution(self.spec.blocks, self.settings.adapter.rank, self.options.rank_step)
        return RankMask.full([ranks[module.block] for module in self.spec.modules])

    def scales(self, mask: RankMask) -> tuple[float, ...]:
        """alpha_l / r_l, the same for all blocks."""
        return (self.settings.adapter.alpha / self.settings.adapter.rank,) * len(self.spec.modules)

    def ready(self, state: State, client: Client, metrics: Mapping[str, float]) -> None:
        """Take from the calibration batch the memory of a block, and a first report where there is none yet."""
        device, known = client.device, state.clients.setdefault(client.key, {"uploads": []})
        known["block"] = max(1.0, metrics.get("bytes-block", 0.0))
        known["free"] = float(device.memory) if device is not None else metrics.get("bytes-free", 0.0)
        if "forward" not in known:
            self._report(known, client, metrics, 1, self.spec.blocks)

    def next(self, state: State, merged: Arrays, replies: Sequence[Reply], merger: Merger) -> None:
        """What the round took each device joins its moving averages."""
        super().next(state, merged, replies, merger)
        for reply in replies:
            known, metrics = state.clients[reply.client.key], reply.metrics
            if reply.client.device is None:
                elapsed, busy = (metrics.get(f"seconds-{name}", 0.0) for name in ("elapsed", "all"))
                uploads = known["uploads"]
                uploads.append(max(0.0, elapsed - busy - POLLING) / self._bytes(reply.mask))
                del uploads[:-UPLOADS]
                if (free := metrics.get("bytes-free", 0.0)) > 0:
                    self._smooth(known, "free", free)
            steps = self.settings.train.steps or metrics.get("steps", 0)
            self._report(known, reply.client, metrics, steps, self.spec.blocks - self.spec.lowest(reply.mask))

    def _report(self, known: dict[str, Any], client: Client, metrics: Mapping[str, float], steps: float, blocks: int) -> None:
        """Average in seconds per step; a simulated device's are counted FLOPs over its speed, never this machine's clock.

        A report with anything but finite numbers above 0 does not count: as 0 it would make its device the fastest.
        """
        if not 1 <= steps < inf:
            return
        unit, speed = ("seconds", 1.0) if client.device is None else ("flops", client.device.flops)
        over = {"forward": steps * blocks if self.cached else steps, "backward": steps * blocks}
        values = {way: metrics.get(f"{unit}-{way}", 0.0) / speed / count for way, count in over.items()}
        if not all(0 < value < inf for value in values.values()):
            return
        for way, value in values.items():  # a device may get slower at once, but faster only as far as its past makes likely
            self._smooth(known, way, max(value, known[way] / LEAP) if way in known else value)

    def _smooth(self, known: dict[str, Any], name: str, value: float) -> None:
        """Take one more value into a moving average."""
        share = self.options.smoothing
        known[name] = (1 - share) * known[name] + share * value if name in known else value

    def capacity(self, state: State, client: Client) -> Capacity | None:
        """The moving averages of one client; None before its first report."""
        known = state.clients.get(client.key, {})
        if "forward" not in known:
            return None
        if client.device is not None:
            upload = 1.0 / client.device.up
        else:
            upload = statistics.median(known["uploads"] or self._usual_uploads(state))
        depth = max(1.0, min(known["free"] / known["block"], float(self.spec.blocks)))
        forward, backward = known["forward"], known["backward"]
        if self.cached:
            return Capacity(0.0, forward + backward, upload, depth)
        return Capacity(forward, backward, upload, depth)

    @property
    def cached(self) -> bool:
        """Whether clients keep the output of the blocks that they do not train."""
        return self.settings.train.cache != "off"

    @staticmethod
    def _usual_uploads(state: State) -> list[float]:
        """Upload times of real devices, one each: what a device that has sent nothing yet is taken for; 0 while two know."""
        medians = [statistics.median(known["uploads"]) for known in state.clients.values() if known["uploads"]]
        return medians if len(medians) > 2 else [0.0]

    def prepare(self, state: State, clients: Sequence[Client]) -> None:
        """Depths of this round's clients, kept in the state; one without a report trains one block."""
        blocks, train = self.spec.blocks, self.settings.train
        sent = [self._bytes(last_blocks(self.spec, state.mask, depth)) for depth in range(blocks + 1)]
        known = {client.key: capacity for client in clients if (capacity := self.capacity(state, client)) is not None}
        for way in ("forward", "backward"):  # a device that claims to be absurdly fast must not set the others' target
            least = statistics.median([getattr(c, way) for c in known.values()] or [0.0]) / FASTEST
            known = {key: replace(c, **{way: max(getattr(c, way), least)}) for key, c in known.items()}
        if not train.steps:  # by epochs each device has steps of its own, here they are one
            examples = {client.key: max(client.examples, 1) for client in clients}
            for key, capacity in known.items():
                steps = train.epochs * -(-examples[key] // train.batch_size)
                known[key] = replace(capacity, forward=steps * capacity.forward, backward=steps * capacity.backward)
        depth = dict.fromkeys((client.key for client in clients), 1)
        if known:
            chosen = depths(list(known.values()), blocks, train.steps or 1, sent, self.options.target, self.options.slack)
            depth |= dict(zip(known, chosen, strict=True))
        for key, blocks_of in depth.items():
            state.clients.setdefault(key, {"uploads": []})["depth"] = blocks_of

    def _bytes(self, mask: RankMask) -> int:
        """Bytes of an update under `mask`."""
        return sum(nbytes(self.settings.wire.up, self.spec.row_lengths(part, mask)) for part in self.parts)

    def client_mask(self, state: State, client: Client) -> RankMask:
        """All slots of the client's last k_i blocks."""
        return last_blocks(self.spec, state.mask, state.clients.get(client.key, {}).get("depth", 1))
