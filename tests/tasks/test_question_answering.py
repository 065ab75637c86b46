"""Question answering: reading answers, windows with stride, loss and best spans by hand, whole runs, stock PEFT."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CONFIGS, MINILM, TASKS, mean_loss
from data_helper import federation, load, load_own, shares, write
from export_helper import stock_run
from runs_helper import WALL_CLOCK, config, start
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer, SentencePieceBPETokenizer, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    ByT5Tokenizer,
    DebertaV2Tokenizer,
    DistilBertTokenizer,
    ElectraConfig,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    RobertaTokenizer,
    T5Config,
)

from fedara_flwr import engine
from fedara_flwr.adapters.backbone import Backbone, load_tokenizer
from fedara_flwr.cli.exporting import export
from fedara_flwr.config import DataSettings
from fedara_flwr.data import sources
from fedara_flwr.data.examples import Examples
from fedara_flwr.data.skipped import LeftOut
from fedara_flwr.keys import ConfigError
from fedara_flwr.report.loading import base_arguments
from fedara_flwr.runs.directory import RunDirectory
from fedara_flwr.runs.keeper import open_run
from fedara_flwr.tasks import Encoded, open_task, read_settings
from fedara_flwr.tasks.base import UNLABELLED
from fedara_flwr.tasks.question_answering import QuestionAnswering, best_span

TASK = TASKS["question-answering"]
PAD = SimpleNamespace(pad_token_id=0, sep_token_id=None, model_input_names=["input_ids"])
ADA = "Ada wrote it in 1843."
NUMBERS = "One two three four five Six seven eight"  # eight tokens
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Ada",
            "paragraphs": [
                {
                    "context": ADA,
                    "qas": [
                        {
                            "id": "1",
                            "question": "Who?",
                            "is_impossible": False,
                            "answers": [{"text": "Ada", "answer_start": 0}],
                        },
                        {
                            "id": "2",
                            "question": "Where?",
                            "is_impossible": True,
                            "answers": [],
                            "plausible_answers": [{"text": "1843", "answer_start": 16}],
                        },
                        # answers of an impossible question are none
                        {"id": "3", "question": "Why?", "is_impossible": True, "answers": [{"text": "it", "answer_start": 10}]},
                    ],
                }
            ],
        },
        {
            "title": "Letters",
            "paragraphs": [
                {
                    "context": "b c",
                    "qas": [
                        {
                            "id": "4",
                            "question": "Which?",
                            "answers": [{"text": "b", "answer_start": 0}, {"text": "c", "answer_start": 2}],
                        }
                    ],
                },
                {"context": "nobody asked", "qas": []},
            ],
        },
    ],
}


pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MINILM)


def answering(path: Path, **options: object) -> DataSettings:
    return DataSettings(task="question-answering", path=str(path), **options)


def problem(call) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def targets_of(path: Path, answers: object, context: str = ADA) -> tuple[list, str]:
    """The targets of a row with these answers ([] where it is left out) behind a plain one, and what was skipped."""
    plain, other = ({"question": "q", "context": text, "answers": each} for text, each in ((ADA, None), (context, answers)))
    # apart: a column has one type
    for number, row in enumerate((plain, other)):
        write(path / f"{number}.jsonl", [row])
    own = load_own(answering(path / "1.jsonl"), ())
    return list(own.train.targets or ()), str(own.skipped)


def examples(*rows: tuple) -> Examples:
    """(question, context, (answer, begin), …) of each."""
    targets = tuple([list(answer) for answer in answers] for _, _, *answers in rows)
    return Examples(tuple(row[0] for row in rows), pairs=tuple(row[1] for row in rows), targets=targets)


def task_with(options: str) -> QuestionAnswering:
    return open_task(DataSettings(task="question-answering", options=options))


def answer_of(data: Encoded, row: int) -> str | None:
    """The text that a window's label stands for; '' for no answer, None where nothing is learnt."""
    windows, read = data.more
    first, last = data.labels[row][:2]
    if first == UNLABELLED:
        assert last == UNLABELLED
        return None
    if not first:
        assert not last
        return ""
    offsets = windows[row].offsets
    return read.pairs[windows[row].example][offsets[first, 0] : offsets[last, 1]]


# -- reading rows ------------------------------------------------------------
@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ({"text": ["Ada"], "answer_start": [0]}, [["Ada", 0]]),
        ({"text": ["1843.", "1843"], "answer_start": [16, 16]}, [["1843.", 16], ["1843", 16]]),
        ([{"text": "Ada", "answer_start": 0}, {"text": "it", "answer_start": 10}], [["Ada", 0], ["it", 10]]),
        ({"text": "it", "answer_start": 10}, [["it", 10]]),
        ({"text": ["it"]}, [["it", 10]]),
        ({"text": ["it"], "answer_start": [None]}, [["it", 10]]),
        ({"text": ["it"], "answer_start": []}, [["it", 10]]),
        (["it", "1843"], [["it", 10], ["1843", 16]]),
        ("it", [["it", 10]]),
        # i is in "in", too: the first one counts where the data does not say
        ("i", [["i", 10]]),
        ({"text": ["i"], "answer_start": [13]}, [["i", 13]]),
        (ADA, [[ADA, 0]]),
        ({"text": ["Ada", " "], "answer_start": [0, 0]}, [["Ada", 0]]),
        ({"text": [], "answer_start": []}, []),
        ({"text": None, "answer_start": None}, []),
        ([], []),
        ([None, ""], []),
        ({"text": [None], "answer_start": [None]}, []),
        ({"text": [None], "answer_start": [4]}, []),
        ({"text": [None, "it"], "answer_start": [None, 10]}, [["it", 10]]),
        ([{"text": None, "answer_start": 4}, {"text": "it", "answer_start": 10}], [["it", 10]]),
        (1843, [["1843", 16]]),
        (1843.0, [["1843", 16]]),
        ([1843], [["1843", 16]]),
        ("", []),
        (" ", []),
        (None, []),
    ],
)
def test_answers_in_many_forms(tmp_path, answers, found):
    assert targets_of(tmp_path, answers) == ([found], "")


ASTRAY, UNEQUAL, NO_TEXT = (
    f"1 of 1 rows skipped: 1 with {reason}"
    for reason in (
        "an answer that is not where it should be",
        "answers of which not each has a place",
        "answers that are no text",
    )
)


@pytest.mark.parametrize(
    ("answers", "line"),
    [
        ({"text": ["Eve"], "answer_start": [0]}, ASTRAY),
        ({"text": ["Ada"], "answer_start": [1]}, ASTRAY),
        ({"text": ["Ada"], "answer_start": [999]}, ASTRAY),
        ({"text": ["1843."], "answer_start": [-5]}, ASTRAY),
        ({"text": ["ada"], "answer_start": [0]}, ASTRAY),
        (["Ada", "Eve"], ASTRAY),
        ("Eve", ASTRAY),
        ({"span": [0, 3]}, NO_TEXT),
        ([{"answer": "Ada"}], NO_TEXT),
        ({"text": ["Ada"], "answer_start": [0, 1]}, UNEQUAL),
        ({"text": ["Ada", "it"], "answer_start": [0]}, UNEQUAL),
        ({"text": None, "answer_start": [0]}, UNEQUAL),
        (5, ASTRAY),
        (True, NO_TEXT),
        ({"text": [True], "answer_start": [0]}, NO_TEXT),
        ({"text": [["Ada"]], "answer_start": [0]}, NO_TEXT),
    ],
)
def test_answers_that_cannot_be_meant_are_counted(tmp_path, answers, line):
    assert targets_of(tmp_path, answers) == ([], line)


HE = "The other is in the Netherlands; he is there, in 1912 and in 1."


