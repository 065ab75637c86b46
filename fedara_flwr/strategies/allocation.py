"""How the rank budget falls and who gets it: pure numpy functions from values to values (methods.md, FedARA 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from fedara_flwr.ranks import Bools, RankMask
from fedara_flwr.wire.plan import Vote

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
class WeightedVote:
    """One client's vote and its weight, a whole number (examples, or 1)."""

    weight: int
    vote: Vote


def vote_shares(votes: Sequence[WeightedVote], slots: int) -> np.ndarray:
    """Σ n_k·vote_k per alive slot, whole numbers; shape (slots,)."""
    total = np.zeros(slots, dtype=np.int64)
    for item in votes:
        total += item.weight * item.vote.keep.astype(np.int64)
    return total


def mean_scores(votes: Sequence[WeightedVote], slots: int) -> np.ndarray:
    """Weighted sum of slots - rank per slot: the mean rank-normalised score 1 - rank/slots in whole numbers."""
    total = np.zeros(slots, dtype=np.int64)
    for item in votes:
        if item.vote.ranks is not None:
            total += item.weight * (slots - item.vote.ranks.astype(np.int64))
    return total


def arbitration_order(votes: Sequence[WeightedVote], slots: int) -> np.ndarray:
    """Slot numbers from best to worst: by vote share, then by mean rank-normalised score, then by (module, slot)."""
    return np.lexsort((np.arange(slots), -mean_scores(votes, slots), -vote_shares(votes, slots)))


def arbitrate_budget(mask: RankMask, votes: Sequence[WeightedVote], slots: int) -> RankMask:
    """Exactly min(slots, alive) of the alive slots survive, in arbitration order."""
    keep: Bools = np.zeros(mask.count, dtype=np.bool_)
    keep[arbitration_order(votes, mask.count)[:slots]] = True
    return mask.keep(keep)


def arbitrate_threshold(mask: RankMask, votes: Sequence[WeightedVote], threshold: float, least: int) -> RankMask:
    """A slot survives when the weighted share of clients that voted for it is at least `threshold`.

    Where fewer than `least` would survive, the best others in arbitration order are kept up to that number. Compared in
    whole numbers: Σ n_k·vote_k·q ≥ p·Σ n_k for threshold = p/q.
    """
    weights = sum(item.weight for item in votes)
    share = Fraction(threshold).limit_denominator(RESOLUTION)
    keep = vote_shares(votes, mask.count) * share.denominator >= share.numerator * weights
    for slot in arbitration_order(votes, mask.count):
        if int(keep.sum()) >= min(least, mask.count):
            break
        keep[slot] = True
    return mask.keep(keep)
