"""Sums of features by class: what one client, or all of them, tell of what enters the head's last layer. numpy only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    def of(cls, batches: Iterable[tuple[Floats, NDArray[np.int64]]], count: int, scatter: bool = True) -> Statistics:
        """Of rows that come in batches, of which none is kept: features (n, d), and their classes (n,), below `count`.

        Squares are summed about the first batch's mean, so that a large common part of the features costs no digits.
        """
        counts, sums, squares, middle = np.zeros(count), np.zeros((count, 0)), np.zeros((0, 0)), np.zeros(0)
        for features, classes in batches:
            if not counts.any():
                width = features.shape[1]
                middle = features.mean(axis=0) if len(features) else np.zeros(width)
                sums, squares = np.zeros((count, width)), np.zeros((width, width))
            apart = features - middle
            counts += np.bincount(classes, minlength=count)
            np.add.at(sums, classes, apart)
            if scatter:
                squares += apart.T @ apart
        means = sums / np.maximum(counts, 1.0)[:, None]
        scaled = means * np.sqrt(counts)[:, None]
        freedom = float(counts.sum() - (counts > 0).sum())
        within = None
        if scatter:
            within = squares - scaled.T @ scaled if freedom else np.zeros_like(squares)
            np.fill_diagonal(within, np.maximum(np.diag(within), 0.0))  # what is left of rounding may be below
        means[counts > 0] += middle
        return cls(counts, means, within, freedom)

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
