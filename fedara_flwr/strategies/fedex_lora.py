"""`fedex-lora` (FedEx-LoRA, arXiv 2410.09432): FedLoRA made exact by a residual that joins the backbone.

Stated by the paper: A and B are averaged as in FedIT; ΔW_res = mean(B_k·A_k) - mean(B)·mean(A) is added to the frozen weights.
This project's reading: the residual travels as factors [w_1·B_1, …, -B̄], [A_1; …; Ā], or dense where that is fewer bytes;
each node is sent what it missed and keeps it. With a rank per client, factors are averaged over the clients that hold a slot;
the residual makes that exact as well.
"""

from __future__ import annotations

from fedara_flwr.merging.stack import FactorStack
from fedara_flwr.model.deltas import from_factors
from fedara_flwr.strategies import register
from fedara_flwr.strategies.client_ranks import ClientRanks


@register
class FedExLoRA(ClientRanks):
    """FedLoRA and the exact residual."""

    name = "fedex-lora"
    title = "LoRA, FedAvg of A and B, and the exact residual of that average in the backbone"
    paper = "arXiv 2410.09432"
    changes_backbone = True

    def merger(self) -> FactorStack:
        """Means, and all factors for the residual."""
        self._stack = FactorStack(self.spec, self.state.mask, self.state.arrays, self.scales())
        return self._stack

    def finish_round(self, server_round: int) -> None:
        """The residual joins the delta."""
        self.state.delta.add(from_factors(self._stack.residual(self.state.arrays)))
