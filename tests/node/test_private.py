"""What a curious server with honest code learns of a device's own data, and what an error tells of it."""

from __future__ import annotations

import json
import logging
import re
import stat
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from runs_helper import config, prepare
from test_node import ALL, ROWS, ask, device, rounds

from fedara_flwr import client_app
from fedara_flwr.client.session import own_settings
from fedara_flwr.client.train import ClientData
from fedara_flwr.data.docstrings import AREAS
from fedara_flwr.data.files import read_hub
from fedara_flwr.keys import ConfigError, read_options
from fedara_flwr.node.settings import NodeSettings
from fedara_flwr.node.told import kind
from fedara_flwr.tasks import Encoded, read_settings
from fedara_flwr.training import LocalTraining

SECRET = "Jane Doe, HIV+"


# -- what is asked -----------------------------------------------------------------------------------------------------
def test_columns_are_the_device_s_own(tiny_bert, tmp_path):
    """Whatever the run calls its own, also among its task's options."""
    context = device(tmp_path, tiny_bert, [])
    (tmp_path / "own.csv").write_text("text,label,ill\n" + "".join(f"{text},{name},yes\n" for text, name in ROWS))
    context.node_config |= {"text-column": "text", "label-column": "label"}
    for key, value in (("data.text-column", "label"), ("data.label-column", "ill"), ("data.pair-column", "ill")):
        context.run_config[key] = value
    assert ask(context)["metrics"]["num-examples"] == 10
    node = NodeSettings.read({"data-path": "x.csv", "data-options": "category_column = 'kind'"})
    run = {
        "data.task": "causal-lm",
        "data.options": "answer-column = 'ill'\nsystem = 'Härte \U0001f600'",
        "data.label-column": "ill",
    }
    run["model.name"] = next(iter(node.backbones))
    data = own_settings(read_settings(run), node, trusted=False)[0].data
    options = {"system": "Härte \U0001f600", "category-column": "kind"}
    assert data.label_column == "label" and read_options("data.options", data.options) == options


def test_labels_are_those_first_asked_for(tiny_bert, tmp_path):
    context = device(tmp_path, tiny_bert, [*ROWS, *[("ill", "HIV+")] * 9])
    assert ask(context)["metrics"]["num-examples"] == 10
    for labels in (["HIV+", "x"], list(AREAS)[::-1], [*AREAS, "HIV+"]):
        answer = ask(context, labels=labels)
        assert "other labels than this node was first asked for" in str(answer["ready"]["error"])
        assert answer["metrics"]["num-examples"] == 0
    assert ask(context)["metrics"]["num-examples"] == 10


def test_a_device_may_say_for_which_labels_it_answers(tiny_bert, tmp_path):
    context = device(tmp_path, tiny_bert, [*ROWS, *[("ill", "HIV+")] * 9], labels=",".join(reversed(AREAS)))
    assert ask(context)["metrics"]["num-examples"] == 10
    context.state = RecordDict()
    assert "the run's labels are not those of node-config labels" in str(ask(context, labels=["HIV+", "x"])["ready"]["error"])


def test_few_rows_are_not_told(tiny_bert, tmp_path):
    context = device(tmp_path, tiny_bert, [*ROWS[:3], *[("ill", "HIV+")] * 9])
    answer = ask(context)
    assert answer["ready"]["error"] == "fewer than 5 examples (node-config examples-least)" and "HIV" not in str(answer)
    assert answer["metrics"]["num-examples"] == 0
    context.node_config["examples-least"] = 3
    assert ask(context)["metrics"]["num-examples"] == 3
    rows = {number: Encoded([[1]] * number, [0] * number) for number in (0, 4, 5)}
    held = [len(ClientData(rows[5], rows[number]).at_least(5).held_out) for number in rows]
    assert held == [0, 0, 5] and len(ClientData(rows[4], rows[5]).at_least(5).train) == 0


