"""Curves in an experiment tracker, beside the run directory: TensorBoard, Weights & Biases, MLflow, trackio.

None is required: each is an extra of this package, and its library is loaded only where `run.track` names it. Where W&B,
MLflow and trackio write is the user's own business, set by their environment variables; without any, they keep to the folder
of the runs. Sent are the run's configuration and numbers that the server wrote to metrics.jsonl, nothing of a client's.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fedara_flwr import tasks
from fedara_flwr.config import tracker_names
from fedara_flwr.keys import ConfigError, Scalar
from fedara_flwr.log import error_line

logger = logging.getLogger(__name__)

PROJECT = "fedara"
IDS = "trackers.json"  # in the run directory: the trackers' own ids of the run, by which a resumed one goes on
NAMES = {"seconds": "seconds/round", "seconds-evaluate": "seconds/evaluate", "bytes-total": "MB/total", "bytes-kept": "MB/kept"}


class Tracker(Protocol):
    """One service that shows curves."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Points of the curves at round `step`; 0 is before the first one."""

    def finish(self, step: int, summary: Mapping[str, float], outcome: str) -> None:
        """The last call: what the run reached; `outcome` is "completed", "stopped" or "failed"."""


class Trackers:
    """All trackers of a run; one that fails is left out from then on, with a warning, and never ends the run."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)
        self._step = 0

    def take(self, record: Mapping[str, Any]) -> None:
        """Log what a line of metrics.jsonl says; only "start", "round" and "end" lines say something."""
        kind, values = record.get("type"), scalars(record)
        if kind in ("start", "round"):
            self._step = int(record.get("round", 0))
            if values:
                self._each(lambda tracker: tracker.log(self._step, values))
        elif kind == "end":
            self._step = int(record.get("rounds", self._step))
            self._finish(values, str(record.get("outcome", "completed")))

    def close(self) -> None:
        """Finish, as failed, what no "end" line has finished; to be called before the run directory is removed."""
        self._finish({}, "failed")

    def _finish(self, summary: Mapping[str, float], outcome: str) -> None:
        self._each(lambda tracker: tracker.finish(self._step, summary, outcome))
        self._trackers.clear()

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # whatever a tracker's library raises, the run goes on
                del self._trackers[name]
                logger.warning("run.track: %s failed and is left out from here on (%s)", name, error_line(error))


def check(names: str) -> None:
    """Whether all trackers of `run.track` are known and installed; nothing is started or loaded.

    Raises:
        ConfigError: an unknown name, or a library that is missing, with the extra that brings it.
    """
    for name in tracker_names(names):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # no origin: a mere folder, such as the one that wandb leaves where it ran
            raise ConfigError(f"run.track = {names!r}: {name} is not installed, pip install 'fedara-flwr[{name}]' brings it")


def open_trackers(names: str, run: Path, config: Mapping[str, Scalar], start_round: int = 0) -> Trackers:
    """Start what `run.track` names.

    Args:
        names: comma-separated; "" = none.
        run: the run directory; its name is the run's.
        config: flat configuration, shown beside the curves.
        start_round: rounds that a resumed run has behind it; its curves go on after them.

    Raises:
        ConfigError: as `check`, or a tracker cannot be started (no account, no network).
    """
    check(names)
    opened: dict[str, Tracker] = {}
    for name in tracker_names(names):
        try:
            opened[name] = TRACKERS[name](run.resolve(), config, start_round)
        except Exception as error:
            Trackers(opened).close()
            raise ConfigError(f"run.track = {names!r}: {name} cannot be started ({error_line(error)})") from error
    return Trackers(opened)


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a "start", "round" or "end" line by their names in a tracker; lists of clients become counts.

    >>> scalars({"type": "round", "round": 3, "loss": 1.5, "bytes": {"up.B": 2_000_000}, "sampled": ["5", "2"], "dropped": []})
    {'loss': 1.5, 'MB/up.B': 2.0, 'sampled': 2.0, 'dropped': 0.0}
    >>> scalars({"type": "end", "outcome": "completed", "rounds": 3, "seconds": 9, "test-accuracy": 0.5})
    {'seconds/total': 9.0, 'test/accuracy': 0.5}
    """
    figures: dict[str, float] = {}
    for key, value in record.items():
        if key == "bytes" and isinstance(value, Mapping):
            figures |= {f"MB/{_plain(part)}": count / 1e6 for part, count in value.items() if _is_number(count)}
        elif key in ("sampled", "dropped") and isinstance(value, list):
            figures[key] = float(len(value))
        elif _is_number(value) and key not in ("round", "rounds"):
            name = "seconds/total" if key == "seconds" and record.get("type") == "end" else NAMES.get(key, key)
            name = re.sub("^(modelled|test)-", r"\1/", _plain(name))
            figures[name] = value / 1e6 if name.startswith("MB/") else float(value)
    return figures


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(name: object) -> str:
    """Only what every tracker takes in a name; a method of another package may report under any."""
    return re.sub(r"[^\w./-]", "_", str(name), flags=re.ASCII)


