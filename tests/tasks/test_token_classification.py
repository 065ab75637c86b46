"""Token classification: reading words and tags, alignment with sub-tokens, entity scores, whole runs, stock PEFT."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CONFIGS, MINILM, TASKS, mean_loss, metrics, random_arrays, random_batch
from data_helper import load, load_own
from hypothesis import given, settings
from hypothesis import strategies as st
from runs_helper import CLIENTS, config
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import ByT5Tokenizer, Qwen2Config, Qwen2Tokenizer, RobertaConfig, RobertaTokenizer, T5Config

from fedara_flwr import engine
from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.backbone import Backbone, load_tokenizer
from fedara_flwr.adapters.export import save_peft
from fedara_flwr.adapters.learner import Learner
from fedara_flwr.config import DataSettings
from fedara_flwr.data.examples import Dataset, Examples
from fedara_flwr.data.partitions import partition
from fedara_flwr.keys import ConfigError
from fedara_flwr.model.deltas import Weights
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.tasks import Encoded, read_settings
from fedara_flwr.tasks import token_classification as tags

TASK = TASKS["token-classification"]
NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-MISC", "I-MISC")
ROWS = [
    {"tokens": ["Ada", "Byron", "left", "Rome"], "ner": ["B-PER", "I-PER", "O", "B-LOC"], "who": "x"},
    {"tokens": ["nothing", "happened"], "ner": ["O", "O"], "who": "y"},
    {"tokens": ["Paris"], "ner": ["B-LOC"], "who": "x"},
]


pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MINILM)


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path, index=False)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tagged(path: Path, **options: str) -> DataSettings:
    columns = {"text_column": "tokens", "label_column": "ner"}
    return DataSettings(task="token-classification", path=str(path), **(columns | options))


def read(path: Path, **options: str) -> Dataset:
    return load(tagged(path, **options), 0)


def content(data: Dataset) -> dict[tuple[str, ...], list[str]]:
    """Words -> tag names, of training and test rows together."""
    return {words: [data.labels[tag] for tag in row] for part in (data.train, data.test) for words, row in part.targets}


def problem(path: Path, **options: str) -> str:
    """The one line that reading `path` ends with."""
    with pytest.raises(ConfigError) as caught:
        read(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sentences(*rows: tuple[list[str], list[int]]) -> Examples:
    words, row_tags = zip(*rows, strict=True)
    targets = tuple((tuple(one), tuple(other)) for one, other in zip(words, row_tags, strict=True))
    identities = tuple(json.dumps(target) for target in targets)
    return Examples(tuple(map(" ".join, words)), np.zeros(len(rows), np.int64), targets=targets, identities=identities)


def words_of(examples: Examples) -> tuple[tuple[str, ...], ...]:
    return tuple(words for words, _ in examples.targets)


# tags


def test_tags_with_and_without_prefix():
    assert tags.iob(("O", "B-PER", "I-PER", "B-A-b")) == ("O", "B-PER", "I-PER", "B-A-b")
    assert tags.iob(("PER", "O", "S-Bahn")) == ("I-PER", "O", "I-S-Bahn")
    assert tags.iob(("B", "I", "O")) == ("B-", "I-", "O")
    assert tags.types(("I-LOC", "O", "B-PER", "I-PER", "B-LOC")) == ("LOC", "PER")
    assert tags.types(("B", "I", "O")) == ("",)


def test_main_type_of_a_sentence():
    """Types are PER = 1, LOC = 2; most words decide, PER among equals; 0 without an entity."""
    names = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    rows = [[0, 0, 0, 3], [1, 3, 4, 0], [3, 1], [0, 0], [1, 1, 3]]
    assert [tags.main_type(row, names) for row in rows] == [2, 2, 1, 0, 1]
    assert [tags.main_type(row, ("X", "O", "Y")) for row in ([1, 1], [0, 2])] == [0, 1]


# reading


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_words_and_tags(tmp_path, ending):
    data = read(write(tmp_path / f"d{ending}", ROWS), id_column="who")
    assert data.labels == ("B-LOC", "B-PER", "I-PER", "O")
    assert content(data) == {tuple(row["tokens"]): row["ner"] for row in ROWS}
    for part in (data.train, data.test):
        assert part.texts == tuple(" ".join(words) for words in words_of(part))
        assert part.pairs is None
        for text, owner, label in zip(part.texts, part.owners, part.groups, strict=True):
            # types in the order of the names: LOC = 1, PER = 2
            assert (owner, label) == {"Ada Byron left Rome": ("x", 2), "nothing happened": ("y", 0), "Paris": ("x", 1)}[text]


def test_class_labels_of_the_file(tmp_path):
    names = ["O", "B-LOC", "I-LOC"]
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "ner": datasets.List(datasets.ClassLabel(names=names))}
    )
    rows = {"tokens": [["New", "York"], ["here"]], "ner": [[1, 2], [0]]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d.parquet")
    data = read(tmp_path / "d.parquet")
    assert data.labels == tuple(names)
    assert content(data) == {("New", "York"): ["B-LOC", "I-LOC"], ("here",): ["O"]}


NUMBERED = [{"tokens": ["New", "York"], "ner": [1, 2]}, {"tokens": ["here"], "ner": [0]}]


def test_ids_need_names(tmp_path):
    path = write(tmp_path / "d.jsonl", NUMBERED)
    assert "column 'ner': it holds ids, allowed are tags, or ids with their names in data.labels or labels.json" in problem(
        path
    )
    expected = {("New", "York"): ["B-LOC", "I-LOC"], ("here",): ["O"]}
    assert content(read(path, labels="O, B-LOC,I-LOC")) == expected
    (tmp_path / "labels.json").write_text('["O", "B-LOC", "I-LOC"]')
    assert content(read(path)) == expected


def test_a_device_leaves_out_sentences_with_an_unknown_tag(tmp_path):
    own = load_own(tagged(write(tmp_path / "d.jsonl", [*ROWS, {"tokens": [" "], "ner": ["O"]}])), ("O", "B-PER", "I-PER"))
    left = [row for row in ROWS if "B-LOC" not in row["ner"]]
    assert words_of(own.train) == tuple(tuple(row["tokens"]) for row in left) and own.test is None
    line = f"{4 - len(left)} of 4 rows skipped: {3 - len(left)} with unknown labels ('B-LOC' {3 - len(left)}), 1 without text"
    assert str(own.skipped) == line and len(left) < 3
    own = load_own(tagged(write(tmp_path / "n.jsonl", NUMBERED)), ("O", "B-LOC", "I-LOC"))
    assert [tags for _, tags in own.train.targets] == [(1, 2), (0,)]


def test_test_file(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS)
    write(folder / "test.jsonl", [{"tokens": ["Oslo", "."], "ner": ["B-LOC", "O"]}])
    data = read(folder)
    assert len(data.train) == 3
    assert words_of(data.test) == (("Oslo", "."),)


def test_rows_without_words_are_left_out(tmp_path):
    rows = [*ROWS, {"tokens": [], "ner": []}, {"tokens": None, "ner": None}, {"tokens": [" ", ""], "ner": ["O", "O"]}]
    assert len(content(read(write(tmp_path / "d.jsonl", rows)))) == 3
    assert problem(write(tmp_path / "empty.jsonl", [{"tokens": [" "], "ner": ["O"]}])).endswith(
        "there are no rows with text and label (1 of 1 rows skipped: 1 without text)"
    )


# mistakes


def test_columns_without_lists(tmp_path):
    rows = [{"tokens": ["a"], "ner": ["O"], "text": "a", "label": "O", "spans": [{"start": 0}], "nested": [["O"]]}]
    path = write(tmp_path / "d.jsonl", rows)
    said = "allowed with data.task = 'token-classification' are lists with one entry for each word"
    held = {"label": "single values", "spans": "lists of lists or objects", "nested": "lists of lists or objects"}
    assert problem(path, text_column="text") == f"data.text-column = 'text': it holds single values, {said}"
    for column, what in held.items():
        assert problem(path, label_column=column) == f"data.label-column = {column!r}: it holds {what}, {said}"
    assert problem(path, text_column="token").endswith("did you mean 'tokens'?")


@pytest.mark.parametrize("ner", [["O"], ["O", "O", "O"], []])
def test_another_number_of_labels(tmp_path, ner):
    """One bad sentence is counted, and no device is lost for it."""
    data = read(write(tmp_path / "d.jsonl", [*ROWS, {"tokens": ["a", "b"], "ner": ner}]))
    assert len(content(data)) == 3 and data.skipped[0].endswith("1 of 4 rows skipped: 1 with more or fewer tags than words")


def test_unknown_label(tmp_path):
    path = write(tmp_path / "d.jsonl", ROWS)
    assert problem(path, labels="O,B-PER,I-PER") == (
        f"data.path = {str(path)!r}: row 0 has label 'B-LOC', allowed are O, B-PER, I-PER"
    )
    path = write(tmp_path / "n.jsonl", NUMBERED)
    assert problem(path, labels="O,B-LOC").endswith("it holds 2, allowed are names, or places from 0 to 1, of O, B-LOC")
    path = write(tmp_path / "none.jsonl", [*ROWS, {"tokens": ["a", "b"], "ner": ["O", None]}])
    assert read(path).skipped[0].endswith("1 of 4 rows skipped: 1 without label")


def test_words_that_are_numbers_or_missing(tmp_path):
    path = write(tmp_path / "d.jsonl", [*ROWS, {"tokens": [101, None, 7.0], "ner": ["O", "O", "O"]}])
    assert ("101", "", "7") in content(read(path))


PER = [["B-PER", "I-PER", "I-PER", "O", "B-PER"], ["B-LOC", "B-PER"]]


@pytest.mark.parametrize(
    "rows",
    [
        PER,
        [["B-PER", "I-PER", "E-PER", "O", "S-PER"], ["S-LOC", "S-PER"]],
        [["B-PER", "I-PER", "L-PER", "O", "U-PER"], ["U-LOC", "U-PER"]],
        [["B-PER", "M-PER", "E-PER", "O", "S-PER"], ["S-LOC", "S-PER"]],
        [["B_PER", "I_PER", "I_PER", "O", "B_PER"], ["B_LOC", "B_PER"]],
        [["PER-B", "PER-I", "PER-I", "OTHER", "PER-B"], ["LOC-B", "PER-B"]],
        [["PER_B", "PER_I", "PER_E", "o", "PER_S"], ["LOC_S", "PER_S"]],
        [["b-PER", "i-PER", "i-PER", "o", "b-PER"], ["b-LOC", "b-PER"]],
    ],
)
def test_schemes(tmp_path, rows, caplog):
    """All ways to write the same entities are the same labels: half an entity that is found is none."""
    table = [{"tokens": [f"w{i}" for i in range(len(tags))], "ner": tags} for tags in rows]
    table += [{"tokens": ["a", "b"], "ner": rows[0][3:4] * 2}, {"tokens": ["c"], "ner": rows[0][3:4]}]
    with caplog.at_level("INFO"):
        data = read(write(tmp_path / "d.jsonl", table))
    assert data.labels == ("B-LOC", "B-PER", "I-PER", "O")
    assert sorted(content(data).values()) == sorted([*PER, ["O", "O"], ["O"]])
    assert ("tags are converted: " in caplog.text) == (rows is not PER)
    own = load_own(tagged(write(tmp_path / "own.jsonl", table)), data.labels)
    assert len(own.train) == 4 and str(own.skipped) == ""


def test_class_labels_in_another_scheme(tmp_path):
    names = ["O", "B-PER", "I-PER", "E-PER", "S-PER"]
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "ner": datasets.List(datasets.ClassLabel(names=names))}
    )
    rows = {"tokens": [["a", "b", "c"], ["d", "e"], ["f"]], "ner": [[1, 2, 3], [4, 0], [0]]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d.parquet")
    found = content(read(tmp_path / "d.parquet"))
    assert found == {("a", "b", "c"): ["B-PER", "I-PER", "I-PER"], ("d", "e"): ["B-PER", "O"], ("f",): ["O"]}


def test_types_without_prefix_are_left_alone(tmp_path):
    """S-Bahn and E-Mail are names of types, and so is OTHER beside O."""
    for rows in ([["S-Bahn", "O"], ["E-Mail", "O"], ["PER"]], [["OTHER", "O"], ["PER"], ["O"]]):
        table = [{"tokens": [f"{tags[0]} {i}" for i in range(len(tags))], "ner": tags} for tags in rows]
        assert sorted(content(read(write(tmp_path / f"{rows[0][0]}.jsonl", table))).values()) == sorted(rows)


def test_schemes_that_are_none(tmp_path):
    rows = [{"tokens": ["a", "b"], "ner": ["B-PER", "PER"]}]
    assert problem(write(tmp_path / "d.jsonl", rows)) == (
        "data.label-column = 'ner': tag 'PER' beside 'B-PER', allowed are 'O', 'B-…' and 'I-…', or types without a prefix"
    )


CONLL = """-DOCSTART- -X- O O

