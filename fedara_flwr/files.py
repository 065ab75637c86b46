"""Files that appear whole or not at all, and what tells that one was damaged later."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def flwr_home() -> Path:
    """Flower's own folder, beside whose files this package keeps what lasts longer than a run."""
    return Path(os.environ.get("FLWR_HOME") or "~/.flwr").expanduser()


def data_cache() -> Path:
    """Where copies of a user's data lie that a library made in order to read them: for this user alone, and removable."""
    return flwr_home() / "fedara-cache"


def existing(path: Path) -> Path:
    """The path, or the nearest of its parents that exists."""
    return next(place for place in (path, *path.parents) if os.path.exists(place))


def unwritable(path: Path) -> str:
    """Why no folder can be made or written at `path`, in a few words; '' where it can."""
    place = existing(path)
    if not place.is_dir():
        return f"{place} is no folder"
    return "" if os.access(place, os.W_OK | os.X_OK) else f"{place} may not be written"


def processor() -> str:
    """The name of this machine's processor, as its system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def write_whole(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: written beside it, forced to the disk, then renamed.

    Whoever is killed meanwhile leaves the file as it was, and at most one `.part` file beside it.
    """
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def tensors_digest(tensors: Mapping[str, np.ndarray], text: str) -> str:
    """The sha256 of a safetensors file's content: arrays by name, and the text that goes with them. Shapes are not in it."""
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(np.ascontiguousarray(tensors[name]).tobytes())
    return total.hexdigest()
