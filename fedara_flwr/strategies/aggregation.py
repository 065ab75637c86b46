"""How updates merge: pure numpy, accumulated in float64, one update at a time."""

from __future__ import annotations

import numpy as np

from fedara_flwr.ranks import RankMask
from fedara_flwr.spec import Arrays, ModelSpec
from fedara_flwr.wire.plan import Update


class SlotMean:
    """Weighted mean of every number over the clients that sent it (FedAvg, arXiv 1602.05629, factor by factor).

    A slot that nobody sent, and a part that nobody trained, keeps its value. Needs the memory of one model, however many
    clients there are; the result depends on the order of `add` only in float64's last bits, and callers add in sampling
    order.
    """

    memory = "one"

    def __init__(self, spec: ModelSpec, mask: RankMask, arrays: Arrays) -> None:
        """`arrays` is the global model as it was sent, packed under `mask`."""
        self.spec, self.mask, self.arrays = spec, mask, arrays
        self._sums: dict[str, np.ndarray] = {}
        self._weights: dict[str, np.ndarray] = {}

    def add(self, client_key: str, update: Update, weight: int) -> None:
        """Add one client's update with its weight (> 0)."""
        for part, values in update.arrays.items():
            if part not in self._sums:
                self._sums[part] = np.zeros(len(self.arrays[part]), dtype=np.float64)
                self._weights[part] = np.zeros(len(self.arrays[part]), dtype=np.float64)
            if part == "head" or update.mask == self.mask:
                self._sums[part] += float(weight) * values.astype(np.float64)
                self._weights[part] += float(weight)
            else:
                index = self.mask.elements(self.spec.widths(part), update.mask)
                self._sums[part][index] += float(weight) * values.astype(np.float64)
                self._weights[part][index] += float(weight)

    def result(self) -> Arrays:
        """The merged model, float32, packed under the same mask."""
        merged = dict(self.arrays)
        for part, total in self._sums.items():
            weights = self._weights[part]
            mean = total / np.where(weights > 0, weights, 1.0)
            merged[part] = np.where(weights > 0, mean, self.arrays[part]).astype(np.float32)
        return merged
