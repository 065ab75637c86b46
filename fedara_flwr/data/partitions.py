"""Splits training data over clients: seeded, the same on every machine and for every order of the rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedara_flwr import seeds
from fedara_flwr.config import DataSettings
from fedara_flwr.data.examples import Examples
from fedara_flwr.keys import ConfigError

Index = NDArray[np.int64]
BY_GROUP = ("dirichlet", "pathological")


def by_hash(examples: Examples, seed: int) -> Index:
    """Row numbers in the order of sha256(seed, text)."""
    keys = examples.keys(seed)
    return np.array(sorted(range(len(keys)), key=lambda i: (keys[i], i)), dtype=np.int64)


def split(examples: Examples, seed: int, share: float) -> tuple[Index, Index]:
    """Row numbers of (the rest, the share), at least one row each where there are two."""
    order = by_hash(examples, seed)
    cut = min(max(1, round(share * len(order))), max(len(order) - 1, 0))
    return np.sort(order[cut:]), np.sort(order[:cut])


def check_partition(settings: DataSettings, grouped: bool, key: str = "") -> None:
    """Refuse a `data.partition` that cannot deal out a task's rows.

    Args:
        grouped: whether they have something that partitions by label can go by.
        key: of `data.options`, by which a task gets something of that kind; '' = it has none.

    Raises:
        ConfigError: the partition goes by label, and the rows have none.
    """
    if settings.partition in BY_GROUP and not grouped:
        raise ConfigError(
            f"data.partition = {settings.partition!r}: rows of data.task = {settings.task!r} have no label to go by, allowed "
            "are 'iid', 'length', and 'natural' with data.id-column" + (f"; or name one by data.options {key}" if key else "")
        )


def partition(examples: Examples, settings: DataSettings, clients: int, seed: int) -> list[Index]:
    """Row numbers of each client; disjoint, together all rows. A client may be left without any.

    iid: equal shares. dirichlet: for each label, shares over clients ~ Dir(alpha) (Hsu et al., arXiv 1909.06335).
    pathological: rows sorted by group, cut into clients × labels-per-client shards (McMahan et al., arXiv 1602.05629).
    length: the same, rows sorted by the characters of all that they hold.
    natural: one client per owner, in the order of the owners' names, wrapped round where there are more owners.
    """
    kinds = examples.kinds(())
    check_partition(settings, kinds is not None)
    order = by_hash(examples, seed)
    groups = kinds[0][order] if kinds is not None else order[:0]
    rng = seeds.generator(seed, "partition", settings.partition, clients)
    match settings.partition:
        case "iid":
            parts = [order[i::clients] for i in range(clients)]
        case "dirichlet":
            buckets: list[list[Index]] = [[order[:0]] for _ in range(clients)]
            for group in np.unique(groups):
                rows = order[groups == group]
                shares = rng.dirichlet(np.full(clients, settings.dirichlet_alpha))
                cuts = np.floor(np.cumsum(shares)[:-1] * len(rows) + 0.5).astype(np.int64)
                for bucket, piece in zip(buckets, np.split(rows, cuts), strict=True):
                    bucket.append(piece)
            parts = [np.concatenate(bucket) for bucket in buckets]
        case "pathological" | "length":
            by = groups if settings.partition == "pathological" else examples.sizes()[order]
            shards = np.array_split(order[np.argsort(by, kind="stable")], clients * settings.labels_per_client)
            dealt = rng.permutation(len(shards)).reshape(clients, settings.labels_per_client)
            parts = [np.concatenate([shards[i] for i in row]) for row in dealt]
        case _:
            owners = examples.owners
            if owners is None:
                raise ConfigError("data.partition = 'natural': this data has no column data.id-column")
            names = {name: i for i, name in enumerate(sorted(set(owners)))}
            owner = np.array([names[o] for o in owners], dtype=np.int64)[order]
            parts = [order[owner % clients == i] for i in range(clients)]
    return [np.sort(part) for part in parts]
