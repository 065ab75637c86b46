"""Reads a data set by the run's settings: built in, from local files, or from the Hugging Face Hub."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np

from fedara_flwr.config import ConfigError, DataSettings, nearest
from fedara_flwr.data import docstrings, tags
from fedara_flwr.data.examples import Dataset, Examples
from fedara_flwr.data.partitions import split

datasets.disable_progress_bars()
MAX_LABELS = 10_000
MAX_NAMED, MAX_NAME = 5, 40  # unknown labels that a line names, and characters of each
TAGGED: Literal["token-classification"] = "token-classification"  # the task whose rows are words and tags
# pandas would read a label "None" or "NA" as missing
READER_OPTIONS: dict[str, dict[str, Any]] = {".csv": {"keep_default_na": False, "na_values": [""]}}
FORMATS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json"}


@dataclass
class Skipped:
    """Rows that were left out of a source.

    Attributes:
        rows: all that the source has.
        texts: those without a text; `missing` those with a text and no label.
        labels: how many rows an unknown label made unusable, by label.
        first: (row number, label) of the first of these.
    """

    rows: int = 0
    texts: int = 0
    missing: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    first: tuple[int, Any] | None = None

    def refuse(self, row: int, label: Any) -> None:
        """Count a row that has an unknown label."""
        self.first = self.first or (row, label)
        self.labels[str(label)] += 1

    def __str__(self) -> str:
        """'12 of 300 rows skipped: 9 with unknown labels ('foo' 5, 'bar' 4), 3 without text'; '' where none is."""
        unknown = self.labels.total()
        names = ", ".join(f"{name[:MAX_NAME]!r} {count}" for name, count in self.labels.most_common(MAX_NAMED))
        more = ", …" if len(self.labels) > MAX_NAMED else ""
        parts = [
            (unknown, f"{unknown} with unknown labels ({names}{more})"),
            (self.texts, f"{self.texts} without text"),
            (self.missing, f"{self.missing} without label"),
        ]
        count = sum(number for number, _ in parts)
        why = ", ".join(text for number, text in parts if number)
        return f"{count} of {self.rows} rows skipped: {why}" if count else ""


@dataclass(frozen=True)
class Own:
    """A device's own rows: to train on, of its test file (None without one), and which rows of both were left out."""

    train: Examples
    test: Examples | None
    skipped: Skipped


@dataclass(frozen=True)
class Look:
    """What local files hold: training and test rows, columns, label names, and rows without text or label."""

    rows: dict[str, int]
    columns: list[str]
    labels: tuple[str, ...]
    skipped: Skipped


@lru_cache(maxsize=4)
def load(settings: DataSettings, seed: int) -> Dataset:
    """Training and test data with label names; test rows are split off where the source has no test split.

    Args:
        settings: which data.
        seed: of the split.

    Raises:
        ConfigError: no such file, column or label, or data that does not suit `data.task`; the line names the key.
    """
    tagged = settings.task == TAGGED
    _check_task(settings)
    if settings.path:
        key = f"data.path = {settings.path!r}"
        splits, labels = _read_files(settings.path, key)
    elif settings.name == "docstrings":
        if tagged:
            raise ConfigError(
                f"data.name = 'docstrings': its words have no tags, allowed with data.task = {TAGGED!r} are data.path and "
                "Hugging Face ids"
            )
        everything, labels = docstrings.load()
        rest, test = split(everything, seed, settings.test)
        return Dataset(everything.take(rest), everything.take(test), labels)
    else:
        splits, labels = _read_hub(settings.name), ()
        key = f"data.name = {settings.name!r}"
    for table in splits.values():
        _check_columns(table, settings)
    names = _label_names(settings, splits, labels, key)
    if tagged:
        _check_prefixes(settings, names)
    ids = {name: i for i, name in enumerate(names)}

    def number(label: Any) -> int:
        found = label if isinstance(label, int) else ids.get(str(label), -1)
        return found if 0 <= found < len(names) else -1

    examples = {}
    for name, table in splits.items():
        if name not in ("train", "test"):
            continue
        skipped = Skipped()
        examples[name] = _examples(table, settings, names, number, skipped, key)
        if skipped.first:
            row, label = skipped.first
            raise ConfigError(f"{key}: row {row} has label {label!r}, allowed are {', '.join(names[:20])}")
    train = examples["train"]
    if not len(train):
        raise ConfigError(f"{key}: there are no rows with text and label")
    if "test" in examples:
        test_rows = examples["test"]
        if not len(test_rows):
            raise ConfigError(f"{key}: there are no test rows with text and label")
    else:
        rest, held_out = split(train, seed, settings.test)
        train, test_rows = train.take(rest), train.take(held_out)
    return Dataset(train, test_rows, names)


