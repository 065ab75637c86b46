"""What the model is, as far as ranks, bytes and merging care: names and sizes, no values."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedara_flwr.model.parts import SLOT_PARTS, is_slot_part, part
from fedara_flwr.model.ranks import Bools, Ints, RankMask

Vector = NDArray[np.float32]
ENTRIES_ROW = 256  # drawn numbers of the backbone that share one scale on the wire
Arrays = dict[str, Vector]
"""One packed float32 vector per part (model/parts.py): slot parts under some RankMask, parameter parts in the order of
`ModelSpec.parameters`; of the backbone, where `entries` says so, the numbers at drawn positions alone."""


@dataclass(frozen=True)
class ModuleSpec:
    """One adapted linear layer: its full name, the shape (d_out, d_in) of its weight and the index of its block."""

    name: str
    d_out: int
    d_in: int
    block: int


@dataclass(frozen=True)
class ParameterSpec:
    """Name and shape of one parameter of head or backbone."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ModelSpec:
    """Backbone and head as server and clients must agree on them.

    Attributes:
        fingerprint: sha256 over the backbone's float32 weights, the head left out.
        modules: adapted layers; their order is the module index everywhere.
        head: parameters of the head, in the order in which they are packed.
        backbone: all other parameters, likewise.
        kept: the packed head of the checkpoint, where its labels are the run's; None = the run draws one.
    """

    fingerprint: str
    modules: tuple[ModuleSpec, ...]
    head: tuple[ParameterSpec, ...]
    backbone: tuple[ParameterSpec, ...] = ()
    kept: Vector | None = field(default=None, repr=False, compare=False)
    _parameters: dict[str, tuple[ParameterSpec, ...]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def blocks(self) -> int:
        """How many repeated blocks the backbone has."""
        return 1 + max(m.block for m in self.modules)

    def lowest(self, mask: RankMask) -> int:
        """The lowest block with a living module; the number of blocks where none lives."""
        alive = (module.block for module, count in zip(self.modules, mask.alive, strict=True) if count)
        return min(alive, default=self.blocks)

    def parameters(self, name: str) -> tuple[ParameterSpec, ...]:
        """The parameters of a parameter part, in the order in which they are packed."""
        if name not in self._parameters:
            holds = part(name).holds
            members = self.head if holds is None else tuple(p for p in self.backbone if holds(p.name))
            self._parameters[name] = members
        return self._parameters[name]

    def size(self, name: str) -> int:
        """How many numbers a parameter part has."""
        return sum(p.size for p in self.parameters(name))

    def widths(self, name: str) -> tuple[int, ...]:
        """Numbers per slot of each module in one slot part; ValueError for another part."""
        width = part(name).width
        if width is None:
            raise ValueError(f"{name!r} is not a slot part, allowed are {SLOT_PARTS}")
        return tuple(width(module) for module in self.modules)

    def length(self, name: str, mask: RankMask, entries: int = 0) -> int:
        """Length of the packed vector of a part under `mask`; of the backbone `entries` numbers travel, 0 = all."""
        if is_slot_part(name):
            return mask.length(self.widths(name))
        return entries if name == "backbone" and entries else self.size(name)

    def row_lengths(self, name: str, mask: RankMask, entries: int = 0) -> Ints:
        """Lengths of the rows of the packed vector of a part, what one scale is for on the wire; shape (rows,), none 0.

        A slot's numbers of B or A; all E of a module; of a parameter what makes one output, or a whole vector; of `entries`
        of the backbone 256 at a time.
        """
        if is_slot_part(name):
            widths = np.array(self.widths(name), dtype=np.int64)
            # one number a slot: a scale for each would be as long as the numbers
            return mask.alive[mask.alive > 0] if (widths == 1).all() else widths[mask.modules[mask.bits]]
        if name == "backbone" and entries:
            return np.diff(np.append(np.arange(0, entries, ENTRIES_ROW), entries))
        parameters = self.parameters(name)
        lasts = np.array([p.shape[-1] if p.shape else 1 for p in parameters], dtype=np.int64)
        return np.repeat(lasts, np.array([p.size for p in parameters], dtype=np.int64) // lasts)

    def rows(self, arrays: Arrays, mask: RankMask) -> list[Arrays]:
        """Of each module the slot parts that `arrays` has, as views of shape (alive slots, width); all where none lives."""
        modules: list[Arrays] = [{} for _ in self.modules]
        for name in SLOT_PARTS:
            values = arrays.get(name, None if mask.count else np.empty(0, dtype=np.float32))
            if values is None:
                continue
            start = 0
            for module, count, width in zip(modules, mask.alive.tolist(), self.widths(name), strict=True):
                module[name] = values[start : start + count * width].reshape(count, width)
                start += count * width
        return modules

    def complete(self, arrays: Arrays, mask: RankMask) -> Arrays:
        """`arrays` with the slot parts that may be missing, filled with the number that such a part counts as (E: 1)."""
        defaults = ((name, part(name).absent) for name in SLOT_PARTS if name not in arrays)
        filled = {n: np.full(self.length(n, mask), number, dtype=np.float32) for n, number in defaults if number is not None}
        return arrays | filled

    def places(self, name: str, mask: RankMask, sub: RankMask) -> Bools | slice:
        """Where a part's numbers under `sub` lie in its vector under `mask`: an index for that vector."""
        return mask.elements(self.widths(name), sub) if is_slot_part(name) and sub != mask else slice(None)

    def scatter(self, name: str, values: NDArray[Any], mask: RankMask, sub: RankMask, into: NDArray[Any]) -> NDArray[Any]:
        """A part's vector packed under `sub`, put into a copy of `into`, which is packed under `mask`."""
        return mask.scatter(values, self.widths(name), sub, into) if is_slot_part(name) else values.copy()

    def slot_sizes(self, arrays: Arrays, mask: RankMask) -> NDArray[np.float64]:
        """|E_i|·‖B_i‖·‖A_i‖ of every slot alive in `mask`, of the parts that `arrays` has; shape (mask.count,)."""
        sizes = np.ones(mask.count)
        for name in (name for name in SLOT_PARTS if name in arrays):
            rows = self.rows({name: arrays[name]}, mask)
            sizes *= np.concatenate([np.linalg.norm(row[name].astype(np.float64), axis=1) for row in rows])
        return sizes

    def slice(self, arrays: Arrays, mask: RankMask, sub: RankMask) -> Arrays:
        """Arrays packed under `mask`, cut down to `sub`; parameter parts as they are."""
        if mask == sub:
            return dict(arrays)
        return {
            name: mask.slice(vector, self.widths(name), sub) if is_slot_part(name) else vector
            for name, vector in arrays.items()
        }