Ada NNP B-NP B-PER
Byron NNP I-NP I-PER
left VBD B-VP O
Rome NNP B-NP B-LOC


Paris NNP B-NP B-LOC

so RB O O
"""


@pytest.mark.parametrize("name", ["d.conll", "d.bio", "d.iob2"])
@pytest.mark.parametrize("gap", [" ", "\t", "  "])
def test_conll_files(tmp_path, name, gap):
    (tmp_path / name).write_text(CONLL.replace(" ", gap))
    assert content(load(DataSettings(task=TASK.name, path=str(tmp_path / name)), 0)) == {
        ("Ada", "Byron", "left", "Rome"): ["B-PER", "I-PER", "O", "B-LOC"],
        ("Paris",): ["B-LOC"],
        ("so",): ["O"],
    }
    (tmp_path / f"bad{name}").write_text("Ada B-PER\nByron\n")
    with pytest.raises(ConfigError, match=f"bad{name} cannot be read: line 2 has one field, allowed are a word and its tag"):
        load(DataSettings(task=TASK.name, path=str(tmp_path / f"bad{name}")), 0)


def test_conll_comments_and_spaces_within_a_word(tmp_path):
    path = tmp_path / "d.conll"
    path.write_text("# id 7e-5\tdomain=en\n10\u00a0000 _ _ O\nAda _ _ B-PER\n\n# O\n\n# id 8\nso O\n", encoding="utf-8")
    assert content(load(DataSettings(task=TASK.name, path=str(path)), 0)) == {
        ("10\u00a0000", "Ada"): ["O", "B-PER"],
        ("#",): ["O"],
        ("so",): ["O"],
    }
    path.write_text("1\tAda\tB-PER\n2\tleft\tO\n\n1\tso\tO\n")
    with pytest.raises(ConfigError, match="its first fields count the words of a sentence, allowed are lines that begin with"):
        load(DataSettings(task=TASK.name, path=str(path)), 1)


def test_one_word_a_row(tmp_path):
    """A sentence's name stands in each of its rows, or in the first alone."""
    for number, names in enumerate((["1", "1", "2", "3"], ["1", "", "2", "3"])):
        words = zip(names, ("Ada", "Byron", "Paris", "so"), ("B-PER", "I-PER", "B-LOC", "O"), strict=True)
        (tmp_path / f"{number}.csv").write_text("Sentence #,Word,Tag\n" + "".join(",".join(row) + "\n" for row in words))
        columns = {"text_column": "Word", "label_column": "Tag", "options": "sentence-column = 'Sentence #'"}
        data = load(DataSettings(task=TASK.name, path=str(tmp_path / f"{number}.csv"), **columns), 0)
        assert content(data) == {("Ada", "Byron"): ["B-PER", "I-PER"], ("Paris",): ["B-LOC"], ("so",): ["O"]}
    with pytest.raises(ConfigError, match="data.options sentence-column = 'sentence': no such column"):
        load(
            DataSettings(task=TASK.name, path=str(tmp_path / "0.csv"), **columns | {"options": "sentence-column = 'sentence'"}),
            0,
        )


