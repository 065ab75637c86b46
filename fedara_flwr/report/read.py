"""A run directory read back, and the series that tables and pictures show. Standard library and numpy only.

Everything comes from metrics.jsonl and federated.json, so a report can be made on another machine. Whatever a run did not
write is missing here too: NaN in a series, an empty mapping, never an error. Texts may come from clients: characters that
do not print are replaced, so that they can neither break a page nor drive a terminal; escaping is left to who shows them.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedara_flwr.config import ConfigError

Record = dict[str, Any]
Series = NDArray[np.float64]
LARGEST = 1e15  # a figure beyond it is no measurement, and axes cannot show it
WINDOW = 3  # evaluations whose mean counts as reaching a target
FILES = ("federated.json", "metrics.jsonl")


@dataclass(frozen=True)
class Run:
    """What one run wrote.

    Attributes:
        path: its folder.
        facts: federated.json; {} where there is none.
        start: validation metrics before round 1.
        rounds: one line per round, in order; of a round that ran twice, the last one.
        clients: one line per client and round.
        end: the last line of a run that ended.
        unreadable: lines of metrics.jsonl that are no JSON object, as a crash leaves them.
    """

    path: Path
    facts: Record
    start: Record = field(default_factory=dict)
    rounds: list[Record] = field(default_factory=list)
    clients: list[Record] = field(default_factory=list)
    end: Record = field(default_factory=dict)
    unreadable: int = 0

    @property
    def name(self) -> str:
        """Its name, or else its folder's."""
        return str(self.facts.get("name") or clean(self.path.name))

    @property
    def method(self) -> str:
        return str(self.facts.get("method", "unknown method"))

    @property
    def outcome(self) -> str:
        """running, completed, stopped or failed; "running" also where a run was cut off and could not say so."""
        facts = str(self.facts.get("outcome", "running"))
        return str(self.end.get("outcome", facts)) if facts == "running" else facts

    @property
    def test(self) -> Record:
        """Test metrics by name; {} before the end."""
        prefix = "test-"
        found = {name.removeprefix(prefix): value for name, value in self.end.items() if name.startswith(prefix)}
        return dict(self.facts.get("test") or found)

    @cached_property
    def metric(self) -> str:
        """The task's main metric: entity-f1 where entities are scored, otherwise accuracy."""
        lines = (self.start, *self.rounds, self.test)
        entities = self.facts.get("task") == "token-classification" or any("entity-f1" in line for line in lines)
        return "entity-f1" if entities else "accuracy"

    @property
    def numbers(self) -> list[int]:
        """The rounds' numbers."""
        return [int(line["round"]) for line in self.rounds]


def read_run(path: Path) -> Run:
    """Read a run directory, finished, running or cut off.

    Raises:
        ConfigError: the folder is no run's, or federated.json is not readable.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder, allowed is a run's folder")
    if not any((path / name).is_file() for name in FILES):
        raise ConfigError(f"{path}: no run's folder, {' and '.join(FILES)} are missing")
    facts: Record = {}
    if (path / "federated.json").is_file():
        try:
            facts = json.loads((path / "federated.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path / 'federated.json'}: cannot be read ({error})") from None
        if not isinstance(facts, dict):
            raise ConfigError(f"{path / 'federated.json'}: holds a {type(facts).__name__}, allowed is an object")
    lines, unreadable = _lines(path / "metrics.jsonl")
    start: Record = {}
    end: Record = {}
    rounds: list[Record] = []
    clients: list[Record] = []
    for line in lines:
        kind = line.get("type")
        if kind == "start":
            start = line
        elif kind in ("round", "resume") and isinstance(line.get("round"), int):
            # a run that goes on from a checkpoint does again what came after it
            first = line["round"] + (kind == "resume")
            rounds = [old for old in rounds if old["round"] < first]
            clients = [old for old in clients if old["round"] < first]
            end = {}
            if kind == "round":
                rounds.append(line)
        elif kind == "client" and isinstance(line.get("round"), int):
            clients.append(line)
        elif kind == "end":
            end = line
    return Run(path, _clean_all(facts), start, rounds, clients, end, unreadable)


def _lines(path: Path) -> tuple[list[Record], int]:
    """Objects of a file with one in every line, and how many lines hold none."""
    lines: list[Record] = []
    unreadable = 0
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                line = json.loads(text) if text.strip() else {}
            except ValueError:
                line = None
            if isinstance(line, dict):
                lines.append(_clean_all(line))
            else:
                unreadable += 1
    return lines, unreadable


def clean(text: str) -> str:
    """The text with every character that does not print replaced, as controls, lone surrogates and changes of direction."""
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else "\ufffd" for c in re.sub(r"[\t\r\n]+", " ", text))


def _clean_all(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(key): _clean_all(item) for key, item in value.items()}
    return [_clean_all(item) for item in value] if isinstance(value, list) else value


def number(value: object) -> float:
    """A measurement; NaN for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        return math.nan
    return float(value)


def natural(text: str) -> tuple[tuple[bool, int, str], ...]:
    """Sorts "client 9" before "client 10"."""
    return tuple((not n, int(n or 0), rest) for n, rest in re.findall(r"([0-9]{1,18})|([^0-9]+)", text))


