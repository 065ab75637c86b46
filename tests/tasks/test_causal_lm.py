"""Causal language models: rows, evaluation by hand, answers, whole runs, what stock libraries make of the exports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TASKS, enlarge
from data_helper import federation, load, load_own, shares, write
from export_helper import stock_run
from runs_helper import WALL_CLOCK, config, exported, prepare, start, stopped_in_round, written
from test_output import fill, open_adapted, save_model
from test_templates import CHAT, END, learnt, problem, tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, RwkvConfig

from fedara_flwr import engine, strategies
from fedara_flwr.adapters.learner import Learner
from fedara_flwr.cli import launch
from fedara_flwr.cli.exporting import export
from fedara_flwr.client import session
from fedara_flwr.client.together import train_together
from fedara_flwr.config import DataSettings
from fedara_flwr.data.examples import Examples
from fedara_flwr.data.partitions import check_partition
from fedara_flwr.node.settings import NodeSettings
from fedara_flwr.report import read_run
from fedara_flwr.report.page import _figures
from fedara_flwr.runs.keeper import open_run
from fedara_flwr.tasks import Encoded, causal_lm, conversations, open_task, read_settings
from fedara_flwr.tasks.causal_lm import Answers, Perplexity
from fedara_flwr.tasks.generation import ends, say
from fedara_flwr.wire.plan import Update

TASK = TASKS["causal-lm"]
BLUE = [["user", "Which colour?"], ["assistant", "blue"]]


pytestmark = pytest.mark.usefixtures("private_cache")


def settings_of(path: Path, options: str = "", **more: object) -> DataSettings:
    return DataSettings(task="causal-lm", path=str(path), options=options, **{"partition": "iid", **more})


def read(path: Path, rows: list[dict], options: str = "", **more: object):
    """(conversations or texts, the line about rows left out) of a device's own file."""
    own = load_own(settings_of(write(path / "d.jsonl", rows), options, **more), ())
    return list(own.train.targets or own.train.texts), str(own.skipped)


# -- rows ------------------------------------------------------------
@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Which colour?", "output": "blue"}, "Which colour?"),
        ({"instruction": "Which colour?", "input": "", "output": "blue"}, "Which colour?"),
        ({"instruction": "Which colour?", "input": "the sky", "output": "blue"}, "Which colour?\n\nthe sky"),
        ({"instruction": "Which colour?", "context": "the sky", "response": "blue"}, "Which colour?\n\nthe sky"),
        ({"prompt": "Which colour?", "completion": "blue"}, "Which colour?"),
        ({"prompt": "Which colour?", "answer": "blue", "text": "of other things"}, "Which colour?"),
        ({"question": "Which colour?", "answer": "blue"}, "Which colour?"),
        ({"question": "Which colour?", "context": "the sky", "answer": "blue"}, "Which colour?\n\nthe sky"),
        ({"prompt": "Which colour?", "context": "the sky", "completion": "blue"}, "Which colour?\n\nthe sky"),
        (
            {"messages": [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "blue"}]},
            "Which colour?",
        ),
        ({"conversations": [{"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "blue"}]}, "Which colour?"),
        (
            {"messages": json.dumps([{"role": "user", "content": "Which colour?"}, {"from": "gpt", "value": "blue"}])},
            "Which colour?",
        ),
    ],
)
def test_columns_by_the_names_that_published_sets_have(tmp_path, row, prompt):
    found, line = read(tmp_path, [row])
    assert found == [[["user", prompt], ["assistant", "blue"]]] and line == ""


def test_columns_that_were_taken_by_their_names_are_said(tmp_path, caplog):
    conversations.preset.cache_clear()
    with caplog.at_level("INFO"):
        read(tmp_path, [{"instruction": "a", "response": "b", "other": 1, **{f"c{i}": 1 for i in range(9)}}])
        read(tmp_path, [{"question": "a", "answer": "b"}], "answer-column = '-'", text_column="question")
    taken = "columns by their names: text from 'instruction', answer from 'response'"
    rest = "'other', 'c0', 'c1', 'c2', 'c3', 'c4', 'c5', 'c6' and 2 more"
    assert [record.message for record in caplog.records] == [
        f"{taken}; no part of a conversation: {rest} (data.options says otherwise)"
    ]


def test_fedara_run_in_one_process_says_the_columns_too(tmp_path, monkeypatch, capsys):
    """They are said once for a process, as it checks the settings before the run."""
    conversations.preset.cache_clear()
    monkeypatch.setattr(launch, "_run_in_process", lambda config, nodes: None)
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps({"prompt": f"p{i}", "completion": "b"}) + "\n" for i in range(9)))
    root = Path(__file__).parents[2]
    launch.launch(root, [f"data.task='causal-lm' data.path='{tmp_path}/qa.jsonl'"], None, "inprocess")
    assert "columns by their names: text from 'prompt', answer from 'completion'" in capsys.readouterr().out


