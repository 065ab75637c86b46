"""Sequence classification, of single texts or of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification

from fedara_flwr.data.examples import Examples
from fedara_flwr.tasks.base import Batch


class Classification:
    """Cross-entropy over labels; accuracy and macro-F1."""

    name = "classification"
    auto_class = AutoModelForSequenceClassification
    peft_task_type = "SEQ_CLS"
    _head_modules = frozenset({"classifier", "pre_classifier", "score", "pooler"})

    def is_head(self, module: str) -> bool:
        """BERT, RoBERTa: classifier; DistilBERT: and pre_classifier; DeBERTa: and pooler; decoders: score."""
        return module in self._head_modules

    def encode(self, tokenizer: Any, examples: Examples, max_length: int) -> list[list[int]]:
        """Token ids with special tokens; the longer text of a pair is cut first."""
        if not len(examples):
            return []
        encoded = tokenizer(
            list(examples.texts),
            list(examples.pairs) if examples.pairs is not None else None,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            split_special_tokens=True,  # a text that spells out "[SEP]" has no separator in it
        )
        return encoded["input_ids"]

    def collate(self, tokenizer: Any, ids: Sequence[list[int]], labels: Sequence[int]) -> Batch:
        """input_ids and attention_mask of shape (batch, longest), labels of shape (batch,).

        Pairs get their token types from the tokenizer's own separator, as BERT's `create_token_type_ids` does.
        """
        longest = max(len(row) for row in ids)
        tokens = torch.full((len(ids), longest), tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros((len(ids), longest), dtype=torch.long)
        for i, row in enumerate(ids):
            tokens[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        batch = {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor(labels, dtype=torch.long)}
        if "token_type_ids" in tokenizer.model_input_names and tokenizer.sep_token_id is not None:
            separators = (tokens == tokenizer.sep_token_id).long()
            batch["token_type_ids"] = ((separators.cumsum(1) - separators) == 1).long() * mask
        return batch

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy, in float32 whatever the backbone's type."""
        return torch.nn.functional.cross_entropy(logits.float(), batch["labels"])

    def metrics(self, logits: NDArray[np.float32], labels: NDArray[np.int64]) -> dict[str, float]:
        """accuracy, macro-f1 over the labels that occur in truth or prediction, and the mean loss."""
        predicted = logits.argmax(axis=1)
        scores = []
        for label in np.union1d(predicted, labels):
            hits = int(((predicted == label) & (labels == label)).sum())
            scores.append(2 * hits / (int((predicted == label).sum()) + int((labels == label).sum())))
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_total = np.log(np.exp(shifted.astype(np.float64)).sum(axis=1))
        loss = log_total - shifted[np.arange(len(labels)), labels]
        return {
            "accuracy": float((predicted == labels).mean()),
            "macro-f1": float(np.mean(scores)),
            "loss": float(loss.mean()),
        }
