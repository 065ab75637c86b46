"""Pictures as SVG elements for inlining: text stays text, axes take the page's colour, ids are unique on a page.

Data colours are mid-tones that stand out on white and on near-black alike; amounts in heat maps are opacities of one of
them, so that nothing shows through as the page's own background. Every function gives None where there is nothing to draw.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from fedara_flwr.report.compare import Group, metric_name
from fedara_flwr.report.read import Run, number
from fedara_flwr.report.series import (
    Curve,
    Series,
    Spread,
    alive_per_module,
    bytes_by_part,
    curve,
    final,
    partition,
    peak_memory,
    sending,
    short_names,
    spread,
    step_seconds,
)
from fedara_flwr.report.svg import INK, svg

WIDTH = 480  # CSS pixels: readable when a phone shrinks it to its own width
COLOURS = ("#2b7fd4", "#d0661a", "#1f9156", "#a45bd0", "#d8435a", "#108c99", "#9a7415", "#c4529b", "#7a828e", "#6f8a1d")
LINES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX*"
PART_ORDER = ("B", "E", "A", "head", "backbone", "delta", "mask", "statistics", "other")
LABELLED_ROWS = 80  # beyond it, names of rows would run into each other
AMOUNT = LinearSegmentedColormap.from_list("amount", [(*to_rgb(COLOURS[0]), 0.1), (*to_rgb(COLOURS[0]), 1.0)])
FIGURE_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedara",
    "savefig.dpi": 216,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelsize": 12,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.8,
    "lines.markersize": 3.5,
    "figure.constrained_layout.h_pad": 0.06,
}


# -- one run ------------------------------------------------------------------------------------------------------------
def score_by_round(run: Run) -> str | None:
    """The main validation metric and, where there is one, the task's second over rounds; the test value at the end."""
    main = curve(run, run.metric)
    if not len(main):
        return None
    with _figure(270) as figure:
        axes = figure.add_subplot()
        _line(axes, main.rounds, main.values, COLOURS[0], run.metric)
        other = curve(run, run.second)
        if len(other):
            _line(axes, other.rounds, other.values, COLOURS[1], run.second, "--")
        test = number(run.test.get(run.metric))
        if not np.isnan(test):
            axes.plot([main.rounds[-1]], [test], "D", color=COLOURS[4], markersize=7, label=f"{run.metric}, test", zorder=4)
        axes.set(xlabel="round", ylabel="validation")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, axes)
        return svg(figure, "score-by-round", f"{run.metric} against rounds: {_ends(main)}")


def score_by_megabytes(run: Run) -> str | None:
    """The main validation metric against the MB sent until then."""
    main = curve(run, run.metric)
    if not len(main):
        return None
    with _figure(270) as figure:
        axes = figure.add_subplot()
        _line(axes, main.megabytes, main.values, COLOURS[0], run.metric)
        axes.set(xlabel="MB sent, both directions, all clients", ylabel=f"validation {run.metric}")
        _plain_ticks(axes.xaxis)
        return svg(figure, "score-by-megabytes", f"{run.metric} against MB sent: {_ends(main)}")


def alive_ranks(run: Run) -> str | None:
    """Heat map of the living slots: a row per module in the order of blocks, a column per round."""
    rounds, alive = alive_per_module(run)
    if not alive.size:
        return None
    modules, blocks = run.facts.get("modules") or [], run.facts.get("blocks") or []
    if not len(modules) == len(blocks) == len(alive):
        modules, blocks = [f"module.{i}" for i in range(len(alive))], [0] * len(alive)
    names = short_names(modules, blocks) if any(blocks) else [name.removeprefix("0 ") for name in short_names(modules, blocks)]
    most = max([number(rank) for rank in run.facts.get("ranks") or []] + [float(np.nanmax(alive, initial=0)), 1.0])
    borders = [i for i in range(1, len(blocks)) if blocks[i] != blocks[i - 1]]
    body = _row_height(len(names)) * len(names)
    with _figure(120 + body) as figure:
        axes, scale = figure.subplots(2, 1, height_ratios=[body, 9])
        _heat(axes, alive, most)
        if len(names) > LABELLED_ROWS and borders:  # a name for each block, in its middle
            edges = [0, *borders, len(names)]
            middles = [(a + b - 1) / 2 for a, b in zip(edges, edges[1:], strict=False)]
            axes.set_yticks(middles, [f"block {blocks[edge]}" for edge in edges[:-1]])
        else:
            _name_rows(axes, names)
        for border in borders:
            axes.axhline(border - 0.5, color=INK, alpha=0.35, linewidth=0.6)
        _name_columns(axes, [str(r) for r in rounds])
        axes.set(xlabel="round")
        _scale(scale, most, "slots alive (empty: none)")
        dead = int((alive[:, -1] == 0).sum())
        text = f"Slots alive by module and round: {alive[:, -1].sum():.0f} after round {rounds[-1]}, {dead} modules have none"
        return svg(figure, "alive-ranks", text)


