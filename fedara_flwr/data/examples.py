"""A set of labelled texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Examples:
    """Rows of text and label.

    Attributes:
        texts: the texts; `pairs` the second texts of sentence pairs, else None.
        labels: shape (n,), index into the label names.
        owners: whose row it is, for natural partitions, else None.
    """

    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    pairs: tuple[str, ...] | None = None
    owners: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: Sequence[int] | NDArray[np.int64]) -> Examples:
        """The rows at `index`, in that order."""

        def pick(values: tuple[str, ...] | None) -> tuple[str, ...] | None:
            return None if values is None else tuple(values[i] for i in index)

        return Examples(
            tuple(self.texts[i] for i in index),
            self.labels[np.asarray(index, dtype=np.int64)],
            pick(self.pairs),
            pick(self.owners),
        )

    def keys(self, seed: int) -> list[bytes]:
        """sha256(seed, text) of each row: the same on every machine, whatever the order of the rows."""
        pairs = self.pairs or ("",) * len(self)
        return [
            hashlib.sha256(f"{seed}\x1f{text}\x1f{pair}".encode()).digest()
            for text, pair in zip(self.texts, pairs, strict=True)
        ]

    def digest(self) -> str:
        """sha256 over all rows in order."""
        total = hashlib.sha256()
        for key, label in zip(self.keys(0), self.labels, strict=True):
            total.update(key + int(label).to_bytes(4, "big"))
        return total.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """Training and test data with their label names."""

    train: Examples
    test: Examples
    labels: tuple[str, ...]