def load_own(settings: DataSettings, names: tuple[str, ...]) -> Own:
    """A device's own rows of `data.path`, with its server's label names; rows that do not fit are left out and counted.

    Labels are taken by name. Numbers are first given the names that the file (a class-label column) or a labels.json beside it
    has for them; without, they count as names where the server's names are numbers, else as places in the server's list.

    Raises:
        ConfigError: no such file or column, or data that does not suit `data.task`; the line names the key of node-config.
    """
    _check_task(settings, "node-config ")
    key = f"node-config data-path = {settings.path!r}"
    splits, own_names = _read_files(settings.path, key)
    for table in splits.values():
        _check_columns(table, settings, "node-config ")
    own_names = own_names or _class_names(settings, splits["train"])
    ids = {name: i for i, name in enumerate(names)}
    by_place = not own_names and not any(name.isdecimal() for name in names)

    def number(label: Any) -> int:
        if isinstance(label, int) and by_place:
            return label if 0 <= label < len(names) else -1
        return ids.get(str(label), -1)

    skipped = Skipped()
    examples = {name: _examples(table, settings, names, number, skipped, key, own_names) for name, table in splits.items()}
    return Own(examples["train"], examples.get("test"), skipped)


def look(path: str, text_column: str, label_column: str) -> Look:
    """What a device's own files hold, for a check before there is a run; without these columns labels are ().

    Raises:
        ConfigError: the files cannot be read, or their labels are none.
    """
    key = f"node-config data-path = {path!r}"
    splits, labels = _read_files(path, key)
    skipped, columns = Skipped(), splits["train"].column_names
    names: tuple[str, ...] = ()
    if {text_column, label_column} <= set(columns):
        tagged = _holds_lists(splits["train"].features[text_column])
        settings = DataSettings(task=TAGGED if tagged else "classification", text_column=text_column, label_column=label_column)
        for table in splits.values():
            _check_columns(table, settings, "node-config ")
        names = _label_names(settings, splits, labels, key)
        for table in splits.values():
            _examples(table, settings, names, lambda label: 0, skipped, key)
    return Look({name: len(table) for name, table in splits.items()}, columns, names, skipped)


def _check_task(settings: DataSettings, prefix: str = "data.") -> None:
    if settings.task == TAGGED and settings.pair_column:
        raise ConfigError(f"{prefix}pair-column = {settings.pair_column!r}: allowed is '' with data.task = {TAGGED!r}")


