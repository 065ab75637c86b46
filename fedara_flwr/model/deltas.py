"""Deltas: what a method adds to the frozen weights, the same on every node. numpy only.

The server keeps a log of pieces. A node is told which pieces make up the version that it must hold, and is sent those that
it lacks: low-rank factors, or one dense piece in place of all where that is fewer bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fedara_flwr.model.ranks import Ints, RankMask
from fedara_flwr.model.spec import Arrays, ModelSpec, Vector


@dataclass(frozen=True, eq=False)
class Piece:
    """A change ΔW of every module's weight, by factors or dense.

    Attributes:
        ranks: rank of each module's factors; () = dense.
        arrays: B and A packed under `RankMask.full(ranks)`, ΔW = B·A; or `dense`, all modules' ΔW one after another, row by
            row.
    """

    ranks: tuple[int, ...]
    arrays: Arrays

    @cached_property
    def digest(self) -> str:
        """sha256 of ranks and values, in hex: the name that a piece goes by."""
        total = hashlib.sha256(repr(self.ranks).encode())
        for name in sorted(self.arrays):
            total.update(name.encode())
            total.update(np.ascontiguousarray(self.arrays[name], dtype="<f4").tobytes())
        return total.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes that the values of all arrays take."""
        return sum(vector.nbytes for vector in self.arrays.values())

    def lengths(self, spec: ModelSpec) -> dict[str, int]:
        """The length that each array must have with this model, by name."""
        return piece_lengths(spec, self.ranks)


def piece_lengths(spec: ModelSpec, ranks: tuple[int, ...]) -> dict[str, int]:
    """Names and lengths of a piece's arrays."""
    if not ranks:
        return {"dense": dense_size(spec)}
    pairs = list(zip(spec.modules, ranks, strict=True))
    return {"B": sum(m.d_out * rank for m, rank in pairs), "A": sum(m.d_in * rank for m, rank in pairs)}


def dense_size(spec: ModelSpec) -> int:
    """Numbers in the weights of all adapted modules."""
    return sum(m.d_out * m.d_in for m in spec.modules)


def factors(piece: Piece, spec: ModelSpec) -> list[tuple[Vector, Vector]]:
    """(left of shape (d_out, r), right of shape (r, d_in)) of every module; views."""
    return [(rows["B"].T, rows["A"]) for rows in spec.rows(piece.arrays, RankMask.full(piece.ranks))]


