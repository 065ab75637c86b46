"""The run directory: everything a run leaves behind, written as it goes.

`config.json` (every key), `metrics.jsonl` (one line per round, one per client and round, one at the end), `federated.json`
(what the run is and what has come of it so far), `checkpoint/`, and at the end `adapter/` or `model/` and `report.html`.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import time
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from fedara_flwr.config import Settings
from fedara_flwr.files import flwr_home, processor, write_whole
from fedara_flwr.keys import ConfigError, nearest

PACKAGES = ("fedara-flwr", "flwr", "torch", "transformers", "peft", "datasets", "numpy")
# what may change when a run goes on: nothing that its rounds so far depend on
CHANGEABLE = ("num-server-rounds", "run.")
CHANGEABLE_STRATEGY = (
    "min-train-nodes",
    "min-available-nodes",
    "min-replies",
    "max-failed-rounds",
    "node-timeout",
    "round-timeout",
    "quorum",
    "straggler-timeout",
    "max-client-failures",
)


class RunDirectory:
    """One run's folder, held by one process at a time.

    Attributes:
        path: the folder.
        facts: what federated.json says.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self._lock = (path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ConfigError(f"{path}: another process is writing this run") from None

    @classmethod
    def create(cls, settings: Settings) -> RunDirectory:
        """A new folder under `run.dir`, with config.json in it.

        Raises:
            ConfigError: `run.name` exists already, or the folder cannot be written.
        """
        name = settings.run.name or new_name(settings.method)
        path = _root(settings) / name
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise ConfigError(f"run.name = {name!r}: {path} exists already, allowed is a new name") from None
        except OSError as error:
            raise ConfigError(f"run.dir = {str(path.parent)!r}: cannot be written ({error.strerror})") from None
        _write_json(path / "config.json", settings.to_flat())
        return cls(path, {"id": uuid.uuid4().hex, "name": name, "resumed": []})

    @classmethod
    def resume(cls, settings: Settings) -> RunDirectory:
        """The folder of the run that `run.resume` names.

        Raises:
            ConfigError: there is no such run, it is complete, or a setting differs that its rounds so far depend on.
        """
        path = Path(settings.run.resume).expanduser()
        path = path if path.is_absolute() else _root(settings) / path
        directory = cls.open(path)
        before, done = read_config(path), directory.facts.get("rounds", 0)
        for key, value in settings.to_flat().items():
            if before.get(key, value) != value and not _changeable(key):
                directory.close()
                raise ConfigError(f"{key} = {value!r}: run.resume = {str(path)!r} was started with {before[key]!r}")
        rounds = settings.num_server_rounds
        if rounds < done or (rounds == done and directory.facts.get("outcome") == "completed"):
            directory.close()
            raise ConfigError(f"num-server-rounds = {rounds}: {path} has {done} rounds, allowed is a higher number")
        since, patience = directory.facts.get("stopping", {}).get("evaluations", 0), settings.run.early_stopping_patience
        if 0 < patience <= since and directory.facts.get("outcome") == "completed":
            directory.close()
            why = f"{path} stopped early, after {since} evaluations without a gain"
            raise ConfigError(f"run.early-stopping-patience = {patience}: {why}; allowed is a higher number, or 0")
        return directory

    def go_on(self, settings: Settings) -> None:
        """Write the configuration with which a run goes on, once it is known that it can."""
        _write_json(self.path / "config.json", settings.to_flat() | {"run.resume": ""})

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """The folder of a run that exists.

        Raises:
            ConfigError: it is no run's, or another process is writing it.
        """
        return cls(path, read_facts(path))

    def close(self) -> None:
        """Give up the lock, so that another process may write this run."""
        self._lock.close()

    def discard(self) -> None:
        """Remove the folder of a run that ended before its first round."""
        self.close()
        shutil.rmtree(self.path)

    # -- metrics.jsonl ----------------------------------------------------------------------------------------------
    def write(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with self._metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def sync(self) -> int:
        """Force metrics.jsonl to the disk; returns its length in bytes."""
        with self._metrics.open("a") as file:
            os.fsync(file.fileno())
            return file.tell()

    def cut(self, length: int) -> None:
        """Take back what was written after metrics.jsonl had this many bytes.

        Raises:
            ConfigError: it is shorter.
        """
        size = self._metrics.stat().st_size if self._metrics.exists() else 0
        if size < length:
            raise ConfigError(f"{self._metrics}: {size} bytes, the checkpoint was written at {length}: lines are missing")
        os.truncate(self._metrics, length)

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Lines of one type ("round", "client" or "end"), in order."""
        lines = self._metrics.read_text().splitlines() if self._metrics.exists() else []
        return [record for line in lines if (record := json.loads(line))["type"] == kind]

    def modelled(self) -> dict[str, float]:
        """Seconds, waiting and joules by the modelled clock, of all rounds and of what the head was solved from.

        {} where not every node was simulated.
        """
        lines, names = self.records("round"), ("seconds", "waiting", "joules")
        lines += [line for line in self.records("start") if line.get("head")]
        if not lines or any(f"modelled-{name}" not in line for line in lines for name in names):
            return {}
        return {name: sum(line[f"modelled-{name}"] for line in lines) for name in names}

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    # -- federated.json ---------------------------------------------------------------------------------------------
    def update(self, facts: dict[str, Any]) -> None:
        """Change these facts, and write federated.json anew."""
        self.facts |= facts
        _write_json(self.path / "federated.json", self.facts)


def new_name(method: str) -> str:
    """A name for a run that was given none."""
    return f"{method}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def find_run(text: str) -> Path:
    """The folder that a user means by a path, or by a run's name under ./runs or FLWR_HOME/runs.

    Raises:
        ConfigError: there is none; the nearest names are told.
    """
    roots = (Path("runs"), flwr_home() / "runs")
    for path in (Path(text).expanduser(), *(root / text for root in roots)):
        if (path / "federated.json").exists() or (path / "metrics.jsonl").exists():
            return path.resolve()
    known = [path.parent.name for root in roots for path in root.glob("*/federated.json")]
    raise ConfigError(f"run {text!r}: no such run here, under ./runs or {roots[1]}{nearest(text, known)}")


def read_facts(path: Path) -> dict[str, Any]:
    """What a run's federated.json says; ConfigError where there is none."""
    return _read_json(path, "federated.json")


def read_config(path: Path) -> dict[str, Any]:
    """A run's flat configuration; ConfigError where there is none."""
    return _read_json(path, "config.json")


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((path / name).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not the folder of a run, {name} cannot be read ({str(error)[:120]})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not the folder of a run, {name} holds no object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def _root(settings: Settings) -> Path:
    return Path(settings.run.dir).expanduser() if settings.run.dir else flwr_home() / "runs"


def _changeable(key: str) -> bool:
    return key.startswith(CHANGEABLE) or key in {f"strategy.{name}" for name in CHANGEABLE_STRATEGY}


def versions() -> dict[str, str]:
    """The versions of the packages that decide what a run computes, by name."""
    return {name: version(name) for name in PACKAGES}


def machine() -> dict[str, Any]:
    """The server's system, processor, cores, memory and Python, for federated.json."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory-gb": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
    }
