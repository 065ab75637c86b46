"""What a source of data asks of a task: which columns it reads, and what a row becomes. The task says it, data/ knows none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from fedara_flwr.data.labels import Labels
from fedara_flwr.data.skipped import LeftOut, absent, spelled
from fedara_flwr.keys import ConfigError


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


def refuse_shared(columns: Iterable[Column], prefix: str = "data.") -> None:
    """One column for two uses is a ConfigError, of the later one's key."""
    used: dict[str, Column] = {}
    for column in columns:
        if (other := used.setdefault(column.name, column)) is not column:
            line = f"it is the {other.key} too, allowed is another column"
            raise ConfigError(f"{prefix}{column.key} = {column.name!r}: {line}", f"{column.key}: {line}")


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


def text(value: Any, what: str = "text") -> str:
    """The value as text; LeftOut where there is none, or nothing but spaces."""
    if absent(value) or not (found := spelled(value)).strip():
        raise LeftOut(f"without {what}")
    return found


def optional_text(row: Mapping[str, Any], role: str) -> str | None:
    """A text that may be missing in a row (then ''); None where the table has no such column."""
    if role not in row:
        return None
    return "" if absent(row[role]) else spelled(row[role])
