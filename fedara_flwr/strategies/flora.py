"""`flora` (FLoRA, arXiv 2409.05976): stacking instead of averaging, merged into the backbone each round.

Stated by the paper: the clients' factors side by side are the exact weighted sum of their products; it is sent to all and
merged into the backbone, and each round starts from fresh adapters; ranks may differ by client.
This project's reading: the weight stands on B alone; all clients draw the round's fresh A from one seed and start from B = 0,
so adapters never travel down. What does is the stack, as a delta of the backbone: every node is sent all that it missed, as
factors or, where fewer bytes, as one dense piece, and keeps it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedara_flwr import seeds
from fedara_flwr.merging.stack import FactorStack
from fedara_flwr.model.deltas import from_factors
from fedara_flwr.model.draws import lora_a
from fedara_flwr.strategies import register
from fedara_flwr.strategies.client_ranks import ClientRanks
from fedara_flwr.wire.plan import TrainPlan


@register
class FLoRA(ClientRanks):
    """Fresh adapters each round; their stack joins the delta."""

    name = "flora"
    title = "stacked LoRA: the exact sum of the clients' adapters, merged into the backbone each round"
    paper = "arXiv 2409.05976"
    remade = frozenset({"A", "B"})
    changes_backbone = True

    def plan(self, server_round: int, client_key: str) -> TrainPlan:
        """A and B are drawn, not sent."""
        seed = seeds.derive(self.settings.seed, "flora", server_round)
        return replace(super().plan(server_round, client_key), drawn=frozenset({"A", "B"}), draw_seed=seed)

    def merger(self) -> FactorStack:
        """Keep all factors."""
        self._stack = FactorStack(self.spec, self.state.mask, self.state.arrays, self.scales())
        return self._stack

    def finish_round(self, server_round: int) -> None:
        """The stack joins the delta; the adapters start afresh."""
        self.state.delta.add(from_factors(self._stack.stacked()))
        seed = seeds.derive(self.settings.seed, "flora", server_round)
        self.state.arrays["A"] = lora_a(self.spec, self.state.mask, seed)  # with B = 0 any would do; this one clients can draw
        self.state.arrays["B"] = np.zeros_like(self.state.arrays["B"])
