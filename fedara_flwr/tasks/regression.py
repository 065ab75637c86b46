"""Regression: one number for a text or a pair, as STS-B's similarity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedara_flwr.data.labels import Labels
from fedara_flwr.data.reading import Example, optional_text, text
from fedara_flwr.data.skipped import LeftOut, absent
from fedara_flwr.tasks.base import Batch, Encoded, Metric, pad
from fedara_flwr.tasks.classification import TextTask

if TYPE_CHECKING:
    import torch

Values = NDArray[np.float64]
LARGEST_LABEL = 1e18  # its square must be finite in float32


class Regression(TextTask):
    """Mean squared error; rank and linear correlation. The label column holds numbers; a row's target is its number."""

    name = "regression"
    title = "one number for a text or a pair of texts"
    labelled = False
    grouped = False
    metric = Metric("spearman", low=-1.0)
    metrics = ("spearman", "pearson", "loss")
    load_options = "num_labels=1"

    def read(self, row: Mapping[str, Any], labels: Labels) -> Example:
        """A text, or a pair, and a finite number; numbers written as text will do."""
        main = text(row["text"])
        if absent(row["label"]):
            raise LeftOut("without label")
        try:
            number = math.nan if "_" in str(row["label"]) else float(row["label"])  # Python takes 1_000 for a number
        except (TypeError, ValueError):
            number = math.nan
        if not abs(number) <= LARGEST_LABEL:
            raise LeftOut(f"with a label that is no number up to {LARGEST_LABEL:g}")
        return Example(main, pair=optional_text(row, "pair"), target=number)

    def model_config(self, names: tuple[str, ...]) -> dict[str, Any]:
        """One output, which transformers' pipelines then leave as it is."""
        return {"num_labels": 1, "problem_type": "regression"}

    def collate(self, tokenizer: Any, ids: Sequence[list[int]], labels: Sequence[float]) -> Batch:
        """As `pad`, and labels of shape (batch,), float32."""
        import torch

        return pad(tokenizer, ids) | {"labels": torch.tensor(labels, dtype=torch.float32)}

    def losses(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Squared error of each row, shape (rows,)."""
        return (outputs.logits.float().squeeze(1) - batch["labels"]).square()

    def evaluation(self, data: Encoded, names: tuple[str, ...]) -> Correlation:
        """Predicted and true numbers, two for each row."""
        return Correlation()

    def snippet(self) -> list[str]:
        """Python lines that print the number of one text."""
        return ['logits = model(**tokenizer("some text", return_tensors="pt")).logits', "print(float(logits))"]


class Correlation:
    """Rank (spearman) and linear (pearson) correlation of predictions and truth, and the mean squared error as loss.

    A correlation is not defined where all predictions, or all true values, are equal: it is 0 then, not NaN, since such a
    model tells nothing about the order of the rows.
    """

    def __init__(self) -> None:
        self.predicted: list[float] = []
        self.true: list[float] = []

    def add(self, outputs: Any, batch: Batch) -> None:
        """Keep a batch's predictions and true numbers."""
        self.predicted += outputs.logits.float().squeeze(1).tolist()
        self.true += batch["labels"].tolist()

    def result(self) -> dict[str, float]:
        """The metrics by name; the rank correlation is the linear one of the ranks."""
        predicted, true = np.array(self.predicted), np.array(self.true)
        loss = float(np.square(predicted - true).mean())
        return {"spearman": pearson(ranks(predicted), ranks(true)), "pearson": pearson(predicted, true), "loss": loss}


def pearson(a: Values, b: Values) -> float:
    """Linear correlation of two series; 0 where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    spread = math.sqrt(float(a @ a) * float(b @ b))
    return float(np.clip(float(a @ b) / spread, -1.0, 1.0)) if spread > 0 else 0.0


def ranks(values: Values) -> Values:
    """The rank of each value, 1 for the smallest; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