def test_columns_by_the_keys(tmp_path):
    """Whatever else the table has."""
    row = {"instruction": "no", "output": "no", "q": "Which colour?", "a": "blue", "c": "the sky", "m": [{"role": "x"}]}
    found, _ = read(tmp_path, [row], "{answer-column = 'a', context-column = 'c'}", text_column="q")
    assert found == [[["user", "Which colour?\n\nthe sky"], ["assistant", "blue"]]]
    row["m"] = [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "blue"}]
    assert read(tmp_path, [row], "messages-column = 'm'")[0] == [BLUE]
    assert read(tmp_path, [row], text_column="q")[0] == [[["user", "Which colour?"], ["assistant", "no"]]]  # said in a line
    assert read(tmp_path, [row], "answer-column = '-'", text_column="q")[0] == ["Which colour?"]  # a text, not a prompt
    passage = {"question": "Which colour?", "answer": "blue", "passage": "the sky"}
    assert read(tmp_path, [passage], "context-column = 'passage'")[0] == found
    for names in (("text", "answer"), ("Prompt", "Completion"), ("INSTRUCTION", "Output")):
        assert read(tmp_path, [dict(zip(names, ("Which colour?", "blue"), strict=True))])[0] == [BLUE]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("context-column = 'c'", "context-column = 'c': allowed is '' where rows are conversations"),
        (
            "messages-column = 'messages'\nanswer-column = 'c'",
            "answer-column = 'c': allowed is '' where rows are conversations",
        ),
        (
            "answer-column = '-'\ncontext-column = 'c'",
            "context-column = 'c': allowed is '' where rows are texts to be learnt whole",
        ),
        ("answer-column = 'text'", "answer-column = 'text': it is the text-column too, allowed is another column"),
        (
            "answer-column = 'c'\ncontext-column = 'c'",
            "context-column = 'c': it is the answer-column too, allowed is another column",
        ),
    ],
)
def test_columns_that_would_not_be_read_or_twice(tmp_path, options, line):
    """A context that is the answer would give it away; one beside conversations or whole texts would be dropped."""
    said = [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "blue"}]
    path = write(tmp_path / "d.jsonl", [{"messages": said, "text": "Which colour?", "c": "blue"}])
    assert problem(lambda: load(settings_of(path, options), 0)) == f"data.options {line}"


def test_an_answer_that_is_published_as_the_input(tmp_path, caplog):
    """It is then no context of its own prompt; the line says what is read."""
    conversations.preset.cache_clear()
    row = {"instruction": "Which colour?", "input": "blue", "output": "no"}
    with caplog.at_level("INFO"):
        assert read(tmp_path, [row], "answer-column = 'input'", text_column="instruction")[0] == [BLUE]
    assert "text from 'instruction', answer from 'input'; no part of a conversation: 'output'" in caplog.text


@pytest.mark.parametrize(
    ("options", "more", "line"),
    [
        ("answer-column = 'a'", {}, "data.text-column = 'text': no such column, allowed are ['q', 'b']"),
        (
            "answer-column = 'a'",
            {"text_column": "q"},
            "data.options answer-column = 'a': no such column, allowed are ['q', 'b']",
        ),
        ("messages-column = 'm'", {}, "data.options messages-column = 'm': no such column, allowed are ['q', 'b']"),
        ("category-column = 'k'", {"text_column": "q"}, "data.options category-column = 'k': no such column"),
        ("", {"pair_column": "b", "text_column": "q"}, "data.pair-column = 'b': allowed is '' with data.task = 'causal-lm'"),
    ],
)
def test_columns_that_are_not_there(tmp_path, options, more, line):
    path = write(tmp_path / "d.jsonl", [{"q": "Which colour?", "b": "blue"}])
    assert line in problem(lambda: load(settings_of(path, options, **more), 0))


def test_lists_where_a_text_should_be(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"prompt": ["a"], "completion": "b"}])
    assert "it holds lists, allowed with data.task = 'causal-lm' is one value a row" in problem(
        lambda: load(settings_of(path), 0)
    )


def test_rows_that_cannot_be_used_are_counted_by_reason(tmp_path):
    """In one line; what comes after the last answer goes, and names of roles as other tools write them are known."""
    said = [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "blue"}]
    values = [
        "[{not json",
        json.dumps(said[:1]),
        "[]",
        "null",
        "3",
        json.dumps([said[1]]),
        json.dumps([{"role": "user", "content": " "}, said[1]]),
        json.dumps([said[0], {"role": "assistant", "content": ""}]),
        json.dumps([said[0], {"role": "system", "content": "Be brief."}, said[1]]),
        json.dumps([said[0], {"role": "tool", "content": "x"}, said[1]]),
        json.dumps([said[0], {"role": "assistant", "content": None}]),
        json.dumps([said[0], {"role": "assistant", "content": [{"type": "text", "text": "blue"}]}]),
        json.dumps(["user", "assistant"]),
        json.dumps([*said, {"role": "user", "content": "And now?"}]),
        json.dumps(
            [{"from": "system", "value": "Be brief."}, {"from": "prompter", "value": "a"}, {"from": "bot", "value": "b"}]
        ),
    ]
    found, line = read(tmp_path, [{"messages": value} for value in values])
    assert found == [BLUE, BLUE, [["system", "Be brief."], ["user", "a"], ["assistant", "b"]]]
    head, *reasons = line.replace("system, user", "system; user").split(", ")
    assert head == "12 of 15 rows skipped: 5 without answer"
    assert sorted(reasons) == [
        "1 with a system text that is not first",
        "1 with messages of others than system; user and assistant",
        "1 with messages that are no JSON",
        "1 with messages that are no objects",
        "3 with messages that are empty",
    ]


def test_messages_as_other_tools_write_them(tmp_path):
    """Roles in capitals, content in parts, several messages of one role in a row; nesting without an end is no JSON."""
    rows = [
        [{"role": "User", "content": "Which colour?"}, {"role": "Assistant", "content": "blue"}],
        [{"role": "user", "content": [{"type": "text", "text": "Which"}, {"type": "text", "text": "colour?"}]}, BLUE[1]],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "assistant", "content": "c"}],
        [{"role": "user", "content": [{"type": "image", "url": "x"}]}, {"role": "assistant", "content": "b"}],
    ]
    rows[1][1] = {"role": "assistant", "content": "blue"}
    values = [*map(json.dumps, rows), "[" * 200_000]
    found, line = read(tmp_path, [{"messages": value} for value in values])
    assert found == [BLUE, [["user", "Which\ncolour?"], BLUE[1]], [["user", "a"], ["assistant", "b\n\nc"]]]
    assert line == "2 of 5 rows skipped: 1 with messages that are no JSON, 1 with messages that are not text alone"


