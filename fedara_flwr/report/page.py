"""The report page of one run and the page that compares several: one file each, no script, no request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from fedara_flwr.adapters.packaged import NOTES
from fedara_flwr.config import DataSettings
from fedara_flwr.files import write_whole
from fedara_flwr.keys import ConfigError
from fedara_flwr.report import plots, templates
from fedara_flwr.report.compare import (
    check_target,
    differences,
    duration,
    figure,
    group,
    metric_name,
    tables,
)
from fedara_flwr.report.loading import base_arguments, loading_code
from fedara_flwr.report.read import Run, number, read_run
from fedara_flwr.report.series import (
    Client,
    before_rounds,
    cumulative_modelled,
    drops,
    drops_by_reason,
    final,
    per_client,
    sent,
    series,
    total_megabytes,
    total_modelled,
    total_seconds,
)
from fedara_flwr.tasks import open_task

MOST_DROPS = 200  # shown in full; the rest is counted
OUTCOMES = ("completed", "running", "stopped", "failed")
Picture = tuple[Markup | None, str, str, str]  # SVG, heading, what it shows, what is missing


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write a run's page, by default report.html in its folder; running and failed runs have one too.

    Raises:
        ConfigError: the folder is no run's.
        OSError: the page cannot be written.
    """
    out = out or run_dir / "report.html"
    _write(out, render_report(read_run(run_dir)))
    return out


def write_comparison(run_dirs: Sequence[Path], out: Path, target: float | None = None) -> Path:
    """Write a page with the curves of several runs over each other and their table.

    Args:
        target: level of the main metric; the table then says what it took to reach it.

    Raises:
        ConfigError: a folder is no run's, or the target none for its metric.
        OSError: the page cannot be written.
    """
    _write(out, render_comparison([read_run(path) for path in run_dirs], target))
    return out


def render_report(run: Run) -> str:
    """The page of one run as HTML."""
    clients, lost = per_client(run), drops(run)
    loading, snippet = _loading(run)
    return _render(
        "report",
        title=f"{run.name} – {run.outcome}",
        run=run,
        facts={"title": "", "paper": "", "config": {}, "privacy": {}, **run.facts},
        described=_described(run),
        outcome=_outcome(run),
        outcome_class=run.outcome if run.outcome in OUTCOMES else "running",
        figures=_figures(run),
        pictures=_pictures(run),
        samples=_samples(run),
        scores=_scores(run),
        loading=loading,
        snippet=snippet,
        asked=_asked(clients),
        clients=clients,
        devices=any(client.device for client in clients),
        drops=lost[:MOST_DROPS],
        more_drops=max(0, len(lost) - MOST_DROPS),
        reasons=", ".join(f"{reason}: {count}" for reason, count in drops_by_reason(run).most_common()),
        provenance=_provenance(run),
    )


def render_comparison(runs: Sequence[Run], target: float | None) -> str:
    """The page of several runs as HTML."""
    check_target(target, runs)
    groups = group(runs)
    ordered = [run for members in groups for run in members.runs]
    metric, unseen = metric_name(runs), "No run has an evaluation."
    shown = [
        ("megabytes", "MB", "All bytes of all clients, both directions; on validation data."),
        ("rounds", "rounds", "On validation data."),
        ("hours", "modelled time", "Rounds on the modelled clock of simulated devices, not measured ones."),
    ]
    if all(np.isnan(cumulative_modelled(run)).all() for run in runs):
        shown.pop()
    return _render(
        "comparison",
        title="Comparison of runs",
        described=f"{len(runs)} runs; one colour for the seeds of one setting.",
        pictures=[
            _picture(plots.compared(groups, axis, target), f"{metric} against {name}", note, unseen)
            for axis, name, note in shown
        ],
        tables=tables(groups, target),
        differences=differences(ordered),
        names=[run.name for run in ordered],
    )


# -- parts of the report ------------------------------------------------------------------------------------------------
def _described(run: Run) -> str:
    facts = run.facts
    asked = (facts.get("config") or {}).get("num-server-rounds")
    resumed = facts.get("resumed") or []
    words = [
        str(facts.get("model", "")),
        str(facts.get("task", "")),
        f"seed {facts['seed']}" if "seed" in facts else "",
        f"{len(run.rounds)} of {asked} rounds" if asked else f"{len(run.rounds)} rounds",
        f"resumed after round {', '.join(map(str, resumed))}" if resumed else "",
    ]
    return " · ".join(word for word in words if word)