def test_pairs_and_docstrings_have_no_tags(tmp_path):
    path = write(tmp_path / "d.jsonl", ROWS)
    assert problem(path, pair_column="who") == (
        "data.pair-column = 'who': allowed is '' with data.task = 'token-classification'"
    )
    with pytest.raises(ConfigError, match=r"^data\.name = 'docstrings': its words have no tags, allowed with data\.task"):
        load(read_settings({"data.task": "token-classification"}).data, 0)


# examples and partitions


def test_keys_and_digest_see_words_and_tags():
    base = sentences((["New", "York"], [1, 2]), (["here"], [0]))
    others = [
        sentences((["New York"], [1]), (["here"], [0])),
        sentences((["New", "York"], [1, 1]), (["here"], [0])),
        sentences((["New", "Yorck"], [1, 2]), (["here"], [0])),
        base.take([1, 0]),
    ]
    assert len({e.keys(0)[0] for e in [base, *others]}) == 5
    assert len({e.digest() for e in [base, *others]}) == 5
    assert base.take([0, 1]).digest() == base.digest()
    taken = base.take([1])
    assert taken.targets == ((("here",), (0,)),)


def test_pathological_partition_goes_by_type():
    """Three kinds of sentences (none, PER, LOC), one kind a client."""
    rows = [([f"w{i}"], [i % 3]) for i in range(30)]
    examples = sentences(*rows)
    names = ("O", "PER", "LOC")
    groups = np.array([tags.main_type(row, names) for _, row in examples.targets])
    examples = replace(examples, groups=groups)
    parts = partition(examples, DataSettings(partition="pathological", labels_per_client=1), 3, 0)
    kinds = [{examples.targets[i][1][0] for i in part} for part in parts]
    assert sorted(kinds, key=min) == [{0}, {1}, {2}]


