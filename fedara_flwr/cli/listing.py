"""What `fedara methods` shows: every method with its options, and the plug-ins that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedara_flwr.cli.reference import allowed, default
from fedara_flwr.strategies import methods, plugins
from fedara_flwr.strategies.base import Method


def print_methods(console: Console) -> None:
    """List all methods; a line of a broken plug-in says why it is broken."""
    offered = plugins()
    packages = {plugin.name: plugin.package for plugin in offered if plugin.method is not None}
    for name, cls in methods().items():
        for line in _describe(name, cls, packages.get(name, "")):
            console.print(line)
        console.print()
    for plugin in offered:
        if plugin.method is None:
            console.print(_heading(plugin.name, f"broken plug-in of {plugin.package}"))
            console.print(_indented(Text(plugin.reason)))
            console.print()


def _describe(name: str, cls: type[Method], package: str) -> Iterator[RenderableType]:
    yield _heading(name, cls.paper, package and f"plug-in of {package}")
    yield _indented(Text(cls.title))
    if cls.Options.model_fields:
        yield _indented(Text("strategy.options:", style="dim"))
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        for key, field in cls.Options.model_fields.items():
            kind = Text(allowed(field).replace("`", ""))
            table.add_row(Text(field.alias or key), kind, Text(default(field)), Text(field.description or ""))
        yield _indented(table, 4)


def _heading(name: str, *facts: str) -> Text:
    return Text.assemble((name, "bold"), *((f"  {fact}", "dim") for fact in facts if fact))


def _indented(what: RenderableType, columns: int = 2) -> Padding:
    return Padding(what, (0, 0, 0, columns), expand=False)
