"""What trials wrote, read and summarised: shared by the scripts that draw tables and pictures. Loads no torch."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

Curve = list[dict]
"""Evaluations of one trial, in the order of rounds."""


def read(path: Path) -> list[dict]:
    """Lines written so far; of a round that a cut-off trial ran twice, the last one."""
    lines = {}
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        key = [line[name] for name in ("stage", "data", "method", "setting", "seed", "round")]
        lines[json.dumps(key, sort_keys=True)] = line
    return list(lines.values())


def smooth(curve: Curve, index: int) -> float:
    """Mean accuracy of the three evaluations up to `index` (fewer at the start)."""
    return statistics.mean(line["accuracy"] for line in curve[max(0, index - 2) : index + 1])


def first(curve: Curve, target: float, name: str) -> float | None:
    """`name` at the first mean of three evaluations of at least `target`; None where it is not reached."""
    return next((line[name] for i, line in enumerate(curve) if i >= 2 and smooth(curve, i) >= target), None)


def spread(values: list[float]) -> str:
    """Mean, and sample standard deviation where there are several values."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean
