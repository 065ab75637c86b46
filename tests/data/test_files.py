"""Files as people bring them: what is written in a column comes out of it, and what cannot be read is said in one line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from unittest.mock import Mock

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helper import load, load_own

from fedara_flwr.config import DataSettings
from fedara_flwr.data.files import read_files, read_hub
from fedara_flwr.data.tables import Unreadable, read_file
from fedara_flwr.keys import ConfigError

pytestmark = pytest.mark.usefixtures("private_cache")
ROWS = [("lovely phone", "pos"), ("it broke", "neg"), ("fine", "pos"), ("no", "neg")]


def lines(rows=ROWS, header: str = "text,label") -> str:
    return "\n".join(filter(None, [header, *(f"{text},{label}" for text, label in rows)])) + "\n"


def read(path: Path | str, seed: int = 0, **options: str):
    return load(DataSettings(path=str(path), **options), seed)


def pairs(data) -> set[tuple[str, str]]:
    """(text, label name) of all rows, of training, validation and test."""
    parts = [part for part in (data.train, data.validation, data.test) if part is not None]
    return {(text, data.labels[place]) for part in parts for text, place in zip(part.texts, part.groups, strict=True)}


def problem(path: Path | str, seed: int = 0, **options: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path, seed, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved(path: Path, content: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))
    return path


# -- csv ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.csv", lines()),
        ("d.CSV", lines()),
        ("d.csv", "\ufeff" + lines()),
        ("d.csv", lines().replace("\n", "\r\n")),
        ("d.csv", lines().replace(",", ";")),
        ("d.csv", lines().replace(",", "\t")),
        ("d.tsv", lines().replace(",", "\t")),
        ("d.csv", lines().replace(",", "|")),
        ("d.csv", lines().replace("fine", '"fine"')),
        ("d.csv", lines(header=" text , label")),
        ("d.csv", lines() + "\n\n"),
        ("d.jsonl", "".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in ROWS)),
        ("d.ndjson", "\n\n".join(json.dumps({"label": n, "text": t}) for t, n in ROWS)),
        ("d.jsonl", json.dumps([{"text": t, "label": n} for t, n in ROWS], indent=1)),
        ("d.json", json.dumps([{"text": t, "label": n} for t, n in ROWS], indent=1)),
        ("d.json", json.dumps({"version": 2, "data": [{"text": t, "label": n} for t, n in ROWS]})),
        (
            "d.json",
            json.dumps({key: {str(i): row[j] for i, row in enumerate(ROWS)} for j, key in enumerate(("text", "label"))}),
        ),
    ],
)
def test_one_file_in_many_forms(tmp_path, name, content):
    assert pairs(read(saved(tmp_path / name, content))) == set(ROWS)


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_packed(tmp_path, ending, pack):
    for name, content in (("d.csv", lines()), ("d.jsonl", '{"text": "a", "label": "b"}\n' * 4)):
        (tmp_path / f"{name}{ending}").write_bytes(pack(content.encode()))
        assert len(read(tmp_path / f"{name}{ending}").train) >= 3
    (tmp_path / f"cut.csv{ending}").write_bytes(pack(lines().encode())[:-9])
    assert f"cut.csv{ending} cannot be read: " in problem(tmp_path / f"cut.csv{ending}")


def test_arrow(tmp_path):
    datasets.Dataset.from_dict({"text": [t for t, _ in ROWS], "label": [n for _, n in ROWS]}).save_to_disk(tmp_path / "d")
    assert pairs(read(tmp_path / "d")) == set(ROWS)
    (file,) = (tmp_path / "d").glob("*.arrow")
    assert pairs(read(file)) == set(ROWS)


def test_values_are_what_is_written(tmp_path):
    """No reader's guess by the rows before: zeros, signs, words for nothing, and columns that turn into text late."""
    rows = [
        ("007", "a"),
        ("+1", "b"),
        ("1e3", "a"),
        ("True", "b"),
        ("NA", "a"),
        ("null", "b"),
        ("2024-01-02", "a"),
        ("-0", "b"),
    ]
    data = read(saved(tmp_path / "d.csv", lines(rows)))
    assert pairs(data) == set(rows)
    late = "text,label,note,who\n" + "row,1,,007\n" * 12_000 + "last,other,at last a note,7\n"
    data = read(saved(tmp_path / "late.csv", late), id_column="who")
    assert data.labels == ("1", "other") and ("last", "other") in pairs(data)
    assert {*data.train.owners, *data.test.owners} == {"007", "7"}


