"""Runs that end before their last round: early stopping, `should_stop`, a signal, a SuperLink that says so."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import pytest
from flwr.app import MetricRecord
from runs_helper import CLIENTS, config, prepare

from fedara_flwr import engine, server_app
from fedara_flwr.engine import InProcessGrid
from fedara_flwr.flower import RunNotRunningException
from fedara_flwr.keys import ConfigError
from fedara_flwr.report.page import _outcome
from fedara_flwr.report.read import read_run
from fedara_flwr.runs.directory import read_facts
from fedara_flwr.server.loop import RoundLoop
from fedara_flwr.server.stopping import Interrupted, note_gain, signals_raise, why_stop

NAN = float("nan")


def some_settings(task="classification", patience=2, threshold=0.0):
    run = SimpleNamespace(early_stopping_patience=patience, early_stopping_threshold=threshold)
    return SimpleNamespace(run=run, data=SimpleNamespace(task=task))


@pytest.mark.parametrize(
    ("settings", "values", "last", "best"),
    [
        (some_settings(), [0.1, 0.5, 0.4, 0.5, 0.9], 3, 3),  # as good is no gain, and the best round is the later one
        (some_settings(), [0.1, 0.5, 0.4, 0.6, 0.5], None, 3),
        (some_settings(threshold=0.05), [0.1, 0.5, 0.53, 0.54, 0.9], 3, 3),  # over the best before, not over the last gain
        (some_settings("causal-lm"), [9.0, 3.0, 2.0, 2.5, 2.1], 4, 2),  # the lower the better
        (some_settings(patience=0), [0.5, 0.4, 0.3, 0.2], None, 0),
        (some_settings(patience=3), [NAN, 0.5, NAN, None, NAN, 0.5], 5, 5),  # what was not measured says nothing
        (some_settings(), [NAN, NAN], 1, None),
    ],
)
def test_when_a_run_stops_by_hand(settings, values, last, best):
    name = "perplexity" if settings.data.task == "causal-lm" else "accuracy"
    state = SimpleNamespace(stopping={}, solved={"rows": 1}, server_round=0, failed_rounds=0)
    for number, value in enumerate(values):
        state.server_round = number
        note_gain(settings, state, None if value is None else {name: value})
        if said := why_stop(settings, state):
            break
    where = "" if best is None else f"; best round {best}"
    expected = f"stopped after round {last}: no gain of {name} in {settings.run.early_stopping_patience} evaluations{where}"
    assert said == ("" if last is None else expected)
    assert state.stopping.get("round") == best


def test_rounds_that_change_nothing_are_not_counted():
    """Nor is a drawn head, which has learnt nothing."""
    state = SimpleNamespace(stopping={}, solved={}, server_round=0, failed_rounds=0)
    note_gain(some_settings(), state, {"accuracy": 0.9})
    assert state.stopping == {}
    state.server_round, state.failed_rounds = 1, 1
    note_gain(some_settings(), state, {"accuracy": 0.1})
    assert state.stopping == {}


FIGURES = [0.2, 0.75, 0.5, 0.6, 0.7, 0.8]


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.setattr(RoundLoop, "_validate", lambda self, number, arrays: MetricRecord({"accuracy": FIGURES[number]}))
    monkeypatch.setattr("fedara_flwr.runs.keeper.write_report", lambda path: path / "report.html")  # pictures take seconds


def test_a_run_that_stops_early_says_so_everywhere(tiny_bert, tmp_path, figures, capsys):
    """Its budgets are those of all planned rounds; it goes on with more patience alone, and then the count is kept."""
    changes = {"run__dir": str(tmp_path), "run__checkpoint_every": 2, "data__test": 0.95, "data__test_rows": 40}
    changes |= {"data__client_validation": 0.3}
    flat = config(tiny_bert, num_server_rounds=5, run__name="run", run__early_stopping_patience=2, **changes)
    run = engine.run(flat, CLIENTS).path
    said, facts = "stopped after round 3: no gain of accuracy in 2 evaluations; best round 1", read_facts(run)
    assert capsys.readouterr().out.splitlines().count(said) == 1
    assert facts["outcome"] == "completed" and facts["reason"] == said and facts["rounds"] == 3 and facts["test"]
    assert facts["export"]["round"] == 1 and _outcome(read_run(run)) == f"completed: {said}"
    assert f"- Rounds: 3 of 5 (`{said}`)\n" in (run / "adapter" / "README.md").read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["stopped-early"] == said and lines[-1]["rounds"] == 3
    assert [line["round"] for line in lines if line["type"] == "client-evaluation"] == [3]

    engine.run(flat | {"run.name": "whole", "run.early-stopping-patience": 0}, CLIENTS)
    whole = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    alive = [[line["alive"] for line in some if line["type"] == "round"] for some in (lines, whole)]
    assert alive[0] == alive[1][:3] and len(alive[1]) == 5

    again = flat | {"run.name": "", "run.resume": str(run)}
    with pytest.raises(ConfigError, match=r"run.early-stopping-patience = 2: .* 2 evaluations .* a higher number, or 0"):
        engine.run(again, CLIENTS)
    engine.run(again | {"run.early-stopping-patience": 3}, CLIENTS)
    assert read_facts(run)["reason"] == said.replace("round 3", "round 4").replace("in 2", "in 3")
    engine.run(again | {"run.early-stopping-patience": 0}, CLIENTS)
    assert read_facts(run)["reason"] == "" and read_facts(run)["rounds"] == 5 and read_facts(run)["export"]["round"] == 5


def test_clients_that_keep_a_part_cannot_be_stopped_early(tiny_bert, tmp_path):
    flat = config(tiny_bert, method="fedsa-lora", run__early_stopping_patience=2, run__dir=str(tmp_path))
    with pytest.raises(ConfigError, match="run.early-stopping-patience = 2: with method 'fedsa-lora' .* allowed is 0"):
        engine.run(flat, CLIENTS)
    assert not list(tmp_path.iterdir())


def test_should_stop_is_asked_between_rounds(tiny_bert):
    """As Flower 1.43 hands it over: a callable without arguments."""
    loop, grid = prepare(config(tiny_bert, num_server_rounds=4))
    asked = []

    def should_stop() -> bool:
        asked.append(loop.state.server_round)
        return loop.state.server_round == 2

    loop.start(grid, loop.initial_arrays(), 4, should_stop=should_stop)
    assert asked == [0, 1, 2] and [line["round"] for line in loop.lines if line["type"] == "round"] == [1, 2]
    assert loop.stopped == "stopped after round 2: should_stop says so"


def test_a_signal_is_raised_once_and_given_back():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(Interrupted), signals_raise():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                raise AssertionError("nothing was raised")
            except Interrupted:
                os.kill(os.getpid(), signal.SIGTERM)  # while the model is written
                os.kill(os.getpid(), signal.SIGINT)
                raise
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("error", [Interrupted, RunNotRunningException])
@pytest.mark.parametrize("number", [0, 2])
def test_a_run_that_is_ended_leaves_its_last_whole_round(tiny_bert, tmp_path, figures, monkeypatch, error, number):
    """Flower says by an exception of any pull that the run is none any more; it is not the node's whose reply was pulled."""

    class Ended(InProcessGrid):
        runs_clients = False

        def pull_messages(self, message_ids):
            if self._waiting[message_ids[0]].metadata.message_type == "train" and loops[0].work.number > number:
                raise error
            return super().pull_messages(message_ids)

    loops, told = [], []
    start = RoundLoop.start
    monkeypatch.setattr(RoundLoop, "start", lambda loop, *rest: (loops.append(loop), start(loop, *rest)))
    monkeypatch.setattr(signal, "raise_signal", told.append)
    flat = config(tiny_bert, num_server_rounds=4, run__dir=str(tmp_path), run__name="run")
    grid = Ended(flat, CLIENTS)
    server_app.main(grid, SimpleNamespace(run_config=flat))
    assert told == [signal.SIGINT]
    if not number:
        assert not list(tmp_path.iterdir())
        return
    facts = read_facts(tmp_path / "run")
    assert (facts["outcome"], facts["reason"], facts["rounds"]) == ("stopped", "stopped by the user", number)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
