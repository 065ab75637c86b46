"""A node's own settings: what node-config may say, what a device does by it, and what the server is told."""

from __future__ import annotations

import csv
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from deployment import wait_for
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from runs_helper import CLIENTS, config, prepare

from fedara_flwr import client_app
from fedara_flwr.cli.reference import toml
from fedara_flwr.client.session import own_settings, pick_device, resident
from fedara_flwr.config import Settings
from fedara_flwr.data.docstrings import AREAS
from fedara_flwr.engine import InProcessGrid
from fedara_flwr.keys import ConfigError
from fedara_flwr.node import power
from fedara_flwr.node import settings as node_module
from fedara_flwr.node.guard import Guard
from fedara_flwr.node.settings import NodeSettings
from fedara_flwr.server import roster
from fedara_flwr.server.loop import RunFailed
from fedara_flwr.tasks import read_settings
from fedara_flwr.wire.records import says_busy

DOCS = Path(__file__).parents[2] / "docs" / "deploy-device.md"
ALL = {"num_server_rounds": 3, "method": "fedara-static", "strategy__fraction_train": 1.0}


def refused(node_config: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        NodeSettings.read(node_config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- the keys ------------------------------------------------------------------------------------------------------------
def test_nothing_needs_to_be_set():
    node = NodeSettings.read({})
    assert node == NodeSettings() and node.guard == Guard(None, 0.0, 0.0) and node.busy() == ""
    usual = read_settings({}).model.name
    assert node.backbones == {usual: usual}


def test_what_flower_and_the_engine_say_is_known():
    assert NodeSettings.read({"partition-id": 3, "num-partitions": 8, "engine": "inprocess"}).partition_id == 3


def test_every_key_stands_in_the_docs_with_its_default():
    text = DOCS.read_text()
    for field in NodeSettings.model_fields.values():
        if field.alias != "engine":
            default = "unset" if field.default is None else f"`{toml(field.default)}`"
            assert f"| `{field.alias}` | {default} |" in text, field.alias


@pytest.mark.parametrize(
    ("node_config", "words"),
    [
        ({"data-paht": "x"}, "node-config data-paht = 'x': there is no such key; did you mean 'node-config data-path'?"),
        ({"data-path": 7}, "node-config data-path = 7: input should be a valid string"),
        ({"device": "gpu"}, "node-config device = 'gpu': input should be 'auto', 'cpu' or 'cuda'"),
        ({"device": "cudda"}, "did you mean 'cuda'?"),
        ({"dtype": "float16"}, "node-config dtype = 'float16': input should be '', 'float32', 'bfloat16', 'int8' or 'int4'"),
        ({"threads": 1.5}, "node-config threads = 1.5: input should be a valid integer"),
        ({"threads": True}, "node-config threads = True: input should be a valid integer"),
        ({"max-memory-mb": -1}, "node-config max-memory-mb = -1: input should be greater than or equal to 0"),
        ({"validation": 1.0}, "node-config validation = 1.0: input should be less than 1"),
        ({"partition-id": 2, "num-partitions": 2}, "node-config partition-id = 2: without data-path allowed is below num-part"),
        ({"worker": "no"}, "node-config worker = 'no': input should be a valid boolean"),
        ({"busy-when": "test 'a"}, 'node-config busy-when = "test \'a": No closing quotation'),
        ({"busy-when": "no-such-command-at-all now"}, "node-config busy-when = 'no-such-command-at-all now': there is no such"),
    ],
)
def test_what_a_key_may_not_be(node_config, words):
    assert words in refused(node_config)


def test_the_list_of_backbones():
    node = NodeSettings.read({"models": " a/b = /data/b, /srv/c , d/e=,,"})
    assert node.backbones == {"a/b": "/data/b", "/srv/c": "/srv/c", "d/e": "d/e"}


def test_where_the_delta_s_pieces_lie(monkeypatch):
    monkeypatch.setenv("FLWR_HOME", "/flower")
    monkeypatch.setenv("HOME", "/me")
    assert str(NodeSettings.read({}).store) == "/flower/fedara-store"
    assert str(NodeSettings.read({"store-dir": "~/pieces"}).store) == "/me/pieces"


# -- what a device does by them --------------------------------------------------------------------------------------------
RUN = {"data.path": "/srv/d", "data.text-column": "t", "data.label-column": "l", "data.id-column": "who", "train.threads": 2}


def own(**node_config) -> Settings:
    node = NodeSettings.read({key.replace("_", "-"): value for key, value in node_config.items()})
    return own_settings(read_settings(RUN | {"data.client-validation": 0.25}), node, trusted=False)[0]


def test_the_run_decides_what_the_node_leaves_open_but_columns():
    settings = own(data_path="/data/mine.csv")
    assert (settings.data.text_column, settings.data.label_column, settings.data.pair_column) == ("text", "label", "")
    assert (settings.model.dtype, settings.train.threads, settings.data.client_validation) == ("auto", 2, 0.25)
    assert settings.data.id_column == ""  # all rows are this node's, whoever owned them


def test_the_node_decides_what_it_names():
    settings = own(
        data_path="/data/mine.csv", text_column="body", pair_column="re", label_column="team", dtype="bfloat16", threads=3
    )
    assert (settings.data.text_column, settings.data.pair_column, settings.data.label_column) == ("body", "re", "team")
    assert (settings.model.dtype, settings.train.threads) == ("bfloat16", 3)
    assert own(data_path="/data/mine.csv", validation=0.5).data.client_validation == 0.5
    small = own(data_path="/data/mine.csv", cache_mb=16, cache_disk_mb=0).train
    assert (small.cache_mb, small.cache_disk_mb, small.threads) == (16, 0, 2)
    assert own(data_path="/data/mine.csv", validation=0.0).data.client_validation == 0.0


def test_where_it_computes(monkeypatch):
    assert pick_device(NodeSettings(device="cpu")) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(NodeSettings()) == "cpu"
    with pytest.raises(ConfigError, match="node-config device = 'cuda': torch sees no GPU here, allowed are 'auto' and 'cpu'"):
        pick_device(NodeSettings(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device(NodeSettings()) == pick_device(NodeSettings(device="cuda")) == "cuda"
    assert pick_device(NodeSettings(engine="inprocess")) == "cpu"  # as under Ray
    assert pick_device(NodeSettings(engine="inprocess", device="cuda")) == "cuda"
    assert pick_device(NodeSettings(device="cpu")) == "cpu"


def test_a_model_s_number_type_is_its_node_s_own(tiny_bert):
    """The fingerprint that the server compares is the same; adapters and head stay float32."""
    sessions = []
    for dtype in ("float32", "bfloat16"):
        settings = read_settings({"model.name": str(tiny_bert), "data.path": "/srv/d"})
        node = NodeSettings.read({"models": str(tiny_bert), "dtype": dtype})
        sessions.append(resident(own_settings(settings, node, trusted=False)[0], tuple(AREAS)))
    plain, half = (session.adapted for session in sessions)
    assert plain.spec.fingerprint == half.spec.fingerprint
    assert {p.dtype for p in half.head} == {torch.float32}
    assert half.layers[0].base_layer.weight.dtype == torch.bfloat16


# -- not now -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("sh -c 'exit 0'", "busy-when says so"),
        ("sh -c 'exit 1'", ""),
        ("sh -c 'echo on battery; exit 1'", ""),
        ("sh -c 'echo on battery, 31 %; echo more; exit 0'", "on battery, 31 %"),
        ("sh -c 'echo hot >&2'", "hot"),
        ("sh -c 'exit 2'", "busy-when failed with exit code 2: "),
        ("sh -c 'kill -9 $$'", "busy-when failed with exit code -9: "),
        (
            f"{sys.executable} -c 'import no_such_module'",
            "busy-when failed with exit code 1: Traceback (most recent call last):",
        ),
        (r"printf '\033[31mred\377'", "?[31mred\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_exit_codes_of_busy_when(command, why):
    assert NodeSettings.read({"busy-when": command}).busy() == why


def test_a_command_that_says_much_is_cut():
    said = NodeSettings.read({"busy-when": "sh -c 'yes hot | head -c 1000000 | tr -d \"\\n\"'"}).busy()
    assert said == "hot" * 66 + "ho"


def test_a_command_that_does_not_end_is_ended(monkeypatch, tmp_path):
    """With what it started, which holds its output open."""
    monkeypatch.setattr(node_module, "BUSY_SECONDS", 0.5)
    pid = tmp_path / "pid"
    node = NodeSettings.read({"busy-when": f"sh -c 'sleep 600 & echo $! > {pid}; wait'"})
    assert node.busy() == "busy-when did not answer in 0.5 s"
    stat = Path(f"/proc/{pid.read_text().strip()}/stat")

    def gone() -> bool:
        try:
            return stat.read_text().split()[2] in "ZX"
        except OSError:
            return True

    wait_for(gone, 30)


def test_a_command_that_cannot_be_run(tmp_path):
    script = tmp_path / "broken"
    script.write_bytes(b"\x7fELF no program")
    script.chmod(0o755)
    assert NodeSettings.read({"busy-when": str(script)}).busy().startswith("busy-when cannot be run (")


class Moody(InProcessGrid):
    """Node `mine` is busy from the `first` time that it is asked to the `last`; what each kind of message met is kept."""

    def __init__(self, *args, mine, flag, first, last, **options):
        super().__init__(*args, **options)
        self.mine, self.flag, self.first, self.last, self.kinds = mine, flag, first, last, []
        self.contexts[mine].node_config["busy-when"] = f"sh -c 'test -e {flag} && echo hot'"

    def _call(self, message):
        kind = message.metadata.message_type
        if message.metadata.dst_node_id == self.mine and kind != "query.whoami":
            self.kinds.append(kind)
            self.flag.touch() if self.first <= len(self.kinds) <= self.last else self.flag.unlink(missing_ok=True)
        return super()._call(message)


def rounds(strategy):
    return [line for line in strategy.lines if line["type"] == "round"]


@pytest.mark.parametrize(
    ("first", "last", "missed", "kinds"),
    [
        (1, 1, 1, ["query.ready", "query.ready", "train", "train"]),
        (2, 3, 2, ["query.ready", "train", "query.ready", "query.ready", "train"]),
    ],
)
def test_a_busy_node_is_left_out_of_the_round_and_asked_again(tiny_bert, tmp_path, caplog, first, last, missed, kinds):
    strategy, grid = prepare(config(tiny_bert, **ALL), Moody, mine=1002, flag=tmp_path / "flag", first=first, last=last)
    with caplog.at_level(logging.WARNING, "fedara_flwr"):
        strategy.start(grid, strategy.initial_arrays(), 3)
    dropped = [[(drop["client"], drop["reason"], drop["detail"]) for drop in line["dropped"]] for line in rounds(strategy)]
    assert dropped == [[("2", "busy", "hot")]] * missed + [[]] * (3 - missed)
    assert [line["good"] for line in rounds(strategy)] == [CLIENTS - 1] * missed + [CLIENTS] * (3 - missed)
    assert grid.kinds == kinds
    assert strategy.roster.unfit == {} and "reply of client 2 dropped: busy (hot)" in caplog.text


ONE = {"strategy__min_train_nodes": 1, "strategy__min_available_nodes": 1}


def test_a_run_waits_while_all_nodes_are_busy(tiny_bert, tmp_path, monkeypatch):
    """They are asked again until one is not; a round without any is no failed one until then."""
    monkeypatch.setattr(roster, "PAUSE", 0.0)
    flat = config(tiny_bert, **ALL | {"num_server_rounds": 1}, **ONE)
    strategy, grid = prepare(flat, Moody, 1, mine=1000, flag=tmp_path / "flag", first=1, last=4)
    strategy.start(grid, strategy.initial_arrays(), 1)
    (line,) = rounds(strategy)
    assert line["good"] == 1 and line["dropped"] == [] and grid.kinds == ["query.ready"] * 5 + ["train"]


def test_a_run_does_not_wait_for_ever(tiny_bert, tmp_path, monkeypatch):
    """Three rounds without any node end it, as other failed rounds do; busy nodes are not called unfit."""
    monkeypatch.setattr(roster, "PAUSE", 99.0)
    flat = config(tiny_bert, **ALL, **ONE, strategy__node_timeout=60.0)
    strategy, grid = prepare(flat, Moody, 1, mine=1000, flag=tmp_path / "flag", first=1, last=99)
    with pytest.raises(RunFailed, match="3 rounds in a row"):
        strategy.start(grid, strategy.initial_arrays(), 3)
    assert [line["dropped"][0]["reason"] for line in rounds(strategy)] == ["busy"] * 3 and strategy.roster.unfit == {}


def test_reasons_cannot_forge_lines():
    content = RecordDict({"reply": ConfigRecord({"busy": "hot\n\x1b[31mround 7: all is well" + "x" * 10_000})})
    assert says_busy(content).isprintable() and len(says_busy(content)) == 300
    assert says_busy(RecordDict({"reply": ConfigRecord({"busy": 1})})) == ""


# -- what the server is told ---------------------------------------------------------------------------------------------------
def ask(context: Context, **question) -> ConfigRecord:
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    content = RecordDict({"ready": ConfigRecord({"labels": list(AREAS), **question})})
    return client_app.app(Message(content, 5, "query.ready"), context).content


def device(tmp_path: Path, model: Path, rows: list[tuple[str, str]], **node_config) -> Context:
    with (tmp_path / "own.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("body", "area"), *rows])
    own = {"client-key": "me", "data-path": str(tmp_path / "own.csv"), "text-column": "body", "label-column": "area"}
    own |= {"models": f"the/model={model}", **node_config}
    return Context(1, 5, own, RecordDict(), config(Path("the/model")))


ROWS = [(f"a text of number {i}", name) for i in range(5) for name in ("mail", "testing")]


def test_a_device_with_data_of_its_own(tiny_bert, tmp_path, caplog):
    context = device(tmp_path, tiny_bert, [*ROWS, ("spam", "junk"), ("", "mail")], validation=0.2)
    with caplog.at_level(logging.WARNING, "fedara_flwr"):
        answer = ask(context)
    assert "error" not in answer["ready"], answer["ready"]
    assert answer["metrics"]["num-examples"] == 8 and answer["ready"]["data"] == "own"
    assert "2 of 12 rows skipped: 1 with unknown labels ('junk' 1), 1 without text" in caplog.text
    assert "junk" not in str(answer)  # of the data itself nothing is told


def test_a_file_for_local_evaluation(tiny_bert, tmp_path):
    context = device(tmp_path, tiny_bert, ROWS)
    (tmp_path / "d").mkdir()
    (tmp_path / "own.csv").rename(tmp_path / "d" / "train.csv")
    (tmp_path / "d" / "test.csv").write_text("body,area\nlast words,mail\n")
    node = NodeSettings.read(context.node_config | {"data-path": str(tmp_path / "d")})
    for share, count in ((0.5, 1), (0.0, 0)):
        settings, path = own_settings(
            read_settings(context.run_config | {"data.client-validation": share}), node, trusted=False
        )
        data = resident(settings, tuple(AREAS)).client_data("me", 0, 1, path)
        assert (len(data.train), len(data.held_out)) == (10, count)


@pytest.mark.parametrize(
    ("node_config", "words"),
    [
        ({"text-colum": "body"}, "node-config text-colum = 'body': there is no such key"),
        ({"text-column": "txt"}, "own data: text-column: no such column; the node's log says more"),
        ({"models": "another/model"}, "node-config models = 'another/model': the run's model.name = 'the/model' is not among"),
        ({"models": "the/model=/no/such/folder"}, "'/no/such/folder': there is no such directory"),
        ({"max-memory-mb": 5.0}, r"node-config max-memory-mb = 5: this process took \d+ MB"),
        ({"device": "cuda"}, "node-config device = 'cuda': torch sees no GPU here"),
    ],
)
def test_why_a_device_cannot_train(tiny_bert, tmp_path, monkeypatch, node_config, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = str(ask(device(tmp_path, tiny_bert, ROWS, **node_config))["ready"]["error"])
    assert re.search(words, found) if "max" in words else words in found


def test_a_device_whose_settings_are_wrong_still_says_who_it_is():
    context = Context(1, 5, {"client-key": "me", "num-partitions": "many", "devise": "cpu"}, RecordDict(), {})
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    who = client_app.app(Message(RecordDict(), 5, "query.whoami"), context).content["whoami"]
    assert (who["client-key"], who["num-partitions"]) == ("me", 0)


def test_training_that_takes_too_much_memory_fails_that_node_alone(tiny_bert, monkeypatch):
    strategy, grid = prepare(config(tiny_bert, **ALL | {"num_server_rounds": 1}))
    grid.contexts[1003].node_config["max-memory-mb"] = 1000
    taken = iter([900.0, 950.0, 1234.4])  # when it is asked, before training and after it
    monkeypatch.setattr(power, "peak_memory", lambda: next(taken))
    strategy.start(grid, strategy.initial_arrays(), 1)
    (line,) = rounds(strategy)
    ((client, reason, detail),) = [(d["client"], d["reason"], d["detail"]) for d in line["dropped"]]
    assert (client, reason) == ("3", "error-2") and detail.endswith("max-memory-mb = 1000: this process took 1234 MB")
    assert line["good"] == CLIENTS - 1
