"""The seam between a problem and everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedara_flwr.data.examples import Examples

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples.

    Attributes:
        ids: token ids of each row.
        labels: what is to be predicted of each row, as its task wants it: one number, or one per token.
    """

    ids: list[list[int]]
    labels: Sequence[Any]

    def __len__(self) -> int:
        return len(self.ids)


class Task(Protocol):
    """What training and evaluation need to know of a problem."""

    name: str
    auto_class: Any
    """transformers' Auto class of the model, for example AutoModelForSequenceClassification."""
    peft_task_type: str
    """PEFT's name of the task, written into exported adapters."""
    words: bool
    """Whether examples are lists of words whose places among the tokens the tokenizer must tell."""

    def is_head(self, module: str) -> bool:
        """Whether a top-level module of the model belongs to the task layer."""
        ...

    def encode(self, tokenizer: Any, examples: Examples, max_length: int) -> Encoded:
        """Token ids and labels of every example, cut at `max_length` tokens."""
        ...

    def collate(self, tokenizer: Any, ids: Sequence[list[int]], labels: Sequence[Any]) -> Batch:
        """One padded batch with its labels."""
        ...

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Mean loss of a batch; a float32 scalar."""
        ...

    def count(self, batch: Batch) -> int:
        """Predictions of a batch that `loss` is the mean over: its weight where batches are parts of a larger one."""
        ...

    def metrics(self, logits: Sequence[NDArray[np.float32]], labels: Sequence[Any], names: tuple[str, ...]) -> dict[str, float]:
        """Metrics over a whole split: `accuracy`, `macro-f1`, `loss`, and what the task adds.

        Args:
            logits: the model's output for each row; one per token is as long as its padded batch was.
            labels: of each row, as `encode` gave them.
            names: label names in order.
        """
        ...


def pad(tokenizer: Any, ids: Sequence[list[int]]) -> Batch:
    """input_ids, attention_mask and, where the model takes them, token_type_ids; shape (batch, longest), padded on the right.

    Pairs get their token types from the tokenizer's own separator, as BERT's `create_token_type_ids` does.
    """
    longest = max(len(row) for row in ids)
    tokens = torch.full((len(ids), longest), tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(ids), longest), dtype=torch.long)
    for i, row in enumerate(ids):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    batch = {"input_ids": tokens, "attention_mask": mask}
    if "token_type_ids" in tokenizer.model_input_names and tokenizer.sep_token_id is not None:
        separators = (tokens == tokenizer.sep_token_id).long()
        batch["token_type_ids"] = ((separators.cumsum(1) - separators) == 1).long() * mask
    return batch


def cross_entropies(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Cross-entropy of each of n predictions in nats, shape (n,); `logits` have shape (n, labels)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_total = np.log(np.exp(shifted.astype(np.float64)).sum(axis=1))
    return log_total - shifted[np.arange(len(labels)), labels]
