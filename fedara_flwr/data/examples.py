"""A set of labelled texts, or of sentences whose words have tags."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


@dataclass(frozen=True)
class Examples:
    """Rows of text and label.

    Attributes:
        texts: the texts; `pairs` the second texts of sentence pairs, else None.
        labels: shape (n,), index into the label names. Of tagged sentences what `tags.main_types` says: partitions go by it.
        owners: whose row it is, for natural partitions, else None.
        words: the words of tagged sentences (`texts` has them joined), else None.
        tags: one for each word, index into the label names, else None.
    """

    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    pairs: tuple[str, ...] | None = None
    owners: tuple[str, ...] | None = None
    words: tuple[tuple[str, ...], ...] | None = None
    tags: tuple[tuple[int, ...], ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: Sequence[int] | NDArray[np.int64]) -> Examples:
        """The rows at `index`, in that order."""

        def pick(values: tuple[T, ...] | None) -> tuple[T, ...] | None:
            return None if values is None else tuple(values[i] for i in index)

        return Examples(
            tuple(self.texts[i] for i in index),
            self.labels[np.asarray(index, dtype=np.int64)],
            pick(self.pairs),
            pick(self.owners),
            pick(self.words),
            pick(self.tags),
        )

    def keys(self, seed: int) -> list[bytes]:
        """sha256(seed, text) of each row: the same on every machine, whatever the order of the rows.

        Of a tagged sentence the words and tags, as JSON, stand for the text.
        """
        texts, pairs = self.texts, self.pairs or ("",) * len(self)
        if self.words is not None and self.tags is not None:
            texts = tuple(json.dumps(sentence) for sentence in zip(self.words, self.tags, strict=True))
        return [
            hashlib.sha256(f"{seed}\x1f{text}\x1f{pair}".encode()).digest() for text, pair in zip(texts, pairs, strict=True)
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
