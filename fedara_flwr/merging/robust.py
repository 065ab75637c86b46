"""Robust merging: rules that a minority of bad updates cannot move far. numpy only.

Each rule is defined for updates that hold different slots: number by number over the clients that sent it. Weights do not
count in "median" and "trimmed-mean"; a number that nobody sent keeps its value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fedara_flwr.merging.mean import SlotMean
from fedara_flwr.merging.merger import Merger
from fedara_flwr.model.difference import difference, length, share_within
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import Arrays, ModelSpec
from fedara_flwr.wire.plan import Update


class KeepAll(ABC):
    """Base of rules that need all updates of a round at once: memory for as many models as there are clients."""

    memory = "all"

    def __init__(self, spec: ModelSpec, mask: RankMask, arrays: Arrays) -> None:
        """`arrays` is the global model as it was sent, packed under `mask`."""
        self.spec, self.mask, self.arrays = spec, mask, arrays
        self._updates: list[tuple[str, Update, int]] = []

    def add(self, client_key: str, update: Update, weight: int) -> None:
        """Keep one client's update and weight until `result`."""
        self._updates.append((client_key, update, weight))

    @abstractmethod
    def result(self) -> Arrays:
        """The merged model, float32, packed under the same mask."""

    def report(self) -> dict[str, object]:
        """No figures of its own: {}."""
        return {}

    def _spread(self, part: str, update: Update) -> np.ndarray:
        """One client's numbers of a part at their places in the global one, NaN where it sent none; float64."""
        if part not in update.arrays:
            return np.full(len(self.arrays[part]), np.nan)
        values = update.arrays[part].astype(np.float64)
        return self.spec.scatter(part, values, self.mask, update.mask, np.full(len(self.arrays[part]), np.nan))

    def _parts(self) -> list[str]:
        return [part for part in self.arrays if any(part in update.arrays for _, update, _ in self._updates)]


class TrimmedMean(KeepAll):
    """Mean of what is left when the largest and the smallest share of the values is cut off (Yin et al., arXiv 1803.01498).

    Of m values of a number floor(trim·m) are cut at each end, at most so many that one or two are left.
    """

    def __init__(self, spec: ModelSpec, mask: RankMask, arrays: Arrays, trim: float) -> None:
        """`trim` from 0 (mean) to 0.5 (median)."""
        super().__init__(spec, mask, arrays)
        self.trim = trim

    def result(self) -> Arrays:
        """The merged model, float32, packed under the same mask: of each number the mean of what is not cut off."""
        merged = dict(self.arrays)
        for part in self._parts():
            values = np.stack([self._spread(part, update) for _, update, _ in self._updates])
            values.sort(axis=0)  # NaN last
            count = np.isfinite(values).sum(axis=0)
            cut = np.minimum((self.trim * count + 1e-9).astype(np.int64), np.maximum(count - 1, 0) // 2)
            place = np.arange(len(values))[:, None]
            kept = (place >= cut) & (place < count - cut)
            mean = np.where(kept, values, 0.0).sum(axis=0) / np.maximum(kept.sum(axis=0), 1)
            merged[part] = np.where(count > 0, mean, self.arrays[part]).astype(np.float32)
        return merged


class MultiKrum(KeepAll):
    """Weighted mean of the updates that lie closest together (Blanchard et al., NeurIPS 2017).

    Of K updates, f = floor(attackers·K) are left out: those with the largest sum of squared distances to their K - f - 2
    nearest neighbours, or f where that is more (this project's reading for K below 2f + 2, where f equal attackers would be
    one another's only neighbours). The distance of two updates is that over the numbers that both sent, scaled up to all of
    them (this project's reading for unequal updates).
    """

    def __init__(self, spec: ModelSpec, mask: RankMask, arrays: Arrays, attackers: float) -> None:
        """`attackers`: share of bad clients that is reckoned with, below 0.5."""
        super().__init__(spec, mask, arrays)
        self.attackers = attackers
        self.left_out: list[str] = []

    def result(self) -> Arrays:
        """SlotMean's result over the chosen updates; `left_out` then names the other clients."""
        mean = SlotMean(self.spec, self.mask, self.arrays)
        chosen = self._choose()
        self.left_out = [key for i, (key, _, _) in enumerate(self._updates) if i not in chosen]
        for i in sorted(chosen):
            mean.add(*self._updates[i])
        return mean.result()

    def report(self) -> dict[str, object]:
        """`left-out-by-krum`: the keys of the clients whose updates were left out."""
        return {"left-out-by-krum": self.left_out}

    def _choose(self) -> set[int]:
        count = len(self._updates)
        bad = int(self.attackers * count + 1e-9)
        if not bad:
            return set(range(count))
        squares, common = np.zeros((count, count)), np.zeros((count, count))
        for part in self._parts():
            rows = np.stack([self._spread(part, update) for _, update, _ in self._updates])
            there = np.isfinite(rows)
            for i in range(count):
                both = there & there[i]
                squares[i] += np.where(both, np.square(np.where(both, rows - rows[i], 0.0)), 0.0).sum(axis=1)
                common[i] += both.sum(axis=1)
        distances = squares / np.maximum(common, 1)
        np.fill_diagonal(distances, np.inf)
        near = max(bad, count - bad - 2)
        scores = np.sort(distances, axis=1)[:, :near].sum(axis=1)
        return {int(i) for i in np.argsort(scores, kind="stable")[: count - bad]}


class NormClip(SlotMean):
    """Weighted mean of updates whose difference from the sent model is cut to a length (Sun et al., arXiv 1911.07963).

    The length is the median of the lengths of the clients that are kept in memory until the round's last one is there.
    """

    memory = "all"

    def __init__(self, spec: ModelSpec, mask: RankMask, arrays: Arrays) -> None:
        super().__init__(spec, mask, arrays)
        self._held: list[tuple[str, Update, int]] = []
        self._clipped = 0

    def add(self, client_key: str, update: Update, weight: int) -> None:
        """Keep one client's update and weight until `result`."""
        self._held.append((client_key, update, weight))

    def result(self) -> Arrays:
        """SlotMean's result over the clipped updates."""
        sent = [self.spec.slice(self.arrays, self.mask, update.mask) for _, update, _ in self._held]
        moved = [difference(update.arrays, before) for (_, update, _), before in zip(self._held, sent, strict=True)]
        limit = float(np.median([size for size in map(length, moved) if size > 0] or [0.0]))
        for (key, update, weight), before, change in zip(self._held, sent, moved, strict=True):
            if length(change) > limit:
                self._clipped += 1
                share = share_within(change, limit)
                cut = {part: (before[part] + share * values).astype(np.float32) for part, values in change.items()}
                update = replace(update, arrays=cut)
            super().add(key, update, weight)
        return super().result()

    def report(self) -> dict[str, object]:
        """`clipped`, how many updates were cut, beside SlotMean's."""
        return {**super().report(), "clipped": self._clipped}


Make = Callable[[ModelSpec, RankMask, Arrays, float], Merger]
RULES: dict[str, Make] = {
    "mean": lambda spec, mask, arrays, attackers: SlotMean(spec, mask, arrays),
    "median": lambda spec, mask, arrays, attackers: TrimmedMean(spec, mask, arrays, 0.5),
    "trimmed-mean": lambda spec, mask, arrays, attackers: TrimmedMean(spec, mask, arrays, attackers),
    "norm-clip": lambda spec, mask, arrays, attackers: NormClip(spec, mask, arrays),
    "multi-krum": lambda spec, mask, arrays, attackers: MultiKrum(spec, mask, arrays, attackers),
}
