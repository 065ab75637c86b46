"""Sequence classification, of single texts or of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedara_flwr.data.examples import Examples
from fedara_flwr.data.labels import Labels
from fedara_flwr.data.reading import Example, optional_text, text
from fedara_flwr.tasks.base import Batch, Encoded, Metric, Task, cross_entropies, f1, pad, text_examples

if TYPE_CHECKING:
    import torch


class TextTask(Task):
    """Base of tasks with one prediction for a text or a pair: the model, its head and the encoding."""

    auto_class = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"
    pipeline = "text-classification"

    def is_head(self, module: str) -> bool:
        """True for `classifier` and what goes with it: `pre_classifier` (DistilBERT), `pooler` (DeBERTa); decoders: `score`."""
        return module in ("classifier", "pre_classifier", "score", "pooler")

    def encode(self, tokenizer: Any, examples: Examples, max_length: int) -> Encoded:
        """Token ids with special tokens, and the target or, without targets, the group of each row as its label."""
        targets = examples.targets
        if targets is None:
            targets = () if examples.groups is None else tuple(examples.groups.tolist())
        return Encoded(text_examples(tokenizer, examples, max_length), list(targets))


class Classification(TextTask):
    """Cross-entropy over labels; accuracy and macro-F1. A row's group is its label."""

    name = "classification"
    title = "one label for a text or a pair of texts"
    classes = True
    docstrings = ""
    metric = Metric("accuracy")
    metrics = ("accuracy", "macro-f1", "loss")

    def read(self, row: Mapping[str, Any], labels: Labels) -> Example:
        """A text, or a pair, and its label."""
        main = text(row["text"])
        return Example(main, group=labels.place(row["label"]), pair=optional_text(row, "pair"))

    def collate(self, tokenizer: Any, ids: Sequence[list[int]], labels: Sequence[int]) -> Batch:
        """As `pad`, and labels of shape (batch,)."""
        import torch

        return pad(tokenizer, ids) | {"labels": torch.tensor(labels, dtype=torch.long)}

    def losses(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Cross-entropy of each row's label in nats, shape (rows,)."""
        import torch

        return torch.nn.functional.cross_entropy(outputs.logits.float(), batch["labels"], reduction="none")

    def evaluation(self, data: Encoded, names: tuple[str, ...]) -> Counts:
        """Counts of hits, predictions and cases by label."""
        return Counts(len(names))

    def snippet(self) -> list[str]:
        """Python lines that print the label of one text."""
        return [
            'logits = model(**tokenizer("some text", return_tensors="pt")).logits',
            "print(labels[int(logits.argmax())])",
        ]


class Counts:
    """accuracy; macro-f1 over the labels that occur in truth or prediction; and the mean loss."""

    def __init__(self, labels: int) -> None:
        self.hits, self.predicted, self.true = (np.zeros(labels, dtype=np.int64) for _ in range(3))
        self.loss = 0.0

    def add(self, outputs: Any, batch: Batch) -> None:
        """Add a batch's hits, predictions and cases to the counts, and its losses to their sum."""
        logits, truth = outputs.logits.float().cpu().numpy(), batch["labels"].cpu().numpy()
        chosen, labels = logits.argmax(axis=1), len(self.true)
        self.hits += np.bincount(truth[chosen == truth], minlength=labels)
        self.predicted += np.bincount(chosen, minlength=labels)
        self.true += np.bincount(truth, minlength=labels)
        self.loss += float(cross_entropies(logits, truth).sum())

    def result(self) -> dict[str, float]:
        """The metrics by name; F1 of a label that occurs and is never hit is 0."""
        rows, occurs = int(self.true.sum()), self.predicted + self.true > 0
        scores = f1(self.hits[occurs], self.predicted[occurs], self.true[occurs])
        return {
            "accuracy": float(self.hits.sum() / rows),
            "macro-f1": float(np.mean(scores)),
            "loss": self.loss / rows,
        }