@pytest.mark.parametrize(
    ("context", "answer", "begin"),
    [
        (HE, "he", HE.index("he is")),
        (HE, "in", HE.index("in the")),
        (HE, "1", HE.index("1.")),
        (HE, "ther", HE.index("ther")),
        ("l'été dété été", "été", 2),
        ("a-he, (he)", "he", 2),
    ],
)
def test_an_answer_without_a_place_is_no_part_of_a_word(context, answer, begin):
    """Unless it is nothing else: "he" would be learnt as the middle of "The"."""
    assert TASK.read({"text": "q", "context": context, "answers": answer}, None).target == [[answer, begin]]


def test_places_in_a_column_of_their_own(tmp_path):
    """A flat copy of SQuAD has the question under its name, and the answer under 'text'."""
    last = HE.rindex("in")
    rows = [(last, "in"), (str(last), "in"), (None, "he"), (-1, ""), (None, None), (last + 1, "in")]
    flat = [{"question": "Who?", "context": HE, "answer_start": begin, "text": answer} for begin, answer in rows]
    own = load_own(answering(write(tmp_path / "d.jsonl", flat), options="answers-column = 'text'"), ())
    assert own.train.texts == ("Who?",) * 5
    assert own.train.targets == ([["in", last]], [["in", last]], [["he", HE.index("he is")]], [], [])
    assert str(own.skipped) == "1 of 6 rows skipped: 1 with an answer that is not where it should be"
    lists = [{"question": "Who?", "context": HE, "answer_start": [last, 0], "answers": ["in", "The"]}]
    assert load_own(answering(write(tmp_path / "e.jsonl", lists)), ()).train.targets == ([["in", last], ["The", 0]],)
    own_places = [{"question": "Who?", "context": HE, "answer_start": 0, "answers": {"text": ["in"], "answer_start": [last]}}]
    assert load_own(answering(write(tmp_path / "f.jsonl", own_places)), ()).train.targets == ([["in", last]],)


@pytest.mark.parametrize(
    ("said", "answered"), [(True, 0), ("True", 0), (1, 0), ("1", 0), (False, 1), ("false", 1), (0, 1), (None, 1)]
)
def test_a_column_that_says_that_there_is_no_answer(tmp_path, said, answered):
    """SQuAD 2 has a plausible answer beside; it is not the one."""
    rows = [{"question": "Who?", "context": HE, "answers": "in", "is_impossible": said}]
    own = load_own(answering(write(tmp_path / "d.jsonl", rows)), ())
    assert [len(target) for target in own.train.targets] == [answered] and not str(own.skipped)


@pytest.mark.parametrize(
    ("options", "key"),
    [("answers-column = 'question'", "text-column"), ("answers-column = 'context'", "options context-column")],
)
def test_one_column_for_two_uses(tmp_path, options, key):
    path = write(tmp_path / "d.jsonl", [{"question": "Who?", "context": HE}])
    found = problem(lambda: load(answering(path, options=options), 0))
    assert found == f"data.options {options}: it is the {key} too, allowed is another column"


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["Ada"], "answer_start": ["zero"]},
        {"text": ["Ada"], "answer_start": "zero"},
        {"text": ["Ada"], "answer_start": [[0]]},
        {"text": ["Ada"], "answer_start": [math.inf]},
        {"text": ["Ada"], "answer_start": [16.7]},
        {"text": "Ada", "answer_start": 0.5},
    ],
)
def test_places_that_are_no_whole_number_are_counted(answers):
    """The row is left out; the run does not end with an error of Python's own."""
    with pytest.raises(LeftOut):
        TASK.read({"text": "q", "context": ADA, "answers": answers}, None)


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ({"text": ["Ada"], "answer_start": [0.0]}, ["Ada", 0]),
        ({"text": ["Ada"], "answer_start": ["0"]}, ["Ada", 0]),
        ({"text": ["it"], "answer_start": [math.nan]}, ["it", 10]),
        ({"text": "Ada", "answer_start": 0.0}, ["Ada", 0]),
        ({"text": [1843], "answer_start": [16]}, ["1843", 16]),
        ({"text": 1843, "answer_start": 16}, ["1843", 16]),
        ({"text": [1843.0], "answer_start": [16.0]}, ["1843", 16]),
    ],
)
def test_numbers_as_other_tools_write_them(answers, found):
    """pandas makes 0 a float where one is missing, JSON keeps an answer that is a number as one."""
    assert TASK.read({"text": "q", "context": ADA, "answers": answers}, None).target == [found]


def test_unicode_is_counted_in_characters(tmp_path):
    context = "🎉 Zoë e\u0301t\u00e9"
    assert targets_of(tmp_path, {"text": ["Zoë"], "answer_start": [2]}, context) == ([[["Zoë", 2]]], "")
    assert targets_of(tmp_path, {"text": ["été"], "answer_start": [6]}, context)[1] == ASTRAY  # another é


def test_an_answer_ends_with_the_marks_on_its_last_letter(tmp_path):
    """Where they are characters of their own they belong to it, whether the data has them or not."""
    context = "Cafe\u0301 x, cafe"
    for answer in ("Cafe", "Cafe\u0301"):
        assert targets_of(tmp_path, {"text": [answer], "answer_start": [0]}, context) == ([[["Cafe\u0301", 0]]], "")
    assert targets_of(tmp_path, "cafe", context) == ([[["cafe", 9]]], "")


def test_a_text_that_is_missing_is_no_none(tmp_path):
    """The context has the word None; the question has no answer of that annotator."""
    context = "None of them did."
    assert targets_of(tmp_path, {"text": [None], "answer_start": [None]}, context) == ([[]], "")
    assert targets_of(tmp_path, {"text": ["None"], "answer_start": [None]}, context) == ([[["None", 0]]], "")


def test_a_csv_of_answers_that_are_numbers(tmp_path):
    """Whole ones stay whole, beside a missing one, too."""
    path = tmp_path / "d.csv"
    for last, target in (("12", [["12", 7]]), ("", [])):
        path.write_text(f"question,context,answers\nq,It was 7 then,7\np,It was 12 then,{last}\n")
        own = load_own(answering(path), ())
        assert own.train.targets == ([["7", 7]], target) and str(own.skipped) == ""


def test_rows_without_question_or_context(tmp_path):
    rows = [
        {"question": question, "context": context, "answers": []}
        for question, context in ((None, ADA), (" ", ADA), ("q", None), ("q", " \n\t"), ("q", ADA))
    ]
    own = load_own(answering(write(tmp_path / "d.jsonl", rows)), ())
    assert own.train.texts == ("q",) and own.train.targets == ([],)
    assert str(own.skipped) == "4 of 5 rows skipped: 2 without context, 2 without question"


def test_a_csv_and_columns_by_other_names(tmp_path):
    (tmp_path / "d.csv").write_text("frage,text,antwort\nwho?,Ada wrote it,Ada\nwhere?,Ada wrote it,\nNone?,None here,None\n")
    options = 'context-column = "text"\nanswers-column = "antwort"'
    own = load_own(answering(tmp_path / "d.csv", text_column="frage", options=options), ())
    assert own.train.texts == ("who?", "where?", "None?")
    assert own.train.targets == ([["Ada", 0]], [], [["None", 0]])


def test_squad_as_the_hub_has_it(tmp_path):
    rows = {"question": ["a", "b"], "context": [ADA, ADA], "answers": [{"text": ["it"], "answer_start": [10]}, None]}
    pd.DataFrame(rows).to_parquet(tmp_path / "d.parquet", index=False)
    assert load_own(answering(tmp_path / "d.parquet"), ()).train.targets == ([["it", 10]], [])


def test_columns_that_are_not_there(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"question": "q", "context": ADA, "answers": []}])
    allowed = "no such column, allowed are ['question', 'context', 'answers']"
    assert problem(lambda: load(answering(path, text_column="frage"), 0)) == f"data.text-column = 'frage': {allowed}"
    assert problem(lambda: load(answering(path, options='context-column = "passage"'), 0)) == (
        f"data.options context-column = 'passage': {allowed}"
    )
    assert problem(lambda: load(answering(path, options='answers-column = "answer"'), 0)).endswith("did you mean 'answers'?")
    assert problem(lambda: load(answering(path, pair_column="context"), 0)) == (
        "data.pair-column = 'context': allowed is '' with data.task = 'question-answering'"
    )


