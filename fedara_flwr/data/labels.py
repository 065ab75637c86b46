"""Label names, and which of them a value means: one function for the server's data and a device's own.

A label is what is written. A whole number is a place in a list only where somebody gave the list its order: the data (a
class-label column, labels.json), or the user, whose names are none of them numbers (`data.labels`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fedara_flwr.data.skipped import WITHOUT_LABEL, LeftOut, UnknownLabel, absent, spelled
from fedara_flwr.keys import ConfigError
from fedara_flwr.log import first_line

MAX_LABELS = 10_000
MAX_DECIMALS = 100  # different numbers with a fraction; more are measurements
SHOWN = 20  # names in an error's line
OUTSIDE = "label-column: it holds a number outside of the list of labels"
NOTHING = frozenset(
    "#N/A;#N/A N/A;#NA;-1.#IND;-1.#QNAN;-NaN;-nan;1.#IND;1.#QNAN;<NA>;N/A;NA;NULL;NaN;None;n/a;nan;none;null;NAN".split(";")
)
"""What is written where a number is missing, as pandas reads and writes it. Beside words it is a word."""
WHOLE = re.compile(r"-?(0|[1-9]\d*)", re.ASCII)
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
ZEROS = re.compile(r"(-?(?:0|[1-9]\d*))\.0+", re.ASCII)
YES, NO = ("true", "yes", "1"), ("false", "no", "0")
BOOLEANS = (frozenset(("true", "false")), frozenset(("1", "0")))


def written(value: Any) -> str | None:
    """A label as it is written: without spaces around it, whole numbers without a fraction; None where there is none.

    A reader makes a column of whole numbers floats where one of them is missing, so 3.0 is 3, as a number and as text.

    Raises:
        LeftOut: it is no single value.
    """
    if absent(value):
        return None
    if isinstance(value, bytes | Mapping | list | tuple):
        raise LeftOut("with a label that is no single value")
    text = spelled(value).strip()
    if (whole := ZEROS.fullmatch(text)) is not None:
        return "0" if whole[1] == "-0" else whole[1]
    return text or None


@dataclass(frozen=True)
class Labels:
    """The run's label names and how a value of a column becomes a place among them.

    Attributes:
        names: in order; () where the task has no labels.
        ids: names that the table itself has for its ids; {} where it has none.
        by_place: whether a whole number is a place in `names`; otherwise it counts by what is written.
    """

    names: tuple[str, ...]
    ids: Mapping[int, str] = field(default_factory=dict)
    by_place: bool = False

    @classmethod
    def of(cls, names: tuple[str, ...], ids: Mapping[int, str], values: Iterable[Any], key: str) -> Labels:
        """How the values of one column are to be read by somebody's list of names, decided by all of them.

        Args:
            key: names the column in an error's line.

        Raises:
            ConfigError: whole numbers that should be places in a list and lie outside of it.
        """
        found = {text for value in values if (text := _readable(value)) is not None}
        numbers = {text for text in found if WHOLE.fullmatch(text)}
        if ids and numbers and not (isinstance(ids, Ordered) and found <= set(names)):
            outside = sorted(int(text) for text in numbers if int(text) not in ids and int(text) != -1)
            if outside:
                raise ConfigError(
                    f"{key}: it holds {outside[0]}, allowed are ids from {min(ids)} to {max(ids)}, of {_shown(names)}",
                    OUTSIDE,
                )
            return cls(names, ids)
        if ids and not numbers or not names:
            return cls(names)
        words = found - NOTHING
        if not words or numbers != words or any(NUMBER.fullmatch(name) or name.lower() in BOOLEANS[0] for name in names):
            return cls(names)
        outside = sorted(number for text in numbers if not 0 <= (number := int(text)) < len(names))
        if outside:
            raise ConfigError(
                f"{key}: it holds {outside[0]}, allowed are names, or places from 0 to {len(names) - 1}, of {_shown(names)}",
                OUTSIDE,
            )
        return cls(names, by_place=True)

    @cached_property
    def _places(self) -> dict[str, int]:
        places = {name: place for place, name in enumerate(self.names)}
        lower = {name.lower(): place for name, place in places.items()}
        for words in BOOLEANS:  # True is 'True', 'true' or '1', whichever the list has, where it has nothing else beside False
            if lower.keys() == words:
                for same in (YES, NO):
                    place = next(lower[word] for word in same if word in lower)
                    places |= {form: place for word in same for form in (word, word.capitalize(), word.upper())}
        return places

    @cached_property
    def _numeric(self) -> bool:
        return bool(self.names) and all(NUMBER.fullmatch(name) for name in self.names)

    def name(self, value: Any) -> str:
        """The name that a value is written as, or has by its table's ids.

        Raises:
            LeftOut: it is none: missing, -1 among ids, or `NA` and the like among numbers.
        """
        text = written(value)
        numbers = self._numeric or self.by_place or self.ids
        if text is None or (numbers and text in NOTHING and text not in self.names):
            raise LeftOut(WITHOUT_LABEL)
        if self.ids and WHOLE.fullmatch(text):
            if int(text) not in self.ids:
                raise LeftOut(WITHOUT_LABEL)
            return self.ids[int(text)]
        return text

    def place(self, value: Any) -> int:
        """Where in `names` the label stands that a value means.

        Raises:
            LeftOut: there is no label.
            UnknownLabel: it is none of the names.
        """
        name = self.name(value)
        place = int(name) if self.by_place and WHOLE.fullmatch(name) else self._places.get(name, -1)
        if place < 0:
            raise UnknownLabel(name)
        return place


class Ordered(dict[int, str]):
    """Names by id from a file beside the data, whose columns may hold names or ids."""


def names_in(values: Iterable[Any], key: str, word: str, bare_ids: bool) -> tuple[str, ...]:
    """The names that the values of a label column tell: themselves, numbers by size.

    Args:
        key: names the column in an error's line.
        word: what the task calls a label.
        bare_ids: whether whole numbers may be names.

    Raises:
        ConfigError: whole numbers that may not be names, too many names, or numbers that are measured.
    """
    found = {text for value in values if (text := _readable(value)) is not None}
    if len(found) > 2 and {text.lower() for text in found} == BOOLEANS[0]:  # True of one file is TRUE in another
        return NO[0].capitalize(), YES[0].capitalize()
    if all(NUMBER.fullmatch(text) for text in found - NOTHING):
        found -= NOTHING
        if found and not bare_ids and all(WHOLE.fullmatch(text) for text in found):
            raise ConfigError(f"{key}: it holds ids, allowed are {word}, or ids with their names in data.labels or labels.json")
        measured = sum(not WHOLE.fullmatch(text) for text in found)
        if measured > MAX_DECIMALS:
            raise ConfigError(
                f"{key}: it holds {len(found)} different numbers with a fraction, allowed are {word}; they look "
                "measured, and `fedara tasks` says what learns numbers"
            )
        names = tuple(sorted(found, key=lambda text: (float(text), text)))
    else:
        names = tuple(sorted(found))
    if len(names) > MAX_LABELS:
        raise ConfigError(f"{key}: it holds {len(names)} different {word}, allowed are {MAX_LABELS}")
    return names


def check_names(names: tuple[str, ...], key: str) -> tuple[str, ...]:
    """The names, if each has a letter to it and stands there once; ConfigError otherwise."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not all(names):
        raise ConfigError(
            f"{key}: " + (f"{twice[0]!r} is in it twice" if twice else "it has an empty name") + ", allowed are different names"
        )
    return names