# -- series over rounds -------------------------------------------------------------------------------------------------
def series(lines: Iterable[Record], name: str) -> Series:
    """One figure of every line."""
    return np.array([number(line.get(name)) for line in lines], dtype=np.float64)


def sent(line: Record, direction: str) -> float:
    """Bytes of a round in one direction ("down" or "up")."""
    return number((line.get("bytes") or {}).get(direction, 0))


def cumulative_megabytes(run: Run) -> Series:
    """MB sent up to each round, both directions, all clients."""
    each = np.array([sent(line, "down") + sent(line, "up") for line in run.rounds])
    logged = series(run.rounds, "bytes-total")
    return np.where(np.isnan(logged), np.cumsum(np.nan_to_num(each)), logged) / 1e6


def cumulative_seconds(run: Run) -> Series:
    """Wall seconds of rounds and their evaluations, up to each round."""
    return np.cumsum(np.nan_to_num(series(run.rounds, "seconds")) + np.nan_to_num(series(run.rounds, "seconds-evaluate")))


def cumulative_modelled(run: Run) -> Series:
    """Seconds on the modelled clock up to each round; NaN from the first round without."""
    return np.cumsum(series(run.rounds, "modelled-seconds"))


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
        columns = np.concatenate([[[0.0], [before], [0.0], [0.0], [0.0]], columns], axis=1)
    return Curve(*columns)


@dataclass(frozen=True)
class Reached:
    """What it took to reach a target; `modelled` is NaN outside simulation."""

    rounds: int
    megabytes: float
    seconds: float
    modelled: float


def to_target(run: Run, target: float) -> Reached | None:
    """At the first mean of three evaluations in a row that is at least `target`; None where it is not reached.

    The evaluation before round 1 does not count among the three.
    """
    found = curve(run, run.metric, start=False)
    for i in range(WINDOW - 1, len(found)):
        if math.fsum(found.values[i - WINDOW + 1 : i + 1]) / WINDOW >= target:
            return Reached(int(found.rounds[i]), found.megabytes[i], found.seconds[i], found.modelled[i])
    return None


def bytes_by_part(run: Run, direction: str) -> dict[str, Series]:
    """Part → MB in every round, in one direction; parts that never travelled are left out."""
    names = [key for line in run.rounds for key in (line.get("bytes") or {}) if key.startswith(f"{direction}.")]
    found = {}
    for key in dict.fromkeys(names):
        values = np.nan_to_num([number((line.get("bytes") or {}).get(key)) for line in run.rounds]) / 1e6
        if values.any():
            found[key.partition(".")[2]] = values
    return found


def alive_per_module(run: Run) -> tuple[list[int], Series]:
    """Rounds, and living slots after each: shape (modules, rounds)."""
    lines = [line for line in run.rounds if line.get("alive-per-module")]
    rows = max((len(line["alive-per-module"]) for line in lines), default=0)
    lines = [line for line in lines if len(line["alive-per-module"]) == rows]
    columns = [[number(value) for value in line["alive-per-module"]] for line in lines]
    return [line["round"] for line in lines], np.array(columns, dtype=np.float64).reshape(len(lines), rows).T


def step_seconds(line: Record) -> float:
    """Seconds of one training step of a client."""
    steps = number(line.get("steps"))
    return number(line.get("seconds-train")) / steps if steps > 0 else math.nan


def peak_memory(line: Record) -> float:
    """MB that a client's process had at most."""
    return number(line.get("peak-memory-mb"))


@dataclass(frozen=True)
class Spread:
    """A client figure over rounds: rounds in which there was one, and its lowest, median and highest value."""

    rounds: list[int]
    low: Series
    median: Series
    high: Series


def spread(run: Run, figure: Callable[[Record], float]) -> Spread:
    """How a figure of the clients' lines lies in every round."""
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
        asked: rounds in which it was sampled; `good` those whose update counted.
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
    found = {str(key): Client(str(key)) for key in (run.facts.get("partition") or {})}

    def client(key: object) -> Client:
        return found.setdefault(str(key), Client(str(key)))

    for key, counts in partition(run).items():
        client(key).examples = sum(counts)
    for key, reason in left_out.items():
        client(key).left_out = reason
    for line in run.rounds:
        for key in line.get("sampled") or []:
            client(key).asked += 1
    for _, key, reason, _ in drops(run):
        client(key).dropped[reason] += 1
    lines: dict[str, list[Record]] = {}
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
    return sorted(found.values(), key=lambda row: (natural(row.key), row.key))


def _over(values: Iterable[float], reduce: Callable[[Series], Any]) -> float:
    there = np.array([value for value in values if not math.isnan(value)], dtype=np.float64)
    return float(reduce(there)) if len(there) else math.nan


def _payload(parts: object) -> float:
    return math.fsum(np.nan_to_num([number(v) for v in parts.values()])) / 1e6 if isinstance(parts, dict) else math.nan


def partition(run: Run) -> dict[str, list[float]]:
    """Client → examples by label, in the natural order of the keys; {} outside simulation."""
    found = {str(key): [number(count) for count in counts] for key, counts in (run.facts.get("partition") or {}).items()}
    return {key: found[key] for key in sorted(found, key=lambda key: (natural(key), key))}


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
