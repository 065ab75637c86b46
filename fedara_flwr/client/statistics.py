"""The sums that a client tells once, from which the server solves the head (merging/statistics.py). Only sums leave."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedara_flwr.adapters.features import features
from fedara_flwr.adapters.learner import Learner
from fedara_flwr.client.step import Spent, class_counts, count_flops
from fedara_flwr.model.draws import drawn_head
from fedara_flwr.model.statistics import Floats, Statistics
from fedara_flwr.tasks.base import Encoded


@dataclass(frozen=True)
class Told:
    """What a client may tell.

    Attributes:
        statistics: of the classes that have rows enough.
        left_out: rows of classes that have too few.
        metrics: what the pass took; names as of training.
    """

    statistics: Statistics
    left_out: int
    metrics: dict[str, Any]


def some(data: Encoded, most: int, rng: np.random.Generator) -> Encoded:
    """At most so many of a client's rows, drawn; all by 0."""
    if not 0 < most < len(data):
        return data
    chosen = np.sort(rng.choice(len(data), most, replace=False)).tolist()
    return Encoded([data.ids[i] for i in chosen], [data.labels[i] for i in chosen])


def gather(learner: Learner, data: Encoded, seed: int, scatter: bool, least: int, batch_tokens: int, simulated: bool) -> Told:
    """One pass over a client's rows, without gradients.

    Args:
        seed: the run's, from which the head is drawn that lies before the last layer.
        scatter: whether to tell how the features spread.
        least: rows below which a class is left out.

    Raises:
        ConfigError: as `features`.
    """
    began, spent = time.perf_counter(), Spent(rows=len(data))
    counts = class_counts(data, len(learner.adapted.backbone.labels))
    enough = counts >= least

    def told() -> Iterator[tuple[Floats, NDArray[np.int64]]]:
        for rows in features(learner, data, drawn_head(learner.adapted.spec, seed), batch_tokens):
            spent.tokens += rows.tokens
            kept = enough[rows.classes]
            yield rows.features[kept], rows.classes[kept]

    statistics = Statistics.of(told(), len(counts), scatter)
    metrics: dict[str, Any] = {"tokens": spent.tokens}
    if simulated:
        metrics |= {f"flops-{name}": value for name, value in count_flops(learner, frozenset(), spent, whole=True).items()}
    return Told(statistics, int(counts[~enough].sum()), metrics | {"seconds-all": time.perf_counter() - began})
