"""Which round's model a run leaves: by hand, and in a whole run that is resumed, exported and damaged."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import MetricRecord
from runs_helper import CLIENTS, config, exported

from fedara_flwr import engine
from fedara_flwr.cli.exporting import export
from fedara_flwr.report.page import _figures
from fedara_flwr.report.read import read_run
from fedara_flwr.runs.directory import read_facts
from fedara_flwr.runs.keeper import open_run
from fedara_flwr.server.best import choose, main_metric, note_best
from fedara_flwr.server.loop import RoundLoop

NAN = float("nan")


def a_method(task="classification", kept=(), **run):
    """What choosing looks at of a method."""
    options = {"export": "best", "checkpoint_every": 1} | run
    data = SimpleNamespace(task=task)
    return SimpleNamespace(kept=frozenset(kept), settings=SimpleNamespace(run=SimpleNamespace(**options), data=data))


def played(method, values, solved=True):
    """The state after rounds with these values of the main metric, the first one before round 1; None = not measured."""
    name = main_metric(method).name
    state = SimpleNamespace(best={}, solved={"rows": 1} if solved else {}, server_round=0)
    for number, value in enumerate(values):
        state.server_round = number
        note_best(method, state, None if value is None else {name: value, "f": 1.0})
    return state


@pytest.mark.parametrize(
    ("task", "values", "solved", "best"),
    [
        ("classification", [0.1, 0.5, 0.7, 0.6], True, 2),
        ("classification", [0.1, 0.7, 0.7, 0.6], True, 2),  # of equal ones the later
        ("classification", [0.8, 0.5, 0.7, 0.6], True, 0),  # the solved head alone
        ("classification", [0.8, 0.5, 0.7, 0.6], False, 2),  # a drawn head has learnt nothing
        ("classification", [NAN, 0.5, NAN, float("inf")], True, 1),
        ("classification", [None, None, 0.2, None], True, 2),
        ("causal-lm", [3.0, 2.0, 1.0, 2.5], False, 2),  # the lower the better
        ("classification", [None, NAN], True, None),
    ],
)
def test_the_best_round_by_hand(task, values, solved, best):
    assert played(a_method(task), values, solved).best.get("round") == best


@pytest.mark.parametrize(
    ("method", "values", "said"),
    [
        (a_method(export="last"), [0.9, 0.5], "round 1, the last: run.export = 'last'"),
        (a_method(checkpoint_every=0), [0.9, 0.5], "round 1, the last: run.checkpoint-every = 0 keeps no other"),
        (
            a_method(kept=["B"]),
            [0.9, 0.5],
            "round 1, the last: each client keeps its own B, and the server cannot measure with it",
        ),
        (a_method(), [None, NAN], "round 1, the last: accuracy was never measured on validation data"),
        (a_method(), [0.5, 0.9], "round 1, the last and the best by accuracy on validation data, 0.900"),
    ],
)
def test_the_last_round_is_left_and_why(method, values, said):
    chosen = choose(None, method, state := played(method, values))
    assert chosen.said == said and chosen.state is state and chosen.facts == {"round": 1, "said": said}


def test_a_run_leaves_its_best_round_and_says_so(tiny_bert, tmp_path, monkeypatch, capsys):
    """Round 1 is the best of three, before slots die; a fourth is worse; then its checkpoint is damaged."""
    figures = [0.2, 0.75, 0.5, 0.5, 0.6]
    monkeypatch.setattr(RoundLoop, "_validate", lambda self, number, arrays: MetricRecord({"accuracy": figures[number]}))
    monkeypatch.setattr("fedara_flwr.runs.keeper.write_report", lambda path: path / "report.html")  # pictures take seconds
    base = {"run__dir": str(tmp_path), "fedara__warmup_rounds": 1, "data__test": 0.95, "data__test_rows": 40}
    flat = config(tiny_bert, num_server_rounds=3, run__name="run", run__checkpoint_every=2, **base)
    run = engine.run(flat, CLIENTS).path
    said, facts = "round 1 of 3, the best by accuracy on validation data, 0.750", read_facts(run)
    assert facts["export"] == {"round": 1, "said": said} and facts["rounds"] == 3
    assert f"({said})" in capsys.readouterr().out
    assert f"- Weights: of {said}\n" in (run / "adapter" / "README.md").read_text()
    assert ("model that is left", "round 1", said) in _figures(read_run(run))
    assert [int(file.stem[-6:]) for file in sorted(run.glob("checkpoint/*"))] == [1, 2, 3]
    saved = open_run(run)
    assert saved.state.server_round == 1 and facts["mask"] == saved.state.mask.to_bytes().hex()
    assert saved.state.mask.count == sum(facts["alive-per-module"]) > saved.method.final_budget
    assert facts["test"] == pytest.approx(saved.model.evaluate(saved.method.weights(saved.state), "test"))
    tensors, lines = exported(run), []
    again = export(run, "merged", say=lines.append)
    assert lines == [f"merged: {again} ({said})"] and f"- Weights: of {said}" in (again / "README.md").read_text()

    engine.run(flat | {"num-server-rounds": 4, "run.name": "", "run.resume": str(run)}, CLIENTS)
    assert read_facts(run)["export"]["said"] == "round 1 of 4, the best by accuracy on validation data, 0.750"
    assert [int(file.stem[-6:]) for file in sorted(run.glob("checkpoint/*"))] == [1, 3, 4]
    assert all(np.array_equal(tensors[name], values) for name, values in exported(run).items())

    (run / "checkpoint" / "round-000001.safetensors").write_bytes(b"")
    left = open_run(run)
    assert (
        left.state.server_round == 4
        and "best round's checkpoint round-000001.safetensors is not used" in capsys.readouterr().out
    )
    assert left.export["said"].startswith("round 4, the last: the checkpoint of round 1 cannot be used")
