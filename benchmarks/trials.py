"""One trial of a comparison: a method, a setting and a seed, run in this process, every evaluation written as it comes.

The in-process engine with one torch thread: start one process for each core. Shared by the benchmarks beside this file.
"""

from __future__ import annotations

import json
import time
from functools import lru_cache
from pathlib import Path

from curves import read
from flwr.app import MetricRecord

from fedara_flwr import strategies
from fedara_flwr.config import DataSettings, ModelSettings, Settings
from fedara_flwr.engine import InProcessGrid
from fedara_flwr.model.deltas import Weights
from fedara_flwr.server.evaluate import ServerModel
from fedara_flwr.server.loop import Callback, RoundLoop

EVERY = 5  # rounds between evaluations
DATASETS = {  # name: (clients, Dirichlet alpha)
    "banking77": (50, 0.1),
    "20news": (50, 1.0),
    "docstrings": (20, 0.5),
}
BASE = {
    "strategy.min-train-nodes": 5,
    "strategy.round-timeout": 86400.0,  # on a busy machine no client may be late
    "train.steps": 8,
    "run.threads": 1,
}


@lru_cache(maxsize=1)
def server_model(model: ModelSettings, data: DataSettings, seed: int) -> ServerModel:
    """One loaded model per process; trials differ only in what is trained."""
    return ServerModel(Settings(model=model, data=data, seed=seed, run={"threads": 1}))


def new_loop(settings: Settings, model: ServerModel, *callbacks: Callback) -> RoundLoop:
    """The rounds of a run before its first one, told to the callbacks."""
    method = strategies.find(settings.method)(settings, model)
    return RoundLoop(settings, method, method.start(), model.expected(method.all_terms(), method.parts), callbacks)


class Trial(Callback):
    """One run that can be continued rung by rung; what its file already holds is not run again."""

    def __init__(
        self, out: Path, stage: str, data: str, method: str, setting: dict, seed: int, rounds: int, dtype: str
    ) -> None:
        dataset = Path(data).name
        self.clients, alpha = DATASETS[dataset]
        flat = {
            **BASE,
            "model.dtype": dtype,
            "num-server-rounds": rounds,
            "method": method,
            "seed": seed,
            "data.dirichlet-alpha": alpha,
            "data.path": data if dataset != "docstrings" else "",
            "strategy.fraction-train": 5 / self.clients,
            **setting,
        }
        self.key = {"stage": stage, "data": dataset, "method": method, "setting": setting, "seed": seed}
        self.out, self.rounds, self.settings = out, rounds, Settings.from_flat(flat)
        self.loop: RoundLoop | None = None
        self._modelled = {"seconds": 0.0, "joules": 0.0}
        self._busy = 0.0

    def run(self, rounds: int) -> float:
        """Go on to round `rounds`; returns the mean of the last two validation accuracies."""
        wanted = (rounds - EVERY, rounds)
        done = {line["round"]: line["accuracy"] for line in read(self.out) if self._mine(line)}
        if rounds not in done:
            if self.loop is None:
                settings = self.settings
                self.model = server_model(settings.model, settings.data, settings.seed)
                self.loop = new_loop(settings, self.model, self)
                self.grid = InProcessGrid(settings.to_flat(), self.clients)
            self.loop.start(self.grid, self.loop.initial_arrays(), rounds, evaluate_fn=self._evaluate)
            done = {line["round"]: line["accuracy"] for line in read(self.out) if self._mine(line)}
        return sum(done[r] for r in wanted) / 2

    def _mine(self, line: dict) -> bool:
        return all(line[name] == value for name, value in self.key.items())

    def _evaluate(self, server_round: int, arrays: object) -> MetricRecord | None:
        if server_round == 0 or server_round % EVERY:
            return None
        return MetricRecord(dict(self.model.evaluate(self._weights())))

    def _weights(self) -> Weights:
        assert self.loop is not None, "no round yet"
        return self.loop.method.weights(self.loop.state)

    def record(self, record: dict) -> None:
        """Sum what rounds cost, and write a line for each that was evaluated."""
        if record["type"] == "client":
            self._busy += record["seconds-all"]
        if record["type"] != "round":
            return
        for name in self._modelled:
            self._modelled[name] += record.get(f"modelled-{name}", 0.0)
        if "accuracy" not in record:
            return
        line = {
            **self.key,
            "dtype": self.settings.model.dtype,
            **{name: record[name] for name in ("round", "accuracy", "macro-f1", "loss", "alive", "dead-modules")},
            "mb": record["bytes-total"] / 1e6,
            "mb-kept": record["bytes-kept"] / 1e6,
            "factor-error": record.get("factor-error"),
            **{f"modelled-{name}": value for name, value in self._modelled.items()},
            "client-seconds": self._busy,
        }
        if record["round"] == self.rounds:
            test = self.model.evaluate(self._weights(), "test")
            line |= {f"test-{name}": value for name, value in test.items()}
        # client lines of this round are written after it; what they took counts from the next line on
        with self.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = ("stage", "method", "setting", "seed", "round", "accuracy", "mb")
        print(time.strftime("%H:%M:%S"), json.dumps({name: line[name] for name in shown}), flush=True)