def bytes_sent(run: Run) -> str | None:
    """MB per round by part, to clients and from them; 0 is what was sent before round 1."""
    ways = {"to clients": bytes_by_part(run, "down"), "from clients": bytes_by_part(run, "up")}
    if not any(ways.values()):
        return None
    rounds = [str(line.get("round", 0)) for line in sending(run)]
    names = [part for part in PART_ORDER if any(part in parts for parts in ways.values())]
    names += sorted({part for parts in ways.values() for part in parts} - set(names))
    edges = np.arange(len(rounds) + 1) - 0.5
    with _figure(330) as figure:
        panels = figure.subplots(2, 1, sharex=True, sharey=True)
        for axes, (way, parts) in zip(panels, ways.items(), strict=True):
            below = np.zeros(len(rounds))
            for i, part in enumerate(names):
                top = below + parts.get(part, 0.0)
                axes.stairs(top, edges, baseline=below, fill=True, color=COLOURS[i % len(COLOURS)], label=part, linewidth=0)
                below = top
            axes.set_title(way)
            axes.set_ylabel("MB")
            _plain_ticks(axes.yaxis)
            axes.grid(axis="x", visible=False)
        _name_columns(panels[1], rounds)
        panels[1].set_xlabel("round")
        _legend(figure, panels[0])
        total = {way: sum(float(values.sum()) for values in parts.values()) for way, parts in ways.items()}
        return svg(figure, "bytes-sent", "MB by part: " + ", ".join(f"{mb:,.1f} {way}" for way, mb in total.items()))


def client_load(run: Run) -> str | None:
    """Seconds of a training step and peak memory of the clients: median, and range, in every round."""
    panels: list[tuple[str, Callable[[dict], float]]] = [("s per step", step_seconds), ("peak MB", peak_memory)]
    loads = [(name, values) for name, figure in panels if (values := spread(run, figure)).rounds]
    if not loads:
        return None
    with _figure(60 + 135 * len(loads)) as figure:
        for axes, (name, values) in zip(figure.subplots(len(loads), 1, sharex=True, squeeze=False)[:, 0], loads, strict=True):
            _range(axes, values)
            axes.set_ylabel(name)
            _plain_ticks(axes.yaxis)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, axes)
        text = ", ".join(f"{name} {np.median(values.median):,.2f}" for name, values in loads)
        return svg(figure, "client-load", f"Clients' load by round, median of medians: {text}")


def data_partition(run: Run) -> str | None:
    """Which client has how many examples of which group: totals above, and a heat map by group where there are any."""
    clients = partition(run)
    width = max((len(counts) for counts in clients.values()), default=0)
    if not width:
        return None
    counts = np.array([[*row, *[0.0] * (width - len(row))] for row in clients.values()]).T
    names = [str(name) for name in run.facts.get("groups") or []]
    names = names if len(names) == width else [f"group {i}" for i in range(width)]
    total = f"{len(clients)} clients, {np.nansum(counts):,.0f} examples"
    if width == 1 and not run.facts.get("groups"):
        with _figure(200) as figure:
            axes = figure.add_subplot()
            _totals(axes, counts)
            _name_columns(axes, list(clients))
            axes.set(xlabel="client")
            return svg(figure, "data-partition", f"Examples by client: {total}")
    body = _row_height(width) * width
    with _figure(220 + body) as figure:
        above, axes, scale = figure.subplots(3, 1, height_ratios=[70, body, 9])
        _totals(above, counts)
        above.set(xticks=[])
        most = float(np.nanmax(counts, initial=1.0))
        _heat(axes, np.log1p(counts), float(np.log1p(most)))
        _name_rows(axes, names)
        _name_columns(axes, list(clients))
        axes.set(xlabel="client")
        _scale(scale, most, "examples of a label", logarithmic=True)
        return svg(figure, "data-partition", f"Examples by label and client: {width} labels, {total}")


def _totals(axes: Axes, counts: Series) -> None:
    """Examples of each client as bars; `counts` have shape (groups, clients)."""
    clients = counts.shape[1]
    axes.stairs(np.nansum(counts, axis=0), np.arange(clients + 1) - 0.5, fill=True, color=COLOURS[2])
    axes.set_ylabel("examples")
    _plain_ticks(axes.yaxis)
    axes.set(xlim=(-0.5, clients - 0.5))


