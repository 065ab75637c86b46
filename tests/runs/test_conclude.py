"""How a run ends: its model is written before anything that may fail, and a folder that lacks what it needs is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest
from conftest import TASKS
from runs_helper import CLIENTS, config, exported
from test_output import save_model

from fedara_flwr import engine
from fedara_flwr.keys import ConfigError
from fedara_flwr.runs.directory import read_facts
from fedara_flwr.runs.keeper import conclude_stopped, open_run
from fedara_flwr.server.evaluate import ServerModel
from fedara_flwr.server.loop import RunFailed


@pytest.fixture
def flat(tmp_path, monkeypatch) -> dict:
    """Settings of a language model's run of two rounds, whose answers are compared at its end."""
    monkeypatch.setattr("fedara_flwr.runs.keeper.write_report", lambda path: path / "report.html")  # pictures take seconds
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    model = save_model(tmp_path / "llama", "llama", tie_word_embeddings=True, max_position_embeddings=96)
    rows = [{"prompt": f"what is number {i}?", "completion": ("one", "two", "three")[i % 3]} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"data__task": "causal-lm", "data__options": "generate = 2", "data__path": str(tmp_path / "rows.jsonl")}
    shares = {"data__partition": "iid", "data__test": 0.1, "data__validation": 0.1, "data__max_length": 48}
    base = {"method": "fedlora", "num_server_rounds": 2, "model__dtype": "float32"}
    return config(model, run__dir=str(tmp_path), run__name="run", **more, **shares, **base)


def break_at(monkeypatch, owner: object, name: str, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(owner, name, fail)


def ends(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["type"] == "end"]


def test_a_run_whose_answers_fail_keeps_its_model(flat, tmp_path, monkeypatch, capsys):
    """The test before them is kept, too; everything is shown, and the one line comes last. It can be done again."""
    line = "all rounds are done and adapter/ is written, but not its results: RuntimeError: out of memory at the answers"
    with monkeypatch.context() as patch, pytest.raises(RunFailed) as error:
        break_at(patch, type(TASKS["causal-lm"]), "samples", RuntimeError("out of memory\nat the answers"))
        engine.run(flat, CLIENTS)
    assert str(error.value) == line
    run = tmp_path / "run"
    facts, (end,) = read_facts(run), ends(run)
    assert facts["outcome"] == end["outcome"] == "failed" and facts["reason"] == line and facts["rounds"] == 2
    assert facts["test"]["loss"] == end["test-loss"] and facts["exported"] == "adapter" and "samples" not in facts
    assert exported(run) and "of 2 (`failed`, " in (run / "adapter" / "README.md").read_text()
    said = [shown.split(":")[0] for shown in capsys.readouterr().out.splitlines()]
    assert [word for word in said[-6:] if "modelled" not in word] == ["test", "sent", "adapter", "report", "run directory"]
    assert f"testing the model of round {facts['export']['round']}" in said
    again = engine.run({**flat, "run.name": "", "run.resume": str(run)}, CLIENTS)
    assert again.facts["outcome"] == "completed" and again.facts["reason"] == "" and len(again.facts["samples"]) == 2
    assert again.facts["test"] == facts["test"] and len(ends(run)) == 1


def test_a_run_whose_test_fails_keeps_its_model(flat, tmp_path, monkeypatch):
    evaluate = ServerModel.evaluate

    def fail(self: ServerModel, weights: object, split: str = "validation") -> dict[str, float]:
        if split == "test":
            raise ValueError("no rows")
        return evaluate(self, weights, split)

    monkeypatch.setattr(ServerModel, "evaluate", fail)
    with pytest.raises(RunFailed, match="but not its results: ValueError: no rows"):
        engine.run(flat, CLIENTS)
    facts = read_facts(tmp_path / "run")
    assert facts["outcome"] == "failed" and facts["test"] == {} and exported(tmp_path / "run")
    assert "The model was not tested." in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_a_model_that_cannot_be_written(flat, tmp_path, monkeypatch):
    """Why the rounds ended is not forgotten over it."""
    break_at(monkeypatch, ServerModel, "export", OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space"):
        engine.run(flat, CLIENTS)
    why = "its model could not be written: OSError: [Errno 28] No space left on device"
    assert {name: read_facts(tmp_path / "run")[name] for name in ("outcome", "reason")} == {"outcome": "failed", "reason": why}
    with pytest.raises(OSError, match="No space"):
        conclude_stopped(tmp_path / "run")
    assert read_facts(tmp_path / "run")["reason"] == f"stopped by the user; {why}"


def test_a_card_that_cannot_be_written_fails_no_run(flat, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fedara_flwr.runs.keeper.write_card", lambda *_: 1 // 0)
    assert engine.run(flat, CLIENTS).facts["outcome"] == "completed" and exported(tmp_path / "run")
    assert "no model card (ZeroDivisionError: " in capsys.readouterr().out


@pytest.mark.parametrize("every", [0, 1])
def test_ctrl_c_at_the_answers_keeps_the_model(flat, tmp_path, monkeypatch, every):
    """With and without checkpoints."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_at(patch, type(TASKS["causal-lm"]), "samples", KeyboardInterrupt())
        engine.run(flat | {"run.checkpoint-every": every}, CLIENTS)
    run = tmp_path / "run"
    before = exported(run)
    conclude_stopped(run)
    facts, after = read_facts(run), exported(run)
    assert (facts["outcome"], facts["reason"], facts["rounds"]) == ("stopped", "stopped by the user", 2)
    assert before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)
    assert (run / "adapter" / "README.md").exists()


def test_a_merged_model_is_tested_as_it_was_trained(tiny_bert, tmp_path, monkeypatch):
    """It is written first, which leaves the resident model merged."""
    monkeypatch.setattr("fedara_flwr.runs.keeper.write_report", lambda path: path / "report.html")
    own = {"method": "full", "num_server_rounds": 1, "train__steps": 4}
    run = engine.run(config(tiny_bert, run__dir=str(tmp_path), run__name="run", **own), CLIENTS)
    saved = open_run(run.path)
    fresh = ServerModel(saved.model.settings)
    expected = fresh.evaluate(saved.method.weights(saved.state), "test")
    assert run.facts["exported"] == "model" and run.facts["test"] == pytest.approx(expected, abs=1e-6)


# -- opening ------------------------------------------------------------
@pytest.mark.parametrize("content, missing", [({}, "labels"), ({"labels": 3}, "labels"), ({"labels": ["a", "b"]}, "id")])
def test_facts_that_lack_what_opening_needs(flat, tmp_path, content, missing):
    run = engine.run(flat, CLIENTS).path
    copy = shutil.copytree(run, tmp_path / "copy")
    file = copy / "federated.json"
    if "labels" in content and isinstance(content["labels"], list):
        content = content | {"labels": read_facts(run)["labels"]}
    file.write_text(json.dumps(content))
    line = f"{file}: it has no {missing!r} as a run writes it, the run cannot be opened"
    with pytest.raises(ConfigError) as error:
        open_run(copy)
    assert str(error.value) == line
    with pytest.raises(ConfigError, match="it has no 'id' as a run writes it"):
        engine.run({**flat, "run.name": "", "run.resume": str(copy), "num-server-rounds": 3}, CLIENTS)
