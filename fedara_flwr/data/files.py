"""Which local files a path means, and the tables of its splits."""

from __future__ import annotations

import errno
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pydantic import Field

from fedara_flwr.data.tables import ENDINGS, PACKED, Table, Unreadable, class_labels, ending, is_table, library, read_file
from fedara_flwr.files import data_cache, unwritable
from fedara_flwr.keys import ConfigError, Group, check_options, read_options
from fedara_flwr.log import first_line

logger = logging.getLogger(__name__)
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
"""What the three splits are called, in files' names and on the Hub."""
NAMED = re.compile(r"(?P<name>[A-Za-z]+)(?:[-_.].*)?", re.S)
PIECE = re.compile(r"\w+-\d+-of-\d+\..*")
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
LIBRARY = ("dataset_dict.json", "state.json", "dataset_info.json")  # what `save_to_disk` writes


class FormatOptions(Group):
    """Keys of `data.format`."""

    delimiter: str = Field("", max_length=1, description="what parts the fields of a csv; '' = found in its first line")
    encoding: str = Field("", description="of csv and JSON files, as Python calls it, for example 'cp1252'; '' = utf-8")
    columns: list[str] = Field([], description="names of a csv's columns, where its first line does not name them")


def read_files(path: str, options: str, subset: str, key: str, copies: bool = True) -> dict[str, Table]:
    """Tables of `train` and, where there are files of that name, of `validation` and `test`.

    Args:
        path: a file, several with commas between them, or a folder: with files named after the splits, in one piece or
            several, there or in its folder `data`; one that `datasets` wrote (`save_to_disk`); or a copy of a Hub repository.
        options: of FormatOptions, as TOML.
        subset: configuration of a copied Hub repository.
        key: names the setting in an error's line.
        copies: whether what a library copies in order to read it may stay, for the next process that reads it.

    Raises:
        ConfigError: nothing there, or it cannot be read; one line that names file and place.
    """
    how = check_options(FormatOptions, read_options("data.format", options), "files", "data.format", "reading")
    assert isinstance(how, FormatOptions)
    place, *more = places(path, key)
    if not more and place.is_dir():
        if any(os.path.isfile(place / name) for name in LIBRARY):
            return _saved(place, key)
        try:
            files = _by_split(place, key) or _by_split(place / "data", key)
        except OSError as error:
            raise ConfigError(f"{key}: the folder cannot be read ({first_line(error)})", "the folder cannot be read") from None
        if "train" not in files:
            readme = place / "README.md"
            if readme.is_file() and "configs:" in readme.read_text(encoding="utf-8", errors="replace"):
                return read_hub(str(place), subset, key, copies)
            there = ", ".join(sorted(file.name for file in place.iterdir() if is_table(file))[:9])
            raise ConfigError(
                f"{key}: no train file in it{f', but {there}' if there else ''}; allowed are train.*, validation.* and test.*, "
                f"with one of the endings {', '.join(ENDINGS)}",
                "no train file in the folder",
            )
    else:
        files = {"train": [place, *more]}
    return {split: _joined([_read(file, how, key) for file in found], found, key) for split, found in files.items()}


def places(path: str, key: str) -> list[Path]:
    """The file or folder that a path means, or the several files with commas between them.

    Raises:
        ConfigError: nothing is there.
    """
    names = [path] if os.path.exists(os.path.expanduser(path)) else [name.strip() for name in path.split(",")]
    found = [os.path.expanduser(name) for name in names]  # os.path takes a path of any length, and users that are not there
    if names == [path] and not os.path.exists(found[0]) or len(names) > 1 and not all(map(os.path.isfile, found)):
        raise ConfigError(f"{key}: there is no such file or folder", "there is no such file or folder")
    return [Path(name) for name in found]


def read_hub(name: str, subset: str, key: str, copies: bool = True) -> dict[str, Table]:
    """All splits of a data set on the Hub, or of a folder that is a copy of one; `copies` as in `read_files`.

    Raises:
        ConfigError: it cannot be loaded, or needs a subset.
    """
    datasets = library()
    from datasets.packaged_modules.csv.csv import Csv

    try:
        with _cache(copies) if Path(name).is_dir() else nullcontext() as cache:
            if Path(name).is_dir():
                builder = datasets.load_dataset_builder(name, subset or None, cache_dir=cache)
                files = [Path(file) for part in (builder.config.data_files or {}).values() for file in part]
                if isinstance(builder, Csv) and all(map(is_table, files)):
                    return _csv_of(builder, key)
            tables = datasets.load_dataset(name, subset or None, cache_dir=cache)
    except ConfigError:
        raise
    except Exception as error:  # not there, no network, gated, a subset to choose: the library's own errors are many
        known = re.search(r"(?:Please pick one among the available configs|Available): (\[.*?\])", str(error)[:9999], re.S)
        hint = f"data.subset = {subset!r}: allowed are {known[1]}" if known else f"cannot be loaded ({deepest(error)})"
        if isinstance(error, OSError) and error.errno in UNWRITABLE and not os.path.exists(error.filename or "."):
            hint = f"{error.filename} cannot be written ({error.strerror}): the environment variable HF_HOME names another"
        raise ConfigError(f"{key}: {hint}", f"the folder cannot be loaded ({type(error).__name__})") from None
    return {split: Table.of_library(table) for split, table in tables.items()}


