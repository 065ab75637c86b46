"""`fedex-lora` (FedEx-LoRA, arXiv 2410.09432): FedLoRA made exact by a residual that joins the backbone.

Stated by the paper: A and B are averaged as in FedIT; ΔW_res = mean(B_k·A_k) - mean(B)·mean(A) is added to the frozen weights.
This project's reading: the residual travels as factors [w_1·B_1, …, -B̄], [A_1; …; Ā], or dense where that is fewer bytes;
each node is sent what it missed and keeps it. With a rank per client, factors are averaged over the clients that hold a slot;
the residual makes that exact as well.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedara_flwr.merging.merger import Merger
from fedara_flwr.merging.stack import FactorStack
from fedara_flwr.model.deltas import from_factors
from fedara_flwr.model.spec import Arrays
from fedara_flwr.strategies.base import Reply, State
from fedara_flwr.strategies.client_ranks import ClientRanks
from fedara_flwr.strategies.registry import register


@register
class FedExLoRA(ClientRanks):
    """FedLoRA, and after each round the residual that makes its average exact."""

    name = "fedex-lora"
    title = "LoRA, FedAvg of A and B, and the exact residual of that average in the backbone"
    paper = "arXiv 2410.09432"
    changes_backbone = True
    own_merger = True

    def merger(self, state: State) -> FactorStack:
        """A merger that averages factors, and keeps all of them for the residual."""
        return FactorStack(self.spec, state.mask, state.arrays, self.scales(state.mask))

    def next(self, state: State, merged: Arrays, replies: Sequence[Reply], merger: Merger) -> None:
        """The means are the next arrays; the residual joins the delta."""
        assert isinstance(merger, FactorStack)
        state.arrays = merged
        state.delta.add(from_factors(merger.residual(merged)))
