"""Means of updates: accumulated in float64, one update at a time. numpy only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from fedara_flwr.model.parts import SLOT_PARTS, is_slot_part
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import Arrays, ModelSpec
from fedara_flwr.wire.plan import Update


class SlotMean:
    """Weighted mean of every number over the clients that sent it (FedAvg, arXiv 1602.05629, factor by factor).

    A slot that nobody sent, and a part that nobody trained, keeps its value. Needs the memory of one model, however many
    clients there are; the result depends on the order of `add` only in float64's last bits, and callers add in the
    round's order.
    """

    memory = "one"

    def __init__(self, spec: ModelSpec, mask: RankMask, arrays: Arrays) -> None:
        """`arrays` is the global model as it was sent, packed under `mask`."""
        self.spec, self.mask, self.arrays = spec, mask, arrays
        self._error = FactorError(spec, mask)
        self._sums: dict[str, np.ndarray] = {}
        self._weights: dict[str, np.ndarray] = {}

    def add(self, client_key: str, update: Update, weight: int) -> None:
        """Add one client's update with its weight (> 0)."""
        self._error.add(update, weight)
        self.add_weighted(update, float(weight))

    def add_weighted(self, update: Update, weight: float) -> None:
        """`add` without the probe of the factors' error, with any weight that is not negative."""
        for part, values in update.arrays.items():
            if part not in self._sums:
                size = len(self.arrays[part])
                self._sums[part] = np.zeros(size, dtype=np.float64)
                self._weights[part] = np.zeros(size if is_slot_part(part) else 1, dtype=np.float64)
            places = self.spec.places(part, self.mask, update.mask)
            self._sums[part][places] += weight * values.astype(np.float64)
            self._weights[part][places] += weight

    def result(self) -> Arrays:
        """The merged model, float32, packed under the same mask."""
        merged = dict(self.arrays)
        for part, total in self._sums.items():
            weights = self._weights[part]
            mean = total / np.where(weights > 0, weights, 1.0)
            merged[part] = np.where(weights > 0, mean, self.arrays[part]).astype(np.float32)
        self._error.compare(merged)
        return merged

    def report(self) -> dict[str, object]:
        """`factor-error`, where the factors of all clients were averaged."""
        return {} if self._error.value is None else {"factor-error": self._error.value}


