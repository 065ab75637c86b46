"""The client's half of FedARA: how it ranks the rank slots that it trains (arXiv 2501.14406; this project's reading).

torch is imported where it is used: a node tells the names of its terms without loading it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedara_flwr.client.terms import Term, register
from fedara_flwr.model.ranks import Bools, pack_order, rank_order
from fedara_flwr.model.spec import Arrays

if TYPE_CHECKING:
    from fedara_flwr.adapters.attach import AdaptedModel

IMPORTANCES = ("gradient-product", "magnitude")


@register("slot-vote")
class SlotVote(Term):
    """Ranks all alive slots by a score, best first; the first `budget` of them are the client's local mask.

    gradient-product: Σ over steps of |w·∂L/∂w| for each entry w, with the weights before the step and unclipped gradients (one
    step's term is AdaLoRA's, arXiv 2303.10512, eq. 8); a slot has E_i's own, plus the means over B[:, i] and A[i, :].
    magnitude: |E_i|·‖B_i‖·‖A_i‖ after the last step.
    """

    def __init__(self, adapted: AdaptedModel, *, budget: float, importance: str = IMPORTANCES[0]) -> None:
        """Start with a score of 0 for every alive slot.

        Args:
            budget: slots that the client would keep.
            importance: one of IMPORTANCES.
        """
        super().__init__(adapted)
        if importance not in IMPORTANCES:
            raise ValueError(f"importance is {importance!r}, allowed are {', '.join(IMPORTANCES)}")
        self.budget, self.importance, self._steps = int(budget), importance, 0
        self._slots = [[values[part] for part in ("B", "E", "A")] for _, values in adapted.alive()]
        self._sums = [[p.detach().new_zeros(p.shape) for p in triplet] for triplet in self._slots]
        self._ranks: NDArray[np.int64] | None = None

    def after_backward(self) -> None:
        """Add this step's products of weight and gradient."""
        if self.importance == "magnitude":
            return
        import torch

        self._steps += 1
        pairs = [pair for slots, sums in zip(self._slots, self._sums, strict=True) for pair in zip(slots, sums, strict=True)]
        trained = [(p.detach(), p.grad, total) for p, total in pairs if p.grad is not None]  # LoRA's E is frozen
        if not trained:
            return
        weights, gradients, totals = map(list, zip(*trained, strict=True))
        if self._steps == 2:  # from E = 0 the first step gives A and B no gradient: it counts only where it is the only one
            torch._foreach_zero_(totals)
        # all modules' products in one call each: on a GPU launches cost more than the products
        products = torch._foreach_mul(weights, gradients)
        torch._foreach_abs_(products)
        torch._foreach_add_(totals, products)

    def finish(self) -> None:
        """Rank all alive slots by their scores."""
        self._ranks = rank_order(self.scores())

    def scores(self) -> NDArray[np.float64]:
        """One score per alive slot, in (module, slot) order."""
        rows = []
        for (b, e, a), sums in zip(self._slots, self._sums, strict=True):
            if self.importance == "magnitude":
                score = e.detach().view(-1).abs() * b.detach().norm(dim=0) * a.detach().norm(dim=1)
            else:
                score = sums[1].view(-1) + sums[0].mean(dim=0) + sums[2].mean(dim=1)
            rows.append(score.double().cpu().numpy())
        return np.concatenate(rows) if rows else np.zeros(0)

    def kept(self) -> Bools | None:
        """The client's local mask: its `budget` best slots."""
        assert self._ranks is not None, "kept before finish"
        return self._ranks < self.budget

    def report(self) -> bytes:
        """The rank of every alive slot, 0 = best: two bytes a slot."""
        assert self._ranks is not None, "report before finish"
        return pack_order(self._ranks)

    def private_report(self, released: Arrays) -> bytes:
        """The slots ranked by their magnitude in the noised arrays, whatever `importance` says."""
        return pack_order(rank_order(self.adapted.spec.slot_sizes(released, self.adapted.mask)))
