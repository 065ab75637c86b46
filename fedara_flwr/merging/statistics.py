"""A head in closed form: class counts, class means and one covariance of what enters its last layer, merged over clients.

Sums over clients do not depend on who holds which row, so label skew costs such a head nothing. The classes are taken as
normal with one covariance (linear discriminant analysis); the covariance is shrunk by a published rule, the scale of the
logits fitted. With class means alone the covariance is estimated from how the clients' means differ (FedCOF, arXiv 2412.14326).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedara_flwr.model.statistics import TINY, Floats, Statistics

RIDGE = 0.01  # over the mean square of a feature, as Fed3R (arXiv 2406.01116) has it over features of length 1
FAR = 3.0  # times what is usual among clients, beyond which a robust run leaves something out
COOLEST, HOTTEST = 1e-3, 1e2


@dataclass(frozen=True)
class Merged:
    """What all clients' statistics say of the classes.

    Attributes:
        counts: rows of each class, by weight, shape (C,).
        means: their mean features, shape (C, d); 0 where nobody has a row.
        covariance: within the classes, shape (d, d), positive semi-definite.
        freedom: degrees of freedom that it was estimated with; 0 = nothing is known of it.
        diversity: entropy of a client's labels over that of all clients' labels, mean by their rows: 1 where labels are spread
            evenly, 0 where every client has one.
    """

    counts: Floats
    means: Floats
    covariance: Floats
    freedom: float
    diversity: float


def merge(clients: Mapping[str, Statistics], far: float = 0.0) -> Merged:
    """Merge by sums, in the sorted order of the clients' keys: the bits do not depend on who answered first.

    The covariance comes from what is within the clients, Σ scatter over n - C degrees of freedom, and from how their means of a
    class differ, Σ n·(m_k - m)(m_k - m)ᵀ over the number of means less that of the classes. All of both is the exact covariance
    within the classes; the second alone is FedCOF's.

    Args:
        far: as in `believable`; 0 = all is believed.
    """
    told = [clients[key] for key in sorted(clients, key=lambda key: (len(key), key))]
    if far:
        told = believable(told, far)
    counts = np.sum([one.counts for one in told], axis=0)
    means = np.sum([one.counts[:, None] * one.means for one in told], axis=0) / np.maximum(counts, TINY)[:, None]
    scatter, freedom = np.zeros((means.shape[1], means.shape[1])), -float((counts > 0).sum())
    for one in told:
        has = one.counts > 0
        apart = (one.means - means)[has] * np.sqrt(one.counts[has])[:, None]
        scatter += apart.T @ apart
        freedom += float(has.sum())
        if one.scatter is not None:
            scatter += one.scatter
            freedom += one.freedom
    return Merged(counts, means, *_over(scatter, freedom), _diversity(told, counts))


def _diversity(told: Sequence[Statistics], counts: Floats) -> float:
    whole = _entropy(counts) * counts.sum()
    return min(1.0, sum(_entropy(one.counts) * one.rows for one in told) / whole) if whole > 0 else 1.0


def _entropy(counts: Floats) -> float:
    """Of the classes' shares, in nats; 0 where there is no row."""
    shares = counts[counts > 0] / max(counts.sum(), TINY)
    return float(-(shares * np.log(shares)).sum())


def believable(told: Sequence[Statistics], far: float = FAR) -> list[Statistics]:
    """The clients' statistics without what stands far from the others' (this project's reading).

    A client's mean of a class is left out where its squared distance from the class's median, number by number over the clients
    that have the class (Yin et al., arXiv 1803.01498), is over far² times the median of these, and over far² times what chance
    explains of a mean of so many rows. A scatter is left out where its trace or its largest eigenvalue per degree of freedom
    is over `far` times the clients' median, or its trace below a `far`-th of it. Of a class that only one or two clients have,
    nothing can be told.

    Args:
        far: at least 1.
    """
    counts, all_means = np.array([one.counts for one in told]), np.array([one.means for one in told])
    traces, tops = np.array([one.variance for one in told]), np.array([one.largest for one in told])
    distances = np.full(counts.shape, np.nan)
    for label in range(counts.shape[1]):
        having = np.flatnonzero(counts[:, label] > 0)
        if len(having) > 2:
            means = all_means[having, label]
            distances[having, label] = ((means - np.median(means, axis=0)) ** 2).sum(axis=1)
    trace, top = _median(traces), _median(tops)
    chance = trace if np.isfinite(trace) else _median(counts * distances)  # of a single row
    for own, apart in zip(counts.T, distances.T, strict=True):  # views: what is set to 0 is so in `counts`
        if np.isfinite(apart).any():
            own[apart > far**2 * np.maximum(np.nanmedian(apart), chance / np.maximum(own, 1.0))] = 0.0
    kept = []
    for one, own, own_trace, own_top in zip(told, counts, traces, tops, strict=True):
        sound = trace / far <= own_trace <= far * trace and own_top <= far * top
        kept.append(Statistics(own, one.means, one.scatter if sound else None, one.freedom))
    return kept