def test_what_a_message_says_beside_its_text(tmp_path):
    """Nothing of it would be learnt; an answer of weight 0 is one that must not be."""
    call = [{"function": {"name": "f", "arguments": "{}"}}]
    beside = [{"tool_calls": call}, {"function_call": "f"}, {"reasoning_content": "hm"}, {"weight": 0}]
    nothing = [{"tool_calls": []}, {"reasoning_content": None}, {"weight": 1}, {"name": "Bob"}]
    rows = [
        {
            "messages": json.dumps(
                [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "blue", **more}]
            )
        }
        for more in (*beside, *nothing)
    ]
    found, line = read(tmp_path, rows)
    assert found == [BLUE] * 4
    assert line == "4 of 8 rows skipped: 1 with answers of weight 0, " + ", ".join(
        f"1 with messages that have {name}" for name in ("function_call", "reasoning_content", "tool_calls")
    )


def test_prompts_and_answers_that_are_missing(tmp_path):
    rows = [("a", "b"), ("", "b"), ("a", "  "), (None, "b"), ("a", None)]
    found, line = read(tmp_path, [{"prompt": prompt, "completion": answer} for prompt, answer in rows])
    assert found == [[["user", "a"], ["assistant", "b"]]] and line == "4 of 5 rows skipped: 2 without answer, 2 without prompt"


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_files_that_mix_both_ways_to_write_a_message(tmp_path, ending):
    """A parquet file has all columns in all rows: what a message lacks is None there."""
    rows = [
        {"messages": [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "blue"}]},
        {"messages": [{"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "blue"}]},
    ]
    path = tmp_path / f"d.{ending}"
    if ending == "jsonl":
        write(path, rows)
    else:
        empty = dict.fromkeys(("role", "content", "from", "value"))
        table = pa.table({"messages": [[empty | message for message in row["messages"]] for row in rows]})
        pq.write_table(table, path)
    own = load_own(settings_of(path), ())
    assert (own.train.targets, str(own.skipped)) == ((BLUE, BLUE), "")


STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}" + CHAT
)


@pytest.mark.parametrize(
    ("template", "roles"),
    [(CHAT, "assistant user assistant"), (STRICT, "assistant user assistant"), (STRICT, "user user assistant")],
    ids=["assistant-first", "assistant-first-strict", "user-twice-strict"],
)
def test_one_conversation_that_the_template_refuses_does_not_end_a_run(tmp_path, template, roles):
    """Many templates want user and assistant by turns, and published conversations are otherwise here and there."""
    usual = [{"role": role, "content": content} for role, content in BLUE]
    odd = [{"role": role, "content": "hello"} for role in roles.split()]
    own = load_own(settings_of(write(tmp_path / "d.jsonl", [{"messages": usual}, {"messages": odd}])), ())
    data = TASK.encode(tokenizer(template), own.train, 64)
    assert learnt(tokenizer(), data.labels[0]) == [f"blue{END}"]


def test_the_system_text_stands_before_conversations_that_have_none(tmp_path):
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found, _ = read(tmp_path, [{"messages": own}, {"messages": own[1:]}], "system = 'Be brief.'")
    assert found == [
        [["system", "Mine."], *([r["role"], r["content"]] for r in own[1:])],
        [["system", "Be brief."], ["user", "a"], ["assistant", "b"]],
    ]
    texts, _ = read(tmp_path, [{"text": "a whole text"}], "system = 'Be brief.'")
    assert texts == ["a whole text"]


def test_rows_differ_by_all_that_they_hold(tmp_path):
    """Two prompts with one answer are two rows for the seeded order, and the digest sees an answer."""
    rows = [{"prompt": prompt, "completion": "yes"} for prompt in ("a", "b")]
    own = load_own(settings_of(write(tmp_path / "d.jsonl", rows)), ()).train
    assert len(set(own.keys(0))) == 2 and own.texts == ("yes", "yes")
    rows[1]["completion"] = "no"
    other = load_own(settings_of(write(tmp_path / "e.jsonl", rows)), ()).train
    assert own.digest() != other.digest()


def test_categories(tmp_path):
    """Dirichlet goes by them; a row without one is of the category ''."""
    rows = [{"prompt": f"p{i}", "completion": "a", "kind": ["x", "y", None][i % 3]} for i in range(90)]
    path = write(tmp_path / "d.jsonl", rows)
    settings = settings_of(path, "category-column = 'kind'", partition="pathological", labels_per_client=1)
    pool = federation(settings, 0).pool
    numbers = [{"prompt": "p", "completion": "a", "kind": kind} for kind in (1, 1.0, "1")]
    beside = settings_of(write(tmp_path / "e.jsonl", numbers), "category-column = 'kind'")
    assert load_own(beside, ()).train.categories == ("1", "1", "1")
    assert set(pool.categories) == {"x", "y", ""} and pool.groups is None
    dealt = shares(settings, 0, 3)
    assert sum(map(len, dealt)) == len(pool)
    assert sum(len({pool.categories[i] for i in part}) for part in dealt) <= 5  # each of two cuts splits one at most
    without = settings_of(path, partition="dirichlet")
    assert "rows of data.task = 'causal-lm' have no label to go by" in problem(lambda: shares(without, 0, 3))
    told = problem(lambda: check_partition(without, False, open_task(without).group_key))
    assert told.endswith("; or name one by data.options category-column")
    assert read_settings({"data.task": "causal-lm", "data.path": str(path)}).data.partition == "iid"
    assert (
        read_settings(
            {"data.task": "causal-lm", "data.path": str(path), "data.options": "category-column = 'kind'"}
        ).data.partition
        == "dirichlet"
    )


def test_partition_by_length(tmp_path):
    """Two stretches a client of rows sorted by all their characters: with one, no client's overlaps another's."""
    rows = [{"prompt": "p" * (1 + i), "completion": "a" * (1 + 7 * i % 50)} for i in range(60)]
    settings = settings_of(write(tmp_path / "d.jsonl", rows), partition="length", labels_per_client=1)
    pool = federation(settings, 0).pool
    sizes = pool.sizes()
    assert sizes.tolist() == [len(json.dumps(target)) for target in pool.targets]
    spans = sorted((sizes[part].min(), sizes[part].max()) for part in shares(settings, 0, 4))
    assert all(high <= low for (_, high), (low, _) in zip(spans, spans[1:], strict=False))
    assert sum(len(part) for part in shares(settings.model_copy(update={"labels_per_client": 2}), 0, 4)) == len(pool)


