"""Tasks by name: every class in a module of this folder, and those of installed packages. No torch."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path

from pydantic import BaseModel

from fedara_flwr import plugins as packages
from fedara_flwr.config import DataSettings, Settings
from fedara_flwr.keys import ConfigError, Scalar, nearest
from fedara_flwr.tasks.base import USUAL, Metric, Task

GROUP = "fedara_flwr.tasks"
METRIC, MOST_METRICS = re.compile(r"[a-z0-9][a-z0-9-]{0,39}"), 24
# what a round's line says under these names is something else (server/lines.py)
RESERVED = frozenset(
    "type round good dropped sampled slots alive alive-sent alive-per-module dead-modules bytes bytes-total bytes-kept seconds "
    "seconds-evaluate examples coding-error factor-error feedback-norm planned noise clipped left-out-by-krum clients "
    "sitting-out cut".split()
)
PREFIXES = ("client-", "modelled-", "eval-", "test-")
Plugin = packages.Plugin[type[Task]]


@cache
def built_in() -> Mapping[str, type[Task]]:
    """The tasks of this package, in the order of their names."""
    # the names are those of the files beside this one, never anybody else's
    here = str(Path(__file__).parent)
    modules = [pkgutil.resolve_name(f"{__package__}.{info.name}") for info in pkgutil.iter_modules([here])]
    classes = {
        cls
        for module in modules
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, Task) and cls.__module__ == module.__name__ and cls.name
    }
    return {cls.name: cls for cls in sorted(classes, key=lambda cls: cls.name)}


def plugins(name: str | None = None) -> list[Plugin]:
    """What installed packages offer, sound or broken; with a `name`, only what has that name (nothing else is loaded)."""
    return packages.offered(GROUP, "task", built_in(), _unfit, name)


def _unfit(cls: object, point: EntryPoint) -> str:
    """Why what an entry point names is no task that can be listed and run; '' where it is one."""
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        return f"{point.value} is no subclass of Task"
    if cls.name != point.name:
        return f"{point.value} has the name {cls.name!r}, its entry point {point.name!r}"
    if not (isinstance(cls.Options, type) and issubclass(cls.Options, BaseModel)):
        return f"{point.value}.Options is no pydantic model"
    if not (
        isinstance(cls.metrics, tuple) and all(isinstance(word, str) for word in (cls.title, cls.auto_class, *cls.metrics))
    ):
        return f"{point.value}: title and auto_class must be texts, metrics a tuple of texts"
    if not (isinstance(cls.metric, Metric) and cls.metric.name in cls.metrics):
        return f"{point.value}: metric must be a Metric whose name is among metrics"
    for word in cls.metrics:
        if not METRIC.fullmatch(word) or word in RESERVED or word.startswith(PREFIXES) or len(cls.metrics) > MOST_METRICS:
            rule = f"up to {MOST_METRICS} names of small letters, digits and hyphens that no line of a run has already"
            return f"{point.value}: metric {word!r:.80} cannot be used, allowed are {rule}"
    if unknown := sorted(set(cls.defaults) - set(USUAL)):
        return f"{point.value}: defaults has {unknown[0]!r}, allowed are {', '.join(USUAL)}"
    if cls.head not in ("new", "none"):
        return f"{point.value}: head is {cls.head!r}, allowed are 'new' and 'none'"
    return ""


def tasks() -> dict[str, type[Task]]:
    """All sound tasks by name, built in and of installed packages."""
    offered = {plugin.name: plugin.offer for plugin in plugins() if plugin.offer is not None}
    return dict(sorted((dict(built_in()) | offered).items()))


def find(name: str) -> type[Task]:
    """The task `name`.

    Raises:
        ConfigError: there is none, with the nearest name, or its plug-in is broken.
    """
    if name in built_in():
        return built_in()[name]
    for plugin in plugins(name):
        if plugin.offer is None:
            raise ConfigError(f"data.task = {name!r}: the plug-in of {plugin.package} is broken: {plugin.reason}")
        return plugin.offer
    known = tasks()
    raise ConfigError(f"data.task = {name!r}: allowed are {', '.join(known)}{nearest(name, known)}")


def read_settings(flat: Mapping[str, Scalar]) -> Settings:
    """`Settings.from_flat`, and what it leaves open filled in by its task; the inverse of `Settings.to_flat`.

    Raises:
        ConfigError: as there, or there is no such task, or it does not allow its options.
    """
    settings = Settings.from_flat(flat)
    task, given, left_open = open_task(settings.data), settings.to_flat(), _left_open()
    usual = {**USUAL, "data.partition": USUAL["data.partition"] if task.grouped else "iid", **task.defaults}
    filled = {key: value for key, value in usual.items() if given[key] == left_open[key]}
    return Settings.from_flat({**given, **filled}) if filled else settings


@cache
def _left_open() -> Mapping[str, Scalar]:
    """The configuration's own defaults; every message that a node gets is read against them."""
    return Settings().to_flat()


def open_task(settings: DataSettings) -> Task:
    """The task that the settings name, with its options checked.

    Raises:
        ConfigError: there is none of that name, or an option that it does not allow.
    """
    return find(settings.task)(settings)


@cache
def evaluation_metrics() -> frozenset[str]:
    """The metrics of all tasks that are known here, as clients name them: "eval-accuracy", ..."""
    return frozenset(f"eval-{metric}" for cls in tasks().values() for metric in cls.metrics)
