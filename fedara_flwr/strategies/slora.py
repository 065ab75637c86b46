"""`slora` (SLoRA, arXiv 2308.06522): a sparse full fine-tuning phase, then LoRA started from the SVD of its update.

Stated by the paper: first, clients train the weights themselves under one shared random mask; then the update's SVD starts
LoRA, and training goes on as in FedIT. This project's reading: the mask has as many numbers as LoRA would train in the
adapted modules, drawn from the seed (it never travels); the backbone goes back to its pre-trained values, with the rank-r
part of the update in A and B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pydantic import BaseModel, Field

from fedara_flwr.config import Settings
from fedara_flwr.keys import ConfigError, Group
from fedara_flwr.merging.factors import split_svd
from fedara_flwr.merging.merger import Merger
from fedara_flwr.model.deltas import Weights, dense_size, pack_factors
from fedara_flwr.model.draws import sparse_positions
from fedara_flwr.model.ranks import Ints, RankMask
from fedara_flwr.model.spec import Arrays
from fedara_flwr.strategies.base import Client, Reply, State
from fedara_flwr.strategies.fedlora import FedLoRA
from fedara_flwr.strategies.registry import register
from fedara_flwr.wire.plan import TrainPlan


class SLoRAOptions(Group):
    """Keys of `strategy.options` for slora."""

    sparse_rounds: float = Field(0.2, gt=0, lt=1, description="share of the rounds that the sparse phase takes")
    sparse_learning_rate: float = Field(1e-3, gt=0, description="AdamW learning rate of the weights in the sparse phase")


@register
class SLoRA(FedLoRA):
    """Trains drawn entries of the backbone first, then goes on as FedLoRA."""

    name = "slora"
    title = "sparse full fine-tuning first, then LoRA started from the SVD of its update"
    paper = "arXiv 2308.06522"
    changes_backbone = True
    Options = SLoRAOptions
    options: SLoRAOptions

    @classmethod
    def check(cls, settings: Settings) -> BaseModel:
        """The checked options; beside what every method checks, there must be a round for each phase."""
        if settings.num_server_rounds < 2:
            rounds = settings.num_server_rounds
            raise ConfigError(f"num-server-rounds = {rounds}: slora needs at least 2, one in each of its phases")
        return super().check(settings)

    @property
    def sparse_rounds(self) -> int:
        """Rounds of the sparse phase, at least one and not all."""
        options, rounds = self.options, self.settings.num_server_rounds
        return min(max(1, round(options.sparse_rounds * rounds)), rounds - 1)

    def start_arrays(self, mask: RankMask) -> Arrays:
        """The head, and differences from the pre-trained weights at the drawn positions, all 0; no adapter yet."""
        entries = self._entries(mask)
        if entries > dense_size(self.spec):
            rank = self.settings.adapter.rank
            most = rank * dense_size(self.spec) // entries
            raise ConfigError(f"adapter.rank = {rank}: LoRA has more numbers than the weights, allowed is up to {most}")
        return self.start_head() | {"backbone": np.zeros(entries, dtype=np.float32)}

    def _entries(self, mask: RankMask) -> int:
        """How many numbers the sparse phase trains: as many as LoRA would in the adapted modules."""
        full = RankMask.full(mask.ranks)
        return self.spec.length("B", full) + self.spec.length("A", full)

    def _positions(self, state: State) -> Ints:
        return sparse_positions(self.spec, self._entries(state.mask), self.settings.seed)

    @staticmethod
    def _sparse(state: State) -> bool:
        """Whether the run is still in its sparse phase."""
        return "backbone" in state.arrays

    def client_mask(self, state: State, client: Client) -> RankMask:
        """All alive slots; none in the sparse phase."""
        return _no_slots(state.mask) if self._sparse(state) else state.mask

    def plan(self, state: State, client: Client) -> TrainPlan:
        """Orders to train, in the sparse phase, the drawn entries and the head in place of adapters."""
        plan = super().plan(state, client)
        if not self._sparse(state):
            return plan
        return replace(
            plan,
            sent=(plan.sent & {"head"}) | {"backbone"},
            train=plan.train.model_copy(update={"learning_rate": self.options.sparse_learning_rate}),
            entries=self._entries(state.mask),
            draw_seed=self.settings.seed,
            drawn=frozenset() if state.server_round else frozenset({"backbone"}),
        )

    def next(self, state: State, merged: Arrays, replies: Sequence[Reply], merger: Merger) -> None:
        """After the sparse phase: the update's leading part becomes the adapters, the backbone is as it was."""
        state.arrays = merged
        if not self._sparse(state) or state.server_round < self.sparse_rounds:
            return
        values, positions = state.arrays.pop("backbone").astype(np.float64), self._positions(state)
        pairs, start = [], 0
        for module, rank, scale in zip(self.spec.modules, state.mask.ranks, self.scales(state.mask), strict=True):
            size = module.d_out * module.d_in
            first, last = np.searchsorted(positions, (start, start + size))
            matrix = np.zeros(size)
            matrix[positions[first:last] - start] = values[first:last]
            pairs.append(split_svd(matrix.reshape(module.d_out, module.d_in), rank, scale))
            start += size
        state.arrays |= pack_factors(pairs)

    def weights(self, state: State) -> Weights:
        """The global model; in the sparse phase the backbone's entries take the place of adapters."""
        if not self._sparse(state):
            return super().weights(state)
        return Weights(state.arrays, _no_slots(state.mask), self.scales(state.mask), positions=self._positions(state))


def _no_slots(mask: RankMask) -> RankMask:
    return RankMask(mask.ranks, np.zeros_like(mask.bits))
