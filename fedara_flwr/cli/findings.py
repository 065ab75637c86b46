"""Findings of `fedara doctor` and `fedara deploy check`: what a check found, and how checks are run and shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedara_flwr.keys import ConfigError
from fedara_flwr.log import error_line

Level = Literal["ok", "warning", "problem"]
LEVEL_COLOURS: dict[Level, str] = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        level: "ok"; "warning", a run works but something will surprise; "problem", a run will fail.
        found: the result in words, one line.
        advice: what to do; "" where it is ok.
    """

    level: Level
    found: str
    advice: str = ""


def print_findings(findings: Iterable[tuple[str, Finding]], console: Console) -> int:
    """Print each finding as it comes and a line with their number; the number of problems."""
    levels: list[Level] = []
    for name, finding in findings:
        levels.append(finding.level)
        row = Table.grid(padding=(0, 2))
        row.add_column(width=7)
        row.add_column(width=15)
        row.add_column(overflow="fold")
        row.add_row(Text(finding.level, LEVEL_COLOURS[finding.level]), Text(name), Text(finding.found))
        if finding.advice:
            row.add_row("", "", Text(f"→ {finding.advice}"))
        console.print(row)
    warnings, problems = levels.count("warning"), levels.count("problem")
    console.print(Text(f"\n{count(problems, 'problem')}, {count(warnings, 'warning')}"))
    return problems


def run_checks(checks: dict[str, Callable[[], Finding]]) -> Iterator[tuple[str, Finding]]:
    """Each check's name and finding, as they come; one that raises is a problem of its own."""
    for name, check in checks.items():
        try:
            yield name, check()
        except Exception as error:  # a broken library must not hide what the other checks find
            yield name, Finding("problem", f"cannot be checked: {reason(error)}")


def reason(error: Exception) -> str:
    """An error as one line; of a user's mistake only the text, which says all."""
    return " ".join(str(error).split())[:300] if isinstance(error, ConfigError) else error_line(error)


def count(number: int, noun: str) -> str:
    """A number with its noun: "3 problems", "1 problem" or "no problems"."""
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"
