"""Runs the study's plan: every cell, every row, rates by successive halving, then all seeds.

    python benchmarks/study/run.py --data DIR --out FILE [--part 1/2] [--minutes 60] [--cells "20news, α = 0.1"] [--seeds 1]

DIR holds the sets' folders. A line is written at every evaluation; a trial that FILE (or a file of --done) holds to its end is
not run again, whatever --config says, so a cut-off study goes on where it stopped; `--done` without a file runs what the
results here have once more. `--part i/n` takes every n-th row of each cell: start one process for each core, or as many as a
GPU bears (`--config '{"run.device": "cuda"}'`), each with a FILE of its own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plan import HERE, Cell, Plan, a_file, read_plan, row_config
from trial import TimeUp, Trial, keep_heads

from fedara_flwr import strategies
from fedara_flwr.keys import ConfigError


class Study:
    """What one process does of a plan.

    Attributes:
        out: file that its lines go to.
        done: files whose trials count as run.
        until: no trial starts after this time (of `time.monotonic`).
    """

    def __init__(self, plan: Plan, data: Path, out: Path, done: Sequence[Path] = (), until: float = float("inf")) -> None:
        self.plan, self.data, self.out, self.done, self.until = plan, data, out, done, until
        self.over: dict[str, Any] = {}

    def cell(self, cell: Cell, part: int, parts: int, seeds: Sequence[int], only: Sequence[str] = ()) -> None:
        """Every `parts`-th row of a cell, of those that are asked for; all without `only`."""
        for row in list(self.plan.groups[cell.group].rows)[part - 1 :: parts]:
            if not only or row in only:
                self.row(cell, row, seeds)

    def row(self, cell: Cell, row: str, seeds: Sequence[int]) -> None:
        """Successive halving of the rates on the plan's first seed, then each of the seeds with the best one."""
        group, sign = self.plan.groups[cell.group], -1 if self.plan.sets[cell.set].lower_is_better else 1
        rounds = self.rounds(cell, row)
        trials = {rate: self.trial(cell, row, rate, self.plan.seeds[0], rounds) for rate in group.factors if rounds}
        for rung in group.rungs if trials else ():
            scores = {rate: sign * trial.run(min(rung["rounds"], rounds)) for rate, trial in trials.items()}
            best = sorted(scores, key=lambda rate: -scores[rate])[: rung["survivors"]]
            trials = {rate: trials[rate] for rate in best}
        rate = next(iter(trials), 1.0)
        for seed in seeds:
            kept = trials.get(rate) if seed == self.plan.seeds[0] else None
            (kept or self.trial(cell, row, rate, seed, rounds)).run(rounds)

    def config(self, cell: Cell, row: str) -> dict[str, Any]:
        """What a row's runs are told, without its rate."""
        data = self.plan.sets[cell.set]
        dealt = {"data.dirichlet-alpha": cell.alpha} if cell.alpha is not None else {}
        where = {"data.path": str(self.data / cell.set)} if not data.built_in else {"data.name": cell.set}
        share = {"strategy.fraction-train": self.plan.base["strategy.min-train-nodes"] / data.clients}
        return {**self.plan.base, **share, **dealt, **where, **data.config, **row_config(self.row_of(cell, row)), **self.over}

    def rounds(self, cell: Cell, row: str) -> int:
        """The group's, whatever a file of configs/ has: rows are compared after as many; a row may say its own in the plan."""
        group = self.plan.groups[cell.group]
        return int(group.rows[row].get("num-server-rounds", group.rounds))

    def row_of(self, cell: Cell, row: str) -> dict[str, Any]:
        """As the plan has it."""
        return self.plan.groups[cell.group].rows[row]

    def trial(self, cell: Cell, row: str, rate: float, seed: int, rounds: int) -> Trial:
        """One run; at the method's own rate, as it is by default, where the group tries no others."""
        config = {**self.config(cell, row), "seed": seed, "num-server-rounds": rounds}
        if self.plan.groups[cell.group].factors:
            config["train.learning-rate"] = rate * strategies.find(config.get("method", "fedara")).learning_rate
        names = {"set": cell.set, "alpha": cell.alpha, "group": cell.group, "row": row, "rate": rate, "seed": seed}
        every, clients = self.plan.evaluate_every, self.plan.sets[cell.set].clients
        return Trial(names, config, clients, every, self.out, (*self.done, self.out), self.until)


def chosen(plan: Plan, cells: Sequence[str], groups: Sequence[str], rows: Sequence[str]) -> list[Cell]:
    """The cells of these names with groups of these; all where none is named.

    Raises:
        ValueError: a name that the plan does not have, or names that no cell has together.
    """
    found = [cell for cell in plan.cells if (not cells or str(cell) in cells) and (not groups or cell.group in groups)]
    there = {
        "cells": (cells, {str(cell): None for cell in plan.cells}),
        "groups": (groups, plan.groups),
        "rows": (rows, {row: None for cell in found for row in plan.groups[cell.group].rows}),
    }
    for option, (asked, allowed) in there.items():
        for name in asked:
            if allowed and name not in allowed:
                raise ValueError(f"--{option} {name!r}: allowed are {', '.join(map(repr, allowed))}")
    if not found:
        raise ValueError(f"--groups {' '.join(groups)}: no cell of {', '.join(map(repr, cells))} has it")
    return found


def share(text: str) -> tuple[int, int]:
    """i/n of `--part`."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is i/n, i from 1 to n")
    return int(part), int(parts)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--done",
        type=a_file,
        nargs="*",
        default=[HERE / "results.jsonl"],
        help="files whose trials count as run; no file: none",
    )
    parser.add_argument("--part", type=share, default="1/1", metavar="I/N")
    parser.add_argument("--cells", nargs="*", help="as tables.py names them; all by default")
    parser.add_argument("--groups", nargs="*", help="of the plan; all by default")
    parser.add_argument("--rows", nargs="*", help="of the groups; all by default")
    parser.add_argument("--seeds", type=int, nargs="*", help="of the plan; all by default")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no trial starts later")
    parser.add_argument("--heads", type=Path, help="folder of solved heads, shared by the parts; default: heads beside FILE")
    parser.add_argument(
        "--config", type=json.loads, default="{}", help="JSON, for every run: a small model to try the plan with, for example"
    )
    args = parser.parse_args()
    plan, (part, parts) = read_plan(), args.part
    try:
        cells = chosen(plan, args.cells or (), args.groups or (), args.rows or ())
    except ValueError as error:
        parser.error(str(error))
    study = Study(plan, args.data, args.out, args.done, time.monotonic() + 60 * args.minutes)
    study.over = args.config
    keep_heads(args.heads or args.out.parent / "heads", study.over)
    try:
        for cell in cells:
            study.cell(cell, part, parts, args.seeds or plan.seeds, args.rows or ())
    except TimeUp:
        print(f"{args.minutes:g} minutes are over; the same command goes on")
    except ConfigError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
