"""How clients train: the keys of `train`, and which of them travel to a client in every round."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
from pydantic import Field

from fedara_flwr.keys import Group

SOLVED_HEAD, DRAWN_HEAD = 1e-3, 1e-2  # default learning rates of the head (benchmarks/study/before)
BETAS = (0.9, 0.999)  # AdamW's
SETTLED = 10_000  # steps after which AdamW's largest one grows no more
LEAST_SHARE = 0.1  # of a method's own rate, however few of the labels clients have


@lru_cache
def farthest(steps: int, warmup: int = 0) -> float:
    """The farthest that AdamW without weight decay moves a number in so many steps from new, over the learning rate.

    Step t moves it by m/(√v + ε), with m = Σ a_i·g_i and v = Σ b_i·g_i² of the gradients g so far. By Cauchy and Schwarz that
    is at most √(Σ a_i²/b_i), and so much where the gradients are in proportion to a_i/b_i: 1 in the first step, 1.04 in the
    tenth, 2.2 in the hundredth, never above 7.3. Adam's paper (arXiv 1412.6980, section 2.1) has it without the correction.

    Args:
        warmup: steps of linear warm-up.
    """
    first, second = BETAS
    ratio = first**2 / second
    t = np.arange(1, min(steps, SETTLED) + 1, dtype=np.float64)
    squares = (1 - second**t) / (1 - second) * (1 - ratio**t) / (1 - ratio)
    moves = (1 - first) / (1 - first**t) * np.sqrt(squares) * np.minimum(1.0, t / (warmup + 1))
    settled = (1 - first) / math.sqrt((1 - second) * (1 - ratio))
    return float(moves.sum()) + settled * max(0, steps - SETTLED)


class LocalTraining(Group):
    """How a client trains in one round: these keys travel in the plan of every round, as they are named here."""

    steps: int = Field(6, ge=0, description="optimiser steps per client and round; 0 = count by epochs")
    epochs: int = Field(1, ge=1, description="passes over a client's examples per round, where steps = 0")
    batch_size: int = Field(16, ge=1, description="examples per step")
    batch_tokens: int = Field(
        0,
        ge=0,
        description="most tokens, with padding, in the model at once: a larger batch goes in parts, as one step; 0 = no bound",
    )
    learning_rate: float = Field(
        0.0,
        ge=0,
        description="AdamW learning rate of the adapters' A and B; 0 = the method's own (benchmarks/study); after a solved "
        "head times the diversity of the clients' labels, the entropy of a client's own over that of all, on average",
    )
    e_lr_factor: float = Field(1.0, gt=0, description="learning rate of E over that of A and B")
    head_learning_rate: float = Field(1e-2, ge=0, description="AdamW learning rate of the head")
    loss: Literal["plain", "logit-adjusted"] = Field(
        "logit-adjusted",
        description="logit-adjusted: where the task has classes, a client adds to the logits, as it trains, the log of its own "
        "classes' shares over all clients', and so does not learn which classes it has (arXiv 2007.07314)",
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear learning-rate warm-up within each round")
    clip_norm: float = Field(0.0, ge=0, description="gradients are clipped to this norm; 0 = not clipped")
    dropout: bool = Field(
        False, description="whether the backbone's own dropout is on while training; with train.cache only above what is kept"
    )

    def optimiser_steps(self, examples: int) -> int:
        """Optimiser steps of a client with so many examples, at least one."""
        return self.steps or self.epochs * -(-examples // min(self.batch_size, examples))

    def reach(self, examples: int) -> float:
        """How far these steps can move a number, over its learning rate, whatever the gradients are (see `farthest`)."""
        return farthest(self.optimiser_steps(examples), self.warmup_steps)

    def rows(self, examples: int) -> int:
        """Examples that go through the model in one round of a client with so many, repeated ones counted again."""
        return self.steps * min(self.batch_size, examples) if self.steps else self.epochs * examples


class TrainSettings(LocalTraining):
    """Training: what travels in the plan (LocalTraining), and what a process reads once from the run configuration."""

    batch_size: int = Field(0, ge=0, description="examples per step; 0 = the task's own number")
    batch_tokens: int = Field(
        -1,
        ge=-1,
        description="most tokens, with padding, in the model at once: a larger batch goes in parts, as one step; 0 = no bound, "
        "-1 = the task's own",
    )
    head_learning_rate: float = Field(
        -1.0,
        ge=-1,
        description="AdamW learning rate of the head; 0 = fixed: neither trained nor sent back; -1 = 1e-3 for a head that was "
        "solved (head.start) or is the checkpoint's, 1e-2 for one that was drawn",
    )
    final_rate: float = Field(1.0, gt=0, le=1, description="learning rates in the last round over those in the first")
    schedule: Literal["linear", "cosine"] = Field(
        "linear", description="how the rates fall from round to round to train.final-rate of what they were"
    )
    checkpointing: bool = Field(
        False,
        description="what a block computes is not kept for the backward pass, but computed again: less memory, more time",
    )
    cache: Literal["off", "exact", "half"] = Field(
        "exact",
        description="the output of the blocks below the lowest living adapter: run at every step, or once for each example and "
        "kept, as it is or as float16; clients and the server's evaluation alike",
    )
    cache_mb: int = Field(256, ge=1, description="megabytes that a process keeps so in memory; least recently used rows go")
    cache_disk_mb: int = Field(
        0, ge=0, description="from there to a scratch file of at most so many megabytes (docs/deploy-device.md); 0 = none"
    )
    prox_mu: float = Field(0.0, ge=0, description="FedProx: mu/2 times the squared distance from the received values")
    orthogonality: float = Field(0.0, ge=0, description="AdaLoRA's penalty on A·Aᵀ - I and Bᵀ·B - I; 0.1 there")
    threads: int = Field(1, ge=1, description="torch threads of a client; results depend on it in the last bits")

    def share(self, done: float) -> float:
        """Learning rates over those of the first round, when a share `done` of the run is over."""
        fallen = done if self.schedule == "linear" else (1 - math.cos(math.pi * done)) / 2
        return 1 - (1 - self.final_rate) * fallen

    def local(
        self, learning_rate: float, diversity: float | None = None, done: float = 0.0, kept: bool = False
    ) -> LocalTraining:
        """What travels in a plan.

        Args:
            learning_rate: the method's own, used where the configuration leaves it open.
            diversity: of the clients' labels (`Merged.diversity`), from 0 to 1, where the head was solved: who has few of the
                labels pulls the whole model towards them, the more the larger the steps. None = the head was drawn.
            done: share of the run that is over: 0 in the first round, 1 in the last.
            kept: whether the head is the checkpoint's, which has learnt already.
        """
        share = self.share(done)
        values = {name: getattr(self, name) for name in LocalTraining.model_fields}
        drawn = diversity is None and not kept
        head = self.head_learning_rate if self.head_learning_rate >= 0 else DRAWN_HEAD if drawn else SOLVED_HEAD
        rate = self.learning_rate or learning_rate * (1.0 if diversity is None else max(diversity, LEAST_SHARE))
        rates = {"learning_rate": share * rate, "head_learning_rate": share * head}
        return LocalTraining.model_construct(**values | rates)
