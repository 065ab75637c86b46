"""A run directory read back; series.py has what tables and pictures show of it. Standard library and numpy only.

Everything comes from metrics.jsonl and federated.json, so a report can be made on another machine. Whatever a run did not
write is missing here too: NaN in a series, an empty mapping, never an error. Texts may come from clients: characters that
do not print are replaced, so that they can neither break a page nor drive a terminal; escaping is left to who shows them.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fedara_flwr.keys import ConfigError
from fedara_flwr.tasks import Metric

JsonObject = dict[str, Any]
WITH_LINES = ("prompt", "expected", "said", "before", "data.options")  # facts whose lines mean something
LARGEST_FIGURE = 1e15  # a figure beyond it is no measurement, and axes cannot show it
LOSS = Metric("loss", higher=False, high=math.inf)
FILES = ("federated.json", "metrics.jsonl")


@dataclass(frozen=True)
class Run:
    """What one run wrote into its folder.

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
    facts: JsonObject
    start: JsonObject = field(default_factory=dict)
    rounds: list[JsonObject] = field(default_factory=list)
    clients: list[JsonObject] = field(default_factory=list)
    end: JsonObject = field(default_factory=dict)
    unreadable: int = 0

    @property
    def name(self) -> str:
        """The run's name, or else its folder's."""
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
    def test(self) -> JsonObject:
        """Test metrics by name; {} before the end."""
        prefix = "test-"
        at_end = {name.removeprefix(prefix): value for name, value in self.end.items() if name.startswith(prefix)}
        return dict(self.facts.get("test") or at_end)

    @cached_property
    def main(self) -> Metric:
        """The task's main metric as federated.json says it; the loss where it says none."""
        facts = self.facts.get("metric")
        return Metric.of_facts(facts) if isinstance(facts, dict) and "name" in facts else LOSS

    @property
    def metric(self) -> str:
        """Name of the task's main metric."""
        return self.main.name

    @property
    def second(self) -> str:
        """The metric that is shown beside the main one: the task's next, '' where only the loss is left."""
        others = [str(name) for name in self.facts.get("metrics") or [] if name not in (self.metric, "loss")]
        return others[0] if others else ""

    @property
    def numbers(self) -> list[int]:
        """The numbers of the rounds, in order."""
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
    facts: JsonObject = {}
    if (path / "federated.json").is_file():
        try:
            facts = json.loads((path / "federated.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path / 'federated.json'}: cannot be read ({error})") from None
        if not isinstance(facts, dict):
            raise ConfigError(f"{path / 'federated.json'}: holds a {type(facts).__name__}, allowed is an object")
    lines, unreadable = _lines(path / "metrics.jsonl")
    start: JsonObject = {}
    end: JsonObject = {}
    rounds: list[JsonObject] = []
    clients: list[JsonObject] = []
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


def _lines(path: Path) -> tuple[list[JsonObject], int]:
    """Objects of a file with one in every line, and how many lines hold none."""
    lines: list[JsonObject] = []
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


def clean(text: str, lines: bool = False) -> str:
    """The text with every character that does not print replaced, as controls, lone surrogates and changes of direction.

    Args:
        lines: whether ends of lines stay; else, as tabs, they become spaces.
    """
    text = re.sub(r"[\t\r]+", " ", text) if lines else re.sub(r"[\t\r\n]+", " ", text)
    return "".join(c if c.isprintable() or c in "\u200c\u200d\n" else "\ufffd" for c in text)


def _clean_all(value: Any, lines: bool = False) -> Any:
    if isinstance(value, str):
        return clean(value, lines)
    if isinstance(value, dict):
        return {clean(key): _clean_all(item, key in WITH_LINES) for key, item in value.items()}
    return [_clean_all(item) for item in value] if isinstance(value, list) else value


def number(value: object) -> float:
    """A value as a float; NaN where it is no number, or too large for a measurement."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_FIGURE:
        return math.nan
    return float(value)


def natural(text: str) -> tuple[tuple[bool, int, str], ...]:
    """A key for sorting texts by the numbers in them: "client 9" comes before "client 10"."""
    return tuple((not n, int(n or 0), rest) for n, rest in re.findall(r"([0-9]{1,18})|([^0-9]+)", text))
