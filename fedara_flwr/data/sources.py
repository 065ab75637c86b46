"""Reads a data set by the run's settings: built in, from local files, or from the Hugging Face Hub. A task reads its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from fedara_flwr.config import BUILT_IN_DATA, DOCSTRINGS, FUNCTIONS, DataSettings
from fedara_flwr.data import docstrings, functions
from fedara_flwr.data.examples import Dataset, Examples
from fedara_flwr.data.files import SPLITS, places, read_files, read_hub
from fedara_flwr.data.labels import Labels, Ordered, check_names, names_in, read_names
from fedara_flwr.data.partitions import split
from fedara_flwr.data.reading import Column, Example, Reader, refuse_shared
from fedara_flwr.data.skipped import WITHOUT_LABEL, LeftOut, Skipped, absent, spelled
from fedara_flwr.data.tables import Table, Unreadable, column_problem
from fedara_flwr.keys import ConfigError, nearest
from fedara_flwr.log import error_line

SHOWN = 20  # columns in an error's line
NONE = "-"  # a split that is there and is not to be used


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
    """Training, validation and test data with label names. What the source has no split for is cut from its training rows: the
    test here, the validation where the federation is dealt out.

    Args:
        settings: which data.
        seed: of the cut.
        reader: the task, made with these settings.

    Raises:
        ConfigError: no such file, column or label, or data that does not suit the task; the line names the key.
    """
    if settings.path:
        key = f"data.path = {settings.path!r}"
        found = read_files(settings.path, settings.format, settings.subset, key)
    else:
        key = f"data.name = {settings.name!r}"
        found = (
            {"train": _built_in(settings, reader)}
            if settings.name in BUILT_IN_DATA
            else read_hub(settings.name, settings.subset, key)
        )
    tables = _unfolded(_splits(settings, found, key), reader, key)
    columns = _columns(settings, reader, tables, key)
    labels = _labels(settings, reader, columns, tables, key)
    reader.check_labels(labels.names)
    parts: dict[str, Examples] = {}
    notes: list[str] = []
    for part, table in tables.items():
        left = Skipped()
        parts[part] = _examples(table, columns, settings, reader, labels, left, key)
        if left.first:
            row, label = left.first
            raise ConfigError(f"{key}: row {row} has label {label!r}, allowed are {', '.join(labels.names[:20])}")
        if not len(parts[part]):
            if part == "train" or left.reasons.keys() - {WITHOUT_LABEL}:
                needed = " and ".join(column.role for column in columns if column.role != "pair")
                why = f" ({left})" if str(left) else ""
                raise ConfigError(f"{key}: there are no {'' if part == 'train' else part + ' '}rows with {needed}{why}")
            notes.append(f"{key}: no row of the {part} split has a label: it is not used")
            del parts[part]
        elif str(left):
            notes.append(f"{key}, {part}: {left}")
    if "test" not in parts and "test" in tables and "validation" in parts:
        notes.append(f"{key}: the validation split is the test; what is validated on is cut from the training rows")
        parts["test"] = parts.pop("validation")
    train, held_out = parts["train"], parts.get("test")
    if held_out is None:
        rest, own = split(train, seed, settings.test)
        train, held_out = train.take(rest), train.take(own)
    return Dataset(train, held_out, labels.names, tuple(notes), parts.get("validation"))


def _own_splits(tables: Mapping[str, Table], key: str) -> dict[str, Table]:
    """A device's tables to train on and to test on, by their names: the run's settings of splits are not for them."""
    usual = {part: next((name for name in tables if name.lower() in SPLITS[part]), "") for part in ("train", "test")}
    if not usual["train"]:
        line = f"its splits are {', '.join(sorted(tables)) or 'none'}, allowed is one that is called train"
        raise ConfigError(f"{key}: {line}", "there is no split to train on")
    return {part: tables[name] for part, name in usual.items() if name}


def _splits(settings: DataSettings, tables: Mapping[str, Table], key: str) -> dict[str, Table]:
    """The tables that stand for train, validation and test: by the keys, else by their names."""
    found = {}
    for part, usual in SPLITS.items():
        asked: str = getattr(settings, f"{part}_split")
        if asked == NONE and part != "train":
            continue
        if asked and asked not in tables:
            there = sorted(tables)
            raise ConfigError(
                f"data.{part}-split = {asked!r}: allowed with {key} are {', '.join(there)}{nearest(asked, there)}"
            )
        name = asked or next((name for name in tables if name.lower() in usual), "")
        if name:
            found[part] = tables[name]
    if "train" not in found:
        raise ConfigError(f"data.train-split = '': allowed with {key} are {', '.join(sorted(tables))}")
    return found


def _with_column(table: Table, name: str, values: Callable[[], list[Any]]) -> Table:
    """The table with a column that has these values."""
    names = [*(other for other in table.column_names if other != name), name]
    return Table(names, len(table), lambda column: values() if column == name else table[column], short=table.short)


def _built_in(settings: DataSettings, reader: Reader) -> Table:
    """The table of a built-in data set.

    Raises:
        ConfigError: the task cannot learn from it.
    """
    if settings.name == FUNCTIONS:
        rows = functions.load()
        return Table.from_columns({name: [getattr(row, name) for row in rows] for name in functions.Function._fields})
    if reader.docstrings:
        raise ConfigError(
            f"data.name = {DOCSTRINGS!r}: {reader.docstrings}, allowed with data.task = {reader.name!r} are data.path and "
            "Hugging Face ids"
        )
    examples, names = docstrings.load()
    assert examples.groups is not None
    found = {"text": list(examples.texts), "label": examples.groups.tolist()}
    return Table(list(found), len(examples), found.__getitem__, {"label": dict(enumerate(names))})


def load_own(settings: DataSettings, names: tuple[str, ...], reader: Reader) -> Own:
    """A device's own rows of `data.path`, with its server's label names; rows that do not fit are left out and counted.

    Labels are read as the server reads its own (data/labels); names of its own the file may have from a class-label column, or
    from a labels.json beside it.

    Raises:
        ConfigError: no such file or column, or data that does not suit the task; the line names the key of node-config.
    """
    key = f"node-config data-path = {settings.path!r}"
    found = read_files(settings.path, settings.format, "", key, copies=False)
    tables = _unfolded(_own_splits(found, key), reader, key)
    columns = _columns(settings, reader, tables, key, "node-config ")
    labels, skipped = _labels(settings, reader, columns, tables, key, names), Skipped()
    parts = {part: _examples(table, columns, settings, reader, labels, skipped, key) for part, table in tables.items()}
    return Own(parts["train"], parts.get("test") or None, skipped)


def look(settings: DataSettings, readers: Sequence[Reader]) -> Look:
    """What a device's own files hold, for a check before there is a run that says which task it is.

    Args:
        settings: `path`, and the columns by the device's or the default names.
        readers: tasks made with these settings, the most usual first.

    Raises:
        ConfigError: the files cannot be read, or their labels cannot be used.
    """
    key = f"node-config data-path = {settings.path!r}"
    found = _own_splits(read_files(settings.path, settings.format, "", key, copies=False), key)
    skipped = Skipped()
    rows, present = {name: len(table) for name, table in found.items()}, found["train"].column_names
    problem: ConfigError | None = None
    for reader in sorted(readers, key=lambda reader: -len(reader.columns(present))):  # who reads more knows more of them
        try:
            tables = _unfolded(found, reader, key)
            there = tables["train"].column_names
            if not {column.name for column in reader.columns(there)} <= set(there):
                continue
            columns = _columns(settings, reader, tables, key, "node-config ")
            labels = _labels(settings, reader, columns, tables, key)
            for table in tables.values():
                _examples(table, columns, settings, reader, labels, skipped, key)
            return Look({name: len(table) for name, table in tables.items()}, present, reader.name, labels.names, skipped)
        except ConfigError as error:
            problem, skipped = problem or error, Skipped()
    if problem is not None:
        raise problem
    return Look(rows, present, "", (), skipped)


def _columns(
    settings: DataSettings, reader: Reader, tables: dict[str, Table], key: str, prefix: str = "data."
) -> Sequence[Column]:
    """The columns that the task reads, looked at in every table; one whose answers were not published gets a column of none."""
    columns = reader.columns(tables["train"].column_names)
    if settings.pair_column and all(column.key != "pair-column" for column in columns):
        line = f"allowed is '' with data.task = {reader.name!r}"
        raise ConfigError(f"{prefix}pair-column = {settings.pair_column!r}: {line}", f"pair-column: {line}")
    label = next((column for column in columns if column.role == "label"), None)
    if label is not None:
        for column in columns:
            refuse_shared((column, label), prefix)
    for part, table in tables.items():
        if part != "train" and label and label.name not in table.column_names:
            _check_columns(table, [column for column in columns if column is not label], settings, reader, key, prefix)
            tables[part] = _with_column(table, label.name, partial(_none, len(table)))
        else:
            _check_columns(table, columns, settings, reader, key, prefix)
    return columns


def _none(rows: int) -> list[Any]:
    return [None] * rows


def _unfolded(tables: Mapping[str, Table], reader: Reader, key: str) -> dict[str, Table]:
    """The tables as the task takes them."""
    try:
        return {name: reader.table(table) for name, table in tables.items()}
    except Unreadable as error:
        raise ConfigError(f"{key}: {error}", error.told) from None
    except (KeyError, TypeError, AttributeError) as error:
        told = f"no data as data.task = {reader.name!r} knows it"
        raise ConfigError(f"{key}: {told} ({error_line(error)})", told) from None


# -- columns ------------------------------------------------------------------------------------------------------------
def _check_columns(
    table: Table, columns: Sequence[Column], settings: DataSettings, reader: Reader, source: str, prefix: str = "data."
) -> None:
    owner = [Column("owner", "id-column", settings.id_column)] if settings.id_column else []
    for column in (*columns, *owner):
        key, there = f"{prefix}{column.key} = {column.name!r}", table.column_names
        if column.name not in there:
            shown = f"{there[:SHOWN]} and {len(there) - SHOWN} more" if len(there) > SHOWN else there
            line = f"{key}: no such column, allowed are {shown}{nearest(column.name, there)}"
            raise ConfigError(line, f"{column.key}: no such column")
        if column.nested:
            continue
        problem = column_problem(_values(table, column.name, source), bool(column.lists))
        if problem:
            allowed = f"are {column.lists}" if column.lists else "is one value a row"
            line = f"it holds {problem}, allowed with data.task = {reader.name!r} {allowed}"
            raise ConfigError(f"{key}: {line}", f"{column.key}: {line}")


def _values(table: Table, column: str, key: str) -> list[Any]:
    try:
        return table[column]
    except Unreadable as error:
        raise ConfigError(f"{key}: {error}", error.told) from None


def _labels(
    settings: DataSettings,
    reader: Reader,
    columns: Sequence[Column],
    tables: dict[str, Table],
    key: str,
    names: tuple[str, ...] | None = None,
) -> Labels:
    """How the tables' labels are read; `names` are the run's, where it has them: else `data.labels`, what the data says, or all
    values that it has. A table that has other names for its ids gets these in their place.

    Raises:
        ConfigError: labels that cannot be used, or are places outside of a list.
    """
    if not reader.labelled:
        return Labels(())
    column = next(column.name for column in columns if column.role == "label")
    where = f"{key}: column {column!r}"
    ids: Mapping[int, str] = _names_beside(settings.path, key) or tables["train"].ids(column)
    for part, table in tables.items():
        own = table.ids(column)
        if own and own != ids and not (isinstance(ids, Ordered) and set(own.values()).isdisjoint(ids.values())):
            tables[part] = _with_column(table, column, partial(table.column, column, ids))
    values = [value for table in tables.values() for value in _flat(_values(table, column, key))]
    check_names(tuple(ids.values()), where)
    if names is None and settings.labels:
        names = check_names(tuple(name.strip() for name in settings.labels.split(",")), f"data.labels = {settings.labels!r}")
        if not set(ids.values()) <= set(names):  # the list is another one
            if set(ids.values()) & set(names):
                raise ConfigError(
                    f"data.labels = {settings.labels!r}: the data names its ids {', '.join(ids.values())}, allowed are "
                    "all of these"
                )
            ids = {}
    if names is None and not ids:
        return Labels(names_in(values, where, reader.label_word, reader.bare_ids))
    return Labels.of(tuple(ids.values()) if names is None else names, ids, values, where)


def _names_beside(path: str, key: str) -> Ordered:
    """labels.json beside the files, wherever they lie; empty without one."""
    folders = [folder for place in places(path, key) for folder in (place, place / "data")] if path else []
    found = [names for names in (read_names(folder, key) for folder in folders) if names]
    if any(names != found[0] for names in found):
        raise ConfigError(f"{key}: its labels.json name the ids in several ways, allowed is one", "labels.json are several")
    return found[0] if found else Ordered()


def _flat(column: Sequence[Any]) -> Iterator[Any]:
    for value in column:
        yield from value if isinstance(value, list) else [value]


# -- rows ---------------------------------------------------------------------------------------------------------------
def _examples(
    table: Table,
    columns: Sequence[Column],
    settings: DataSettings,
    reader: Reader,
    labels: Labels,
    skipped: Skipped,
    key: str,
) -> Examples:
    """The rows that the task can use; the others are counted."""
    skipped.rows += len(table) + table.short
    if table.short:
        skipped.reasons["with too few fields"] += table.short
    roles = [column.role for column in columns]
    owners = _values(table, settings.id_column, key) if settings.id_column else None
    kept: list[int] = []
    examples: list[Example] = []
    for row, values in enumerate(zip(*(_values(table, column.name, key) for column in columns), strict=True)):
        try:
            example = reader.read(dict(zip(roles, values, strict=True)), labels)
            if owners is not None and absent(owners[row]):
                raise LeftOut("without owner")
            examples.append(example)
            kept.append(row)
        except LeftOut as why:
            skipped.leave(row, why)
    names = None if owners is None else tuple(spelled(owners[row]) for row in kept)
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
