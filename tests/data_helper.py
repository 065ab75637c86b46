"""Reading data as a run does: the task that the settings name reads the rows."""

from __future__ import annotations

import json
from pathlib import Path

from fedara_flwr.config import DataSettings
from fedara_flwr.data import federation as dealing
from fedara_flwr.data import sources
from fedara_flwr.data.examples import Dataset
from fedara_flwr.model.statistics import Statistics
from fedara_flwr.tasks import open_task


def load(settings: DataSettings, seed: int) -> Dataset:
    return sources.load(settings, seed, open_task(settings))


def load_own(settings: DataSettings, names: tuple[str, ...]) -> sources.Own:
    return sources.load_own(settings, names, open_task(settings))


def look(path: str, text_column: str, label_column: str, tasks: tuple[str, ...] = ("classification",)) -> sources.Look:
    settings = DataSettings(path=path, text_column=text_column, label_column=label_column)
    return sources.look(settings, [open_task(settings.model_copy(update={"task": task})) for task in tasks])


def federation(settings: DataSettings, seed: int) -> dealing.Federation:
    return dealing.federation(settings, seed, open_task(settings))


def shares(settings: DataSettings, seed: int, clients: int) -> list:
    return dealing.shares(settings, seed, open_task(settings), clients)


def statistics_of(features, classes, count, scatter=True):
    """Statistics of rows that come in one batch."""
    return Statistics.of([(features, classes)], count, scatter)


def write(path: Path, rows: list[dict]) -> Path:
    """A jsonl file of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
