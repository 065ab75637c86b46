"""Reads a data set by the run's settings: built in, from local files, or from the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from fedara_flwr.config import ConfigError, DataSettings, nearest
from fedara_flwr.data import docstrings, tags
from fedara_flwr.data.examples import Dataset, Examples
from fedara_flwr.data.partitions import split

datasets.disable_progress_bars()
MAX_LABELS = 10_000
TAGGED = "token-classification"  # the task whose rows are words and tags
# pandas would read a label "None" or "NA" as missing
READER_OPTIONS: dict[str, dict[str, Any]] = {".csv": {"keep_default_na": False, "na_values": [""]}}
FORMATS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json"}


@lru_cache(maxsize=4)
def load(settings: DataSettings, seed: int, names: tuple[str, ...] = ()) -> Dataset:
    """Training and test data with label names; test rows are split off where the source has no test split.

    Args:
        settings: which data.
        seed: of the split.
        names: label names to read labels by, where they are given from outside (a device and its server).

    Raises:
        ConfigError: no such file, column or label, or data that does not suit `data.task`; the line names the key.
    """
    tagged = settings.task == TAGGED
    if tagged and settings.pair_column:
        raise ConfigError(f"data.pair-column = {settings.pair_column!r}: allowed is '' with data.task = {TAGGED!r}")
    if settings.path:
        splits, labels = _read_files(Path(settings.path).expanduser()), _read_labels(Path(settings.path).expanduser())
        key = f"data.path = {settings.path!r}"
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
    names = names or _label_names(settings, splits, labels)
    if tagged:
        _check_prefixes(settings, names)
    train = _examples(splits["train"], settings, names, key)
    if not len(train):
        raise ConfigError(f"{key}: there are no rows with text and label")
    if "test" in splits:
        test_rows = _examples(splits["test"], settings, names, key)
        if not len(test_rows):
            raise ConfigError(f"{key}: there are no test rows with text and label")
    else:
        rest, held_out = split(train, seed, settings.test)
        train, test_rows = train.take(rest), train.take(held_out)
    return Dataset(train, test_rows, names)


def _read_files(path: Path) -> dict[str, Any]:
    if path.is_dir():
        files = {
            name: found
            for name in ("train", "test")
            if (found := next((path / f"{name}{ending}" for ending in FORMATS if (path / f"{name}{ending}").is_file()), None))
        }
        if "train" not in files:
            raise ConfigError(f"data.path = {str(path)!r}: no train file in it, allowed endings are {', '.join(FORMATS)}")
    elif path.is_file():
        files = {"train": path}
    else:
        raise ConfigError(f"data.path = {str(path)!r}: there is no such file or folder")
    ending = files["train"].suffix
    if ending not in FORMATS:
        raise ConfigError(f"data.path = {str(path)!r}: allowed endings are {', '.join(FORMATS)}")
    try:
        return {
            name: datasets.load_dataset(
                FORMATS[file.suffix],
                data_files=str(file),
                split="train",
                keep_in_memory=True,
                **READER_OPTIONS.get(file.suffix, {}),
            )
            for name, file in files.items()
        }
    except Exception as error:  # the reader's own errors are many and long
        raise ConfigError(f"data.path = {str(path)!r}: cannot be read ({_first_line(error)})") from error


def _read_labels(path: Path) -> tuple[str, ...]:
    """labels.json beside the files: a list of names by label id."""
    file = (path if path.is_dir() else path.parent) / "labels.json"
    if not file.is_file():
        return ()
    try:
        names = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"data.path = {str(path)!r}: labels.json is no JSON ({error})") from None
    if not isinstance(names, list):
        raise ConfigError(f"data.path = {str(path)!r}: labels.json holds {type(names).__name__}, allowed is a list of names")
    return tuple(str(name) for name in names)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _read_hub(name: str) -> dict[str, Any]:
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # not there, no network, gated: all the same to the user
        raise ConfigError(f"data.name = {name!r}: cannot be loaded ({_first_line(error)})") from error
    if "train" not in found:
        raise ConfigError(f"data.name = {name!r}: it has no split 'train', but {sorted(found)}")
    return dict(found)


def _label_names(settings: DataSettings, splits: dict[str, Any], labels: tuple[str, ...]) -> tuple[str, ...]:
    if settings.labels:
        return tuple(name.strip() for name in settings.labels.split(","))
    if labels:
        return labels
    column, tagged = settings.label_column, settings.task == TAGGED
    feature = splits["train"].features[column]
    feature = feature.feature if tagged else feature
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    values = {_label(value) for table in splits.values() for value in _flat(table[column]) if value is not None}
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


def _label(value: Any) -> Any:
    """Booleans, and whole numbers that a reader made floats because one was missing, as integers."""
    whole = isinstance(value, bool) or (isinstance(value, float) and value.is_integer())
    return int(value) if whole else value


def _flat(column: Any) -> Iterator[Any]:
    for value in column:
        yield from value if isinstance(value, list) else [value]


def _check_columns(table: Any, settings: DataSettings) -> None:
    tagged = settings.task == TAGGED
    for key, column, lists in (
        ("data.text-column", settings.text_column, tagged),
        ("data.label-column", settings.label_column, tagged),
        ("data.pair-column", settings.pair_column, False),
        ("data.id-column", settings.id_column, False),
    ):
        if not column:
            continue
        if column not in table.column_names:
            raise ConfigError(
                f"{key} = {column!r}: no such column, allowed are {table.column_names}{nearest(column, table.column_names)}"
            )
        feature = table.features[column]
        held = isinstance(feature, datasets.List | datasets.LargeList)
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


def _examples(table: Any, settings: DataSettings, names: tuple[str, ...], key: str) -> Examples:
    ids = {name: i for i, name in enumerate(names)}
    kept: list[int] = []

    def number(row: int, label: Any) -> int:
        label = _label(label)
        found = label if isinstance(label, int) else -1 if label is None else ids.get(str(label), -1)
        if not 0 <= found < len(names):
            raise ConfigError(f"{key}: row {row} has label {label!r}, allowed are {', '.join(names[:20])}")
        return found

    def column(name: str) -> tuple[str, ...] | None:
        if not name:
            return None
        values = list(table[name])
        return tuple("" if values[row] is None else str(values[row]) for row in kept)

    rows = enumerate(zip(table[settings.text_column], table[settings.label_column], strict=True))
    if settings.task == TAGGED:
        sentences, numbers = [], []
        for row, (words, labels) in rows:
            if words is None or labels is None:
                continue
            _check_sentence(key, row, words, labels)
            if any(word.strip() for word in words):
                kept.append(row)
                sentences.append(tuple(words))
                numbers.append(tuple(number(row, label) for label in labels))
        texts = tuple(" ".join(words) for words in sentences)
        main = tags.main_types(numbers, names)
        return Examples(texts, main, None, column(settings.id_column), tuple(sentences), tuple(numbers))
    index = []
    for row, (text, label) in rows:
        if text is not None and str(text).strip() and label is not None:
            kept.append(row)
            index.append(number(row, label))
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
