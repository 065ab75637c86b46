"""Merging that keeps every client's factors, so that the sum of their products stays exact. numpy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedara_flwr.merging.factors import module_factors
from fedara_flwr.merging.mean import SlotMean
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import Arrays, ModelSpec
from fedara_flwr.wire.plan import Update


class FactorStack:
    """Keeps every client's factors: the exact weighted sum of products is their concatenation (FLoRA, arXiv 2409.05976).

    B·diag(E) and A of each client stand side by side, the weight (its share of all weights) on B alone. Parts without slots
    are averaged as in SlotMean. Memory grows with the clients of a round.
    """

    memory = "stack"

    def __init__(self, spec: ModelSpec, mask: RankMask, arrays: Arrays, scales: Sequence[float]) -> None:
        self.spec, self.mean, self.scales = spec, SlotMean(spec, mask, arrays), scales
        self._factors: list[tuple[int, RankMask, list[tuple[np.ndarray, np.ndarray]]]] = []

    def add(self, client_key: str, update: Update, weight: int) -> None:
        """Add one client's update with its weight (> 0)."""
        self.mean.add_weighted(update, float(weight))  # products are kept, so there is no error of factors to report
        self._factors.append((weight, update.mask, module_factors(self.spec, update.mask, update.arrays)))

    def result(self) -> Arrays:
        """The means of all parts, as SlotMean's."""
        return self.mean.result()

    def report(self) -> dict[str, object]:
        """No figures of its own: {}."""
        return {}

    def stacked(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per module [s·w_1·B_1, s·w_2·B_2, …] of shape (d_out, Σk) and [A_1; A_2; …] of shape (Σk, d_in), float64."""
        total = sum(weight for weight, *_ in self._factors)
        return self._join(lambda m, weight, mask: weight / total)

    def residual(self, means: Arrays) -> list[tuple[np.ndarray, np.ndarray]]:
        """Factors of s·(mean of products - product of means), slot by slot over the clients that hold it; float64.

        Args:
            means: what `result` gave.
        """
        whole = self.mean.mask
        alive = [whole.module(m) for m in range(len(whole.ranks))]
        held = [(weight, [mask.module(m)[bits] for m, bits in enumerate(alive)]) for weight, mask, _ in self._factors]
        weights = [np.sum([weight * bits[m] for weight, bits in held], axis=0) for m in range(len(alive))]
        pairs = self._join(lambda m, weight, mask: weight / weights[m][mask.module(m)[alive[m]]])
        residuals = []
        for m, (b, a) in enumerate(module_factors(self.spec, whole, means)):
            sent = weights[m] > 0  # a slot that nobody sent kept its value, nothing of it is residual
            (left, right), scale = pairs[m], self.scales[m]
            residuals.append((np.concatenate([left, -scale * b[:, sent]], axis=1), np.concatenate([right, a[sent]])))
        return residuals

    def _join(self, share: Callable[[int, int, RankMask], Any]) -> list[tuple[np.ndarray, np.ndarray]]:
        """All clients' factors side by side, s·share(module, weight, mask) on the left ones."""
        pairs = []
        for m, scale in enumerate(self.scales):
            lefts = [scale * share(m, weight, mask) * pair[m][0] for weight, mask, pair in self._factors]
            pairs.append((np.concatenate(lefts, axis=1), np.concatenate([pair[m][1] for *_, pair in self._factors])))
        return pairs
