"""`slora` (SLoRA, arXiv 2308.06522): a sparse full fine-tuning phase, then LoRA started from the SVD of its update.

Stated by the paper: first, clients train the weights themselves under one shared random mask; then the update's SVD starts
LoRA, and training goes on as in FedIT. This project's reading: the mask has as many numbers as LoRA would train in the
adapted modules, drawn from the seed (it never travels); the backbone goes back to its pre-trained values, with the rank-r
part of the update in A and B.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from pydantic import Field

from fedara_flwr.config import ConfigError, Group
from fedara_flwr.merging.factors import split_svd
from fedara_flwr.model.deltas import Weights, dense_size, pack_factors
from fedara_flwr.model.draws import sparse_positions
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import Arrays
from fedara_flwr.strategies import register
from fedara_flwr.strategies.fedlora import FedLoRA
from fedara_flwr.wire.plan import TrainPlan


class SLoRAOptions(Group):
    """Keys of slora."""

    sparse_rounds: float = Field(0.2, gt=0, lt=1, description="share of the rounds that the sparse phase takes")
    sparse_learning_rate: float = Field(1e-3, gt=0, description="AdamW learning rate of the weights in the sparse phase")


@register
class SLoRA(FedLoRA):
    """The backbone's drawn entries first, then FedLoRA."""

    name = "slora"
    title = "sparse full fine-tuning first, then LoRA started from the SVD of its update"
    paper = "arXiv 2308.06522"
    changes_backbone = True
    Options = SLoRAOptions
    options: SLoRAOptions

    @property
    def sparse_rounds(self) -> int:
        """Rounds of the sparse phase, at least one and not all."""
        options, rounds = self.options, self.settings.num_server_rounds
        return min(max(1, round(options.sparse_rounds * rounds)), rounds - 1)

    def start_arrays(self, mask: RankMask) -> Arrays:
        """No difference from the pre-trained weights at the drawn positions; no adapter yet."""
        if self.settings.num_server_rounds < 2:
            raise ConfigError("num-server-rounds = 1: slora needs at least 2, one in each of its phases")
        self._entries = self.spec.length("B", mask) + self.spec.length("A", mask)
        if self._entries > dense_size(self.spec):
            rank = self.settings.adapter.rank
            most = rank * dense_size(self.spec) // self._entries
            raise ConfigError(f"adapter.rank = {rank}: LoRA has more numbers than the weights, allowed is up to {most}")
        self._positions = sparse_positions(self.spec, self._entries, self.settings.seed)
        return {"head": self.start_head(), "backbone": np.zeros(self._entries, dtype=np.float32)}

    @property
    def _sparse(self) -> bool:
        return "backbone" in self.state.arrays

    def client_mask(self, client_key: str) -> RankMask:
        """No slot in the sparse phase."""
        return self._no_slots() if self._sparse else self.state.mask

    def _no_slots(self) -> RankMask:
        return RankMask(self.state.mask.ranks, np.zeros_like(self.state.mask.bits))

    def plan(self, server_round: int, client_key: str) -> TrainPlan:
        """In the sparse phase, the drawn entries and the head."""
        plan = super().plan(server_round, client_key)
        if not self._sparse:
            return plan
        return replace(
            plan,
            trainable=frozenset({"backbone", "head"}),
            learning_rate=self.options.sparse_learning_rate,
            entries=self._entries,
            draw_seed=self.settings.seed,
            drawn=frozenset() if self.state.server_round else frozenset({"backbone"}),
        )

    def finish_round(self, server_round: int) -> None:
        """After the sparse phase: the update's leading part becomes the adapters, the backbone is as it was."""
        if not self._sparse or server_round < self.sparse_rounds:
            return
        values = self.state.arrays.pop("backbone").astype(np.float64)
        pairs, start = [], 0
        for module, rank, scale in zip(self.spec.modules, self.state.mask.ranks, self.scales(), strict=True):
            size = module.d_out * module.d_in
            first, last = np.searchsorted(self._positions, (start, start + size))
            matrix = np.zeros(size)
            matrix[self._positions[first:last] - start] = values[first:last]
            pairs.append(split_svd(matrix.reshape(module.d_out, module.d_in), rank, scale))
            start += size
        self.state.arrays |= pack_factors(pairs)

    def weights(self) -> Weights:
        """In the sparse phase, the backbone's entries in place of adapters."""
        if not self._sparse:
            return super().weights()
        return Weights(self.state.arrays, self._no_slots(), self.scales(), positions=self._positions)