@pytest.mark.parametrize("where", [0, 2])
def test_a_comma_too_many(tmp_path, where):
    """In the first row it would shift every column, elsewhere all that stands behind it in its row."""
    rows = ["a,pos,1", "b,neg,2", "c,pos,3"]
    rows[where] += ","
    path = saved(tmp_path / "d.csv", "\n".join(["text,label,votes", *rows]) + "\n")
    words = f"d.csv cannot be read: line {where + 2} has 4 fields, 3 are named; a text with ',' must stand in quotes"
    assert problem(path) == f"data.path = {str(path)!r}: {words}"
    with pytest.raises(ConfigError, match=f"line {where + 2} has 4 fields"):
        load_own(DataSettings(path=str(path)), ("pos", "neg"))


def test_texts_over_several_lines(tmp_path):
    content = 'text,label\n"one\ntwo, ""three""",pos\nfour,neg\n"five,six",pos\n'
    texts = {text for text, _ in pairs(read(saved(tmp_path / "d.csv", content)))}
    assert texts == {'one\ntwo, "three"', "four", "five,six"}
    path = saved(tmp_path / "e.csv", content + "seven,pos,more\n")
    assert "line 6 has 3 fields" in problem(path)  # of the file, as an editor counts
    path = saved(tmp_path / "f.csv", content.replace('six"', "six"))
    assert "line 5: a quote that is not closed" in problem(path)
    path = saved(tmp_path / "g.csv", content + 'z,"w" or not\n')
    assert "line 6: a quote in a quoted text must be doubled" in problem(path)


def test_too_few_fields_are_counted(tmp_path):
    data = read(saved(tmp_path / "d.csv", lines() + "alone\n"))
    assert pairs(data) == set(ROWS) and "1 of 5 rows skipped: 1 with too few fields" in data.skipped[0]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", "it is empty"),
        ("\n\n", "it is empty"),
        ("\ntext,label\na,b\n", "its first line is empty"),
        ("text,label,text\na,b,c\n", "two columns are called 'text'"),
    ],
)
def test_csv_that_is_none(tmp_path, content, line):
    path = saved(tmp_path / "d.csv", content)
    assert problem(path) == f"data.path = {str(path)!r}: d.csv cannot be read: {line}"


def test_format_as_the_key_says(tmp_path):
    path = saved(tmp_path / "d.csv", "a#x\nb#y\nc#x\nd#y\n")
    data = read(path, format="{delimiter = '#', columns = ['text', 'label']}")
    assert pairs(data) == {("a", "x"), ("b", "y"), ("c", "x"), ("d", "y")}
    assert "columns" in problem(path, format="{colums = ['text']}") and "data.format" in problem(path, format="{colums = []}")
    assert "data.format.delimiter" in problem(path, format="{delimiter = '##'}")


def test_encodings(tmp_path):
    path = saved(tmp_path / "d.csv", lines([("café", "é"), ("thé", "e")]), "cp1252")
    line = "d.csv cannot be read: line 2 is no utf-8 text; data.format = \"encoding = 'cp1252'\" is likely"
    assert problem(path) == f"data.path = {str(path)!r}: {line}"
    expected = {("café", "é"), ("thé", "e")}
    assert pairs(read(path, format="encoding = 'cp1252'")) == expected
    assert "there is no encoding 'klingon'" in problem(path, format="encoding = 'klingon'")
    assert pairs(read(saved(tmp_path / "e.csv", lines(sorted(expected)), "utf-16"))) == expected


