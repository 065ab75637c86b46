"""What a client process keeps between calls: one backbone, one tokenizer, the tokenised data.

In a simulation one process serves many clients in turn; on a device it serves one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from fedara_flwr.adapters.attach import open_model
from fedara_flwr.client.store import NodeStore
from fedara_flwr.client.train import ClientData
from fedara_flwr.config import Settings
from fedara_flwr.data import federation as fed
from fedara_flwr.data.examples import Examples
from fedara_flwr.data.load import load
from fedara_flwr.offsets import compose
from fedara_flwr.tasks import TASKS, Encoded

NodeConfig = Mapping[str, Any]
CLIENTS_KEPT = 256  # tokenised clients held in memory


class Session:
    """The resident part, for one run configuration."""

    def __init__(self, settings: Settings, labels: tuple[str, ...]) -> None:
        self.settings, self.labels = settings, labels
        self.task = TASKS[settings.data.task]
        self.adapted, self.tokenizer = open_model(settings, labels)
        self.client_data = lru_cache(maxsize=CLIENTS_KEPT)(self._encode_client)
        self._offset: tuple[str, ...] = ()

    def set_offset(self, digests: tuple[str, ...], store: NodeStore) -> None:
        """Add the sum of these pieces to the backbone, in place of the one before.

        Raises:
            MissingPieces: some are not in the store; the backbone stays as it was.
        """
        if digests != self._offset:
            self.adapted.set_offset(compose(store.get(digests), self.adapted.spec))
            self._offset = digests

    def _encode_client(self, client_key: str, partition: int, partitions: int, path: str) -> ClientData:
        data, seed = self.settings.data, self.settings.seed
        if path:
            rows = load(data, seed, self.labels).train
        else:
            rows = fed.federation(data, seed).pool.take(fed.shares(data, seed, partitions)[partition])
        train, own = fed.hold_out(rows, data, seed, client_key)
        return ClientData(self._encode(train), self._encode(own))

    def _encode(self, examples: Examples) -> Encoded:
        return self.task.encode(self.tokenizer, examples, self.settings.data.max_length)


_resident: dict[str, Session] = {}


def resident(settings: Settings, labels: tuple[str, ...]) -> Session:
    """The process's session for these settings; another configuration replaces it: one backbone is in memory."""
    matters: Any = {"seed": True, "model": True, "data": True, "adapter": {"target_modules"}, "train": {"cache", "cache_mb"}}
    key = settings.model_dump_json(include=matters) + repr(labels)
    if key not in _resident:
        _resident.clear()
        _resident[key] = Session(settings, labels)
    return _resident[key]


def own_settings(settings: Settings, node_config: NodeConfig, trusted: bool) -> tuple[Settings, str]:
    """The settings as this node takes them, and the path of its own data ('' = its share of the run's data).

    On a device the server's `data.path` and `model.name` are not used: files and models are what node-config names
    (`data-path`, `model-name`), else the built-in data and the default model (contracts.md §5).

    Args:
        trusted: True in a simulation and in-process, where server and client are one user.
    """
    if trusted:
        return settings, ""
    path = str(node_config.get("data-path", ""))
    name = str(node_config.get("model-name", Settings().model.name))
    data = settings.data.model_copy(update={"path": path, "name": "docstrings"})
    model = settings.model.model_copy(update={"name": name})
    return settings.model_copy(update={"data": data, "model": model}), path
