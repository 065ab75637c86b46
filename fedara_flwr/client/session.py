"""What a client process keeps between calls: one backbone, one tokenizer, the tokenised data.

In a simulation one process serves many clients in turn; on a device it serves one.
"""

from __future__ import annotations

import json
from functools import cached_property, lru_cache
from typing import Any

import torch

from fedara_flwr.adapters.learner import open_learner
from fedara_flwr.adapters.stack import problem
from fedara_flwr.client.train import ClientData
from fedara_flwr.config import BUILT_IN_DATA, Settings
from fedara_flwr.data import federation as fed
from fedara_flwr.data.examples import Examples
from fedara_flwr.data.sources import load_own
from fedara_flwr.keys import ConfigError, read_options
from fedara_flwr.model.deltas import compose
from fedara_flwr.node.settings import NodeSettings
from fedara_flwr.node.store import NodeStore
from fedara_flwr.tasks import Encoded
from fedara_flwr.tasks.overview import Overview, overview

PROBED = 8  # tokens of a made-up row
CLIENTS_KEPT = 256  # tokenised clients held in memory


class Session:
    """What stays in memory for one run configuration: the learner, its delta, and the tokenised data of clients."""

    def __init__(self, settings: Settings, labels: tuple[str, ...], device: str) -> None:
        self.settings, self.labels = settings, labels
        self.learner = open_learner(settings, labels, device)
        self.adapted, self.task = self.learner.adapted, self.learner.task
        self.client_data = lru_cache(maxsize=CLIENTS_KEPT)(self._encode_client)
        self._delta: tuple[str, ...] = ()

    def set_delta(self, digests: tuple[str, ...], store: NodeStore) -> None:
        """Add the sum of these pieces to the backbone, in place of the one before.

        Raises:
            MissingPieces: some are not in the store; the backbone stays as it was.
        """
        if digests != self._delta:
            self.adapted.set_delta(compose(store.get(digests), self.adapted.spec))
            self._delta = digests

    @property
    def federation(self) -> fed.Federation:
        """The run's own data, as every simulated node deals it out for itself."""
        return fed.federation(self.settings.data, self.settings.seed, self.task)

    @cached_property
    def apart(self) -> str:
        """Why several clients cannot go through the model together; '' where they can.

        Finding out overwrites the loaded adapters and head.
        """
        row = Encoded([[0] * PROBED], [self.task.made_up(PROBED)])
        with torch.no_grad():  # what is tried at a first pass must not meet several clients' adapters
            self.task.outputs(self.learner, self.learner.batch(row, [0]))
        return problem(self.adapted)

    def _encode_client(self, client_key: str, partition: int, partitions: int, path: str) -> ClientData:
        data, seed = self.settings.data, self.settings.seed
        if path:
            own = load_own(data, self.labels, self.task)
            rows, held_out = own.train, own.test
            parts = {"train": rows} if held_out is None else {"train": rows, "test": held_out}
            skipped = tuple(filter(None, (str(own.skipped),)))
            found = overview(self.task, self.learner.tokenizer, parts, self.labels, data.max_length, skipped)
        else:
            rows = self.federation.pool.take(fed.shares(data, seed, self.task, partitions)[partition])
            held_out, found = None, Overview((), ())
        if held_out is None:
            rows, held_out = fed.hold_out(rows, data, seed, client_key)
        elif not data.client_validation:
            held_out = held_out.take([])
        train = self._encode(rows)
        if train.notes:
            found = found._replace(lines=(*found.lines, train.notes))
        return ClientData(train, self._encode(held_out), found)

    def _encode(self, examples: Examples) -> Encoded:
        return self.learner.encode(examples, self.settings.data.max_length)


_resident: dict[str, Session] = {}


def resident(settings: Settings, labels: tuple[str, ...], device: str = "cpu") -> Session:
    """The process's session for these settings; another configuration replaces it: one backbone is in memory."""
    cache = {"cache", "cache_mb", "cache_disk_mb", "checkpointing"}
    matters: Any = {"seed": True, "model": True, "data": True, "adapter": {"target_modules"}, "train": cache}
    key = f"{settings.model_dump_json(include=matters)} {labels!r} {device}"
    if key not in _resident:
        _resident.clear()
        _resident[key] = Session(settings, labels, device)
    return _resident[key]


def own_settings(settings: Settings, node: NodeSettings, trusted: bool) -> tuple[Settings, str]:
    """The settings as this node takes them, and the path of its own data ('' = its share of the run's data).

    On a device the server's `data.path` is not used, and its `model.name` only looked up among the names that the node's own
    `models` allows: no path of the server's is opened.

    Args:
        trusted: True in a simulation and in-process, where server and client are one user.

    Raises:
        ConfigError: the run's model is not among the node's.
    """
    if trusted:
        return settings, ""
    node.check_threads(settings.train.threads)
    name = settings.model.name
    if name not in node.backbones:
        raise ConfigError(f"node-config models = {node.models!r}: the run's model.name = {name!r} is not among them")
    model: dict[str, Any] = {"name": node.backbones[name], "dtype": node.dtype or settings.model.dtype}
    own = settings.data.name if settings.data.name in BUILT_IN_DATA else ""  # nothing is fetched that a server names
    data: dict[str, Any] = {"path": node.data_path, "name": own or "docstrings"}
    if node.validation is not None:
        data["client_validation"] = node.validation
    if node.data_path:  # all rows are this node's
        data |= {name: getattr(node, name) for name in ("text_column", "pair_column", "label_column")}
        data |= {"train_split": "", "validation_split": "", "test_split": "", "id_column": ""}
        data |= {"format": node.data_format, "subset": node.data_subset}
        data["options"] = _own_options(settings.data.options, node.data_options)
    train: dict[str, Any] = {"threads": node.threads or settings.train.threads}
    train |= {name: value for name in ("cache_mb", "cache_disk_mb") if (value := getattr(node, name)) is not None}
    groups = {"model": model, "data": data, "train": train}
    changed = {name: getattr(settings, name).model_copy(update=values) for name, values in groups.items()}
    return settings.model_copy(update=changed), node.data_path


def _own_options(run: str, node: str) -> str:
    """`data.options` for a device's own data: the run's without those that name columns, and the node's over them."""
    options = {name.replace("_", "-"): value for name, value in read_options("data.options", run).items()}
    options = {name: value for name, value in options.items() if not name.endswith("-column")}
    options |= {name.replace("_", "-"): value for name, value in read_options("node-config data-options", node).items()}
    return "\n".join(
        f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in options.items()
    )  # JSON's values are TOML's


def pick_device(node: NodeSettings) -> str:
    """The device that this node computes on, as torch calls it.

    In-process `auto` stays on the processor, as under Ray, which hides GPUs unless it is told to share them: both give the
    same bits.

    Raises:
        ConfigError: `cuda`, and torch sees none.
    """
    there = torch.cuda.is_available()
    if node.device == "cuda" and not there:
        raise ConfigError("node-config device = 'cuda': torch sees no GPU here, allowed are 'auto' and 'cpu'")
    return "cuda" if there and (node.device == "cuda" or (node.device == "auto" and not node.engine)) else "cpu"