def test_data_without_answers_is_refused(tmp_path):
    line = problem(lambda: load(DataSettings(task="causal-lm", name="docstrings", partition="iid"), 0))
    assert line.startswith("data.name = 'docstrings': its rows have no answers ('functions' has)")
    path = write(tmp_path / "d.jsonl", [{"prompt": "", "completion": ""}])
    assert problem(lambda: load(settings_of(path), 0)).endswith(
        "there are no rows with text and answer (1 of 1 rows skipped: 1 without prompt)"
    )


def test_a_device_without_rows_of_its_own_has_the_runs_built_in_ones():
    """As with other tasks, whose built-in data are the docstrings."""
    settings = read_settings({"data.task": "causal-lm"})
    node = NodeSettings.read({"models": settings.model.name, "partition-id": 0, "num-partitions": 2})
    own, path = session.own_settings(settings, node, trusted=False)
    assert path == "" and own.data.name == "functions"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("template = 'chatml'", "data.options.template = 'chatml'"),
        ("generate = 101", "data.options.generate = 101"),
        ("max-new-tokens = 0", "data.options.max-new-tokens = 0"),
        ("answers = 'a'", "data.options.answers = 'a': there is no such key"),
    ],
)
def test_options_that_are_not_allowed(options, line):
    assert problem(lambda: open_task(DataSettings(task="causal-lm", options=options))).startswith(line)


# -- evaluation ------------------------------------------------------------
def test_perplexity_by_hand(monkeypatch):
    """Probabilities 1/2, 1/4, 1/8 of the tokens, of which the first alone is the likeliest: 6 ln 2 over 3 tokens."""
    probabilities = torch.tensor([[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 2, 1 / 4], [1 / 2, 1 / 8, 3 / 8], [1, 0, 0]])
    for piece in (256, 2):
        monkeypatch.setattr(causal_lm, "PIECE", piece)
        evaluation = Perplexity()
        for rows in (slice(0, 2), slice(2, 3), slice(0, 0)):
            tokens = torch.tensor([0, 0, 1])[rows]
            states = probabilities.log()[:3][rows]
            evaluation.add(Answers(states, torch.zeros(len(tokens)).long(), tokens, lambda states: states), {})
        found = evaluation.result()
        assert found["loss"] == pytest.approx(2 * math.log(2)) and found["perplexity"] == pytest.approx(4)
        assert found["accuracy"] == pytest.approx(1 / 3) and set(found) == set(TASK.metrics)