# -- errors ------------------------------------------------------------------------------------------------------------
def written(folder: Path, name: str, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return str(folder if name == "train.csv" else folder / name)


GOOD = "body,area\n" + "".join(f"{text},{name}\n" for text, name in ROWS)
HUB = "---\nconfigs:\n- config_name: default\n  data_files: own.jsonl\n"
NUMBERS = "dataset_info:\n  features:\n  - name: body\n    dtype: int64\n  - name: area\n    dtype: string\n"


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("own.csv", f'{SECRET.replace(", ", ",")}\n"{SECRET}",mail\n', "text-column: no such column"),
        ("own.csv", GOOD + f"{SECRET}, and more, of it\n", "line 12 has 4 fields, 2 are named"),
        ("own.csv", f"{SECRET},{SECRET}\n" + GOOD, "two columns have one name"),
        ("own.csv", "", "it is empty"),
        ("own.jsonl", f'{{"body": "{SECRET}"\n', "line 1 is no JSON"),
        ("own.jsonl", f'{{"body": {{"{SECRET}": 1}}, "area": "mail"}}\n', "text-column: it holds objects"),
        ("own.json", f'"{SECRET}"', "neither a list of objects"),
        ("own.parquet", SECRET, "cannot be read"),
        ("own.xyz", SECRET, "an ending that is not known"),
        ("absent.csv", "", ""),
    ],
)
def test_an_error_about_own_data_is_a_kind_and_a_place(tiny_bert, tmp_path, caplog, name, text, told):
    context = device(tmp_path, tiny_bert, ROWS)
    place = written(tmp_path / "Jane Doe", name, text) if told else str(tmp_path / "Jane Doe")
    context.node_config["data-path"] = place
    with caplog.at_level(logging.INFO, "fedara_flwr"):
        answer = ask(context)
    error = str(answer["ready"]["error"])
    assert error.startswith("own data: ") and told in error and error.endswith("; the node's log says more")
    assert not any(word in str(answer) for word in ("Jane", "Doe", "HIV"))
    assert caplog.text.count("node-config") == 1  # the device's own words


def copy_of_hub(tmp_path: Path, rows: list[tuple[str, str]], features: str = "") -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "README.md").write_text(f"{HUB}{features}---\n")
    (folder / "own.jsonl").write_text("".join(json.dumps({"body": body, "area": area}) + "\n" for body, area in rows))
    (folder / "own.jsonl").chmod(0o600)
    return folder


def test_what_a_reader_says_stays_here(tiny_bert, tmp_path, caplog):
    context = device(tmp_path, tiny_bert, ROWS)
    context.node_config["data-path"] = str(copy_of_hub(tmp_path, [("1", "mail"), (SECRET, "mail")], NUMBERS))
    with caplog.at_level(logging.INFO, "fedara_flwr"):
        answer = ask(context)
    assert "own data: " in str(answer["ready"]["error"]) and "HIV" not in str(answer)
    assert SECRET in caplog.text


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, f"Failed to open local file '{SECRET}.csv'"), "FileNotFoundError (No such file or directory)"),
        (OSError(10**20, SECRET), "OSError"),
        (OSError(SECRET), "OSError"),
    ],
)
def test_the_system_s_own_words_alone_leave(error, said):
    """pyarrow puts names of files into `strerror`."""
    assert kind(error) == said


def test_no_copy_of_a_device_s_rows_is_left(tiny_bert, tmp_path, monkeypatch):
    """The library `datasets` copies what it reads of a folder that is a copy of a Hub repository, readable for all."""
    cache, home = tmp_path / "cache", tmp_path / "home"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("FLWR_HOME", str(home))
    context = device(tmp_path, tiny_bert, ROWS)
    context.node_config["data-path"] = str(copy_of_hub(tmp_path, ROWS))
    assert ask(context)["metrics"]["num-examples"] == 10
    assert [file for folder in (cache, home) for file in folder.rglob("*") if file.is_file()] == []
    read_hub(context.node_config["data-path"], "", "data.path")  # a simulation's copy is there for its other processes
    assert not list(cache.rglob("*.arrow")) and list(home.rglob("*.arrow"))
    assert [(folder.name, stat.S_IMODE(folder.stat().st_mode)) for folder in home.iterdir()] == [("fedara-cache", 0o700)]


def query(kind: str, context: Context, content: RecordDict) -> Message:
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    return client_app.app(Message(content, 5, kind), context)


