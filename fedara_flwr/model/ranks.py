"""Rank masks: which slots of which modules are alive. numpy only; shared by server and clients.

A *slot* (m, i) is rank i of module m: the triplet B[:, i], E[i], A[i, :]. Whatever concerns several slots is a vector in
(module, slot) order over the alive ones, "packed". A part that holds `width[m]` numbers per slot of module m (d_out for B,
1 for E, d_in for A) is packed the same way, slot after slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class RankMask:
    """Alive slots of all modules.

    Attributes:
        ranks: mask length r_m of each module, the largest rank it has anywhere in the run.
        bits: shape (sum(ranks),), True where the slot is alive, in (module, slot) order. Read-only.
    """

    ranks: tuple[int, ...]
    bits: Bools

    def __post_init__(self) -> None:
        bits = np.array(self.bits, dtype=np.bool_)
        if any(r < 0 for r in self.ranks):
            raise ValueError(f"mask lengths must be 0 or more, got {self.ranks}")
        if bits.shape != (sum(self.ranks),):
            raise ValueError(f"a mask of {sum(self.ranks)} slots got bits of shape {bits.shape}")
        bits.flags.writeable = False
        object.__setattr__(self, "bits", bits)

    @classmethod
    def full(cls, ranks: Sequence[int]) -> RankMask:
        """A mask in which all slots are alive; `ranks` are the mask lengths of the modules."""
        return cls(tuple(int(r) for r in ranks), np.ones(sum(ranks), dtype=np.bool_))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RankMask) and self.ranks == other.ranks and np.array_equal(self.bits, other.bits)

    def __hash__(self) -> int:
        return hash((self.ranks, self.bits.tobytes()))

    # -- counting ---------------------------------------------------------------------------------------------------
    @property
    def count(self) -> int:
        """How many slots are alive, over all modules."""
        return int(self.bits.sum())

    @property
    def modules(self) -> Ints:
        """Module index of every slot, alive or not; shape (sum(ranks),)."""
        return np.repeat(np.arange(len(self.ranks)), self.ranks)

    @property
    def alive(self) -> Ints:
        """Alive slots per module; shape (len(ranks),)."""
        return np.bincount(self.modules[self.bits], minlength=len(self.ranks)).astype(np.int64)

    @property
    def dead_modules(self) -> int:
        """Modules that have no alive slot."""
        return int((self.alive == 0).sum())

    def module(self, index: int) -> Bools:
        """The bits of one module; shape (ranks[index],)."""
        start = sum(self.ranks[:index])
        return self.bits[start : start + self.ranks[index]]

    def length(self, widths: Sequence[int]) -> int:
        """How many numbers a packed part of these widths holds."""
        return int(self.alive @ np.asarray(widths, dtype=np.int64))

    # -- algebra ----------------------------------------------------------------------------------------------------
    def intersect(self, other: RankMask) -> RankMask:
        """The mask of the slots that are alive in both."""
        self._same_shape(other)
        return RankMask(self.ranks, self.bits & other.bits)

    def covers(self, other: RankMask) -> bool:
        """Whether every slot alive in `other` is alive here."""
        self._same_shape(other)
        return not bool((other.bits & ~self.bits).any())

    def keep(self, chosen: Bools) -> RankMask:
        """The sub-mask of the alive slots where `chosen` (shape (count,), packed) is True."""
        if chosen.shape != (self.count,):
            raise ValueError(f"{self.count} slots are alive, got chosen of shape {chosen.shape}")
        bits = self.bits.copy()
        bits[self.bits] = chosen
        return RankMask(self.ranks, bits)

    def within(self, other: RankMask) -> Bools:
        """For each alive slot of `other` whether it is alive here; shape (other.count,), packed."""
        self._same_shape(other)
        return self.bits[other.bits]

    def _same_shape(self, other: RankMask) -> None:
        if self.ranks != other.ranks:
            raise ValueError(f"masks of different modules: {self.ranks} and {other.ranks}")

    # -- packed parts -----------------------------------------------------------------------------------------------
    def elements(self, widths: Sequence[int], sub: RankMask) -> Bools:
        """For each number of a part packed under this mask, whether its slot is alive in `sub`."""
        per_slot = np.asarray(widths, dtype=np.int64)[self.modules[self.bits]]
        return np.repeat(sub.within(self), per_slot)

    def slice(self, part: Floats, widths: Sequence[int], sub: RankMask) -> Floats:
        """A part packed under this mask, cut down to `sub` (which this mask must cover)."""
        if not self.covers(sub):
            raise ValueError("cannot slice to slots that are dead here")
        return part[self.elements(widths, sub)]

    def scatter(self, part: Floats, widths: Sequence[int], sub: RankMask, into: Floats) -> Floats:
        """The inverse of `slice`: `into`, packed under this mask, with the slots of `sub` replaced by `part`."""
        index = self.elements(widths, sub)
        if not self.covers(sub) or part.shape != (int(index.sum()),):
            raise ValueError(f"a part of shape {part.shape} does not fill the {int(index.sum())} numbers of its slots")
        out = into.copy()
        out[index] = part
        return out

    # -- the wire ---------------------------------------------------------------------------------------------------
    def to_bytes(self) -> bytes:
        """ceil(sum(ranks) / 8) bytes, one bit per slot, most significant first."""
        return pack_bits(self.bits)

    @classmethod
    def from_bytes(cls, ranks: Sequence[int], data: bytes) -> RankMask:
        """The inverse of `to_bytes`; ValueError when the length or the padding is wrong."""
        return cls(tuple(ranks), unpack_bits(data, sum(ranks)))


def pack_bits(bits: Bools) -> bytes:
    """ceil(n / 8) bytes of n bits, most significant first, zero padding."""
    return np.packbits(bits).tobytes()


def unpack_bits(data: bytes, length: int) -> Bools:
    """The inverse of `pack_bits`; ValueError unless `data` is exactly what packing `length` bits gives."""
    if len(data) != (length + 7) // 8:
        raise ValueError(f"{length} bits need {(length + 7) // 8} bytes, got {len(data)}")
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8)).astype(np.bool_)
    if bits[length:].any():
        raise ValueError("the padding bits are not zero")
    return bits[:length]


def pack_order(ranks: Ints) -> bytes:
    """Two bytes for each rank of a permutation of 0..n-1, lowest byte first; n is at most 2^16."""
    return ranks.astype("<u2").tobytes()


def unpack_order(data: bytes, length: int) -> Ints:
    """The inverse of `pack_order`; ValueError unless `data` is exactly a permutation of 0..length-1."""
    if len(data) != 2 * length:
        raise ValueError(f"slot ranks have {len(data)} bytes, expected {2 * length}")
    ranks = np.frombuffer(data, dtype="<u2").astype(np.int64)
    if not np.array_equal(np.sort(ranks), np.arange(length)):
        raise ValueError(f"slot ranks are no permutation of 0..{length - 1}")
    return ranks


def rank_order(scores: Floats) -> Ints:
    """Rank of every slot by score, 0 = best; ties go to the lower (module, slot), NaN counts as -inf.

    `scores` are in (module, slot) order; the result has the same shape. Deterministic, unlike a threshold on the k-th score,
    which keeps too many or none on ties.
    """
    scores = np.where(np.isnan(scores), -np.inf, scores)
    order = np.argsort(-scores, kind="stable")
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[order] = np.arange(len(scores))
    return ranks


def select_top(scores: Floats, budget: int) -> Bools:
    """Exactly min(budget, len(scores)) True: the best slots over all modules jointly (see `rank_order`)."""
    return rank_order(scores) < budget
