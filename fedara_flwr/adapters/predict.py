"""Forward passes over a whole split, shared by the server's and the clients' evaluation; how batches are cut into parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.tasks.base import Encoded, Task

BATCH = 32


def parts(rows: Sequence[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Cut a batch into as few parts of neighbouring rows as have at most `tokens` tokens each, padding counted.

    Args:
        rows: row numbers, by length, so that little of a part is padding.
        lengths: tokens of every row there is.
        tokens: the bound, which a row alone may exceed; 0 = one part.
    """
    found: list[list[int]] = []
    longest = 0
    for row in rows:
        longest = max(longest, lengths[row])
        if not found or (tokens and (len(found[-1]) + 1) * longest > tokens):
            found.append([])
            longest = lengths[row]
        found[-1].append(row)
    return found


@torch.no_grad()
def predict(adapted: AdaptedModel, task: Task, tokenizer: Any, data: Encoded, batch_tokens: int = 0) -> dict[str, float]:
    """The task's metrics of the loaded model; batches of similar length, results in the order of the rows.

    Args:
        batch_tokens: most tokens of a batch, as in `parts`.
    """
    adapted.model.eval()
    lengths = [len(row) for row in data.ids]
    order = np.argsort(lengths, kind="stable").tolist()
    logits: dict[int, NDArray[np.float32]] = {}
    for start in range(0, len(order), BATCH):
        for rows in parts(order[start : start + BATCH], lengths, batch_tokens):
            batch = adapted.batch(task, tokenizer, data, rows)
            logits |= dict(zip(rows, adapted.logits(batch, adapted.below(batch)).cpu().numpy(), strict=True))
    return task.metrics([logits[i] for i in range(len(order))], data.labels, adapted.backbone.labels)