@pytest.mark.parametrize("options", ["stride = -1", "longest = 0", 'context-column = ""', "strides = 3", 'stride = "x"'])
def test_options_that_are_not_allowed(options):
    assert problem(lambda: task_with(options)).startswith(f"data.options.{options.partition(' ')[0]} = ")


def test_docstrings_have_no_questions():
    settings = read_settings({"data.task": "question-answering"}).data
    assert (settings.partition, settings.max_length, settings.validation_rows) == ("iid", 256, 500)
    assert problem(lambda: load(settings, 0)).startswith("data.name = 'docstrings': its rows have no questions, allowed with")


# -- SQuAD's own file ------------------------------------------------------------
def squad(path: Path, content: object = SQUAD) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_squads_nested_file(tmp_path):
    """One row a question, by the run's own loader; what is impossible has no answer, whatever stands beside it."""
    settings = answering(squad(tmp_path / "train-v2.0.json"), id_column="title")
    data = sources.load(settings, 0, open_task(settings))
    found = {}
    for part in (data.train, data.test):
        for question, *rest in zip(part.texts, part.pairs, part.targets, part.owners, strict=True):
            found[question] = tuple(rest)
    assert found == {
        "Who?": (ADA, [["Ada", 0]], "Ada"),
        "Where?": (ADA, [], "Ada"),
        "Why?": (ADA, [], "Ada"),
        "Which?": ("b c", [["b", 0], ["c", 2]], "Letters"),
    }
    assert len(data.test) == 1 and data.labels == () and data.skipped == () and data.train.groups is None


def test_lists_of_articles(tmp_path):
    questions = ("Who?", "Where?", "Why?", "Which?")
    assert load_own(answering(squad(tmp_path / "list.json", SQUAD["data"])), ()).train.texts == questions
    assert load_own(answering(write(tmp_path / "lines.jsonl", SQUAD["data"])), ()).train.texts == questions


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ([{"text": "it"}], [["it", 10]]),
        ([{"text": "it", "answer_start": None}], [["it", 10]]),
        ([{"text": "i"}, {"text": "1843"}], [["i", 10], ["1843", 16]]),
        (["it", "1843"], [["it", 10], ["1843", 16]]),
        ({"text": ["it", "Ada"], "answer_start": [10, 0]}, [["it", 10], ["Ada", 0]]),
        ({"text": "it"}, [["it", 10]]),
        ([{"text": 1843}], [["1843", 16]]),
        ([{"text": None, "answer_start": None}], []),
        ([{"text": None, "answer_start": 4}, {"text": "it", "answer_start": 10}], [["it", 10]]),
        (None, []),
    ],
)
def test_nested_answers_in_many_forms(tmp_path, answers, found):
    """As flat rows may have them; None is no word."""
    context, qas = f"{ADA} None did.", [{"question": "Who?", "answers": answers}]
    own = load_own(answering(squad(tmp_path / "d.json", {"data": [{"paragraphs": [{"context": context, "qas": qas}]}]})), ())
    assert (own.train.targets, str(own.skipped)) == ((found,), "")


def test_a_nested_answer_astray_is_counted(tmp_path):
    qas = [{"question": "Who?", "answers": [{"text": "Eve", "answer_start": 0}]}, {"question": "What?", "answers": []}]
    path = squad(tmp_path / "d.json", {"data": [{"paragraphs": [{"context": ADA, "qas": qas}]}]})
    own = load_own(answering(path), ())
    assert own.train.texts == ("What?",)
    assert str(own.skipped) == "1 of 2 rows skipped: 1 with an answer that is not where it should be"


@pytest.mark.parametrize(
    "content",
    [
        {"data": "hello"},
        {"data": [1, 2]},
        {"data": [{"title": "x", "paragraphs": [{"qas": [{"question": "x"}]}]}]},
        {"data": [{"title": "x", "paragraphs": [{"context": "x", "qas": [{"id": "1"}]}]}]},
        {"data": [{"paragraphs": [{"context": "a", "qas": [{"question": "q", "answers": [{"answer_start": 0}]}]}]}]},
        {"data": [{"title": "x", "paragraphs": "none"}]},
        {"data": []},
        {"data": [{"title": "x", "paragraphs": []}]},
    ],
)
def test_nested_files_that_are_none_end_in_one_line(tmp_path, content):
    assert problem(lambda: load(answering(squad(tmp_path / "d.json", content)), 0)).startswith("data.")


def test_a_device_sees_what_its_nested_file_holds(tmp_path):
    """`fedara check` looks at a device's file before there is a run; a run of it would read it."""
    path = str(squad(tmp_path / "train.json"))
    tasks = [open_task(DataSettings(path=path, task=name)) for name in ("classification", "question-answering")]
    assert sources.look(DataSettings(path=path), tasks).task == "question-answering"


# -- windows ------------------------------------------------------------
def test_three_windows_and_the_answer_in_the_last(tokenizer):
    """[CLS] who [SEP] and four of eight tokens [SEP]; two are shared: 0–3, 2–5, 4–7. Token 7 is the sixth of the third."""
    data = TASK.encode(tokenizer, examples(("who", NUMBERS, ("eight", 34))), 8)
    assert [tokenizer.convert_ids_to_tokens(row)[3:7] for row in data.ids] == [
        ["one", "two", "three", "four"],
        ["three", "four", "five", "six"],
        ["five", "six", "seven", "eight"],
    ]
    assert data.labels == [[0, 0, 3, 6, 0], [0, 0, 3, 6, 1], [6, 6, 3, 6, 2]]
    windows, _ = data.more
    assert [window.example for window in windows] == [0, 0, 0] and data.notes == ""
    assert windows[2].offsets.tolist() == [[-1, -1]] * 3 + [[19, 23], [24, 27], [28, 33], [34, 39]] + [[-1, -1]]
    assert answer_of(data, 2) == "eight"


def test_an_answer_that_windows_share_or_none_holds(tokenizer):
    """three four: tokens 2–3, in windows 0 and 1. two … five: tokens 1–4, cut by each: nothing is learnt of that question.
    Numbers of windows go on.
    """
    rows = (("who", NUMBERS, ("three four", 8)), ("who", NUMBERS, ("two three four five", 4)), ("who", NUMBERS))
    data = TASK.encode(tokenizer, examples(*rows), 8)
    spans = [label[:2] for label in data.labels]
    assert spans == [[5, 6], [3, 4], [0, 0]] + [[UNLABELLED] * 2] * 3 + [[0, 0]] * 3
    assert data.notes == "of 3 questions 1 whose answer is in no window whole (data.options stride)"
    assert [label[4] for label in data.labels] == list(range(9))
    assert [window.example for window in data.more[0]] == [0] * 3 + [1] * 3 + [2] * 3


def test_a_part_of_an_answer_is_not_learnt_as_none(tokenizer):
    """Windows 0–3, 2–5, 4–7. four five: tokens 3–4, whole in window 1, cut by the others. two: windows 1 and 2 lack it."""
    for answer, begin, texts in (("four five", 14, [None, "four five", None]), ("two", 4, ["two", "", ""])):
        data = TASK.encode(tokenizer, examples(("who", NUMBERS, (answer, begin))), 8)
        assert [answer_of(data, row) for row in range(3)] == texts and data.notes == ""


