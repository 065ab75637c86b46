"""Tables of local files: what stands in a column, as it is written there. No task and no setting of a run is known here."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedara_flwr.log import first_line

PACKED: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DELIMITERS = ",;\t|"
KINDS = {  # what a file begins with that is no text, and no table that its ending names
    b"version https://git-lfs": "a pointer of Git LFS and not the file, `git lfs pull` gets it",
    b"\x1f\x8b": "a gzip file, allowed is such with the ending .gz",
    b"PK\x03\x04": "a zip file or a spreadsheet, allowed is text: unpack it, or save it as csv",
    b"PAR1": "a parquet file, allowed is such with the ending .parquet",
}
SINGLE = {"float": np.float32, "float32": np.float32, "halffloat": np.float16, "float16": np.float16}
NO_JSON = (ValueError, RecursionError)
ROWS = ("data", "rows", "examples", "instances", "records", "items")  # under which a JSON object may have its rows


def library() -> Any:
    """The library `datasets`. With pandas it takes 50 MB and seconds of a small device, and most files need neither."""
    import datasets

    datasets.disable_progress_bars()
    return datasets


class Unreadable(Exception):
    """A file that cannot be read; the text says why and where.

    Attributes:
        told: the same without anything that stands in the file, as a device may tell its server.
    """

    def __init__(self, why: str, told: str = "") -> None:
        super().__init__(why)
        self.told = told or why


class Table:
    """Named columns of equal length, each read once, when it is first asked for.

    Attributes:
        column_names: in the file's order.
        short: rows that had fewer fields than the header names, and are in no column.
    """

    def __init__(
        self,
        column_names: Sequence[str],
        rows: int,
        read: Callable[[str], list[Any]],
        ids: Mapping[str, Mapping[int, str]] | None = None,
        short: int = 0,
    ) -> None:
        """`read` gives a column by its name; `ids` are names of class-label columns by id."""
        self.column_names, self.short = list(column_names), short
        self._rows, self._read, self._ids = rows, cache(read), ids or {}

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, name: str) -> list[Any]:
        """The values of a column; Unreadable where the file says so when it is asked, as parquet does."""
        try:
            return self._read(name)
        except (OSError, pa.ArrowException, ValueError, OverflowError) as error:
            what = "is no utf-8 text" if isinstance(error, UnicodeDecodeError) else "cannot be read"
            raise Unreadable(f"column {name!r} {what} ({first_line(error)})", f"a column {what}") from None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        columns = [self[name] for name in self.column_names]
        for values in zip(*columns, strict=True):
            yield dict(zip(self.column_names, values, strict=True))

    def ids(self, name: str) -> dict[int, str]:
        """The names that a class-label column has for its ids; {} where it has none."""
        return dict(self._ids.get(name, {}))

    def column(self, name: str, ids: Mapping[int, str]) -> list[Any]:
        """The values of a column for one who has these names of ids: names, where the table's own ids are others."""
        own = self.ids(name)
        return [_named(value, own) for value in self[name]] if own and own != ids else self[name]

    @classmethod
    def from_columns(cls, columns: Mapping[str, list[Any]], short: int = 0) -> Table:
        """A table of lists of equal length."""
        return cls(list(columns), len(next(iter(columns.values()), [])), columns.__getitem__, short=short)

    @classmethod
    def from_list(cls, rows: Sequence[Mapping[str, Any]]) -> Table:
        """A table of rows, which may lack columns; these are None there."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        return cls.from_columns({name: [row.get(name) for row in rows] for name in names})

    @classmethod
    def of_library(cls, table: Any) -> Table:
        """A table of the library `datasets`."""
        kinds = {name: getattr(feature, "dtype", "") for name, feature in table.features.items()}
        return cls(
            table.column_names,
            len(table),
            lambda name: _shortest(list(table[name][:]), kinds[name]),
            class_labels(table.features),
        )


def read_file(path: Path, delimiter: str = "", encoding: str = "", columns: Sequence[str] = ()) -> Table:
    """The table of one file, by its ending.

    Args:
        delimiter: of a csv; '' = found in its first line.
        encoding: of a csv or JSON; '' = utf-8, with or without a byte order mark.
        columns: names of a csv's columns where its first line does not name them.

    Raises:
        Unreadable: in one line.
    """
    kind, packed = ending(path)
    try:
        with path.open("rb") as file:
            start = file.read(32)
        other = next((what for sign, what in KINDS.items() if start.startswith(sign)), "")
        if other and ("LFS" in other or not packed and kind not in (".parquet", ".arrow")):
            raise Unreadable(f"it is {other}")
        if kind == ".parquet":
            return _parquet(path)
        if kind == ".arrow":
            return Table.of_library(library().Dataset.from_file(str(path)))
        with PACKED[packed](path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowException, ValueError) as error:
        raise Unreadable(first_line(error), f"a file cannot be read ({type(error).__name__})") from None
    text = decoded(content, encoding)
    return READERS[kind](text, delimiter, columns)


def is_table(path: Path) -> bool:
    """Whether `read_file` knows the file's ending."""
    kind, packed = ending(path)
    return kind in (READERS if packed else ENDINGS)