# alignment


def test_labels_stand_on_first_sub_tokens(tokenizer):
    """[CLS] ac ##me lives [SEP]: by hand, as MiniLM's vocabulary has it."""
    encoded = TASK.encode(tokenizer, sentences((["acme", "lives"], [5, 7])), 64)
    assert tokenizer.convert_ids_to_tokens(encoded.ids[0]) == ["[CLS]", "ac", "##me", "lives", "[SEP]"]
    assert encoded.labels == [[-100, 5, -100, 7, -100]]


def test_cut_words_have_no_label(tokenizer):
    """Eight tokens: [CLS], three words, the first two pieces of the fourth and so on, [SEP]."""
    encoded = TASK.encode(tokenizer, sentences((["hello"] * 10, list(range(10))), (["hello"] * 5 + ["acme"], [1] * 5 + [2])), 8)
    assert encoded.labels == [[-100, 0, 1, 2, 3, 4, 5, -100], [-100, 1, 1, 1, 1, 1, 2, -100]]
    assert tokenizer.convert_ids_to_tokens(encoded.ids[1])[-2:] == ["ac", "[SEP]"]


def test_words_that_vanish_have_no_label(tokenizer):
    """BERT drops control characters; what comes after keeps its own tag."""
    encoded = TASK.encode(tokenizer, sentences((["hello", "\x07", "world"], [1, 2, 3])), 64)
    assert encoded.labels == [[-100, 1, 3, -100]]


