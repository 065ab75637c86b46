"""`fedara deploy nodes` and `unregister` on folders made here, with a flwr.sh that answers as Flower's does."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest
from test_deploy import fedara

from fedara_flwr.cli.deploy import nodes
from fedara_flwr.report.read import read_run

DOWN = {"success": False, "error-message": "Connection to the SuperLink is unavailable. Please check your network\n"}
LISTED = [
    {"node-id": "11", "status": "online", "offline-at": "N/A"},
    {"node-id": "12", "status": "offline", "offline-at": "2026-01-02 03:04:05Z"},
    {"node-id": "13", "status": "registered", "offline-at": "N/A"},
    {"node-id": "14", "status": "unregistered", "offline-at": "N/A"},
    {"node-id": "15", "status": "online", "offline-at": "N/A"},
]


@pytest.fixture
def server(tmp_path) -> Path:
    """A server's folder: attic (once under another key), barn and cellar are registered, roof is not, 15 was by hand."""
    folder = tmp_path / "a server, 'one'"
    (folder / "nodes").mkdir(parents=True)
    for name in ("attic", "barn", "cellar", "roof"):
        (folder / "nodes" / f"{name}.pub").write_text(f"ecdsa KEY{name} {name}\n")
    (folder / "home/runs").mkdir(parents=True)
    (folder / "home/registered").write_text("14 attic old\n11 attic KEYattic\n12 barn KEYbarn\n13 cellar KEYcellar\ncut\n")
    answers(folder, {"success": True, "nodes": LISTED})
    return folder


def answers(folder: Path, answer: object) -> None:
    """flwr.sh says so, and notes what it was asked."""
    text = shlex.quote("Listing\n" + json.dumps(answer, indent=2))
    (folder / "flwr.sh").write_text(f'here=$(dirname -- "$0")\necho "$*" >>"$here/asked"\nprintf "%s\\n" {text}\n')


def run_of(folder: Path, name: str, rounds: int, seconds: float) -> None:
    """A run in which attic always replies, barn failed last and the time before, and cellar failed once and then was busy."""
    path = folder / "home/runs" / name
    path.mkdir()
    lines = [{"type": "client", "round": 0, "client": "attic"}]
    for number in range(1, rounds + 1):
        dropped = (
            [{"client": "barn", "reason": "error-5" if number == rounds else "timeout", "detail": ""}] if number > 1 else []
        )
        dropped += [{"client": "cellar", "reason": "norm" if number == 1 else "busy", "detail": ""}]
        sitting = ["barn"] if number == rounds else []
        lines.append({"type": "round", "round": number, "dropped": dropped, "sitting-out": sitting})
        lines += [{"type": "client", "round": number, "client": name} for name in ("attic", *(["barn"] if number == 1 else []))]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "federated.json").write_text(json.dumps({"name": name, "outcome": "completed"}))
    os.utime(path / "metrics.jsonl", (seconds, seconds))


def test_a_line_for_each_node(server):
    run_of(server, "newest", 3, 2000)
    run_of(server, "before", 1, 1000)
    code, text = fedara("nodes", str(server))
    assert code == 0
    rows = [tuple(part.strip() for part in line.split("  ") if part.strip()) for line in text.splitlines()]
    assert rows == [
        ("name", "id", "state", "last seen", "rounds", "strikes"),
        ("attic", "11", "online", "now", "3 of 3", "0"),
        ("barn", "12", "offline", "2026-01-02 03:04:05Z", "1 of 3", "2 (error-5), sits out"),
        ("cellar", "13", "registered", "never", "0 of 3", "1 (norm)"),
        ("?", "15", "online", "now", "-", "-"),
        ("roof", "-", "not registered: sh register.sh", "-", "-", "-"),
        ("?: not registered by this folder's register.sh, so its name is not known here",),
        ("rounds and strikes: run newest, completed",),
    ]


def test_a_key_s_file_with_blanks_in_its_name(server):
    (server / "nodes/my laptop.pub").write_text("ecdsa KEYlaptop laptop\n")
    (server / "home/registered").write_text("11 my laptop KEYlaptop\n")
    assert nodes.recorded(server) == [("11", "my laptop", "KEYlaptop")]


def test_before_any_run(server):
    code, text = fedara("nodes", str(server))
    assert code == 0 and text.endswith("no run has been yet\n") and "attic   11  online" in text


def test_a_reply_that_counts_ends_a_row_of_failures(server):
    run_of(server, "one", 3, 1000)
    run = read_run(server / "home/runs/one")
    run.clients.append({"type": "client", "round": 3, "client": "cellar"})
    assert nodes.strikes(run, "cellar") == "0" and nodes.strikes(run, "nobody") == "0"


@pytest.mark.parametrize("command", [["nodes"], ["unregister", "attic"]])
def test_a_superlink_that_is_down_is_one_line(server, command):
    answers(server, DOWN)
    code, text = fedara(*command, str(server))
    assert code == 1 and text == "error: the SuperLink does not answer: is `sh start.sh` running on this server?\n"


@pytest.mark.parametrize("answer", [{"success": False, "error-message": "what\n\x1b[31mit says"}, ["no", "object"], None])
def test_an_answer_that_cannot_be_is_one_line(server, answer):
    answers(server, answer)
    code, text = fedara("nodes", str(server))
    assert code == 1 and text.startswith("error: flwr supernode list: ") and text.count("\n") == 1 and "\x1b" not in text


def test_a_folder_of_no_server(tmp_path):
    code, text = fedara("nodes", str(tmp_path))
    assert code == 1 and "allowed is the folder server" in text


@pytest.mark.parametrize("who, node", [("attic", "11"), ("12", "12"), ("15", "15")])
def test_a_node_is_unregistered_by_name_or_id(server, who, node):
    code, text = fedara("unregister", who, str(server))
    assert code == 0 and f"unregistered ({node})" in text
    assert (server / "asked").read_text().splitlines()[-1] == f"supernode unregister {node} site --format json"
    assert (server / "nodes/attic.pub").exists() == (who != "attic") == (not (server / "nodes/attic.unregistered").exists())


@pytest.mark.parametrize(
    "who, words", [("atic", "did you mean 'attic'?"), ("14", "no such node"), ("?", "no such node"), ("", "no")]
)
def test_nobody_is_unregistered_by_mistake(server, who, words):
    code, text = fedara("unregister", who, str(server))
    assert code == 1 and words in text and "unregister" not in (server / "asked").read_text()


def test_a_name_that_two_nodes_have_is_refused(server):
    with (server / "home/registered").open("a") as file:
        file.write("15 attic KEYother\n")
    code, text = fedara("unregister", "attic", str(server))
    assert code == 1 and "2 nodes are registered" in text and "11, 15" in text
