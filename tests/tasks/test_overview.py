"""What a run says of its data before the first round: numbers by hand, and every kind of warning."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import MINILM, TASKS
from data_helper import write
from runs_helper import config

from fedara_flwr import engine
from fedara_flwr.adapters.backbone import load_tokenizer
from fedara_flwr.client import session
from fedara_flwr.data import docstrings
from fedara_flwr.data.examples import Examples
from fedara_flwr.tasks import read_settings
from fedara_flwr.tasks.overview import dealt, overview

NAMES = ("red", "green", "blue")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MINILM)


def rows(*groups: int, text: str = "one two three") -> Examples:
    return Examples(tuple(f"{text} {i}" for i in range(len(groups))), np.array(groups, dtype=np.int64))


def look(tokenizer, train: Examples, names=NAMES, most: int = 64, **parts: Examples):
    return overview(TASKS["classification"], tokenizer, {"train": train, **parts}, names, most)


def test_by_hand(tokenizer):
    """Texts of 6 tokens with the two marks around them, one of 8."""
    train = Examples((*rows(0, 0, 1).texts, "one two three four five six"), np.array([0, 0, 1, 2]))
    found = look(tokenizer, train, most=7, validation=rows(0, 1, 2, text="two two two"), test=rows(0, 1, text="one one one"))
    assert found.lines == (
        "data: 4 to train on, 3 to validate on, 2 to test on",
        "labels: 3 ('red', 'green', 'blue'); most rows 'red' 2, fewest 'green' 1",
        "texts: at most 8 tokens, half have 6 or fewer; 1 have more than data.max-length = 7; 0.00% unknown tokens",
    )
    assert found.warnings == ("no row to test on has 'blue'",)


@pytest.mark.parametrize(
    ("train", "test", "names", "words"),
    [
        ((0, 1, 2), (0, 1, 2), NAMES, []),
        ((0, 1, 0), (0, 1, 2), NAMES, ["no row to train on has 'blue', of 3 labels", "only rows to test on have 'blue'"]),
        ((0, 0), (0,), NAMES[:1], ["all rows to train on have one and the same of the labels: there is nothing to learn"]),
        (
            (0, 1, 2, 3),
            (0, 1, 2, 3),
            ("Pos", "pos\u200b", "caf\u00e9", "neg"),
            ["of the labels some look alike: 'Pos', 'pos\\u200b'; what is one should be written so"],
        ),
        (
            (0, 1, 2, 3),
            (0, 1, 2, 3),
            ("caf\u00e9", "cafe\u0301", "01", "1"),
            ["of the labels some look alike: 'caf\\xe9', 'cafe\\u0301', '01', '1'; what is one should be written so"],
        ),
        ((0, 1), (0, 1), ("0.5", "1"), ["the labels are numbers with a fraction: should numbers be learnt (`fedara tasks`)?"]),
    ],
)
def test_warnings(tokenizer, train, test, names, words):
    assert list(look(tokenizer, rows(*train), names, test=rows(*test, text="two two")).warnings) == words


def test_rows_that_are_trained_on_are_no_test(tokenizer):
    """Whatever their labels; of a pair both texts count."""
    pairs = Examples(("a", "a"), np.array([0, 1]), pairs=("b", "c"))
    found = look(tokenizer, pairs, NAMES[:2], test=Examples(("a", "a"), np.array([0, 1]), pairs=("b", "d")))
    assert found.warnings == ("1 of 2 rows to test on are among those to train on, too",)
    found = look(tokenizer, rows(0, 1), NAMES[:2], validation=rows(1, 0), test=rows(0, 1, text="others"))
    assert found.warnings == ("2 of 2 rows to validate on are among those to train on, too",)


def test_a_tokenizer_of_another_language(tokenizer):
    found = look(tokenizer, rows(0, 1, text="\U00013080\U00013081 \U00013082"), NAMES[:2])
    assert found.warnings[-1].endswith("of the tokens are unknown to the tokenizer: is it one for this language?")


def test_many_labels_and_rows_are_shortened(tokenizer):
    names = tuple(f"label {i} " + "x" * 99 for i in range(50))
    found = look(tokenizer, rows(*range(50)), names, test=rows(0, 1))
    assert len(found.lines[1]) < 500 and "'label 49 xxx" in found.lines[1] and "and 43 more" in found.warnings[0]


def test_how_rows_lie_over_clients():
    counts = {"0": [3, 1], "1": [0, 2], "2": [0, 0]}
    assert dealt(counts, True).lines == ("clients: 3 of 2 to 4 rows, 1 with one label alone, 1 without any",)
    assert dealt({"0": [3], "1": [4]}, False).lines == ("clients: 2 of 3 to 4 rows",)


def test_a_run_says_it(tiny_bert, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fedara_flwr.runs.keeper.write_report", lambda path: path / "report.html")
    path = write(tmp_path / "d.jsonl", [{"text": f"some words {i}", "label": "ab"[i % 2]} for i in range(60)] + [{"text": "x"}])
    flat = config(tiny_bert, method="fedlora", num_server_rounds=1, data__path=str(path), data__test=0.2, data__validation=0.2)
    engine.run(flat | {"run.dir": str(tmp_path)}, 4)
    shown = capsys.readouterr()
    said = shown.out + shown.err
    for words in ("data: 38 to train on, 10 to validate on, 12 to test on", "labels: 2 ('a', 'b'); most", "clients: 4 of "):
        assert said.count(words) == 1, words
    assert f"data.path = {str(path)!r}, train: 1 of 61 rows skipped: 1 without label" in said


def test_a_device_says_it_of_its_own_file(tiny_bert, tmp_path):
    """With what is wrong in it; a simulated client has no data of its own to tell of."""
    path = write(tmp_path / "own.jsonl", [{"text": f"words {i}", "label": ["io", "mud"][i > 7]} for i in range(9)])
    settings = read_settings(config(tiny_bert, data__path=str(path)))
    found = session.Session(settings, ("gui", "io"), "cpu").client_data("own", 0, 1, str(path)).overview
    assert found.lines[0] == "data: 8 to train on" and found.lines[1].startswith("labels: 2 ('gui', 'io'); most rows 'io' 8")
    assert found.warnings == (
        "1 of 9 rows skipped: 1 with unknown labels ('mud' 1)",
        "all rows to train on have one and the same of the labels: there is nothing to learn",
        "no row to train on has 'gui', of 2 labels",
    )
    plain = session.Session(read_settings(config(tiny_bert)), docstrings.load()[1], "cpu")
    assert plain.client_data("0", 0, 9, "").overview == ((), ())
