"""Importance of rank slots, measured while a client trains (AdaLoRA, arXiv 2303.10512, eq. 8-12).

This project's reading of FedARA: per entry w and step I(w) = |w·∂L/∂w|; three ways to make slot scores of it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedara_flwr.adapters.attach import AdaptedModel

BETA1 = BETA2 = 0.85  # AdaLoRA's smoothing of importance and uncertainty


class SlotScorer:
    """Accumulates slot scores of one client's local training.

    sensitivity: Ī = β1·Ī + (1-β1)·I, U = β2·U + (1-β2)·|I - Ī| with the updated Ī, entry score Ī·U.
    gradient-product: entry score ΣI over the steps.
    magnitude: |E_i|·‖B_i‖·‖A_i‖ at the end, no gradient needed.
    Slot score of the first two: s(E_i) + mean s(B[:, i]) + mean s(A[i, :]).
    """

    def __init__(self, adapted: AdaptedModel, importance: str) -> None:
        self.adapted, self.importance = adapted, importance
        self._slots = [[values[part] for part in ("B", "E", "A")] for _, values in adapted.alive()]
        zeros = [[torch.zeros_like(p) for p in triplet] for triplet in self._slots]
        self._mean = zeros if importance != "magnitude" else []
        self._spread = [[torch.zeros_like(p) for p in t] for t in self._slots] if importance == "sensitivity" else []

    @torch.no_grad()
    def observe(self, gradients: list[list[torch.Tensor | None]]) -> None:
        """One step: unclipped gradients in the order of `gradients()`; uses the weights as they are now."""
        for m, triplet in enumerate(self._slots):
            for part, parameter in enumerate(triplet):
                gradient = gradients[m][part] if self.importance != "magnitude" else None
                if gradient is None:  # frozen part (LoRA's E), or no gradients wanted
                    continue
                product = (parameter * gradient).abs()
                mean = self._mean[m][part]
                if self.importance == "gradient-product":
                    mean.add_(product)
                    continue
                mean.mul_(BETA1).add_(product, alpha=1 - BETA1)
                self._spread[m][part].mul_(BETA2).add_((product - mean).abs(), alpha=1 - BETA2)

    def gradients(self, copy: bool = False) -> list[list[torch.Tensor | None]]:
        """Present gradients of every alive module's B, E, A; copies where they must outlive the clipping."""

        def take(parameter: nn.Parameter) -> torch.Tensor | None:
            return parameter.grad.clone() if copy and parameter.grad is not None else parameter.grad

        return [[take(p) for p in triplet] for triplet in self._slots]

    @torch.no_grad()
    def scores(self) -> NDArray[np.float64]:
        """One score per alive slot, in (module, slot) order."""
        rows = []
        for m, (b, e, a) in enumerate(self._slots):
            if self.importance == "magnitude":
                rows.append(e.view(-1).abs() * b.norm(dim=0) * a.norm(dim=1))
                continue
            entry = list(self._mean[m])
            if self.importance == "sensitivity":
                entry = [mean * spread for mean, spread in zip(self._mean[m], self._spread[m], strict=True)]
            rows.append(entry[1].view(-1) + entry[0].mean(dim=0) + entry[2].mean(dim=1))
        return torch.cat(rows).double().cpu().numpy() if rows else np.zeros(0)