def test_numbers_beside_missing_ones_keep_their_form(tmp_path):
    """Parquet and pandas make them floats; rows without an owner are nobody's, not a client of their own."""
    columns = {"text": pa.array([7.0, None, 2.5, 9.0]), "label": ["a", "b", "a", "b"], "who": pa.array([1.0, 2.0, 2.0, None])}
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    data = read(tmp_path / "d.parquet", id_column="who")
    assert pairs(data) == {("7", "a"), ("2.5", "a")} and {*data.train.owners, *data.test.owners} == {"1", "2"}
    assert data.skipped[0].endswith("2 of 4 rows skipped: 1 without owner, 1 without text")


# -- JSON --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("d.jsonl", '{"text": "a"}\n\n{"text": \n', "line 3 is no JSON (Expecting value)"),
        ("d.jsonl", '{"text": "a"}\n[1]\n', "line 2 is no object"),
        ("d.json", '[{"text": "a"}, 3]', "entry 2 is no object"),
        ("d.json", '"text"', "it holds neither a list of objects nor one object a line"),
        ("d.jsonl", "", "it is empty"),
        ("d.json", "[]", "it is empty"),
        ("d.jsonl", '{"text": "a"}\n' + "[" * 100_000 + "\n", "line 2 is no JSON (RecursionError)"),
    ],
)
def test_json_that_is_none(tmp_path, name, content, line):
    path = saved(tmp_path / name, content)
    assert problem(path) == f"data.path = {str(path)!r}: {name} cannot be read: {line}"


def test_a_line_with_a_list_of_objects_is_one_row(tmp_path):
    assert list(read_file(saved(tmp_path / "d.jsonl", '{"data": [{"a": 1}, {"a": 2}]}\n'))) == [{"data": [{"a": 1}, {"a": 2}]}]
    with pytest.raises(Unreadable):
        read_file(saved(tmp_path / "e.json", "3"))


def test_columns_by_row_number_in_another_order(tmp_path):
    """As pandas writes them, but that each column has its rows in an order of its own."""
    columns = {"text": {"0": "a", "1": "b", "2": "c"}, "label": {"2": "C", "0": "A", "1": "B"}}
    assert pairs(read(saved(tmp_path / "d.json", json.dumps(columns)))) == {("a", "A"), ("b", "B"), ("c", "C")}


def test_half_a_character(tmp_path):
    """A lone surrogate, which no tokenizer and no hash takes."""
    path = saved(tmp_path / "d.jsonl", r'{"text": "one \ud83d two", "label": "a\ud83d"}' + '\n{"text": "b", "label": "c"}\n')
    assert pairs(read(path)) == {("one ? two", "a?"), ("b", "c")}


def test_other_ends_of_a_line_within_a_text(tmp_path):
    text = "one\u2028two\x85three"
    path = saved(
        tmp_path / "d.jsonl", json.dumps({"text": text, "label": "a"}, ensure_ascii=False) + '\n{"text": "b", "label": "a"}\n'
    )
    assert (text, "a") in pairs(read(path))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (gzip.compress(lines().encode()), "it is a gzip file, allowed is such with the ending .gz"),
        (b"PK\x03\x04" + bytes(30), "it is a zip file or a spreadsheet, allowed is text: unpack it, or save it as csv"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "it is a pointer of Git LFS and not the file, `git lfs pull` gets it",
        ),
    ],
    ids=["gzip", "zip", "pointer"],  # gzip writes the time: its bytes would be another name on every worker
)
def test_other_files_under_the_name_of_a_table(tmp_path, content, line):
    (path := tmp_path / "d.csv").write_bytes(content)
    assert problem(path) == f"data.path = {str(path)!r}: d.csv cannot be read: {line}"


@pytest.mark.parametrize("encoding", ["undefined", "base64", r"a\u0000b"])
def test_encodings_that_are_none(tmp_path, encoding):
    path = saved(tmp_path / "d.csv", lines())
    assert "d.csv cannot be read: there is no encoding " in problem(path, format=f'encoding = "{encoding}"')


def test_a_mark_of_the_encoding_that_is_named(tmp_path):
    path = saved(tmp_path / "d.csv", "\ufeff" + lines())
    assert pairs(read(path, format="encoding = 'utf-8'")) == set(ROWS)


