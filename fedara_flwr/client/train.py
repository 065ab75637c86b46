"""Local training: exactly what a TrainPlan says, on one client's examples."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedara_flwr import seeds
from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.predict import parts, predict
from fedara_flwr.adapters.score import SlotScorer
from fedara_flwr.client.capacity import backward_blocks, free_memory
from fedara_flwr.client.guard import Guard
from fedara_flwr.client.power import PowerMeter, peak_memory
from fedara_flwr.client.step import Spent, backward, count_flops
from fedara_flwr.client.terms import Term, find
from fedara_flwr.draws import draw, sparse_positions
from fedara_flwr.ranks import rank_order
from fedara_flwr.spec import Arrays
from fedara_flwr.tasks.base import Encoded, Task
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


def evaluate(adapted: AdaptedModel, task: Task, tokenizer: Any, data: ClientData, batch_tokens: int) -> dict[str, float]:
    """Metrics of the loaded model on the client's own held-out rows, as `eval-...`; none where there are no rows.

    Args:
        batch_tokens: as in the plan.
    """
    if not len(data.held_out):
        return {}
    scores = predict(adapted, task, tokenizer, data.held_out, batch_tokens)
    return {f"eval-{name}": value for name, value in scores.items()} | {"eval-examples": len(data.held_out)}


def train(
    adapted: AdaptedModel,
    task: Task,
    tokenizer: Any,
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
        of a simulated one `flops-forward` and `flops-backward` (client/step.count_flops); `eval-accuracy`, `eval-macro-f1`,
        `eval-loss`, `eval-examples` of the received model where the plan asks for it.

    Raises:
        FloatingPointError: the loss is no longer finite.
        ValueError: an unknown term, or no example to train on.
    """
    began = time.perf_counter()
    if not len(data.train):
        raise ValueError("no example to train on")
    stream = seeds.derive(plan.seed, "train", plan.server_round, client_key)
    torch.manual_seed(stream)
    guard = guard or Guard()
    power = None if simulated else PowerMeter()
    received = load(adapted, plan, arrays)
    metrics: dict[str, float] = {}
    if plan.evaluate:
        metrics |= evaluate(adapted, task, tokenizer, data, plan.batch_tokens)
    terms: list[Term] = [find(name)(adapted, **parameters) for name, parameters in sorted(plan.terms.items())]
    optimizer, scheduler = _make_optimizer(adapted, plan)
    scorer = SlotScorer(adapted, plan.importance) if "votes" in plan.report else None
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    adapted.model.train(plan.dropout)
    started = time.perf_counter()
    losses, spent = [], Spent()
    gradient_masks = adapted.gradient_masks()
    lengths = [len(row) for row in data.train.ids]
    steps = list(batches(lengths, plan, np.random.default_rng(stream)))
    for step, rows in enumerate(steps):
        cut = parts(rows.tolist(), lengths, plan.batch_tokens)
        batch = [adapted.batch(task, tokenizer, data.train, part) for part in cut]
        optimizer.zero_grad(set_to_none=True)
        losses.append(backward(adapted, task, batch, terms, spent))
        for parameter, allowed in gradient_masks:
            if parameter.grad is not None:
                parameter.grad.mul_(allowed)
        # with E = 0 the first step gives A and B no gradient, so it is scored only where it is the only one
        scored = scorer is not None and (step > 0 or len(steps) == 1)
        gradients = scorer.gradients(copy=plan.clip_norm > 0) if scorer is not None and scored else []
        if scorer is not None and scored and plan.importance_time == "before":
            scorer.observe(gradients)
        for term in terms:
            term.after_backward()
        if plan.clip_norm:
            torch.nn.utils.clip_grad_norm_(trainable, plan.clip_norm)
        optimizer.step()
        scheduler.step()
        if scorer is not None and scored and plan.importance_time == "after":
            scorer.observe(gradients)
        for term in terms:
            term.after_step()
    for term in terms:
        term.finish()
    values = torch.stack(losses)
    if not bool(torch.isfinite(values).all()):
        raise FloatingPointError(f"the loss is not finite after {len(losses)} steps: lower the learning rates")
    metrics |= {
        "loss": float(values.mean()),
        "loss-last": float(values[-1]),
        "steps": len(losses),
        "tokens": spent.tokens,
        "blocks": backward_blocks(adapted, "backbone" in plan.trainable),
        "seconds-train": time.perf_counter() - started,
        "bytes-free": free_memory(adapted.device),
    }
    metrics |= {f"seconds-{name}": value for name, value in spent.seconds.items()}
    if simulated:
        metrics |= {f"flops-{name}": value for name, value in count_flops(adapted, plan.trainable, spent).items()}
    update = _collect(adapted, plan, scorer, terms, len(data.train), guard, received)
    metrics["peak-memory-mb"] = peak_memory()
    metrics |= power.read() if power is not None else {}
    metrics["seconds-all"] = time.perf_counter() - began
    return replace(update, metrics=guard.let_out(metrics))


def load(adapted: AdaptedModel, plan: TrainPlan, arrays: Arrays) -> Arrays:
    """Shrink the model to the plan's mask and take over what came and what both sides draw; both are returned."""
    spec = adapted.spec
    positions = sparse_positions(spec, plan.entries, plan.draw_seed) if plan.entries else None
    drawn = draw(spec, plan.mask, plan.drawn, plan.draw_seed, plan.entries)
    adapted.load(arrays | drawn, plan.mask, plan.scales, plan.trainable, positions)
    return arrays | drawn


def _make_optimizer(adapted: AdaptedModel, plan: TrainPlan) -> tuple[torch.optim.AdamW, Any]:
    """AdamW without weight decay, new each round; linear warm-up over the first `warmup_steps` steps."""
    rates = {
        "B": plan.learning_rate,
        "E": plan.learning_rate * plan.e_lr_factor,
        "A": plan.learning_rate,
        "head": plan.head_learning_rate,
        "backbone": plan.learning_rate,
    }
    groups = [
        {"params": parameters, "lr": rate}
        for part, rate in rates.items()
        if part in plan.trainable and (parameters := adapted.parameters(part))
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
