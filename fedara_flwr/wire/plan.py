"""TrainPlan and Update: what the server asks of a client, and what it gets back (contracts.md §1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedara_flwr.model.draws import draw
from fedara_flwr.model.ranks import Bools, RankMask
from fedara_flwr.model.spec import Arrays, ModelSpec

REPORTS = ("votes", "scores", "kept")
Ranks = NDArray[np.uint16]


@dataclass(frozen=True)
class TrainPlan:
    """One client's orders for one round.

    Attributes:
        server_round: counted from 1.
        seed: the run's seed; the client's streams derive from (seed, round, client key).
        mask: slots that travel and live in the client's model.
        scales: s of y = W0·x + s·B·diag(E)·A·x, one per module.
        trainable: parts that are trained and sent back, out of B, E, A, head and backbone. The others keep what was received.
        carries: parts that travel with the plan.
        drawn: parts that both sides draw from `draw_seed` instead (fedara_flwr.model.draws). An E that is in neither is 1.
        entries: numbers of the backbone that are trained, at positions drawn from `draw_seed`; 0 = all.
        steps: optimiser steps; 0 = `epochs` passes over the client's examples.
        batch_tokens: most tokens, padding counted, that pass through the model at once; 0 = whole batches.
        learning_rate: AdamW, of A and B; E has `e_lr_factor` times that, the head `head_learning_rate`.
        clip_norm: 0 = gradients are not clipped.
        terms: client-side terms by name, each with its parameters.
        report: what to add to the update: "votes" (needs `budget`), "scores" (their ranks, too), "kept" (slots that the
            terms leave; the others are not sent back).
        budget: slots the client may vote for.
        evaluate: whether to evaluate the received model on the client's own held-out share.
        delta: digests of the pieces whose sum the client must add to its backbone (fedara_flwr.model.deltas).
        down: format of the arrays that travel with the plan (wire/codec).
        up: format of those that are sent back.
        feedback: parts to which the node adds what rounding took before, keeping what it takes now (wire/upload).
        run: a name for the run, under which it keeps that; '' without `feedback`.
    """

    server_round: int
    seed: int
    mask: RankMask
    scales: tuple[float, ...]
    trainable: frozenset[str]
    steps: int
    epochs: int
    batch_size: int
    learning_rate: float
    e_lr_factor: float
    head_learning_rate: float
    carries: frozenset[str] = frozenset()
    drawn: frozenset[str] = frozenset()
    draw_seed: int = 0
    entries: int = 0
    batch_tokens: int = 0
    warmup_steps: int = 0
    clip_norm: float = 0.0
    dropout: bool = False
    terms: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    report: frozenset[str] = frozenset()
    budget: int = 0
    importance: str = "gradient-product"
    importance_time: str = "before"
    upload_mask: str = "global"
    evaluate: bool = False
    delta: tuple[str, ...] = ()
    down: str = "float32"
    up: str = "float32"
    feedback: frozenset[str] = frozenset()
    run: str = ""

    @property
    def differences(self) -> bool:
        """Whether what is sent back are differences from what training started from, and not values."""
        return (self.down, self.up) != ("float32", "float32")

    def updates(self, examples: int) -> int:
        """Optimiser steps of a client with so many examples, at least one."""
        return self.steps or self.epochs * -(-examples // min(self.batch_size, examples))

    def work(self, spec: ModelSpec, examples: int) -> int:
        """What a client with so many examples has to do, to compare clients of a round: rows times blocks gone through.

        One for the forward pass through a block, two for the backward pass, which ends at the lowest living module.
        """
        rows = self.steps * min(self.batch_size, examples) if self.steps else self.epochs * examples
        lowest = 0 if "backbone" in self.trainable else spec.lowest(self.mask)
        return rows * (3 * spec.blocks - 2 * lowest)

    def start(self, spec: ModelSpec, arrays: Arrays, mask: RankMask, sub: RankMask) -> Arrays:
        """What training starts from, packed under `sub`: `arrays` (packed under `mask`), and what both sides draw."""
        drawn = draw(spec, sub, self.drawn & self.trainable, self.draw_seed, self.entries)
        return spec.slice(arrays, mask, sub) | drawn


@dataclass(frozen=True)
class Vote:
    """A client's local mask.

    Attributes:
        keep: shape (alive slots,), True for the slots the client would keep; packed under the plan's mask.
        ranks: rank of every alive slot by the client's score, 0 = best; None where only the bits were asked for.
    """

    keep: Bools
    ranks: Ranks | None = None


@dataclass(frozen=True)
class Update:
    """What one client sends back in one round.

    Attributes:
        arrays: the trained parts, packed under `mask`.
        mask: slots that came: the plan's, or those of them that the client voted for (`upload_mask = "local"`) or kept.
        num_examples: examples the client trains on.
        metrics: losses, seconds, bytes of memory; names as in docs.
        vote: the local mask, where the plan asked for it.
    """

    arrays: Arrays
    mask: RankMask
    num_examples: int
    metrics: Mapping[str, int | float]
    vote: Vote | None = None
