"""Number formats of what travels: a part's float32 vector to fewer bytes and back. numpy only.

A part is cut into rows (`ModelSpec.row_lengths`). "int8" and "int4" send of each row a float32 scale, its largest magnitude
over 127 or 7, and of each number the multiple of the scale that lies just below or just above it, at random so that the mean
is the number (QSGD, arXiv 1610.02132): |decoded - x| ≤ scale. Decoding is one float32 product, the same on every machine.

Values go down rounded once a round for all clients. What comes back are differences from the decoded values, and the server
adds them to its own, unrounded ones: its model, and all that compares updates with it (norm bound, robust rules, clipping for
privacy), sees what a client changed and never the rounding of the broadcast, which so cannot add up over the rounds.

Sizes follow from the mask alone, with error feedback (wire/upload) or without.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedara_flwr import seeds
from fedara_flwr.model.parts import part
from fedara_flwr.model.ranks import Ints, RankMask
from fedara_flwr.model.spec import Arrays, ModelSpec, Vector
from fedara_flwr.wire.plan import TrainPlan

Numbers = NDArray[Any]
Coded = dict[str, Numbers]
"""One vector per part, as it travels."""
SMALLEST = np.float32(2.0**-149)


class Codec(Protocol):
    """One format; `rows` are the lengths of a vector's rows, none of them 0."""

    dtype: np.dtype[Any]

    def length(self, rows: Ints) -> int:
        """Numbers of `dtype` in the encoded vector, whatever the values."""
        ...

    def encode(self, values: Vector, rows: Ints, rng: np.random.Generator) -> Numbers:
        """`values` as they travel; `rng` decides where numbers are rounded at random."""
        ...

    def decode(self, coded: Numbers, rows: Ints) -> Vector:
        """The inverse, but for what was rounded away; ValueError where `encode` cannot have made it."""
        ...


class Float:
    """Floating-point numbers, rounded to the nearest; those beyond the format's range become its largest."""

    def __init__(self, dtype: str) -> None:
        self.dtype = np.dtype(dtype)

    def length(self, rows: Ints) -> int:
        """As many numbers as the vector has."""
        return int(rows.sum())

    def encode(self, values: Vector, rows: Ints, rng: np.random.Generator) -> Numbers:
        """The values rounded to the nearest of the format; `rng` is not used."""
        largest = np.finfo(self.dtype).max
        return np.clip(values, -largest, largest).astype(self.dtype)

    def decode(self, coded: Numbers, rows: Ints) -> Vector:
        """The numbers as float32, which loses nothing."""
        return coded.astype(np.float32, copy=False)


class Integer:
    """A scale per row, then codes of `bits` (8 or 4) each: multiples from -top to top as 1 to 2·top + 1. 0 is no code.

    Of two codes in one byte the first has the high bits; where their number is odd the last byte ends in zeros.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, bits: int) -> None:
        self.bits, self.top = bits, 2 ** (bits - 1) - 1

    def length(self, rows: Ints) -> int:
        """4 bytes per row and `bits` per number, rounded up to whole bytes."""
        return 4 * len(rows) + (int(rows.sum()) * self.bits + 7) // 8

    def encode(self, values: Vector, rows: Ints, rng: np.random.Generator) -> Numbers:
        """The rows' scales, then the codes; each number is rounded by one draw of `rng`."""
        starts = np.cumsum(rows) - rows
        largest = np.maximum.reduceat(np.abs(values), starts) if len(rows) else np.empty(0, dtype=np.float32)
        # a scale must not vanish where a number does not
        scales = np.where(largest > 0, np.maximum(largest / self.top, SMALLEST), 0).astype("<f4")
        exact = values / np.repeat(np.where(scales > 0, scales, 1), rows).astype(np.float32)
        below = np.floor(exact)
        rounded = below + (rng.random(len(values), dtype=np.float32) < exact - below)
        codes = (np.clip(rounded, -self.top, self.top) + (self.top + 1)).astype(np.uint8)
        return np.concatenate([scales.view(np.uint8), codes if self.bits == 8 else _pairs(codes)])

    def decode(self, coded: Numbers, rows: Ints) -> Vector:
        """Each code's multiple times its row's scale."""
        scales = coded[: 4 * len(rows)].copy().view("<f4")
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise ValueError("a scale is negative or not finite")
        codes, count = coded[4 * len(rows) :], int(rows.sum())
        if self.bits == 4:
            codes = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)
        if not codes[:count].all() or codes[count:].any():
            raise ValueError(f"a code is not from 1 to {2 * self.top + 1}")
        with np.errstate(over="ignore"):  # the reader refuses what is not finite
            return (codes[:count].astype(np.float32) - (self.top + 1)) * np.repeat(scales, rows).astype(np.float32)


def _pairs(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    even = np.append(codes, np.uint8(0)) if len(codes) % 2 else codes
    return (even[::2] << 4 | even[1::2]).astype(np.uint8)


CODECS: dict[str, Codec] = {
    "float32": Float("<f4"),
    "float16": Float("<f2"),
    "int8": Integer(8),
    "int4": Integer(4),
}


def format_of_values(name: str, form: str) -> str:
    """The format in which a part's values go down where the run's is `form`; what comes back are differences, in any format."""
    return "int8" if form == "int4" and not part(name).coarse else form


def nbytes(name: str, rows: Ints) -> int:
    """Bytes of a vector with these rows in the format `name`, npy header aside."""
    codec = CODECS[name]
    return codec.length(rows) * codec.dtype.itemsize


class Broadcast:
    """What the server sends in one round: every part is encoded once for all clients that have the same mask."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec, self._error = spec, CodingError()
        self._coded: dict[tuple[str, RankMask], Numbers] = {}

    def encode(self, plan: TrainPlan, arrays: Arrays) -> Coded | Arrays:
        """`arrays`, packed under the plan's mask, in its format."""
        if plan.down == "float32":
            return arrays
        for name, values in sorted(arrays.items()):  # sums of the error must not depend on the order of a set
            if (name, plan.mask) not in self._coded:
                codec, rows = CODECS[format_of_values(name, plan.down)], self._spec.row_lengths(name, plan.mask, plan.entries)
                rng = seeds.generator(plan.seed, "wire-down", plan.server_round, name)
                coded = self._coded[name, plan.mask] = codec.encode(values, rows, rng)
                self._error.add(values, codec.decode(coded, rows))
        return {name: self._coded[name, plan.mask] for name in arrays}

    def report(self) -> dict[str, object]:
        """`coding-error`, the value of CodingError; {} where nothing was encoded."""
        return {"coding-error": self._error.value} if self._coded else {}


class CodingError:
    """‖decoded - exact‖ / ‖exact‖ over several vectors."""

    def __init__(self) -> None:
        self._off, self._size = 0.0, 0.0

    def add(self, exact: Vector, decoded: Vector) -> None:
        """Take one more vector into the error."""
        change, values = decoded.astype(np.float64) - exact, exact.astype(np.float64)
        self._off += float(change @ change)
        self._size += float(values @ values)

    @property
    def value(self) -> float:
        """The relative error over all vectors; 0 where all of them are zero."""
        return math.sqrt(self._off / self._size) if self._size else 0.0
