"""How far updates move: one that is many times longer than the median does not count, and numbers go no further than steps do.

Each part is looked at by itself, as the root mean square of its differences from what was sent, so that a small part cannot
hide behind a large one and updates with fewer slots compare with whole ones (this project's reading). One number may hold a
whole length: so each is cut to what the client's steps reach at the plan's learning rates.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from fedara_flwr.model.difference import difference
from fedara_flwr.model.parts import declared, is_slot_part, of_backbone
from fedara_flwr.model.spec import Arrays
from fedara_flwr.wire.plan import TrainPlan

LENGTHS_KEPT = 64  # lengths remembered of each part
ENOUGH = 3  # lengths that make a median
WIDEST = 5.0  # times the usual length, which of noise by a whole fleet (update-noise) one number in a million is beyond
ROUNDING, ON_THE_WIRE, RESIDUE = 1e-6, 0.01, 0.24  # of float32 values; of float16 differences; what wire.feedback may add
HALF_PRECISION = 2.0**-7  # what rounding to bfloat16 puts a backbone's weight of up to 2 off

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
            if not self.bound or size <= step.get(part, 0.0):
                continue
            if size > self.bound * (median := self._usual(part, beside)):
                return f"{part} moved {size:.3g} (root mean square), allowed is {self.bound:g} times the median {median:.3g}"
        return ""

    def _usual(self, part: str, beside: Sequence[Sizes]) -> float:
        """The median length of a part; infinite where too few are known."""
        usual = self.history.get(part, [])
        if len(usual) < ENOUGH:
            usual = [other[part] for other in beside if other.get(part, 0.0) > 0]
        return math.inf if len(usual) < ENOUGH else statistics.median(usual)

    def cut(
        self, arrays: Arrays, before: Arrays, reach: Mapping[str, float], beside: Sequence[Sizes] = ()
    ) -> tuple[Arrays, list[str]]:
        """`arrays` with no number further from `before` than `reach` allows its part, and what was cut, in words.

        Where updates are usually longer than that, as behind the noise of a whole fleet, it is `WIDEST` times their length.
        """
        whole, said = dict(arrays), []
        for part, change in difference(arrays, before).items():
            usual, limit = self._usual(part, beside), reach.get(part, math.inf)
            if limit < usual < math.inf:
                limit = WIDEST * usual
            limit += ROUNDING * (1.0 + float(np.abs(before[part]).max(initial=0.0)))
            sizes = np.abs(change)
            if beyond := int((sizes > limit).sum()):
                whole[part] = (before[part] + np.clip(change, -limit, limit)).astype(np.float32)
                said.append(f"{beyond} of {part} moved up to {sizes.max():.3g}, its steps reach {limit:.3g}")
        return whole, said

    def learn(self, counted: Sequence[Mapping[str, float]]) -> None:
        """Remember how far a round's counted updates moved; not those that changed nothing: they must not lower the bound."""
        for sizes in counted:
            for part, size in sizes.items():
                if size > 0:
                    self.history.setdefault(part, []).append(size)
        for part in self.history:
            del self.history[part][:-LENGTHS_KEPT]


def reach(plan: TrainPlan, examples: int, share: float = 1.0) -> dict[str, float]:
    """How far training by `plan` can move a number of each part that is sent, with what its way here adds.

    A part that stays with the node began elsewhere: of it nothing is known.

    Args:
        examples: of the client, which by epochs decide how many steps it does.
        share: this round's learning rates over those of the first: a residue may be of larger differences.
    """
    found, steps = {}, plan.train.reach(examples)
    for name in sorted(plan.sent - plan.kept):
        far = declared()[name].rate(plan.train) * steps * (1 + ON_THE_WIRE + (RESIDUE / share if name in plan.feedback else 0))
        if not is_slot_part(name) and of_backbone([name]):
            far = 2 * far + HALF_PRECISION  # a node may hold it in bfloat16
        found[name] = far
    return found
