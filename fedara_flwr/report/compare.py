"""Several runs beside each other: which belong together, and tables with a row for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedara_flwr.keys import ConfigError
from fedara_flwr.report.read import Run, number
from fedara_flwr.report.series import TARGET_WINDOW, Reached, final, to_target, total_megabytes, total_modelled, total_seconds

Differences = dict[str, list[str]]
OWN = ("seed", "method")  # every row says these
WORDS = 3  # settings in a group's name


@dataclass(frozen=True)
class Group:
    """Runs that differ by nothing but the seed."""

    label: str
    runs: list[Run]


@dataclass(frozen=True)
class Table:
    """Texts for a page or a terminal; `note` says how to read them."""

    name: str
    note: str
    headings: list[str]
    rows: list[list[str]]


def check_target(target: float | None, runs: Sequence[Run]) -> None:
    """Refuse a target that says nothing: one that no run can reach, that every run has reached, or of several metrics.

    Raises:
        ConfigError: it does not lie in the range of the runs' main metric, or they have several.
    """
    if target is None:
        return
    metrics = list(dict.fromkeys(run.main for run in runs))
    if len(metrics) > 1:
        raise ConfigError(f"--target {target:g}: allowed with one main metric, these runs have {metric_name(runs)}")
    for metric in metrics:
        low, high = (f"{bound:g}" for bound in (metric.low, metric.high))
        sound = metric.low < target <= metric.high if metric.higher else metric.low <= target < metric.high
        if not (sound and math.isfinite(target)):
            below = f"and at most {high}" if metric.higher else f"and below {high}"
            limits = f"{'above' if metric.higher else 'at least'} {low}" + (f" {below}" if math.isfinite(metric.high) else "")
            raise ConfigError(f"--target {target:g}: allowed with {metric.name} is a number {limits}")


def settings(run: Run) -> dict[str, str]:
    """What a run was configured to do, without what only says where it runs and writes."""
    config = run.facts.get("config") or {}
    return {str(key): str(value) for key, value in config.items() if not str(key).startswith("run.")}


def group(runs: Sequence[Run]) -> list[Group]:
    """Seeds of one setting together, in the order in which they come.

    A group is named by its method; where a method was run with several settings, also by those that differ.
    """
    keyed: dict[tuple[str, tuple[tuple[str, str], ...]], list[Run]] = {}
    for run in runs:
        rest = tuple(sorted((key, value) for key, value in settings(run).items() if key not in OWN))
        keyed.setdefault((run.method, rest), []).append(run)
    groups = []
    for (method, rest), members in keyed.items():
        others = [dict(other) for name, other in keyed if name == method]
        words = [f"{key}={value or repr('')}" for key, value in rest if any(other.get(key) != value for other in others)]
        more = [f"and {len(words) - WORDS} more"] if len(words) > WORDS else []
        groups.append(Group(", ".join([method, *words[:WORDS], *more]), members))
    return groups


def tables(groups: Sequence[Group], target: float | None) -> list[Table]:
    """One row per run, groups together: what it reached and cost, and with a target what that took."""
    labelled = [(members.label, run) for members in groups for run in members.runs]
    metric = metric_name([run for _, run in labelled])
    headings = ["run", "method", "seed", "rounds", metric, "test", "MB", "wall", "modelled"]
    shown = [Table("Runs", "", headings, [[*_named(label, run), *_results(run)] for label, run in labelled])]
    if target is not None:
        reached = "at least" if labelled[0][1].main.higher else "at most"
        note = f"Up to the last of the first three evaluations in a row whose mean is {reached} that."
        headings = ["run", "method", "seed", "rounds", "MB", "wall", "modelled"]
        rows = [[*_named(label, run), *_taken(to_target(run, target))] for label, run in labelled]
        shown.append(Table(f"To {metric} {target:g} (mean of {TARGET_WINDOW} evaluations in a row)", note, headings, rows))
    return shown


def _named(label: str, run: Run) -> list[str]:
    return [run.name, label, str(run.facts.get("seed", "–"))]


def _results(run: Run) -> list[str]:
    rounds = str(len(run.rounds)) if run.outcome == "completed" else f"{len(run.rounds)}, {run.outcome}"
    scores = [figure(final(run)), figure(number(run.test.get(run.metric)))]
    times = [duration(total_seconds(run)), duration(total_modelled(run))]
    return [rounds, *scores, figure(total_megabytes(run), 1), *times]


def _taken(reached: Reached | None) -> list[str]:
    if reached is None:
        return ["not reached", "–", "–", "–"]
    return [str(reached.rounds), figure(reached.megabytes, 1), duration(reached.seconds), duration(reached.modelled)]


def differences(runs: Sequence[Run]) -> Differences:
    """Settings besides method and seed in which runs differ: key → value of each run, "–" where a run has none."""
    all_settings = [settings(run) for run in runs]
    keys = dict.fromkeys(key for each in all_settings for key in each if key not in OWN)
    by_key = {key: [each.get(key, "–") for each in all_settings] for key in keys}
    return {key: values for key, values in by_key.items() if len(set(values)) > 1}


def metric_name(runs: Sequence[Run]) -> str:
    """The main metric, or all of them where tasks differ."""
    return " / ".join(dict.fromkeys(run.metric for run in runs))


def figure(value: float, digits: int = 3) -> str:
    """A number for a table; "–" for none."""
    return "–" if math.isnan(value) else f"{value:,.{digits}f}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: "5 min 45 s"."""
    if math.isnan(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"
