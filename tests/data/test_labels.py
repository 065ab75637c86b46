"""A label is what is written: the same names and numbers for server and device, whatever reader and type a file has."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helper import load, load_own
from hypothesis import given
from hypothesis import strategies as st

from fedara_flwr.config import DataSettings
from fedara_flwr.data.labels import Labels, names_in, written
from fedara_flwr.keys import ConfigError

pytestmark = pytest.mark.usefixtures("private_cache")


def csv(path: Path, labels: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text,label\n" + "".join(f"row {i},{label}\n" for i, label in enumerate(labels)))
    return path


def jsonl(path: Path, labels: list) -> Path:
    path.write_text("".join(json.dumps({"text": f"row {i}", "label": label}) + "\n" for i, label in enumerate(labels)))
    return path


def parquet(path: Path, labels: list, kind: pa.DataType | None = None) -> Path:
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(len(labels))], "label": pa.array(labels, kind)}), path)
    return path


def server(path: Path, **options: str) -> tuple[tuple[str, ...], list[str | None]]:
    """Label names, and what every row is labelled; None where it is left out."""
    data = load(DataSettings(path=str(path), **options), 0)
    found = {}
    for part in (data.train, data.test):
        found |= {text: data.labels[place] for text, place in zip(part.texts, part.groups, strict=True)}
    return data.labels, [found.get(f"row {i}") for i in range(1 + max(int(text.split()[1]) for text in found))]


def device(path: Path, names: tuple[str, ...]) -> list[str | None]:
    own = load_own(DataSettings(path=str(path)), names).train
    found = {text: names[place] for text, place in zip(own.texts, own.groups, strict=True)}
    return [found.get(f"row {i}") for i in range(1 + max(int(text.split()[1]) for text in found))]


def problem(path: Path, **options: str) -> str:
    with pytest.raises(ConfigError) as caught:
        server(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- by what is written ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([1, 2, 3, 4, 5], "1,2,3,4,5"),
        ([5, 1, 3], "1,3,5"),
        ([3, 4201], "3,4201"),
        ([0, 4], "0,4"),
        ([100234, 200111], "100234,200111"),
        ([-1, 0, 1], "-1,0,1"),
        ([0.5, 1.0, 1.5, 2.0, 2.5, 3.0], "0.5,1,1.5,2,2.5,3"),
        ([1, 2.5, 3, 4.5, 5], "1,2.5,3,4.5,5"),
        ([10, 9, 100], "9,10,100"),
        ([True, False], "False,True"),
        ([1, "other"], "1,other"),
        ([1, 2.5, "other"], "1,2.5,other"),
        (["pos", " neg "], "neg,pos"),
        (["007", "7"], "007,7"),
        (["1.1", "1.10", "2.0"], "1.1,1.10,2"),
        (["01", "1", "+1"], "+1,01,1"),
        (["-0.0", 0, 1], "0,1"),
        (["½", "１", "1"], "1,½,１"),
        ([2**53, 2**53 + 1], "9007199254740992,9007199254740993"),
    ],
)
def test_names_are_the_values(tmp_path, labels, names):
    """In every format that can hold them, and each row has the name that stands in it; a device reads the same."""
    expected = tuple(names.split(","))
    of_rows = [written(label) for label in labels]
    files = [csv(tmp_path / "d.csv", labels), jsonl(tmp_path / "d.jsonl", labels)]
    if len({type(label) for label in labels}) == 1:
        files.append(parquet(tmp_path / "d.parquet", labels))
    for file in files:
        rows = [file.name, *labels]
        assert server(file) == (tuple(sorted(expected, key=expected.index)), of_rows), rows
        assert device(file, expected) == of_rows, rows


def test_one_row_without_a_number_changes_no_other(tmp_path):
    """Readers make whole numbers floats where one is missing, and pandas writes NA for it: in one file, or in one of two."""
    csv(tmp_path / "a" / "train.csv", [1, 2, 3, 4, 5])
    csv(tmp_path / "a" / "test.csv", [5, "NA", 1])
    data = load(DataSettings(path=str(tmp_path / "a")), 0)
    assert data.labels == ("1", "2", "3", "4", "5") and data.train.groups.tolist() == [0, 1, 2, 3, 4]
    assert data.test.groups.tolist() == [4, 0]
    assert data.skipped == (f"data.path = {str(tmp_path / 'a')!r}, test: 1 of 3 rows skipped: 1 without label",)
    for word in ("nan", "None", "null", "<NA>", "n/a", ""):
        path = csv(tmp_path / "d.csv", [3, word, 1.0])
        assert server(path) == (("1", "3"), ["3", None, "1"])
        assert device(path, ("1", "2", "3")) == ["3", None, "1"]
    assert server(parquet(tmp_path / "d.parquet", [3.0, None, 1.0])) == (("1", "3"), ["3", None, "1"])
    assert server(csv(tmp_path / "w.csv", ["Favor", "None", "Against"]))[0] == ("Against", "Favor", "None")  # a word is a word


@pytest.mark.parametrize("named", ["key", "file"])
def test_among_ids_it_is_no_label_either(tmp_path, named):
    path, names = csv(tmp_path / "d.csv", [1, "NA", 0, ""]), ("neg", "pos")
    if named == "file":
        (tmp_path / "labels.json").write_text(json.dumps(names))
    assert server(path, **({"labels": "neg,pos"} if named == "key" else {})) == (names, ["pos", None, "neg"])
    assert device(path, names) == ["pos", None, "neg"]
    words = csv(tmp_path / "w" / "d.csv", ["pos", "NA", "neg"])
    assert "row 1 has label 'NA', allowed are neg, pos" in problem(words, labels="neg,pos")
    assert server(words, labels="neg,NA,pos")[1] == ["pos", "NA", "neg"]


@pytest.mark.parametrize("make", [csv, jsonl, parquet])
def test_a_list_of_numbers_is_of_names(tmp_path, make):
    """Stars from 1 to 4 of 5: no place in the list."""
    path = make(tmp_path / f"d.{make.__name__}", [1, 2, 4])
    five = ("1", "2", "3", "4", "5")
    assert server(path, labels="1,2,3,4,5") == (five, ["1", "2", "4"])
    assert device(path, five) == ["1", "2", "4"]
    floats = make(tmp_path / f"e.{make.__name__}", [1.0, 2.0, 4.0])
    assert server(floats, labels="1,2,3,4,5") == (five, ["1", "2", "4"]) and device(floats, five) == ["1", "2", "4"]
    assert server(make(tmp_path / f"f.{make.__name__}", [-1, 0, 1]), labels="-1,0,1")[1] == ["-1", "0", "1"]


@pytest.mark.parametrize("make", [csv, jsonl, parquet])
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("True,False", ["True", "False"]),
        ("False,True", ["True", "False"]),
        ("1,0", ["1", "0"]),
        ("0,1", ["1", "0"]),
        ("true,false", ["true", "false"]),
    ],
)
def test_true_and_false_by_name(tmp_path, make, labels, expected):
    path = make(tmp_path / f"d.{make.__name__}", [True, False])
    assert server(path, labels=labels)[1] == expected and device(path, tuple(labels.split(","))) == expected


def test_true_in_several_forms(tmp_path):
    """One program's True is another's TRUE."""
    assert server(csv(tmp_path / "d.csv", ["True", "FALSE", "true"])) == (("False", "True"), ["True", "False", "True"])
    assert server(csv(tmp_path / "e.csv", ["TRUE", "FALSE"]))[0] == ("FALSE", "TRUE")


def test_numbers_for_names_that_are_true_and_false(tmp_path):
    path = csv(tmp_path / "d.csv", [1, 0, 1])
    assert server(path, labels="True,False")[1] == device(path, ("False", "True")) == ["True", "False", "True"]


# -- places ------------------------------------------------------------------------------------------------------------
def class_labels(path: Path, ids: list[int], names: list[str]) -> Path:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    table = {"text": [f"row {i}" for i in range(len(ids))], "label": ids}
    datasets.Dataset.from_dict(table, features=features).to_parquet(path)
    return path


def test_ids_that_the_data_names(tmp_path):
    """A class-label column; labels.json as a list, as id2label and as label2id, also with gaps. -1 is no label there."""
    ids, names = [2, 0, -1, 1], ["neg", "neutral", "pos"]
    path = class_labels(tmp_path / "d.parquet", ids, names)
    assert server(path) == (tuple(names), ["pos", "neg", None, "neutral"])
    assert server(path, labels="pos,neutral,neg") == (("pos", "neutral", "neg"), ["pos", "neg", None, "neutral"])
    for number, content in enumerate((names, dict(enumerate(names)), {name: i for i, name in enumerate(names)})):
        (tmp_path / "labels.json").write_text(json.dumps(content))
        assert server(csv(tmp_path / f"{number}.csv", ids)) == (tuple(names), ["pos", "neg", None, "neutral"])
    (tmp_path / "labels.json").write_text('{"3": "low", "7": "high"}')
    assert server(csv(tmp_path / "gap.csv", [7, 3, 7])) == (("low", "high"), ["high", "low", "high"])
    assert "it holds 4, allowed are ids from 3 to 7, of low, high" in problem(csv(tmp_path / "d.csv", [7, 4]))


def test_labels_json_that_names_numbers(tmp_path):
    """One to five stars under a list of their names are names, not the places one to five of it."""
    (tmp_path / "labels.json").write_text('["1", "2", "3", "4", "5"]')
    assert server(csv(tmp_path / "d.csv", [5, 1, 4]))[1] == ["5", "1", "4"]


def test_a_list_without_numbers_gives_places(tmp_path):
    path = csv(tmp_path / "d.csv", [1, 0, 1, ""])
    assert server(path, labels="neg,pos")[1] == device(path, ("neg", "pos")) == ["pos", "neg", "pos"]
    assert "it holds -1, allowed are names, or places from 0 to 2" in problem(
        csv(tmp_path / "d.csv", [-1, 0, 1]), labels="a,b,c"
    )
    mixed = jsonl(tmp_path / "d.jsonl", ["neg", 1])
    assert "row 1 has label '1', allowed are neg, pos" in problem(mixed, labels="neg,pos")


def test_ids_that_are_others_in_another_file(tmp_path):
    """Every file's ids are its own: a test split, a piece, or labels.json with the names in another order."""
    class_labels(tmp_path / "train.parquet", [0, 1, 0, 1], ["pos", "neg"])
    class_labels(tmp_path / "test.parquet", [0, 1, -1], ["neg", "pos"])
    data = load(DataSettings(path=str(tmp_path)), 0)
    assert data.labels == ("pos", "neg") and data.train.groups.tolist() == [0, 1, 0, 1] and data.test.groups.tolist() == [1, 0]
    both = f"{tmp_path / 'train.parquet'}, {tmp_path / 'test.parquet'}"
    own = load_own(DataSettings(path=both), ("neg", "pos"))
    assert own.train.groups.tolist() == [1, 0, 1, 0, 0, 1]
    csv(tmp_path / "words" / "train.csv", ["neg", "pos", "pos"])
    class_labels(tmp_path / "words" / "test.parquet", [0, 1], ["pos", "neg"])
    data = load(DataSettings(path=str(tmp_path / "words")), 0)
    assert data.labels == ("neg", "pos") and data.test.groups.tolist() == [1, 0]
    (tmp_path / "labels.json").write_text('["neg", "pos"]')
    assert server(tmp_path / "train.parquet") == (("neg", "pos"), ["pos", "neg", "pos", "neg"])
    (tmp_path / "labels.json").write_text('["bad", "good"]')  # another list altogether: what its ids are called here
    path = (tmp_path / "train.parquet").rename(tmp_path / "d.parquet")
    assert server(path) == (("bad", "good"), ["bad", "good", "bad", "good"])


