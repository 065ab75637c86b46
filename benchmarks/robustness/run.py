"""Runs the table of README.md, cell by cell: every rule under every attack at every share of attackers.

python benchmarks/robustness/run.py [results.jsonl]

A line is written for each run; what the file holds is not run again.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from attack import ATTACKS, AttackGrid
from table import read

from fedara_flwr import seeds, strategies
from fedara_flwr.adapters.backbone import silence_libraries
from fedara_flwr.server.evaluate import ServerModel
from fedara_flwr.server.loop import Callback, RoundLoop, RunFailed
from fedara_flwr.tasks import read_settings

CLIENTS, SEED = 10, 42
RECKONED = 0.2  # share of attackers that trimmed-mean and multi-krum reckon with, where there are not more
SHARES = (0.0, 0.2, 0.4, 0.1)
LAYERS = (
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    *(f"{name}.dense" for name in ("attention.output", "intermediate", "output")),
)
BASE = {
    "method": "fedara",
    "seed": SEED,
    "num-server-rounds": 6,
    "adapter.target-modules": ",".join(f"layer.{block}.{name}" for block in (4, 5) for name in LAYERS),
    "strategy.fraction-train": 1.0,
    "train.steps": 4,
    "train.batch-size": 8,
    "data.dirichlet-alpha": 1.0,
    "data.max-length": 16,
    "data.test": 0.08,
    "run.threads": 1,
    "head.start": "random",  # the attacks are on rounds
    "train.loss": "plain",
    "wire.down": "float32",
    "wire.up": "float32",
    "strategy.round-timeout": 86400.0,  # on a busy machine no client may be late
}
RULES = {
    "mean": {},
    "undefended": {"strategy.norm-bound": 0.0},  # the mean without a bound
    "bound 5": {"strategy.norm-bound": 5.0},
    "median": {"strategy.robust": "median"},
    "trimmed-mean": {"strategy.robust": "trimmed-mean"},
    "norm-clip": {"strategy.robust": "norm-clip"},
    "multi-krum": {"strategy.robust": "multi-krum"},
}


class Lines(Callback):
    """Keeps the lines of a run."""

    def __init__(self) -> None:
        self.lines: list[dict] = []

    def record(self, line: dict) -> None:
        """Keep it."""
        self.lines.append(line)


def cells() -> Iterator[dict]:
    """Rule, attack and share of every run, the most telling first."""
    for share in SHARES:
        for attack in ATTACKS if share else ("none",):
            for rule in RULES:
                yield {"rule": rule, "attack": attack, "share": share, "seed": SEED}


def attackers(share: float) -> frozenset[int]:
    """Numbers of the bad clients; those of a smaller share are among those of a larger one."""
    order = seeds.generator(SEED, "attackers").permutation(CLIENTS)
    return frozenset(int(i) for i in order[: round(share * CLIENTS)])


def run(cell: dict, model: ServerModel | None) -> tuple[dict, ServerModel]:
    """One run; its line, and the server's model, which all share."""
    rule = RULES[cell["rule"]] | {"strategy.attackers": max(RECKONED, cell["share"])}
    settings = read_settings(BASE | rule)
    model = model or ServerModel(settings)
    bad = attackers(cell["share"])
    kept = Lines()
    method = strategies.find(settings.method)(settings, model)
    loop = RoundLoop(settings, method, method.start(), model.expected(method.all_terms(), method.parts), [kept])
    grid = AttackGrid(settings.to_flat(), CLIENTS, attack=cell["attack"], attackers=bad, seed=SEED)
    began, outcome = time.monotonic(), "completed"
    try:
        loop.start(grid, loop.initial_arrays(), settings.num_server_rounds, evaluate_fn=lambda *_: None)
    except RunFailed:
        outcome = "failed"
    rounds = [line for line in kept.lines if line["type"] == "round"]
    drops = Counter(("bad" if int(d["client"]) in bad else "good", d["reason"]) for line in rounds for d in line["dropped"])
    left = [int(client) for line in rounds for client in line.get("left-out-by-krum", ())]
    with np.errstate(all="ignore"):
        test = model.evaluate(method.weights(loop.state), "test")
    return {
        **cell,
        "accuracy": test["accuracy"],
        "macro-f1": test["macro-f1"],
        "outcome": outcome,
        "rounds": len(rounds),
        "alive": loop.state.mask.count,
        "dead-modules": loop.state.mask.dead_modules,
        "dropped": {f"{who} {reason}": count for (who, reason), count in sorted(drops.items())},
        "left-out": {"bad": sum(c in bad for c in left), "good": sum(c not in bad for c in left)},
        "seconds": round(time.monotonic() - began, 2),
    }, model


def find(lines: list[dict], cell: dict) -> dict | None:
    """The line of a cell."""
    return next((line for line in lines if all(line[name] == value for name, value in cell.items())), None)


def main(out: Path) -> None:
    """All runs that the file lacks."""
    silence_libraries()
    torch.set_num_threads(1)
    done = read(out)
    if out.exists() and out.stat().st_size and not out.read_bytes().endswith(b"\n"):
        with out.open("a") as file:
            file.write("\n")
    model = None
    for cell in cells():
        if find(done, cell):
            continue
        if cell["rule"] == "undefended" and (same := find(done, cell | {"rule": "mean"})) and not same["dropped"]:
            line = same | cell | {"seconds": 0.0}  # where the bound drops nothing, it is the very same run
        else:
            line, model = run(cell, model)
        done.append(line)
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(time.strftime("%H:%M:%S"), json.dumps(line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "results.jsonl"))