def test_an_answer_longer_than_the_stride(backbones):
    """12 bytes are 12 tokens, windows share 8: where an edge cuts it twice, no window teaches that there is none."""
    tokenizer = load_tokenizer(str(backbones("qwen")), TASK)
    context, whole, cut = "0123456789#-" * 6, 0, 0
    for begin in range(len(context) - 11):
        data = TASK.encode(tokenizer, examples(("who", context, (context[begin : begin + 12], begin))), 32)
        texts = [answer_of(data, row) for row in range(len(data))]
        if "whose answer is in no window whole" in data.notes:
            cut += 1
            assert set(texts) == {None}
        else:
            whole += 1
            assert set(texts) <= {context[begin : begin + 12], "", None} and any(texts)
    assert cut and whole


def test_a_question_of_which_nothing_is_learnt_is_evaluated(tokenizer):
    """It counts no prediction, has no loss and no gradient, and its answer is as good as another."""
    rows = (("who", NUMBERS, ("two three four five", 4)), ("who", "One two", ("two", 4)))
    data = TASK.encode(tokenizer, examples(*rows), 8)
    batch = TASK.collate(PAD, data.ids, data.labels)
    assert TASK.counts(batch).tolist() == [0, 0, 0, 1]
    begins, ends = (torch.zeros(batch["input_ids"].shape, requires_grad=True) for _ in range(2))
    losses = TASK.losses(SimpleNamespace(start_logits=begins, end_logits=ends), batch)
    assert losses.tolist() == pytest.approx([0, 0, 0, math.log(3)])
    losses.sum().backward()
    assert (begins.grad != 0).any(1).tolist() == [False, False, False, True]
    evaluation = evaluated(data, [(4, 6, 2.0, 9.0), (3, 3, 1.0, 9.0), (3, 3, 1.0, 9.0), (4, 4, 2.0, 9.0)])
    assert evaluation.answers() == ["two three four", "two"] and evaluation.rows == 1
    found = evaluation.result()
    assert found["f1"] == pytest.approx((2 * 3 / 7 + 1) / 2) and found["exact-match"] == 0.5 and found["answerability"] == 1
    alone = TASK.encode(tokenizer, examples(rows[0]), 8)
    assert evaluated(alone, [(4, 6, 2.0, 9.0)] * 3).result()["loss"] == 0


def test_stride_of_ones_own(tokenizer):
    """One shared token: 0–3, 3–6, 6–7."""
    data = task_with("stride = 1").encode(tokenizer, examples(("who", NUMBERS, ("eight", 34))), 8)
    assert [len(row) for row in data.ids] == [8, 8, 6]
    assert data.labels == [[0, 0, 3, 6, 0], [0, 0, 3, 6, 1], [4, 4, 3, 4, 2]]


@pytest.mark.parametrize(("stride", "length"), [(8, 16), (9, 16), (200, 16), (4, 8)])
def test_a_stride_that_is_too_large(tokenizer, stride, length):
    assert problem(lambda: task_with(f"stride = {stride}").encode(tokenizer, examples(("who", ADA)), length)) == (
        f"data.options stride = {stride}: allowed is less than half of data.max-length = {length}"
    )


def test_a_long_question_is_cut_and_counted(tokenizer):
    """40 tokens, and more than max-length, become half of it; the context still has its windows."""
    rows = (("what " * 40, NUMBERS * 3, ("One", 0)), ("who", ADA, ("Ada", 0)))
    data = TASK.encode(tokenizer, examples(*rows), 32)
    assert data.notes == "of 2 questions 1 cut at 16 tokens"
    assert tokenizer.convert_ids_to_tokens(data.ids[0])[:19] == ["[CLS]", *["what"] * 16, "[SEP]", "one"]
    assert all(len(row) <= 32 for row in data.ids) and answer_of(data, 0) == "One" and answer_of(data, len(data) - 1) == "Ada"


@pytest.mark.parametrize(("stride", "length"), [(0, 8), (0, 12), (7, 16), (15, 32), (127, 256)])
@pytest.mark.parametrize("context", ["word", "word " * 300])
def test_every_stride_that_is_allowed_works_with_every_question(tokenizer, stride, length, context):
    """A question of a node's data must not end the process: tokenizers panics where a window is no longer than the stride."""
    task = task_with(f"stride = {stride}") if stride else TASK
    try:
        data = task.encode(tokenizer, examples(("what " * 300, context, ("word", 0))), length)
    except ConfigError:
        return
    except BaseException as error:  # Rust's panic is no Exception
        pytest.fail(f"{type(error).__name__}: {error}")
    assert answer_of(data, 0) == "word" and max(map(len, data.ids)) <= length


def test_a_question_of_special_tokens_is_text(tokenizer):
    """Each of the 12 "[SEP]" is three tokens, and no separator."""
    data = TASK.encode(tokenizer, examples(("[SEP]" * 12, NUMBERS, ("One", 0))), 32)
    assert data.ids[0].count(tokenizer.sep_token_id) == 2 and answer_of(data, 0) == "One"
    assert data.notes == "of 1 questions 1 cut at 16 tokens"


def test_a_context_that_spells_special_tokens(tokenizer):
    data = TASK.encode(tokenizer, examples(("who", "[CLS] [SEP] Ada [PAD]", ("Ada", 12))), 32)
    assert data.ids[0].count(tokenizer.sep_token_id) == 2 and answer_of(data, 0) == "Ada"


def words_tokenizer(words: list[str], side: str) -> PreTrainedTokenizerFast:
    """One token a word, without special tokens."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["[UNK]", "[PAD]", *words])}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", truncation_side=side)


def test_a_tokenizer_that_cuts_at_the_beginning():
    """Windows, labels and answers are those of one that cuts at the end; it cuts as before afterwards."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(30)]
    left, right = (words_tokenizer(sorted(set(words)), side) for side in ("left", "right"))
    for length in (8, 16, 32):
        first = int(rng.integers(0, 26))
        context = " ".join(words)
        begin = len(" ".join(words[:first])) + (first > 0)
        rows = examples(("who", context, (words[first], begin)), ("who", context))
        found, expected = (TASK.encode(tokenizer, rows, length) for tokenizer in (left, right))
        assert (found.ids, found.labels) == (expected.ids, expected.labels)
        texts = [answer_of(found, row) for row in range(len(found))]
        assert set(texts) <= {words[first], ""} and words[first] in texts
        for window, other in zip(found.more[0], expected.more[0], strict=True):
            np.testing.assert_array_equal(window.offsets, other.offsets)
    assert (left.truncation_side, right.truncation_side) == ("left", "right")
    cut = left(" ".join(words), truncation=True, max_length=2)["input_ids"]
    assert left.convert_ids_to_tokens(cut) == words[-2:]
    with pytest.raises(TypeError):
        TASK.encode(left, examples(("who", None)), 16)
    assert left.truncation_side == "left", "after an error, too"


def test_a_context_of_which_the_tokenizer_leaves_nothing(tokenizer):
    """No window; its question counts in an evaluation, as answered by nothing."""
    data = TASK.encode(tokenizer, examples(("who", "\x07\x08\u200b", ("\x07", 0)), ("who", ADA, ("Ada", 0))), 16)
    assert len(data) == 1 and data.more[0][0].example == 1
    found = evaluated(data, [(3, 3, 1.0, 0.0)]).result()
    assert found["exact-match"] == found["answerability"] == 0.5


def test_no_rows(tokenizer):
    data = TASK.encode(tokenizer, Examples(()), 64)
    assert len(data) == 0
    assert TASK.evaluation(data, ()).result() == {**dict.fromkeys(TASK.metrics, 1.0), "loss": 0.0}


