"""Tunes each method alike, by successive halving on validation data, and writes every evaluation as it comes.

    python benchmarks/defaults/tune.py STAGE --data DIR --out FILE [--methods a,b] [--seeds 1,2,3]

Stages: `grid` (the same grid for every method: all settings for 10 rounds, the best three for 30, the best one to the end and
with more seeds) and `ablate` (given settings on every seed).
Trials run in this process with the in-process engine, one torch thread each; start two of these for two cores. Trials whose
lines are in FILE already are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import time
from functools import lru_cache
from pathlib import Path

from fedara_flwr import strategies
from fedara_flwr.config import DataSettings, ModelSettings, Settings
from fedara_flwr.engine import InProcessGrid
from fedara_flwr.server.evaluate import ServerModel

EVERY = 5  # rounds between evaluations
DATASETS = {  # name: (clients, Dirichlet alpha)
    "banking77": (50, 0.1),
    "docstrings": (20, 0.5),
}
GRID = [
    {"train.learning-rate": lr, "adapter.alpha": alpha, "train.head-learning-rate": head}
    for lr, alpha, head in [
        (5e-4, 24.0, 1e-2),
        (5e-4, 24.0, 3e-2),
        (5e-4, 96.0, 1e-2),
        (2e-3, 24.0, 1e-2),
        (2e-3, 24.0, 3e-2),
        (2e-3, 96.0, 1e-2),
        (2e-3, 96.0, 3e-2),
        (1e-2, 24.0, 1e-2),
        (1e-2, 24.0, 3e-2),
        (1e-2, 96.0, 1e-2),
        (3e-2, 24.0, 1e-2),
    ]
]
BASE = {
    "model.pooling": "identity",
    "strategy.min-train-nodes": 5,
    "train.steps": 8,
    "run.threads": 1,
}


@lru_cache(maxsize=1)
def server_model(model: ModelSettings, data: DataSettings, seed: int) -> ServerModel:
    """One loaded model per process; trials differ only in what is trained."""
    return ServerModel(Settings(model=model, data=data, seed=seed, run={"threads": 1}))


class Trial:
    """One run that can be continued rung by rung."""

    def __init__(
        self, dataset: str, data_dir: str, method: str, setting: dict, seed: int, rounds: int, out: Path, stage: str, dtype: str
    ) -> None:
        clients, alpha = DATASETS[dataset]
        flat = {
            **BASE,
            "model.dtype": dtype,
            "num-server-rounds": rounds,
            "method": method,
            "seed": seed,
            "data.dirichlet-alpha": alpha,
            "data.path": data_dir if dataset != "docstrings" else "",
            "strategy.fraction-train": 5 / clients,
            **setting,
        }
        self.key = {"stage": stage, "data": dataset, "method": method, "setting": setting, "seed": seed}
        self.out, self.clients, self.flat, self.strategy = out, clients, flat, None
        self.rounds, self.scores = rounds, []
        self.began = 0.0

    def run(self, rounds: int) -> float:
        """Go on to round `rounds`; returns the mean of the last two validation accuracies."""
        done = [line for line in read(self.out) if all(line[k] == v for k, v in self.key.items())]
        if any(line["round"] == rounds for line in done):
            return sum(line["accuracy"] for line in done if line["round"] in (rounds, rounds - EVERY)) / 2
        if self.strategy is None:
            settings = Settings.from_flat(self.flat)
            self.model = server_model(settings.model, settings.data, settings.seed)
            self.strategy = strategies.find(settings.method)(settings, self.model)
            self.grid, self.began = InProcessGrid(settings.to_flat(), self.clients), time.time()
        self.strategy.start(self.grid, self.strategy.initial_arrays(), rounds, evaluate_fn=self._evaluate)
        return sum(self.scores[-2:]) / 2

    def _evaluate(self, server_round: int, arrays):
        strategy, state = self.strategy, self.strategy.state
        if server_round == 0 or server_round % EVERY:
            return None
        found = self.model.evaluate(state.arrays, state.mask, strategy.scales())
        self.scores.append(found["accuracy"])
        line = {
            **self.key,
            "round": server_round,
            **found,
            "dtype": self.flat["model.dtype"],
            "mb": sum(strategy.meter.total.values()) / 1e6,
            "alive": state.mask.count,
            "dead-modules": state.mask.dead_modules,
            "seconds": time.time() - self.began,
        }
        if server_round == self.rounds:
            test = self.model.evaluate(state.arrays, state.mask, strategy.scales(), "test")
            line |= {f"test-{name}": value for name, value in test.items()}
        with self.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps({k: line[k] for k in ("stage", "method", "setting", "seed", "round", "accuracy", "mb")}), flush=True)
        return None


def read(path: Path) -> list[dict]:
    """Lines written so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def halve(make, settings: list[dict], seeds: list[int], rounds: int, rungs: list[tuple[int, int]]) -> dict:
    """Successive halving on the first seed: (rounds, survivors) per rung; the winner runs whole on all seeds."""
    trials = [make(setting, seeds[0]) for setting in settings]
    for reached, survivors in rungs:
        trials = sorted(trials, key=lambda trial: -trial.run(reached))[:survivors]
    best = trials[0]
    best.run(rounds)
    for seed in seeds[1:]:
        make(best.key["setting"], seed).run(rounds)
    return best.key["setting"]


def main() -> None:
    """Parse the command line and run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["grid", "ablate"])
    parser.add_argument("--data", default="docstrings", help="folder of a data set named like one of DATASETS")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default="fedlora,fedara-static,fedara")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--dtype", default="float32", help="of the backbone; bfloat16 is faster where the processor has it")
    parser.add_argument("--setting", default="[]", help="JSON list of settings; stage grid has one of its own")
    args = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    dataset = Path(args.data).name

    def maker(method: str):
        rest = (args.rounds, args.out, args.stage, args.dtype)
        return lambda setting, seed: Trial(dataset, args.data, method, setting, seed, *rest)

    for method in args.methods.split(","):
        if args.stage == "grid":
            halve(maker(method), json.loads(args.setting) or GRID, seeds, args.rounds, [(10, 3), (30, 1)])
        else:
            for setting, seed in itertools.product(json.loads(args.setting), seeds):
                maker(method)(setting, seed).run(args.rounds)


if __name__ == "__main__":
    main()
