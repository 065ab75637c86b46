"""What enters the head's last layer, and of which class it is: the rows from which a head is solved (merging/statistics.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedara_flwr.adapters.learner import Learner
from fedara_flwr.keys import ConfigError
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import Vector
from fedara_flwr.tasks.base import UNLABELLED, Batch, Encoded

TOLERANCE = 0.02  # of the largest logit: bfloat16 has eight bits


@dataclass(frozen=True)
class Rows:
    """Rows of one pass.

    Attributes:
        features: shape (n, d), float64.
        classes: their classes' numbers, shape (n,).
        tokens: how many tokens went through the model, padding counted.
        many: whether one row of data can have several predictions.
    """

    features: NDArray[np.float64]
    classes: NDArray[np.int64]
    tokens: int
    many: bool


@torch.no_grad()
def features(learner: Learner, data: Encoded, head: Vector, batch_tokens: int = 0) -> Iterator[Rows]:
    """Run all of `data` through the pre-trained backbone and the head as it was drawn, without adapters, batch by batch.

    What was loaded is lost; a delta is taken off.

    Args:
        head: the packed head, as `draws.drawn_head`.
        batch_tokens: most tokens of a batch, as in `Learner.batches`.

    Raises:
        ConfigError: the model's outputs are not those of a linear layer over something that can be found.
    """
    adapted, task = learner.adapted, learner.task
    name = adapted.backbone.last_linear
    if not name:
        line = f"the head of {type(adapted.model).__name__} has no linear layer with an output for each label"
        raise ConfigError(f"head.start: {line}, allowed is 'random'")
    modules = len(adapted.spec.modules)
    adapted.set_delta(None)
    adapted.load({"head": head}, RankMask.full([0] * modules), (1.0,) * modules)
    adapted.model.eval()
    layer, entered = adapted.model.get_submodule(name), list[torch.Tensor]()
    hook = layer.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    try:
        for batch in learner.batches(data, batch_tokens):
            outputs, labels = task.outputs(learner, batch), batch["labels"]
            found = _of_predictions(entered, layer, outputs.logits, batch, adapted.autocast())
            labelled = labels != UNLABELLED
            rows = found[labelled].double().cpu().numpy()
            yield Rows(rows, labels[labelled].cpu().numpy(), batch["input_ids"].numel(), labels.dim() > 1)
            entered.clear()
    finally:
        hook.remove()


def _of_predictions(entered: list[torch.Tensor], layer: Any, logits: torch.Tensor, batch: Batch, autocast: Any) -> torch.Tensor:
    """The features of each prediction, shape (*logits.shape[:-1], d).

    Decoders put every position of a row through the layer, and give the logits of its last one.
    """
    why = "the layer is not run once"
    if len(entered) == 1:
        found = entered[0]
        if found.dim() == logits.dim() + 1:
            last = batch["attention_mask"].sum(1) - 1
            found = found[torch.arange(len(found), device=found.device), last]
        with autocast:
            again = layer(found) if found.shape[:-1] == logits.shape[:-1] else None
        if (
            again is not None
            and again.shape == logits.shape
            and torch.allclose(again, logits, rtol=0.0, atol=TOLERANCE * float(logits.abs().max()) + 1e-6)
        ):
            return found
        why = "what leaves the layer are not the logits"
    raise ConfigError(f"head.start: of this model's head nothing can be solved ({why}), allowed is 'random'")