@pytest.mark.parametrize(
    ("context", "answer", "cut"),
    [
        (ADA, "Ada", "Ada"),
        (ADA, "1843.", "1843."),
        (ADA, "1843", "1843"),
        (ADA, ADA, ADA),
        ("it was unaffable here", "aff", "unaffa"),  # una ##ffa ##ble: it begins inside of a token
        ("it was unaffable here", "una", "una"),
        ("x" * 150 + " Ada", "Ada", "Ada"),
        ("x" * 150 + " Ada", "x", "x" * 150),  # a word of one unknown token
        ("a\x07\x00 \u200bAda\r\n\tb", "Ada", "Ada"),
        ("Ärger İstanbul Zoë", "İstanbul", "İstanbul"),
        ("e\u0301te\u0301 Zoë", "Zoë", "Zoë"),
        ("Cafe\u0301", "Cafe\u0301", "Cafe\u0301"),  # no token has the accent
        ("Cafe\u0301 noir", "Cafe\u0301", "Cafe\u0301"),
        ("un cafe\u0301\u0323 noir", "cafe\u0301\u0323 noir", "cafe\u0301\u0323 noir"),
        ("東京都", "京", "京"),
    ],
)
def test_the_answer_is_cut_out_of_the_original(tokenizer, context, answer, cut):
    data = TASK.encode(tokenizer, examples(("who", context, (answer, context.index(answer)))), 64)
    assert [answer_of(data, row) for row in range(len(data))] == [cut]


@pytest.mark.parametrize(
    ("context", "answer"),
    [("it was Ada ", "Ada "), (" Ada it was", " Ada"), ("it was\nAda\n\n", "\nAda\n"), ("Ada\x07", "Ada\x07")],
)
def test_what_no_token_has_at_an_answers_ends_does_not_matter(tokenizer, context, answer):
    """Spaces at the edge of the context are in no token: the answer is in the window all the same."""
    data = TASK.encode(tokenizer, examples(("who", context, (answer, context.index(answer)))), 64)
    assert answer_of(data, 0) == "Ada"


def test_a_perfect_model_of_accents_written_apart(tokenizer):
    """The accent is cut out of the context with its letter."""
    context = "Le Cafe\u0301 noir"
    read = TASK.read({"text": "where", "context": context, "answers": "Cafe\u0301"}, None)
    data = TASK.encode(tokenizer, Examples(("where",), pairs=(read.pair,), targets=(read.target,)), 16)
    evaluation = evaluated(data, [(*data.labels[0][:2], 1.0, 0.0)])
    assert evaluation.answers() == ["Cafe\u0301"]
    assert evaluation.result()["f1"] == evaluation.result()["exact-match"] == 1


def make_tokenizer(name: str, folder: Path) -> None:
    """A small tokenizer as this architecture has it; others get MiniLM's."""
    text = ["who left paris .", "ada byron lives in rome", "bob saw oslo", "eve and max"] * 20
    folder.mkdir(parents=True, exist_ok=True)
    if name in ("roberta", "qwen"):
        trained = ByteLevelBPETokenizer()
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        trained.train_from_iterator([" " + line for line in text], vocab_size=400, special_tokens=special)
        trained.save_model(str(folder))
        vocabulary = json.loads((folder / "vocab.json").read_text())
        merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
        made = {"roberta": RobertaTokenizer, "qwen": Qwen2Tokenizer}[name](vocab=vocabulary, merges=merges)
    elif name == "llama":
        trained = SentencePieceBPETokenizer()
        trained.train_from_iterator(text, vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"])
        model = json.loads(trained.to_str())["model"]
        made = LlamaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    elif name == "deberta-v3":
        special = [(token, 0.0) for token in ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")]
        words = [(f"▁{word}", -5.0) for word in sorted({word for line in text for word in line.split()})]
        letters = [(letter, -9.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
        made = DebertaV2Tokenizer(vocab=[*special, *words, *letters], unk_id=3)
    else:
        made = load_tokenizer(MINILM)
        if name == "distilbert":  # it has no segments
            made = DistilBertTokenizer(vocab=made.get_vocab())
    made.save_pretrained(folder)


ARCHITECTURES = {**CONFIGS, "electra": ElectraConfig(embedding_size=16, hidden_size=16, intermediate_size=24)}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """One folder per architecture, with a tokenizer of its own kind, made when it is first asked for."""
    root = tmp_path_factory.mktemp("answering")

    def made(name: str) -> Path:
        path = root / name
        if not path.exists():
            make_tokenizer(name, path)
            settings = ARCHITECTURES[name].to_dict() | {"max_position_embeddings": 128}
            settings |= {"num_hidden_layers": 3, "num_attention_heads": 2} if name == "electra" else {}
            settings = type(ARCHITECTURES[name]).from_dict(settings)
            settings.save_pretrained(path)  # a tokenizer is found by it
            settings.vocab_size = len(AutoTokenizer.from_pretrained(path))
            torch.manual_seed(0)
            AutoModel.from_config(settings).save_pretrained(path)
        return path

    return made


@pytest.mark.parametrize("name", ["roberta", "qwen", "llama", "deberta-v3", "distilbert"])
@pytest.mark.parametrize(
    ("context", "answer"),
    [
        ("ada lives in rome", "ada"),
        ("ada lives in rome", "lives"),
        ("ada lives in rome", "rome"),
        ("ada lives in rome", "ada lives in rome"),
        ("  ada   lives", "lives"),
    ],
)
def test_other_tokenizers_give_the_answer_back(backbones, name, context, answer):
    """But for the space before it, which byte-level BPE and SentencePiece have in the token."""
    tokenizer = load_tokenizer(str(backbones(name)), TASK)
    data = TASK.encode(tokenizer, examples(("who left", context, (answer, context.index(answer)))), 64)
    assert len(data) == 1 and answer_of(data, 0).strip() == answer


@pytest.mark.parametrize("name", ["roberta", "qwen"])
def test_bytes_of_a_character(backbones, name):
    """é is two tokens with one place, 🎉 four; the answer is all of them."""
    tokenizer = load_tokenizer(str(backbones(name)), TASK)
    rows = (("who", "🎉é", ("é", 1)), ("who", "🎉🎉", ("🎉", 1)), ("who", "saw 🎉é oslo", ("oslo", 7)))
    data = TASK.encode(tokenizer, examples(*rows), 64)
    assert [answer_of(data, row).strip() for row in range(3)] == ["é", "🎉", "oslo"]
    assert [last - first for first, last, *_ in data.labels] == [1, 3, 0]


@pytest.mark.parametrize("name", ["roberta", "qwen"])
def test_long_questions_of_many_bytes(backbones, name):
    """A cut inside of a character takes in the whole; RoBERTa has four special tokens."""
    tokenizer = load_tokenizer(str(backbones(name)), TASK)
    for length in (8, 16, 17, 32):
        try:
            data = TASK.encode(tokenizer, examples(("🎉" * 40, "ada lives in rome " * 9, ("ada", 0))), length)
        except ConfigError:
            continue
        except BaseException as error:  # Rust's panic is no Exception
            pytest.fail(f"{length}: {type(error).__name__}: {error}")
        assert max(map(len, data.ids)) <= length and "1 cut at" in data.notes


def test_a_tokenizer_without_places_is_refused(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    T5Config().save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"^model\.name = .*: its tokenizer does not tell which word a token is of"):
        load_tokenizer(str(tmp_path), TASK)


# -- loss ------------------------------------------------------------
def two_rows(dtype: torch.dtype = torch.float32) -> tuple:
    """Outputs and batch: five tokens and padding, context 2–4, answer 3–4; six tokens, context 2–5, no answer."""
    batch = TASK.collate(PAD, [[7] * 5, [7] * 6], [[3, 4, 2, 4, 0], [0, 0, 2, 5, 1]])
    begins = [[1 / 2, 1e9, 1 / 4, 1 / 8, 1 / 8, 1e9], [1, 1e9, 1, 1, 1, 1]]
    ends = [[1 / 4, 1e9, 1 / 4, 1 / 4, 1 / 4, 1e9], [1, 1e9, 1, 1, 1, 1]]
    begin, end = (torch.tensor(rows).log().to(dtype).requires_grad_() for rows in (begins, ends))
    return SimpleNamespace(start_logits=begin, end_logits=end), batch


def test_loss_by_hand():
    """Of the first p = 1/8 and 1/4: (ln 8 + ln 4) / 2. The second is uniform over four tokens and that of no answer: ln 5.

    The question's tokens and the padding, however likely, count nothing and get no gradient.
    """
    outputs, batch = two_rows()
    losses = TASK.losses(outputs, batch)
    assert losses.tolist() == pytest.approx([2.5 * math.log(2), math.log(5)])
    assert TASK.counts(batch).tolist() == [1, 1]
    assert mean_loss(TASK, outputs, batch).item() == pytest.approx((2.5 * math.log(2) + math.log(5)) / 2)
    losses.sum().backward()
    for gradient in (outputs.start_logits.grad, outputs.end_logits.grad):
        assert (gradient != 0).tolist() == [[True, False, True, True, True, False], [True, False, True, True, True, True]]


def test_loss_of_halves_is_in_floats():
    for dtype in (torch.bfloat16, torch.float16):
        begins, ends = (logits.detach() for logits in vars(two_rows()[0]).values())
        outputs = SimpleNamespace(start_logits=begins.clamp(max=9).to(dtype), end_logits=ends.clamp(max=9).to(dtype))
        losses = TASK.losses(outputs, two_rows()[1])
        assert losses.dtype == torch.float32
        assert losses.tolist() == pytest.approx([2.5 * math.log(2), math.log(5)], rel=1e-2)


def test_collate():
    batch = TASK.collate(PAD, [[1, 2, 3], [4]], [[1, 2, 1, 2, 0], TASK.made_up(1)])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]] and batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 1, 2, 0], [0, 0, 0, 0, 0]]