def test_parquet_that_says_late_what_is_wrong(tmp_path):
    """A page that is broken, a date that Python has not, two columns of one name."""
    path, key = tmp_path / "d.parquet", f"data.path = {str(tmp_path / 'd.parquet')!r}"
    texts = [f"some text number {i}" for i in range(20_000)]
    pq.write_table(pa.table({"text": texts, "label": ["a", "b"] * 10_000}), path, compression="snappy")
    broken = bytearray(path.read_bytes())
    broken[200:4000] = bytes(255 - i % 251 for i in range(3800))
    path.write_bytes(broken)
    assert problem(path).startswith(f"{key}: column 'text' cannot be read (")
    pq.write_table(pa.table({"text": ["a", "b"], "label": pa.array([2**40, 2**41], pa.timestamp("s"))}), path)
    assert problem(path).startswith(f"{key}: column 'label' cannot be read (")
    pq.write_table(pa.Table.from_arrays([pa.array(["a", "b"])] * 3, names=["text", "text", "label"]), path)
    assert problem(path) == f"{key}: d.parquet cannot be read: two columns are called 'text'"


def test_commas_at_the_ends_of_lines(tmp_path):
    """As spreadsheets leave them: columns without a name, of which there may be several."""
    assert pairs(read(saved(tmp_path / "d.csv", "text,label,,\na,x,,\nb,y,,\n"))) == {("a", "x"), ("b", "y")}


def test_many_columns_are_not_all_named(tmp_path):
    path = saved(tmp_path / "d.csv", ",".join(f"c{i}" for i in range(500)) + "\n")
    assert problem(path).endswith("'c19'] and 480 more")


def test_the_label_as_the_text(tmp_path):
    line = problem(saved(tmp_path / "d.csv", lines()), text_column="label")
    assert line == "data.label-column = 'label': it is the text-column too, allowed is another column"


@pytest.mark.parametrize(("value", "word"), [({"a": 1}, "objects"), ([1, 2], "lists"), (b"\xff\x00", "bytes")])
def test_what_is_no_text(tmp_path, value, word):
    pq.write_table(pa.table({"text": [value, value], "label": ["a", "b"]}), tmp_path / "d.parquet")
    line = f"data.text-column = 'text': it holds {word}, allowed with data.task = 'classification' is one value a row"
    assert problem(tmp_path / "d.parquet") == line


# -- folders -----------------------------------------------------------------------------------------------------------
def test_names_with_signs_are_taken_as_they_are(tmp_path):
    for name in ("a[1] b", "a*b", "a?b", "~x", "ü"):
        saved(tmp_path / name / "train.csv", lines())
        assert pairs(read(tmp_path / name)) == set(ROWS)
    saved(tmp_path / "axb" / "train.csv", lines([("other", "z")] * 3))
    assert pairs(read(tmp_path / "a*b")) == set(ROWS)


def test_a_split_in_pieces(tmp_path):
    """As the Hub has them, in the folder or in its `data`; several files by name; pieces with other columns."""
    for folder in (tmp_path / "a", tmp_path / "b" / "data"):
        saved(folder / "train-00000-of-00002.csv", lines(ROWS[:1]))
        saved(folder / "train-00001-of-00002.csv", lines(ROWS[1:3], "text,label"))
        saved(folder / "test-00000-of-00001.jsonl", '{"text": "no", "label": "neg"}\n')
    for folder in ("a", "b"):
        data = read(tmp_path / folder)
        assert pairs(data) == set(ROWS) and data.test.texts == ("no",)
    files = [saved(tmp_path / f"{i}.csv", lines([row])) for i, row in enumerate(ROWS)]
    assert pairs(read(", ".join(map(str, files)))) == set(ROWS)
    saved(files[1], "text,kind\na,b\n")
    assert "1.csv has the columns ['text', 'kind'], 0.csv has ['text', 'label']" in problem(",".join(map(str, files)))


