"""The run directory: everything a run leaves behind, written as it goes.

`config.json` (every key), `metrics.jsonl` (one line per round, one per client and round, one at the end), `federated.json`
(mask, bytes by part and direction, versions, outcome), and `adapter/` or `model/`.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fedara_flwr.config import ConfigError, Settings

PACKAGES = ("flwr", "torch", "transformers", "peft", "datasets", "numpy")


class RunDirectory:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, settings: Settings) -> RunDirectory:
        """A new folder under `run.dir`, with config.json in it.

        Raises:
            ConfigError: `run.name` exists already, or the folder cannot be written.
        """
        home = Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser()
        root = Path(settings.run.dir).expanduser() if settings.run.dir else home / "runs"
        name = settings.run.name or f"{settings.method}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        path = root / name
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise ConfigError(f"run.name = {name!r}: {path} exists already, allowed is a new name") from None
        except OSError as error:
            raise ConfigError(f"run.dir = {str(root)!r}: cannot be written ({error.strerror})") from None
        (path / "config.json").write_text(json.dumps(settings.to_flat(), indent=2) + "\n")
        return cls(path)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def discard(self) -> None:
        """Remove the folder of a run that ended before its first round."""
        shutil.rmtree(self.path)

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Lines of one type ("round", "client" or "end"), in order."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [record for line in lines if (record := json.loads(line))["type"] == kind]

    def finish(self, facts: dict[str, Any]) -> None:
        """Write federated.json."""
        facts = {**facts, "versions": {name: version(name) for name in PACKAGES}}
        (self.path / "federated.json").write_text(json.dumps(facts, indent=2) + "\n")

    def modelled(self) -> dict[str, float]:
        """Seconds, waiting and joules of all rounds by the modelled clock; {} where not every node was simulated."""
        rounds = self.records("round")
        names = ("seconds", "waiting", "joules")
        if not rounds or any(f"modelled-{name}" not in record for record in rounds for name in names):
            return {}
        return {name: sum(record[f"modelled-{name}"] for record in rounds) for name in names}

    def table(self) -> str:
        """Rounds as a table: accuracy, slots, modules, megabytes, seconds here and, modelled, on the fleet's devices."""
        table = Table(box=box.SIMPLE_HEAD, title=self.path.name)
        for heading in (
            "round",
            "accuracy",
            "macro-F1",
            "alive slots",
            "dead modules",
            "MB down",
            "MB up",
            "s",
            "modelled s",
            "clients",
        ):
            table.add_column(heading, justify="right")
        rounds = self.records("round")
        for record in rounds:
            sent = record["bytes"]
            table.add_row(
                str(record["round"]),
                f"{record['accuracy']:.3f}",
                f"{record['macro-f1']:.3f}",
                f"{record['alive']}/{record['slots']}",
                f"{record['dead-modules']}/{len(record['alive-per-module'])}",
                f"{sent['down'] / 1e6:.2f}",
                f"{sent['up'] / 1e6:.2f}",
                f"{record['seconds'] + record['seconds-evaluate']:.1f}",
                f"{record['modelled-seconds']:.1f}" if "modelled-seconds" in record else "-",
                f"{record['good']}/{len(record['sampled'])}",
            )
        if rounds:
            table.add_section()
            down, up = (sum(r["bytes"][way] for r in rounds) / 1e6 for way in ("down", "up"))
            seconds = sum(r["seconds"] + r["seconds-evaluate"] for r in rounds)
            modelled = self.modelled()
            total = f"{modelled['seconds']:.0f}" if modelled else "-"
            table.add_row("all", "", "", "", "", f"{down:.1f}", f"{up:.1f}", f"{seconds:.0f}", total, "")
        text = io.StringIO()
        Console(file=text, width=112, color_system=None).print(table)
        return text.getvalue().rstrip()