def test_segments_are_question_and_context(tokenizer):
    data = TASK.encode(tokenizer, examples(("who", "Ada [SEP] it")), 32)
    expected = tokenizer("who", "Ada [SEP] it", split_special_tokens=True)
    batch = TASK.collate(tokenizer, data.ids, data.labels)
    assert {name: values[0].tolist() for name, values in batch.items() if name != "labels"} == dict(expected)


# -- the best span ------------------------------------------------------------
def span(begins: list[float], ends: list[float], longest: int = 30) -> tuple[float, int, int]:
    """Over all tokens but the first, which is no context."""
    return best_span(np.float32(begins), np.float32(ends), 1, len(begins) - 1, longest)


def test_best_span_by_hand():
    """Starts 0 3 1 0 and ends 0 0 2 5: 2–4 has 3 + 5; of two tokens 3–4 has 1 + 5, 2–3 only 3 + 2; of one 4 has 0 + 5."""
    begins, ends = [9, 0, 3, 1, 0], [9, 0, 0, 2, 5]
    assert span(begins, ends) == span(begins, ends, 3) == (8, 2, 4)
    assert span(begins, ends, 2) == (6, 3, 4)
    assert span(begins, ends, 1) == (5, 4, 4)


def test_a_span_ends_after_it_begins():
    """The best start, 3, comes after the best end, 1: 1–1 and 3–3 have 5 each, the first counts."""
    assert span([0, 0, 0, 5], [0, 5, 0, 0]) == (5, 1, 1)
    assert span([0, 0, 0, 5], [0, 5, 0, 1]) == (6, 3, 3)


def test_of_equal_spans_the_first():
    assert span([0] * 5, [0] * 5) == (0, 1, 1)
    assert span([0, 1, 1, 0], [0, 0, 1, 1]) == (2, 1, 2)


def test_one_token_of_context():
    assert best_span(np.float32([5, 5, 1, 5]), np.float32([5, 5, 2, 5]), 2, 2, 30) == (3, 2, 2)


def test_no_span_of_the_best_starts_and_ends():
    """20 best ends are tokens 1–20, 20 best starts 21–40: the best start stands alone."""
    assert span([0] * 21 + [1] * 20, [0] + [1] * 20 + [0] * 20) == (1, 21, 21)
    assert span([0] * 31 + [2, 1], [0, 5] + [0] * 31, 1)[1:] in ((1, 1), (31, 31))


# -- metrics ------------------------------------------------------------
def evaluated(data: Encoded, said: list[tuple[int, int, float, float]], task: QuestionAnswering = TASK):
    """Windows, the last first, of which a model says (first token, last token, their score, that of no answer)."""
    evaluation = task.evaluation(data, ())
    for row in reversed(range(len(data))):
        first, last, score, none = said[row]
        begin, end = (torch.full((1, len(data.ids[row])), -9.0) for _ in range(2))
        begin[0, 0], end[0, 0] = none, 0.0
        begin[0, first], end[0, last] = score, 0.0
        batch = task.collate(PAD, [data.ids[row]], [data.labels[row]])
        evaluation.add(SimpleNamespace(start_logits=begin, end_logits=end), batch)
    return evaluation


def test_the_best_of_all_windows_cut_from_the_context(tokenizer):
    """The second window says Six, with 2; the others five and seven, with less. In the question's own letters."""
    data = TASK.encode(tokenizer, examples(("who", NUMBERS, ("Six", 24))), 8)
    said = [(3, 3, 1.0, 9.0), (6, 6, 2.0, 9.0), (5, 5, 1.5, 9.0)]
    evaluation = evaluated(data, said)
    assert evaluation.answers() == ["Six"]
    assert evaluation.result()["exact-match"] == evaluation.result()["answerability"] == 1
    # five Six, in the third window with 3: 2·1/(2 + 1)
    said[2] = (3, 4, 3.0, 0.0)
    evaluation = evaluated(data, said)
    assert evaluation.answers() == ["five Six"] and evaluation.result()["f1"] == pytest.approx(2 / 3)


def test_no_answer_is_said_by_the_window_that_likes_it_least(tokenizer):
    """Spans of 4 at most; no answer 5 and 1 and 5: 4 > 1. With 4.5, or as much as the span, it is none."""
    rows = (("who", NUMBERS, ("Six", 24)), ("who", ADA))
    data = TASK.encode(tokenizer, examples(*rows), 8)
    assert len(data) == 5  # Ada: six tokens, two windows
    for least, answer in ((1.0, "Six"), (4.5, ""), (4.0, "")):
        said = [(3, 3, 0.0, 5.0), (6, 6, 4.0, least), (3, 3, 0.0, 5.0), (3, 3, 0.0, 1.0), (3, 3, 0.0, 1.0)]
        assert evaluated(data, said).answers() == [answer, ""]


def test_metrics_by_hand(tokenizer):
    """three four: said four, 2·1/(1 + 2). seven or the six: said Six, which is the six without its article. Two without an
    answer: of one it is said, for the other One.
    """
    other = "one the Six seven"
    rows = (
        ("who", NUMBERS, ("three four", 8)),
        ("who", other, ("seven", 12), ("the Six", 4)),
        ("who", NUMBERS),
        ("who", NUMBERS),
    )
    data = TASK.encode(tokenizer, examples(*rows), 16)
    evaluation = evaluated(data, [(6, 6, 2.0, 1.0), (5, 5, 2.0, 1.0), (3, 3, 1.0, 2.0), (3, 3, 2.0, 1.0)])
    assert evaluation.answers() == ["four", "Six", "", "One"]
    found = evaluation.result()
    assert found.pop("loss") > 0
    assert found == {
        "f1": pytest.approx((2 / 3 + 1 + 1 + 0) / 4),
        "exact-match": 0.5,
        "has-answer-f1": pytest.approx(5 / 6),
        "answerability": 0.75,
    }


def test_where_every_question_has_an_answer_it_must_be_given(tokenizer):
    """Whatever speaks for none; and where none has one, has-answer-f1 is that of no question."""
    data = TASK.encode(tokenizer, examples(("who", ADA, ("Ada", 0))), 16)
    assert evaluated(data, [(3, 3, -5.0, 9.0)]).answers() == ["Ada"]
    found = evaluated(TASK.encode(tokenizer, examples(("who", ADA)), 16), [(3, 3, 0.0, 1.0)]).result()
    assert found["f1"] == found["has-answer-f1"] == found["answerability"] == 1