def _outcome(run: Run) -> str:
    reason = str(run.facts.get("reason") or run.end.get("reason") or "")
    more = {"running": "no end was written yet: still running, or cut off"}.get(run.outcome, "")
    return ": ".join(word for word in (run.outcome, reason or more) if word)


def _figures(run: Run) -> list[tuple[str, str, str]]:
    """Name, value and unit of what stands at the top."""
    metrics = [name for name in (run.metric, run.second) if name]
    start = number(run.start.get(run.metric))
    figures = []
    for metric in metrics:
        value, test = final(run, metric), number(run.test.get(metric))
        before = f", {figure(start)} before round 1{_solved(run)}" if metric == run.metric and not np.isnan(start) else ""
        if metric == run.metric or not np.isnan(value):
            figures.append((f"{metric}, validation", figure(value), f"after the last round{before}"))
        if metric == run.metric or not np.isnan(test):
            bare = number((run.facts.get("unadapted") or {}).get(metric))
            without = "of the model that is left" + ("" if np.isnan(bare) else f", {figure(bare)} of the unadapted model")
            figures.append((f"{metric}, test", figure(test), "not tested" if np.isnan(test) else without))
    last = run.rounds[-1] if run.rounds else {}
    alive, slots = number(last.get("alive")), number(last.get("slots"))
    if slots > 0:
        modules = len(last.get("alive-per-module") or [])
        dead = f", {last.get('dead-modules')} of {modules} modules dead" if modules else ""
        figures.append(("alive slots", f"{alive:.0f} / {slots:.0f}", f"{alive / slots:.0%}{dead}"))
    sent_mb, allowed = total_megabytes(run), number((run.facts.get("config") or {}).get("wire.budget-mb"))
    share = f", {sent_mb / allowed:.2%} of {allowed:,.0f} MB allowed" if allowed > 0 else ""
    figures.append(("MB in all", figure(sent_mb, 1), f"both directions, all clients{share}"))
    if run.rounds:
        first, now = (sent(line, "up") / 1e6 for line in (run.rounds[0], last))
        figures.append(("MB up per round", f"{figure(first, 2)} → {figure(now, 2)}", "first → last"))
        asked, good = sum(len(line.get("sampled") or []) for line in run.rounds), np.nansum(series(run.rounds, "good"))
        figures.append(("replies that counted", f"{good:.0f} / {asked}", "counted / asked for"))
    if export := run.facts.get("export") or {}:
        figures.append(("model that is left", f"round {export.get('round')}", str(export.get("said", ""))))
    if privacy := run.facts.get("privacy") or {}:
        epsilon, delta = number(privacy.get("epsilon")), number(privacy.get("delta"))
        figures.append(("privacy", f"ε = {epsilon:.3g}", f"at δ = {delta:g}, {privacy.get('rounds')} rounds"))
    figures.append(("wall time", duration(total_seconds(run)), ""))
    modelled = total_modelled(run)
    if not np.isnan(modelled):
        joules = number((run.facts.get("modelled") or {}).get("joules"))
        energy = "" if np.isnan(joules) else f", {joules / 1e3:,.1f} kJ"
        figures.append(("modelled time", duration(modelled), f"simulated devices{energy}"))
    return figures


def _solved(run: Run) -> str:
    """What the head was solved from; '' where it was drawn."""
    head = run.start.get("head") or {}
    if not head:
        return ""
    mb = figure(before_rounds(run, "bytes-total") / 1e6, 1)
    return f", head from {number(head.get('rows')):.0f} rows of {number(head.get('clients')):.0f} clients, {mb} MB"


def _picture(svg: str | None, heading: str, note: str, missing: str) -> Picture:
    return (Markup(svg) if svg else None, heading, note, missing)  # nosec B704 # plots escapes all text


