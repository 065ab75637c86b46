"""Forward passes over a whole split, shared by the server's and the clients' evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.tasks.base import Task

BATCH = 32


@torch.no_grad()
def predict(
    adapted: AdaptedModel, task: Task, tokenizer: Any, ids: list[list[int]], labels: NDArray[np.int64]
) -> dict[str, float]:
    """The task's metrics of the loaded model; batches of similar length, results in the order of the rows."""
    adapted.model.eval()
    order = np.argsort([len(row) for row in ids], kind="stable")
    parts = []
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        batch = task.collate(tokenizer, [ids[i] for i in rows], labels[rows].tolist())
        parts.append(adapted.logits(batch).cpu().numpy())
    logits = np.empty((len(ids), parts[0].shape[1]), dtype=np.float32)
    logits[order] = np.concatenate(parts)
    return task.metrics(logits, labels)