def test_a_question_without_answer_that_is_answered_wrongly(tokenizer):
    """An answer that should be none has f1 0, even "the", of which nothing is left."""
    data = TASK.encode(tokenizer, examples(("who", ADA), ("who", ADA, ("Ada", 0))), 16)
    found = evaluated(data, [(3, 3, 1.0, 0.0), (3, 3, 0.0, 1.0)]).result()
    assert found["f1"] == found["exact-match"] == found["answerability"] == found["has-answer-f1"] == 0


def test_evaluation_loss_is_the_mean_over_windows(tokenizer):
    """Logits that are all equal: ln 9 with eight tokens of context, ln 5 with four; a question may have several windows."""
    one, three = (TASK.encode(tokenizer, examples(("who", NUMBERS, ("One", 0))), length) for length in (16, 8))
    for data, expected in ((one, math.log(9)), (three, math.log(5))):
        evaluation = TASK.evaluation(data, ())
        batch = TASK.collate(PAD, data.ids, data.labels)
        zeros = torch.zeros(batch["input_ids"].shape)
        evaluation.add(SimpleNamespace(start_logits=zeros, end_logits=zeros), batch)
        assert evaluation.result()["loss"] == pytest.approx(expected)


def test_longest_answers(tokenizer):
    data = TASK.encode(tokenizer, examples(("who", NUMBERS, ("One", 0))), 16)
    assert evaluated(data, [(3, 6, 1.0, 0.0)], task_with("longest = 4")).answers() == ["One two three four"]
    # 3–6 is too long: 3 alone has 1 - 9, as 6 alone has 0 - 9 + …
    assert evaluated(data, [(3, 6, 1.0, 0.0)], task_with("longest = 3")).answers() == ["One"]


def test_logits_that_are_no_numbers(tokenizer):
    """A model that diverged gives no error; its answers are none."""
    data = TASK.encode(tokenizer, examples(("who", ADA, ("Ada", 0)), ("who", ADA)), 16)
    assert evaluated(data, [(3, 3, math.nan, math.nan)] * 2).answers()[1:] == [""]


# -- who has which rows ------------------------------------------------------------
def titled(path: Path) -> Path:
    rows = [
        {"title": "abc"[i % 3], "question": f"q{i}", "context": f"word {'x ' * 20 * i}", "answers": ["word"] if i % 2 else []}
        for i in range(36)
    ]
    return write(path, rows)


def test_partitions(tmp_path):
    settings = answering(titled(tmp_path / "d.jsonl"), id_column="title", partition="natural", labels_per_client=1)
    pool = federation(settings, 0).pool
    owners = [{pool.owners[i] for i in part} for part in shares(settings, 0, 3)]
    assert owners == [{"a"}, {"b"}, {"c"}]
    by_length = settings.model_copy(update={"partition": "length"})
    pool = federation(by_length, 0).pool
    lengths = sorted(([len(pool.pairs[i]) for i in part] for part in shares(by_length, 0, 3)), key=min)
    assert max(lengths[0]) < min(lengths[1]) and max(lengths[1]) < min(lengths[2])
    iid = settings.model_copy(update={"partition": "iid"})
    parts = shares(iid, 0, 4)
    assert (
        sorted(i for part in parts for i in part) == list(range(len(pool))) and max(map(len, parts)) - min(map(len, parts)) < 2
    )


@pytest.mark.parametrize("kind", ["dirichlet", "pathological"])
def test_partitions_by_label_are_refused(tiny_bert, tmp_path, kind):
    flat = config(
        tiny_bert, data__task="question-answering", data__path=str(titled(tmp_path / "d.jsonl")), data__partition=kind
    )
    assert problem(lambda: engine.run(flat, 2)) == (
        f"data.partition = {kind!r}: rows of data.task = 'question-answering' have no label to go by, allowed are 'iid', "
        "'length', and 'natural' with data.id-column"
    )


def test_keys_see_context_and_answers():
    """Rows that differ in one of them are other rows; equal ones are the same on every machine."""
    rows = [("q", ADA, "Ada"), ("q", ADA, "it"), ("q", ADA, None), ("q", ADA + " ", "Ada"), ("p", ADA, "Ada")]
    read = [TASK.read({"text": q, "context": c, "answers": a}, None) for q, c, a in (*rows, rows[0])]
    every = Examples(
        tuple(e.text for e in read),
        pairs=tuple(e.pair for e in read),
        targets=tuple(e.target for e in read),
        identities=tuple(e.identity for e in read),
    )
    keys = every.keys(0)
    assert keys[0] == keys[-1] and len(set(keys)) == 5


# -- whole runs ------------------------------------------------------------
NAMES, PLACES, VERBS = ("ada", "bob", "eve", "max"), ("paris", "rome", "oslo"), ("left", "saw", "lives in")


def made_up(path: Path, count: int = 160, unanswerable: bool = False) -> Path:
    """Who? — a name before or after other words; some contexts take two windows of 16 tokens."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        name, place, verb = (str(rng.choice(words)) for words in (NAMES, PLACES, VERBS))
        context = (f"{name} {verb} {place} .", f"{place} . {name} {verb} {place}", f"rome . oslo . {name} {verb} {place}")[
            i % 3
        ]
        context = f"{context} . rome . oslo . paris . rome" if i % 5 == 0 else context
        answers = {"text": [name], "answer_start": [context.index(name)]}
        if unanswerable and i % 4 == 0:
            context, answers = f"{place} . rome . oslo", {"text": [], "answer_start": []}
        rows.append({"question": "who left", "context": context, "answers": answers})
    return write(path, rows)


def flat_run(model: Path, folder: Path, **changes: object) -> dict:
    settings = {
        "num_server_rounds": 2,
        "train__steps": 15,
        "train__batch_size": 8,
        "data__max_length": 32,
        "data__task": "question-answering",
        "data__test": 0.15,
        "data__validation": 0.2,
        "data__client_validation": 0.2,
        "run__dir": str(folder / "runs"),
    }
    if changes.get("method", "fedara") == "fedara":
        settings |= {"fedara__warmup_rounds": 0, "fedara__final_rounds": 0}
    path = changes.pop("data__path", None) or str(made_up(folder / "d.jsonl"))
    return config(model, **settings | {"data__path": path} | changes)


@pytest.fixture(scope="module")
def finished(backbones, tmp_path_factory):
    """The directory of a run of an architecture with a method, done once."""
    kept: dict[tuple[str, str], RunDirectory] = {}

    def done(name: str, method: str) -> RunDirectory:
        if (name, method) not in kept:
            folder = tmp_path_factory.mktemp(f"{name}-{method}")
            kept[name, method] = engine.run(flat_run(backbones(name), folder, method=method), 4)
        return kept[name, method]

    return done


FAST = {("llama", "fedlora"), *((name, "fedara") for name in ARCHITECTURES)}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if (name, method) in FAST else pytest.mark.slow)
        for name in ARCHITECTURES
        for method in ("fedara", "fedlora")
    ],
)
def test_every_architecture_learns(finished, name, method):
    """Loss falls, F1 rises, the clients' own metrics travel, and the test data is measured once."""
    directory = finished(name, method)
    (begin,), rounds, (end,) = (directory.records(kind) for kind in ("start", "round", "end"))
    assert directory.facts["outcome"] == "completed" and directory.facts["metric"] == TASK.metric.facts()
    assert [line["good"] for line in rounds] == [2, 2]
    assert rounds[-1]["loss"] < 0.8 * begin["loss"] and rounds[-1]["f1"] > begin["f1"]
    assert rounds[-1]["answerability"] == 1, "every question has an answer, so one is given"
    for line in directory.records("client"):
        assert {f"eval-{metric}" for metric in TASK.metrics} <= set(line)
        assert all(0 <= line[f"eval-{metric}"] <= 1 for metric in TASK.metrics if metric != "loss")
    assert set(directory.facts["test"]) == set(TASK.metrics) and 0 <= end["test-f1"] <= 1
    assert directory.facts["labels"] == [] and directory.facts["groups"] == []
    assert "question-answering" in (directory.path / "report.html").read_text()


