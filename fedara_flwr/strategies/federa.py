"""`federa` (FeDeRA, arXiv 2404.18848): LoRA whose start is the leading part of the pre-trained weights' own SVD.

Stated by the paper: W0 = U·S·Vᵀ; with s = alpha/r, B0 = U_r·√S_r/√s and A0 = √S_r·V_rᵀ/√s; the frozen weight becomes
W0 - s·B0·A0, so the output does not change at the start; then FedAvg of A and B.
This project's reading: the server takes the SVD once (signs and last bits of an SVD differ between machines) and sends
-s·B0 and A0 to each node once, as an offset of the backbone that the node keeps; counted like everything else.
"""

from __future__ import annotations

import numpy as np

from fedara_flwr.offsets import Piece, Weights, from_factors
from fedara_flwr.ranks import RankMask
from fedara_flwr.spec import Arrays
from fedara_flwr.strategies import register
from fedara_flwr.strategies.aggregation import module_factors, pack_factors, split_svd
from fedara_flwr.strategies.fedlora import FedLoRA


@register
class FeDeRA(FedLoRA):
    """FedLoRA with another start, and an offset that takes the start out of the backbone."""

    name = "federa"
    title = "LoRA started from the SVD of the pre-trained weights, FedAvg of A and B"
    paper = "arXiv 2404.18848"
    learning_rate = 5e-4

    def start_arrays(self, mask: RankMask) -> Arrays:
        """B0 and A0 of every module."""
        scale = self.settings.adapter.alpha / self.settings.adapter.rank
        pairs = []
        for module, rank in zip(self.spec.modules, mask.ranks, strict=True):
            left, right = split_svd(self.model.weight(module.name), rank, scale)
            missing = rank - right.shape[0]  # a rank above the matrix's own
            pairs.append((np.pad(left, ((0, 0), (0, missing))), np.pad(right, ((0, missing), (0, 0)))))
        self._start = {"head": self.start_head(), **pack_factors(pairs)}
        return dict(self._start)

    def start_offset(self) -> Piece:
        """-s·B0·A0."""
        factors = module_factors(self.spec, self.state.mask, self._start)
        return from_factors([(-scale * left, right) for scale, (left, right) in zip(self.scales(), factors, strict=True)])

    def exported(self) -> Weights:
        """ΔW = s·(B·A - B0·A0) as a LoRA of rank 2r on the unchanged backbone."""
        now, start = (module_factors(self.spec, self.state.mask, arrays) for arrays in (self.state.arrays, self._start))
        pairs = [
            (np.concatenate([left, -left0], axis=1), np.concatenate([right, right0]))
            for (left, right), (left0, right0) in zip(now, start, strict=True)
        ]
        mask = RankMask.full([2 * rank for rank in self.state.mask.ranks])
        return Weights({"head": self.state.arrays["head"], **pack_factors(pairs)}, mask, self.scales())
