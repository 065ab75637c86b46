"""Whether Flower takes the app's folder: a check of `fedara doctor`. Nothing is built or sent."""

from __future__ import annotations

import tomllib
from pathlib import Path

from fedara_flwr.cli.findings import Finding
from fedara_flwr.flower import is_valid_name, validate_config

NAMES = "a name of letters, digits and hyphens, a letter first, 32 characters at most"


def app_folder(app: Path) -> Finding:
    """Whether `flwr run`, `flwr build` and `flwr app publish` take the app as it is, and leave its pyproject.toml alone."""
    file = app / "pyproject.toml"
    config = tomllib.loads(file.read_text()) if file.is_file() else {}
    name = config.get("project", {}).get("name", "")
    if name and not is_valid_name(name)[0]:
        return Finding("problem", f"{file}: Flower refuses project.name = {name!r}", f"give it {NAMES}")
    taken, errors, _ = validate_config(config, check_module=False) if config else (True, [], [])
    if not taken:
        return Finding(
            "problem",
            f"{file}: Flower refuses it: {' '.join('; '.join(errors).split())}",
            "correct what `flwr run` would refuse",
        )
    if "federations" in config.get("tool", {}).get("flwr", {}):
        return Finding(
            "warning",
            f"{file} has [tool.flwr.federations]: `flwr run` comments it out and moves it to FLWR_HOME/config.toml",
            "remove it; federation.toml and --federation-config say what a simulation is like",
        )
    if not is_valid_name(app.name)[0]:
        return Finding(
            "warning",
            f"`flwr build` and `flwr app publish` refuse the folder's name {app.name!r} (`flwr run` does not)",
            f"to build or publish, give the folder {NAMES}",
        )
    return Finding("ok", str(app))