def _csv_of(builder: Any, key: str) -> dict[str, Table]:
    """The csv files that a README names, read as others are: the library makes 007 a 7, and NA nothing."""
    config, ids = builder.config, class_labels(builder.info.features or {})
    mark = config.delimiter or config.sep or ","
    how = FormatOptions(
        delimiter="" if mark == "," else mark,
        encoding=config.encoding or "",
        columns=list(config.column_names or config.names or ()),
    )
    found = {}
    for split, names in config.data_files.items():
        files = [Path(name) for name in names]
        table = _joined([_read(file, how, key) for file in files], files, key)
        found[str(split)] = Table(table.column_names, len(table), table.__getitem__, ids, table.short)
    return found


@contextmanager
def _cache(copies: bool) -> Iterator[str]:
    """A folder for copies that this user alone can enter: the library's own cache is as open as the umask makes it.

    Without `copies`, or where none may be kept, it is gone afterwards; what was opened in it can be read on. A killed process
    leaves it, in the place that `fedara doctor` names.
    """
    place, kept = data_cache(), True
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept = not unwritable(place)
    except OSError:  # a folder of somebody else, or no folder
        kept = False
    if copies and kept:
        yield str(place)
    else:
        with tempfile.TemporaryDirectory(dir=place if kept else None) as folder:
            yield folder


def deepest(error: BaseException) -> str:
    """First line of the error at the bottom: libraries wrap readers' errors in ones that say nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _by_split(folder: Path, key: str) -> dict[str, list[Path]]:
    """Files of a folder by the split that their names begin with, in the order of their names.

    Raises:
        ConfigError: those of one split have different formats, as one file that somebody saved twice.
    """
    found: dict[str, list[Path]] = {}
    other = []
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not is_table(file) or not os.path.isfile(file):
            continue
        named = NAMED.fullmatch(file.name)
        split = next((split for split, names in SPLITS.items() if named and named["name"].lower() in names), "")
        if split:
            found.setdefault(split, []).append(file)
        elif file.name.lower().startswith(tuple(SPLITS)):
            other.append(file.name)
    for split, files in found.items():
        if two := next((file for file in files if ending(file) != ending(files[0])), None):
            line = f"{files[0].name} and {two.name} are one split in two formats, allowed is one"
            raise ConfigError(
                f"{key}: {line}; or name the files, with commas between them", "one split is there in two formats"
            )
        if len(files) > 1 and not all(PIECE.fullmatch(file.name) for file in files):
            logger.info("%s: %s is %s", key, split, ", ".join(file.name for file in files))
    if other:
        logger.info("%s: not read are %s", key, ", ".join(other))
    return found


def _read(file: Path, how: FormatOptions, key: str) -> Table:
    if not is_table(file):
        packed = ", ".join(filter(None, PACKED))
        allowed = f"allowed endings are {', '.join(ENDINGS)}; of text also packed, {packed}"
        raise ConfigError(f"{key}: {file.name}: {allowed}", "a file has an ending that is not known")
    try:
        return read_file(file, how.delimiter, how.encoding, how.columns)
    except Unreadable as error:
        raise ConfigError(f"{key}: {file.name} cannot be read: {error}", error.told) from None


def _joined(tables: Sequence[Table], files: Sequence[Path], key: str) -> Table:
    """The rows of several files as one table; ConfigError where they have other columns."""
    if len(tables) == 1:
        return tables[0]
    first = tables[0]
    for table, file in zip(tables, files, strict=True):
        if set(table.column_names) != set(first.column_names):
            raise ConfigError(
                f"{key}: {file.name} has the columns {table.column_names}, {files[0].name} has {first.column_names}; allowed "
                "are the same in all files of a split",
                "two files of a split have different columns",
            )
    names = first.column_names

    known = {name: next(filter(None, (table.ids(name) for table in tables)), {}) for name in names}

    def column(name: str) -> list[Any]:
        return [value for table in tables for value in table.column(name, known[name])]

    return Table(names, sum(map(len, tables)), column, known, sum(table.short for table in tables))


def _saved(place: Path, key: str) -> dict[str, Table]:
    try:
        found = library().load_from_disk(str(place))
    except Exception as error:  # a folder that was cut off or copied in part
        raise ConfigError(f"{key}: cannot be read ({deepest(error)})", "the folder cannot be read") from None
    found = found.with_format(None)  # as torch's tensors, a label would be 'tensor(1)'
    tables = found if isinstance(found, dict) else {"train": found}
    return {split: Table.of_library(table) for split, table in tables.items()}
