"""Sums of features by class: what one client, or all of them, tell of what enters the head's last layer. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ITERATIONS = 16
TINY = 1e-300


@dataclass(frozen=True)
class Statistics:
    """What one client, or all of them, tell of the features of C classes, d numbers each.

    Attributes:
        counts: rows of each class, shape (C,), float64 since a client's weight may be cut.
        means: mean feature of each class, shape (C, d); 0 where there is no row.
        scatter: Σ over rows of (x - m)(x - m)ᵀ, m the mean of the row's class, shape (d, d); None where it is not told.
        freedom: degrees of freedom of the scatter: rows less classes.
    """

    counts: Floats
    means: Floats
    scatter: Floats | None
    freedom: float

    @classmethod
    def of(cls, features: Floats, classes: NDArray[np.int64], count: int, scatter: bool = True) -> Statistics:
        """Of rows: `features` has shape (n, d), `classes` shape (n,) with numbers below `count`."""
        counts = np.bincount(classes, minlength=count).astype(np.float64)
        sums = np.zeros((count, features.shape[1]))
        np.add.at(sums, classes, features)
        means = sums / np.maximum(counts, 1.0)[:, None]
        apart = features - means[classes] if scatter else None
        freedom = float(counts.sum() - (counts > 0).sum())
        return cls(counts, means, None if apart is None else apart.T @ apart, freedom)

    @property
    def rows(self) -> float:
        """How many rows there are, by weight."""
        return float(self.counts.sum())

    @property
    def variance(self) -> float:
        """Trace of the scatter over its degrees of freedom; NaN where it tells nothing."""
        return float(np.trace(self.scatter)) / self.freedom if self.scatter is not None and self.freedom > 0 else np.nan

    @property
    def largest(self) -> float:
        """Largest eigenvalue of the scatter over its degrees of freedom, from below by power iteration; NaN without any."""
        if self.scatter is None or not self.freedom > 0:
            return np.nan
        vector = self.scatter[:, int(np.diag(self.scatter).argmax())]
        for _ in range(ITERATIONS):
            vector = self.scatter @ (vector / max(float(np.linalg.norm(vector)), TINY))
        return float(np.linalg.norm(vector)) / self.freedom

    def weighted(self, share: float) -> Statistics:
        """The same as if `share` times as many rows had been seen."""
        scatter = None if self.scatter is None else self.scatter * share
        return Statistics(self.counts * share, self.means, scatter, self.freedom * share)


def upper(matrix: Floats) -> Floats:
    """The upper triangle row by row, diagonal included: what travels of a scatter, d·(d + 1)/2 numbers."""
    return matrix[np.triu_indices(len(matrix))]


def from_upper(numbers: Sequence[float] | Floats, width: int) -> Floats:
    """The symmetric matrix whose upper triangle these are."""
    matrix = np.zeros((width, width))
    matrix[np.triu_indices(width)] = numbers
    return matrix + np.triu(matrix, 1).T
