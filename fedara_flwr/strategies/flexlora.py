"""`flexlora` (FlexLoRA, arXiv 2402.11505): a rank per client; the server merges products and splits them again by SVD.

Stated by the paper: ΔW = Σ w_k·s·B_k·A_k; the SVD of ΔW, truncated to r_k, is what client k gets next.
This project's reading: √S on both sides; one scale alpha / adapter.rank for all ranks, so that truncation is taking the first
slots; a slot whose singular value is zero starts again from a random A and B = 0, since with both zero it could never learn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedara_flwr.merging.factors import module_factors, split_product
from fedara_flwr.merging.stack import FactorStack
from fedara_flwr.model.deltas import pack_factors
from fedara_flwr.model.draws import lora_a
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import Arrays, ModelSpec
from fedara_flwr.strategies.base import State
from fedara_flwr.strategies.client_ranks import ClientRanks
from fedara_flwr.strategies.registry import register

ZERO = 1e-12  # singular values below this share of the largest one


class SplitStack(FactorStack):
    """Stacks the clients' factors and splits the sum of their products into rank-r factors again."""

    def __init__(self, spec: ModelSpec, mask: RankMask, arrays: Arrays, scales: Sequence[float], seed: int) -> None:
        super().__init__(spec, mask, arrays, scales)
        self.seed = seed

    def result(self) -> Arrays:
        """B and A split by SVD from the sum of products, the other parts averaged."""
        mask, spec = self.mean.mask, self.spec
        fresh = module_factors(
            spec, mask, {"B": np.zeros(spec.length("B", mask), dtype=np.float32), "A": lora_a(spec, mask, self.seed)}
        )
        pairs = []
        for (left, right), rank, scale, (_, random) in zip(self.stacked(), mask.ranks, self.scales, fresh, strict=True):
            b, a = split_product(left, right, rank, scale)
            singular = np.square(a).sum(axis=1)  # a's rows are √S·Vᵀ
            live = singular > ZERO * singular.max(initial=0.0)
            filled, padded = random.copy(), np.zeros((left.shape[0], rank))
            filled[: len(a)][live], padded[:, : len(a)][:, live] = a[live], b[:, live]
            pairs.append((padded, filled))
        return {**super().result(), **pack_factors(pairs)}


@register
class FlexLoRA(ClientRanks):
    """FedLoRA whose merger averages products of factors and splits them again."""

    name = "flexlora"
    title = "LoRA with a rank per client; the server averages products and splits them by SVD"
    paper = "arXiv 2402.11505"
    remade = frozenset({"A", "B"})
    own_merger = True

    def merger(self, state: State) -> SplitStack:
        """A merger of products, not of factors."""
        return SplitStack(self.spec, state.mask, state.arrays, self.scales(state.mask), self.settings.seed)
