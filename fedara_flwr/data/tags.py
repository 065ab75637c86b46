"""Tags of words: 'O', 'B-PER' and 'I-PER' as IOB2 has them, or types without a prefix ('PER', 'O')."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

OUTSIDE = "O"


def has_prefix(name: str) -> bool:
    """Whether a tag is B-something or I-something; 'B' and 'I' alone are tags of a single type without a name."""
    return name.partition("-")[0] in ("B", "I")


def iob(names: Sequence[str]) -> tuple[str, ...]:
    """Every tag as 'O', 'B-type' or 'I-type'.

    Types without a prefix become I-type, so that a run of equal tags is one entity.
    """
    prefixed = any(has_prefix(name) for name in names)

    def read(name: str) -> str:
        if name == OUTSIDE:
            return name
        return f"{name[0]}-{name[2:]}" if prefixed else f"I-{name}"

    return tuple(read(name) for name in names)


def types(names: Sequence[str]) -> tuple[str, ...]:
    """Entity types in the order in which the tags name them first."""
    return tuple(dict.fromkeys(tag[2:] for tag in iob(names) if tag != OUTSIDE))


def main_types(sentences: Sequence[Sequence[int]], names: Sequence[str]) -> NDArray[np.int64]:
    """One label per sentence, for partitions by label; shape (n,).

    This project's reading: the entity type that most of its words have, as 1 + its place in `types`, the first of equals;
    0 where every word is outside.
    """
    place = {kind: 1 + i for i, kind in enumerate(types(names))}
    numbers = np.array([0 if tag == OUTSIDE else place[tag[2:]] for tag in iob(names)], dtype=np.int64)
    found = []
    for tags in sentences:
        counts = np.bincount(numbers[list(tags)], minlength=1 + len(place))
        counts[0] = 0
        found.append(int(counts.argmax()))
    return np.array(found, dtype=np.int64)
