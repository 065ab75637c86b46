"""Reading data: the built-in docstrings, local files, label names, and what a user's mistakes say."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helper import load, load_own, look

from fedara_flwr.config import DataSettings
from fedara_flwr.data import docstrings
from fedara_flwr.data.examples import Dataset, Examples
from fedara_flwr.data.partitions import by_hash, split
from fedara_flwr.data.skipped import Skipped, UnknownLabel
from fedara_flwr.keys import ConfigError
from fedara_flwr.tasks import read_settings

ENDINGS = (".parquet", ".csv", ".jsonl")
formats = pytest.mark.parametrize("ending", ENDINGS)
COLOURS = [
    {"text": "the sky", "label": "blue"},
    {"text": "fresh grass", "label": "green"},
    {"text": "a ripe cherry", "label": "red"},
    {"text": "the sea", "label": "blue"},
]
NUMBERS = [{"text": f"row {i}", "label": i % 3} for i in range(6)]


pytestmark = pytest.mark.usefixtures("private_cache")


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    elif path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_json(path, orient="records", lines=True)
    return path


def read(path: Path, seed: int = 0, **options: str) -> Dataset:
    return load(DataSettings(path=str(path), **options), seed)


def content(data: Dataset) -> dict[str, str]:
    """Text -> label name, of training and test rows together."""
    return {
        text: data.labels[label]
        for part in (data.train, data.test)
        for text, label in zip(part.texts, part.groups, strict=True)
    }


def column(data: Dataset, name: str) -> dict[str, str]:
    """Text -> its pair or owner, of training and test rows together."""
    return {
        text: value for part in (data.train, data.test) for text, value in zip(part.texts, getattr(part, name), strict=True)
    }


def problem(path: Path, **options: str) -> str:
    """The one line that reading `path` ends with."""
    with pytest.raises(ConfigError) as caught:
        read(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# docstrings


def test_docstrings_are_thousands_of_unique_texts():
    examples, labels = docstrings.load()
    assert len(examples) > 3000
    assert len(set(examples.texts)) == len(examples)
    assert min(len(text.split()) for text in examples.texts) >= 5
    assert len(labels) == len(set(labels)) == 12
    assert labels[0] == "gui" and labels[11] == "tools"


def test_docstrings_have_no_majority():
    examples, labels = docstrings.load()
    shares = np.bincount(examples.groups, minlength=len(labels)) / len(examples)
    assert len(shares) == 12
    assert shares.max() < 0.3


def test_docstrings_are_parsed_and_the_same_in_every_process():
    code = (
        "import sys\n"
        "from fedara_flwr.data import docstrings\n"
        "before = set(sys.modules)\n"
        "examples, _ = docstrings.load()\n"
        "assert len(examples) > 3000\n"
        "print(examples.digest())\n"
        "lazy = ('encodings.', '_sysconfigdata')  # codecs of the sources, and where the library lies\n"
        "print(sorted(name for name in set(sys.modules) - before if not name.startswith(lazy)))\n"
        "print(sorted({'antigravity', 'turtle', 'tkinter', 'idlelib', 'this'} & set(sys.modules)))\n"
    )
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(docstrings.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    digest, imported, forbidden = done.stdout.splitlines()
    assert digest == docstrings.load()[0].digest()
    assert imported == forbidden == "[]"


def test_docstrings_of_a_made_up_library(tmp_path, monkeypatch):
    """Module, class, function and async function count; short ones, tests, unknown and broken modules do not."""
    files = {
        "json/__init__.py": '"""Module text of\n\n    exactly   six words."""\nraise SystemExit("must not be run")\n',
        "json/tool.py": (
            'class A:\n    """A class with five words."""\n'
            '    def f(self):\n        """Four words are few."""\n'
            '    async def g(self):\n        """An async function has five."""\n'
        ),
        "json/tests/test_it.py": '"""Docstrings of tests are left out."""\n',
        "json/broken.py": 'def :\n    """This file cannot be parsed at all."""\n',
        "os.py": '"""Module text of exactly six words."""\n"""no docstring, as it comes second"""\n',
        "unknown.py": '"""A module that is in no area."""\n',
        "socket.py": 'def f():\n    """Sends bytes over the network."""\n',
    }
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    examples, labels = docstrings.load.__wrapped__()
    found = {text: labels[label] for text, label in zip(examples.texts, examples.groups, strict=True)}
    assert found == {
        "Module text of exactly six words.": "text",  # json comes before os
        "A class with five words.": "text",
        "An async function has five.": "text",
        "Sends bytes over the network.": "networking",
    }
    assert len(labels) == 12  # an area without examples keeps its label


def test_docstrings_are_the_default():
    data = load(read_settings({}).data, 3)
    everything, labels = docstrings.load()
    assert data.labels == labels
    assert sorted(data.train.texts + data.test.texts) == sorted(everything.texts)
    assert len(data.test) == round(0.15 * len(everything))


# formats


@formats
def test_one_file(tmp_path, ending):
    data = read(write(tmp_path / f"colours{ending}", COLOURS))
    assert data.labels == ("blue", "green", "red")
    assert content(data) == {row["text"]: row["label"] for row in COLOURS}
    assert len(data.train) == 3 and len(data.test) == 1  # round(0.15 * 4) = 1
    assert data.train.pairs is None and data.train.owners is None


@formats
def test_folder_with_labels(tmp_path, ending):
    write(tmp_path / "d" / f"train{ending}", NUMBERS)
    write(tmp_path / "d" / f"test{ending}", [{"text": "the test", "label": 2}])
    (tmp_path / "d" / "labels.json").write_text('["zero", "one", "two", "three"]')
    data = read(tmp_path / "d")
    assert data.labels == ("zero", "one", "two", "three")
    assert data.train.texts == tuple(row["text"] for row in NUMBERS)
    assert data.train.groups.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.train.groups.dtype == np.int64
    assert data.test.texts == ("the test",) and data.test.groups.tolist() == [2]


def test_folder_may_mix_formats(tmp_path):
    write(tmp_path / "d" / "train.csv", COLOURS)
    write(tmp_path / "d" / "test.jsonl", [{"text": "snow", "label": "white"}])
    data = read(tmp_path / "d")
    assert data.labels == ("blue", "green", "red", "white")  # labels of train and test
    assert data.test.groups.tolist() == [3]


def test_folder_without_test_is_split(tmp_path):
    data = read(write(tmp_path / "d" / "train.csv", COLOURS).parent)
    assert len(data.train) == 3 and len(data.test) == 1


def test_json_list(tmp_path):
    (tmp_path / "d.json").write_text('[{"text": "yes it is", "label": "y"}, {"text": "no", "label": "n"}]')
    assert content(read(tmp_path / "d.json")) == {"yes it is": "y", "no": "n"}


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "mine.csv", COLOURS)
    assert len(content(load(DataSettings(path="~/mine.csv"), 0))) == 4


def test_other_columns(tmp_path):
    rows = [{"body": row["text"], "kind": row["label"], "text": "wrong", "label": "wrong"} for row in COLOURS]
    data = read(write(tmp_path / "d.csv", rows), text_column="body", label_column="kind")
    assert content(data) == {row["text"]: row["label"] for row in COLOURS}


# labels


@formats
def test_int_labels(tmp_path, ending):
    data = read(write(tmp_path / f"d{ending}", [{"text": "low", "label": 0}, {"text": "high", "label": 3}]))
    assert data.labels == ("0", "3")  # those that occur, no class between them
    assert content(data) == {"low": "0", "high": "3"}


@formats
def test_labels_setting_gives_the_order_of_names(tmp_path, ending):
    data = read(write(tmp_path / f"d{ending}", COLOURS), labels="red, green ,blue")
    assert data.labels == ("red", "green", "blue")
    assert content(data) == {row["text"]: row["label"] for row in COLOURS}


@formats
def test_labels_setting_names_int_labels(tmp_path, ending):
    data = read(write(tmp_path / f"d{ending}", NUMBERS), labels="nil,one,two")
    assert content(data) == {f"row {i}": ("nil", "one", "two")[i % 3] for i in range(6)}


def test_labels_setting_goes_before_labels_json(tmp_path):
    path = write(tmp_path / "d.csv", NUMBERS)
    (tmp_path / "labels.json").write_text('["a", "b", "c"]')
    assert read(path).labels == ("a", "b", "c")
    assert read(path, labels="x,y,z").labels == ("x", "y", "z")


def test_class_labels_of_the_file(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "neutral", "pos"])}
    )
    table = datasets.Dataset.from_dict({"text": ["bad", "good"], "label": ["neg", "pos"]}, features=features)
    table.to_parquet(tmp_path / "d.parquet")
    data = read(tmp_path / "d.parquet")
    assert data.labels == ("neg", "neutral", "pos")
    assert content(data) == {"bad": "neg", "good": "pos"}


@pytest.mark.parametrize("name", ["d.csv", "d.jsonl"])
def test_bool_labels(tmp_path, name):
    data = read(write(tmp_path / name, [{"text": "it is", "label": True}, {"text": "it is not", "label": False}]))
    assert len(data.labels) == 2
    assert data.labels[0].lower() in ("0", "false") and data.labels[1].lower() in ("1", "true")
    assert {text: data.labels.index(name) for text, name in content(data).items()} == {"it is": 1, "it is not": 0}


def test_int_labels_of_csv_with_a_gap(tmp_path):
    """pandas reads ints with a gap as floats; they stay labels 0 and 1."""
    (tmp_path / "d.csv").write_text("text,label\nbad,0\ngood,1\nnobody knows,\nfine,1\n")
    data = read(tmp_path / "d.csv")
    assert data.labels == ("0", "1")
    assert content(data) == {"bad": "0", "good": "1", "fine": "1"}


@pytest.mark.parametrize("name", ["d.csv", "d.jsonl"])
def test_label_named_none(tmp_path, name):
    rows = [{"text": "yes", "label": "Favor"}, {"text": "no", "label": "Against"}, {"text": "eh", "label": "None"}]
    assert content(read(write(tmp_path / name, rows))) == {row["text"]: row["label"] for row in rows}


# pairs, ids, rows left out


@formats
def test_sentence_pairs(tmp_path, ending):
    rows = [{"text": f"left {i}", "second": f"right {i}", "label": "same"} for i in range(4)]
    data = read(write(tmp_path / f"d{ending}", rows), pair_column="second")
    assert column(data, "pairs") == {f"left {i}": f"right {i}" for i in range(4)}
    assert data.train.owners is None


@formats
def test_id_column(tmp_path, ending):
    rows = [{"text": f"row {i}", "who": i // 2, "label": "same"} for i in range(4)]
    data = read(write(tmp_path / f"d{ending}", rows), id_column="who")
    assert column(data, "owners") == {"row 0": "0", "row 1": "0", "row 2": "1", "row 3": "1"}


@formats
def test_rows_without_text_or_label_are_left_out(tmp_path, ending):
    rows = [
        {"text": "first", "second": "a", "who": "x", "label": "p"},
        {"text": None, "second": "b", "who": "x", "label": "p"},
        {"text": "  \t ", "second": "c", "who": "y", "label": "q"},
        {"text": "", "second": "d", "who": "y", "label": "q"},
        {"text": "second", "second": "e", "who": "y", "label": None},
        {"text": "third", "second": "f", "who": "z", "label": "q"},
    ]
    data = read(write(tmp_path / f"d{ending}", rows), pair_column="second", id_column="who")
    assert content(data) == {"first": "p", "third": "q"}
    assert column(data, "pairs") == {"first": "a", "third": "f"}
    assert column(data, "owners") == {"first": "x", "third": "z"}


def test_absent_pair_is_no_word(tmp_path):
    rows = [
        {"text": "alone", "second": None, "label": "p"},
        {"text": "left", "second": "right", "label": "q"},
        {"text": "up", "second": "down", "label": "q"},
    ]
    pairs = column(read(write(tmp_path / "d.jsonl", rows), pair_column="second"), "pairs")
    assert pairs["left"] == "right" and pairs["up"] == "down"
    assert pairs.get("alone", "") == ""  # left out or empty, not the text 'None'


def test_texts_that_are_numbers(tmp_path):
    data = read(write(tmp_path / "d.csv", [{"text": 12, "label": "a"}, {"text": 7, "label": "b"}]))
    assert content(data) == {"12": "a", "7": "b"}


# mistakes


def test_missing_file(tmp_path):
    path = tmp_path / "nothing.csv"
    assert problem(path) == f"data.path = {str(path)!r}: there is no such file or folder"


def test_wrong_ending(tmp_path):
    (tmp_path / "d.txt").write_text("text,label\na,b\n")
    line = problem(tmp_path / "d.txt")
    endings = ".parquet, .csv, .tsv, .jsonl, .ndjson, .json, .conll, .iob, .iob2, .bio, .arrow"
    packed = "; of text also packed, .gz, .bz2, .xz"
    assert line == f"data.path = {str(tmp_path / 'd.txt')!r}: d.txt: allowed endings are {endings}{packed}"


def test_folder_without_train(tmp_path):
    write(tmp_path / "d" / "test.csv", COLOURS)
    line = problem(tmp_path / "d")
    assert line.startswith(f"data.path = {str(tmp_path / 'd')!r}: no train file in it, but test.csv; allowed are train.*, ")


@formats
@pytest.mark.parametrize(
    ("option", "key", "wrong", "right"),
    [
        ("text_column", "data.text-column", "txet", "text"),
        ("label_column", "data.label-column", "lable", "label"),
        ("pair_column", "data.pair-column", "secnd", "second"),
        ("id_column", "data.id-column", "owners", "owner"),
    ],
)
def test_missing_column(tmp_path, ending, option, key, wrong, right):
    rows = [{"text": f"row {i}", "second": "b", "owner": "me", "label": "x"} for i in range(3)]
    path = write(tmp_path / f"d{ending}", rows)
    assert problem(path, **{option: wrong}) == (
        f"{key} = {wrong!r}: no such column, allowed are ['text', 'second', 'owner', 'label']; did you mean {right!r}?"
    )


def test_missing_column_in_test(tmp_path):
    write(tmp_path / "d" / "train.csv", COLOURS)
    write(tmp_path / "d" / "test.csv", [{"texts": "snow", "label": "red"}])
    line = problem(tmp_path / "d")
    assert line.startswith("data.text-column = 'text': no such column, allowed are ['texts', 'label']")
    assert "did you mean 'texts'?" in line


@pytest.mark.parametrize(("option", "column"), [("text_column", "words"), ("label_column", "tags"), ("pair_column", "words")])
def test_lists_are_another_task(tmp_path, option, column):
    rows = [{"words": ["a", "b"], "tags": [0, 1], "text": "a b", "label": 1}]
    key = f"data.{option.replace('_', '-')} = {column!r}"
    assert problem(write(tmp_path / "d.jsonl", rows), **{option: column}) == (
        f"{key}: it holds lists, allowed with data.task = 'classification' is one value a row"
    )


@formats
def test_unknown_label(tmp_path, ending):
    path = write(tmp_path / f"d{ending}", COLOURS)
    assert problem(path, labels="blue,green") == (f"data.path = {str(path)!r}: row 2 has label 'red', allowed are blue, green")


@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
@formats
def test_int_label_outside(tmp_path, ending, wrong):
    """One number that is no place in the list, and nobody knows what the others are: the whole column is refused."""
    path = write(tmp_path / f"d{ending}", [*NUMBERS, {"text": "the last", "label": wrong}])
    words = f"column 'label': it holds {wrong}, allowed are names, or places from 0 to 2, of a, b, c"
    assert problem(path, labels="a,b,c") == f"data.path = {str(path)!r}: {words}"
    assert own_problem(path) == f"node-config data-path = {str(path)!r}: {words.replace('a, b, c', 'red, green, blue')}"


def test_too_many_labels(tmp_path):
    """A column of ids or measurements taken for labels must not become a model with thousands of classes."""
    rows = [{"text": f"row {i}", "label": i, "weight": i + 0.5} for i in range(10_001)]
    path = write(tmp_path / "d.csv", rows)
    assert "column 'label': it holds 10001 different labels, allowed are 10000" in problem(path)
    assert "10001 different numbers with a fraction" in problem(path, label_column="weight")
    assert "`fedara tasks` says what learns numbers" in problem(path, label_column="weight")


@pytest.mark.parametrize("name", ["d.csv", "d.jsonl", "d.parquet"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert problem(tmp_path / name).startswith(f"data.path = {str(tmp_path / name)!r}: ")


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_file_without_rows(tmp_path, ending):
    table = pd.DataFrame({"text": pd.Series([], dtype="str"), "label": pd.Series([], dtype="int64")})
    path = tmp_path / f"d{ending}"
    table.to_csv(path, index=False) if ending == ".csv" else table.to_parquet(path, index=False)
    assert problem(path).startswith(f"data.path = {str(path)!r}: ")


def test_only_blank_rows(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"text": " ", "label": "a"}, {"text": "", "label": "b"}])
    assert (
        problem(path)
        == f"data.path = {str(path)!r}: there are no rows with text and label (2 of 2 rows skipped: 2 without text)"
    )


def test_only_blank_test_rows(tmp_path):
    """Found at the start, not by the evaluation after the last round."""
    write(tmp_path / "d" / "train.jsonl", COLOURS)
    write(tmp_path / "d" / "test.jsonl", [{"text": " ", "label": "red"}, {"text": "", "label": "blue"}])
    assert problem(tmp_path / "d").startswith(f"data.path = {str(tmp_path / 'd')!r}: ")


@pytest.mark.parametrize("name", ["d.parquet", "d.jsonl"])
def test_broken_file(tmp_path, name):
    (tmp_path / name).write_text("{this is no such file")
    assert problem(tmp_path / name).startswith(f"data.path = {str(tmp_path / name)!r}: {name} cannot be read: ")


@pytest.mark.parametrize(
    "text", ["{not json", "3", '{"a": "b"}', '"abc"', '["a", "b", "a"]', '["a", "", "b"]', '["a", {}, "b"]', '{"a": 0, "b": 0}']
)
def test_broken_labels_file(tmp_path, text):
    path = write(tmp_path / "d.csv", NUMBERS)
    (tmp_path / "labels.json").write_text(text)
    assert "labels.json" in problem(path)


def test_unreachable_hub_id(monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("an offline run must not look for the network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as caught:
        load(DataSettings(name="nobody/no-such-set"), 0)
    line = str(caught.value)
    assert line.startswith("data.name = 'nobody/no-such-set': cannot be loaded (")
    assert "\n" not in line and "an offline run" not in line


# a device's own data

SERVER = ("red", "green", "blue")


def own(path: Path, names: tuple[str, ...] = SERVER, **options: str):
    """(text -> label name, what is said of rows left out) of a device's training rows."""
    found = load_own(DataSettings(path=str(path), **options), names)
    return {t: names[i] for t, i in zip(found.train.texts, found.train.groups, strict=True)}, str(found.skipped)