def _pictures(run: Run) -> list[Picture]:
    unseen = "No evaluation was written."
    return [
        _picture(plots.score_by_round(run), f"{run.metric} against rounds", "On the server's validation data.", unseen),
        _picture(plots.score_by_megabytes(run), f"{run.metric} against MB", "The same, by what had been sent.", unseen),
        _picture(plots.bytes_sent(run), "Bytes by part and direction", "MB in each round.", "No round was written."),
        _picture(
            plots.client_load(run),
            "Clients' step time and memory",
            "Median and range over the clients of a round, as they measured it.",
            "No client reported its time or memory.",
        ),
        _picture(
            plots.alive_ranks(run),
            "Alive ranks",
            "Slots of each module (block and layer) after each round.",
            "No round says which slots live.",
        ),
        _picture(
            plots.data_partition(run),
            "Partition",
            "Training examples by client and label, or by client where rows have no label.",
            "The run did not write which client has which examples: it was none in simulation, is private, or has not begun.",
        ),
    ]


def _samples(run: Run) -> list[dict[str, str]]:
    """Questions, expected answers and what was said."""
    names = ("prompt", "expected", "said", "before")
    rows = run.facts.get("samples")
    whole = [row for row in (rows if isinstance(rows, list) else []) if isinstance(row, dict)]
    return [{name: str(row.get(name, "")) for name in names} for row in whole]


def _scores(run: Run) -> str:
    """Mean figures of the answers, and what they were before the run."""
    scores = run.facts.get("samples-scores")
    pairs = [(name, pair) for name, pair in (scores if isinstance(scores, dict) else {}).items() if isinstance(pair, list)]
    said = [(name, *map(number, pair)) for name, pair in pairs if len(pair) == 2]
    return ", ".join(f"{name} {figure(now)} (before {figure(before)})" for name, now, before in said)


def _asked(clients: Sequence[Client]) -> str:
    never = sum(not client.asked for client in clients)
    more = f"; {never} never asked" if never else ""
    return f"{len(clients)} clients{more}." if clients else "No client was asked yet."


def _loading(run: Run) -> tuple[str, str]:
    """How to load what was exported: a sentence and code; both empty where nothing was."""
    exported, model = run.facts.get("exported"), str(run.facts.get("model", ""))
    if exported not in ("adapter", "model"):
        return "", ""
    try:
        config = run.facts.get("config") or {}
        task = open_task(DataSettings(task=str(run.facts.get("task")), options=str(config.get("data.options", ""))))
    except ConfigError:  # of a package that is not installed where the page is made
        return f"It is in the run's folder {exported}; its task is not installed here, so no code can be shown.", ""
    place = [
        f"run = Path({json.dumps(run.name, ensure_ascii=False)})  # the run's folder",
        f'folder = run / "{exported}"',
    ]
    imports = ["import json", "from pathlib import Path"] if task.labelled else ["from pathlib import Path"]
    mapping = run.facts.get("key-mapping")
    named = {"config": config, "other-head": run.facts.get("other-head")}
    named |= {"key-mapping": mapping} if isinstance(mapping, dict) else {}
    base = base_arguments(json.dumps(model, ensure_ascii=False), named) if exported == "adapter" else None
    labels = 'json.loads((run / "federated.json").read_text())["labels"]'
    text = (
        "The adapter loads in stock PEFT, on the unchanged backbone:"
        if exported == "adapter"
        else "The whole model loads in stock transformers:"
    )
    note = "  # not on the Hub: adapter_config.json has its folder" if model in NOTES else ""
    return text, "\n".join(loading_code(task, base=base, place=place, imports=imports, labels=labels, note=note))


def _provenance(run: Run) -> dict[str, Any]:
    facts = run.facts
    machine = {f"machine: {key}": value for key, value in (facts.get("machine") or {}).items()}
    return {**(facts.get("versions") or {}), **machine, "backbone's fingerprint": facts.get("fingerprint", "unknown")}


# -- writing ------------------------------------------------------------------------------------------------------------
def _render(name: str, **values: Any) -> str:
    sources = {
        "page": templates.PAGE,
        "macros": templates.MACROS,
        "report": templates.REPORT,
        "comparison": templates.COMPARISON,
    }
    environment = Environment(
        loader=DictLoader(sources), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["figure"] = figure
    style = Markup(templates.STYLE)  # nosec B704 # a constant
    return environment.get_template(name).render(style=style, **values)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())