def test_a_word_that_spells_a_special_token_is_text(tokenizer):
    encoded = TASK.encode(tokenizer, sentences((["[SEP]", "hello"], [1, 2])), 64)
    assert encoded.ids[0].count(tokenizer.sep_token_id) == 1
    assert [label for label in encoded.labels[0] if label != -100] == [1, 2]


def test_encode_nothing(tokenizer):
    assert len(TASK.encode(tokenizer, Examples((), np.zeros(0, np.int64)), 64)) == 0


@pytest.fixture(scope="module", params=["roberta", "qwen"])
def byte_level(request, tmp_path_factory):
    """A byte-level tokenizer with whole words for 'Ġ' + word, as RoBERTa and Qwen have it."""
    path = tmp_path_factory.mktemp(request.param)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([" lives paris acme"] * 20, vocab_size=400, special_tokens=special)
    trained.save_model(str(path))
    vocabulary = json.loads((path / "vocab.json").read_text())
    merges = [tuple(line.split()) for line in (path / "merges.txt").read_text().splitlines()[1:]]
    kind, settings_ = {"roberta": (RobertaTokenizer, RobertaConfig()), "qwen": (Qwen2Tokenizer, Qwen2Config())}[request.param]
    kind(vocab=vocabulary, merges=merges).save_pretrained(path)
    settings_.save_pretrained(path)
    save_file({}, path / "model.safetensors")
    return load_tokenizer(str(path), TASK)


def test_byte_level_words_keep_their_space(byte_level):
    """Tokens are those of the running text; a space that is a token of its own does not carry the word's tag."""
    encoded = TASK.encode(byte_level, sentences((["paris", "lives", "2"], [1, 2, 3])), 64)
    assert encoded.ids[0] == byte_level("paris lives 2")["input_ids"]
    tokens = byte_level.convert_ids_to_tokens(encoded.ids[0])
    labels = dict(zip(tokens, encoded.labels[0], strict=True))
    assert (labels["Ġlives"], labels["Ġ"], labels["2"]) == (2, -100, 3)
    assert encoded.labels[0].count(-100) == len(tokens) - 3


