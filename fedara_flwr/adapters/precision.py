"""Which number type a frozen backbone has by `model.dtype = 'auto'`: one timed product, its outcome kept by machine."""

from __future__ import annotations

import fcntl
import json
import logging
import platform
import time
from pathlib import Path

import psutil
import torch
from torch.nn.functional import linear

from fedara_flwr.files import flwr_home, processor, write_whole

logger = logging.getLogger(__name__)
KEPT = "number-types.json"
TOKENS, NARROW, WIDE = 512, 384, 1536  # a batch through a small encoder's feed-forward layer
REPEATS = 7
GAIN = 1.2  # times as fast that bfloat16 must be: its digits are fewer
ROOM = 0.25  # share of the memory that a float32 copy of a checkpoint in 16 bits may take


def number_type(device: str, parameters: int, stored: torch.dtype) -> str:
    """What `model.dtype = 'auto'` is here: `fastest_type`, but a large checkpoint in 16 bits is not made twice as large.

    Args:
        device: as torch calls it.
        parameters: how many the model has.
        stored: the checkpoint's own type.
    """
    found = fastest_type(device)
    if found == "float32" and stored.itemsize < 4 and 4 * parameters > ROOM * _memory(device):
        logger.info("model.dtype = 'auto': bfloat16, which is slower here; float32 would take %.1f GB", 4e-9 * parameters)
        return "bfloat16"
    return found


def _memory(device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def fastest_type(device: str) -> str:
    """'bfloat16' where this machine multiplies matrices faster in it, else 'float32'.

    Timed once for each processor and version of torch, then read from `number-types.json` under FLWR_HOME, so that all
    processes and later runs of a machine compute alike; this file can be edited or removed. Where it cannot be written, each
    process times anew.

    Args:
        device: as torch calls it: "cpu", "cuda", "cuda:1".
    """
    path, name = flwr_home() / KEPT, f"{_processor(device)}, torch {torch.__version__}"
    if stands := _kept(path, name):
        return stands
    gain = _gain(device)
    found = "bfloat16" if gain >= GAIN else "float32"
    logger.info("model.dtype = 'auto': %s, a product in bfloat16 takes %.2f of float32's time (%s)", found, 1 / gain, name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if stands := _kept(path, name):  # another process was faster: the first outcome stands
                return stands
            write_whole(path, json.dumps(_read(path) | {name: found}, indent=2).encode())
    except OSError as error:
        logger.warning("%s cannot be kept (%s): every process times a product of its own", path, error.strerror or error)
    return found


def _kept(path: Path, name: str) -> str:
    """The outcome that is kept; '' where there is none, or something that cannot be one."""
    kept = _read(path).get(name)
    if kept is not None and kept not in ("float32", "bfloat16"):
        logger.warning("%s: %r of %s is timed anew: allowed are 'float32', 'bfloat16'", path, kept, name)
        return ""
    return str(kept or "")


def _read(path: Path) -> dict[str, object]:
    try:
        kept = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _gain(device: str) -> float:
    """Time of a product in float32 over that in bfloat16: the shortest of some interleaved repetitions each."""
    where = torch.device(device)
    types = (torch.float32, torch.bfloat16)
    factors = [
        (torch.ones(TOKENS, NARROW, dtype=t, device=where), torch.ones(WIDE, NARROW, dtype=t, device=where)) for t in types
    ]
    times: dict[int, list[float]] = {0: [], 1: []}
    with torch.inference_mode():
        for _ in range(REPEATS + 2):  # the first two are for kernels to be made and caches to fill
            for i, (rows, weights) in enumerate(factors):
                began = time.perf_counter()
                linear(rows, weights).sum().item()  # a number that has come back: a GPU has done all of it
                times[i].append(time.perf_counter() - began)
    return min(times[0][2:]) / min(times[1][2:])


def _processor(device: str) -> str:
    """A name that another kind of processor does not have."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
