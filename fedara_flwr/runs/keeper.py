"""What a run keeps while it goes and leaves at its end, and how it is opened again."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedara_flwr import strategies
from fedara_flwr.keys import ConfigError
from fedara_flwr.log import error_line, figure
from fedara_flwr.merging.private import in_words, ledger
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.report import write_report
from fedara_flwr.runs.card import write_card
from fedara_flwr.runs.directory import RunDirectory, machine, read_config, read_facts, versions
from fedara_flwr.runs.trackers import Trackers, open_trackers
from fedara_flwr.server.best import Chosen, choose
from fedara_flwr.server.checkpoint import Checkpoints
from fedara_flwr.server.evaluate import ServerModel, compared
from fedara_flwr.server.loop import Callback, RoundLoop
from fedara_flwr.server.roster import Node
from fedara_flwr.server.state import ServerState
from fedara_flwr.server.stopping import RunFailed
from fedara_flwr.strategies.base import Method
from fedara_flwr.tasks import read_settings
from fedara_flwr.tasks.overview import dealt

logger = logging.getLogger(__name__)
STOPPED = "stopped by the user"
Kind = TypeVar("Kind")


class Keeper(Callback):
    """Takes what a run makes to where it is kept: lines, checkpoints, facts, and at the end the results."""

    def __init__(self, directory: RunDirectory, method: Method, model: ServerModel, state: ServerState | None = None) -> None:
        """`state` is what a run that is only concluded had reached; else the loop's counts from `begin` on."""
        self.directory, self.method, self.model, self._state = directory, method, model, state
        self.settings = method.settings
        self.loop: RoundLoop | None = None
        self.checkpoints = _checkpoints(directory.path, directory.facts, model)
        self._before = float(directory.facts.get("seconds", 0.0))
        self._began = time.monotonic()
        self._dealt = False
        self._trackers = Trackers({})

    @property
    def state(self) -> ServerState:
        """The server's state that the run has reached."""
        reached = self.loop.state if self.loop is not None else self._state
        assert reached is not None, "a keeper without a run"
        return reached

    @property
    def nodes(self) -> list[Node]:
        """Nodes that are there; none where the run is only concluded."""
        return list(self.loop.roster.nodes.values()) if self.loop is not None else []

    def restored(self) -> ServerState:
        """The state of the run's newest good checkpoint; later lines of metrics.jsonl are taken back.

        Raises:
            ConfigError: no checkpoint can be used, or the data or the tokenizer is not what it was.
        """
        digest = self.model.federation.digest
        if (before := self.directory.facts.get("data", digest)) != digest:
            raise ConfigError(
                f"run.resume: the training data's hash is {digest[:16]!r}, it was {before[:16]!r} when the run began"
            )
        _check_tokenizer("run.resume", self.directory.facts, self.model)
        state, length = _newest(self.checkpoints, self.model)
        here, types = self.model.backbone.dtype, dict(self.directory.facts.get("dtypes", {}))
        if (dtype := types.get("server", here)) != here:
            logger.warning("the server's figures were computed in %s, from here on in %s (model.dtype)", dtype, here)
            earlier = types.pop("before", [])
            self.directory.facts["dtypes"] = types | {"before": [*earlier, {**types, "rounds": state.server_round}]}
        self.directory.go_on(self.settings)
        self.directory.cut(length)
        resumed = [*self.directory.facts.get("resumed", ()), state.server_round]
        self.directory.update({"resumed": resumed, "outcome": "running", "reason": ""})
        return state

    def callbacks(self, state: ServerState) -> list[Callback]:
        """What the loop of this run, which starts from `state`, is to tell of all that comes: the keeper, and the trackers."""
        self._state, flat = state, self.settings.to_flat()
        self._trackers = open_trackers(self.settings.run.track, self.directory.path, flat, state.server_round)
        return [self, Tracking(self._trackers)]

    def begin(self, loop: RoundLoop) -> None:
        """Write what the run is, and say what privacy all of it will have."""
        self.loop = loop
        common = {"data": self.model.federation.digest, "tokenizer": self.model.learner.tokenizer_digest}
        self.directory.update(self._facts() | {"outcome": "running", "reason": ""} | common)
        self.model.overview().log(logger)
        if self.settings.privacy.on:
            logger.info("%s", in_words(self.settings.privacy, self.settings.num_server_rounds))

    def record(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, and say once who is there how rows lie over the clients of a simulation."""
        self.directory.write(line)
        if not self._dealt and not self.settings.privacy.on and (shares := self._partition()):
            self._dealt = True
            dealt(shares["partition"], bool(shares["groups"])).log(logger)

    def after_round(self, loop: RoundLoop) -> None:
        """Write a checkpoint where one is due, the round is the best so far or the run ends, and the facts as they are now."""
        every, state = self.settings.run.checkpoint_every, loop.state
        wanted = (self.settings.num_server_rounds, state.best.get("round"))
        if every and (state.server_round % every == 0 or state.server_round in wanted or loop.failure or loop.stopped):
            self.checkpoints.save(state, self.directory.sync())
        self.directory.update(self._facts())

    def conclude(self, outcome: str, reason: str = "") -> None:
        """Export the best round's model or the last, test it once if the run is complete, write page and summary.

        A complete run has a `reason` where it stopped early.

        Raises:
            RunFailed: the results could not be made. Everything else is written, and the outcome is "failed".
        """
        directory, failure = self.directory, None
        chosen = choose(self.checkpoints, self.method, self.state)
        exported, mask = self._export(chosen, reason), chosen.state.mask
        results: dict[str, Any] = {"test": {}, **_slots(mask)}
        if outcome == "completed":
            logger.info("testing the model of round %d", chosen.state.server_round)  # it may take longer than a round
            try:
                weights = self.method.weights(chosen.state)
                results["test"] = self.model.evaluate(weights, "test")
                results |= compared(self.model, weights)
            except Exception as error:
                failure, outcome = error, "failed"
                reason = f"all rounds are done and {exported.name}/ is written, but not its results: {error_line(error)}"
        end = {"type": "end", "outcome": outcome, "rounds": self.state.server_round, "seconds": self._seconds()}
        end["exported-round"] = chosen.state.server_round
        end |= {"stopped-early": reason} if reason and outcome == "completed" else {}
        end |= {f"test-{name}": value for name, value in results["test"].items()}
        self.record(end)
        self._trackers.take(end)
        results |= {"outcome": outcome, "reason": reason, "modelled": directory.modelled()}
        directory.update(self._facts() | results)
        _describe(exported, directory.facts)
        self._show(results["test"], exported)
        if failure is not None:
            raise RunFailed(reason) from failure

    def _export(self, chosen: Chosen, reason: str) -> Path:
        """Write what is left, before anything that may fail; `reason` is why the run ended, '' where it is complete."""
        try:
            exported = self.model.export(self.directory.path, self.method.exported(chosen.state))
        except Exception as error:
            why = f"{reason}; " if reason else ""
            self.directory.update({"outcome": "failed", "reason": f"{why}its model could not be written: {error_line(error)}"})
            self._trackers.close()
            raise
        self.directory.update({"exported": exported.name, "export": chosen.facts})
        return exported

    def fail(self, reason: str) -> None:
        """The rounds ended by an error: finish with what there is; a run that learnt nothing yet leaves nothing."""
        if self.state.server_round or self.state.solved:
            self.conclude("failed", reason)
        else:
            self._trackers.close()
            self.directory.discard()

    def stop(self) -> None:
        """The run was stopped in the midst of something: finish with its last checkpoint; without one nothing is left."""
        newest = self.checkpoints.newest(self.model.spec)
        if newest is None:
            self._trackers.close()
            _without_checkpoint(self.directory)
            return
        self._state, length = newest
        self.loop = None
        self.directory.cut(length)
        logger.info("stopped: what is left is of the %d whole rounds", self.state.server_round)
        self.conclude("stopped", STOPPED)

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._began

    def _facts(self) -> dict[str, Any]:
        method, state, spec, settings, nodes = self.method, self.state, self.model.spec, self.settings, self.nodes
        clients = Counter(self.loop.roster.dtypes.values()) if self.loop is not None else {}
        types = self.directory.facts.get("dtypes", {})
        left_out = self.loop.roster.left_out() if self.loop is not None else self.directory.facts.get("left-out", {})
        return {
            "rounds": state.server_round,
            "seconds": self._seconds(),
            "method": method.name,
            "title": method.title,
            "paper": method.paper,
            "seed": settings.seed,
            "model": settings.model.name,
            "revision": self.model.revision,
            "key-mapping": self.model.backbone.key_mapping,
            "other-head": self.model.backbone.other_head,
            "clients": len(nodes) or self.directory.facts.get("clients", 0),
            "fingerprint": spec.fingerprint,
            "task": settings.data.task,
            "labels": list(self.model.labels),
            "metric": self.model.task.metric.facts(),
            "metrics": list(self.model.task.metrics),
            "config": settings.to_flat(),
            "dtypes": types | {"server": self.model.backbone.dtype, "clients": clients or types.get("clients", {})},
            "modules": [module.name for module in spec.modules],
            "blocks": [module.block for module in spec.modules],
            "head": state.solved,
            "stopping": state.stopping,
            **_slots(state.mask),
            "bytes": state.bytes_total,
            "left-out": dict.fromkeys(left_out, "cannot train") if settings.privacy.on else left_out,
            "simulated": all(n.simulated for n in nodes) if nodes else self.directory.facts.get("simulated", False),
            "versions": versions(),
            "machine": machine(),
            **(self._privacy() if settings.privacy.on else self._partition()),
        }

    def _privacy(self) -> dict[str, Any]:
        """ε so far. Each time that a run went on counts as a round more: one may have been seen that was not kept."""
        facts = self.directory.facts
        rounds = self.state.server_round + len(facts.get("resumed", ()))
        planned = (self.loop.planned if self.loop is not None else 0) or facts.get("privacy", {}).get("planned", 0)
        return {"privacy": ledger(self.settings.privacy, rounds, planned)}

    def _partition(self) -> dict[str, Any]:
        """Examples of each client by group; known in a simulation, where the server dealt them out, and nowhere else."""
        nodes = self.nodes
        if not nodes or not all(node.simulated and node.key.isdigit() for node in nodes):
            return {}
        try:
            return self.model.partition(max(node.partitions for node in nodes))
        except ConfigError:  # such as cannot be dealt out: the nodes say so, too, and the run ends by that
            return {}

    def _show(self, test: dict[str, float], exported: Path) -> None:
        down, up = (
            sum(size for name, size in self.state.bytes_total.items() if name.startswith(way)) / 1e6 for way in ("down.", "up.")
        )
        facts = self.directory.facts
        if test:
            logger.info("test: %s", ", ".join(f"{name} {figure(value)}" for name, value in test.items()))
        if before := facts.get("unadapted"):
            logger.info("before: %s", ", ".join(f"{name} {figure(value)}" for name, value in before.items()))
        if figures := facts.get("samples-scores"):
            said = ", ".join(f"{name} {figure(one)} (before {figure(two)})" for name, (one, two) in figures.items())
            logger.info("answers to %d validation rows: %s", len(facts["samples"]), said)
        allowed = self.settings.wire.budget_mb
        share = f", {(down + up) / allowed:.2%} of wire.budget-mb = {allowed:,g}" if allowed else ""
        logger.log(
            logging.WARNING if 0 < allowed < down + up else logging.INFO, "sent: %.1f MB down, %.1f MB up%s", down, up, share
        )
        if privacy := facts.get("privacy"):
            logger.info("%s; %s", in_words(self.settings.privacy, privacy["rounds"]), privacy["adjacency"])
        if modelled := facts["modelled"]:
            figures = tuple(modelled[name] for name in ("seconds", "joules", "waiting"))
            profiles = self.settings.fleet.profiles
            logger.info("modelled on %s: %.0f s, %.0f J; a client waits %.0f s", profiles, *figures)
        logger.info("%s: %s (%s)", exported.name, exported, facts["export"]["said"])
        try:
            logger.info("report: %s", write_report(self.directory.path))
        except Exception as error:  # a page can be made again, the run is done
            logger.warning("no report (%s: %s); `fedara report` tries again", type(error).__name__, error)
        logger.info("run directory: %s", self.directory.path)


class Tracking(Callback):
    """Sends every line to the trackers that the run named."""

    def __init__(self, trackers: Trackers) -> None:
        self.trackers = trackers

    def record(self, line: dict[str, Any]) -> None:
        """Send one line of metrics to every tracker."""
        self.trackers.take(line)


@dataclass(frozen=True)
class SavedRun:
    """A run without its data; `state` is that of the round whose model it leaves, as `export` says."""

    method: Method
    state: ServerState
    model: ServerModel
    export: dict[str, Any]


def open_run(path: Path) -> SavedRun:
    """Open a run that exists, as its good checkpoints have it: the best round's model, or the last.

    Raises:
        ConfigError: `path` is no run's folder, the model cannot be loaded, its tokenizer is not what it was, or no checkpoint
            can be used.
    """
    method, model, checkpoints, state, _ = _open(path)
    chosen = choose(checkpoints, method, state)
    return SavedRun(method, chosen.state, model, chosen.facts)


def conclude_stopped(path: Path) -> None:
    """Finish the folder of a run that was stopped: what its checkpoints have is exported.

    Without one nothing is left, unless the run was stopped after its last round, when its model was written already.

    Raises:
        ConfigError: as `open_run`.
    """
    directory = RunDirectory.open(path)
    try:
        if any((path / "checkpoint").glob("round-*")):
            method, model, _, state, length = _open(path)
            directory.cut(length)
            Keeper(directory, method, model, state).conclude("stopped", STOPPED)
        else:
            _without_checkpoint(directory)
    finally:
        directory.close()


def _without_checkpoint(directory: RunDirectory) -> None:
    """Finish a stopped run that has no checkpoint: it leaves nothing, unless its model was written already."""
    facts = directory.facts
    if facts.get("outcome") == "running" and "exported" in facts:
        directory.update({"outcome": "stopped", "reason": STOPPED})
        _describe(directory.path / facts["exported"], facts)
    else:
        directory.discard()


def _open(path: Path) -> tuple[Method, ServerModel, Checkpoints, ServerState, int]:
    """Method, model, checkpoints, and the newest good one's state and bytes of metrics.jsonl."""
    facts, settings = read_facts(path), read_settings(read_config(path))
    labels = _fact(path, facts, "labels", list)
    model = ServerModel(settings, tuple(labels))
    _check_tokenizer(str(path), facts, model)
    method = strategies.find(settings.method)(settings, model)
    checkpoints = _checkpoints(path, facts, model)
    return method, model, checkpoints, *_newest(checkpoints, model)


def _slots(mask: RankMask) -> dict[str, Any]:
    """A mask as federated.json has it."""
    return {"ranks": list(mask.ranks), "alive-per-module": mask.alive.tolist(), "mask": mask.to_bytes().hex()}


def _checkpoints(path: Path, facts: dict[str, Any], model: ServerModel) -> Checkpoints:
    identity = {"run": _fact(path, facts, "id", str), "fingerprint": model.spec.fingerprint}
    return Checkpoints(path / "checkpoint", identity)


def _fact(path: Path, facts: dict[str, Any], name: str, kind: type[Kind]) -> Kind:
    """What a run's federated.json must say for it to be opened.

    Raises:
        ConfigError: it does not.
    """
    if not isinstance(found := facts.get(name), kind):
        raise ConfigError(f"{path / 'federated.json'}: it has no {name!r} as a run writes it, the run cannot be opened")
    return found


def _check_tokenizer(where: str, facts: dict[str, Any], model: ServerModel) -> None:
    """Refuse a model that would be spoken to otherwise than it was taught; of older runs it is not known.

    Raises:
        ConfigError: the tokenizer's digest is not what it was when the run began.
    """
    digest = model.learner.tokenizer_digest
    if facts.get("tokenizer", digest) != digest:
        name = model.settings.model.name
        line = "its vocabulary, chat template or system text has changed since the run began"
        raise ConfigError(f"{where}: model.name = {name!r}: {line}")


def _describe(exported: Path, facts: dict[str, Any]) -> None:
    """Write the card of an export; without one it is a whole model still."""
    try:
        write_card(exported, facts, "merged" if exported.name == "model" else "peft")
    except Exception as error:
        logger.warning("no model card (%s); `fedara export` tries again", error_line(error))


def _newest(checkpoints: Checkpoints, model: ServerModel) -> tuple[ServerState, int]:
    newest = checkpoints.newest(model.spec)
    if newest is None:
        raise ConfigError(f"{checkpoints.folder}: no checkpoint that can be used (run.checkpoint-every = 0 writes none)")
    return newest