def _read_ids(run: Path) -> dict[str, str]:
    file = run / IDS
    return json.loads(file.read_text()) if file.exists() else {}


def _keep_id(run: Path, name: str, identifier: str) -> None:
    (run / IDS).write_text(json.dumps(_read_ids(run) | {name: identifier}, indent=2) + "\n")


class _TensorBoard:
    """Event files in RUN/tensorboard, by TensorBoard's own writer (torch's needs torch)."""

    def __init__(self, run: Path, config: Mapping[str, Scalar], start_round: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(run / "tensorboard"))
        if start_round:  # hides the rounds after the checkpoint that the interrupted run had shown already
            self._add(start_round + 1, session_log=SessionLog(status=SessionLog.START))
        logger.info("curves: tensorboard --logdir %s", run.parent)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        points = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step, summary=self._summary(value=points))
        self._writer.flush()

    def finish(self, step: int, summary: Mapping[str, float], outcome: str) -> None:
        if summary:
            self.log(step, summary)
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, **content))


class _Wandb:
    """A run on W&B; WANDB_MODE=offline writes to RUN/wandb alone."""

    def __init__(self, run: Path, config: Mapping[str, Scalar], start_round: int) -> None:
        import wandb

        known = _read_ids(run).get("wandb") if start_round else None
        identifier = known or uuid.uuid4().hex[:16]
        _keep_id(run, "wandb", identifier)
        project = os.environ.get("WANDB_PROJECT") or PROJECT
        self._run = wandb.init(project=project, name=run.name, id=identifier, resume="allow", dir=str(run), config=dict(config))
        if "data.task" in config:  # its tables show the best value, by the direction that the task says
            metric = tasks.find(str(config["data.task"])).metric
            self._run.define_metric(metric.name, summary="max" if metric.higher else "min")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, step: int, summary: Mapping[str, float], outcome: str) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=int(outcome != "completed"))


class _Mlflow:
    """A run on the server of MLFLOW_TRACKING_URI; without one, in mlflow.db (SQLite) beside the run directories."""

    STATUS = {"completed": "FINISHED", "stopped": "KILLED"}

    def __init__(self, run: Path, config: Mapping[str, Scalar], start_round: int) -> None:
        # MLflow's own 7 would hold up a round for minutes when its server is gone
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        configured = os.environ.get("MLFLOW_TRACKING_URI")
        uri = configured or f"sqlite:///{run.parent / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        known = _read_ids(run).get("mlflow") if start_round else None
        if known:
            self._id = known
            self._client.update_run(known, status="RUNNING")
        else:
            # MLflow's own default for artifacts is a path in the working directory, which under Flower is temporary
            artifacts = None if configured else (run.parent / "mlflow-artifacts").as_uri()
            self._id = self._client.create_run(self._experiment(artifacts), run_name=run.name).info.run_id
            _keep_id(run, "mlflow", self._id)
            params = [Param(key, str(value)) for key, value in config.items() if value != ""]
            for first in range(0, len(params), 100):  # MLflow takes at most so many at once
                self._client.log_batch(self._id, params=params[first : first + 100])
        if not configured:
            logger.info("curves: mlflow ui --backend-store-uri %s", uri)

    def _experiment(self, artifacts: str | None) -> str:
        if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return given
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        return experiment.experiment_id if experiment else self._client.create_experiment(name, artifact_location=artifacts)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[self._metric(name, value, now, step) for name, value in values.items()])

    def finish(self, step: int, summary: Mapping[str, float], outcome: str) -> None:
        if summary:
            self.log(step, summary)
        self._client.set_terminated(self._id, status=self.STATUS.get(outcome, "FAILED"))


class _Trackio:
    """A run in trackio's own folder (TRACKIO_DIR), or the Space or server of its environment variables."""

    def __init__(self, run: Path, config: Mapping[str, Scalar], start_round: int) -> None:
        import trackio

        resume = "allow" if start_round else "never"
        self._run = trackio.init(project=PROJECT, name=run.name, config=dict(config), resume=resume)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, step: int, summary: Mapping[str, float], outcome: str) -> None:
        if summary:
            self.log(step, summary)
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Scalar], int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}
