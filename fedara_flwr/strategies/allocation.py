"""Who trains which slots: pure numpy functions from values to values.

FedARA's falling budget and the arbitration of votes; LEGEND's ranks and depths; the first slots for clients of lower rank.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from fedara_flwr.model.ranks import Bools, Ints, RankMask, rank_order
from fedara_flwr.model.spec import ModelSpec

RESOLUTION = 2**20  # a threshold is read as the nearest fraction with a denominator up to this, so 0.6 is 3/5


def budget(server_round: int, rounds: int, first: int, final: int, warmup: int, last: int) -> int:
    """Slots that may be alive after `server_round`: b(t), AdaLoRA's cubic schedule (arXiv 2303.10512, eq. 12).

    `first` for the first `warmup` rounds, `final` for the last `last` ones, floor of the cubic between. The power is taken
    in whole numbers, so every machine floors the same value.
    """
    if server_round <= warmup:
        return first
    if server_round >= rounds - last:
        return final
    left = Fraction(rounds - last - server_round, rounds - last - warmup)
    return int(final + (first - final) * left**3)


@dataclass(frozen=True)
class Vote:
    """One client's ranking of its slots. All clients' count alike, whatever size they say they have.

    Attributes:
        ranks: rank of every alive slot by the client's score, 0 = best; shape (slots,).
        budget: how many of the best it votes for.
    """

    ranks: Ints
    budget: int

    @property
    def keep(self) -> Bools:
        """The client's local mask: the slots it votes for; shape (slots,)."""
        return self.ranks < self.budget


def outvoted(voters: int) -> int:
    """How many clients cannot settle a slot by themselves: a quarter; of three or more at least one."""
    return max(1, voters // 4) if voters > 2 else 0


def counts(votes: Sequence[Vote], slots: int) -> Ints:
    """How many clients voted for each alive slot; shape (slots,)."""
    return np.sum([vote.keep for vote in votes], axis=0, dtype=np.int64) if votes else np.zeros(slots, dtype=np.int64)


def middle(ranks: np.ndarray) -> np.ndarray:
    """Sum of each slot's ranks without the `outvoted` best and worst of them; of shape (votes, slots), then (slots,)."""
    cut = outvoted(len(ranks))
    return np.sort(ranks, axis=0)[cut : len(ranks) - cut].sum(axis=0)


def arbitration_order(votes: Sequence[Vote], slots: int) -> np.ndarray:
    """Slot numbers from best to worst, by votes that a minority cannot turn (this project's reading).

    First slots for which all but `outvoted` clients voted, last those for which no more than these did; among equal ones by
    the trimmed mean of the ranks (as Yin et al., arXiv 1803.01498, trim updates), then by (module, slot).
    """
    bad, votes_for = outvoted(len(votes)), counts(votes, slots)
    agreed = np.where(votes_for >= len(votes) - bad, 2, np.where(votes_for > bad, 1, 0))
    ranks = middle(np.stack([vote.ranks for vote in votes])) if votes else np.zeros(slots)
    return np.lexsort((np.arange(slots), ranks, -agreed))


def arbitrate_budget(mask: RankMask, votes: Sequence[Vote], slots: int) -> RankMask:
    """Exactly min(slots, alive) of the alive slots survive, in arbitration order."""
    keep: Bools = np.zeros(mask.count, dtype=np.bool_)
    keep[arbitration_order(votes, mask.count)[:slots]] = True
    return mask.keep(keep)


def arbitrate_threshold(mask: RankMask, votes: Sequence[Vote], threshold: float, least: int) -> RankMask:
    """A slot survives when the share of clients that voted for it is at least `threshold`.

    Where fewer than `least` would survive, the best others in arbitration order are kept up to that number. Compared in
    whole numbers: votes·q ≥ p·clients for threshold = p/q.
    """
    share = Fraction(threshold).limit_denominator(RESOLUTION)
    keep = counts(votes, mask.count) * share.denominator >= share.numerator * len(votes)
    for slot in arbitration_order(votes, mask.count):
        if int(keep.sum()) >= min(least, mask.count):
            break
        keep[slot] = True
    return mask.keep(keep)


def depth_values(spec: ModelSpec, mask: RankMask, votes: Sequence[Vote], slots: int) -> np.ndarray:
    """V(k): what the `slots` best alive slots in blocks k, k + 1, … are worth, for every k; shape (blocks,).

    A slot is worth its normalised rank among the slots of its kind of module, the clients' trimmed mean (`middle`): 1 for the
    best, 0 below the worst. Kinds, such as all query projections, are ranked apart, since their scores are not of one scale.
    This project's reading, as is all of depth.
    """
    names = [module.name.replace(f".{module.block}.", ".") for module in spec.modules]
    kinds = np.array([names.index(name) for name in names])[mask.modules[mask.bits]]
    blocks = np.array([module.block for module in spec.modules])[mask.modules[mask.bits]]
    worth = np.zeros(mask.count)
    for kind in np.unique(kinds):
        members = np.flatnonzero(kinds == kind)
        within = np.stack([rank_order(-1.0 * vote.ranks[members]) for vote in votes])
        worth[members] = 1 - middle(within) / ((len(votes) - 2 * outvoted(len(votes))) * len(members))
    return np.array([np.sort(worth[blocks >= k])[::-1][:slots].sum() for k in range(spec.blocks)])


def lowest_block(values: np.ndarray, slack: float) -> int:
    """The largest k with V(k) ≥ (1 - slack)·V(0): blocks below it can go."""
    return int(np.flatnonzero(values >= (1 - slack) * values[0])[-1])


def votes_within(votes: Sequence[Vote], mask: RankMask, sub: RankMask) -> list[Vote]:
    """The votes on the alive slots of `mask`, for those alive in `sub` alone, ranked among themselves."""
    inside = sub.bits[mask.bits]
    return [replace(vote, ranks=rank_order(-1.0 * vote.ranks[inside])) for vote in votes]


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
        """t(k): seconds of a round of `steps` steps with k = `depth` trained blocks and `sent` bytes sent back."""
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
    """LEGEND's greedy depth of each device (this project's reading: strategies/legend.py).

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


def last_blocks(spec: ModelSpec, mask: RankMask, depth: int) -> RankMask:
    """The alive slots of `mask` in the last `depth` blocks."""
    block = np.array([module.block for module in spec.modules], dtype=np.int64)
    return RankMask(mask.ranks, mask.bits & (block >= spec.blocks - depth)[mask.modules])


def first_slots(mask: RankMask, rank: int) -> RankMask:
    """The alive slots of `mask` whose index in their module is below `rank`."""
    index = np.concatenate([np.arange(r) for r in mask.ranks]) if mask.ranks else np.zeros(0, dtype=np.int64)
    return RankMask(mask.ranks, mask.bits & (index < rank))
