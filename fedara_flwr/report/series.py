"""The series and totals that tables and pictures show of a run: NaN or nothing for what it did not write, never an error."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedara_flwr.report.read import JsonObject, Run, natural, number

Series = NDArray[np.float64]
TARGET_WINDOW = 3  # evaluations whose mean counts as reaching a target


# -- series over rounds -------------------------------------------------------------------------------------------------
def series(lines: Iterable[JsonObject], name: str) -> Series:
    """The figure `name` of every line, shape (lines,); NaN where a line has none."""
    return np.array([number(line.get(name)) for line in lines], dtype=np.float64)


def sent(line: JsonObject, direction: str) -> float:
    """Bytes of a round in one direction ("down" or "up")."""
    return number((line.get("bytes") or {}).get(direction, 0))


def cumulative_megabytes(run: Run) -> Series:
    """MB sent up to each round, both directions, all clients."""
    each = np.array([sent(line, "down") + sent(line, "up") for line in run.rounds])
    logged = series(run.rounds, "bytes-total")
    return np.where(np.isnan(logged), np.cumsum(np.nan_to_num(each)), logged) / 1e6


def cumulative_seconds(run: Run) -> Series:
    """Wall seconds of rounds and their evaluations, up to each round."""
    return seconds_before(run) + np.cumsum(
        np.nan_to_num(series(run.rounds, "seconds")) + np.nan_to_num(series(run.rounds, "seconds-evaluate"))
    )


def cumulative_modelled(run: Run) -> Series:
    """Seconds on the modelled clock up to each round; NaN from the first round without."""
    return before_rounds(run, "modelled-seconds") + np.cumsum(series(run.rounds, "modelled-seconds"))


def before_rounds(run: Run, name: str) -> float:
    """What was spent before round 1 on sums for the head; 0 where nobody was asked for them."""
    asked = run.start.get("sampled") or run.start.get("head")
    return float(np.nan_to_num(number(run.start.get(name)))) if asked else 0.0


def seconds_before(run: Run) -> float:
    """Wall seconds of that, and of the solved head's evaluation, as `cumulative_seconds` has those of rounds."""
    return before_rounds(run, "seconds") + before_rounds(run, "seconds-evaluate")


@dataclass(frozen=True)
class Curve:
    """Evaluations in the order of rounds; all arrays have one value for each."""

    rounds: Series
    values: Series
    megabytes: Series
    seconds: Series
    modelled: Series

    def __len__(self) -> int:
        return len(self.rounds)

    @property
    def hours(self) -> Series:
        """Hours on the modelled clock."""
        return self.modelled / 3600


def curve(run: Run, metric: str, start: bool = True) -> Curve:
    """A validation metric at every evaluation; with `start`, the one before round 1 stands first."""
    values = series(run.rounds, metric)
    columns = np.stack(
        [
            np.array(run.numbers, dtype=np.float64),
            values,
            cumulative_megabytes(run),
            cumulative_seconds(run),
            cumulative_modelled(run),
        ]
    )[:, ~np.isnan(values)]
    before = number(run.start.get(metric))
    if start and not math.isnan(before):
        costs = [before_rounds(run, "bytes-total") / 1e6, seconds_before(run), before_rounds(run, "modelled-seconds")]
        columns = np.concatenate([[[value] for value in (0.0, before, *costs)], columns], axis=1)
    return Curve(*columns)


@dataclass(frozen=True)
class Reached:
    """What it took to reach a target; `modelled` is NaN outside simulation."""

    rounds: int
    megabytes: float
    seconds: float
    modelled: float


def to_target(run: Run, target: float) -> Reached | None:
    """What it took until the mean of three evaluations in a row was as good as `target`; None where it never was.

    As good is at least that much where higher is better, at most where lower is. A run that began there took no round; else
    the evaluation before round 1 does not count among the three.
    """
    if run.main.better(number(run.start.get(run.metric)), target):
        sent, modelled = before_rounds(run, "bytes-total"), before_rounds(run, "modelled-seconds")
        return Reached(0, sent / 1e6, seconds_before(run), modelled)
    points = curve(run, run.metric, start=False)
    for i in range(TARGET_WINDOW - 1, len(points)):
        if run.main.better(math.fsum(points.values[i - TARGET_WINDOW + 1 : i + 1]) / TARGET_WINDOW, target):
            return Reached(int(points.rounds[i]), points.megabytes[i], points.seconds[i], points.modelled[i])
    return None


