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
from fedara_flwr.tasks import read_settings

EVERY = 5  # rounds between evaluations
DATASETS: dict[str, tuple[int, dict]] = {  # name: clients, and how the set is read and dealt out
    "banking77": (50, {"data.dirichlet-alpha": 0.1}),
    "20news": (50, {"data.dirichlet-alpha": 0.1}),
    "sst2": (50, {"data.dirichlet-alpha": 0.1, "data.validation": 0.02}),
    "docstrings": (20, {"data.dirichlet-alpha": 0.5}),
    "medquad": (
        9,
        {
            "data.task": "causal-lm",
            "data.partition": "natural",
            "data.id-column": "source",
            "data.max-length": 128,
            "data.validation-rows": 64,
            "data.options": "generate = 0",
            "strategy.fraction-train": 3 / 9,
            "strategy.min-train-nodes": 3,
            "train.steps": 4,
        },
    ),
    "btc": (
        6,
        {
            "data.task": "token-classification",
            "data.text-column": "tokens",
            "data.label-column": "ner_tags",
            "data.partition": "natural",
            "data.id-column": "section",
        },
    ),
    "qed": (20, {"data.task": "question-answering", "data.partition": "iid", "data.validation-rows": 400}),
    "wnut17": (
        20,
        {
            "data.task": "token-classification",
            "data.text-column": "tokens",
            "data.label-column": "ner_tags",
            "data.dirichlet-alpha": 0.1,
        },
    ),
}
BASE = {
    "strategy.min-train-nodes": 5,
    "strategy.round-timeout": 86400.0,  # on a busy machine no client may be late
    "train.steps": 8,
    "run.threads": 1,
}
DRAWN = {"head.start": "random", "train.loss": "plain", "wire.down": "float32", "wire.up": "float32"}
"""How runs began and numbers travelled when the benchmarks that say so were made."""


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
        self.clients, reading = DATASETS[dataset]
        flat = {
            **BASE,
            "model.dtype": dtype,
            "num-server-rounds": rounds,
            "method": method,
            "seed": seed,
            "data.path": data if dataset != "docstrings" else "",
            "strategy.fraction-train": 5 / self.clients,
            **reading,
            **setting,
        }
        self.key = {"stage": stage, "data": dataset, "method": method, "setting": setting, "seed": seed}
        self.out, self.rounds, self.settings = out, rounds, read_settings(flat)
        self.loop: RoundLoop | None = None
        self._modelled = {"seconds": 0.0, "joules": 0.0}
        self._busy, self._flops = 0.0, 0.0
        self._line: dict = {}

    def run(self, rounds: int) -> float:
        """Go on to round `rounds`; returns the mean of the last two validation scores, by the task's main metric."""
        wanted = (rounds - EVERY, rounds)
        if rounds not in self._done():
            if self.loop is None:
                settings = self.settings
                self.model = server_model(settings.model, settings.data, settings.seed)
                self.loop = new_loop(settings, self.model, self)
                self.grid = InProcessGrid(settings.to_flat(), self.clients)
            self.loop.start(self.grid, self.loop.initial_arrays(), rounds, evaluate_fn=self._evaluate)
            self._write()
        done = self._done()
        return sum(done[r] for r in wanted) / 2

    def _done(self) -> dict[int, float]:
        return {line["round"]: line["score"] for line in read(self.out) if self._mine(line)}

    def _mine(self, line: dict) -> bool:
        return all(line[name] == value for name, value in self.key.items())

    def _evaluate(self, server_round: int, arrays: object) -> MetricRecord | None:
        if server_round % EVERY:
            return None
        return MetricRecord(dict(self.model.evaluate(self._weights())))

    def _weights(self) -> Weights:
        assert self.loop is not None, "no round yet"
        return self.loop.method.weights(self.loop.state)

    def record(self, record: dict) -> None:
        """Sum what rounds cost, and keep a line for each that was evaluated until its clients' lines have come."""
        if record["type"] == "client":
            self._busy += record["seconds-all"]
            self._flops += record["flops-forward"] + record["flops-backward"]
        if record["type"] not in ("start", "round"):
            return
        self._write()
        for name in self._modelled:
            self._modelled[name] += record.get(f"modelled-{name}", 0.0)
        main, number = self.model.task.metric.name, record.get("round", 0)
        if main not in record:
            return
        names = ("accuracy", "macro-f1", "loss", "alive", "dead-modules", "factor-error")
        self._line = {
            **self.key,
            "dtype": self.settings.model.dtype,
            "round": number,
            "score": record[main],
            **{name: record[name] for name in names if name in record},
            "mb": record["bytes-total"] / 1e6,
            "mb-kept": record.get("bytes-kept", 0) / 1e6,
            **{f"modelled-{name}": value for name, value in self._modelled.items()},
        }
        if number == self.rounds:
            test = self.model.evaluate(self._weights(), "test")
            self._line |= {f"test-{name}": value for name, value in test.items()} | {"test-score": test[main]}

    def _write(self) -> None:
        """Append the line that is kept, with what the clients have taken by then."""
        if not self._line:
            return
        line, self._line = {**self._line, "client-seconds": self._busy, "client-flops": self._flops}, {}
        with self.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = ("stage", "data", "method", "seed", "round", "score", "mb")
        print(time.strftime("%H:%M:%S"), json.dumps({name: line[name] for name in shown}), flush=True)