def test_a_tokenizer_without_word_places_is_refused(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    T5Config().save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    load_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match=r"^model\.name = .*: its tokenizer does not tell which word a token is of"):
        load_tokenizer(str(tmp_path), TASK)


# batches and loss


def test_collate_pads_labels():
    plain = SimpleNamespace(pad_token_id=9, sep_token_id=None, model_input_names=["input_ids"])
    batch = TASK.collate(plain, [[1, 2, 3], [4]], [[-100, 5, 6], [7]])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 5, 6], [7, -100, -100]]


def test_collate_has_one_segment(tokenizer):
    encoded = TASK.encode(tokenizer, sentences((["hello", "world"], [1, 2]), (["hello"], [1])), 64)
    assert TASK.collate(tokenizer, encoded.ids, encoded.labels)["token_type_ids"].tolist() == [[0] * 4] * 2


def test_loss_is_the_mean_over_words():
    """p = (1/2, 1/4, 1/4) with label 0 and (1/8, 3/4, 1/8) with label 2: (ln 2 + ln 8) / 2; the third token has no label."""
    p = torch.tensor([[[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.9, 0.05, 0.05]]])
    loss = mean_loss(TASK, SimpleNamespace(logits=p.log()), {"labels": torch.tensor([[0, 2, -100]])})
    assert loss.shape == () and loss.item() == pytest.approx(2 * math.log(2), rel=1e-6)


def test_loss_without_words_is_zero():
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    loss = TASK.losses(SimpleNamespace(logits=logits), {"labels": torch.full((1, 2), -100)}).sum()
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


# metrics


def outputs(predicted: list[list[int]], truth: list[list[int]]):
    """Logits of nine labels, 8 : 1 for the predicted one, behind an unlabelled token and followed by one, and padding."""
    logits = []
    for row in predicted:
        words = math.log(8) * np.eye(9)[row]
        logits.append(np.vstack([np.full((1, 9), 3.0), words, np.arange(18).reshape(2, 9)]).astype(np.float32))
    return logits, [[-100, *row, -100] for row in truth]


def numbers(*rows: str) -> list[list[int]]:
    return [[NAMES.index(tag) for tag in row.split()] for row in rows]


def test_metrics_by_hand():
    """Entities as (type, first, last word).

    1: true PER 0-1, LOC 3-3; predicted PER 0-1, PER 3-3.     2: true ORG 1-2; predicted ORG 1-2, begun by an I-.
    3: true PER 0-0, PER 1-1; predicted PER 0-1.              4: none; predicted LOC 1-1.
    Right are PER and ORG once each. All: 2·2/(5 + 5) = 0.4. PER 2·1/(3 + 3), LOC 0/(1 + 1), ORG 2·1/(1 + 1); MISC nowhere.
    Words: 3 + 2 + 1 + 1 of 11 right. A right word has p = 8/16, a wrong one 1/16: (7·1 + 4·4)·ln 2 / 11.
    """
    truth = numbers("B-PER I-PER O B-LOC", "O B-ORG I-ORG", "B-PER B-PER", "O O")
    predicted = numbers("B-PER I-PER O B-PER", "O I-ORG I-ORG", "B-PER I-PER", "O B-LOC")
    found = metrics(TASK, *outputs(predicted, truth), NAMES)
    assert found == {
        "accuracy": pytest.approx(7 / 11),
        "macro-f1": pytest.approx((1 / 3 + 0 + 1) / 3),
        "entity-f1": pytest.approx(0.4),
        "loss": pytest.approx(23 * math.log(2) / 11, rel=1e-6),
    }
    assert {type(value) for value in found.values()} == {float}


def test_types_without_prefix_are_runs():
    """True X 0-1, Y 2-2, X 4-4; predicted X 0-1, Y 2-3, X 4-4: 2·2/(3 + 3), X 2·2/(2 + 2), Y 0."""
    names = ("X", "Y", "O", *"abcdef")
    found = metrics(TASK, *outputs([[0, 0, 1, 1, 0]], [[0, 0, 1, 2, 0]]), names)
    assert found["entity-f1"] == pytest.approx(2 / 3) and found["macro-f1"] == pytest.approx(1 / 2)


