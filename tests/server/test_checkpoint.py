"""Nothing is lost when a run dies: checkpoints are whole or not there, a run that goes on ends as one that never stopped."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import some_fast
from runs_helper import CLIENTS, config, exported, prepare, stopped_in_round, turn_into_error, written

from fedara_flwr import engine
from fedara_flwr.adapters import precision
from fedara_flwr.client import session
from fedara_flwr.engine import InProcessGrid
from fedara_flwr.keys import ConfigError
from fedara_flwr.runs.directory import RunDirectory, read_facts
from fedara_flwr.runs.keeper import conclude_stopped, open_run
from fedara_flwr.server.checkpoint import BadCheckpoint, Checkpoints, decode, encode
from fedara_flwr.server.loop import RunFailed

METHODS = ["fedara", "legend", "federa", "flora", "fedex-lora", "hetlora", "slora", "full"]
OPTIONS = {"hetlora": "ranks = [1, 2, 4]", "flora": "ranks = [1, 2, 4]", "slora": "sparse-rounds = 0.5"}


def settings(model, folder, name, method="fedara", **more):
    own = {"strategy__options": OPTIONS[method]} if method in OPTIONS else {}
    return config(
        model,
        method=method,
        num_server_rounds=3,
        fedara__warmup_rounds=0,
        fedara__final_rounds=1,
        data__test=0.95,
        run__dir=str(folder),
        run__name=name,
        **own,
        **more,
    )


def assert_same_end(run: Path, undisturbed: Path) -> None:
    ours, theirs = exported(run), exported(undisturbed)
    assert set(ours) == set(theirs) and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    (mine, extra), (others, _) = written(run), written(undisturbed)
    assert mine == others and extra > 0
    facts = [read_facts(folder) for folder in (run, undisturbed)]
    assert facts[0]["mask"] == facts[1]["mask"] and facts[0]["test"] == facts[1]["test"]
    assert sum(facts[0]["bytes"].values()) == sum(facts[1]["bytes"].values()) + extra


@pytest.mark.parametrize("method", some_fast(METHODS, {"fedara", "slora", "flora"}))
def test_a_run_that_goes_on_ends_as_one_that_never_stopped(tiny_bert, tmp_path, monkeypatch, method):
    """Stopped after round 2: masks, clients' reports, deltas and what nodes hold of them are all in the checkpoint."""
    engine.run(settings(tiny_bert, tmp_path, "whole", method), CLIENTS)
    with stopped_in_round(monkeypatch, 3):
        engine.run(settings(tiny_bert, tmp_path, "cut", method), CLIENTS)
    (tmp_path / "cut" / "metrics.jsonl").open("a").write('{"type": "round", "rou')
    engine.run(settings(tiny_bert, tmp_path, "", method, run__resume="cut"), CLIENTS)
    assert_same_end(tmp_path / "cut", tmp_path / "whole")
    assert read_facts(tmp_path / "cut")["resumed"] == [2]


def test_going_on_in_another_number_type_is_said_and_kept(tiny_bert, tmp_path, monkeypatch, capsys):
    with stopped_in_round(monkeypatch, 3):
        engine.run(settings(tiny_bert, tmp_path, "run", model__dtype="auto"), CLIENTS)
    assert read_facts(tmp_path / "run")["dtypes"]["server"] == "float32"
    monkeypatch.setattr(precision, "fastest_type", lambda device: "bfloat16")
    session._resident.clear()
    engine.run(settings(tiny_bert, tmp_path, "", model__dtype="auto", run__resume="run"), CLIENTS)
    session._resident.clear()
    said = capsys.readouterr()
    assert "were computed in float32, from here on in bfloat16" in said.out + said.err
    types = read_facts(tmp_path / "run")["dtypes"]
    assert types["server"] == "bfloat16" and set(types["clients"]) == {"bfloat16"}
    (before,) = types["before"]
    assert (before["server"], set(before["clients"]), before["rounds"]) == ("float32", {"float32"}, 2)


