"""Reads a data set by the run's settings: built in, from local files, or from the Hugging Face Hub. A task reads its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from fedara_flwr.config import BUILT_IN_DATA, DOCSTRINGS, FUNCTIONS, DataSettings
from fedara_flwr.data import docstrings, functions
from fedara_flwr.data.examples import Dataset, Examples
from fedara_flwr.data.labels import Labels, names_in, read_names
from fedara_flwr.data.partitions import split
from fedara_flwr.data.reading import BadRow, Column, Example, LeftOut, Reader, Skipped, absent
from fedara_flwr.keys import ConfigError, nearest
from fedara_flwr.log import error_line, first_line

datasets.disable_progress_bars()
# pandas would read a label "None" or "NA" as missing
READER_OPTIONS: dict[str, dict[str, Any]] = {".csv": {"keep_default_na": False, "na_values": [""]}}
FILE_FORMATS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json"}


@dataclass(frozen=True)
class Own:
    """A device's own rows: to train on, of its test file (None without one), and which rows of both were left out."""

    train: Examples
    test: Examples | None
    skipped: Skipped


@dataclass(frozen=True)
class Look:
    """What local files hold.

    Attributes:
        rows: how many, of training and test.
        task: the first that can read them, "" where none can.
        labels: label names that they tell, () where there are none.
        skipped: rows that this task cannot use.
    """

    rows: dict[str, int]
    columns: list[str]
    task: str
    labels: tuple[str, ...]
    skipped: Skipped


@lru_cache(maxsize=4)
def load(settings: DataSettings, seed: int, reader: Reader) -> Dataset:
    """Training and test data with label names; test rows are split off where the source has no test split.

    Args:
        settings: which data.
        seed: of the split.
        reader: the task, made with these settings.

    Raises:
        ConfigError: no such file, column or label, or data that does not suit the task; the line names the key.
    """
    named: tuple[str, ...] = ()
    if settings.path:
        key = f"data.path = {settings.path!r}"
        tables = _read_files(settings.path, key)
        named = read_names(Path(settings.path).expanduser(), key)
    else:
        key = f"data.name = {settings.name!r}"
        tables = {"train": _built_in(settings, reader)} if settings.name in BUILT_IN_DATA else _read_hub(settings.name)
    tables = _unfolded(tables, reader, key)
    columns = _columns(settings, reader, tables["train"])
    for table in tables.values():
        _check_columns(table, columns, settings, reader)
    names = _label_names(settings, reader, columns, tables, named, key) if reader.labelled else ()
    reader.check_labels(names)
    parts, skipped = {}, []
    for part in ("train", "test"):
        if part not in tables:
            continue
        left = Skipped()
        parts[part] = _examples(tables[part], columns, settings, reader, Labels(names), left, key)
        if left.first:
            row, label = left.first
            raise ConfigError(f"{key}: row {row} has label {label!r}, allowed are {', '.join(names[:20])}")
        skipped += [f"{key}, {part}: {left}"] if str(left) else []
        if not len(parts[part]):
            needed = " and ".join(column.role for column in columns if column.role != "pair")
            test = "test " if part == "test" else ""
            raise ConfigError(f"{key}: there are no {test}rows with {needed}")
    train, held_out = parts["train"], parts.get("test")
    if held_out is None:
        rest, own = split(train, seed, settings.test)
        train, held_out = train.take(rest), train.take(own)
    return Dataset(train, held_out, names, tuple(skipped))


def _built_in(settings: DataSettings, reader: Reader) -> Any:
    """The table of a built-in data set.

    Raises:
        ConfigError: the task cannot learn from it.
    """
    if settings.name == FUNCTIONS:
        rows = functions.load()
        return datasets.Dataset.from_dict({name: [getattr(row, name) for row in rows] for name in functions.Function._fields})
    if reader.docstrings:
        raise ConfigError(
            f"data.name = {DOCSTRINGS!r}: {reader.docstrings}, allowed with data.task = {reader.name!r} are data.path and "
            "Hugging Face ids"
        )
    examples, names = docstrings.load()
    assert examples.groups is not None
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict({"text": list(examples.texts), "label": examples.groups.tolist()}, features)


