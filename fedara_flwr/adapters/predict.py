"""Forward passes over a whole split, shared by the server's and the clients' evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.tasks.base import Encoded, Task

BATCH = 32


@torch.no_grad()
def predict(adapted: AdaptedModel, task: Task, tokenizer: Any, data: Encoded) -> dict[str, float]:
    """The task's metrics of the loaded model; batches of similar length, results in the order of the rows."""
    adapted.model.eval()
    order = np.argsort([len(row) for row in data.ids], kind="stable")
    logits: dict[int, NDArray[np.float32]] = {}
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH].tolist()
        batch = adapted.batch(task, tokenizer, data, rows)
        logits |= dict(zip(rows, adapted.logits(batch, adapted.below(batch)).cpu().numpy(), strict=True))
    return task.metrics([logits[i] for i in range(len(order))], data.labels, adapted.backbone.labels)
