"""What `fedara report` and `fedara compare` do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedara_flwr.keys import ConfigError
from fedara_flwr.runs.directory import find_run

WIDE = 240  # columns where nobody looks at a terminal: lines of a file must not be folded


def report(text: str, out: Path | None, console: Console) -> None:
    """Write a run's page and say where it is.

    Raises:
        ConfigError: no such run, or the page cannot be written.
    """
    from fedara_flwr.report import write_report

    path = find_run(text)
    try:
        page = write_report(path, out)
    except OSError as error:
        raise _unwritable(out or path, error) from None
    console.print(Text(f"report: {page.resolve()}"), soft_wrap=True)


def compare(texts: Sequence[str], out: Path, target: float | None, console: Console) -> None:
    """Print the runs' tables, write the page with their curves and say where it is.

    Raises:
        ConfigError: no such run, a target that their metric cannot have, or the page cannot be written.
    """
    from fedara_flwr.report import read_run, write_comparison
    from fedara_flwr.report.compare import check_target, group, tables

    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    paths = [find_run(text) for text in texts]
    runs = [read_run(path) for path in paths]
    check_target(target, runs)
    for content in tables(group(runs), target):
        table = Table(
            box=box.SIMPLE_HEAD, title=Text(content.name), title_justify="left", collapse_padding=True, pad_edge=False
        )
        for i, heading in enumerate(content.headings):
            table.add_column(Text(heading), justify="left" if i < 2 else "right", overflow="fold", no_wrap=i >= 2)
        for row in content.rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    try:
        page = write_comparison(paths, out, target)
    except OSError as error:
        raise _unwritable(out, error) from None
    console.print(Text(f"comparison: {page.resolve()}"), soft_wrap=True)


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--out {path}: cannot be written ({error.strerror})")
