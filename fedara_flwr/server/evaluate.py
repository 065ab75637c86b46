"""The server's model: evaluation on its validation and test data, and export. The only torch on the server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.backbone import Backbone, load_tokenizer, silence_libraries, tokenizer_digest
from fedara_flwr.adapters.export import save_model, save_peft
from fedara_flwr.adapters.predict import predict
from fedara_flwr.config import Settings
from fedara_flwr.data.federation import federation
from fedara_flwr.ranks import RankMask
from fedara_flwr.server.roster import Expected
from fedara_flwr.spec import Arrays
from fedara_flwr.tasks import TASKS


class ServerModel:
    """What strategies see of the model: `spec`, `weight` and `evaluate` (contracts.md §3)."""

    def __init__(self, settings: Settings) -> None:
        silence_libraries()
        self.settings, self.task = settings, TASKS["classification"]
        self.data = federation(settings.data, settings.seed)
        self.tokenizer = load_tokenizer(settings.model.name)
        self.backbone = Backbone(
            settings.model.name,
            self.task,
            self.data.labels,
            dtype=settings.model.dtype,
            pooling=settings.model.pooling,
            target_modules=settings.adapter.target_modules,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.adapted = AdaptedModel(self.backbone)
        self.spec = self.backbone.spec
        self._ids: dict[str, list[list[int]]] = {}

    def weight(self, name: str) -> NDArray[np.float32]:
        """The frozen weight of a module, float32, shape (d_out, d_in)."""
        return self.backbone.weight(name).numpy()

    def evaluate(
        self,
        arrays: Arrays,
        mask: RankMask,
        scales: tuple[float, ...],
        split: Literal["validation", "test"] = "validation",
    ) -> dict[str, float]:
        """The task's metrics of a global model on one of the server's splits."""
        examples = getattr(self.data, split)
        if split not in self._ids:
            self._ids[split] = self.task.encode(self.tokenizer, examples, self.settings.data.max_length)
        torch.set_num_threads(self.settings.run.threads or os.cpu_count() or 1)
        self.adapted.load(arrays, mask, scales)
        return predict(self.adapted, self.task, self.tokenizer, self._ids[split], examples.labels)

    def expected(self, terms: frozenset[str]) -> Expected:
        """What nodes must agree on."""
        return Expected(
            self.spec.fingerprint,
            tokenizer_digest(self.tokenizer),
            self.data.digest,
            self.data.labels,
            terms,
        )

    def export(self, folder: Path, arrays: Arrays, mask: RankMask, scales: tuple[float, ...]) -> Path:
        """`adapter/` for stock PEFT in `folder`; `model/` for methods that leave no adapter. Returns which."""
        if mask.count:
            target = folder / "adapter"
            save_peft(target, self.backbone, arrays, mask, scales, self.task.peft_task_type)
        else:
            target = folder / "model"
            self.adapted.load(arrays, mask, scales)
            save_model(target, self.adapted)
        self.tokenizer.save_pretrained(str(target))
        return target
