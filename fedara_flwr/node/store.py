"""Where a node keeps the pieces of the delta: files by sha256, checked when they are read."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedara_flwr.model.deltas import Piece

LIMIT = 8 << 30  # bytes; the pieces that were not read for longest go first
WRITING_SECONDS = 3600.0  # without a byte after which nobody is writing a file any more


class MissingPieces(Exception):
    """Pieces of the delta that this node does not have; `digests` names them."""

    def __init__(self, digests: Sequence[str]) -> None:
        super().__init__(f"{len(digests)} pieces of the delta are missing")
        self.digests = tuple(digests)


def sweep(folder: Path) -> None:
    """Remove what killed processes left of files that they were writing."""
    for part in folder.glob("*.part"):
        with suppress(OSError):  # another process has done so
            if time.time() - part.stat().st_mtime > WRITING_SECONDS:
                part.unlink()


class NodeStore:
    """A folder of pieces by digest; several processes, and in a simulation several nodes, may share it."""

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder, limit

    def put(self, piece: Piece) -> None:
        """Keep a piece; a file appears whole or not at all."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = self._file(piece.digest)
        if target.exists():
            return
        sweep(self.folder)
        self._make_room(piece.nbytes)
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
        os.close(handle)
        try:
            save_file(dict(piece.arrays), name, metadata={"ranks": json.dumps(piece.ranks)})
            os.replace(name, target)
        finally:
            Path(name).unlink(missing_ok=True)

    def get(self, digests: Iterable[str]) -> Iterator[Piece]:
        """The pieces, in that order, read one at a time.

        Raises:
            MissingPieces: after the last one, that some are not there, or are not what their name says; those are removed.
        """
        missing = []
        for digest in digests:
            file = self._file(digest)
            there = file.exists()  # what another process puts there from now on is not this one's to remove
            piece = self._read(file)
            if piece is not None and piece.digest == digest:
                yield piece
                continue
            missing.append(digest)
            if there:
                file.unlink(missing_ok=True)
        if missing:
            raise MissingPieces(missing)

    def _file(self, digest: str) -> Path:
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise ValueError(f"{digest[:80]!r} is no sha256")  # it comes from outside and becomes a path
        return self.folder / f"{digest}.safetensors"

    def _read(self, file: Path) -> Piece | None:
        try:
            with safe_open(file, "numpy") as tensors:
                arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no dictionary)
                ranks = tuple(json.loads(tensors.metadata()["ranks"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        with suppress(OSError):  # another process may have removed it by now
            os.utime(file)
        return Piece(ranks, arrays)

    def _make_room(self, needed: int) -> None:
        files = []
        for file in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # another process may be making room, too
                facts = file.stat()
                files.append((facts.st_mtime_ns, facts.st_size, file))
        total = sum(size for _, size, _ in files) + needed
        for _, size, file in sorted(files):
            if total <= self.limit:
                break
            file.unlink(missing_ok=True)
            total -= size