def test_metrics_without_entities_or_words():
    found = metrics(TASK, *outputs([[0, 0]], [[0, 0]]), NAMES)
    assert found["accuracy"] == 1 and found["entity-f1"] == found["macro-f1"] == 0
    assert metrics(TASK, *outputs([[]], [[]]), NAMES) == {"accuracy": 0, "macro-f1": 0, "entity-f1": 0, "loss": 0}


def entities(row: list[int]) -> set[tuple[str, int, int]]:
    """(type, first, last) of every entity, read by the rule: it begins at a B- or where the type changes."""
    found, start = set(), 0
    kinds = [NAMES[tag][2:] for tag in row]
    for i, kind in enumerate(kinds):
        if i == 0 or kind != kinds[i - 1] or NAMES[row[i]][0] == "B":
            start = i
        last = i + 1 == len(row) or kinds[i + 1] != kind or NAMES[row[i + 1]][0] == "B"
        if kind and last:
            found.add((kind, start, i))
    return found


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=8), min_size=1, max_size=6))
def test_entity_scores_agree_with_sets_of_entities(rows):
    truth, predicted = ([[pair[side] for pair in row] for row in rows] for side in (0, 1))
    found = metrics(TASK, *outputs(predicted, truth), NAMES)
    true, said = ({(i, *e) for i, row in enumerate(side) for e in entities(row)} for side in (truth, predicted))

    def f1(true: set, said: set) -> float:
        return 2 * len(true & said) / (len(true) + len(said)) if true or said else 0.0

    kinds = {entity[1] for entity in true | said}
    scores = [f1({e for e in true if e[1] == kind}, {e for e in said if e[1] == kind}) for kind in kinds]
    assert found["entity-f1"] == pytest.approx(f1(true, said))
    assert found["macro-f1"] == pytest.approx(sum(scores) / len(scores) if scores else 0)


def test_metrics_loss_is_the_training_loss():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 5, (4, 6, 9)).astype(np.float32)
    labels = np.where(rng.random((4, 6)) < 0.5, -100, rng.integers(0, 9, (4, 6)))
    loss = mean_loss(TASK, SimpleNamespace(logits=torch.from_numpy(logits)), {"labels": torch.from_numpy(labels)}).item()
    assert metrics(TASK, list(logits), labels.tolist(), NAMES)["loss"] == pytest.approx(loss, rel=1e-5)


# models


def adapted(path: Path, **options: str) -> AdaptedModel:
    return AdaptedModel(Backbone(str(path), TASK, ("O", "B-X", "I-X"), pad_token_id=0, **options))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_head_of_every_architecture(tiny_models, name):
    """One linear layer; no pooler, so the identity setting changes nothing. A logit per token and label."""
    model = adapted(tiny_models[name], pooling="identity")
    top = "score" if name in ("llama", "qwen") else "classifier"
    assert model.backbone.head_modules == (top,) and model.backbone.identity_pooler == ""
    assert [(p.name, p.shape) for p in model.spec.head] == [(f"{top}.weight", (3, 16)), (f"{top}.bias", (3,))]
    assert len(model.spec.modules) and model.spec.blocks == 3
    batch = random_batch()
    with torch.no_grad():
        assert model.outputs(batch).logits.shape == (*batch["input_ids"].shape, 3)


def test_predict_whatever_batch_and_order(tiny_bert, tokenizer):
    """Padding, neighbours and the order of the rows change nothing."""
    model = adapted(tiny_bert)
    mask = RankMask.full([2] * len(model.spec.modules))
    model.load(random_arrays(model.spec, mask), mask, (2.0,) * len(model.spec.modules))
    rng = np.random.default_rng(0)
    words = "the a sky acme cherry is was blue green paris very".split()
    rows = [(rng.choice(words, n).tolist(), rng.integers(0, 3, n).tolist()) for n in rng.integers(1, 20, 40)]
    data = TASK.encode(tokenizer, sentences(*rows), 32)
    expected = Learner(model, TASK, tokenizer).evaluate(data)
    assert 0 < expected["accuracy"] < 1
    order = rng.permutation(40)
    shuffled = Encoded([data.ids[i] for i in order], [data.labels[i] for i in order])
    assert Learner(model, TASK, tokenizer).evaluate(shuffled) == pytest.approx(expected, rel=1e-5)
    counts = [sum(label != -100 for label in row) for row in data.labels]
    alone = [
        Learner(model, TASK, tokenizer).evaluate(Encoded([ids], [row])) for ids, row in zip(data.ids, data.labels, strict=True)
    ]
    for name in ("accuracy", "loss"):
        assert np.average([one[name] for one in alone], weights=counts) == pytest.approx(expected[name], rel=1e-5)


