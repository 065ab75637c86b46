"""Local training: exactly what a TrainPlan says, on one client's examples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedara_flwr import seeds
from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.learner import Learner, parts
from fedara_flwr.adapters.score import SlotScorer
from fedara_flwr.client.capacity import backward_blocks, clock, free_memory
from fedara_flwr.client.step import Spent, backward, count_flops
from fedara_flwr.client.terms import Term, find
from fedara_flwr.model.draws import draw, sparse_positions
from fedara_flwr.model.ranks import rank_order
from fedara_flwr.model.spec import PARTS, Arrays
from fedara_flwr.node.guard import Guard
from fedara_flwr.node.power import PowerMeter, peak_memory
from fedara_flwr.tasks.base import Encoded
from fedara_flwr.wire.plan import TrainPlan, Update, Vote
from fedara_flwr.wire.records import sent_parts

WINDOW = 8  # batches among which examples are sorted by length


@dataclass(frozen=True)
class ClientData:
    """What one client holds: rows to train on, its own held-out rows (may be none), and what is to say of rows left out."""

    train: Encoded
    held_out: Encoded
    skipped: str = ""


def batches(lengths: list[int], plan: TrainPlan, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Row numbers of each step's batch, in order of length.

    By steps: `steps` batches of min(batch_size, n) rows from one permutation after another. By epochs: every row once per
    epoch, the last batch may be short. Within a window of up to 8 batches of one permutation rows go together by length,
    and the batches are shuffled, so that padding is short and the order still random.
    """
    n, size = len(lengths), min(plan.batch_size, len(lengths))
    if plan.steps:
        repeats = -(-plan.steps * size // n)
        passes = [np.concatenate([rng.permutation(n) for _ in range(repeats)])[: plan.steps * size]]
    else:
        passes = [rng.permutation(n) for _ in range(plan.epochs)]
    for rows in passes:
        start = 0
        while start < len(rows):
            # never across permutations, where sorting would put copies of one row into one batch
            whole = max((n - start % n) // size, 1)
            window = rows[start : start + min(WINDOW, whole) * size]
            start += len(window)
            window = window[np.argsort([lengths[i] for i in window], kind="stable")]
            pieces = [window[i : i + size] for i in range(0, len(window), size)]
            for i in rng.permutation(len(pieces)):
                yield pieces[i]


def evaluate(learner: Learner, data: ClientData, batch_tokens: int) -> dict[str, float]:
    """Metrics of the loaded model on the client's own held-out rows, as `eval-...`; none where there are no rows.

    Args:
        batch_tokens: as in the plan.
    """
    if not len(data.held_out):
        return {}
    scores = learner.evaluate(data.held_out, batch_tokens)
    return {f"eval-{name}": value for name, value in scores.items()} | {"eval-examples": len(data.held_out)}


@dataclass(frozen=True)
class Job:
    """What one client is to do in one round.

    Attributes:
        arrays: what came with the plan.
        guard: what the client lets out.
    """

    data: ClientData
    plan: TrainPlan
    arrays: Arrays
    client_key: str
    guard: Guard = Guard()


class Trainee:
    """One client while it trains, all but the passes and the optimiser's steps. Its values must be the model's own."""

    def __init__(self, learner: Learner, job: Job, simulated: bool) -> None:
        """Load what the client received, and evaluate that where the plan asks for it."""
        if not len(job.data.train):
            raise ValueError("no example to train on")
        self.learner, self.adapted = learner, learner.adapted
        self.job, self.plan, self.simulated = job, job.plan, simulated
        self.stream = seeds.derive(self.plan.seed, "train", self.plan.server_round, job.client_key)
        torch.manual_seed(self.stream)
        self.power = None if simulated else PowerMeter()
        self.received = load(self.adapted, self.plan, job.arrays)
        self.metrics: dict[str, float] = {}
        if self.plan.evaluate:
            self.metrics |= evaluate(learner, job.data, self.plan.batch_tokens)

    def begin(self) -> None:
        """Set up what goes from step to step."""
        adapted, plan = self.adapted, self.plan
        self.terms: list[Term] = [find(name)(adapted, **parameters) for name, parameters in sorted(plan.terms.items())]
        self.scorer = SlotScorer(adapted, plan.importance) if "votes" in plan.report else None
        self.trainable = [p for part in PARTS if part in plan.trainable for p in adapted.parameters(part)]
        self.gradient_masks = adapted.gradient_masks()
        self.lengths = [len(row) for row in self.job.data.train.ids]
        self.steps = list(batches(self.lengths, plan, np.random.default_rng(self.stream)))
        self.losses: list[torch.Tensor] = []
        self.spent = Spent()
        self._gradients: list[list[torch.Tensor | None]] = []

    def _scored(self, step: int) -> SlotScorer | None:
        # with E = 0 the first step gives A and B no gradient, so it is scored only where it is the only one
        return self.scorer if step > 0 or len(self.steps) == 1 else None

    def before_update(self, step: int) -> None:
        """Between the backward pass and the optimiser's step."""
        for parameter, allowed in self.gradient_masks:
            if parameter.grad is not None:
                parameter.grad.mul_(allowed)
        if scorer := self._scored(step):
            self._gradients = scorer.gradients(copy=self.plan.clip_norm > 0)
            if self.plan.importance_time == "before":
                scorer.observe(self._gradients)
        for term in self.terms:
            term.after_backward()
        if self.plan.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.trainable, self.plan.clip_norm)

    def after_update(self, step: int) -> None:
        """After the optimiser's step."""
        if (scorer := self._scored(step)) and self.plan.importance_time == "after":
            scorer.observe(self._gradients)
        for term in self.terms:
            term.after_step()

    def update(self, before: float, trained: float) -> Update:
        """What the client sends back.

        Args:
            before: seconds before the first step.
            trained: seconds of the steps.

        Raises:
            FloatingPointError: the loss is no longer finite.
        """
        began = time.perf_counter()
        adapted, plan, spent = self.adapted, self.plan, self.spent
        for term in self.terms:
            term.finish()
        values = torch.stack(self.losses)
        if not bool(torch.isfinite(values).all()):
            raise FloatingPointError(f"the loss is not finite after {len(values)} steps: lower the learning rates")
        metrics = self.metrics | {
            "loss": float(values.mean()),
            "loss-last": float(values[-1]),
            "steps": len(values),
            "tokens": spent.tokens,
            "blocks": backward_blocks(adapted, "backbone" in plan.trainable),
            "seconds-train": trained,
            "bytes-free": free_memory(adapted.device),
        }
        metrics |= {f"seconds-{name}": value for name, value in spent.seconds.items()}
        if self.simulated:
            metrics |= {f"flops-{name}": value for name, value in count_flops(self.learner, plan.trainable, spent).items()}
        found = _collect(adapted, plan, self.scorer, self.terms, len(self.job.data.train), self.job.guard, self.received)
        metrics["peak-memory-mb"] = peak_memory()
        metrics |= self.power.read() if self.power is not None else {}
        metrics["seconds-all"] = before + trained + time.perf_counter() - began
        return replace(found, metrics=self.job.guard.let_out(metrics))


def train(
    learner: Learner,
    data: ClientData,
    plan: TrainPlan,
    arrays: Arrays,
    client_key: str,
    simulated: bool = False,
    guard: Guard | None = None,
) -> Update:
    """Run one client's round.

    Args:
        simulated: the machine is not this client's: floating-point operations are counted, for the modelled clock, not power.
        guard: what the client lets out; by default everything below.

    Returns:
        The update; its metrics are `loss` (mean over steps), `loss-last`, `steps`, `tokens` (padding too), `blocks` (of the
        backward pass), `seconds-train`, of which `seconds-forward` and `seconds-backward`, `seconds-all`, `peak-memory-mb`,
        `bytes-free` (where the model computes); of a real device `joules` and `temperature` where it tells them (client/power);
        of a simulated one `flops-forward` and `flops-backward` (client/step.count_flops); `eval-examples` and the task's
        metrics as `eval-…`, of the received model, where the plan asks for it.

    Raises:
        FloatingPointError: the loss is no longer finite.
        ValueError: an unknown term, or no example to train on.
    """
    began = time.perf_counter()
    adapted = learner.adapted
    trainee = Trainee(learner, Job(data, plan, arrays, client_key, guard or Guard()), simulated)
    trainee.begin()
    optimizer, scheduler = make_optimizer(plan, adapted.parameters)
    adapted.model.train(plan.dropout)
    started = clock(adapted.device)
    for step, rows in enumerate(trainee.steps):
        cut = parts(rows.tolist(), trainee.lengths, plan.batch_tokens)
        batch = [learner.batch(data.train, part) for part in cut]
        optimizer.zero_grad(set_to_none=True)
        trainee.losses.append(backward(learner, batch, trainee.terms, trainee.spent))
        trainee.before_update(step)
        optimizer.step()
        scheduler.step()
        trainee.after_update(step)
    return trainee.update(started - began, clock(adapted.device) - started)


def load(adapted: AdaptedModel, plan: TrainPlan, arrays: Arrays) -> Arrays:
    """Shrink the model to the plan's mask and take over what came and what both sides draw; both are returned."""
    spec = adapted.spec
    positions = sparse_positions(spec, plan.entries, plan.draw_seed) if plan.entries else None
    drawn = draw(spec, plan.mask, plan.drawn, plan.draw_seed, plan.entries)
    adapted.load(arrays | drawn, plan.mask, plan.scales, plan.trainable, positions)
    return arrays | drawn


def make_optimizer(plan: TrainPlan, parameters: Callable[[str], list[nn.Parameter]]) -> tuple[torch.optim.AdamW, Any]:
    """AdamW without weight decay, new each round; linear warm-up over the first `warmup_steps` steps.

    Args:
        parameters: of one part.
    """
    rates = {
        "B": plan.learning_rate,
        "E": plan.learning_rate * plan.e_lr_factor,
        "A": plan.learning_rate,
        "head": plan.head_learning_rate,
        "backbone": plan.learning_rate,
    }
    groups = [
        {"params": trained, "lr": rate}
        for part, rate in rates.items()
        if part in plan.trainable and (trained := parameters(part))
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    warmup = plan.warmup_steps
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)) if warmup else 1.0
    )
    return optimizer, scheduler


def _collect(
    adapted: AdaptedModel,
    plan: TrainPlan,
    scorer: SlotScorer | None,
    terms: list[Term],
    examples: int,
    guard: Guard,
    received: Arrays,
) -> Update:
    vote, mask = None, plan.mask
    arrays = guard.protect(adapted.collect(sent_parts(plan)), received)
    if scorer is not None:
        # behind noise nothing may leave but what follows from the noised arrays
        ranks = rank_order(adapted.spec.slot_sizes(arrays, plan.mask) if guard.noise else scorer.scores())
        vote = Vote(ranks < plan.budget, ranks.astype(np.uint16) if "scores" in plan.report else None)
        if plan.upload_mask == "local":
            mask = plan.mask.keep(vote.keep)
    if "kept" in plan.report and plan.mask.count and not guard.noise:
        for term in terms:
            kept = term.kept()
            mask = mask if kept is None else mask.intersect(plan.mask.keep(kept))
    arrays = adapted.spec.slice(arrays, plan.mask, mask)
    arrays = {part: arrays[part] for part in sent_parts(replace(plan, mask=mask))}
    return Update(arrays, mask, examples, {}, vote)
