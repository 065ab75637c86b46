"""`flora` (FLoRA, arXiv 2409.05976): stacking instead of averaging, merged into the backbone each round.

Stated by the paper: the clients' factors side by side are the exact weighted sum of their products; it is sent to all and
merged into the backbone, and each round starts from fresh adapters; ranks may differ by client.
This project's reading: the weight stands on B alone; all clients draw the round's fresh A from one seed and start from B = 0,
so adapters never travel down. What does is the stack, as a delta of the backbone: every node is sent all that it missed, as
factors or, where fewer bytes, as one dense piece, and keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedara_flwr import seeds
from fedara_flwr.merging.merger import Merger
from fedara_flwr.merging.stack import FactorStack
from fedara_flwr.model.deltas import from_factors
from fedara_flwr.model.draws import lora_a
from fedara_flwr.model.spec import Arrays
from fedara_flwr.strategies.base import Client, Reply, State
from fedara_flwr.strategies.client_ranks import ClientRanks
from fedara_flwr.strategies.registry import register
from fedara_flwr.wire.plan import TrainPlan


@register
class FLoRA(ClientRanks):
    """Fresh adapters each round; their stack joins the delta."""

    name = "flora"
    title = "stacked LoRA: the exact sum of the clients' adapters, merged into the backbone each round"
    paper = "arXiv 2409.05976"
    remade = frozenset({"A", "B"})
    changes_backbone = True
    own_merger = True

    def plan(self, state: State, client: Client) -> TrainPlan:
        """A and B do not travel down: clients draw the round's A, and B is 0."""
        plan = super().plan(state, client)
        return replace(plan, drawn=frozenset({"A", "B"}), draw_seed=self._draw_seed(plan.server_round))

    def _draw_seed(self, server_round: int) -> int:
        return seeds.derive(self.settings.seed, "flora", server_round)

    def merger(self, state: State) -> FactorStack:
        """A merger that keeps the factors of all clients side by side."""
        return FactorStack(self.spec, state.mask, state.arrays, self.scales(state.mask))

    def next(self, state: State, merged: Arrays, replies: Sequence[Reply], merger: Merger) -> None:
        """The stack joins the delta; the adapters start afresh."""
        assert isinstance(merger, FactorStack)
        state.delta.add(from_factors(merger.stacked()))
        # with B = 0 any A would do; this one clients can draw
        fresh = lora_a(self.spec, state.mask, self._draw_seed(state.server_round))
        state.arrays = merged | {"A": fresh, "B": np.zeros_like(merged["B"])}
