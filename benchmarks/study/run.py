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
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plan import HERE, Cell, Plan, read_plan, row_config, row_rounds
from trial import TimeUp, Trial, keep_heads

from fedara_flwr import strategies
from fedara_flwr.keys import ConfigError
from fedara_flwr.tasks import read_settings


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
        rounds = row_rounds(self.plan, cell.group, row, self.over.get("num-server-rounds"))
        trials = {rate: self.trial(cell, row, rate, self.plan.seeds[0], rounds) for rate in group.factors if rounds}
        for rung in group.rungs if trials else ():
            scores = {rate: sign * trial.run(min(rung["rounds"], rounds)) for rate, trial in trials.items()}
            # a rate at which training came to no number is the worst one
            best = sorted(scores, key=lambda rate: (math.isnan(scores[rate]), -scores[rate]))[: rung["survivors"]]
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


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--done",
        type=Path,
        nargs="*",
        default=[HERE / "results.jsonl"],
        help="files whose trials count as run; no file: none",
    )
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--cells", nargs="*", help="as tables.py names them; all by default")
    parser.add_argument("--groups", nargs="*", help="of the plan; all by default")
    parser.add_argument("--rows", nargs="*", help="of the groups; all by default")
    parser.add_argument("--seeds", type=int, nargs="*", help="of the plan; all by default")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no trial starts later")
    parser.add_argument("--heads", type=Path, help="folder of solved heads, shared by the parts; default: heads beside FILE")
    parser.add_argument("--config", default="{}", help="JSON, for every run: a small model to try the plan with, for example")
    args = parser.parse_args()
    plan = read_plan()
    study = Study(plan, args.data, args.out, args.done, time.monotonic() + 60 * args.minutes)
    try:
        cells, part, parts = chosen(args, study)
        args.out.parent.mkdir(exist_ok=True, parents=True)
        args.out.open("a").close()
        keep_heads(args.heads or args.out.parent / "heads")
        for cell in cells:
            study.cell(cell, part, parts, args.seeds or plan.seeds, args.rows or ())
    except TimeUp:
        print(f"{args.minutes:g} minutes are over; the same command goes on")
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")


def chosen(args: argparse.Namespace, study: Study) -> tuple[list[Cell], int, int]:
    """Cells that are to run, and which part of each; `study` is told what is for every run.

    Raises:
        ConfigError: something is asked for that the plan lacks, or a run would be refused.
    """
    plan = study.plan

    def among(name: str, asked: Sequence[Any] | None, there: Sequence[Any]) -> None:
        if unknown := [value for value in asked or () if value not in there]:
            raise ConfigError(f"--{name} {unknown[0]!r}: allowed are {', '.join(map(repr, dict.fromkeys(there)))}")

    among("cells", args.cells, [str(cell) for cell in plan.cells])
    among("groups", args.groups, list(plan.groups))
    among("seeds", args.seeds, plan.seeds)
    cells = [
        cell
        for cell in plan.cells
        if (not args.cells or str(cell) in args.cells) and (not args.groups or cell.group in args.groups)
    ]
    if not cells:
        raise ConfigError(f"--groups {' '.join(args.groups)}: no cell of --cells is of it")
    among("rows", args.rows, [row for cell in cells for row in plan.groups[cell.group].rows])
    among("done", args.done, [file for file in args.done if file.is_file()])
    match = re.fullmatch(r"(\d+)/(\d+)", args.part)
    part, parts = map(int, match.groups()) if match else (0, 0)
    if not 1 <= part <= parts:
        raise ConfigError(f"--part {args.part}: allowed is i/n with i from 1 to n, 1/2 for example")
    try:
        study.over = json.loads(args.config)
    except ValueError as error:
        raise ConfigError(f"--config {args.config}: no JSON ({error})") from None
    if not isinstance(study.over, dict) or "seed" in study.over:
        raise ConfigError(f"--config {args.config}: allowed is a table of run configuration without 'seed', which --seeds has")
    if lacking := sorted({c.set for c in cells if not plan.sets[c.set].built_in and not (args.data / c.set).is_dir()}):
        raise ConfigError(f"--data {args.data}: lacks the folders {', '.join(lacking)} of what is to run; --cells chooses")
    for cell in cells:
        if plan.groups[cell.group].factors and "train.learning-rate" in study.over:
            raise ConfigError(f"--config: {cell}, {cell.group} tries rates of its own, so 'train.learning-rate' is not for it")
        for row in plan.groups[cell.group].rows:
            settings = read_settings(study.config(cell, row))
            strategies.find(settings.method).check(settings)
    return cells, part, parts


if __name__ == "__main__":
    main()
