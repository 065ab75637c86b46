"""What trials wrote, read and summarised: shared by the scripts that draw tables and pictures. Loads no torch."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

Curve = list[dict]
"""Evaluations of one trial, in the order of rounds."""
Line = tuple[str, list[float], list[float], dict[str, Any]]
"""Label, megabytes, accuracies, and how the line looks, as matplotlib's `plot` takes it."""


def read(path: Path) -> list[dict]:
    """Lines written so far; of a round that a cut-off trial ran twice, the last one."""
    lines = {}
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        key = [line[name] for name in ("stage", "data", "method", "setting", "seed", "round")]
        lines[json.dumps(key, sort_keys=True)] = {"score": line.get("accuracy"), **line}
    return list(lines.values())


def smooth(curve: Curve, index: int) -> float:
    """Mean accuracy of the three evaluations up to `index` (fewer at the start)."""
    return statistics.mean(line["score"] for line in curve[max(0, index - 2) : index + 1])


def first(curve: Curve, target: float, name: str) -> float | None:
    """`name` at the first mean of three evaluations of at least `target`; None where it is not reached."""
    return next((line[name] for i, line in enumerate(curve) if i >= 2 and smooth(curve, i) >= target), None)


def spread(values: list[float]) -> str:
    """Mean, and sample standard deviation where there are several values."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def mean_of(values: list[float], digits: int) -> str:
    """Mean, and sample standard deviation where there are several values."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and digits > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def means(curves: list[Curve]) -> tuple[list[float], list[float]]:
    """Megabytes and smoothed accuracies, evaluation by evaluation, over the trials of one setting."""
    points = list(zip(*curves, strict=False))
    mb = [statistics.mean(line["mb"] for line in row) for row in points]
    return mb, [statistics.mean(smooth(curve, i) for curve in curves) for i in range(len(points))]


def draw(panels: dict[str, list[Line]], legend: str, target: Path) -> None:
    """Validation accuracy against megabytes, one panel for each data set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(7 * len(panels), 5), squeeze=False)
    for axis, (name, lines) in zip(axes[0], panels.items(), strict=True):
        for i, (label, mb, accuracy, look) in enumerate(lines):
            axis.plot(
                mb,
                accuracy,
                **{"color": plt.get_cmap("tab20")(i % 20), "label": label, "marker": ".", "linewidth": 1.4, **look},
            )
        axis.set(xscale="log", xlabel="MB sent, both directions, all clients", ylabel="validation accuracy", title=name)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, title=legend)
    figure.tight_layout()
    figure.savefig(target)
