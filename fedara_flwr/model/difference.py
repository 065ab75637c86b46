"""How far an update moved: differences, their length, and cutting them to one. float64."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, sqrt

import numpy as np
from numpy.typing import NDArray

from fedara_flwr.model.spec import Arrays

Difference = dict[str, NDArray[np.float64]]


def difference(arrays: Arrays, before: Arrays) -> Difference:
    """`arrays` minus `before`, part by part, for the parts of `arrays`."""
    return {name: values.astype(np.float64) - before[name] for name, values in arrays.items()}


def length(moved: Difference) -> float:
    """The Euclidean length of a difference over all its parts together; not finite where a number is not."""
    return sqrt(sum(float(change @ change) for change in moved.values()))


def peaks(moved: Difference) -> dict[str, float]:
    """The largest single change of each part."""
    return {name: float(np.abs(change).max(initial=0.0)) for name, change in moved.items()}


def share_within(moved: Difference, limit: float) -> float:
    """What a difference must be multiplied by to be no longer than `limit`: 1 where it is not; 0 where it is not finite."""
    size = length(moved)
    if not size < inf:
        return 0.0
    return min(1.0, limit / size) if size else 1.0


def root_mean_squares(moved: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
    """Length of each part over the root of how many numbers it has; parts without numbers are left out."""
    return {name: float(np.sqrt(change @ change / len(change))) for name, change in moved.items() if len(change)}
