"""Vectors that one node keeps from one of its rounds to the next: parts that stay with it, and what rounding took."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fedara_flwr.model.parts import is_slot_part
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import Arrays, ModelSpec


@dataclass
class Kept:
    """What a node kept after a round.

    Attributes:
        arrays: one vector per part, packed under `mask`.
        mask: slots of the plan of that round.
        draw_seed: of that plan; where another one is drawn from, the values may have lost their meaning.
        entries: likewise, numbers of the backbone that were trained.
    """

    arrays: Arrays
    mask: RankMask
    draw_seed: int = 0
    entries: int = 0

    def only(self, names: Iterable[str]) -> Kept:
        """The same with the parts `names` alone."""
        names = set(names)
        return Kept({n: v for n, v in self.arrays.items() if n in names}, self.mask, self.draw_seed, self.entries)

    def over(self, start: Arrays, mask: RankMask, spec: ModelSpec) -> Arrays:
        """`start`, packed under `mask`, with what was kept in its place, slot by slot; slots that are new are as in `start`.

        What was kept for other modules, or has not the length that it must have, counts for nothing.
        """
        arrays = {name: np.array(values) for name, values in start.items()}
        if self.mask.ranks != mask.ranks:
            return arrays
        both = self.mask.intersect(mask)
        for name in arrays.keys() & self.arrays.keys():
            values = self.arrays[name]
            if values.shape != (spec.length(name, self.mask, self.entries),):
                continue
            values = spec.slice({name: values}, self.mask, both)[name]
            if is_slot_part(name) or values.shape == arrays[name].shape:
                arrays[name] = spec.scatter(name, values, mask, both, arrays[name])
        return arrays
