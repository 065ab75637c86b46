"""The gradients of one step, of a batch that may be too large to pass through the model at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.client.capacity import clock, flop_counter
from fedara_flwr.client.terms import Term
from fedara_flwr.tasks.base import Batch, Task

PASSES = ("forward", "backward")


@dataclass
class Spent:
    """What steps took, added up.

    Attributes:
        tokens: through the model, padding too.
        seconds: of forward and backward passes.
        flops: of both, of the steps that were counted.
    """

    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PASSES, 0.0))
    flops: dict[str, int] = field(default_factory=dict)


def backward(
    adapted: AdaptedModel, task: Task, batches: Sequence[Batch], terms: Sequence[Term], spent: Spent, count_flops: bool = False
) -> torch.Tensor:
    """Add up the gradients of a batch that comes in parts: the same, to rounding, as if it came whole.

    Each part's mean loss counts by its share of the batch's predictions, every term's penalty once. Autograd keeps what one
    part needs, never more. The backbone's dropout, where it is on, draws other numbers than for the whole batch.

    Args:
        batches: the parts, at least one.
        spent: gets what this took.
        count_flops: count floating-point operations.

    Returns:
        The batch's mean loss without penalties, detached.
    """
    counts = [task.count(batch) for batch in batches]
    total = max(sum(counts), 1)
    mean = torch.zeros((), device=adapted.device)
    for i, (batch, count) in enumerate(zip(batches, counts, strict=True)):
        spent.tokens += batch["input_ids"].numel()
        counters: dict[str, Any] = {name: flop_counter() if count_flops else nullcontext() for name in PASSES}
        before = clock(adapted.device)
        below = adapted.below(batch)  # a row's first time is not counted: it would depend on whom this process served before
        with counters["forward"]:
            loss = task.loss(adapted.logits(batch, below), batch) * (count / total)
        spent.seconds["forward"] += clock(adapted.device) - before
        mean += loss.detach()
        for penalty in (term.penalty() for term in terms if i == 0):
            loss = loss if penalty is None else loss + penalty
        before = clock(adapted.device)
        with counters["backward"]:
            loss.backward()
        spent.seconds["backward"] += clock(adapted.device) - before
        if count_flops:
            for name, counter in counters.items():
                spent.flops[name] = spent.flops.get(name, 0) + counter.get_total_flops()
    return mean
