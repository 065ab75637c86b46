"""Trackers: TensorBoard's files read back; W&B, MLflow and trackio by the calls they get, and for real where installed."""

from __future__ import annotations

import importlib.machinery
import json
import logging
import struct
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedara_flwr import config, tasks
from fedara_flwr.keys import ConfigError
from fedara_flwr.runs import trackers as track
from fedara_flwr.runs.trackers import Trackers, check, open_trackers, scalars
from fedara_flwr.tasks import read_settings

START = {"type": "start", "accuracy": 0.1, "loss": 2.5}
END = {"type": "end", "outcome": "completed", "rounds": 3, "seconds": 12.5, "test-accuracy": 0.6}
CONFIG: dict[str, config.Scalar] = {"seed": 42, "method": "fedara", "run.name": ""}


def line(number: int) -> dict[str, Any]:
    """A round's line, accuracy number/10."""
    return {
        "type": "round",
        "round": number,
        "accuracy": number / 10,
        "client-loss": 1.5,
        "modelled-seconds": 4.0,
        "alive": 432,
        "alive-per-module": [12, 0],
        "bytes": {"down.B": 500_000, "up": 2_000_000},
        "bytes-total": 2_500_000,
        "bytes-kept": 0,
        "sampled": ["5", "2"],
        "dropped": [{"client": "2", "reason": "timeout", "detail": "…"}],
        "seconds": 3.0,
        "seconds-evaluate": 1.0,
    }


ROUND = {
    "accuracy": 0.2,
    "client-loss": 1.5,
    "modelled/seconds": 4.0,
    "alive": 432.0,
    "MB/down.B": 0.5,
    "MB/up": 2.0,
    "MB/total": 2.5,
    "MB/kept": 0.0,
    "sampled": 2.0,
    "dropped": 1.0,
    "seconds/round": 3.0,
    "seconds/evaluate": 1.0,
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # what the tracker would leave behind
    path = tmp_path / "runs" / "mine"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What the package logs from warnings on, whether its lines are shown or not."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    track.logger.addHandler(handler)
    yield lines
    track.logger.removeHandler(handler)


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """Stands for an installed library."""
    fake = types.ModuleType(name)
    fake.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="fake")
    vars(fake).update(content)
    monkeypatch.setitem(sys.modules, name, fake)


class Recorder:
    """A tracker that keeps its calls, or raises from its `fails`-th on."""

    def __init__(self, fails: int = 99) -> None:
        self.calls: list[tuple] = []
        self.fails = fails

    def log(self, *arguments: Any) -> None:
        self._keep("log", *arguments)

    def finish(self, *arguments: Any) -> None:
        self._keep("finish", *arguments)

    def _keep(self, *call: Any) -> None:
        self.calls.append(call)
        if len(self.calls) >= self.fails:
            raise OSError("the disk\nis full")


# names


def test_a_line_becomes_flat_numbers():
    assert scalars(line(2)) == ROUND
    assert scalars(START) == {"accuracy": 0.1, "loss": 2.5}
    assert scalars(END) == {"seconds/total": 12.5, "test/accuracy": 0.6}


def test_only_numbers_and_plain_names():
    odd = {"type": "round", "round": 1, "a": True, "b": None, "c": "3", "d": [1], "bytes": {"x y": 1e6, "z": "2"}, "é=f": 1}
    assert scalars(odd) == {"MB/x_y": 1.0, "__f": 1.0}
    assert scalars({"type": "round", "bytes": "none"}) == {}


def test_every_tracker_of_the_settings_is_there():
    assert tuple(track.TRACKERS) == config.TRACKERS


def test_unknown_names_are_refused_before_a_run():
    with pytest.raises(ConfigError, match=r"^run.track = 'tensorbord,wandb': allowed are .*did you mean 'tensorboard'\?$"):
        read_settings({"run.track": "tensorbord,wandb"})
    with pytest.raises(ConfigError, match=r"^run.track = 'x': allowed are tensorboard, wandb, mlflow, trackio"):
        check("x")
    with pytest.raises(ConfigError, match="allowed are"):
        check("tensorboard,")
    assert read_settings({"run.track": " wandb, mlflow "}).run.track
    assert config.tracker_names("mlflow, wandb,mlflow") == ("mlflow", "wandb")
    assert config.tracker_names(" ") == ()


