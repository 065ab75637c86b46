"""One line per round on the terminal, in columns; the same with and without a TTY."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from fedara_flwr.log import figure
from fedara_flwr.tasks import Metric

COLUMNS = (
    ("round", 9),
    ("", 9),  # the main metric
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
    """Makes the lines; the time left is what this process's rounds took on average, times those to come.

    `metric` is the task's main one; its column is as wide as its name needs.
    """

    def __init__(self, rounds: int, metric: Metric) -> None:
        self.rounds, self.metric, self._began = rounds, metric.name, time.monotonic()
        self._lines = self._done = 0
        self._widths = [max(width, len(self.metric) + 1) if not name else width for name, width in COLUMNS]

    def line(self, record: Mapping[str, Any]) -> str:
        """The line of a round, or of what was before round 1; the headings stand above it every now and then."""
        server_round, sent = record.get("round", 0), record["bytes"]
        left = "-"
        if server_round:
            self._done += 1
            if server_round < self.rounds:
                left = clock((time.monotonic() - self._began) / self._done * (self.rounds - server_round))
        else:
            self._began = time.monotonic()
        cells = (
            f"{server_round}/{self.rounds}",
            figure(record.get(self.metric)),
            figure(record.get("loss")),
            f"{record['alive']}/{record['slots']}",
            f"{record['dead-modules']}/{len(record['alive-per-module'])}",
            f"{sent['down'] / 1e6:.2f}",
            f"{sent['up'] / 1e6:.2f}",
            f"{record['bytes-total'] / 1e6:.1f}",
            f"{record['good']}/{len(record['sampled'])}",
            f"{record['seconds'] + record['seconds-evaluate']:.1f}",
            left,
        )
        text = self._row(cells)
        if self._lines % HEADER_EVERY == 0:
            text = f"{self._row([name or self.metric for name, _ in COLUMNS])}\n{text}"
        self._lines += 1
        return text

    def _row(self, cells: Sequence[str]) -> str:
        return "".join(cell.rjust(width) for cell, width in zip(cells, self._widths, strict=True))


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