def test_which_files_are_a_split(tmp_path, caplog):
    """One split in two formats is likely one file twice, whose rows would be in training and test. What is taken, and what
    is not in spite of its name, is said."""
    for name in ("train.csv", "train_more.csv", "train (1).csv", "train.csv~", ".train.csv"):
        saved(tmp_path / name, lines())
    with caplog.at_level("INFO"):
        assert len(read(tmp_path).train) + len(read(tmp_path).test) == 8
    assert "train is train.csv, train_more.csv" in caplog.text and "not read are train (1).csv" in caplog.text
    saved(tmp_path / "train.csv.gz", "")
    line = (
        "train.csv and train.csv.gz are one split in two formats, allowed is one; or name the files, with commas between them"
    )
    assert problem(tmp_path, seed=1) == f"data.path = {str(tmp_path)!r}: {line}"


def test_paths_that_are_none(tmp_path):
    """A user that is not there, more letters than a name may have; as many in several files are fine."""
    for path in ("~nobody-of-that-name/d.csv", "a" * 5000, "a\0b.csv"):
        assert problem(path) == f"data.path = {path!r}: there is no such file or folder"
    files = [saved(tmp_path / f"{i:060}.csv", lines([ROWS[i % 4]])) for i in range(80)]
    assert pairs(read(",".join(map(str, files)))) == set(ROWS)


def test_a_device_without_a_training_split(tmp_path):
    """Splits are found by their names there as on the server; a test file without labels is no error."""
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
    datasets.DatasetDict({"Training": table, "Test": table.remove_columns("label")}).save_to_disk(str(tmp_path / "own"))
    own = load_own(DataSettings(path=str(tmp_path / "own")), ("x", "y"))
    assert own.train.texts == ("a", "b") and own.test is None and str(own.skipped) == "2 of 4 rows skipped: 2 without label"
    datasets.DatasetDict({"dev": table}).save_to_disk(str(tmp_path / "dev"))
    with pytest.raises(ConfigError, match="its splits are dev, allowed is one that is called train"):
        load_own(DataSettings(path=str(tmp_path / "dev")), ("x", "y"))


def test_a_validation_split_is_used(tmp_path):
    saved(tmp_path / "train.csv", lines())
    saved(tmp_path / "dev.csv", lines([("meh", "neg")]))
    saved(tmp_path / "test.csv", lines([("yes", "pos")]))
    data = read(tmp_path)
    assert (data.train.texts, data.validation.texts, data.test.texts) == (tuple(t for t, _ in ROWS), ("meh",), ("yes",))
    assert read(tmp_path, validation_split="-").validation is None
    data = read(tmp_path, validation_split="test", test_split="validation")
    assert (data.validation.texts, data.test.texts) == (("yes",), ("meh",))
    line = "data.test-split = 'tset': allowed with data.path = "
    assert problem(tmp_path, test_split="tset").startswith(line) and "did you mean 'test'" in problem(
        tmp_path, test_split="tset"
    )


@pytest.mark.parametrize("hidden", ["-1", "", None])
def test_a_test_split_without_labels(tmp_path, hidden):
    """As GLUE has it: what is there to validate on is the test. Without such, test rows are cut from the training rows."""
    (tmp_path / "labels.json").write_text('["neg", "pos"]')
    saved(tmp_path / "train.csv", lines([("a", 0), ("b", 1), ("c", 0), ("d", 1)]))
    saved(tmp_path / "validation.csv", lines([("v", 1)]))
    saved(tmp_path / "test.csv", "text\nt\n" if hidden is None else lines([("t", hidden)]))
    data = read(tmp_path)
    assert data.test.texts == ("v",) and data.validation is None and len(data.train) == 4
    key = f"data.path = {str(tmp_path)!r}: "
    assert data.skipped == (
        f"{key}no row of the test split has a label: it is not used",
        f"{key}the validation split is the test; what is validated on is cut from the training rows",
    )
    (tmp_path / "validation.csv").unlink()
    data = read(tmp_path, 1)
    assert len(data.test) == 1 and data.test.texts[0] in "abcd"


