"""Rows as a task reads them, whatever the task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


@dataclass(frozen=True)
class Examples:
    """Rows of a data set; every attribute that is not None has one entry for each.

    Attributes:
        texts: the main text.
        groups: shape (n,), numbers from 0: what partitions by label go by, such as a row's label; None where rows have no such.
        pairs: the second text of sentence pairs, or None.
        owners: whose row it is, for natural partitions, or None.
        targets: what is to be learnt where the groups do not say it, in types that JSON knows, or None.
        identities: what tells a row from others where its text does not, targets included, or None.
        categories: what partitions go by where there are no groups, or None.
    """

    texts: tuple[str, ...]
    groups: NDArray[np.int64] | None = None
    pairs: tuple[str, ...] | None = None
    owners: tuple[str, ...] | None = None
    targets: tuple[Any, ...] | None = None
    identities: tuple[str, ...] | None = None
    categories: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: Sequence[int] | NDArray[np.int64]) -> Examples:
        """The rows at `index`, in that order."""

        def pick(values: tuple[T, ...] | None) -> tuple[T, ...] | None:
            return None if values is None else tuple(values[i] for i in index)

        return Examples(
            tuple(self.texts[i] for i in index),
            None if self.groups is None else self.groups[np.asarray(index, dtype=np.int64)],
            pick(self.pairs),
            pick(self.owners),
            pick(self.targets),
            pick(self.identities),
            pick(self.categories),
        )

    def kinds(self, names: tuple[str, ...]) -> tuple[NDArray[np.int64], tuple[str, ...]] | None:
        """The number of each row's group or category, and what these are called; None where rows have neither.

        Args:
            names: what the groups are called.
        """
        if self.groups is not None:
            return self.groups, names
        if self.categories is None:
            return None
        found = sorted(set(self.categories))
        places = {name: place for place, name in enumerate(found)}
        return np.array([places[name] for name in self.categories], dtype=np.int64), tuple(found)

    def keys(self, seed: int) -> list[bytes]:
        """sha256(seed, identity or text, pair) of each row: the same on every machine, whatever the order of the rows."""
        texts, pairs = self.identities or self.texts, self.pairs or ("",) * len(self)
        return [
            hashlib.sha256(f"{seed}\x1f{text}\x1f{pair}".encode()).digest() for text, pair in zip(texts, pairs, strict=True)
        ]

    def sizes(self) -> NDArray[np.int64]:
        """Characters of each row: of its identity where it has one, else of its text and pair; shape (n,)."""
        texts, pairs = self.identities or self.texts, self.pairs or ("",) * len(self)
        return np.array([len(text) + len(pair) for text, pair in zip(texts, pairs, strict=True)], dtype=np.int64)

    def digest(self) -> str:
        """sha256 over all rows in order: keys, groups, and targets that no identity tells."""
        total = hashlib.sha256()
        for row, key in enumerate(self.keys(0)):
            total.update(key)
            if self.groups is not None:
                total.update(int(self.groups[row]).to_bytes(4, "big"))
            if self.targets is not None and self.identities is None:
                total.update(json.dumps(self.targets[row]).encode())
        return total.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """Training and test data, their label names (none where the task has no labels), and a line for each part left out.

    `validation` is what the source itself has to validate on; None where it has none.
    """

    train: Examples
    test: Examples
    labels: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    validation: Examples | None = None
