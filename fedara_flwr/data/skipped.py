"""Rows that cannot be used: why, and how many there were."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

WITHOUT_LABEL = "without label"
MAX_NAMED, MAX_LABEL_NAME = 5, 40  # unknown labels that a line names, and characters of each


class LeftOut(Exception):
    """A row that cannot be used and is counted; the text says why, for example "without text"."""


class UnknownLabel(LeftOut):
    """A row with a label that is not among the names: a device counts it, the server's own data is refused."""

    def __init__(self, label: Any) -> None:
        super().__init__("with unknown labels")
        self.label = label


def absent(value: Any) -> bool:
    """Whether a table has no value there: None, or the NaN that a reader puts where one is missing."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def spelled(value: Any) -> str:
    """A value as text; of a whole number no fraction, which a reader adds where another row has no number.

    Half of a character that is written with two (a lone surrogate, as JSON can hold) becomes a question mark.
    """
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    return text.encode("utf-8", "replace").decode()


@dataclass
class Skipped:
    """Rows that were left out of a source.

    Attributes:
        rows: all that the source has.
        reasons: how many rows each reason cost, unknown labels not counted.
        labels: how many rows an unknown label made unusable, by label.
        first: (row number, label) of the first of these.
    """

    rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    first: tuple[int, Any] | None = None

    def leave(self, row: int, why: LeftOut) -> None:
        """Count a row that is left out."""
        if isinstance(why, UnknownLabel):
            self.first = self.first or (row, why.label)
            self.labels[str(why.label)] += 1
        else:
            self.reasons[str(why)] += 1

    def __str__(self) -> str:
        """'12 of 300 rows skipped: 9 with unknown labels ('foo' 5, 'bar' 4), 3 without text'; '' where none is."""
        unknown = self.labels.total()
        names = ", ".join(f"{name[:MAX_LABEL_NAME]!r} {count}" for name, count in self.labels.most_common(MAX_NAMED))
        more = ", …" if len(self.labels) > MAX_NAMED else ""
        parts = [f"{unknown} with unknown labels ({names}{more})"] if unknown else []
        parts += [f"{count} {reason}" for reason, count in sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))]
        count = unknown + self.reasons.total()
        return f"{count} of {self.rows} rows skipped: {', '.join(parts)}" if count else ""
