"""The study's plan and the lines that its trials left. Loads no torch."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tomllib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONFIGS = HERE.parent.parent / "configs"
PAIRED = ("set", "alpha", "group", "row", "rate", "seed")  # what names a trial; `rate` is a factor of the method's own
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Student's t for 95%, two-sided, for two values to ten; more are taken for ten, which is a little too wide."""


@dataclass(frozen=True)
class Group:
    """Rows that are compared with one another, each alike."""

    rounds: int
    against: str
    rows: dict[str, dict[str, Any]]
    factors: tuple[float, ...] = ()
    rungs: tuple[dict[str, int], ...] = ()


@dataclass(frozen=True)
class Cell:
    """A set as it is dealt out to clients, and the group that is compared on it."""

    set: str
    group: str
    alpha: float | None = None

    def __str__(self) -> str:
        return self.set + (f", α = {self.alpha:g}" if self.alpha is not None else "")


@dataclass(frozen=True)
class DataSet:
    """How a set is read, and by how many clients."""

    clients: int
    built_in: bool = False
    lower_is_better: bool = False
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """plan.toml."""

    seeds: tuple[int, ...]
    evaluate_every: int
    base: dict[str, Any]
    sets: dict[str, DataSet]
    groups: dict[str, Group]
    cells: tuple[Cell, ...]


def read_plan(path: Path = HERE / "plan.toml") -> Plan:
    """The plan, its names as Python's."""

    def named(table: dict) -> dict:
        return {key.replace("-", "_"): tuple(value) if isinstance(value, list) else value for key, value in table.items()}

    plan = named(tomllib.loads(path.read_text()))
    plan["sets"] = {name: DataSet(**named(table)) for name, table in plan["sets"].items()}
    plan["groups"] = {name: Group(**named(table)) for name, table in plan["groups"].items()}
    plan["cells"] = tuple(Cell(**table) for table in plan["cells"])
    return Plan(**plan)


def flat(table: dict, before: str = "") -> dict[str, Any]:
    """A TOML table with dotted keys, as Flower hands it to an app."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return found


def row_config(row: dict[str, Any]) -> dict[str, Any]:
    """A row's own part of the run configuration: its file of configs/ and what it sets besides."""
    own = dict(row)
    file = own.pop("config", None)
    return (flat(tomllib.loads((CONFIGS / file).read_text())) if file else {}) | own


def row_rounds(plan: Plan, group: str, row: str, instead: int | None = None) -> int:
    """Rounds of a row's runs: what the row itself says, else its group's, or others for a try.

    Those of a file of configs/ are for a run alone: two rows of other lengths do not compare.
    """
    usual = plan.groups[group].rounds if instead is None else instead
    return plan.groups[group].rows[row].get("num-server-rounds", usual)


def read(files: Sequence[Path]) -> dict[tuple, list[dict]]:
    """Trial (`PAIRED`) → its evaluations in the order of rounds; of a round that was run twice, the later line.

    What is no line of a trial, cut off by a kill for example, is left out, and said. Lines without a score (sums of
    feedback.py) are no evaluations.
    """
    found: dict[tuple, dict[int, dict]] = defaultdict(dict)
    for file in files:
        for number, text in enumerate(file.read_text(errors="replace").splitlines() if file.exists() else [], 1):
            try:
                line = json.loads(text)
                trial, server_round = tuple(line[name] for name in PAIRED), line["round"]
            except (ValueError, KeyError, TypeError):
                say(f"{file}, line {number}: no line of a trial, left out: {text[:60]!r}")
                continue
            if "score" in line:
                found[trial][server_round] = line
    return {key: [lines[number] for number in sorted(lines)] for key, lines in found.items()}


def parse_files(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line of a script that shows trials: `files`, by default the results here; one that is missing is refused."""
    parser.add_argument("files", type=Path, nargs="*", default=[HERE / "results.jsonl"])
    args = parser.parse_args()
    if lacking := [str(file) for file in args.files if not file.is_file()]:
        parser.error(f"no such file: {', '.join(lacking)}")
    return args


@cache
def say(text: str) -> None:
    """A word to whoever looks, once: standard output is for tables."""
    print(text, file=sys.stderr, flush=True)


def append(file: Path, line: dict) -> None:
    """A line at the end of a file, whose last one may have been cut off."""
    with file.open("a+b") as opened:
        if opened.seek(0, 2):
            opened.seek(-1, 2)
            if opened.read(1) != b"\n":
                opened.write(b"\n")
        opened.write(json.dumps(line).encode() + b"\n")


def by_round(curves: Sequence[list[dict]]) -> list[list[dict]]:
    """The curves' evaluations round by round, of the rounds that all of them have."""
    tables = [{line["round"]: line for line in curve} for curve in curves]
    return [[table[number] for table in tables] for number in sorted(set.intersection(*map(set, tables)))]


def end(curve: list[dict]) -> float:
    """Validation score of a trial: the mean of its last two evaluations, since one round's model swings."""
    return statistics.mean(line["score"] for line in curve[-2:])


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95% interval; None from one value."""
    if len(values) < 2:
        return values[0], None
    t = T95[min(len(values) - 2, len(T95) - 1)]
    return statistics.mean(values), t * statistics.stdev(values) / len(values) ** 0.5