def test_a_folder_that_the_library_wrote(tmp_path):
    table = datasets.Dataset.from_dict({"text": [t for t, _ in ROWS], "label": [n for _, n in ROWS]})
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "d")
    data = read(tmp_path / "d")
    assert pairs(data) == set(ROWS) and data.test.texts == ("lovely phone",)
    (tmp_path / "d" / "train" / "state.json").unlink()
    assert "cannot be read (" in problem(tmp_path / "d", test_split="-")


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas"])
def test_a_format_that_the_library_saved(tmp_path, kind):
    """The folder says 'torch': a label would be 'tensor(1)', and other columns were not there."""
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 2, 1]}).with_format(kind, columns=["label"])
    table.save_to_disk(str(tmp_path / "d"))
    assert pairs(read(tmp_path / "d")) == {("a", "1"), ("b", "2"), ("c", "1")}


def test_a_copy_of_a_hub_repository(tmp_path):
    """Its README says which files are which split, by configuration."""
    saved(
        tmp_path / "README.md",
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/part.csv\n"
        "- config_name: de\n  data_files:\n  - split: train\n    path: de/part.csv\n---\nA set.\n",
    )
    saved(tmp_path / "en" / "part.csv", lines())
    saved(tmp_path / "de" / "part.csv", lines([("gut", "pos"), ("schlecht", "neg")]))
    assert pairs(read(tmp_path, subset="de")) == {("gut", "pos"), ("schlecht", "neg")}
    line = problem(tmp_path)
    assert line.startswith(f"data.path = {str(tmp_path)!r}: data.subset = '': allowed are [") and "'de'" in line
    assert "allowed are" in problem(tmp_path, subset="fr")


def test_a_csv_of_a_hub_repository_is_read_as_any_other(tmp_path):
    """The library would make 007 a 7, and NA nothing; names of ids that the README has count."""
    head = "---\nconfigs:\n- config_name: default\n  sep: '|'\n  data_files: part.csv\n"
    saved(tmp_path / "a" / "README.md", head + "---\n")
    saved(tmp_path / "a" / "part.csv", "text|label\na|007\nb|7\nc|NA_\nNA|7\n")
    assert pairs(read(tmp_path / "a")) == {("a", "007"), ("b", "7"), ("c", "NA_"), ("NA", "7")}
    names = "dataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n    dtype:\n      class_label:\n"
    saved(tmp_path / "b" / "README.md", head + names + "        names:\n          '0': neg\n          '1': pos\n---\n")
    saved(tmp_path / "b" / "part.csv", "text|label\n007|1\nNA|0\n")
    assert pairs(read(tmp_path / "b")) == {("007", "pos"), ("NA", "neg")}


def test_what_is_in_a_folder_without_training_rows(tmp_path):
    saved(tmp_path / "reviews.csv", lines())
    saved(tmp_path / "notes.txt", "")
    assert "no train file in it, but reviews.csv; allowed are train.*" in problem(tmp_path)


def test_nothing_is_written_into_a_cache(tmp_path, monkeypatch):
    """A device's file stays where its owner put it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for path in (saved(tmp_path / "d.csv", lines()), saved(tmp_path / "d.jsonl", '{"text": "a", "label": "b"}\n' * 3)):
        read_files(str(path), "", "", "key")
    assert not (tmp_path / "cache").exists()


def hub_copy(folder: Path) -> Path:
    """A copy of a Hub repository whose README names its files."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "x.jsonl").write_text('{"text": "a", "label": "b"}\n' * 3)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: data/x.jsonl\n---\n")
    return folder


@pytest.mark.parametrize("home", ["file", "file/home"])
def test_data_are_read_where_nothing_may_be_kept(tmp_path, monkeypatch, home):
    """A file stands in the place of the folder for copies, or of one above it."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / home))
    assert len(read_files(str(hub_copy(tmp_path / "copy")), "", "", "data.path")["train"]) == 3


def test_a_cache_that_cannot_be_written_is_named(monkeypatch):
    place = "/home/nobody/.cache/huggingface"
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=PermissionError(13, "Permission denied", place)))
    with pytest.raises(ConfigError, match=f"{place} cannot be written .*: the environment variable HF_HOME names another"):
        read_hub("someone/data", "", "data.name = 'someone/data'")
