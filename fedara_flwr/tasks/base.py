"""The seam between a problem and everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedara_flwr.data.examples import Examples

Batch = dict[str, torch.Tensor]


class Task(Protocol):
    """What training and evaluation need to know of a problem."""

    name: str
    auto_class: Any
    """transformers' Auto class of the model, for example AutoModelForSequenceClassification."""
    peft_task_type: str
    """PEFT's name of the task, written into exported adapters."""

    def is_head(self, module: str) -> bool:
        """Whether a top-level module of the model belongs to the task layer."""
        ...

    def encode(self, tokenizer: Any, examples: Examples, max_length: int) -> list[list[int]]:
        """Token ids of every example, cut at `max_length`."""
        ...

    def collate(self, tokenizer: Any, ids: Sequence[list[int]], labels: Sequence[int]) -> Batch:
        """One padded batch with its labels."""
        ...

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Mean loss of a batch; a float32 scalar."""
        ...

    def metrics(self, logits: NDArray[np.float32], labels: NDArray[np.int64]) -> dict[str, float]:
        """Metrics over a whole split, `accuracy` among them."""
        ...
