"""The gradients of one step, of a batch that may be too large to pass through the model at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedara_flwr.adapters.learner import Learner
from fedara_flwr.adapters.stack import Stack
from fedara_flwr.client.capacity import FlopCounter, clock
from fedara_flwr.client.terms import Term
from fedara_flwr.model.ranks import Ints
from fedara_flwr.tasks.base import UNLABELLED, Batch, Encoded

PASSES = ("forward", "backward")
Passes = tuple[torch.Tensor, dict[str, float]]

ABSENT, MOST_ROWS = -1e9, 1e9  # a logit that no probability is left at; a share below one row of so many is none
LENGTH = 32  # tokens; FLOPs per token are counted at multiples of it, but for rows of less than a quarter
COSTS_KEPT = 256  # masks and lengths whose costs are remembered


@dataclass
class Spent:
    """What one client's steps took, added up.

    Attributes:
        rows: how many went through the model.
        tokens: how many these rows had, padding too.
        once: how many the rows had, each counted once, without padding.
        seconds: of forward and backward passes.
    """

    rows: int = 0
    tokens: int = 0
    once: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PASSES, 0.0))


def class_counts(data: Encoded, classes: int) -> Ints:
    """How many predictions of the rows are of each class; shape (classes,)."""
    labels = np.concatenate([np.atleast_1d(label) for label in data.labels]) if len(data) else np.empty(0, dtype=np.int64)
    return np.bincount(labels[labels != UNLABELLED].astype(np.int64), minlength=classes)


def log_shares(learner: Learner, data: Encoded, of_all: Sequence[float]) -> torch.Tensor:
    """Log of each class's share of a client's own predictions over its share of all clients'; shape (labels,).

    With this added, a model that is right for all clients' classes has the least loss on the client's own rows, too (arXiv
    2007.07314; over what all have, since the solved head knows that: this project's reading). A class that the client lacks
    gets ABSENT: nothing is learnt of it here. One that the client has and nobody told of gets nothing, as by the plain loss:
    the head knows nothing of it, and it has to be learnt here.

    Args:
        of_all: shares over all clients; () = each class counts as often as any other.
    """
    counts = class_counts(data, len(learner.adapted.backbone.labels))
    usual = np.array(of_all) if len(of_all) == len(counts) else np.ones(len(counts))
    with np.errstate(divide="ignore"):
        shift = np.log(counts / max(counts.sum(), 1)) - np.log(np.maximum(usual, 1 / MOST_ROWS))
    shift[(usual == 0) & (counts > 0)] = 0.0
    return torch.tensor(np.maximum(shift, ABSENT), dtype=torch.float32, device=learner.adapted.device)


def _outputs(learner: Learner, batch: Batch, shift: torch.Tensor | None) -> Any:
    """What the task sees of the model, with `shift` added to the logits of every prediction.

    Args:
        shift: shape (labels,), or (rows, labels) where rows have one each.
    """
    outputs = learner.task.outputs(learner, batch, learner.adapted.below(batch))
    if shift is not None:
        rows = shift if shift.dim() == 1 else shift.view(len(shift), *[1] * (outputs.logits.dim() - 2), -1)
        outputs.logits = outputs.logits.float() + rows
    return outputs


def backward(
    learner: Learner, batches: Sequence[Batch], terms: Sequence[Term], spent: Spent, shift: torch.Tensor | None = None
) -> torch.Tensor:
    """Add up the gradients of a batch that comes in parts: the same, to rounding, as if it came whole.

    The losses of all parts are summed and divided by the whole batch's number of predictions; every term's penalty counts
    once. Autograd keeps what one part needs, never more. The backbone's dropout, where it is on, draws other numbers than for
    the whole batch.

    Args:
        batches: the parts, at least one.
        spent: gets what this took.
        shift: added to every prediction's logits, shape (labels,).

    Returns:
        The batch's mean loss without penalties, detached.
    """
    adapted, task = learner.adapted, learner.task
    total = max(sum(int(task.counts(batch).sum()) for batch in batches), 1)
    mean = torch.zeros((), device=adapted.device)
    for i, batch in enumerate(batches):
        spent.rows += len(batch["input_ids"])
        spent.tokens += batch["input_ids"].numel()
        before = clock(adapted.device)
        loss = task.losses(_outputs(learner, batch, shift), batch).sum() / total
        spent.seconds["forward"] += clock(adapted.device) - before
        mean += loss.detach()
        for penalty in (term.penalty() for term in terms if i == 0):
            loss = loss if penalty is None else loss + penalty
        before = clock(adapted.device)
        loss.backward()
        spent.seconds["backward"] += clock(adapted.device) - before
    return mean


def backward_together(
    learner: Learner, stack: Stack, batch: Batch, counts: Sequence[int], shifts: Sequence[torch.Tensor | None]
) -> Passes:
    """Gradients of one step of several clients, each of its own mean loss.

    Args:
        batch: each client's rows in turn, as many of every client.
        counts: of each client, how many of its first rows count.
        shifts: of each client, as in `backward`; of all or of none.

    Returns:
        Mean losses, shape (clients,), detached; seconds of all clients' passes by name.
    """
    adapted, task = learner.adapted, learner.task
    before = clock(adapted.device)
    own = [shift for shift in shifts if shift is not None]
    shift = torch.stack(own).repeat_interleave(len(batch["input_ids"]) // len(counts), 0) if own else None
    with stack.whole():
        each, predictions = task.losses(_outputs(learner, batch, shift), batch), task.counts(batch)
    places = range(0, len(each), len(each) // len(counts))
    members = [slice(start, start + count) for start, count in zip(places, counts, strict=True)]
    losses = torch.stack([each[rows].sum() / predictions[rows].sum().clamp(min=1) for rows in members])
    between = clock(adapted.device)
    losses.sum().backward()
    return losses.detach(), dict(zip(PASSES, (between - before, clock(adapted.device) - between), strict=True))


def count_flops(learner: Learner, trainable: frozenset[str], spent: Spent, whole: bool = False) -> dict[str, float]:
    """Floating-point operations that were `spent`, by the loaded model's cost per token: `forward`, `backward` and `below`.

    That is counted as it runs, on one row about as long as theirs were on average (attention alone depends on it: half of
    LENGTH is 0.4% of MiniLM's cost); once for each mask and length, since nothing else matters. `below` is what
    `AdaptedModel.below` runs, once for each row of the round: this process may have kept a row's output from an earlier
    one, another may have kept none, and what is counted must not depend on it. Gradients are gone afterwards.

    Args:
        whole: whether all blocks ran, none of them before and kept.
    """
    adapted = learner.adapted
    length = max(1, round(spent.tokens / max(spent.rows, 1)))
    length = length if length < LENGTH // 4 else max(LENGTH, LENGTH * round(length / LENGTH))
    key = (length, adapted.mask, trainable, 0 if whole else adapted.boundary)
    if key not in adapted.costs:
        if len(adapted.costs) >= COSTS_KEPT:
            adapted.costs.clear()
        adapted.costs[key] = _cost(learner, length, whole)
    tokens = {"forward": spent.tokens, "backward": spent.tokens, "below": spent.once}
    return {name: cost * tokens[name] / length for name, cost in adapted.costs[key].items()}


def _cost(learner: Learner, length: int, whole: bool) -> dict[str, int]:
    """Floating-point operations of each pass of one made-up row, with the task's own loss."""
    adapted, task = learner.adapted, learner.task
    config: Any = adapted.model.config
    ids = [token % config.get_text_config().vocab_size for token in range(length)]
    batch = learner.batch(Encoded([ids], [task.made_up(length)]), [0])
    adapted.model.eval()
    below, under = None if whole else adapted.below(batch), 0
    with FlopCounter() as forward:
        loss = task.losses(task.outputs(learner, batch, below), batch).sum()
    if below is not None:
        with FlopCounter() as all_blocks, torch.no_grad():
            task.losses(task.outputs(learner, batch), batch)
        under = all_blocks.total - forward.total
    with FlopCounter() as backward_pass:
        if loss.requires_grad:  # nothing is trained where features alone are asked for
            loss.backward()
    adapted.model.zero_grad(set_to_none=True)
    return {"forward": forward.total, "backward": backward_pass.total, "below": under}