def sending(run: Run) -> list[JsonObject]:
    """The lines of all rounds, and before them that of what was sent before round 1, where something was."""
    return [run.start, *run.rounds] if run.start.get("bytes") else run.rounds


def bytes_by_part(run: Run, direction: str) -> dict[str, Series]:
    """Part → MB in each of the lines that `sending` gives, in one direction; parts that never travelled are left out."""
    lines = sending(run)
    names = [key for line in lines for key in (line.get("bytes") or {}) if key.startswith(f"{direction}.")]
    by_part = {}
    for key in dict.fromkeys(names):
        values = np.nan_to_num([number((line.get("bytes") or {}).get(key)) for line in lines]) / 1e6
        if values.any():
            by_part[key.partition(".")[2]] = values
    return by_part


def alive_per_module(run: Run) -> tuple[list[int], Series]:
    """Rounds, and living slots after each: shape (modules, rounds)."""
    lines = [line for line in run.rounds if line.get("alive-per-module")]
    rows = max((len(line["alive-per-module"]) for line in lines), default=0)
    lines = [line for line in lines if len(line["alive-per-module"]) == rows]
    columns = [[number(value) for value in line["alive-per-module"]] for line in lines]
    return [line["round"] for line in lines], np.array(columns, dtype=np.float64).reshape(len(lines), rows).T


def step_seconds(line: JsonObject) -> float:
    """Seconds of one training step of a client."""
    steps = number(line.get("steps"))
    return number(line.get("seconds-train")) / steps if steps > 0 else math.nan


def peak_memory(line: JsonObject) -> float:
    """The most memory that a client's process has had, in MB."""
    return number(line.get("peak-memory-mb"))


@dataclass(frozen=True)
class Spread:
    """A client figure over rounds: rounds in which there was one, and its lowest, median and highest value."""

    rounds: list[int]
    low: Series
    median: Series
    high: Series


def spread(run: Run, figure: Callable[[JsonObject], float]) -> Spread:
    """Lowest, median and highest value of a figure of the clients' lines, for every round that has one."""
    by_round: dict[int, list[float]] = {}
    for line in run.clients:
        value = figure(line)
        if not math.isnan(value):
            by_round.setdefault(line["round"], []).append(value)
    rounds = sorted(by_round)
    rows = [(min(values), float(np.median(values)), max(values)) for values in (by_round[r] for r in rounds)]
    return Spread(rounds, *np.array(rows, dtype=np.float64).reshape(len(rows), 3).T)


# -- totals -------------------------------------------------------------------------------------------------------------
def total_megabytes(run: Run) -> float:
    """MB of the whole run, both directions."""
    logged = np.nan_to_num(cumulative_megabytes(run))
    parts = math.fsum(np.nan_to_num([number(value) for value in (run.facts.get("bytes") or {}).values()])) / 1e6
    return max(parts, float(logged[-1]) if len(logged) else 0.0)


def total_seconds(run: Run) -> float:
    """Wall seconds: of the whole run once it ended, until then of its rounds."""
    whole = number(run.facts.get("seconds") or run.end.get("seconds"))
    so_far = cumulative_seconds(run)
    return (float(so_far[-1]) if len(so_far) else math.nan) if math.isnan(whole) else whole


def total_modelled(run: Run) -> float:
    """Seconds of all rounds on the modelled clock; NaN where a round has none."""
    so_far = cumulative_modelled(run)
    return float(so_far[-1]) if len(so_far) else math.nan


def final(run: Run, metric: str | None = None) -> float:
    """The last validation value of the main or another metric; NaN without one."""
    values = curve(run, metric or run.metric).values
    return float(values[-1]) if len(values) else math.nan


def drops(run: Run) -> list[tuple[int, str, str, str]]:
    """Replies that did not count: round, client, reason, detail."""
    return [
        (line["round"], *(str(drop.get(name, "")) for name in ("client", "reason", "detail")))  # type: ignore[misc]
        for line in run.rounds
        for drop in line.get("dropped") or []
    ]


def drops_by_reason(run: Run) -> Counter[str]:
    """How many replies each reason cost."""
    return Counter(reason for _, _, reason, _ in drops(run))


