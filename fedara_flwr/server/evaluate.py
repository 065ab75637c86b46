"""The server's model: evaluation on its validation and test data, and export. The only torch on the server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedara_flwr.adapters.attach import open_model
from fedara_flwr.adapters.backbone import tokenizer_digest
from fedara_flwr.adapters.export import save_lora, save_model, save_peft
from fedara_flwr.adapters.predict import predict
from fedara_flwr.config import Settings
from fedara_flwr.data.federation import federation
from fedara_flwr.offsets import Weights
from fedara_flwr.server.roster import Expected
from fedara_flwr.tasks import TASKS, Encoded


class ServerModel:
    """What strategies see of the model: `spec`, `weight` and `evaluate` (contracts.md §3)."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.task = settings, TASKS[settings.data.task]
        self.data = federation(settings.data, settings.seed)
        self.adapted, self.tokenizer = open_model(settings, self.data.labels)
        self.backbone = self.adapted.backbone
        self.spec = self.backbone.spec
        self._encoded: dict[str, Encoded] = {}

    def weight(self, name: str) -> NDArray[np.float32]:
        """The frozen weight of a module, float32, shape (d_out, d_in)."""
        return self.adapted.resident_weight(name)

    def evaluate(self, weights: Weights, split: Literal["validation", "test"] = "validation") -> dict[str, float]:
        """The task's metrics of a global model on one of the server's splits."""
        if split not in self._encoded:
            self._encoded[split] = self.task.encode(self.tokenizer, getattr(self.data, split), self.settings.data.max_length)
        torch.set_num_threads(self.settings.run.threads or os.cpu_count() or 1)
        self._load(weights)
        return predict(self.adapted, self.task, self.tokenizer, self._encoded[split])

    def expected(self, terms: frozenset[str]) -> Expected:
        """What nodes must agree on."""
        return Expected(
            self.spec.fingerprint,
            tokenizer_digest(self.tokenizer),
            self.data.digest,
            self.data.labels,
            terms,
        )

    def _load(self, weights: Weights) -> None:
        self.adapted.set_offset(weights.offset)
        self.adapted.load(weights.arrays, weights.mask, weights.scales, positions=weights.positions)

    def export(self, folder: Path, weights: Weights) -> Path:
        """`adapter/` for stock PEFT in `folder`, or a merged `model/` where the backbone changed or no slot lives."""
        if weights.mask.count and weights.offset is None and "backbone" not in weights.arrays:
            target = folder / "adapter"
            save = save_peft if "E" in weights.arrays else save_lora
            save(target, self.backbone, weights, self.task.peft_task_type)
        else:
            target = folder / "model"
            self._load(weights)
            save_model(target, self.adapted)
        self.tokenizer.save_pretrained(str(target))
        return target