# -- several runs -------------------------------------------------------------------------------------------------------
def compared(groups: Sequence[Group], axis: str, target: float | None) -> str | None:
    """The curves of all runs over each other; seeds of a group share colour, line and mark.

    Args:
        axis: "megabytes", "rounds" or "hours" (on the modelled clock).
        target: drawn as a level line.
    """
    curves = [(i, curve(run, run.metric)) for i, members in enumerate(groups) for run in members.runs]
    drawn = [(i, points) for i, points in curves if len(points) and not np.isnan(getattr(points, axis)).all()]
    if not drawn:
        return None
    names = [f"{members.label} ({len(members.runs)} seeds)" if members.runs[1:] else members.label for members in groups]
    ends = [float(np.nanmax(getattr(points, axis))) for _, points in drawn]
    logarithmic = axis != "rounds" and min(ends) > 0 and max(ends) > 20 * min(ends)
    labels = {"megabytes": "MB sent, both directions, all clients", "rounds": "round", "hours": "modelled hours"}
    with _figure(290 + 16 * len(groups)) as figure:
        axes = figure.add_subplot()
        named: set[int] = set()
        for i, points in drawn:
            name = "_" if i in named else names[i]
            named.add(i)
            x = getattr(points, axis)
            keep = x > 0 if logarithmic else ~np.isnan(x)
            marker = MARKERS[i % len(MARKERS)]
            style = LINES[i // len(COLOURS) % len(LINES)]
            _line(axes, x[keep], points.values[keep], COLOURS[i % len(COLOURS)], name, style, marker)
        if target is not None:
            axes.axhline(target, color=INK, alpha=0.6, linewidth=1, linestyle="--", label=f"target {target:g}")
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: _plain(value))
            axes.xaxis.set_minor_formatter(NullFormatter())
        elif axis == "rounds":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            _plain_ticks(axes.xaxis)
        metric = metric_name([run for members in groups for run in members.runs])
        axes.set(xlabel=labels[axis], ylabel=f"validation {metric}")
        _legend(figure, axes)
        finals = [f"{name} {np.mean([final(r) for r in g.runs]):.3f}" for name, g in zip(names, groups, strict=True)]
        return svg(figure, f"compared-{axis}", f"{metric} against {labels[axis]}, at the end: " + ", ".join(finals))


# -- drawing ------------------------------------------------------------------------------------------------------------
@contextmanager
def _figure(height: float) -> Iterator[Figure]:
    """A figure of the page's style, `height` CSS pixels high; drawn and written inside the block."""
    with matplotlib.rc_context(FIGURE_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has more fonts
        yield Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")


def _line(axes: Axes, x: Series, y: Series, colour: str, name: str, style: str = "-", marker: str = "o") -> None:
    every = max(1, len(x) // 25)
    axes.plot(x, y, style, color=colour, label=_short(name, 60), marker=marker, markevery=every)


def _range(axes: Axes, values: Spread) -> None:
    axes.vlines(values.rounds, values.low, values.high, color=COLOURS[0], alpha=0.4, linewidth=3, label="lowest to highest")
    axes.plot(values.rounds, values.median, "-o", color=COLOURS[1], label="median")
    axes.set_ylim(bottom=0)


def _legend(figure: Figure, axes: Axes) -> None:
    """Put the legend above the axes, in as many columns as the width has room for."""
    handles, names = axes.get_legend_handles_labels()
    columns = max(1, min(len(names), WIDTH // (7 * max(map(len, names), default=1) + 36)))
    figure.legend(handles, names, loc="outside upper left", ncols=columns)


def _heat(axes: Axes, values: Series, most: float) -> None:
    axes.imshow(np.ma.masked_less_equal(values, 0), aspect="auto", interpolation="nearest", cmap=AMOUNT, vmin=0, vmax=most)
    axes.grid(visible=False)


def _scale(axes: Axes, most: float, name: str, logarithmic: bool = False) -> None:
    """Draw what the opacities of a heat map stand for, from 0 to `most`."""
    end = float(np.log1p(most)) if logarithmic else most
    axes.imshow(np.linspace(0, end, 256)[None], aspect="auto", cmap=AMOUNT, extent=(0, end, 0, 1), vmin=0)
    axes.set_yticks([])
    axes.grid(visible=False)
    if logarithmic:
        powers = [10**i for i in range(16) if 10**i < most / 3]
        powers = powers[:: 2 if len(powers) > 4 else 1]
        axes.set_xticks(np.log1p([*powers, most]), [_plain(value) for value in (*powers, most)])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel(name)


def _plain_ticks(axis: Axis) -> None:
    """Set few ticks, labelled in figures without a power of ten."""
    axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(lambda value, _: _plain(value))


def _plain(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _row_height(rows: int) -> float:
    """Height of a heat map's row in CSS pixels; a name needs ten of them to be read."""
    return float(np.clip(480 / rows, 10, 15)) if rows <= LABELLED_ROWS else float(np.clip(900 / rows, 2, 10))


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    step = -(-len(names) // LABELLED_ROWS)
    axes.set_yticks(range(0, len(names), step), [_short(name, 22) for name in names[::step]])
    axes.tick_params(axis="y", length=0, labelsize=min(11.0, _row_height(len(names)) - 1.5) if step == 1 else 9)


def _name_columns(axes: Axes, names: Sequence[str]) -> None:
    """Write as many names as fit below the columns; long ones stand upright."""
    short = [_short(name, 14) for name in names]
    longest = max(map(len, short), default=0)
    step = max(1, -(-len(names) * (14 if longest > 4 else 9 * longest) // 330))
    axes.set_xticks(range(0, len(names), step), short[::step], rotation=90 if longest > 4 else 0)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _ends(graph: Curve) -> str:
    return f"{graph.values[0]:.3f} after round {graph.rounds[0]:.0f}, {graph.values[-1]:.3f} after round {graph.rounds[-1]:.0f}"
