"""Whole runs in seconds: a tiny BERT on docstrings, in-process."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Error, Message
from safetensors.numpy import load_file

from fedara_flwr import strategies
from fedara_flwr.config import Settings
from fedara_flwr.engine import InProcessGrid
from fedara_flwr.server.evaluate import ServerModel
from fedara_flwr.server.loop import Callback, RoundLoop
from fedara_flwr.tasks import read_settings

PHASES = ("all", "backward", "elapsed", "evaluate", "forward", "train")
WALL_CLOCK = {"seconds", "bytes-free", "peak-memory-mb", *(f"seconds-{phase}" for phase in PHASES)}
"""What differs between two equal runs in metrics.jsonl."""
CLIENTS = 6
SMALL = {
    "model.dtype": "float32",  # own processes time their own product
    "num-server-rounds": 4,
    "adapter.rank": 4,
    "strategy.fraction-train": 0.5,
    "train.steps": 2,
    "train.batch-size": 4,
    "data.max-length": 16,
    "data.validation": 0.01,
    "data.test": 0.9,
    "run.threads": 1,
}


FEDARA = {"final-rank": 1.0, "warmup-rounds": 1, "final-rounds": 1, "depth-slack": 0.0}
"""fedara's options in those runs."""


def turn_into_error(reply: Message, reason: str = "broken", code: int = 2) -> Message:
    """The same reply, which now says that the node failed."""
    reply.__dict__["_content"], reply.__dict__["_error"] = None, Error(code, reason)
    return reply


def options(**values: object) -> str:
    """`strategy.options` of these values; keys have _ for -."""
    return "\n".join(f"{key.replace('_', '-')} = {json.dumps(value)}" for key, value in values.items())


def config(model: Path, **changes: object) -> dict:
    """A flat run configuration; keys of `changes` have _ for - and __ for a dot; `fedara__…` are options of that method.

    The head is drawn, and numbers travel as they are, unless `changes` say otherwise: most tests look at the rounds alone.
    """
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    own = {key.partition(".")[2]: named.pop(key) for key in list(named) if key.startswith("fedara.")}
    plain = {"head.start": "random", "wire.down": "float32", "wire.up": "float32"}
    flat = {**SMALL, **plain, "model.name": str(model), **named}
    if flat.get("method", "fedara") == "fedara" and "strategy.options" not in flat:
        flat["strategy.options"] = options(**FEDARA | own)
    return flat


class Lines(Callback):
    """Keeps the lines of a run."""

    def __init__(self) -> None:
        self.lines: list[dict] = []

    def record(self, line: dict) -> None:
        self.lines.append(line)


_models: dict[str, ServerModel] = {}


def prepare(flat: dict, grid_class: type[InProcessGrid] = InProcessGrid, clients: int = CLIENTS, **grid_options):
    """(loop, grid) ready to start; server models are shared between tests that use the same model and data."""
    settings = read_settings(flat)
    train = {"cache", "cache_mb", "cache_disk_mb", "batch_tokens"}
    matters = {"model": True, "data": True, "seed": True, "adapter": {"target_modules"}, "train": train}
    key = settings.model_dump_json(include=matters)
    if key not in _models:
        _models[key] = ServerModel(settings)
    loop = make_loop(settings, _models[key])
    return loop, grid_class(settings.to_flat(), clients, **grid_options)


def make_loop(settings: Settings, model: ServerModel, *callbacks: Callback) -> RoundLoop:
    """The loop of a new run; what it records is in its `lines`."""
    method, kept = strategies.find(settings.method)(settings, model), Lines()
    expected = model.expected(method.all_terms(), method.parts)
    loop = RoundLoop(settings, method, method.start(), expected, [kept, *callbacks])
    loop.lines = kept.lines
    return loop


def start(flat: dict, grid_class: type[InProcessGrid] = InProcessGrid, clients: int = CLIENTS, **grid_options):
    """A finished loop."""
    loop, grid = prepare(flat, grid_class, clients, **grid_options)
    loop.start(grid, loop.initial_arrays(), loop.settings.num_server_rounds)
    return loop


@contextmanager
def stopped_in_round(monkeypatch, number: int) -> Iterator[None]:
    """The run inside is interrupted when clients have trained this round and it is about to be written down."""
    record = RoundLoop._record

    def stop(self, *rest):
        if self.work.number == number:
            raise KeyboardInterrupt
        return record(self, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RoundLoop, "_record", stop)
        yield


class ShuffledGrid(InProcessGrid):
    """Replies become ready in a random order, some only at a later look."""

    def __init__(self, *args, seed: int = 0, **options):
        super().__init__(*args, **options)
        self.random, self.order = random.Random(seed), []

    def pull_messages(self, message_ids):
        if self.random.random() < 0.6:
            return []
        found = list(super().pull_messages(message_ids))
        self.order += [m.metadata.src_node_id for m in found if m.metadata.message_type == "train"]
        return found


class TamperedGrid(InProcessGrid):
    """Replies to TRAIN pass through `tamper(round, node index, reply) -> reply`."""

    def __init__(self, *args, tamper: Callable[[int, int, Message], Message], **options):
        super().__init__(*args, **options)
        self.tamper = tamper

    def _call(self, message):
        reply = super()._call(message)
        if message.metadata.message_type != "train":
            return reply
        number = message.content.config_records["plan"]["round"]
        return self.tamper(number, message.metadata.dst_node_id - 1000, reply)


def written(run: Path) -> tuple[list[dict], int]:
    """What must be equal in a finished run's metrics.jsonl, and the bytes that going on took."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    extra = sum(line["bytes"]["down"] + line["bytes"]["up"] for line in found if line["type"] == "resume")
    kept, after = [], 0
    for line in found:
        if line["type"] == "resume":
            after = extra
            continue
        if "bytes-total" in line:
            line["bytes-total"] -= after
        kept.append({name: value for name, value in line.items() if name not in WALL_CLOCK})
    return kept, extra


def exported(run: Path) -> dict[str, np.ndarray]:
    """The tensors of what a finished run left."""
    (file,) = [file for file in run.glob("*/*.safetensors") if file.parent.name != "checkpoint"]
    return load_file(file)