def test_sums_are_those_first_asked_for(tiny_bert, tmp_path):
    """By those of 9 and of 10 rows, a server would know the features of the one between them."""
    context = device(tmp_path, tiny_bert, ROWS)
    ask(context)

    def sums(**more):
        question = {"seed": 1, "rows": 0, "up": "float32", "scatter": False, **more}
        return query("query.statistics", context, RecordDict({"statistics": ConfigRecord(question)})).content

    first = sums()["sums"]
    for more in ({"rows": 9}, {"seed": 2}, {"scatter": True}, {"up": "float16"}, {"x": 1}):
        assert sums(**more)["statistics"]["refused"] == "the run asks for other sums than it first did"
    assert sums()["sums"] == first


@pytest.mark.parametrize("kind", ["train", "evaluate", "query.statistics", "query.ready"])
def test_what_a_handler_raises_leaves_without_its_words(tiny_bert, tmp_path, monkeypatch, caplog, kind):
    """Of whatever code: a task's, torch's, a package's."""
    context = device(tmp_path, tiny_bert, ROWS)
    ask(context)

    def fails(*args, **options):
        raise KeyError(SECRET)

    monkeypatch.setattr("fedara_flwr.client.session.Session.set_delta", fails)
    monkeypatch.setattr("fedara_flwr.client_app.receive", fails)
    asked = {"labels": list(AREAS), "calibrate-rank": 1, "calibrate-batch": 1}
    record = {"statistics": {"seed": 1, "rows": 0, "up": "float32", "scatter": False}, "ready": asked}
    content = RecordDict({name: ConfigRecord(values) for name, values in record.items()})
    with caplog.at_level(logging.INFO, "fedara_flwr"):
        try:
            said = str(query(kind, context, content).content)
        except Exception as error:
            said = f"{error!r} {error}"
    assert "KeyError" in said and "HIV" not in said, said
    assert SECRET in caplog.text


# -- what a plan may ask -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"steps": 2**63}, "max-steps = 10000: the server asks for 9.22337e+18"),
        ({"steps": 0, "epochs": 101}, "max-epochs = 100: the server asks for 101"),
        ({"steps": 0, "epochs": 100, "batch-size": 1}, "max-steps = 10000: the server asks for 20000"),
        ({"batch-size": 1025}, "max-batch = 1024: the server asks for 1025"),
        ({"learning-rate": 1e30}, "max-rate = 1: the server asks for 1e+30"),
        ({"learning-rate": 0.1, "e-lr-factor": 11.0}, "max-rate = 1: the server asks for 1.1"),
        ({"head-learning-rate": 1.5}, "max-rate = 1: the server asks for 1.5"),
    ],
)
def test_a_plan_that_asks_for_too_much_is_refused(plan, words):
    with pytest.raises(ConfigError, match=re.escape(f"node-config {words}")):
        NodeSettings().check_plan(LocalTraining(**plan), 200)
    node = NodeSettings(max_steps=2**63, max_epochs=200, max_batch=2000, max_rate=1e30)
    node.check_plan(LocalTraining(**plan), 200)
    NodeSettings().check_plan(LocalTraining(), 0)


def test_a_device_refuses_such_a_plan_and_ends_one_that_takes_too_long(tiny_bert, tmp_path, monkeypatch):
    strategy, grid = prepare(config(tiny_bert, **ALL | {"num_server_rounds": 2, "data.name": "docstrings"}))
    monkeypatch.setattr(client_app, "in_simulation", lambda context: False)
    for context in grid.contexts.values():
        context.node_config["models"] = str(tiny_bert)
    for node_id, key, value in ((1000, "max-steps", 1), (1001, "max-rate", 1e-9), (1002, "max-seconds", 1e-9)):
        grid.contexts[node_id].node_config[key] = value
    strategy.start(grid, strategy.initial_arrays(), 1)
    (line,) = rounds(strategy)
    details = {drop["client"]: drop["detail"] for drop in line["dropped"]}
    assert line["good"] == 3 and "max-steps = 1: the server asks for 2" in details["0"] and "max-rate" in details["1"]
    assert "node-config max-seconds = 1e-09: the round takes longer, 1 of 2 steps are done" in details["2"]


def test_a_run_cannot_have_any_number_of_threads(tiny_bert, tmp_path):
    context = device(tmp_path, tiny_bert, ROWS)
    context.run_config["train.threads"] = 100_000
    assert "the run's train.threads = 100000" in str(ask(context)["ready"]["error"])