def ending(path: Path) -> tuple[str, str]:
    """How a file's name ends, in small letters, and before that what it is packed with: ('.csv', '.gz')."""
    packed = path.suffix.lower() if path.suffix.lower() in PACKED else ""
    return Path(path.stem if packed else path).suffix.lower(), packed


def decoded(content: bytes, encoding: str) -> str:
    """The text of a file.

    Raises:
        Unreadable: it has another encoding; the likely one is said.
    """
    if not encoding and content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    try:
        return content.decode(encoding or "utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        likely = "" if encoding else "; data.format = \"encoding = 'cp1252'\" is likely"
        raise Unreadable(f"line {line} is no {encoding or 'utf-8'} text{likely}") from None
    except (LookupError, ValueError):
        why = f"there is no encoding {encoding!r}, allowed are those of Python such as 'cp1252'"
        raise Unreadable(why, "there is no such encoding") from None


# -- formats ------------------------------------------------------------------------------------------------------------
def _parquet(path: Path) -> Table:
    file = pq.ParquetFile(path)
    schema = file.schema_arrow
    features = library().Features.from_arrow_schema(schema) if b"huggingface" in (schema.metadata or {}) else {}

    def column(name: str) -> list[Any]:
        with pq.ParquetFile(path) as again:
            return _shortest(list(again.read([name])[name].to_pylist()), str(schema.field(name).type))

    _check_names(schema.names)
    with file:
        return Table(schema.names, file.metadata.num_rows, column, class_labels(features))


def _check_names(names: Sequence[str]) -> None:
    """Refuse a name that two columns have; '' is none, as commas at the end of a csv's lines make."""
    if twice := next((name for name, count in Counter(names).items() if name and count > 1), ""):
        raise Unreadable(f"two columns are called {twice!r}", "two columns have one name")


def _shortest(values: list[Any], kind: str) -> list[Any]:
    """Numbers of half or single precision as somebody writes them: 0.1, not 0.10000000149011612."""
    number = SINGLE.get(kind)
    return [None if v is None else float(str(number(v))) for v in values] if number else values


def _named(value: Any, ids: Mapping[int, str]) -> Any:
    if isinstance(value, list):
        return [_named(item, ids) for item in value]
    return ids.get(value) if isinstance(value, int) else value


def class_labels(features: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    """Column → name by id, of the features of a table of the library `datasets` that are class labels, or lists of these."""
    found = {}
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, library().ClassLabel) and inner.names:
            found[name] = dict(enumerate(inner.names))
    return found


def _csv(text: str, delimiter: str, columns: Sequence[str], usual: str = ",") -> Table:
    """Every value as it is written; None where nothing is. More fields than names are refused."""
    csv.field_size_limit(sys.maxsize)
    first = next(iter(text.splitlines()), "")
    if not first.strip():
        raise Unreadable("it is empty" if not text.strip() else "its first line is empty")
    # the one that parts the first line into most columns; the usual one where there is but one
    mark = delimiter or max(usual + DELIMITERS, key=lambda sign: len(next(csv.reader([first], delimiter=sign))))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    values: list[list[str | None]] = []
    begun, short = 1, 0
    try:
        names = [name.strip() for name in columns or next(reader)]
        values = [[] for _ in names]
        begun = reader.line_num + 1
        for row in reader:
            if len(row) > len(names):
                why = f"line {begun} has {len(row)} fields, {len(names)} are named"
                raise Unreadable(f"{why}; a text with {mark!r} must stand in quotes", why)
            if len(row) == len(names):
                for column, value in zip(values, row, strict=True):
                    column.append(value or None)
            else:
                short += bool(row)
            begun = reader.line_num + 1
    except csv.Error as error:
        why = "a quote that is not closed" if "unexpected end" in str(error) else "a quote in a quoted text must be doubled"
        raise Unreadable(f"line {begun}: {why}") from None
    _check_names(names)
    return Table.from_columns(dict(zip(names, values, strict=True)), short)


def _json(text: str, *_: object) -> Table:
    """An array of objects, also one level down ({"data": […]}), columns of values by row as pandas writes them, or lines."""
    try:
        whole = json.loads(text)
    except NO_JSON as error:
        if "\n" not in text.strip():
            raise Unreadable(f"no JSON ({first_line(error)})") from None
        return _lines(text)
    if isinstance(whole, dict):
        columns = list(whole.values())
        if columns and all(isinstance(value, dict) and value.keys() == columns[0].keys() for value in columns):
            rows = list(columns[0])
            return Table.from_columns({name: [value[row] for row in rows] for name, value in whole.items()})
        whole = next((whole[name] for name in ROWS if isinstance(whole.get(name), list)), [whole])
    if not isinstance(whole, list):
        raise Unreadable("it holds neither a list of objects nor one object a line")
    return _objects(enumerate(whole, 1), "entry")


def _lines(text: str, *_: object) -> Table:
    """One object a line; what begins as an array is read as one."""
    if text.lstrip()[:1] == "[":
        return _json(text)
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a text may hold other ends of a line
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except NO_JSON as error:
                raise Unreadable(f"line {number} is no JSON ({getattr(error, 'msg', type(error).__name__)})") from None
    return _objects(rows, "line")


def _objects(rows: Iterable[tuple[int, Any]], word: str) -> Table:
    found = []
    for number, row in rows:
        if not isinstance(row, dict):
            raise Unreadable(f"{word} {number} is no object")
        found.append(row)
    if not found:
        raise Unreadable("it is empty")
    return Table.from_list(found)


def _conll(text: str, *_: object) -> Table:
    """A word a line, its columns behind it, an empty line between sentences: lists of words, and of the last column's tags."""
    words: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    for number, line in enumerate(text.split("\n"), 1):
        parts = line.split()
        fields = line.split("\t") if "\t" in line else re.split(" +", line.strip())  # a word may hold a no-break space
        fields = [field.strip() for field in fields]
        if not parts or parts[0] == "-DOCSTART-" or (parts[0] == "#" and len(parts) != 2):
            if words[-1]:
                words.append([])
                tags.append([])
            continue
        if len(fields) < 2:
            raise Unreadable(f"line {number} has one field, allowed are a word and its tag")
        words[-1].append(fields[0])
        tags[-1].append(fields[-1])
    filled = [i for i, sentence in enumerate(words) if sentence]
    if not filled:
        raise Unreadable("it is empty")
    counted = all(words[i] == [str(place) for place in range(1, len(words[i]) + 1)] for i in filled)
    if counted and any(len(words[i]) > 1 for i in filled):
        raise Unreadable("its first fields count the words of a sentence, allowed are lines that begin with the word")
    return Table.from_columns({"text": [words[i] for i in filled], "label": [tags[i] for i in filled]})


READERS: dict[str, Callable[[str, str, Sequence[str]], Table]] = {
    ".csv": _csv,
    ".tsv": partial(_csv, usual="\t"),
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    **dict.fromkeys((".conll", ".iob", ".iob2", ".bio"), _conll),
}
ENDINGS = (".parquet", *READERS, ".arrow")


def column_problem(values: Sequence[Any], lists: bool) -> str:
    """What is wrong with a column's values where each must be one value, or a list of such; '' where nothing is."""
    for value in values:
        if isinstance(value, bytes | bytearray):
            return "bytes"
        if isinstance(value, Mapping):
            return "objects"
        if isinstance(value, list) and not lists:
            return "lists"
        if lists and value is not None and not isinstance(value, list):
            return "single values"
        if lists and value and any(isinstance(item, list | Mapping | bytes) for item in value):
            return "lists of lists or objects"
    return ""