def test_names_beside_several_files(tmp_path):
    """labels.json counts in the folder of each, and in `data` of a folder; two that differ are refused."""
    files = [csv(tmp_path / "a" / "data" / f"train-{i}.csv", [1, 0]) for i in range(2)]
    (tmp_path / "a" / "data" / "labels.json").write_text('["neg", "pos"]')
    for path in (",".join(map(str, files)), str(tmp_path / "a")):
        assert load(DataSettings(path=path), 0).labels == ("neg", "pos")
    other = csv(tmp_path / "b" / "d.csv", [1, 0])
    (tmp_path / "b" / "labels.json").write_text('["pos", "neg"]')
    assert problem(f"{files[0]},{other}").endswith("its labels.json name the ids in several ways, allowed is one")
    (tmp_path / "b" / "labels.json").write_text("[" * 100_000)
    assert "labels.json is no JSON (" in problem(other)


@pytest.mark.parametrize("kind", [pa.float32(), pa.float16()])
def test_numbers_of_single_precision(tmp_path, kind):
    values = [0.1, 0.7, None, 2.0]
    path = parquet(tmp_path / "d.parquet", [None if v is None else np.float16(v) for v in values], kind)
    if kind == pa.float32():
        path = parquet(path, values, kind)
    assert server(path) == (("0.1", "0.7", "2"), ["0.1", "0.7", None, "2"])


