"""Label names, and which of them a value means: one function for the server's data and a device's own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedara_flwr.keys import ConfigError

MAX_LABELS = 10_000


@dataclass(frozen=True)
class Labels:
    """The run's label names and how a value of a table becomes a place among them.

    Attributes:
        names: in order; () where the task has no labels.
        own: names that the table itself has for its ids; an id is given its name first.
        by_place: whether a whole number is a place in `names`; otherwise it counts by what is written.
    """

    names: tuple[str, ...]
    own: tuple[str, ...] = ()
    by_place: bool = True

    @classmethod
    def of_device(cls, names: tuple[str, ...], own: tuple[str, ...]) -> Labels:
        """For a device's own rows: by name; ids are places only where its table names none and no name is itself a number."""
        return cls(names, own, not own and not any(name.isdecimal() for name in names))

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    def value(self, value: Any) -> Any:
        """A value as its table means it: booleans and floats without a fraction as whole numbers, ids as their own names.

        A reader makes a column of whole numbers floats where one of them is missing.
        """
        whole = isinstance(value, bool) or (isinstance(value, float) and value.is_integer())
        value = int(value) if whole else value
        return self.own[value] if isinstance(value, int) and 0 <= value < len(self.own) else value

    def place(self, value: Any) -> int:
        """Where in `names` the label stands that a value means; -1 where it is none of them."""
        value = self.value(value)
        if isinstance(value, int) and self.by_place:
            return value if 0 <= value < len(self.names) else -1
        return self._places.get(str(value), -1)


def names_in(values: Iterable[Any], column: str, word: str, bare_ids: bool) -> tuple[str, ...]:
    """The names that the values of a label column tell: themselves, in order; of whole numbers all up to the largest.

    Args:
        column: for the line of an error.
        word: what the task calls a label.
        bare_ids: whether whole numbers may be names.

    Raises:
        ConfigError: whole numbers that may not be names, or too large ones.
    """
    labels = {Labels(()).value(value) for value in values}
    if not all(isinstance(label, int) for label in labels):
        return tuple(sorted(str(label) for label in labels))
    if labels and not bare_ids:
        raise ConfigError(
            f"data.label-column = {column!r}: it holds ids, allowed are {word}, or ids with their names in data.labels or "
            "labels.json"
        )
    if max(labels, default=0) >= MAX_LABELS:
        raise ConfigError(f"data.label-column = {column!r}: it holds {max(labels)}, allowed are ids below {MAX_LABELS}")
    return tuple(str(i) for i in range(max(labels, default=-1) + 1))


def read_names(path: Path, key: str) -> tuple[str, ...]:
    """labels.json beside the files of `path`: a list of names by label id; () without one."""
    file = (path if path.is_dir() else path.parent) / "labels.json"
    if not file.is_file():
        return ()
    try:
        names = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{key}: labels.json is no JSON ({error})") from None
    if not isinstance(names, list):
        raise ConfigError(f"{key}: labels.json holds {type(names).__name__}, allowed is a list of names")
    return tuple(str(name) for name in names)
