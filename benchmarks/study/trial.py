"""One trial of a comparison: a method, a setting and a seed, run in this process, every evaluation written as it comes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import flwr
import numpy as np
import torch
import transformers
from flwr.app import MetricRecord
from plan import PAIRED, append, read

from fedara_flwr import strategies
from fedara_flwr.config import DataSettings, ModelSettings, Settings
from fedara_flwr.engine import InProcessGrid
from fedara_flwr.files import processor
from fedara_flwr.server import loop
from fedara_flwr.server.evaluate import ServerModel
from fedara_flwr.server.lines import FLOPS
from fedara_flwr.server.loop import Callback, RoundLoop
from fedara_flwr.tasks import read_settings

KEPT = ("accuracy", "macro-f1", "token-accuracy", "loss", "alive", "dead-modules", "factor-error")


class TimeUp(Exception):
    """No trial starts any more."""


@lru_cache(maxsize=1)
def server_model(model: ModelSettings, data: DataSettings, seed: int) -> ServerModel:
    """One loaded model per process; trials differ only in what is trained."""
    return ServerModel(Settings(model=model, data=data, seed=seed, run={"threads": 1}))


@lru_cache(maxsize=1)
def hardware() -> str:
    """What computes, and with which libraries."""
    what = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} x {processor() or '?'}"
    return f"{what}; torch {torch.__version__}, transformers {transformers.__version__}, flwr {flwr.__version__}"


def keep_heads(folder: Path) -> None:
    """From here on a head is solved once for a set, a seed and a start, and read back from `folder` with its bytes."""
    folder.mkdir(exist_ok=True, parents=True)
    solve_head = loop.solve_head

    def solve(settings: Settings, model: Any, state: Any, roster: Any, grid: Any) -> tuple[list[dict], list[str]]:
        if settings.head.start == "random" or "head" not in state.arrays or not model.task.classes:
            return solve_head(settings, model, state, roster, grid)
        path = folder / head_name(settings, model.backbone.dtype)
        roster.wait(grid)  # what nodes are asked first counts once, whether the head is solved here or read
        if not path.exists():
            before = dict(roster.meter.total)
            lines, _ = solve_head(settings, model, state, roster, grid)
            sent = {part: size - before.get(part, 0) for part, size in roster.meter.total.items()}
            lines = [{name: line[name] for name in line if not isinstance(line[name], dict)} for line in lines]
            facts = json.dumps({"solved": state.solved, "bytes": sent, "lines": lines})
            part = path.with_name(f"{path.stem}-{os.getpid()}.part.npz")  # another part of the study may look for it meanwhile
            np.savez(part, head=state.arrays["head"], facts=np.array(facts))
            os.replace(part, path)
            roster.meter.total.subtract(sent)  # counted below, as it is every time
        kept = np.load(path)
        facts = json.loads(str(kept["facts"]))
        state.arrays["head"], state.solved = kept["head"], facts["solved"]
        roster.meter.total.update(facts["bytes"])
        return [{**line, "bytes-down": {}, "bytes-up": {}} for line in facts["lines"]], []

    loop.solve_head = solve


def head_name(settings: Settings, dtype: str) -> str:
    """A file for each head that is another one: all that the sums come from is in its name, or in the digest there."""
    data = settings.data
    told = [part.model_dump(mode="json") for part in (settings.model, data, settings.head)]
    told[1]["path"] = Path(data.path).name
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
    asked = (told[1]["path"] or data.name, data.dirichlet_alpha, settings.seed, settings.head.start, dtype, settings.wire.up)
    return "-".join(map(str, (*asked, digest))) + ".npz"


class Trial(Callback):
    """One run that can be continued rung by rung; what its files already hold is not run again."""

    def __init__(
        self,
        names: dict[str, Any],
        config: dict[str, Any],
        clients: int,
        every: int,
        out: Path,
        done: Sequence[Path] = (),
        until: float = float("inf"),
    ) -> None:
        """A trial that has not begun.

        Args:
            names: what its lines are told apart by (`PAIRED`).
            config: run configuration with dotted keys.
            every: rounds between evaluations; the last round has one anyway.
            out: file that its lines are appended to.
            done: files, `out` among them, whose lines count as run.
            until: it does not start after this time (of `time.monotonic`).
        """
        self.names, self.clients, self.every, self.out, self.done, self.until = names, clients, every, out, done, until
        self.settings = read_settings(config)
        self.rounds = self.settings.num_server_rounds
        self.loop: RoundLoop | None = None
        self._summed = {
            "modelled-seconds": 0.0,
            "modelled-joules": 0.0,
            "client-seconds": 0.0,
            "client-flops": 0.0,
            "flops-below": 0.0,
            "dropped": 0.0,
        }
        self._line: dict[str, Any] = {}

    def run(self, rounds: int) -> float:
        """Go on to round `rounds`; returns the mean of the last two validation scores until there.

        Raises:
            TimeUp: it would have to start, and it is too late.
        """
        if rounds not in self._scores() and self.rounds not in self._scores():
            if self.loop is None:
                self._open()
            self.loop.start(self.grid, self.loop.initial_arrays(), rounds, evaluate_fn=self._evaluate)
            self._write()
        elif self.loop is None:
            print(f"has run, see --done: {json.dumps(self.names, ensure_ascii=False)}", flush=True)
        scores = self._scores()
        wanted = [scores[number] for number in sorted(scores) if number <= rounds]
        return float(np.mean(wanted[-2:]))

    def _open(self) -> None:
        if time.monotonic() > self.until:
            raise TimeUp
        settings = self.settings
        self.model = server_model(settings.model, settings.data, settings.seed)
        method = strategies.find(settings.method)(settings, self.model)
        expected = self.model.expected(method.all_terms(), method.parts)
        self.loop = RoundLoop(settings, method, method.start(), expected, (self,))
        self.grid = InProcessGrid(settings.to_flat(), self.clients)

    def _scores(self) -> dict[int, float]:
        lines = read(list(self.done)).get(tuple(self.names[name] for name in PAIRED), [])
        return {line["round"]: line["score"] for line in lines}

    def _evaluate(self, server_round: int, arrays: object) -> MetricRecord | None:
        if server_round % self.every and server_round != self.rounds:
            return None
        return MetricRecord(dict(self.model.evaluate(self.loop.method.weights(self.loop.state))))

    def record(self, record: dict[str, Any]) -> None:
        """Sum what rounds cost, and keep a line for each that was evaluated until its clients' lines have come."""
        if record["type"] == "client":
            self._summed["client-seconds"] += record["seconds-all"]
            self._summed["client-flops"] += sum(record[name] for name in FLOPS)
            self._summed["flops-below"] += record["flops-below"]
        if record["type"] not in ("start", "round"):
            return
        self._write()
        for name in ("modelled-seconds", "modelled-joules"):
            self._summed[name] += record.get(name, 0.0)
        self._summed["dropped"] += len(record.get("dropped", ()))
        main, number = self.model.task.metric.name, record.get("round", 0)
        if main not in record:
            return
        self._line = {
            **self.names,
            "method": self.settings.method,
            "learning-rate": self.settings.train.learning_rate,
            "round": number,
            "score": record[main],
            **{name: record[name] for name in KEPT if name in record},
            "mb": record["bytes-total"] / 1e6,
            "mb-kept": record.get("bytes-kept", 0) / 1e6,
            "dtype": self.model.backbone.dtype,
            "hardware": hardware(),
        }
        if number == self.rounds:
            test = self.model.evaluate(self.loop.method.weights(self.loop.state), "test")
            self._line |= {f"test-{name}": value for name, value in test.items()} | {"test-score": test[main]}

    def _write(self) -> None:
        """Append the line that is kept, with what the clients have taken by then."""
        if not self._line:
            return
        line, self._line = {**self._line, **self._summed}, {}
        append(self.out, line)
        shown = ("set", "alpha", "row", "rate", "seed", "round", "score", "mb")
        print(time.strftime("%H:%M:%S"), json.dumps({name: line[name] for name in shown}), flush=True)