def test_a_list_that_is_another_than_the_datas(tmp_path):
    path = class_labels(tmp_path / "d.parquet", [0, 1, 1], ["0", "1"])
    assert server(path, labels="neg,pos")[1] == ["neg", "pos", "pos"]
    path = class_labels(tmp_path / "e.parquet", [0, 1], ["bad", "good"])
    assert "the data names its ids bad, good, allowed are all of these" in problem(path, labels="bad,fine")


@pytest.mark.parametrize(
    ("labels", "line"),
    [
        ("a,b,a", "data.labels = 'a,b,a': 'a' is in it twice, allowed are different names"),
        ("a,,b", "data.labels = 'a,,b': it has an empty name, allowed are different names"),
    ],
)
def test_names_that_cannot_be(tmp_path, labels, line):
    assert problem(csv(tmp_path / "d.csv", ["a", "b"]), labels=labels) == line


def test_numbers_that_are_measured_and_labels_that_are_ids(tmp_path):
    path = csv(tmp_path / "d.csv", [number + 0.5 for number in range(101)])
    assert (
        "101 different numbers with a fraction" in (line := problem(path)) and "`fedara tasks` says what learns numbers" in line
    )
    assert len(server(csv(tmp_path / "e.csv", [number + 0.5 for number in range(100)]))[0]) == 100
    line = problem(csv(tmp_path / "f.csv", [f"id{number}" for number in range(10_001)]))
    assert "10001 different labels, allowed are 10000" in line


def test_a_label_that_is_an_object(tmp_path):
    line = problem(jsonl(tmp_path / "d.jsonl", ["a", {"b": 1}]))
    assert line == "data.label-column = 'label': it holds objects, allowed with data.task = 'classification' is one value a row"


@given(st.lists(st.one_of(st.integers(-5, 300), st.booleans(), st.text("abc 01.", max_size=4), st.none()), max_size=20))
def test_every_value_is_the_name_it_is_written_as(values):
    names = names_in(values, "column", "labels", True)
    labels = Labels(names)
    for value in values:
        text = written(value)
        if text is None:
            continue
        assert names[labels.place(value)] == text
    assert len(set(names)) == len(names)
