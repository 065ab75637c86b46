"""What a source of data asks of a task: which columns it reads, and what a row becomes. The task says it, data/ knows none."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

from fedara_flwr.data.labels import Labels

MAX_NAMED, MAX_LABEL_NAME = 5, 40  # unknown labels that a line names, and characters of each


class LeftOut(Exception):
    """A row that cannot be used and is counted; the text says why, for example "without text"."""


class UnknownLabel(LeftOut):
    """A row with a label that is not among the names: a device counts it, the server's own data is refused."""

    def __init__(self, label: Any) -> None:
        super().__init__("with unknown labels")
        self.label = label


class BadRow(ValueError):
    """A row that must be a mistake; ends the run with the number of the row and this text."""


class Example(NamedTuple):
    """One row as its task reads it; the attributes are those of `Examples`."""

    text: str
    group: int | None = None
    pair: str | None = None
    target: Any = None
    identity: str | None = None
    category: str | None = None


@dataclass(frozen=True)
class Column:
    """One column that a task reads.

    Attributes:
        role: under what name `Reader.read` gets its value.
        key: the setting that names it, without "data." before it.
        name: how it is called in the table.
        lists: what its lists hold, for an error's line; '' = it has one value a row.
        nested: whether the task reads whatever is in it.
    """

    role: str
    key: str
    name: str
    lists: str = ""
    nested: bool = False


class Reader(Protocol):
    """The half of a task that reads rows; tasks/base.Task says what each member means. Equal ones read alike."""

    name: ClassVar[str]
    labelled: ClassVar[bool]
    label_word: ClassVar[str]
    bare_ids: ClassVar[bool]
    docstrings: ClassVar[str]

    def __hash__(self) -> int: ...

    @property
    def grouped(self) -> bool: ...

    def table(self, table: Any) -> Any: ...

    def columns(self, there: Sequence[str]) -> Sequence[Column]: ...

    def check_labels(self, names: tuple[str, ...]) -> None: ...

    def group_names(self, names: tuple[str, ...]) -> tuple[str, ...]: ...

    def read(self, row: Mapping[str, Any], labels: Labels) -> Example: ...


def absent(value: Any) -> bool:
    """Whether a table has no value there: None, or the NaN that a reader puts where one is missing."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text(value: Any, what: str = "text") -> str:
    """The value as text; LeftOut where there is none, or nothing but spaces."""
    if absent(value) or not str(value).strip():
        raise LeftOut(f"without {what}")
    return str(value)


def optional_text(row: Mapping[str, Any], role: str) -> str | None:
    """A text that may be missing in a row (then ''); None where the table has no such column."""
    if role not in row:
        return None
    return "" if absent(row[role]) else str(row[role])


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
