"""Who holds what in a simulation: the server's validation and test data, and each client's share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedara_flwr import seeds
from fedara_flwr.config import DataSettings
from fedara_flwr.data.examples import Examples
from fedara_flwr.data.partitions import by_hash, partition, split
from fedara_flwr.data.reading import Reader
from fedara_flwr.data.sources import load
from fedara_flwr.keys import ConfigError


@dataclass(frozen=True)
class Federation:
    """One data set, split between the server and its clients.

    Attributes:
        pool: training rows that clients share among them.
        validation: rows for the server's curves and for tuning.
        test: rows for one evaluation at the end.
        labels: label names in order; () where the task has none.
        digest: sha256 of the pool; server and simulated clients compare it.
        skipped: a line for each part of the source of which rows were left out.
    """

    pool: Examples
    validation: Examples
    test: Examples
    labels: tuple[str, ...]
    digest: str
    skipped: tuple[str, ...] = ()


@lru_cache(maxsize=4)
def federation(settings: DataSettings, seed: int, reader: Reader) -> Federation:
    """The run's data, loaded and split once per process; `reader` is the task, made with these settings.

    Raises:
        ConfigError: as `load`, or for fewer than two rows to train on.
    """
    data = load(settings, seed, reader)
    if len(data.train) < 2:
        raise ConfigError(f"data.path = {settings.path!r}: {len(data.train)} rows to train on, at least 2 are needed")
    rest, held_out = data.train, data.validation
    if held_out is None:
        pool, validation = split(data.train, seed, settings.validation)
        rest, held_out = data.train.take(pool), data.train.take(validation)
    held_out = _first(held_out, seed, settings.validation_rows)
    test = _first(data.test, seed, settings.test_rows)
    return Federation(rest, held_out, test, data.labels, rest.digest(), data.skipped)


def _first(examples: Examples, seed: int, most: int) -> Examples:
    """At most so many rows, chosen by hash; all by 0."""
    return examples.take(np.sort(by_hash(examples, seed)[:most])) if 0 < most < len(examples) else examples


@lru_cache(maxsize=4)
def shares(settings: DataSettings, seed: int, reader: Reader, clients: int) -> list[np.ndarray]:
    """Row numbers of the pool for each client."""
    return partition(federation(settings, seed, reader).pool, settings, clients, seed)


def hold_out(examples: Examples, settings: DataSettings, seed: int, client_key: str) -> tuple[Examples, Examples]:
    """A client's (training, own evaluation) rows by `data.client-validation`."""
    if not settings.client_validation or len(examples) < 2:
        return examples, examples.take([])
    train, own = split(examples, seeds.derive(seed, "client-validation", client_key), settings.client_validation)
    return examples.take(train), examples.take(own)
