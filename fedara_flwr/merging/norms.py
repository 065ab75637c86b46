"""How long updates usually are: one that is many times longer than the median does not count (this project's reading).

Each part is looked at by itself, as the root mean square of its differences from what was sent, so that a small part cannot
hide behind a large one and updates with fewer slots compare with whole ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from types import MappingProxyType

LENGTHS_KEPT = 64  # lengths remembered of each part
ENOUGH = 3  # lengths that make a median

Sizes = dict[str, float]
"""Root mean square of an update's differences by part (model/difference.py)."""


class Norms:
    """The lengths of the updates that counted, and the bound that follows from them.

    Args:
        bound: times the median that a part's length may be; 0 = any.
        history: lengths by part, oldest first; changed in place, so that it can be part of the server's state.
    """

    def __init__(self, bound: float, history: dict[str, list[float]]) -> None:
        self.bound, self.history = bound, history

    def known(self, sizes: Sizes) -> bool:
        """Whether a median of earlier rounds can judge all parts."""
        return not self.bound or all(len(self.history.get(part, ())) >= ENOUGH for part in sizes)

    def excess(self, sizes: Sizes, beside: Sequence[Sizes] = (), step: Mapping[str, float] = MappingProxyType({})) -> str:
        """What is too long about an update; "" where nothing is.

        Args:
            beside: updates of the same round, this one among them: they stand in for a history that is still too short. Fewer
                than three say nothing, a liar among two cannot be told.
            step: about how far one step of the optimiser moves each part, which is never too far: where most clients know their
                data already and hardly move, one that still learns is no liar.
        """
        for part, size in sizes.items():
            usual = self.history.get(part, [])
            if len(usual) < ENOUGH:
                usual = [other[part] for other in beside if other.get(part, 0.0) > 0]
            if not self.bound or len(usual) < ENOUGH or size <= step.get(part, 0.0):
                continue
            if size > self.bound * (median := statistics.median(usual)):
                return f"{part} moved {size:.3g} (root mean square), allowed is {self.bound:g} times the median {median:.3g}"
        return ""

    def learn(self, counted: Sequence[Mapping[str, float]]) -> None:
        """Remember how far a round's counted updates moved; not those that changed nothing: they must not lower the bound."""
        for sizes in counted:
            for part, size in sizes.items():
                if size > 0:
                    self.history.setdefault(part, []).append(size)
        for part in self.history:
            del self.history[part][:-LENGTHS_KEPT]