def own_problem(path: Path, names: tuple[str, ...] = SERVER, **options: str) -> str:
    with pytest.raises(ConfigError) as caught:
        own(path, names, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@formats
def test_labels_are_taken_by_the_servers_names(tmp_path, ending):
    """A device that has two of its server's three labels gives them the server's numbers; all its rows are for training."""
    assert own(write(tmp_path / f"d{ending}", COLOURS)) == ({row["text"]: row["label"] for row in COLOURS}, "")
    data = load_own(DataSettings(path=str(tmp_path / f"d{ending}")), SERVER)
    assert data.train.groups.tolist() == [2, 1, 0, 2] and data.test is None


@formats
def test_rows_that_do_not_fit_are_left_out_and_counted(tmp_path, ending):
    rows = [
        *COLOURS,
        *({"text": f"mud {i}", "label": "brown"} for i in range(3)),
        {"text": "night", "label": "black"},
        {"text": "what?", "label": None},
        {"text": None, "label": "red"},
        {"text": "  ", "label": "pink"},
    ]
    found, line = own(write(tmp_path / f"d{ending}", rows))
    assert found == {row["text"]: row["label"] for row in COLOURS}
    assert line == "7 of 11 rows skipped: 4 with unknown labels ('brown' 3, 'black' 1), 2 without text, 1 without label"


def test_a_line_names_few_unknown_labels_and_cuts_them():
    skipped = Skipped(rows=99)
    for i in range(7):
        skipped.leave(i, UnknownLabel(f"{i}" + "x" * 100))
    assert str(skipped).count("xxx'") == 5 and str(skipped).endswith(", …)") and len(str(skipped)) < 400


def test_ids_go_by_the_names_that_the_file_has(tmp_path):
    """The file's own order is another one than the server's, and one name is unknown there."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["blue", "mauve", "red"])}
    )
    rows = {"text": ["sky", "wall", "cherry"], "label": [0, 1, 2]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d.parquet")
    expected = {"sky": "blue", "cherry": "red"}, "1 of 3 rows skipped: 1 with unknown labels ('mauve' 1)"
    assert own(tmp_path / "d.parquet") == expected
    pd.DataFrame(rows).to_csv(tmp_path / "d.csv", index=False)
    assert own(tmp_path / "d.csv")[0] == {"sky": "red", "wall": "green", "cherry": "blue"}  # no names: the server's places
    (tmp_path / "labels.json").write_text('["blue", "mauve", "red"]')
    assert own(tmp_path / "d.csv") == expected


@formats
def test_numbers_are_names_where_the_servers_names_are_numbers(tmp_path, ending):
    path = write(tmp_path / f"d{ending}", [{"text": f"{n} stars", "label": n} for n in (0, 1, 5)])
    assert own(path, ("1", "2", "3", "4", "5")) == (
        {"1 stars": "1", "5 stars": "5"},
        "1 of 3 rows skipped: 1 with unknown labels ('0' 1)",
    )
    assert "it holds 5, allowed are names, or places from 0 to 1, of a, b" in own_problem(path, ("a", "b"))


def test_a_devices_test_file(tmp_path):
    write(tmp_path / "d" / "train.csv", COLOURS)
    write(tmp_path / "d" / "test.jsonl", [{"text": "snow", "label": "white"}, {"text": "ink", "label": "blue"}])
    data = load_own(DataSettings(path=str(tmp_path / "d")), SERVER)
    assert len(data.train) == 4 and data.test.texts == ("ink",)
    assert str(data.skipped) == "1 of 6 rows skipped: 1 with unknown labels ('white' 1)"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_not_a_number_is_no_label_and_no_text(tmp_path, kind):
    path = tmp_path / f"d.{kind}"
    if kind == "jsonl":
        path.write_text('{"text": "a", "label": NaN}\n{"text": "b", "label": 1}\n')
    else:
        pq.write_table(pa.table({"text": ["a", "b"], "label": pa.array([float("nan"), 1.0])}), path)
    assert own(path) == ({"b": "green"}, "1 of 2 rows skipped: 1 without label")
    pq.write_table(pa.table({"text": pa.array([float("nan"), 2.5]), "label": ["red", "red"]}), tmp_path / "t.parquet")
    assert own(tmp_path / "t.parquet") == ({"2.5": "red"}, "1 of 2 rows skipped: 1 without text")


def test_a_dictionary_column(tmp_path):
    table = pd.DataFrame({"text": ["a", "b", "c"], "label": pd.Categorical(["red", "blue", None])})
    table.to_parquet(tmp_path / "d.parquet")
    assert own(tmp_path / "d.parquet") == ({"a": "red", "b": "blue"}, "1 of 3 rows skipped: 1 without label")


def test_json_rows_that_lack_keys(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "a", "label": "red"}\n{"text": "b"}\n{"label": "blue"}\n{"more": 1}\n')
    assert own(tmp_path / "d.jsonl") == ({"a": "red"}, "3 of 4 rows skipped: 2 without text, 1 without label")


def test_a_row_with_too_many_fields(tmp_path):
    """Where a comma was not quoted nobody knows which is the label; a row with too few is left out."""
    (tmp_path / "d.csv").write_text("text,label\na,red\nb, and more,blue\n")
    line = own_problem(tmp_path / "d.csv")
    assert line == (
        f"node-config data-path = {str(tmp_path / 'd.csv')!r}: d.csv cannot be read: line 3 has 3 fields, 2 are named; "
        "a text with ',' must stand in quotes"
    )
    (tmp_path / "e.csv").write_text("text,label\na,red\nb\n")
    assert own(tmp_path / "e.csv") == ({"a": "red"}, "1 of 2 rows skipped: 1 with too few fields")


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_a_file_that_is_not_utf_8(tmp_path, ending):
    path = tmp_path / f"d{ending}"
    if ending == ".parquet":
        starts = np.array([0, 4], dtype=np.int32).tobytes()
        text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(starts), pa.py_buffer("café".encode("latin-1"))])
        pq.write_table(pa.table({"text": text, "label": ["red"]}), path)
    else:
        content = "text,label\ncafé,red\n" if ending == ".csv" else '{"text": "café", "label": "red"}\n'
        path.write_bytes(content.encode("latin-1"))
    line = own_problem(path)
    assert line.startswith(f"node-config data-path = {str(path)!r}: ") and "utf-8" in line


@pytest.mark.parametrize("column", ["text", "label", "pair"])
def test_a_device_lacks_a_column(tmp_path, column):
    path = write(tmp_path / "d.csv", [{"texts": "a", "labels": "red", "pairs": "b"}])
    columns = {"text_column": "texts", "label_column": "labels", "pair_column": "pairs"} | {f"{column}_column": column}
    assert own_problem(path, **columns).startswith(f"node-config {column}-column = {column!r}: no such column, allowed are [")


def test_columns_that_are_not_needed_are_not_read(tmp_path, monkeypatch):
    table = pa.table({"text": ["a"], "label": ["red"], "more": ["x" * 5_000_000]})
    pq.write_table(table, tmp_path / "d.parquet")
    before = pa.total_allocated_bytes()
    data = load_own(DataSettings(path=str(tmp_path / "d.parquet")), SERVER)
    assert len(data.train) == 1 and pa.total_allocated_bytes() - before < 1_000_000


def test_a_look_at_what_there_is(tmp_path):
    write(tmp_path / "d" / "train.csv", [*COLOURS, {"text": "", "label": "red"}])
    write(tmp_path / "d" / "test.csv", COLOURS[:1])
    found = look(str(tmp_path / "d"), "text", "label")
    assert (found.rows, found.columns, found.labels) == ({"train": 5, "test": 1}, ["text", "label"], ("blue", "green", "red"))
    assert str(found.skipped) == "1 of 6 rows skipped: 1 without text"
    assert look(str(tmp_path / "d"), "body", "label").labels == ()
    with pytest.raises(ConfigError, match="node-config data-path = .*there is no such file"):
        look(str(tmp_path / "nothing"), "text", "label")


# Examples and the split into training and test rows


def numbered(count: int) -> Examples:
    return Examples(tuple(f"text {i}" for i in range(count)), np.arange(count, dtype=np.int64) % 3)


def test_take():
    examples = Examples(("a", "b", "c"), np.array([0, 1, 2]), ("x", "y", "z"), ("me", "you", "us"))
    taken = examples.take([2, 0])
    assert taken.texts == ("c", "a") and taken.pairs == ("z", "x") and taken.owners == ("us", "me")
    assert taken.groups.tolist() == [2, 0]
    assert len(examples.take([])) == 0


def test_keys_are_sha256_of_seed_text_and_pair():
    examples = Examples(("left",), np.array([0]), ("right",))
    assert examples.keys(7) == [hashlib.sha256(b"7\x1fleft\x1fright").digest()]
    assert examples.keys(8) != examples.keys(7)


def test_digest_sees_texts_pairs_and_labels():
    base = Examples(("a", "b"), np.array([0, 1]), ("x", "y"))
    others = [
        Examples(("a", "c"), np.array([0, 1]), ("x", "y")),
        Examples(("a", "b"), np.array([0, 0]), ("x", "y")),
        Examples(("a", "b"), np.array([0, 1]), ("x", "z")),
        Examples(("a", "b"), np.array([0, 1])),
        base.take([1, 0]),
        base.take([0]),
    ]
    assert len({e.digest() for e in [base, *others]}) == 7
    assert base.take([0, 1]).digest() == base.digest()


@pytest.mark.parametrize(("count", "share", "taken"), [(100, 0.15, 15), (10, 0.01, 1), (10, 0.99, 9), (2, 0.1, 1)])
def test_split_sizes(count, share, taken):
    rest, part = split(numbered(count), 0, share)
    assert len(part) == taken
    assert sorted([*rest, *part]) == list(range(count))


def test_split_of_one_row_or_none():
    assert [len(part) for part in split(numbered(1), 0, 0.5)] == [1, 0]
    assert [len(part) for part in split(numbered(0), 0, 0.5)] == [0, 0]


def test_split_takes_the_smallest_hashes():
    examples = numbered(20)
    hashes = sorted(hashlib.sha256(f"5\x1ftext {i}\x1f".encode()).hexdigest() for i in range(20))
    _, part = split(examples, 5, 0.2)
    found = sorted(hashlib.sha256(f"5\x1f{examples.texts[i]}\x1f".encode()).hexdigest() for i in part)
    assert found == hashes[:4]
    assert set(by_hash(examples, 5)[:4]) == set(part)


def test_split_depends_on_the_seed():
    examples = numbered(100)
    assert set(split(examples, 0, 0.2)[1]) == set(split(examples, 0, 0.2)[1])
    assert set(split(examples, 0, 0.2)[1]) != set(split(examples, 1, 0.2)[1])


@formats
def test_split_does_not_depend_on_the_order_in_the_file(tmp_path, ending):
    rows = [{"text": f"row {i}", "label": f"label {i % 3}"} for i in range(30)]
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    one = read(write(tmp_path / f"one{ending}", rows), seed=4)
    other = read(write(tmp_path / f"other{ending}", shuffled), seed=4)
    assert set(one.train.texts) == set(other.train.texts)
    assert set(one.test.texts) == set(other.test.texts)
    assert not set(one.train.texts) & set(one.test.texts)
    assert len(one.train) + len(one.test) == 30
    assert content(one) == content(other)
