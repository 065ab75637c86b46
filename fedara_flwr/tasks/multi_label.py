"""Multi-label classification: any number of labels for a text or a pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedara_flwr.data.labels import Labels
from fedara_flwr.data.reading import Column, Example, optional_text, text
from fedara_flwr.data.skipped import LeftOut
from fedara_flwr.keys import ConfigError
from fedara_flwr.tasks.base import Batch, Encoded, Metric, f1, pad
from fedara_flwr.tasks.classification import TextTask

if TYPE_CHECKING:
    import torch


class MultiLabel(TextTask):
    """Binary cross-entropy of every label; F1 of the labels whose probability is above one half.

    A row's target are the places of its labels. For partitions by label its group is the first of them in the order of the
    names, as 1 + its place, and 0 where it has none (this project's reading).
    """

    name = "multi-label"
    title = "any number of labels for a text or a pair of texts"
    metric = Metric("micro-f1")
    metrics = ("micro-f1", "macro-f1", "loss")

    def table(self, table: Any) -> Any:
        """The table, refused where its lists have a 0 or a 1 for each label: as ids these would be the first two labels."""
        column = self.settings.label_column
        rows = [row for row in table[column] if isinstance(row, list)] if column in table.column_names else []
        if rows and len(rows[0]) > 1 and all(len(row) == len(rows[0]) and all(x in (0, 1) for x in row) for row in rows):
            line = "it holds 0 or 1 for each label, allowed are lists of the labels that a row has"
            raise ConfigError(f"data.label-column = {column!r}: {line}", f"label-column: {line}")
        return table

    def columns(self, there: Sequence[str]) -> Sequence[Column]:
        """The columns that every task reads, but that the label column holds lists."""
        *others, label = super().columns(there)
        return [*others, Column(label.role, label.key, label.name, "lists of label names, which may be empty")]

    def read(self, row: Mapping[str, Any], labels: Labels) -> Example:
        """A text, or a pair, and labels that are all known; an empty list says that none of them fits."""
        main = text(row["text"])
        if row["label"] is None:
            raise LeftOut("without label")
        places = {labels.place(label) for label in row["label"]}
        return Example(main, 1 + min(places, default=-1), optional_text(row, "pair"), tuple(sorted(places)))

    def check_labels(self, names: tuple[str, ...]) -> None:
        """Refuse data in which no row has a label, and nobody says which there are."""
        if not names:
            column = self.settings.label_column
            raise ConfigError(
                f"data.label-column = {column!r}: no row has a label, allowed are such rows with names in data.labels"
            )

    def group_names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The name of the group without a label, then the label names."""
        return ("(none)", *names)

    def model_config(self, names: tuple[str, ...]) -> dict[str, Any]:
        """An output for each label, each on its own, as transformers' pipelines then take them."""
        return {**super().model_config(names), "problem_type": "multi_label_classification"}

    def collate(self, tokenizer: Any, ids: Sequence[list[int]], labels: Sequence[Sequence[int]]) -> Batch:
        """As `pad`, and labels of shape (batch, most labels of a row): places, filled up with -1."""
        import torch

        most = max(map(len, labels))
        rows = [[*row, *[-1] * (most - len(row))] for row in labels]
        return pad(tokenizer, ids) | {"labels": torch.tensor(rows, dtype=torch.long)}

    def made_up(self, length: int) -> list[int]:
        """A row without any label: how many it has costs nothing."""
        return []

    def losses(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Binary cross-entropy of each row, the mean over all labels; shape (rows,)."""
        import torch

        logits = outputs.logits.float()
        wanted = hot(batch["labels"], logits)
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)

    def counts(self, batch: Batch) -> torch.Tensor:
        """One for each row, however many labels it has; shape (rows,)."""
        return batch["labels"].new_ones(len(batch["labels"]))

    def evaluation(self, data: Encoded, names: tuple[str, ...]) -> Decisions:
        """Counts of hits, predictions and cases by label."""
        return Decisions(self, len(names))

    def snippet(self) -> list[str]:
        """Python lines that print the labels of one text."""
        return [
            'logits = model(**tokenizer("some text", return_tensors="pt")).logits',
            "print([label for label, logit in zip(labels, logits[0]) if logit > 0])",
        ]


def hot(places: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """1 where a row has a label, else 0, in the shape of `logits`; a row's `places` are filled up with -1."""
    wanted = logits.new_zeros(len(logits), logits.shape[1] + 1)
    return wanted.scatter(1, places + 1, 1.0)[:, 1:]


class Decisions:
    """micro-f1 over all decisions; macro-f1 over the labels that occur in truth or prediction; loss. No label at all: F1 0."""

    def __init__(self, task: MultiLabel, labels: int) -> None:
        self.task = task
        self.hits, self.predicted, self.true = (np.zeros(labels, dtype=np.int64) for _ in range(3))
        self.loss, self.rows = 0.0, 0

    def add(self, outputs: Any, batch: Batch) -> None:
        """Count a batch; a label is predicted where its logit is above 0."""
        logits = outputs.logits.float()
        chosen, wanted = logits > 0, hot(batch["labels"], logits) > 0
        self.hits += (chosen & wanted).sum(0).cpu().numpy()
        self.predicted += chosen.sum(0).cpu().numpy()
        self.true += wanted.sum(0).cpu().numpy()
        self.loss += float(self.task.losses(outputs, batch).double().sum())
        self.rows += len(logits)

    def result(self) -> dict[str, float]:
        """The metrics by name; F1 of a label that occurs and is never hit is 0."""
        occurs = self.predicted + self.true > 0
        scores = f1(self.hits[occurs], self.predicted[occurs], self.true[occurs])
        micro = float(f1(self.hits.sum(), self.predicted.sum(), self.true.sum()))
        return {"micro-f1": micro, "macro-f1": float(np.mean(scores)) if len(scores) else 0.0, "loss": self.loss / self.rows}
