"""Sequence classification, of single texts or of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification

from fedara_flwr.data.examples import Examples
from fedara_flwr.tasks.base import Batch, Encoded, cross_entropies, pad


class Classification:
    """Cross-entropy over labels; accuracy and macro-F1."""

    name = "classification"
    auto_class = AutoModelForSequenceClassification
    peft_task_type = "SEQ_CLS"
    words = False
    _head_modules = frozenset({"classifier", "pre_classifier", "score", "pooler"})

    def is_head(self, module: str) -> bool:
        """BERT, RoBERTa: classifier; DistilBERT: and pre_classifier; DeBERTa: and pooler; decoders: score."""
        return module in self._head_modules

    def encode(self, tokenizer: Any, examples: Examples, max_length: int) -> Encoded:
        """Token ids with special tokens, and one label per row; the longer text of a pair is cut first."""
        if not len(examples):
            return Encoded([], [])
        encoded = tokenizer(
            list(examples.texts),
            list(examples.pairs) if examples.pairs is not None else None,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            split_special_tokens=True,  # a text that spells out "[SEP]" has no separator in it
        )
        return Encoded(encoded["input_ids"], examples.labels.tolist())

    def collate(self, tokenizer: Any, ids: Sequence[list[int]], labels: Sequence[int]) -> Batch:
        """As `pad`, and labels of shape (batch,)."""
        return pad(tokenizer, ids) | {"labels": torch.tensor(labels, dtype=torch.long)}

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy, in float32 whatever the backbone's type."""
        return torch.nn.functional.cross_entropy(logits.float(), batch["labels"])

    def count(self, batch: Batch) -> int:
        """Its rows."""
        return len(batch["labels"])

    def metrics(self, logits: Sequence[NDArray[np.float32]], labels: Sequence[int], names: tuple[str, ...]) -> dict[str, float]:
        """accuracy, macro-f1 over the labels that occur in truth or prediction, and the mean loss."""
        outputs, truth = np.asarray(logits), np.asarray(labels)
        predicted = outputs.argmax(axis=1)
        scores = []
        for label in np.union1d(predicted, truth):
            hits = int(((predicted == label) & (truth == label)).sum())
            scores.append(2 * hits / (int((predicted == label).sum()) + int((truth == label).sum())))
        return {
            "accuracy": float((predicted == truth).mean()),
            "macro-f1": float(np.mean(scores)),
            "loss": float(cross_entropies(outputs, truth).mean()),
        }
