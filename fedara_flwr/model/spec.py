"""What the model is, as far as ranks, bytes and merging care: names and sizes, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from fedara_flwr.model.ranks import Ints, RankMask

Vector = NDArray[np.float32]
SLOT_PARTS = ("B", "E", "A")
ENTRIES_ROW = 256
PARTS = (*SLOT_PARTS, "head", "backbone")
Arrays = dict[str, Vector]
"""One packed float32 vector per part: the slot parts under some RankMask, the head in the order of `ModelSpec.head`, the
backbone as differences from the pre-trained values, in the order of `ModelSpec.backbone` or at drawn positions."""


@dataclass(frozen=True)
class ModuleSpec:
    """One adapted linear layer: its full name, the shape (d_out, d_in) of its weight and the index of its block."""

    name: str
    d_out: int
    d_in: int
    block: int


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of head or backbone."""

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
    """

    fingerprint: str
    modules: tuple[ModuleSpec, ...]
    head: tuple[ParameterSpec, ...]
    backbone: tuple[ParameterSpec, ...] = ()

    @property
    def blocks(self) -> int:
        """How many repeated blocks the backbone has."""
        return 1 + max(m.block for m in self.modules)

    def lowest(self, mask: RankMask) -> int:
        """The lowest block with a living module; the number of blocks where none lives."""
        alive = (module.block for module, count in zip(self.modules, mask.alive, strict=True) if count)
        return min(alive, default=self.blocks)

    @property
    def head_size(self) -> int:
        """Numbers in the head."""
        return sum(p.size for p in self.head)

    def widths(self, part: str) -> tuple[int, ...]:
        """Numbers per slot of each module in one slot part."""
        match part:
            case "B":
                return tuple(m.d_out for m in self.modules)
            case "E":
                return tuple(1 for _ in self.modules)
            case "A":
                return tuple(m.d_in for m in self.modules)
        raise ValueError(f"{part!r} is not a slot part, allowed are {SLOT_PARTS}")

    @property
    def backbone_size(self) -> int:
        """Numbers in the backbone."""
        return sum(p.size for p in self.backbone)

    def length(self, part: str, mask: RankMask, entries: int = 0) -> int:
        """Length of the packed vector of `part` under `mask`; of the backbone `entries` numbers travel, 0 = all."""
        match part:
            case "head":
                return self.head_size
            case "backbone":
                return entries or self.backbone_size
        return mask.length(self.widths(part))

    def row_lengths(self, part: str, mask: RankMask, entries: int = 0) -> Ints:
        """Lengths of the rows of the packed vector of `part`, what one scale is for on the wire; shape (rows,), none 0.

        A slot's numbers of B or A; all E of a module; of head and backbone what makes one output, or a whole vector; of
        `entries` of the backbone 256 at a time.
        """
        if part == "E":
            return mask.alive[mask.alive > 0]
        if part in SLOT_PARTS:
            return np.array(self.widths(part), dtype=np.int64)[mask.modules[mask.bits]]
        if part == "backbone" and entries:
            return np.diff(np.append(np.arange(0, entries, ENTRIES_ROW), entries))
        parameters = self.head if part == "head" else self.backbone
        lasts = np.array([p.shape[-1] if p.shape else 1 for p in parameters], dtype=np.int64)
        return np.repeat(lasts, np.array([p.size for p in parameters], dtype=np.int64) // lasts)

    def rows(self, arrays: Arrays, mask: RankMask) -> list[Arrays]:
        """Of each module the slot parts that `arrays` has, as views of shape (alive slots, width); all where none lives."""
        found: list[Arrays] = [{} for _ in self.modules]
        for part in SLOT_PARTS:
            values = arrays.get(part, None if mask.count else np.empty(0, dtype=np.float32))
            if values is None:
                continue
            start = 0
            for module, count, width in zip(found, mask.alive.tolist(), self.widths(part), strict=True):
                module[part] = values[start : start + count * width].reshape(count, width)
                start += count * width
        return found

    def slot_sizes(self, arrays: Arrays, mask: RankMask) -> NDArray[np.float64]:
        """|E_i|·‖B_i‖·‖A_i‖ of every slot alive in `mask`, of the parts that `arrays` has; shape (mask.count,)."""
        sizes = np.ones(mask.count)
        for part in arrays.keys() & set(SLOT_PARTS):
            rows = self.rows({part: arrays[part]}, mask)
            sizes *= np.concatenate([np.linalg.norm(row[part].astype(np.float64), axis=1) for row in rows])
        return sizes

    def slice(self, arrays: Arrays, mask: RankMask, sub: RankMask) -> Arrays:
        """Arrays packed under `mask`, cut down to `sub`; head and backbone as they are."""
        if mask == sub:
            return dict(arrays)
        return {
            part: mask.slice(vector, self.widths(part), sub) if part in SLOT_PARTS else vector
            for part, vector in arrays.items()
        }