def read_names(path: Path, key: str) -> Ordered:
    """labels.json beside the files of `path`, names by id: a list, or an object id → name or name → id; {} without one."""
    file = (path if path.is_dir() else path.parent) / "labels.json"
    if not file.is_file():
        return Ordered()
    try:
        names = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{key}: labels.json is no JSON ({first_line(error)})", "labels.json is no JSON") from None
    if isinstance(names, list):
        pairs = list(enumerate(names))
    elif isinstance(names, dict) and names and all(WHOLE.fullmatch(id_) for id_ in names):
        pairs = [(int(id_), name) for id_, name in names.items()]
    elif (
        isinstance(names, dict) and names and all(isinstance(id_, int) and not isinstance(id_, bool) for id_ in names.values())
    ):
        pairs = [(id_, name) for name, id_ in names.items()]
    else:
        raise ConfigError(f"{key}: labels.json holds neither a list of names nor names by id")
    if bad := [name for _, name in pairs if not isinstance(name, str | int | float)]:
        raise ConfigError(f"{key}: labels.json has {bad[0]!r} among its names, allowed is text")
    found = Ordered(sorted((id_, str(name).strip()) for id_, name in pairs))
    check_names(tuple(found.values()), f"{key}: labels.json")
    if len(found) < len(pairs):
        raise ConfigError(f"{key}: labels.json gives one id to two names")
    return found


def _readable(value: Any) -> str | None:
    try:
        return written(value)
    except LeftOut:
        return None


def _shown(names: tuple[str, ...]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