def test_perplexity_has_an_end_and_is_of_no_token_too():
    assert Perplexity().result() == {"perplexity": 1, "accuracy": 0, "loss": 0}
    evaluation = Perplexity()
    evaluation.add(Answers(torch.tensor([[0.0, 1e6]]), torch.zeros(1).long(), torch.zeros(1).long(), lambda states: states), {})
    assert math.isfinite(evaluation.result()["perplexity"]) and evaluation.result()["loss"] == 1e6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Llama whose tokenizer has a chat template."""
    return save_model(tmp_path_factory.mktemp("language") / "llama", "llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def learner(folder) -> Learner:
    adapted = open_adapted(folder)
    fill(adapted)
    return Learner(adapted, TASK, tokenizer())


def encoded(turns_of: list[list[list[str]]], most: int = 64, options: str = "") -> Encoded:
    examples = Examples(tuple(turns[-1][1] for turns in turns_of), targets=tuple(turns_of))
    return open_task(DataSettings(task="causal-lm", options=options)).encode(tokenizer(), examples, most)


def test_evaluation_is_transformers_loss(learner):
    """Batches of any size, in any order, give the mean over all tokens of answers, not over rows."""
    data = encoded([[["user", "hello"], ["assistant", "a " * count]] for count in (1, 9, 4, 20)])
    found = learner.evaluate(data)
    batch = TASK.collate(learner.tokenizer, data.ids, data.labels)
    with torch.no_grad():
        expected = float(
            learner.adapted.model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
        )
    assert found["loss"] == pytest.approx(expected, abs=1e-5) and found["perplexity"] == pytest.approx(
        math.exp(expected), rel=1e-4
    )
    assert learner.evaluate(data, batch_tokens=40) == pytest.approx(found, rel=1e-5)


# -- answers ------------------------------------------------------------
def greedy(learner: Learner, prompt: list[int], most: int) -> list[int]:
    """The likeliest token, one after the other, without a cache, up to one that ends an answer."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(most):
            ids.append(int(learner.adapted.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in ends(learner.tokenizer):
                break
    return ids[len(prompt) :]


def prompts(learner: Learner) -> list[list[int]]:
    texts = ("hello", "what is the name of the colour", "one two three number world hello red", "b")
    return [learner.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_each_prompt_gets_the_answer_that_it_gets_alone(learner):
    """Whatever it is padded to; the likeliest token each time."""
    rows = prompts(learner)
    assert len({len(row) for row in rows}) > 2
    together = say(learner, rows, 12)
    for row, said in zip(rows, together, strict=True):
        assert say(learner, [row], 12) == [said]
        tokens = greedy(learner, row, 12)
        stopped = tokens[-1] in ends(learner.tokenizer)
        text = learner.tokenizer.decode(tokens[:-1] if stopped else tokens, skip_special_tokens=True).strip()
        assert said == (text, stopped)


def test_a_model_that_reads_the_padding_answers_each_prompt_by_itself(tmp_path):
    """RWKV has no mask."""
    words = tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}
    config = RwkvConfig(vocab_size=len(words), eos_token_id=3, pad_token_id=3, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    enlarge(model, 4)
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    found = Learner(open_adapted(tmp_path), TASK, words)
    rows = [list(range(7, 7 + count)) for count in (3, 11, 6)]
    assert say(found, rows, 8) == [say(found, [row], 8)[0] for row in rows]


@pytest.mark.parametrize("later", [False, True])
def test_it_stops_at_the_end_token(learner, monkeypatch, later):
    """A token that is said is made the end of the turn: what came before is left, for that prompt and no other."""
    row = prompts(learner)[1]
    tokens = greedy(learner, row, 12)
    place = next(i for i, token in enumerate(tokens) if token != tokens[0]) if later else 0
    monkeypatch.setattr("fedara_flwr.tasks.generation.ends", lambda _: [tokens[place]])
    (said,) = say(learner, [row], 12)
    assert said.stopped and said.text == learner.tokenizer.decode(tokens[:place], skip_special_tokens=True).strip()
    first, _ = say(learner, [row, prompts(learner)[0]], 12)
    assert first == said


def test_what_ends_an_answer():
    """The end of text, and what the template puts behind an answer."""
    both = tokenizer(eos="</s>")
    assert ends(both) == sorted(both.convert_tokens_to_ids(["</s>", END]))
    assert ends(tokenizer()) == [tokenizer().eos_token_id]


def test_a_models_own_habits_of_generation_do_not_count(folder, tmp_path):
    """Published models bring sampling and penalties; the likeliest token is asked for."""
    other = save_model(tmp_path / "m", "llama", tie_word_embeddings=True)
    habits = {"do_sample": True, "temperature": 0.1, "repetition_penalty": 1.9, "no_repeat_ngram_size": 1, "min_new_tokens": 3}
    file = other / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | habits))
    learners = [Learner(open_adapted(path), TASK, tokenizer()) for path in (folder, other)]
    for one in learners:
        fill(one.adapted)
    one, two = (say(found, prompts(found), 12) for found in learners)
    assert one == two


def test_samples_are_the_first_rows_with_their_scores(learner, monkeypatch):
    """The prompt ends where the answer begins; what is said is compared with what the data has."""
    given: list[list[list[int]]] = []

    def answer(_, prompts, most):
        given.append(prompts)
        assert most == 7
        return [SimpleNamespace(text=text, stopped=text == "blue") for text in ("blue", "red sky")][: len(prompts)]

    monkeypatch.setattr(causal_lm, "say", answer)
    options = "generate = 2\nmax-new-tokens = 7"
    task = open_task(DataSettings(task="causal-lm", options=options))
    data = encoded([BLUE, [["system", "x"], ["user", "a"], ["assistant", "the red sea"]], BLUE], options=options)
    first, second = task.samples(learner, data)
    assert (first.prompt, first.said, first.expected, first.stopped) == ("Which colour?", "blue", "blue", True)
    assert first.scores == {"exact-match": 1, "rouge-l": 1}
    assert (second.prompt, second.expected, second.stopped) == ("a", "the red sea", False)
    assert second.scores == {"exact-match": 0, "rouge-l": pytest.approx(2 / 5)}  # "red" of 2 and 3 words
    texts = [learner.tokenizer.decode(row) for row in given[0]]
    assert texts[0] == "<|turn|>user\nWhich colour?<|end|>\n<|turn|>assistant\n" and texts[1].endswith(
        "a<|end|>\n<|turn|>assistant\n"
    )


def test_samples_of_conversations_that_were_cut(learner, monkeypatch):
    """What is expected is the answer to the prompt that the model is given, not one that was cut away."""
    given: list[list[int]] = []

    def answer(_, prompts, most):
        given.extend(prompts)
        return [SimpleNamespace(text="two", stopped=True)]

    monkeypatch.setattr(causal_lm, "say", answer)
    long = [["user", "one"], ["assistant", "red " * 30], ["user", "what number"], ["assistant", "two"]]
    (sample,) = TASK.samples(learner, encoded([long], most=40))
    assert learner.tokenizer.decode(given[0]).endswith("what number<|end|>\n<|turn|>assistant\n")
    assert (sample.prompt, sample.expected) == ("what number", "two") and sample.scores["exact-match"] == 1


def test_no_samples_of_texts_or_where_none_are_wanted(learner):
    assert TASK.samples(learner, TASK.encode(tokenizer(), Examples(("a text",)), 16)) == []
    none = open_task(DataSettings(task="causal-lm", options="generate = 0"))
    assert none.samples(learner, encoded([BLUE])) == []


# -- whole runs ------------------------------------------------------------
NUMBERS = ("one", "two", "three")
OPTIONS = "generate = 2\nmax-new-tokens = 4\ncategory-column = 'kind'"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    made = [
        {"instruction": f"what is number {i}?", "output": f"{NUMBERS[i % 3]} {i} hello", "kind": "abc"[i % 3]}
        for i in range(90)
    ]
    return write(tmp_path_factory.mktemp("rows") / "d.jsonl", made)


def flat_of(folder: Path, rows: Path, **changes: object) -> dict:
    usual = {
        "num_server_rounds": 2,
        "data__task": "causal-lm",
        "data__path": str(rows),
        "data__options": OPTIONS,
        "data__max_length": 48,
        "data__validation": 0.1,
        "data__test": 0.1,
        "model__dtype": "float32",
        "train__learning_rate": 0.01,
        "fedara__warmup_rounds": 0,
    }
    return config(folder, **{**usual, **changes})


@pytest.fixture(scope="module")
def finished(folder, rows, tmp_path_factory):
    """Folder of a finished run of a method, made when first asked for."""
    root, found = tmp_path_factory.mktemp("runs"), {}

    def make(method: str, page: bool = False) -> Path:
        if method not in found:
            flat = flat_of(folder, rows, method=method, run__dir=str(root), run__name=method)
            with pytest.MonkeyPatch.context() as patch:
                if not page:  # pictures take seconds
                    patch.setattr("fedara_flwr.runs.keeper.write_report", lambda path: path / "report.html")
                found[method] = engine.run(flat, 4).path
        return found[method]

    return make


def records(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["type"] == kind]


def facts_of(run: Path) -> dict:
    return json.loads((run / "federated.json").read_text())


@pytest.mark.parametrize("method", ["fedara", "fedlora"])
def test_a_whole_run(finished, method):
    """Round 0 is the published model; facts of both; it learns; answers of both to the same rows."""
    run = finished(method, page=method == "fedara")
    facts = facts_of(run)
    assert facts["outcome"] == "completed" and facts["metric"] == TASK.metric.facts() and facts["labels"] == []
    (begin,), (*_, last) = records(run, "start"), records(run, "round")
    assert last["loss"] < begin["loss"] and last["perplexity"] < begin["perplexity"]
    assert set(facts["test"]) == set(facts["unadapted"]) == set(TASK.metrics)
    assert facts["test"]["loss"] < facts["unadapted"]["loss"]
    bare = f"of the model that is left, {facts['unadapted']['perplexity']:,.3f} of the unadapted model"
    assert bare in [more for name, _, more in _figures(read_run(run)) if name == "perplexity, test"]
    model = open_run(run).model
    assert model.evaluate(model.unadapted(), "validation")["loss"] == pytest.approx(begin["loss"], rel=1e-5)
    assert len(facts["samples"]) == 2 and set(facts["samples-scores"]) == {"exact-match", "rouge-l", "stopped"}
    assert all(set(sample) == {"prompt", "expected", "said", "before"} for sample in facts["samples"])
    assert all(sample["prompt"].startswith("what is number") and "hello" in sample["expected"] for sample in facts["samples"])
    assert facts["groups"] == ["a", "b", "c"] and {len(counts) for counts in facts["partition"].values()} == {3}
    card = (run / facts["exported"] / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "- `perplexity`: " in card and "main metric, lower is better" in card
    assert " before" in card and "## Labels" not in card


def test_the_page_of_a_run(finished):
    page = (finished("fedara", page=True) / "report.html").read_text()
    assert "perplexity" in page and "AutoModelForCausalLM" in page


def test_the_page_shows_what_was_answered(finished):
    """As docs/language-models.md says."""
    run = finished("fedara", page=True)
    page = (run / "report.html").read_text()
    assert all(sample["expected"] in page for sample in facts_of(run)["samples"])


STOCK = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import PeftModel
model = AutoModelForCausalLM.from_pretrained({base!r}, dtype="auto")
kind = str(model.dtype)
if {folder!r}:
    model = PeftModel.from_pretrained(model, {folder!r})
    if {merge}:
        model = model.merge_and_unload()
with torch.no_grad():
    logits = model(input_ids=torch.tensor({ids})).logits.float()
print(kind, AutoTokenizer.from_pretrained({folder!r} or {base!r}).chat_template)
"""


def stock(base: Path, folder: Path | str, ids: torch.Tensor, merge: bool = False):
    """(checkpoint's type and the template of the tokenizer beside it, logits) in stock transformers and PEFT."""
    printed, logits = stock_run(STOCK.format(base=str(base), folder=str(folder), ids=ids.tolist(), merge=merge))
    return printed.strip(), logits


def result_of(run: Path, ids: torch.Tensor) -> np.ndarray:
    """Logits of what the run made, by the product."""
    saved = open_run(run)
    saved.model.load(saved.method.weights(saved.state))
    with torch.no_grad():
        return saved.model.adapted.outputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits.float().numpy()


@pytest.mark.parametrize("method", ["fedara", "fedlora"])
def test_exports_in_stock_libraries(finished, folder, method):
    """Equal logits in every format, also merged by PEFT; a Modelfile beside lora and merged; the card's own lines run."""
    run, ids = finished(method), torch.arange(24).view(2, 12)
    expected = result_of(run, ids)
    unadapted = stock(folder, "", ids)[1]
    assert np.abs(unadapted - expected).max() > 1e-2
    for kind in ("peft", "lora", "merged"):
        out = export(run, kind, say=lambda line: None)
        base, adapter = (out, "") if kind == "merged" else (folder, out)
        printed, found = stock(base, adapter, ids)
        assert np.allclose(found, expected, atol=1e-4), kind
        assert printed == f"torch.float32 {CHAT}".strip()
        if kind == "lora":
            assert np.allclose(stock(base, adapter, ids, merge=True)[1], expected, atol=1e-4)
        if kind != "merged":
            assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
        config = GenerationConfig.from_pretrained(out)  # what the card's lines generate by
        assert config.eos_token_id == ends(tokenizer()) and not config.do_sample
        modelfile = out / "Modelfile"
        assert modelfile.exists() == (kind != "peft")
        if kind != "peft":
            head = "FROM .\nTEMPLATE" if kind == "merged" else f"FROM {folder}\nADAPTER .\nTEMPLATE"
            assert modelfile.read_text().startswith(head)
        card = (out / "README.md").read_text()
        code = card[card.index("```python\n") + 10 : card.rindex("```")].replace("path/to/this/folder", str(out))
        code = code.replace(f"'{folder.name}'", repr(str(folder))) + "\nimport torch\nlogits = torch.zeros(1)\n"
        stock_run(code)


def test_exports_know_the_system_text(folder):
    """A model that was taught under one is used under it."""
    task = open_task(DataSettings(task="causal-lm", options="system = 'Say red.'"))
    learner = Learner(open_adapted(folder), task, tokenizer())
    files = task.files(learner, "merged", "")
    assert 'SYSTEM """Say red."""\n' in files["Modelfile"]
    assert "system = 'Say red.'  # as it was taught" in task.snippet()
    assert any('[{"role": "system", "content": system}, {"role": "user"' in line for line in task.snippet())
    assert not any("system" in line for line in TASK.snippet())


def test_a_bfloat16_checkpoint_stays_one(rows, tmp_path):
    """Trained in bfloat16; the merged model is bfloat16, with the logits of the adapters on their base to its rounding."""
    base = save_model(tmp_path / "m", "llama", dtype=torch.bfloat16, tie_word_embeddings=True)
    flat = flat_of(base, rows, method="fedlora", model__dtype="bfloat16", run__dir=str(tmp_path), run__name="run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedara_flwr.runs.keeper.write_report", lambda path: path / "report.html")
        run = engine.run(flat, 4).path
    ids = torch.arange(24).view(2, 12)
    expected = result_of(run, ids)
    merged, adapter = (export(run, kind, say=lambda line: None) for kind in ("merged", "lora"))
    kind, found = stock(merged, "", ids)
    assert kind.startswith("torch.bfloat16")
    other = stock(base, adapter, ids)[1]
    bound = 0.1 * np.abs(expected).max()
    assert np.abs(found - expected).max() < bound and np.abs(other - expected).max() < bound
    assert np.abs(found - stock(base, "", ids)[1]).max() > 0


MORE = sorted(strategies.built_in().keys() - {"fedara", "fedlora", "head"})


@pytest.mark.parametrize("method", MORE)
def test_every_other_method_learns_too(folder, rows, method):
    loop = start(flat_of(folder, rows, method=method, strategy__options=""), clients=4)
    first, *_, last = [line["loss"] for line in loop.lines if line["type"] in ("start", "round")]
    assert last < first, method


def test_a_private_run(folder, rows):
    pytest.importorskip("dp_accounting")
    noised = {"privacy__clip": 1.0, "privacy__noise_multiplier": 2.0, "strategy__weighting": "uniform"}
    loop = start(flat_of(folder, rows, **noised), clients=4)
    assert np.all(loop.state.arrays["E"]) and {line["noise"] for line in loop.lines if line["type"] == "round"}


def test_a_method_without_adapters_is_refused(folder, rows):
    line = problem(lambda: engine.run(flat_of(folder, rows, method="head", run__dir=""), 4))
    assert line == "method = 'head': data.task = 'causal-lm' has no head, and nothing else would be trained"
    line = problem(lambda: engine.run(flat_of(folder, rows, num_server_rounds=0, head__start="means", run__dir=""), 4))
    assert line == "num-server-rounds = 0: data.task = 'causal-lm' has no head to be solved, allowed is 1 or more"


def test_a_seed_gives_the_same_bits(finished, folder, rows, tmp_path):
    first = finished("fedara")
    flat = flat_of(folder, rows, method="fedara", run__dir=str(tmp_path), run__name="again")
    session._resident.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedara_flwr.runs.keeper.write_report", lambda path: path / "report.html")
        again = engine.run(flat, 4).path
    assert written(first)[0] == written(again)[0]
    one, two = exported(first), exported(again)
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    assert facts_of(first)["samples"] == facts_of(again)["samples"]


def test_a_run_that_goes_on(finished, folder, rows, tmp_path, monkeypatch):
    """Stopped in round 2, then resumed: nothing differs from the run that was not stopped."""
    monkeypatch.setattr("fedara_flwr.runs.keeper.write_report", lambda path: path / "report.html")
    flat = flat_of(folder, rows, method="fedara", run__dir=str(tmp_path), run__name="run")
    with stopped_in_round(monkeypatch, 2):
        engine.run(flat, 4)
    run = tmp_path / "run"
    assert engine.run(flat | {"run.resume": str(run)}, 4).facts["outcome"] == "completed"
    lines, extra = written(run)
    assert extra > 0 and lines == written(finished("fedara"))[0]
    one, two = exported(finished("fedara")), exported(run)
    assert all(np.array_equal(one[name], two[name]) for name in one)


def lines_of(loop) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in WALL_CLOCK} for line in loop.lines]


def test_a_kept_prefix_changes_no_number(folder, rows):
    """Blocks below the lowest living module are run once; FedARA drops some here."""
    changes = {"method": "fedlora", "adapter__target_modules": "down_proj", "num_server_rounds": 2}
    found = {}
    for cache in ("off", "exact"):
        loop, grid = prepare(flat_of(folder, rows, train__cache=cache, **changes), clients=4)
        mask = loop.state.mask
        loop.start(grid, loop.initial_arrays(), 2)
        found[cache] = loop
    off, exact = found["off"], found["exact"]
    assert off.state.mask == exact.state.mask == mask
    for part, values in off.state.arrays.items():
        np.testing.assert_allclose(exact.state.arrays[part], values, atol=1e-6)
    for one, two in zip(lines_of(off), lines_of(exact), strict=True):
        assert {k: v for k, v in one.items() if k in TASK.metrics} == pytest.approx(
            {k: v for k, v in two.items() if k in TASK.metrics}
        )


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_numbers_that_travel_in_few_bits(folder, rows, form):
    loop = start(flat_of(folder, rows, method="fedlora", wire__down=form, wire__up=form), clients=4)
    plain = start(flat_of(folder, rows, method="fedlora"), clients=4)
    (first, *_, last), (*_, other) = (
        [line for line in lines_of(run) if line["type"] in ("start", "round")] for run in (loop, plain)
    )
    assert last["loss"] < first["loss"] and last["loss"] == pytest.approx(other["loss"], rel=0.1)
    assert last["bytes-total"] < 0.6 * other["bytes-total"]


@pytest.mark.parametrize("clients", [4, 5])
def test_clients_that_train_together(folder, rows, caplog, monkeypatch, clients):
    """As one after the other, to rounding; in a process that has trained nothing yet, and without falling back to that."""
    trained: list[Update | Exception] = []

    def noted(learner, jobs):
        trained.extend(train_together(learner, jobs))
        return trained

    monkeypatch.setattr("fedara_flwr.client.together.train_together", noted)
    changes = {"method": "fedlora", "strategy__fraction_train": 1.0, "train__batch_tokens": 0, "num_server_rounds": 1}
    expected = start(flat_of(folder, rows, **changes), clients=clients)
    session._resident.clear()
    with caplog.at_level("WARNING"):
        loop = start(flat_of(folder, rows, run__together=clients, **changes), clients=clients)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []
    assert len(trained) == clients and all(isinstance(update, Update) for update in trained)
    for part, values in expected.state.arrays.items():
        np.testing.assert_allclose(loop.state.arrays[part], values, atol=1e-4)
    assert loop.lines[-1]["loss"] == pytest.approx(expected.lines[-1]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "name"),
    [("template = 'alpaca'", "tokenizer"), ("template = 'plain'", "tokenizer"), ("system = 'Be brief.'", "tokenizer")],
)
def test_a_node_that_writes_conversations_otherwise_is_left_out(folder, rows, options, name):
    loop, grid = prepare(flat_of(folder, rows, method="fedlora", strategy__fraction_train=1.0), clients=4)
    grid.contexts[1002].run_config = {**grid.contexts[1002].run_config, "data.options": f"{OPTIONS}\n{options}"}
    loop.start(grid, loop.initial_arrays(), 1)
    assert set(loop.roster.unfit) == {"2"} and loop.roster.unfit["2"].startswith(f"its {name} differs: ")


