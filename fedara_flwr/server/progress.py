"""One line per round on the terminal, in columns; the same with and without a TTY."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

COLUMNS = (
    ("round", 9),
    ("accuracy", 9),
    ("loss", 8),
    ("alive slots", 12),
    ("dead modules", 13),
    ("MB down", 9),
    ("MB up", 9),
    ("MB total", 10),
    ("replies", 8),
    ("s", 8),
    ("left", 9),
)
HEADER_EVERY = 25  # lines


class Progress:
    """Makes the lines; the time left is what this process's rounds took on average, times those to come."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self._lines, self._began = rounds, 0, time.monotonic()

    def line(self, record: Mapping[str, Any]) -> str:
        """A round's line, with the headings above it every now and then."""
        main = "entity-f1" if "entity-f1" in record else "accuracy"
        self._lines += 1
        left = (time.monotonic() - self._began) / self._lines * (self.rounds - record["round"])
        sent = record["bytes"]
        cells = (
            f"{record['round']}/{self.rounds}",
            f"{record[main]:.3f}" if main in record else "-",
            f"{record['loss']:.3f}" if "loss" in record else "-",
            f"{record['alive']}/{record['slots']}",
            f"{record['dead-modules']}/{len(record['alive-per-module'])}",
            f"{sent['down'] / 1e6:.2f}",
            f"{sent['up'] / 1e6:.2f}",
            f"{record['bytes-total'] / 1e6:.1f}",
            f"{record['good']}/{len(record['sampled'])}",
            f"{record['seconds'] + record['seconds-evaluate']:.1f}",
            clock(left) if record["round"] < self.rounds else "-",
        )
        text = _row(cells)
        if self._lines % HEADER_EVERY == 1:
            text = f"{_row([main if name == 'accuracy' else name for name, _ in COLUMNS])}\n{text}"
        return text


def _row(cells: Any) -> str:
    return "".join(cell.rjust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True))


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
