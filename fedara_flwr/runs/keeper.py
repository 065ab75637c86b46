"""What a run keeps while it goes and leaves at its end, and how it is opened again."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from fedara_flwr import strategies
from fedara_flwr.config import ConfigError, Settings
from fedara_flwr.merging.private import in_words, ledger
from fedara_flwr.report import write_report
from fedara_flwr.runs.card import write_card
from fedara_flwr.runs.directory import RunDirectory, machine, read_config, read_facts, versions
from fedara_flwr.runs.trackers import Trackers, open_trackers
from fedara_flwr.server.checkpoint import Checkpoints
from fedara_flwr.server.evaluate import ServerModel
from fedara_flwr.server.state import ServerState
from fedara_flwr.strategies.base import BaseStrategy

logger = logging.getLogger(__name__)


class Keeper:
    """Takes what a strategy makes to where it is kept: lines, checkpoints, facts, trackers, and at the end the results."""

    def __init__(self, directory: RunDirectory, strategy: BaseStrategy, model: ServerModel) -> None:
        self.directory, self.strategy, self.model = directory, strategy, model
        self.checkpoints = _checkpoints(directory.path, directory.facts, model)
        self._before = float(directory.facts.get("seconds", 0.0))
        self._began = time.monotonic()
        self._trackers = Trackers({})
        strategy.write, strategy.save = self.write, self.save
        strategy.run_id = directory.facts["id"]

    def restore(self) -> None:
        """Put the strategy where the run's newest good checkpoint was; later lines of metrics.jsonl are taken back.

        Raises:
            ConfigError: no checkpoint can be used, or the data is not what it was.
        """
        digest = self.model.federation.digest
        if (before := self.directory.facts.get("data", digest)) != digest:
            raise ConfigError(
                f"run.resume: the training data's hash is {digest[:16]!r}, it was {before[:16]!r} when the run began"
            )
        state, length = _newest(self.checkpoints, self.strategy)
        self.directory.cut(length)
        self.strategy.restore(state)
        resumed = [*self.directory.facts["resumed"], state.server_round]
        self.directory.update({"resumed": resumed, "outcome": "running", "reason": ""})

    def begin(self) -> None:
        """Write what the run is, say what privacy all of it will have, and open the trackers."""
        self.directory.update(self._facts() | {"outcome": "running", "reason": "", "data": self.model.federation.digest})
        settings = self.strategy.settings
        if settings.privacy.on:
            logger.info("%s", in_words(settings.privacy, settings.num_server_rounds))
        self._trackers = open_trackers(
            settings.run.track, self.directory.path, settings.to_flat(), self.strategy.state.server_round
        )

    def write(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        self.directory.write(record)
        self._trackers.take(record)

    def save(self, state: ServerState) -> None:
        """A checkpoint where one is due, and the facts as they are now."""
        every = self.strategy.settings.run.checkpoint_every
        if every and (state.server_round % every == 0 or state.server_round == self.strategy.settings.num_server_rounds):
            self.checkpoints.save(state, self.directory.sync())
        self.directory.update(self._facts())

    def conclude(self, outcome: str, reason: str = "") -> None:
        """Test once if the run is complete, export what was reached, write page and summary."""
        strategy, model, directory = self.strategy, self.model, self.directory
        try:
            test = model.evaluate(strategy.weights(), "test") if outcome == "completed" else {}
            exported = model.export(directory.path, strategy.exported())
        except Exception as error:
            directory.update({"outcome": "failed", "reason": f"its results could not be written: {error}"})
            raise
        end = {"type": "end", "outcome": outcome, "rounds": strategy.state.server_round, "seconds": self._seconds()}
        self.write(end | {f"test-{name}": value for name, value in test.items()})
        results = {"outcome": outcome, "reason": reason, "test": test, "exported": exported.name}
        directory.update(self._facts() | results | {"modelled": directory.modelled()})
        write_card(exported, directory.facts, "merged" if exported.name == "model" else "peft")
        self._show(test, exported)

    def fail(self, reason: str) -> None:
        """The rounds ended by an error: finish with what there is; a run without a round leaves nothing."""
        if self.strategy.state.server_round:
            self.conclude("failed", reason)
        else:
            self._trackers.close()
            self.directory.discard()

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._began

    def _facts(self) -> dict[str, Any]:
        strategy, state, spec = self.strategy, self.strategy.state, self.model.spec
        settings, nodes = strategy.settings, strategy.roster.nodes.values()
        return {
            "rounds": state.server_round,
            "seconds": self._seconds(),
            "method": strategy.name,
            "title": strategy.title,
            "paper": strategy.paper,
            "seed": settings.seed,
            "model": settings.model.name,
            "revision": self.model.revision,
            "clients": len(nodes) or self.directory.facts.get("clients", 0),
            "fingerprint": spec.fingerprint,
            "task": settings.data.task,
            "labels": list(self.model.labels),
            "metric": self.model.task.metric.facts(),
            "config": settings.to_flat(),
            "modules": [module.name for module in spec.modules],
            "blocks": [module.block for module in spec.modules],
            "ranks": list(state.mask.ranks),
            "alive-per-module": state.mask.alive.tolist(),
            "mask": state.mask.to_bytes().hex(),
            "bytes": state.bytes_total,
            "left-out": dict.fromkeys(state.unfit, "cannot train") if settings.privacy.on else state.unfit,
            "simulated": all(n.simulated for n in nodes) if nodes else self.directory.facts.get("simulated", False),
            "versions": versions(),
            "machine": machine(),
            **(self._privacy() if settings.privacy.on else self._partition()),
        }

    def _privacy(self) -> dict[str, Any]:
        """ε so far. Each time that a run went on counts as a round more: one may have been seen that was not kept."""
        strategy, facts = self.strategy, self.directory.facts
        rounds = strategy.state.server_round + len(facts.get("resumed", ()))
        planned = strategy.planned or facts.get("privacy", {}).get("planned", 0)
        return {"privacy": ledger(strategy.settings.privacy, rounds, planned)}

    def _partition(self) -> dict[str, Any]:
        """Examples of each client by group; known in a simulation, where the server dealt them out, and nowhere else."""
        nodes = self.strategy.roster.nodes.values()
        if not nodes or not all(node.simulated and node.key.isdigit() for node in nodes):
            return {}
        return self.model.partition(max(node.partitions for node in nodes))

    def _show(self, test: dict[str, float], exported: Path) -> None:
        down, up = (
            sum(size for name, size in self.strategy.state.bytes_total.items() if name.startswith(way)) / 1e6
            for way in ("down.", "up.")
        )
        if test:
            logger.info("test: %s", ", ".join(f"{name} {value:.3f}" for name, value in test.items()))
        logger.info("sent: %.1f MB down, %.1f MB up", down, up)
        if privacy := self.directory.facts.get("privacy"):
            logger.info("%s; %s", in_words(self.strategy.settings.privacy, privacy["rounds"]), privacy["adjacency"])
        if modelled := self.directory.facts["modelled"]:
            figures = tuple(modelled[name] for name in ("seconds", "joules", "waiting"))
            profiles = self.strategy.settings.fleet.profiles
            logger.info("modelled on %s: %.0f s, %.0f J; a client waits %.0f s", profiles, *figures)
        logger.info("%s: %s", exported.name, exported)
        try:
            logger.info("report: %s", write_report(self.directory.path))
        except Exception as error:  # a page can be made again, the run is done
            logger.warning("no report (%s: %s); `fedara report` tries again", type(error).__name__, error)
        logger.info("run directory: %s", self.directory.path)


def open_run(path: Path) -> tuple[BaseStrategy, ServerModel]:
    """A run's strategy as its newest good checkpoint has it, and the model, without the run's data.

    Raises:
        ConfigError: `path` is no run's folder, the model cannot be loaded, or no checkpoint can be used.
    """
    strategy, model, _ = _open(path)
    return strategy, model


def conclude_stopped(path: Path) -> None:
    """Finish the folder of a run that was stopped: its newest checkpoint is exported; without one nothing is left.

    Raises:
        ConfigError: as `open_run`.
    """
    directory = RunDirectory.open(path)
    try:
        if not any((path / "checkpoint").glob("round-*")):
            directory.discard()
            return
        strategy, model, length = _open(path)
        directory.cut(length)
        Keeper(directory, strategy, model).conclude("stopped", "stopped by the user")
    finally:
        directory.close()


def _open(path: Path) -> tuple[BaseStrategy, ServerModel, int]:
    facts, settings = read_facts(path), Settings.from_flat(read_config(path))
    model = ServerModel(settings, tuple(facts["labels"]))
    strategy = strategies.find(settings.method)(settings, model)
    state, length = _newest(_checkpoints(path, facts, model), strategy)
    strategy.restore(state)
    return strategy, model, length


def _checkpoints(path: Path, facts: dict[str, Any], model: ServerModel) -> Checkpoints:
    return Checkpoints(path / "checkpoint", {"run": facts["id"], "fingerprint": model.spec.fingerprint})


def _newest(checkpoints: Checkpoints, strategy: BaseStrategy) -> tuple[ServerState, int]:
    found = checkpoints.newest(strategy.spec)
    if found is None:
        raise ConfigError(f"{checkpoints.folder}: no checkpoint that can be used (run.checkpoint-every = 0 writes none)")
    return found