def pack_factors(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Arrays:
    """B and A of all modules, packed, from (left of shape (d_out, r), right of shape (r, d_in)) of each."""
    return {
        "B": np.concatenate([left.T.reshape(-1) for left, _ in pairs]).astype(np.float32),
        "A": np.concatenate([right.reshape(-1) for _, right in pairs]).astype(np.float32),
    }


def from_factors(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Piece:
    """A piece of one (left, right) per module."""
    return Piece(tuple(right.shape[0] for _, right in pairs), pack_factors(pairs))


def dense(pieces: Iterable[Piece], spec: ModelSpec) -> list[np.ndarray]:
    """The sum of all pieces as one float32 matrix (d_out, d_in) per module."""
    total = [np.zeros((m.d_out, m.d_in), dtype=np.float32) for m in spec.modules]
    for piece in pieces:
        _add(total, piece, spec)
    return total


def _add(total: list[np.ndarray], piece: Piece, spec: ModelSpec) -> None:
    if piece.ranks:
        for matrix, (left, right) in zip(total, factors(piece, spec), strict=True):
            matrix += left @ right
    else:
        start = 0
        for matrix in total:
            matrix += piece.arrays["dense"][start : start + matrix.size].reshape(matrix.shape)
            start += matrix.size


def as_dense(matrices: Sequence[np.ndarray]) -> Piece:
    """A dense piece of one matrix per module."""
    return Piece((), {"dense": np.concatenate([m.reshape(-1) for m in matrices]).astype(np.float32)})


def compose(pieces: Iterable[Piece], spec: ModelSpec) -> Piece | None:
    """All pieces as one: factors side by side while they are at most half of the dense numbers, else dense.

    Never holds more than the sum and that many factors, however many pieces there are.
    """
    kept: list[Piece] = []
    total: list[np.ndarray] | None = None
    for piece in pieces:
        if total is not None:
            _add(total, piece, spec)
            continue
        kept.append(piece)
        if not piece.ranks or 2 * sum(p.nbytes for p in kept) > 4 * dense_size(spec):
            total, kept = dense(kept, spec), []
    if total is not None:
        return as_dense(total)
    if len(kept) < 2:
        return kept[0] if kept else None
    by_piece = [factors(piece, spec) for piece in kept]
    return from_factors(
        [
            (np.concatenate([f[m][0] for f in by_piece], axis=1), np.concatenate([f[m][1] for f in by_piece]))
            for m in range(len(spec.modules))
        ]
    )


@dataclass(frozen=True, eq=False)
class Weights:
    """A whole model as numbers: what evaluation and export take.

    Attributes:
        arrays: head; B, E (or none, then it is 1) and A packed under `mask`; backbone where it is trained.
        scales: s of y = W0·x + s·B·diag(E)·A·x, one per module.
        delta: what is added to the backbone.
        positions: numbers of the backbone that `arrays["backbone"]` holds (draws.sparse_positions); None = all.
    """

    arrays: Arrays
    mask: RankMask
    scales: tuple[float, ...]
    delta: Piece | None = None
    positions: Ints | None = None


@dataclass(frozen=True)
class Holding:
    """What a node has: pieces by digest, whose sum is `version`."""

    version: int = 0
    digests: tuple[str, ...] = ()


class DeltaLog:
    """The server's pieces. Keeps the newest ones up to the bytes of one dense piece, and the sum of all."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec, self.version = spec, 0
        self._newest: dict[int, Piece] = {}
        self._sum: list[np.ndarray] | None = None
        self._dense: Piece | None = None
        self._sizes: dict[str, int] = {}

    def dump(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The whole log as arrays by name and facts for JSON, for a checkpoint."""
        arrays = {f"{version}.{name}": array for version, piece in self._newest.items() for name, array in piece.arrays.items()}
        arrays |= {f"sum.{m}": matrix for m, matrix in enumerate(self._sum or [])}
        ranks = {str(version): list(piece.ranks) for version, piece in self._newest.items()}
        return arrays, {"version": self.version, "ranks": ranks, "sizes": self._sizes}

    @classmethod
    def restored(cls, spec: ModelSpec, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> DeltaLog:
        """The log that gave these arrays and facts by `dump`."""
        log = cls(spec)
        log.version, log._sizes = facts["version"], dict(facts["sizes"])
        for version, ranks in facts["ranks"].items():
            names = piece_lengths(spec, tuple(ranks))
            log._newest[int(version)] = Piece(tuple(ranks), {name: arrays[f"{version}.{name}"] for name in names})
        if "sum.0" in arrays:
            log._sum = [arrays[f"sum.{m}"] for m in range(len(spec.modules))]
        return log

    def nbytes(self, digests: Sequence[str]) -> int:
        """Bytes of these pieces together; one that was never sent counts as 0."""
        return sum(self._sizes.get(digest, 0) for digest in digests)

    def add(self, piece: Piece) -> None:
        """Make the next version: everything so far plus `piece`; ValueError where that does not fit the model."""
        for name, length in piece.lengths(self.spec).items():
            if piece.arrays[name].shape != (length,):
                raise ValueError(f"{name} has shape {piece.arrays[name].shape}, expected ({length},)")
        self.version += 1
        self._newest[self.version] = piece
        self._dense = None
        if self._sum is not None:
            self._sum = [a + b for a, b in zip(self._sum, dense([piece], self.spec), strict=True)]
        # a node that lacks more than a dense piece's bytes gets the dense one, so older pieces are never sent again
        while sum(p.nbytes for p in self._newest.values()) > 4 * dense_size(self.spec):
            self._sum = self._sum or dense(list(self._newest.values()), self.spec)
            del self._newest[min(self._newest)]

    def composed(self) -> Piece | None:
        """The sum of all pieces as one; None before the first."""
        if not self.version:
            return None
        if self._sum is None:
            return compose(list(self._newest.values()), self.spec)
        return self._as_dense()

    def _as_dense(self) -> Piece:
        if self._dense is None:
            self._dense = as_dense(self._sum or dense(list(self._newest.values()), self.spec))
        return self._dense

    def fetch(self, have: Holding) -> tuple[Holding, list[Piece]]:
        """(what a node holds afterwards, pieces to send) for a node that holds `have`: fewest bytes within what it may keep."""
        if have.version == self.version:
            return have, []
        missing = range(have.version + 1, self.version + 1)
        if all(v in self._newest for v in missing):
            pieces = [self._newest[v] for v in missing]
            new = sum(p.nbytes for p in pieces)
            # the second: what a node keeps, and reads each round, must not grow with the rounds
            if new < 4 * dense_size(self.spec) and self.nbytes(have.digests) + new <= 8 * dense_size(self.spec):
                self._sizes |= {p.digest: p.nbytes for p in pieces}
                return Holding(self.version, (*have.digests, *(p.digest for p in pieces))), pieces
        whole = self._as_dense()
        self._sizes[whole.digest] = whole.nbytes
        return Holding(self.version, (whole.digest,)), [whole]