@dataclass
class Client:
    """One client over the whole run.

    Attributes:
        device: the simulated device that it stands for, or "".
        examples: of its training data; NaN where unknown.
        asked: rounds in which it was sampled, the request for sums for the head counted; `good` those whose reply did.
        dropped: reason → replies that did not count.
        left_out: why it was not asked again, or "".
        step: median seconds of a training step; `memory` the highest peak in MB; `modelled` seconds in all.
        down: MB sent to it; `up` MB it sent.
    """

    key: str
    device: str = ""
    examples: float = math.nan
    asked: int = 0
    good: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    left_out: str = ""
    step: float = math.nan
    memory: float = math.nan
    modelled: float = math.nan
    down: float = 0.0
    up: float = 0.0


def per_client(run: Run) -> list[Client]:
    """All clients that the run knows of, in the natural order of their keys."""
    left_out = {str(key): str(reason) for key, reason in (run.facts.get("left-out") or {}).items()}
    clients = {str(key): Client(str(key)) for key in (run.facts.get("partition") or {})}

    def client(key: object) -> Client:
        return clients.setdefault(str(key), Client(str(key)))

    for key, counts in partition(run).items():
        client(key).examples = sum(counts)
    for key, reason in left_out.items():
        client(key).left_out = reason
    for line in (run.start, *run.rounds):
        for key in line.get("sampled") or []:
            client(key).asked += 1
    for _, key, reason, _ in drops(run):
        client(key).dropped[reason] += 1
    lines: dict[str, list[JsonObject]] = {}
    for line in run.clients:
        lines.setdefault(str(line.get("client")), []).append(line)
    for key, own in lines.items():
        row = client(key)
        row.good = len(own)
        row.examples = number(own[-1].get("num-examples", row.examples))
        row.device = str(own[-1].get("modelled-device", ""))
        row.step, row.memory = _over([step_seconds(line) for line in own], np.median), _over(map(peak_memory, own), np.max)
        row.modelled = _over(series(own, "modelled-seconds"), np.sum)
        row.down, row.up = (_over([_payload(line.get(f"bytes-{way}")) for line in own], np.sum) for way in ("down", "up"))
    return sorted(clients.values(), key=lambda row: (natural(row.key), row.key))


def _over(values: Iterable[float], reduce: Callable[[Series], Any]) -> float:
    there = np.array([value for value in values if not math.isnan(value)], dtype=np.float64)
    return float(reduce(there)) if len(there) else math.nan


def _payload(parts: object) -> float:
    return math.fsum(np.nan_to_num([number(v) for v in parts.values()])) / 1e6 if isinstance(parts, dict) else math.nan


def partition(run: Run) -> dict[str, list[float]]:
    """Client → examples by group, in the natural order of the keys; one number where rows have none; {} outside simulation."""
    by_client = {str(key): [number(count) for count in counts] for key, counts in (run.facts.get("partition") or {}).items()}
    return {key: by_client[key] for key in sorted(by_client, key=lambda key: (natural(key), key))}


def short_names(modules: Sequence[str], blocks: Sequence[int]) -> list[str]:
    """Block and what tells a module from the others of its block: "0 query", "0 attention.output"."""
    inside = []
    for name, block in zip(modules, blocks, strict=True):
        parts = name.split(".")
        places = [i for i, part in enumerate(parts) if part == str(block)]
        inside.append(parts[places[0] + 1 :] if places and places[0] + 1 < len(parts) else parts)
    kinds = {tuple(parts) for parts in inside}
    shortest = {kind: _shortest(kind, kinds) for kind in kinds}
    bare = {kind: name.removesuffix(".dense") for kind, name in shortest.items()}
    if len(set(bare.values())) == len(kinds):  # BERT's "output.dense" says no more than "output"
        shortest = bare
    return [f"{block} {shortest[tuple(parts)]}" for parts, block in zip(inside, blocks, strict=True)]


def _shortest(kind: tuple[str, ...], kinds: set[tuple[str, ...]]) -> str:
    """The shortest ending of a path that no other path has."""
    for length in range(1, len(kind)):
        if sum(other[-length:] == kind[-length:] for other in kinds) == 1:
            return ".".join(kind[-length:])
    return ".".join(kind)