def _median(values: Floats) -> float:
    """The median of what is known; NaN where nothing is."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else np.nan


def _over(scatter: Floats, freedom: float) -> tuple[Floats, float]:
    """A scatter over its degrees of freedom, symmetric and without negative eigenvalues."""
    if freedom <= 0:
        return np.zeros_like(scatter), 0.0
    values, vectors = np.linalg.eigh((scatter + scatter.T) / (2 * freedom))
    return (vectors * np.maximum(values, 0.0)) @ vectors.T, freedom


def shrunk(covariance: Floats, freedom: float) -> tuple[Floats, float]:
    """The covariance moved towards its mean variance times the identity, and by which share.

    Oracle-approximating shrinkage (Chen, Wiesel, Eldar and Hero 2010, eq. 23), which needs the covariance and the number of
    rows alone. Where nothing is known of it, the identity.
    """
    width = len(covariance)
    mean = float(np.trace(covariance)) / width
    if freedom <= 0 or mean <= 0:
        return np.eye(width), 1.0
    square = float((covariance**2).sum())
    total = (mean * width) ** 2
    below = (freedom + 1 - 2 / width) * (square - total / width)
    share = 1.0 if below <= 0 else min(1.0, ((1 - 2 / width) * square + total) / below)
    return (1 - share) * covariance + share * mean * np.eye(width), share


def solve(merged: Merged, bias: bool, variance: float = 1.0) -> tuple[Floats, Floats, float]:
    """Weights (C, d), biases (C,) and the covariance's share of shrinkage of the last layer.

    With a bias: linear discriminant analysis. Without one, where a layer has none: least squares to the classes' indicators,
    through the origin. Classes weigh as often as they occur. A class without a row is never chosen: it has weights 0 and
    the lowest bias of all, or, without biases, the mean of the others' weights: unless there is but one other
    class, no row is nearest to that.

    Args:
        variance: mean variance within the classes by other knowledge, for where the sums tell nothing of it.
    """
    seen = merged.counts > 0
    covariance, share = shrunk(merged.covariance, merged.freedom)
    covariance = covariance if merged.freedom > 0 else variance * covariance
    weights, biases = np.zeros_like(merged.means), np.zeros(len(seen))
    means = merged.means[seen]
    if bias:
        centre = merged.counts[seen] @ means / merged.counts[seen].sum()
        weights[seen] = np.linalg.solve(covariance, (means - centre).T).T
        prior = np.log(merged.counts[seen] / merged.counts[seen].sum())
        biases[seen] = prior - 0.5 * (weights[seen] * (means + centre)).sum(axis=1)
        biases[~seen] = biases[seen].min() - 1.0
    else:
        often = (merged.counts[seen] / merged.counts[seen].sum())[:, None]
        second = covariance + means.T @ (often * means)
        second += RIDGE * np.trace(second) / len(second) * np.eye(len(second))
        weights[seen] = np.linalg.solve(second, (often * means).T).T
        weights[~seen] = weights[seen].mean(axis=0)
    return weights, biases, share


def variance_within(features: Floats, classes: NDArray[np.int64]) -> float:
    """Mean variance within the classes of labelled rows, shape (n, d); 1 where no class has two rows that differ."""
    apart, freedom = 0.0, 0
    for label in np.unique(classes):
        own = features[classes == label]
        apart += float(((own - own.mean(axis=0)) ** 2).sum())
        freedom += (len(own) - 1) * own.shape[1]
    return apart / freedom if apart > 0 else 1.0


def temperature(logits: Floats, classes: NDArray[np.int64], bias: bool) -> float:
    """The factor on `logits`, shape (n, C), that makes the cross-entropy of `classes` smallest: golden section on its log.

    With a `bias` the logits are log-probabilities already, and the factor is at most 1: few rows, all of them right, would
    want it without end. Without rows it is 1.
    """
    if not len(classes):
        return 1.0

    def loss(log_factor: float) -> float:
        scaled = logits * np.exp(log_factor)
        scaled = scaled - scaled.max(axis=1, keepdims=True)
        return float((np.log(np.exp(scaled).sum(axis=1)) - scaled[np.arange(len(classes)), classes]).mean())

    return float(np.exp(_golden(loss, np.log(COOLEST), np.log(1.0 if bias else HOTTEST))))


def _golden(value: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one minimum has it, to a thousandth of a thousandth."""
    ratio = (5**0.5 - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = value(left), value(right)
    while high - low > 1e-6:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = value(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = value(right)
    return (low + high) / 2