class FactorError:
    """Estimate of how far the product of averaged factors is from the average of products, relative to the latter.

    ‖B̄·diag(Ē)·Ā - mean(B·diag(E)·A)‖ / ‖mean(B·diag(E)·A)‖, estimated on up to `PROBED` living modules spread over the
    model, with one Gaussian vector each: ‖M·z‖² has the mean ‖M‖²_F. That costs less than 5% of the merge
    (benchmarks/speed), where the products themselves would cost many times as much.
    """

    PROBED = 2

    def __init__(self, spec: ModelSpec, mask: RankMask) -> None:
        self.value: float | None = None
        self._spec, self._mask = spec, mask
        self._counts = mask.alive.tolist()
        alive = np.flatnonzero(self._counts)
        places: Any = np.unique(np.linspace(0, len(alive) - 1, self.PROBED).round().astype(int)) if len(alive) else []
        self._modules = [int(m) for m in alive[places]] if len(alive) else []
        self._probes = {
            m: np.random.default_rng(m).standard_normal(spec.modules[m].d_in).astype(np.float32) for m in self._modules
        }
        self._sums = {m: np.zeros(spec.modules[m].d_out) for m in self._modules}
        self._weights = dict.fromkeys(self._modules, 0.0)
        self._cuts: tuple[RankMask, dict[int, dict[str, slice]]] | None = None

    def _apply(self, arrays: Arrays, mask: RankMask, m: int) -> np.ndarray:
        """B·diag(E)·A·z of one module; `arrays` have all three."""
        if self._cuts is None or self._cuts[0] is not mask:
            alive = mask.alive
            before = np.concatenate([[0], np.cumsum(alive)])
            ends = {p: np.concatenate([[0], np.cumsum(alive * np.array(self._spec.widths(p)))]) for p in ("B", "A")}
            ends["E"] = before
            self._cuts = mask, {i: {p: slice(int(e[i]), int(e[i + 1])) for p, e in ends.items()} for i in self._modules}
        cuts, count = self._cuts[1][m], self._counts[m]
        inner = arrays["A"][cuts["A"]].reshape(count, -1) @ self._probes[m] * arrays["E"][cuts["E"]]
        return inner @ arrays["B"][cuts["B"]].reshape(count, -1)

    def add(self, update: Update, weight: int) -> None:
        """Add one client's products, of the modules that it holds."""
        if not {"B", "A"} <= update.arrays.keys():
            self._modules = [] if update.mask.count else self._modules
            return
        mask = self._mask if update.mask == self._mask else update.mask  # the very one, whose cuts are known
        arrays = self._spec.complete(update.arrays, mask)
        for m in list(self._modules):
            if mask is self._mask or np.array_equal(mask.module(m), self._mask.module(m)):
                with np.errstate(over="ignore", invalid="ignore"):  # an absurd update must not do more than spoil this figure
                    self._sums[m] += weight * self._apply(arrays, mask, m).astype(np.float64)
                self._weights[m] += weight
            elif mask.module(m).any():
                self._modules.remove(m)

    def compare(self, merged: Arrays) -> None:
        """Set `value`; it stays None where not both of B and A are trained, or clients hold parts of the probed modules."""
        exact, off = 0.0, 0.0
        merged = self._spec.complete(merged, self._mask)
        for m in self._modules:
            if self._weights[m]:
                mean = self._sums[m] / self._weights[m]
                with np.errstate(over="ignore", invalid="ignore"):
                    exact += float(mean @ mean)
                    off += float(np.square(self._apply(merged, self._mask, m) - mean).sum())
        if exact > 0 and np.isfinite(off / exact):
            self.value = (off / exact) ** 0.5


class PaddedMean(SlotMean):
    """Weighted mean over all clients, slots that one did not send counting as 0 (HetLoRA, arXiv 2401.06432, section 3.2).

    A slot that nobody sent keeps its value (this project's reading): as 0 in both A and B it could never learn again.
    `client_weight` gives each update's weight in the slot parts, which counts up to `cap` times the round's median (this
    project's reading; 0 = all of it), so updates are kept until all are there. All other parts are averaged as in SlotMean.
    """

    memory = "all"

    def __init__(
        self, spec: ModelSpec, mask: RankMask, arrays: Arrays, client_weight: Callable[[Update], float], cap: float = 0.0
    ) -> None:
        super().__init__(spec, mask, arrays)
        self._of, self._cap, self._all = client_weight, cap, 0.0
        self._held: list[tuple[Update, float, int]] = []

    def add(self, client_key: str, update: Update, weight: int) -> None:
        """Keep one client's update; `weight` counts for the parts without slots."""
        self._held.append((update, self._of(update), weight))

    def result(self) -> Arrays:
        """The merged model; unlike SlotMean's, slots are divided by the weights of all clients, whether sent or not."""
        own = [norm for _, norm, _ in self._held if norm > 0]
        most = self._cap * statistics.median_low(own) if own and self._cap else math.inf
        for update, norm, weight in self._held:
            for slots, share in ((True, min(norm, most)), (False, float(weight))):
                parts = {part: values for part, values in update.arrays.items() if is_slot_part(part) == slots}
                self.add_weighted(replace(update, arrays=parts), share)
            self._all += min(norm, most)
        merged = super().result()
        for part in self._sums.keys() & set(SLOT_PARTS):
            if self._all > 0:
                padded = self._sums[part] / self._all
                merged[part] = np.where(self._weights[part] > 0, padded, self.arrays[part]).astype(np.float32)
        return merged