def test_a_run_with_questions_that_have_no_answer(tiny_bert, tmp_path):
    path = str(made_up(tmp_path / "some.jsonl", unanswerable=True))
    directory = engine.run(flat_run(tiny_bert, tmp_path, data__path=path, train__steps=30, data__max_length=16), 4)
    (begin,), rounds = (directory.records(kind) for kind in ("start", "round"))
    assert rounds[-1]["loss"] < begin["loss"] and rounds[-1]["f1"] > begin["f1"]
    assert rounds[-1]["answerability"] >= 0.75 and 0 <= rounds[-1]["has-answer-f1"] <= 1


def card_code(folder: Path, base: Path) -> str:
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: question-answering" in card and "## Labels" not in card
    code = card[card.index("```python\n") + 10 : card.rindex("```")].replace("path/to/this/folder", str(folder))
    return code.replace(f"'{base.name}'", repr(str(base)))


QUESTION, CONTEXT = "Who wrote it?", "The page was written by Ada Lovelace in 1843."


@pytest.mark.parametrize("kind", ["peft", "lora", "merged"])
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("bert", "fedara"),
        ("llama", "fedlora"),
        *(pytest.param(name, "fedara", marks=pytest.mark.slow) for name in ARCHITECTURES if name not in ("bert", "llama")),
    ],
)
def test_every_format_has_the_same_logits_in_stock_libraries(finished, backbones, tmp_path, name, method, kind):
    """Those of the server's model for the card's own question; what its code prints is cut out of the card's text."""
    directory = finished(name, method)
    saved = open_run(directory.path)
    model = saved.model
    model.load(saved.method.exported(saved.state))
    with torch.no_grad():
        outputs = model.adapted.outputs(dict(model.learner.tokenizer(QUESTION, CONTEXT, return_tensors="pt")))
    folder = export(directory.path, kind, tmp_path / kind, say=lambda line: None)
    code = card_code(folder, backbones(name))
    assert QUESTION in code and CONTEXT in code
    more = "\nimport torch\nlogits = torch.stack([outputs.start_logits[0], outputs.end_logits[0]])"
    printed, logits = stock_run(code + more)
    assert printed.strip() in CONTEXT
    np.testing.assert_allclose(logits, torch.stack([outputs.start_logits[0], outputs.end_logits[0]]).numpy(), atol=1e-5)
    if kind != "merged":
        adapter = json.loads((folder / "adapter_config.json").read_text())
        assert adapter["modules_to_save"] == ["qa_outputs"]


def test_the_cards_code_runs_as_it_stands(finished, backbones, tmp_path):
    """It learnt from questions that all have an answer: so it gives one."""
    for kind in ("peft", "merged"):
        folder = export(finished("bert", "fedara").path, kind, tmp_path / kind, say=lambda line: None)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(card_code(folder, backbones("bert")), {})
        assert printed.getvalue().strip() and printed.getvalue().strip() in CONTEXT, kind


def said_by_snippet(task: QuestionAnswering, begins: list[float], ends: list[float], change: str = "") -> str:
    """What the card's lines print of a model with these logits; of each word of their context one is a token."""
    tokenizer = words_tokenizer(sorted(set(re.findall(r"\w+|\W", f"{QUESTION} {CONTEXT}"))), "right")
    model = lambda **batch: SimpleNamespace(start_logits=torch.tensor([begins]), end_logits=torch.tensor([ends]))  # noqa: E731
    lines = [line.replace("may_be_none = False", change or "may_be_none = False") for line in task.snippet()]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec("\n".join(lines), {"tokenizer": tokenizer, "model": model})
    return printed.getvalue().strip()


def test_the_cards_code_is_of_this_run():
    """Four tokens of question, then ten of context: The 4, page 5, was 6, written 7, by 8, Ada 9, Lovelace 10, in 11, 1843 12.

    Best is Ada … 1843; of two tokens it is Lovelace in. It answers, as the evaluation does where every question has an answer.
    """
    begins, ends = [9.0] + [0.0] * 13, [9.0] + [0.0] * 13
    begins[9], ends[12], begins[10], ends[11] = 5.0, 5.0, 4.0, 4.0
    assert said_by_snippet(TASK, begins, ends) == "Ada Lovelace in 1843"
    assert said_by_snippet(task_with("longest = 4"), begins, ends) == "Ada Lovelace in 1843"
    assert said_by_snippet(task_with("longest = 2"), begins, ends) == "Lovelace in"
    assert said_by_snippet(TASK, begins, ends, "may_be_none = True") == "no answer"
    begins[0] = 0.0
    assert said_by_snippet(TASK, begins, ends, "may_be_none = True") == "Ada Lovelace in 1843"
    said = "\n".join(open_task(DataSettings(task="question-answering", max_length=128, options="stride = 20")).snippet())
    assert "# one window: a longer context needs windows, here of 128 tokens that share 20" in said
    assert "here of 256 tokens that share 64" in "\n".join(TASK.snippet())


def test_a_language_models_checkpoint_keeps_its_blocks(tmp_path):
    """transformers' class has them under another name, and would draw them; card and report say how to load them, too."""
    path = tmp_path / "llama"
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(path)
    found = Backbone(str(path), TASK, (), pad_token_id=0)
    assert found.key_mapping == {r"^model\.": "transformer."} and found.head_modules == ("qa_outputs",)
    own = found.model.get_parameter("transformer.layers.2.mlp.up_proj.weight")
    speaking = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(own, speaking.model.layers[2].mlp.up_proj.weight)
    facts = {"revision": None, "key-mapping": found.key_mapping}
    assert base_arguments("'x'", facts) == f"'x', key_mapping={found.key_mapping!r}"
    stock = AutoModelForQuestionAnswering.from_pretrained(path, key_mapping=found.key_mapping)
    assert torch.equal(stock.transformer.layers[2].mlp.up_proj.weight, own)


def kept_lines(loop) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in WALL_CLOCK} for line in loop.lines]


def test_the_same_twice_in_parts_and_together(tiny_bert, tmp_path):
    """One seed gives the same bits; fewer tokens at a time, and clients together, the same numbers to rounding."""
    flat = flat_run(tiny_bert, tmp_path, train__steps=3, strategy__fraction_train=1.0, data__max_length=16)
    once, again = start(flat, clients=3), start(flat, clients=3)
    assert kept_lines(once) == kept_lines(again)
    for part, vector in once.state.arrays.items():
        np.testing.assert_array_equal(vector, again.state.arrays[part])
    for change in ({"train.batch-tokens": 40}, {"run.together": 3}):
        other = start(flat | change, clients=3)
        for part, vector in once.state.arrays.items():
            # not the head's two biases, on which softmax does not depend: AdamW makes steps of their gradients' roundings
            weights = slice(-2 if part == "head" else None)
            np.testing.assert_allclose(
                other.state.arrays[part][weights], vector[weights], atol=1e-3, err_msg=f"{change} {part}"
            )
        for line, expected in zip(kept_lines(other), kept_lines(once), strict=True):
            for name in ("loss", "f1", "exact-match", "eval-f1", "eval-loss"):
                assert line.get(name) == (pytest.approx(expected[name], abs=1e-3) if name in expected else None), name


def test_a_stride_too_large_ends_a_run_in_one_line(tiny_bert, tmp_path):
    flat = flat_run(tiny_bert, tmp_path, data__options="stride = 8", data__max_length=16)
    assert problem(lambda: engine.run(flat, 2)) == (
        "data.options stride = 8: allowed is less than half of data.max-length = 16"
    )