def test_clients_weigh_by_the_tokens_of_their_answers(folder, tmp_path):
    """n words have n + 2 tokens that are learnt: the first word is two, and one ends the turn. One client has long ones."""
    rows = [
        {"instruction": "hello", "output": " ".join(["world"] * (9 if owner == 0 else 1 + i % 2)), "owner": f"o{owner}"}
        for owner in range(4)
        for i in range(20)
    ]
    natural = {"data__partition": "natural", "data__id_column": "owner", "data__options": "", "data__test": 0.05}
    flat = flat_of(folder, write(tmp_path / "d.jsonl", rows), method="fedlora", strategy__weighting="tokens", **natural)
    loop, grid = prepare(flat | {"strategy.fraction-train": 1.0, "strategy.weight-cap": 2.0}, clients=4)
    silent = {"metrics": "loss"}  # a node that tells nothing else
    grid.contexts[1003].node_config = {**grid.contexts[1003].node_config, **silent}
    loop.start(grid, loop.initial_arrays(), 1)
    assert loop.roster.unfit == {
        "3": "it does not tell its tokens to learn, with strategy.weighting = 'tokens' allowed are 1 to 2147483648"
    }
    tokens, examples = loop.roster.weights, loop.roster.examples
    long = next(key for key in tokens if tokens[key] == 11 * examples[key])
    assert all(3 * examples[key] <= tokens[key] <= 4 * examples[key] for key in tokens if key != long)
    median = sorted(tokens.values())[1]
    seen = {reply.client.key: reply.weight for reply in loop.work.replies}
    assert seen == tokens | {long: 2 * median} and 2 * median < tokens[long]


