"""What `fedara methods` and `fedara tasks` show: every one with its options, and the plug-ins that cannot be used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedara_flwr import strategies
from fedara_flwr.cli.reference import allowed, default
from fedara_flwr.keys import Scalar
from fedara_flwr.tasks import registry
from fedara_flwr.tasks.base import USUAL


def print_methods(console: Console) -> None:
    """List all methods; a line of a broken plug-in says why it is broken."""
    offered = strategies.plugins()
    packages = {plugin.name: plugin.package for plugin in offered if plugin.offer is not None}
    for name, cls in strategies.methods().items():
        facts = (cls.paper, *_from(packages.get(name)))
        _print(console, _describe(name, facts, cls.title, {}, "strategy.options", cls.Options))
    for plugin in offered:
        if plugin.offer is None:
            _print(console, _broken(plugin.name, plugin.package, plugin.reason))


def print_tasks(console: Console) -> None:
    """List all tasks with their metrics, the main one first; a line of a broken plug-in says why it is broken.

    What holds for every task that names nothing else stands above them, once.
    """
    usual = {key: value for key, value in USUAL.items() if key != "data.partition"}  # that depends on the task's rows
    _print(console, [Text.assemble(("where a task names no other: ", "dim"), ", ".join(_values(usual)))])
    offered = registry.plugins()
    packages = {plugin.name: plugin.package for plugin in offered if plugin.offer is not None}
    for name, cls in registry.tasks().items():
        main = cls.metric.name if cls.metric.higher else f"{cls.metric.name} (lower is better)"
        lists = {"metrics": (main, *(metric for metric in cls.metrics if metric != cls.metric.name))}
        lists["by default"] = _values(cls.defaults)
        facts = (cls.auto_class, "no head" if cls.head == "none" else "", *_from(packages.get(name)))
        _print(console, _describe(name, facts, cls.title, lists, "data.options", cls.Options))
    for plugin in offered:
        if plugin.offer is None:
            _print(console, _broken(plugin.name, plugin.package, plugin.reason))


def _values(defaults: Mapping[str, Scalar]) -> tuple[str, ...]:
    return tuple(f"{key} = {value!r}" for key, value in defaults.items())


def _from(package: str | None) -> tuple[str, ...]:
    return (f"plug-in of {package}",) if package else ()


def _print(console: Console, lines: Iterable[RenderableType]) -> None:
    for line in lines:
        console.print(line)
    console.print()


def _broken(name: str, package: str, reason: str) -> Iterator[RenderableType]:
    yield _heading(name, f"broken plug-in of {package}")
    yield _indented(Text(reason))


def _describe(
    name: str, facts: Sequence[str], title: str, lists: Mapping[str, Sequence[str]], key: str, options: type[BaseModel]
) -> Iterator[RenderableType]:
    yield _heading(name, *facts)
    yield _indented(Text(title))
    for what, words in lists.items():
        if words:
            yield _indented(Text.assemble((f"{what}: ", "dim"), ", ".join(words)))
    if options.model_fields:
        yield _indented(Text(f"{key}:", style="dim"))
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        for option, field in options.model_fields.items():
            kind = Text(allowed(field).replace("`", ""))
            table.add_row(Text(field.alias or option), kind, Text(default(field)), Text(field.description or ""))
        yield _indented(table, 4)


def _heading(name: str, *facts: str) -> Text:
    return Text.assemble((name, "bold"), *((f"  {fact}", "dim") for fact in facts if fact))


def _indented(what: RenderableType, columns: int = 2) -> Padding:
    return Padding(what, (0, 0, 0, columns), expand=False)