def _read_files(path: str, key: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Tables of `train` and perhaps `test`, mapped from the library's cache, and the names of labels.json."""
    place = Path(path).expanduser()
    if place.is_dir():
        files = {
            name: found
            for name in ("train", "test")
            if (found := next((place / f"{name}{end}" for end in FORMATS if (place / f"{name}{end}").is_file()), None))
        }
        if "train" not in files:
            raise ConfigError(f"{key}: no train file in it, allowed endings are {', '.join(FORMATS)}")
    elif place.is_file():
        files = {"train": place}
    else:
        raise ConfigError(f"{key}: there is no such file or folder")
    ending = files["train"].suffix
    if ending not in FORMATS:
        raise ConfigError(f"{key}: allowed endings are {', '.join(FORMATS)}")
    try:
        tables = {
            name: datasets.load_dataset(
                FORMATS[file.suffix], data_files=str(file), split="train", **READER_OPTIONS.get(file.suffix, {})
            )
            for name, file in files.items()
        }
    except Exception as error:  # the reader's own errors are many and long
        raise ConfigError(f"{key}: cannot be read ({_first_line(error)})") from error
    return tables, _read_labels(place, key)


def _read_labels(path: Path, key: str) -> tuple[str, ...]:
    """labels.json beside the files: a list of names by label id."""
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


def _first_line(error: BaseException) -> str:
    """Of the error at the bottom: the library wraps readers' errors in one that says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or type(error).__name__).splitlines()[0]


def _read_hub(name: str) -> dict[str, Any]:
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # not there, no network, gated: all the same to the user
        raise ConfigError(f"data.name = {name!r}: cannot be loaded ({_first_line(error)})") from error
    if "train" not in found:
        raise ConfigError(f"data.name = {name!r}: it has no split 'train', but {sorted(found)}")
    return dict(found)


def _label_names(settings: DataSettings, splits: dict[str, Any], labels: tuple[str, ...], key: str) -> tuple[str, ...]:
    if settings.labels:
        return tuple(name.strip() for name in settings.labels.split(","))
    if labels:
        return labels
    if named := _class_names(settings, splits["train"]):
        return named
    column, tagged = settings.label_column, settings.task == TAGGED
    values = {_label(value) for table in splits.values() for value in _flat(_values(table, column, key)) if not _absent(value)}
    if all(isinstance(v, int) for v in values):
        if tagged and values:  # which of them is 'O', and which begins an entity?
            raise ConfigError(
                f"data.label-column = {column!r}: it holds ids, allowed are tags, or ids with their names in data.labels or "
                "labels.json"
            )
        if max(values, default=0) >= MAX_LABELS:
            raise ConfigError(f"data.label-column = {column!r}: it holds {max(values)}, allowed are ids below {MAX_LABELS}")
        return tuple(str(i) for i in range(max(values, default=-1) + 1))
    return tuple(sorted(str(v) for v in values))


def _values(table: Any, column: str, key: str) -> list[Any]:
    try:
        return list(table[column][:])
    except UnicodeDecodeError as error:  # parquet and jsonl are not looked at when they are read
        raise ConfigError(f"{key}: column {column!r} is no utf-8 text ({error})") from None


def _class_names(settings: DataSettings, table: Any) -> tuple[str, ...]:
    """The names that a class-label column has for its ids; () where it has none."""
    feature = table.features[settings.label_column]
    feature = feature.feature if settings.task == TAGGED else feature
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _label(value: Any, names: tuple[str, ...] = ()) -> Any:
    """Booleans, and whole numbers that a reader made floats because one was missing, as integers; those by their names."""
    whole = isinstance(value, bool) or (isinstance(value, float) and value.is_integer())
    value = int(value) if whole else value
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _flat(column: Any) -> Iterator[Any]:
    for value in column:
        yield from value if isinstance(value, list) else [value]


def _holds_lists(feature: Any) -> bool:
    return isinstance(feature, datasets.List | datasets.LargeList)


def _check_columns(table: Any, settings: DataSettings, prefix: str = "data.") -> None:
    tagged = settings.task == TAGGED
    for key, column, lists in (
        (f"{prefix}text-column", settings.text_column, tagged),
        (f"{prefix}label-column", settings.label_column, tagged),
        (f"{prefix}pair-column", settings.pair_column, False),
        (f"{prefix}id-column", settings.id_column, False),
    ):
        if not column:
            continue
        if column not in table.column_names:
            raise ConfigError(
                f"{key} = {column!r}: no such column, allowed are {table.column_names}{nearest(column, table.column_names)}"
            )
        feature = table.features[column]
        held = _holds_lists(feature)
        if lists and not (held and isinstance(feature.feature, datasets.Value | datasets.ClassLabel)):
            raise ConfigError(f"{key} = {column!r}: allowed with data.task = {TAGGED!r} are lists with one entry for each word")
        if held and not lists:
            raise ConfigError(
                f"{key} = {column!r}: it holds lists, allowed with data.task = {settings.task!r} is one value a row"
            )


def _check_prefixes(settings: DataSettings, names: tuple[str, ...]) -> None:
    prefixed = [name for name in names if tags.has_prefix(name)]
    bare = [name for name in names if name != tags.OUTSIDE and not tags.has_prefix(name)]
    if prefixed and bare:
        raise ConfigError(
            f"data.label-column = {settings.label_column!r}: tag {bare[0]!r} beside {prefixed[0]!r}, allowed are 'O', 'B-…' "
            "and 'I-…', or types without a prefix"
        )


def _examples(
    table: Any,
    settings: DataSettings,
    names: tuple[str, ...],
    number: Callable[[Any], int],
    skipped: Skipped,
    key: str,
    own_names: tuple[str, ...] = (),
) -> Examples:
    """The rows that have a text and labels which `number` knows (a place in `names`, else -1); the others are counted.

    `own_names` are the file's names for ids, which `number` is then given.
    """
    kept: list[int] = []

    def column(name: str) -> tuple[str, ...] | None:
        if not name:
            return None
        values = _values(table, name, key)
        return tuple("" if _absent(values[row]) else str(values[row]) for row in kept)

    skipped.rows += len(table)
    given = (_values(table, name, key) for name in (settings.text_column, settings.label_column))
    rows = enumerate(zip(*given, strict=True))
    if settings.task == TAGGED:
        sentences, numbers = [], []
        for row, (words, labels) in rows:
            if words is None or labels is None:
                skipped.texts += words is None
                skipped.missing += words is not None
                continue
            _check_sentence(key, row, words, labels)
            places = tuple(-1 if _absent(label) else number(_label(label, own_names)) for label in labels)
            if not any(word.strip() for word in words):
                skipped.texts += 1
            elif -1 in places:
                skipped.refuse(row, _label(labels[places.index(-1)], own_names))
            else:
                kept.append(row)
                sentences.append(tuple(words))
                numbers.append(places)
        texts = tuple(" ".join(words) for words in sentences)
        main = tags.main_types(numbers, names)
        return Examples(texts, main, None, column(settings.id_column), tuple(sentences), tuple(numbers))
    index = []
    for row, (text, value) in rows:
        label = _label(value, own_names)
        if _absent(text) or not str(text).strip():
            skipped.texts += 1
        elif _absent(label):
            skipped.missing += 1
        elif (found := number(label)) < 0:
            skipped.refuse(row, label)
        else:
            kept.append(row)
            index.append(found)
    return Examples(
        column(settings.text_column) or (),
        np.array(index, dtype=np.int64),
        column(settings.pair_column),
        column(settings.id_column),
    )


def _check_sentence(key: str, row: int, words: list[Any], labels: list[Any]) -> None:
    if len(words) != len(labels):
        raise ConfigError(f"{key}: row {row} has {len(labels)} labels for {len(words)} words, allowed is one for each word")
    for word in words:
        if not isinstance(word, str):
            raise ConfigError(f"{key}: row {row} has {word!r} among its words, allowed is text")