def test_options_that_read_rows_only_may_be_a_devices_own(folder, rows):
    """Which column has the answer, and how many are generated, is nobody else's matter."""
    settings = read_settings(flat_of(folder, rows))
    states = set()
    for options in (OPTIONS, "generate = 0\nanswer-column = 'reply'\ntemplate = 'chat'"):
        task = open_task(settings.data.model_copy(update={"options": options}))
        found = tokenizer()
        task.check_tokenizer(found, "m")
        states.add(task.tokenizer_state(found))
    assert len(states) == 1


def test_clients_validate_too(folder, rows):
    loop = start(flat_of(folder, rows, method="fedlora", data__client_validation=0.3), clients=4)
    clients = [line for line in loop.lines if line["type"] == "client"]
    assert clients and all({f"eval-{name}" for name in TASK.metrics} <= set(line) for line in clients)


def test_a_run_without_validation_answers(folder, rows, tmp_path, monkeypatch):
    """generate = 0: no samples, and the unadapted model is tested all the same."""
    monkeypatch.setattr("fedara_flwr.runs.keeper.write_report", lambda path: path / "report.html")
    options = OPTIONS.replace("generate = 2", "generate = 0")
    flat = flat_of(folder, rows, method="fedlora", data__options=options, num_server_rounds=1, run__dir=str(tmp_path))
    facts = engine.run(flat, 4).facts
    assert "samples" not in facts and set(facts["unadapted"]) == set(TASK.metrics)


