"""Rotary frequencies in a model's configuration, under the names that other programs know."""

from __future__ import annotations

import json
from pathlib import Path


def name_rotary(folder: Path) -> None:
    """Write the frequencies of config.json under their former names, too.

    transformers 5 writes `rope_parameters` alone; converters that look for `rope_theta`, such as Ollama's, would take another
    number without a word.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text())
    rotary = config.get("rope_parameters")
    if not isinstance(rotary, dict) or "rope_theta" not in rotary:
        return
    config.setdefault("rope_theta", rotary["rope_theta"])
    if rotary.get("rope_type", "default") != "default":
        config.setdefault("rope_scaling", {name: value for name, value in rotary.items() if name != "rope_theta"})
    file.write_text(json.dumps(config, indent=2) + "\n")