def test_a_missing_library_names_its_extra(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()  # W&B leaves such a folder where it ran: an empty package for Python
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=r"^run.track = 'wandb': .* pip install 'fedara-flwr\[wandb\]'"):
        check("wandb")


def test_none_is_needed_and_none_is_loaded():
    code = """
import sys
from fedara_flwr.runs import trackers as track
track.check("")
sys.exit(any(name in sys.modules for name in ("torch", *track.TRACKERS)))
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


# the lines


def test_lines_reach_every_tracker_in_order():
    one, two = Recorder(), Recorder()
    trackers = Trackers({"one": one, "two": two})
    for record in (START, {"type": "resume", "round": 1, "bytes": {}}, line(2), {"type": "client", "loss": 1.0}, END):
        trackers.take(record)
    trackers.close()  # after the end there is nothing left to finish
    expected = [
        ("log", 0, {"accuracy": 0.1, "loss": 2.5}),
        ("log", 2, ROUND),
        ("finish", 3, {"seconds/total": 12.5, "test/accuracy": 0.6}, "completed"),
    ]
    assert one.calls == two.calls == expected


def test_a_run_that_breaks_off_is_finished_as_failed():
    tracker = Recorder()
    trackers = Trackers({"one": tracker})
    trackers.take({"type": "start"})  # without validation there is nothing to log
    trackers.take(line(2))
    trackers.close()
    assert tracker.calls == [("log", 2, ROUND), ("finish", 2, {}, "failed")]


def test_a_failing_tracker_is_left_out_with_one_warning(warnings):
    broken, sound = Recorder(fails=2), Recorder()
    trackers = Trackers({"broken": broken, "sound": sound})
    for record in (START, line(1), line(2), END):
        trackers.take(record)
    assert [call[0] for call in broken.calls] == ["log", "log"]
    assert [call[0] for call in sound.calls] == ["log", "log", "log", "finish"]
    assert warnings == ["run.track: broken failed and is left out from here on (OSError: the disk is full)"]


def test_a_tracker_that_does_not_start_ends_the_run_and_finishes_the_others(monkeypatch, run):
    sound = Recorder()

    def broken(*arguments: object) -> Recorder:
        raise RuntimeError("no account")

    monkeypatch.setattr(track, "check", lambda names: None)
    monkeypatch.setattr(track, "TRACKERS", {"tensorboard": lambda *arguments: sound, "wandb": broken})
    with pytest.raises(ConfigError, match=r"wandb cannot be started \(RuntimeError: no account\)"):
        open_trackers("tensorboard,wandb", run, CONFIG)
    assert sound.calls == [("finish", 0, {}, "failed")]


# TensorBoard


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)] for tag in tags}


def test_tensorboard_has_the_curves(run):
    trackers = open_trackers("tensorboard", run, CONFIG)
    for record in (START, line(1), line(2)):
        trackers.take(record)
    during = curves(run)  # one watches while the run goes on
    assert during["accuracy"] == [(0, 0.1), (1, 0.1), (2, 0.2)]
    assert during["MB/down.B"] == [(1, 0.5), (2, 0.5)]
    assert set(during) == set(ROUND) | {"loss"}
    trackers.take(END)
    after = curves(run)
    assert after["test/accuracy"] == [(3, 0.6)]
    assert after["accuracy"] == during["accuracy"]


def test_tensorboard_goes_on_where_the_checkpoint_was(run):
    first = open_trackers("tensorboard", run, CONFIG)
    for number in (1, 2, 3):  # the last one after the checkpoint of round 2
        first.take(line(number))
    first.close()
    second = open_trackers("tensorboard", run, CONFIG, start_round=2)
    second.take({**line(3), "accuracy": 0.9})
    second.take(END)
    assert curves(run)["accuracy"] == [(1, 0.1), (2, 0.2), (3, 0.9)]


def test_a_tensorboard_that_fails_does_not_end_the_run(run, warnings, monkeypatch):
    trackers = open_trackers("tensorboard", run, CONFIG)
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    def full(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(EventFileWriter, "add_event", full)
    for number in (1, 2, 3):
        trackers.take(line(number))
    trackers.take(END)
    assert len(warnings) == 1 and "no space left on device" in warnings[0]


# W&B, MLflow and trackio: the calls


class FakeRun:
    """wandb's or trackio's Run."""

    def __init__(self, calls: list) -> None:
        self.calls = calls
        self.summary = self

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: self.calls.append((name, arguments, options))


def fake_init(calls: list) -> Any:
    def init(**options: Any) -> FakeRun:
        calls.append(("init", (), options))
        return FakeRun(calls)

    return init


def test_wandb_calls(monkeypatch, run):
    calls: list = []
    module(monkeypatch, "wandb", init=fake_init(calls))
    trackers = open_trackers("wandb", run, CONFIG)
    for record in (line(2), END):
        trackers.take(record)
    (_, _, options), *rest = calls
    identifier = options.pop("id")
    assert options == {"project": "fedara", "name": "mine", "resume": "allow", "dir": str(run), "config": CONFIG}
    assert rest == [
        ("log", (ROUND,), {"step": 2}),
        ("update", ({"seconds/total": 12.5, "test/accuracy": 0.6},), {}),
        ("finish", (), {"exit_code": 0}),
    ]
    assert json.loads((run / "trackers.json").read_text()) == {"wandb": identifier}
    calls.clear()
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    open_trackers("wandb", run, CONFIG, start_round=2).close()
    assert (calls[0][2]["id"], calls[0][2]["project"]) == (identifier, "ours")
    assert calls[-1] == ("finish", (), {"exit_code": 1})
    open_trackers("wandb", run, CONFIG)
    assert calls[-1][2]["id"] != identifier  # a new run of an old name is another run


def test_trackio_calls(monkeypatch, run):
    calls: list = []
    module(monkeypatch, "trackio", init=fake_init(calls))
    trackers = open_trackers("trackio", run, CONFIG)
    for record in (line(2), END):
        trackers.take(record)
    assert calls == [
        ("init", (), {"project": "fedara", "name": "mine", "config": CONFIG, "resume": "never"}),
        ("log", (ROUND,), {"step": 2}),
        ("log", ({"seconds/total": 12.5, "test/accuracy": 0.6},), {"step": 3}),
        ("finish", (), {}),
    ]
    open_trackers("trackio", run, CONFIG, start_round=2)
    assert calls[-1][2]["resume"] == "allow"


class FakeClient:
    """mlflow.MlflowClient."""

    calls: list = []
    known: Any = None

    def __init__(self, **options: Any) -> None:
        self.calls.append(("client", (), options))

    def get_experiment_by_name(self, name: str) -> Any:
        self.calls.append(("get_experiment_by_name", (name,), {}))
        return self.known

    def create_experiment(self, *arguments: Any, **options: Any) -> str:
        self.calls.append(("create_experiment", arguments, options))
        return "7"

    def create_run(self, *arguments: Any, **options: Any) -> Any:
        self.calls.append(("create_run", arguments, options))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: self.calls.append((name, arguments, options))


@pytest.fixture
def mlflow_calls(monkeypatch: pytest.MonkeyPatch) -> list:
    calls: list = []
    monkeypatch.setattr(FakeClient, "calls", calls)
    monkeypatch.setattr(track.time, "time", lambda: 1.5)
    module(monkeypatch, "mlflow", MlflowClient=FakeClient)
    module(monkeypatch, "mlflow.entities", Metric=lambda *a: a, Param=lambda *a: a)
    return calls


def test_mlflow_calls(mlflow_calls, run):
    trackers = open_trackers("mlflow", run, CONFIG)
    for record in (line(2), END):
        trackers.take(record)
    root = run.parent
    assert mlflow_calls == [
        ("client", (), {"tracking_uri": f"sqlite:///{root}/mlflow.db"}),
        ("get_experiment_by_name", ("fedara",), {}),
        ("create_experiment", ("fedara",), {"artifact_location": f"file://{root}/mlflow-artifacts"}),
        ("create_run", ("7",), {"run_name": "mine"}),
        ("log_batch", ("abc",), {"params": [("seed", "42"), ("method", "fedara")]}),
        ("log_batch", ("abc",), {"metrics": [(name, value, 1500, 2) for name, value in ROUND.items()]}),
        ("log_batch", ("abc",), {"metrics": [("seconds/total", 12.5, 1500, 3), ("test/accuracy", 0.6, 1500, 3)]}),
        ("set_terminated", ("abc",), {"status": "FINISHED"}),
    ]


def test_mlflow_where_the_user_says_and_after_a_stop(mlflow_calls, run, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:1")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    monkeypatch.setattr(FakeClient, "known", types.SimpleNamespace(experiment_id="3"))
    open_trackers("mlflow", run, {}).take({"type": "end", "outcome": "stopped", "rounds": 2})
    assert mlflow_calls == [
        ("client", (), {"tracking_uri": "http://localhost:1"}),
        ("get_experiment_by_name", ("ours",), {}),
        ("create_run", ("3",), {"run_name": "mine"}),
        ("set_terminated", ("abc",), {"status": "KILLED"}),
    ]
    mlflow_calls.clear()
    open_trackers("mlflow", run, CONFIG, start_round=2).close()
    assert mlflow_calls[1:] == [
        ("update_run", ("abc",), {"status": "RUNNING"}),
        ("set_terminated", ("abc",), {"status": "FAILED"}),
    ]
    mlflow_calls.clear()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "9")
    open_trackers("mlflow", run, {}).close()
    assert mlflow_calls[1] == ("create_run", ("9",), {"run_name": "mine"})


def test_mlflow_gets_parameters_by_the_hundred(mlflow_calls, run):
    open_trackers("mlflow", run, {f"key-{i}": i for i in range(150)})
    assert [len(options["params"]) for name, _, options in mlflow_calls if name == "log_batch"] == [100, 50]


# the same for real, where they are installed


def interrupted(name: str, run: Path) -> None:
    """Three rounds, the last one lost; resumed after the second."""
    first = open_trackers(name, run, CONFIG)
    for record in (START, line(1), line(2), line(3)):
        first.take(record)
    first.close()
    second = open_trackers(name, run, CONFIG, start_round=2)
    for record in (line(3), END):
        second.take(record)


@pytest.mark.parametrize(("higher", "best"), [(True, "max"), (False, "min")])
def test_wandb_is_told_which_direction_is_better(monkeypatch, run, higher, best):
    calls: list = []
    module(monkeypatch, "wandb", init=fake_init(calls))
    monkeypatch.setattr(tasks.find("classification"), "metric", tasks.Metric("accuracy", higher=higher))
    open_trackers("wandb", run, {**CONFIG, "data.task": "classification"}).close()
    assert ("define_metric", ("accuracy",), {"summary": best}) in calls


def test_wandb_offline(run, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    interrupted("wandb", run)
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    identifier = json.loads((run / "trackers.json").read_text())["wandb"]
    assert {file.name for file in files} == {f"run-{identifier}.wandb"}
    history = [
        record.history for file in files for record in wandb_records(file) if record.WhichOneof("record_type") == "history"
    ]
    points = [
        (row["_step"], row["accuracy"]) for h in history if (row := {i.nested_key[0]: json.loads(i.value_json) for i in h.item})
    ]
    assert points == [(0, 0.1), (1, 0.1), (2, 0.2), (3, 0.3), (3, 0.3)]


def wandb_records(file: Path) -> Iterator[Any]:
    """W&B's local file: LevelDB's log format, each entry a protobuf Record."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_mlflow_in_a_local_database(run, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    interrupted("mlflow", run)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run.parent}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("fedara").experiment_id])
    assert (found.info.run_name, found.info.status) == ("mine", "FINISHED")
    assert found.data.params == {"seed": "42", "method": "fedara"}
    history = sorted((m.step, m.value) for m in client.get_metric_history(found.info.run_id, "accuracy"))
    assert history == [(0, 0.1), (1, 0.1), (2, 0.2), (3, 0.3), (3, 0.3)]
    assert found.data.metrics["test/accuracy"] == 0.6


def test_trackio_in_its_local_folder(run):
    pytest.importorskip("trackio", reason="trackio is not installed")
    code = f"""
from pathlib import Path
from tests.test_track import interrupted
interrupted("trackio", Path({str(run)!r}))
from trackio.sqlite_storage import SQLiteStorage
logs = SQLiteStorage.get_logs("fedara", "mine")
assert [(log["step"], log["accuracy"]) for log in logs if "accuracy" in log] == [(0, .1), (1, .1), (2, .2), (3, .3), (3, .3)]
assert logs[-1]["test/accuracy"] == 0.6
"""
    # trackio reads its folder from the environment when it is imported
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={"PATH": "", "TRACKIO_DIR": str(run.parent / "trackio"), "HF_HUB_OFFLINE": "1", "HOME": str(run.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