def load_own(settings: DataSettings, names: tuple[str, ...], reader: Reader) -> Own:
    """A device's own rows of `data.path`, with its server's label names; rows that do not fit are left out and counted.

    Labels are taken by name (`Labels.of_device`); names of its own the file may have from a class-label column, or from a
    labels.json beside it.

    Raises:
        ConfigError: no such file or column, or data that does not suit the task; the line names the key of node-config.
    """
    key = f"node-config data-path = {settings.path!r}"
    tables = _unfolded(_read_files(settings.path, key), reader, key)
    columns = _columns(settings, reader, tables["train"], "node-config ")
    for table in tables.values():
        _check_columns(table, columns, settings, reader, "node-config ")
    own: tuple[str, ...] = ()
    if reader.labelled:
        own = read_names(Path(settings.path).expanduser(), key) or _class_names(columns, tables["train"])
    labels, skipped = Labels.of_device(names, own), Skipped()
    parts = {part: _examples(table, columns, settings, reader, labels, skipped, key) for part, table in tables.items()}
    return Own(parts["train"], parts.get("test"), skipped)


def look(settings: DataSettings, readers: Sequence[Reader]) -> Look:
    """What a device's own files hold, for a check before there is a run that says which task it is.

    Args:
        settings: `path`, and the columns by the device's or the default names.
        readers: tasks made with these settings, the most usual first.

    Raises:
        ConfigError: the files cannot be read, or their labels cannot be used.
    """
    key = f"node-config data-path = {settings.path!r}"
    found, skipped = _read_files(settings.path, key), Skipped()
    rows, present = {name: len(table) for name, table in found.items()}, found["train"].column_names
    problem: ConfigError | None = None
    for reader in sorted(readers, key=lambda reader: -len(reader.columns(present))):  # who reads more knows more of them
        try:
            tables = _unfolded(found, reader, key)
            columns = reader.columns(tables["train"].column_names)
            if not {column.name for column in columns} <= set(tables["train"].column_names):
                continue
            for table in tables.values():
                _check_columns(table, columns, settings, reader, "node-config ")
            named = read_names(Path(settings.path).expanduser(), key)
            names = _label_names(settings, reader, columns, tables, named, key) if reader.labelled else ()
            for table in tables.values():
                _examples(table, columns, settings, reader, Labels(names), skipped, key)
            return Look({name: len(table) for name, table in tables.items()}, present, reader.name, names, skipped)
        except ConfigError as error:
            problem, skipped = problem or error, Skipped()
    if problem is not None:
        raise problem
    return Look(rows, present, "", (), skipped)


def _columns(settings: DataSettings, reader: Reader, table: Any, prefix: str = "data.") -> Sequence[Column]:
    columns = reader.columns(table.column_names)
    if settings.pair_column and all(column.key != "pair-column" for column in columns):
        raise ConfigError(f"{prefix}pair-column = {settings.pair_column!r}: allowed is '' with data.task = {reader.name!r}")
    return columns


# -- files and the Hub --------------------------------------------------------------------------------------------------
def _read_files(path: str, key: str) -> dict[str, Any]:
    """Tables of `train` and perhaps `test`, mapped from the library's cache."""
    place = Path(path).expanduser()
    if place.is_dir():
        files = {
            name: file
            for name in ("train", "test")
            if (file := next((place / f"{name}{end}" for end in FILE_FORMATS if (place / f"{name}{end}").is_file()), None))
        }
        if "train" not in files:
            raise ConfigError(f"{key}: no train file in it, allowed endings are {', '.join(FILE_FORMATS)}")
    elif place.is_file():
        files = {"train": place}
    else:
        raise ConfigError(f"{key}: there is no such file or folder")
    ending = files["train"].suffix
    if ending not in FILE_FORMATS:
        raise ConfigError(f"{key}: allowed endings are {', '.join(FILE_FORMATS)}")
    try:
        return {
            name: datasets.load_dataset(
                FILE_FORMATS[file.suffix], data_files=str(file), split="train", **READER_OPTIONS.get(file.suffix, {})
            )
            for name, file in files.items()
        }
    except Exception as error:  # the reader's own errors are many and long
        raise ConfigError(f"{key}: cannot be read ({_deepest(error)})") from error


