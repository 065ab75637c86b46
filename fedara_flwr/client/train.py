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
from fedara_flwr.adapters.learner import Learner, cut
from fedara_flwr.client.capacity import backward_blocks, clock, free_memory
from fedara_flwr.client.step import Spent, backward, count_flops, log_shares
from fedara_flwr.client.terms import Term, find
from fedara_flwr.keys import ConfigError
from fedara_flwr.model.draws import draw, sparse_positions
from fedara_flwr.model.kept import Kept
from fedara_flwr.model.parts import declared, in_order
from fedara_flwr.model.spec import Arrays
from fedara_flwr.node.guard import Guard
from fedara_flwr.node.power import PowerMeter, peak_memory
from fedara_flwr.tasks.base import Encoded
from fedara_flwr.tasks.overview import Overview
from fedara_flwr.training import BETAS, LocalTraining
from fedara_flwr.wire.plan import KEPT_SLOTS, TrainPlan, Update

SORTING_WINDOW = 8  # batches among which examples are sorted by length


@dataclass(frozen=True)
class ClientData:
    """What one client holds: rows to train on, its own held-out rows (may be none), and what is to say of all of them."""

    train: Encoded
    held_out: Encoded
    overview: Overview = Overview((), ())

    def at_least(self, rows: int) -> ClientData:
        """Without what has fewer rows: of so few, their number and what is measured on them tell too much."""
        none = Encoded([], [])
        few_train, few_held = len(self.train) < rows, len(self.held_out) < rows
        return (
            self
            if not few_train and not few_held
            else replace(self, train=none if few_train else self.train, held_out=none if few_held else self.held_out)
        )


def batches(lengths: list[int], train: LocalTraining, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Row numbers of each step's batch, in order of length.

    By steps: `steps` batches of min(batch_size, n) rows from one permutation after another. By epochs: every row once per
    epoch, the last batch may be short. Within a window of up to 8 batches of one permutation rows go together by length,
    and the batches are shuffled, so that padding is short and the order still random.
    """
    n, size = len(lengths), min(train.batch_size, len(lengths))
    if train.steps:
        repeats = -(-train.steps * size // n)
        passes = [np.concatenate([rng.permutation(n) for _ in range(repeats)])[: train.steps * size]]
    else:
        passes = [rng.permutation(n) for _ in range(train.epochs)]
    for rows in passes:
        start = 0
        while start < len(rows):
            # never across permutations, where sorting would put copies of one row into one batch
            whole = max((n - start % n) // size, 1)
            window = rows[start : start + min(SORTING_WINDOW, whole) * size]
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
        stayed: what this node kept of the plan's kept parts; None at its first round.
    """

    data: ClientData
    plan: TrainPlan
    arrays: Arrays
    client_key: str
    guard: Guard = Guard()
    stayed: Kept | None = None


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
        self.received = load(self.adapted, self.plan, job.arrays, job.stayed)
        self.metrics: dict[str, float] = {}
        if self.plan.evaluate:
            self.metrics |= evaluate(learner, job.data, self.plan.train.batch_tokens)

    def begin(self) -> None:
        """Set up what all steps share: terms, batches, losses so far."""
        adapted, plan = self.adapted, self.plan
        self.terms: dict[str, Term] = {name: find(name)(adapted, **values) for name, values in sorted(plan.terms.items())}
        self.trainable = [p for part in in_order(plan.trained) for p in adapted.parameters(part)]
        self.gradient_masks = adapted.gradient_masks()
        self.lengths = [len(row) for row in self.job.data.train.ids]
        self.steps = list(batches(self.lengths, plan.train, np.random.default_rng(self.stream)))
        adjusted = plan.train.loss == "logit-adjusted" and self.learner.task.classes
        self.shift = log_shares(self.learner, self.job.data.train, plan.class_shares) if adjusted else None
        self.losses: list[torch.Tensor] = []
        self.spent = Spent()

    def before_update(self) -> None:
        """Change the gradients before the optimiser's step: masks, terms, then clipping."""
        for parameter, allowed in self.gradient_masks:
            if parameter.grad is not None:
                parameter.grad.mul_(allowed)
        # those that report first: what others make of the gradients must not change what is told
        for _, term in sorted(self.terms.items(), key=lambda item: item[0] not in self.plan.report):
            term.after_backward()
        if self.plan.train.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.trainable, self.plan.train.clip_norm)

    def after_update(self) -> None:
        """Call the terms after the optimiser's step."""
        for term in self.terms.values():
            term.after_step()

    def update(self, before: float, trained: float) -> Update:
        """The update that the client sends back, with its metrics.

        Args:
            before: seconds before the first step.
            trained: seconds of the steps.

        Raises:
            FloatingPointError: the loss is no longer finite.
        """
        began = time.perf_counter()
        adapted, plan, spent = self.adapted, self.plan, self.spent
        for term in self.terms.values():
            term.finish()
        values = torch.stack(self.losses)
        if not bool(torch.isfinite(values).all()):
            raise FloatingPointError(f"the loss is not finite after {len(values)} steps: lower the learning rates")
        metrics = self.metrics | {
            "loss": float(values.mean()),
            "loss-last": float(values[-1]),
            "steps": len(values),
            "tokens": spent.tokens,
            "blocks": backward_blocks(adapted, plan.trained),
            "seconds-train": trained,
            "bytes-free": free_memory(adapted.device),
        }
        metrics |= {f"seconds-{name}": value for name, value in spent.seconds.items()}
        if self.simulated:
            spent.once = sum(self.lengths[row] for row in np.unique(np.concatenate(self.steps)))
            metrics |= {f"flops-{name}": value for name, value in count_flops(self.learner, plan.trained, spent).items()}
        collected = self._collect()
        metrics["peak-memory-mb"] = peak_memory()
        metrics |= self.power.read() if self.power is not None else {}
        metrics["seconds-all"] = before + trained + time.perf_counter() - began
        return replace(collected, metrics=self.job.guard.let_out(metrics))

    def _collect(self) -> Update:
        """The update without metrics: what was trained, as it may leave, and what stays."""
        adapted, plan, guard = self.adapted, self.plan, self.job.guard
        released = guard.protect(adapted.collect(plan.returns(plan.mask)), self.received)
        mask = plan.mask
        if KEPT_SLOTS in plan.report and mask.count and not guard.noise:
            for kept in (term.kept() for term in self.terms.values()):
                mask = mask if kept is None else mask.intersect(plan.mask.keep(kept))
        reporting = [(name, term) for name, term in self.terms.items() if name in plan.report]
        # behind noise nothing may leave but what follows from the noised arrays
        reports = {name: term.private_report(released) if guard.noise else term.report() for name, term in reporting}
        sliced = adapted.spec.slice(released, plan.mask, mask)
        arrays = {part: sliced[part] for part in plan.returns(mask)}
        return Update(arrays, mask, len(self.job.data.train), {}, reports, adapted.collect(plan.kept))