KILLED = """
import os, signal, sys, json
from fedara_flwr import engine, files
flat, moment, count = json.loads(sys.argv[1]), sys.argv[2], 0
original = {"before": files.os.fsync, "during": files.os.replace, "after": files.os.replace}[moment]
def die(*args):
    global count
    path = os.readlink(f"/proc/self/fd/{args[0]}") if moment == "before" else str(args[0])
    if "round-000002" in path and path.endswith(".part"):
        if moment == "before":
            os.truncate(path, os.path.getsize(path) // 2)
        if moment == "after":
            original(*args)
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
setattr(files.os, "fsync" if moment == "before" else "replace", die)
engine.run(flat, int(sys.argv[3]))
"""


@pytest.mark.parametrize("moment, known", [pytest.param("before", 1, marks=pytest.mark.slow), ("during", 1), ("after", 2)])
def test_killed_while_a_checkpoint_is_written(tiny_bert, tmp_path, moment, known):
    """kill -9 with half of the file written, with all of it written but not renamed, and right after renaming."""
    engine.run(settings(tiny_bert, tmp_path, "whole"), CLIENTS)
    flat = json.dumps(settings(tiny_bert, tmp_path, "killed"))
    done = subprocess.run([sys.executable, "-c", KILLED, flat, moment, str(CLIENTS)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-1000:]
    engine.run(settings(tiny_bert, tmp_path, "", run__resume=str(tmp_path / "killed")), CLIENTS)
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
    assert read_facts(tmp_path / "killed")["resumed"] == [known]


def test_a_run_that_ends_early_keeps_its_last_round(tiny_bert, tmp_path, monkeypatch):
    """Also where it is not due: it goes on from there, and `fedara export` gives what the run left."""

    class Failing(InProcessGrid):
        def _call(self, message):
            reply = super()._call(message)
            if message.content.config_records.get("plan", {}).get("round", 0) == 2:
                turn_into_error(reply)
            return reply

    monkeypatch.setattr(engine, "InProcessGrid", Failing)
    more = {"run__checkpoint_every": 3, "run__export": "last", "strategy__max_failed_rounds": 1}
    with pytest.raises(RunFailed, match="1 rounds in a row"):
        engine.run(settings(tiny_bert, tmp_path, "run", **more), CLIENTS)
    run = tmp_path / "run"
    assert read_facts(run)["export"] == open_run(run).export == {"round": 2, "said": "round 2, the last: run.export = 'last'"}
    engine.run(settings(tiny_bert, tmp_path, "", run__resume="run", **more), CLIENTS)
    assert read_facts(run)["resumed"] == [2] and read_facts(run)["outcome"] == "completed"


@pytest.fixture
def saved(tiny_bert, tmp_path):
    """A finished run of three rounds; its checkpoints are of rounds 2 and 3."""
    return engine.run(settings(tiny_bert, tmp_path, "run", run__export="last"), CLIENTS).path


def damaged(path: Path, how: str) -> str:
    """Spoil a checkpoint; returns words that the warning must have."""
    content = path.read_bytes()
    if how == "cut off":
        path.write_bytes(content[: len(content) - 100])
        return "cut off or no checkpoint"
    if how == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        return "sha256 differs"
    path.write_bytes(b"")
    return "cut off or no checkpoint"


@pytest.mark.parametrize("how", ["cut off", "changed", "empty"])
def test_a_damaged_checkpoint_is_refused_and_the_older_one_taken(saved, caplog, how):
    newest = saved / "checkpoint" / "round-000003.safetensors"
    words = damaged(newest, how)
    found = open_run(saved)
    assert found.state.server_round == 2
    assert f"{newest.name} is not used" in caplog.text and words in caplog.text


def test_a_checkpoint_of_another_run_is_refused(saved, tiny_bert, tmp_path, caplog):
    engine.run(settings(tiny_bert, tmp_path, "other", seed=9), CLIENTS)
    newest = "checkpoint/round-000003.safetensors"
    shutil.copy(tmp_path / "other" / newest, saved / newest)
    found = open_run(saved)
    assert found.state.server_round == 2 and "it is another run's: its run is" in caplog.text
    (saved / "checkpoint" / "round-000002.safetensors").unlink()
    with pytest.raises(ConfigError, match="no checkpoint that can be used"):
        open_run(saved)


def test_state_survives_encoding(tiny_bert):
    """Every field, of a run with deltas, holdings and clients' reports."""
    strategy, grid = prepare(settings(tiny_bert, "/tmp", "x", "flora"))
    strategy.start(grid, strategy.initial_arrays(), 3)
    strategy.state.clients["3"] = {"uploads": [0.1, 1e-300], "rank": 2}
    state = strategy.state
    tensors, facts = encode(state)
    again = decode(strategy.spec, tensors, json.loads(json.dumps(facts)))
    assert {name: value for name, value in vars(again).items() if name not in ("arrays", "delta")} == {
        name: value for name, value in vars(state).items() if name not in ("arrays", "delta")
    }
    assert all(np.array_equal(again.arrays[part], state.arrays[part]) for part in state.arrays)
    assert again.delta.composed().digest == state.delta.composed().digest
    have = next(iter(state.holdings.values()))
    assert again.delta.fetch(have)[0] == state.delta.fetch(have)[0]
    facts["ranks"] = facts["ranks"][1:]
    with pytest.raises(BadCheckpoint, match="17 modules, the model has 18"):
        decode(strategy.spec, tensors, facts)


def test_the_last_two_are_kept_and_every_is_obeyed(tiny_bert, tmp_path):
    names = {}
    for every in (0, 1, 2):
        run = engine.run(
            settings(tiny_bert, tmp_path, f"every-{every}", run__export="last", run__checkpoint_every=every), CLIENTS
        ).path
        names[every] = sorted(int(file.stem[-6:]) for file in run.glob("checkpoint/*"))
    assert names == {0: [], 1: [2, 3], 2: [2, 3]}


def test_a_stopped_run_leaves_what_its_checkpoint_has(saved):
    shutil.rmtree(saved / "adapter")
    (saved / "checkpoint" / "round-000003.safetensors").unlink()
    conclude_stopped(saved)
    facts = read_facts(saved)
    assert facts["outcome"] == "stopped" and facts["rounds"] == 2 and facts["exported"] == "adapter"
    found = [json.loads(line) for line in (saved / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in found if line["type"] == "round"] == [1, 2] and found[-1]["outcome"] == "stopped"
    shutil.rmtree(saved / "checkpoint")
    conclude_stopped(saved)
    assert not saved.exists()


def test_what_a_run_may_not_go_on_with(saved, tiny_bert, tmp_path):
    def resume(clients=CLIENTS, **changes):
        flat = settings(tiny_bert, tmp_path, "", run__resume=str(saved)) | {"num-server-rounds": 4}
        named = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
        return engine.run(flat | named, clients)

    for changes, words in (
        ({"seed": 7}, "seed = 7: run.resume = .* was started with 42"),
        ({"num_server_rounds": 3}, "num-server-rounds = 3: .* has 3 rounds"),
        ({"run__resume": "nowhere"}, "not the folder of a run"),
        ({"clients": CLIENTS - 1}, r"client . has \d+ examples, it had \d+"),
    ):
        with pytest.raises(ConfigError, match=words):
            resume(**changes)
    held = RunDirectory.open(saved)
    with pytest.raises(ConfigError, match="another process is writing this run"):
        resume()
    held.close()
    directory = resume()  # one more round; the schedule is then the longer run's
    assert [line["round"] for line in directory.records("round")] == [1, 2, 3, 4]
    assert [line["outcome"] for line in directory.records("end")] == ["completed"]


def test_missing_lines_are_no_checkpoint_to_go_on_from(saved, tiny_bert, tmp_path):
    text = (saved / "metrics.jsonl").read_text()
    (saved / "metrics.jsonl").write_text(text[: len(text) // 2])
    with pytest.raises(ConfigError, match="lines are missing"):
        engine.run(settings(tiny_bert, tmp_path, "", run__resume=str(saved)) | {"num-server-rounds": 4}, CLIENTS)


def test_only_this_packages_identity_counts(saved):
    """A checkpoint says whose it is; a folder may be moved."""
    moved = saved.rename(saved.parent / "moved")
    found = open_run(moved)
    assert found.state.server_round == 3
    with pytest.raises(BadCheckpoint, match="another run's"):
        Checkpoints(moved / "checkpoint", {"run": "x"}).read(moved / "checkpoint/round-000003.safetensors", found.model.spec)