def _unfolded(tables: dict[str, Any], reader: Reader, key: str) -> dict[str, Any]:
    """The tables as the task takes them."""
    try:
        return {name: reader.table(table) for name, table in tables.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{key}: no data as data.task = {reader.name!r} knows it ({error_line(error)})") from None


def _read_hub(name: str) -> dict[str, Any]:
    try:
        tables = datasets.load_dataset(name)
    except Exception as error:  # not there, no network, gated: all the same to the user
        raise ConfigError(f"data.name = {name!r}: cannot be loaded ({_deepest(error)})") from error
    if "train" not in tables:
        raise ConfigError(f"data.name = {name!r}: it has no split 'train', but {sorted(tables)}")
    return dict(tables)


def _deepest(error: BaseException) -> str:
    """First line of the error at the bottom: the library wraps readers' errors in one that says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


# -- columns ------------------------------------------------------------------------------------------------------------
def _check_columns(
    table: Any, columns: Sequence[Column], settings: DataSettings, reader: Reader, prefix: str = "data."
) -> None:
    owner = [Column("owner", "id-column", settings.id_column)] if settings.id_column else []
    for column in (*columns, *owner):
        key, there = f"{prefix}{column.key} = {column.name!r}", table.column_names
        if column.name not in there:
            raise ConfigError(f"{key}: no such column, allowed are {there}{nearest(column.name, there)}")
        if column.nested:
            continue
        feature = table.features[column.name]
        held = isinstance(feature, datasets.List | datasets.LargeList)
        if column.lists and not (held and isinstance(feature.feature, datasets.Value | datasets.ClassLabel)):
            raise ConfigError(f"{key}: allowed with data.task = {reader.name!r} are {column.lists}")
        if held and not column.lists:
            raise ConfigError(f"{key}: it holds lists, allowed with data.task = {reader.name!r} is one value a row")


def _values(table: Any, column: str, key: str) -> list[Any]:
    try:
        return list(table[column][:])
    except UnicodeDecodeError as error:  # parquet and jsonl are not looked at when they are read
        raise ConfigError(f"{key}: column {column!r} is no utf-8 text ({error})") from None


def _label_names(
    settings: DataSettings,
    reader: Reader,
    columns: Sequence[Column],
    tables: dict[str, Any],
    named: tuple[str, ...],
    key: str,
) -> tuple[str, ...]:
    """The run's label names: `data.labels`, else labels.json (`named`), else a class-label column's, else the values."""
    if settings.labels:
        return tuple(name.strip() for name in settings.labels.split(","))
    if names := named or _class_names(columns, tables["train"]):
        return names
    column = next(column.name for column in columns if column.role == "label")
    values = (value for table in tables.values() for value in _flat(_values(table, column, key)) if not absent(value))
    return names_in(values, column, reader.label_word, reader.bare_ids)


def _class_names(columns: Sequence[Column], table: Any) -> tuple[str, ...]:
    """The names that a class-label column has for its ids; () where it has none."""
    feature = table.features[next(column.name for column in columns if column.role == "label")]
    feature = getattr(feature, "feature", feature)
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()


def _flat(column: Sequence[Any]) -> Iterator[Any]:
    for value in column:
        yield from value if isinstance(value, list) else [value]


# -- rows ---------------------------------------------------------------------------------------------------------------
def _examples(
    table: Any,
    columns: Sequence[Column],
    settings: DataSettings,
    reader: Reader,
    labels: Labels,
    skipped: Skipped,
    key: str,
) -> Examples:
    """The rows that the task can use; the others are counted."""
    skipped.rows += len(table)
    roles = [column.role for column in columns]
    owners = _values(table, settings.id_column, key) if settings.id_column else None
    kept: list[int] = []
    examples: list[Example] = []
    for row, values in enumerate(zip(*(_values(table, column.name, key) for column in columns), strict=True)):
        try:
            examples.append(reader.read(dict(zip(roles, values, strict=True)), labels))
            kept.append(row)
        except LeftOut as why:
            skipped.leave(row, why)
        except BadRow as error:
            raise ConfigError(f"{key}: row {row} {error}") from None
    names = None if owners is None else tuple("" if absent(owners[row]) else str(owners[row]) for row in kept)
    return _stack(examples, reader, names)


def _stack(examples: Sequence[Example], reader: Reader, owners: tuple[str, ...] | None = None) -> Examples:
    def column(name: str) -> tuple[Any, ...] | None:
        values = tuple(getattr(example, name) for example in examples)
        return values if any(value is not None for value in values) else None

    grouped = reader.grouped and all(example.group is not None for example in examples)
    groups = np.array([example.group for example in examples], dtype=np.int64) if grouped else None
    texts = tuple(example.text for example in examples)
    target, identity, category = (column(name) for name in ("target", "identity", "category"))
    return Examples(texts, groups, column("pair"), owners, target, identity, category)