def train(
    learner: Learner,
    data: ClientData,
    plan: TrainPlan,
    arrays: Arrays,
    client_key: str,
    simulated: bool = False,
    guard: Guard | None = None,
    stayed: Kept | None = None,
    longest: float = 0.0,
) -> Update:
    """Train one client for one round, as its plan says.

    Args:
        simulated: the machine is not this client's: floating-point operations are counted, for the modelled clock, not power.
        guard: what the client lets out; by default everything below.
        stayed: what this node kept of the plan's kept parts.
        longest: seconds that the steps may take; 0 = no bound.

    Returns:
        The update; its metrics are `loss` (mean over steps), `loss-last`, `steps`, `tokens` (padding too), `blocks` (of the
        backward pass), `seconds-train`, of which `seconds-forward` and `seconds-backward`, `seconds-all`, `peak-memory-mb`,
        `bytes-free` (where the model computes); of a real device `joules` and `temperature` where it tells them (node/power);
        of a simulated one `flops-forward`, `flops-backward` and `flops-below` (client/step.count_flops); `eval-examples` and
        the task's metrics as `eval-…`, of the received model, where the plan asks for it.

    Raises:
        FloatingPointError: the loss is no longer finite.
        ValueError: an unknown term, or no example to train on.
        ConfigError: the steps take longer than `longest`.
    """
    began = time.perf_counter()
    adapted = learner.adapted
    trainee = Trainee(learner, Job(data, plan, arrays, client_key, guard or Guard(), stayed), simulated)
    trainee.begin()
    optimizer, scheduler = make_optimizer(plan, adapted.parameters)
    adapted.model.train(plan.train.dropout)
    started = clock(adapted.device)
    for rows in trainee.steps:
        pieces = cut(rows.tolist(), trainee.lengths, plan.train.batch_tokens)
        batch = [learner.batch(data.train, piece) for piece in pieces]
        optimizer.zero_grad(set_to_none=True)
        trainee.losses.append(backward(learner, batch, list(trainee.terms.values()), trainee.spent, trainee.shift))
        trainee.before_update()
        optimizer.step()
        scheduler.step()
        trainee.after_update()
        if longest and time.perf_counter() - started > longest:
            done = f"{len(trainee.losses)} of {len(trainee.steps)} steps are done"
            raise ConfigError(f"node-config max-seconds = {longest:g}: the round takes longer, {done}")
    return trainee.update(started - began, clock(adapted.device) - started)


def load(adapted: AdaptedModel, plan: TrainPlan, arrays: Arrays, stayed: Kept | None = None) -> Arrays:
    """Shrink the model to the plan's mask and take over what came, what both sides draw, and what stayed here.

    Returns:
        What came and what was drawn: the part of it that the server knows.
    """
    spec = adapted.spec
    positions = sparse_positions(spec, plan.entries, plan.draw_seed) if plan.entries else None
    drawn = draw(spec, plan.mask, plan.drawn, plan.draw_seed, plan.entries)
    received = arrays | drawn
    whole = spec.complete(received, plan.mask)
    if missing := plan.trained - whole.keys():
        raise ValueError(f"the plan trains {', '.join(sorted(missing))}, which it neither brings nor draws")
    own = stayed.only(plan.kept).over(whole, plan.mask, spec) if stayed is not None else received
    adapted.load(own, plan.mask, plan.scales, plan.trained, positions)
    return received


def make_optimizer(plan: TrainPlan, parameters: Callable[[str], list[nn.Parameter]]) -> tuple[torch.optim.AdamW, Any]:
    """AdamW without weight decay, new each round; linear warm-up over the first `warmup_steps` steps.

    Args:
        parameters: of one part.
    """
    groups = [
        {"params": trained, "lr": part.rate(plan.train)}
        for name, part in declared().items()
        if name in plan.trained and (trained := parameters(name))
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=True)
    warmup = plan.train.warmup_steps
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)) if warmup else 1.0
    )
    return optimizer, scheduler