STOCK = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForTokenClassification
ids = torch.tensor(json.loads(sys.argv[1]))
for base, folder in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
    model = AutoModelForTokenClassification.from_pretrained(base, num_labels=3)
    model = PeftModel.from_pretrained(model, folder).eval()
    assert type(model).__name__ == "PeftModelForTokenClassification"
    with torch.no_grad():
        print("logits", json.dumps(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.tolist()))
assert not any(name.startswith("fedara") for name in sys.modules)
"""


def test_adapter_directories_have_the_same_logits_in_stock_peft(tiny_models, tmp_path):
    """Every architecture, with dead slots and dead modules."""
    batch, expected, paths = random_batch(), [], []
    for name, base in tiny_models.items():
        model = adapted(base, pooling="identity")
        spec = model.spec
        bits = np.random.default_rng(3).random(4 * len(spec.modules)) < 0.4
        bits[:8] = False
        mask, scales = RankMask((4,) * len(spec.modules), bits), (1.5,) * len(spec.modules)
        arrays = random_arrays(spec, mask)
        model.load(arrays, mask, scales)
        with torch.no_grad():
            expected.append(model.outputs(batch).logits.numpy())
        save_peft(tmp_path / name, model.backbone, Weights(arrays, mask, scales), TASK.peft_task_type)
        paths += [str(base), str(tmp_path / name)]
    command = [sys.executable, "-c", STOCK, json.dumps(batch["input_ids"].tolist()), *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line.removeprefix("logits ")) for line in done.stdout.splitlines() if line.startswith("logits ")]
    for name, theirs, ours in zip(tiny_models, found, expected, strict=True):
        np.testing.assert_allclose(theirs, ours, atol=2e-6, err_msg=name)


# whole runs


PEOPLE, PLACES, VERBS = ["ada", "byron", "grace", "alan"], ["paris", "rome", "oslo"], ["left", "saw", "loves"]


def made_up(count: int) -> list[dict]:
    """'ada byron left rome', 'grace saw paris .', …: a person of one or two words, a verb, a place."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        person = rng.choice(PEOPLE, rng.integers(1, 3), replace=False).tolist()
        words = [*person, str(rng.choice(VERBS)), str(rng.choice(PLACES)), *["."] * int(rng.integers(0, 2))]
        ner = ["B-PER", *["I-PER"] * (len(person) - 1), "O", "B-LOC", *["O"] * (len(words) - len(person) - 2)]
        rows.append({"tokens": words, "ner": ner})
    return rows


@pytest.mark.parametrize("method", ["fedara", "fedlora"])
def test_a_federated_run(tiny_bert, tmp_path, method):
    flat = config(
        tiny_bert,
        method=method,
        num_server_rounds=2,
        fedara__warmup_rounds=0,
        fedara__final_rounds=0,
        train__steps=12,
        train__batch_size=8,
        data__task="token-classification",
        data__path=str(write(tmp_path / "d.jsonl", made_up(240))),
        data__text_column="tokens",
        data__label_column="ner",
        data__test=0.2,
        data__validation=0.2,
        data__client_validation=0.2,
        run__dir=str(tmp_path / "runs"),
    )
    directory = engine.run(flat, CLIENTS)
    (start,), rounds, (end,) = (directory.records(kind) for kind in ("start", "round", "end"))
    assert [line["good"] for line in rounds] == [3, 3]
    losses = [line["loss"] for line in (start, *rounds)]
    assert losses[2] < losses[1] < losses[0]
    assert rounds[-1]["accuracy"] > start["accuracy"]
    clients = directory.records("client")
    assert len(clients) == 6
    for name in ("accuracy", "macro-f1", "entity-f1"):
        assert all(0 <= line[name] <= 1 for line in (start, *rounds))
        assert all(0 <= line[f"eval-{name}"] <= 1 for line in clients)
        assert 0 <= end[f"test-{name}"] <= 1
    adapter = json.loads((directory.path / "adapter" / "adapter_config.json").read_text())
    assert adapter["task_type"] == "TOKEN_CLS" and adapter["modules_to_save"] == ["classifier"]