def test_plain_texts_in_a_run(folder, tmp_path):
    path = write(tmp_path / "d.jsonl", [{"text": f"{NUMBERS[i % 3]} hello world {i}"} for i in range(60)])
    loop = start(flat_of(folder, path, method="fedlora", data__options=""), clients=4)
    first, *_, last = [line["loss"] for line in loop.lines if line["type"] in ("start", "round")]
    assert last < first


def test_rows_that_were_cut_are_said_on_the_node(folder, rows, caplog):
    with caplog.at_level("INFO"):
        loop, grid = prepare(flat_of(folder, rows, method="fedlora", data__max_length=8), clients=2)
        loop.start(grid, loop.initial_arrays(), 1)
    assert "client 0: of " in caplog.text and " cut at 8 tokens (data.max-length)" in caplog.text


@pytest.mark.slow
def test_the_packaged_model_in_a_run(tmp_path):
    """The product's own defaults: SmolLM2 on functions, one round of two clients of two steps; perplexity falls."""
    flat = {
        "data.task": "causal-lm",
        "num-server-rounds": 1,
        "method": "fedlora",
        "adapter.rank": 4,
        "train.steps": 4,
        "strategy.fraction-train": 1.0,
        "data.max-length": 96,
        "data.validation-rows": 8,
        "data.test-rows": 8,
        "data.options": "generate = 2\nmax-new-tokens = 8",
        "run.dir": str(tmp_path),
        "run.name": "run",
    }
    facts = engine.run(flat, 2).facts
    run = tmp_path / "run"
    (begin,), (last,) = records(run, "start"), records(run, "round")
    assert last["perplexity"] < begin["perplexity"] < 100
    assert facts["model"] == "SmolLM2-135M-Instruct-Q4_1" and len(facts["samples"]) == 2
    card = (run / facts["exported"] / "README.md").read_text()
    assert "rounding to 4 bits" in card
