"""`federa` (FeDeRA, arXiv 2404.18848): LoRA whose start is the leading part of the pre-trained weights' own SVD.

Stated by the paper: W0 = U·S·Vᵀ; with s = alpha/r, B0 = U_r·√S_r/√s and A0 = √S_r·V_rᵀ/√s; the frozen weight becomes
W0 - s·B0·A0, so the output does not change at the start; then FedAvg of A and B.
This project's reading: the server takes the SVD once (signs and last bits of an SVD differ between machines) and sends
-s·B0 and A0 to each node once, as a delta of the backbone that the node keeps; counted like everything else.
"""

from __future__ import annotations

import numpy as np

from fedara_flwr.merging.factors import module_factors, split_svd
from fedara_flwr.model.deltas import Piece, Weights, dense, factors, from_factors, pack_factors
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import Arrays
from fedara_flwr.strategies.base import State
from fedara_flwr.strategies.fedlora import FedLoRA
from fedara_flwr.strategies.registry import register


@register
class FeDeRA(FedLoRA):
    """FedLoRA with another start, and a delta that takes the start out of the backbone."""

    name = "federa"
    title = "LoRA started from the SVD of the pre-trained weights, FedAvg of A and B"
    paper = "arXiv 2404.18848"
    learning_rate = 5e-4

    def start_arrays(self, mask: RankMask) -> Arrays:
        """The head, and B0 and A0 of every module, split from its pre-trained weight."""
        scale = self.settings.adapter.alpha / self.settings.adapter.rank
        pairs = []
        for module, rank in zip(self.spec.modules, mask.ranks, strict=True):
            left, right = split_svd(self.model.weight(module.name), rank, scale)
            missing = rank - right.shape[0]  # a rank above the matrix's own
            pairs.append((np.pad(left, ((0, 0), (0, missing))), np.pad(right, ((0, missing), (0, 0)))))
        return self.start_head() | pack_factors(pairs)

    def start_delta(self, state: State) -> Piece:
        """The piece -s·B0·A0, which takes the adapters' start out of the backbone."""
        start, scales = module_factors(self.spec, state.mask, state.arrays), self.scales(state.mask)
        return from_factors([(-scale * left, right) for scale, (left, right) in zip(scales, start, strict=True)])

    def exported(self, state: State) -> Weights:
        """ΔW = s·(B·A - B0·A0) as a LoRA of rank 2r on the unchanged backbone."""
        piece, ranks, scales = state.delta.composed(), state.mask.ranks, self.scales(state.mask)
        assert piece is not None, "the delta is there from the start"
        if piece.ranks:
            start = factors(piece, self.spec)
        else:  # a rank so high that the log keeps the product
            start = [split_svd(matrix, rank, 1.0) for matrix, rank in zip(dense([piece], self.spec), ranks, strict=True)]
        now = module_factors(self.spec, state.mask, state.arrays)
        pairs = [
            (np.concatenate([left, left0 / scale], axis=1), np.concatenate([right, right0]))
            for scale, (left, right), (left0, right0) in zip(scales, now, start, strict=True)
        ]
        mask = RankMask.full([len(right) for _, right in pairs])
        return Weights(state.arrays | pack_factors(pairs), mask, scales)
