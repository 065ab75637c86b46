"""Tensors in a scratch file: what a process can make again, but not as fast as it can read it back."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

import torch

logger = logging.getLogger(__name__)

SLOT = 1 << 14  # bytes; a tensor fills as many as it needs, anywhere in the file


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies, and what it was."""

    slots: list[int]
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size
    device: torch.device


class Scratch:
    """Tensors by key in a file of this process alone, bounded; the least recently used go first.

    The file has no name and is gone with the process, however that ends. Where it cannot be made, written or read, it is given
    up with one warning, and nothing is kept from then on.
    """

    def __init__(self, megabytes: int) -> None:
        """Set the bound; the file is made when the first tensor comes.

        Args:
            megabytes: bound of the file, in 2^20 bytes; 0 = keep nothing. It never takes more than half of what is free where
                it is made, the folder of Python's `tempfile` (TMPDIR).
        """
        self._limit = (megabytes << 20) // SLOT  # in slots
        self._file: IO[bytes] | None = None
        self._held: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._free: list[int] = []
        self._end = 0  # slots from here on were never used

    @property
    def nbytes(self) -> int:
        """Bytes of the file that hold tensors."""
        return (self._end - len(self._free)) * SLOT

    def clear(self) -> None:
        """Forget everything, and give its room back."""
        self._held.clear()
        self._free.clear()
        self._end = 0
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Keep a tensor, if it fits; one that is there counts as used and is not written again, which spares flash memory."""
        if not self._limit:
            return
        if key in self._held:
            self._held.move_to_end(key)
            return
        data = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        starts = range(0, len(data), SLOT)
        try:
            file = self._open()
            if len(starts) > self._limit:
                return
            slots = [self._take() for _ in starts]
            for slot, start in zip(slots, starts, strict=True):
                piece = data[start : start + SLOT]
                if os.pwrite(file.fileno(), piece, slot * SLOT) < len(piece):
                    raise OSError("the disk is full")
        except OSError as error:
            self._give_up(error)
            return
        self._held[key] = _Entry(slots, len(data), tensor.dtype, tensor.shape, tensor.device)

    def get(self, key: Hashable) -> torch.Tensor | None:
        """The tensor as it was put, bit for bit; None where it is not there."""
        entry = self._held.get(key)
        if entry is None:
            return None
        self._held.move_to_end(key)
        try:
            file = self._open()
            places = zip(entry.slots, range(entry.nbytes, 0, -SLOT), strict=True)
            data = bytearray().join(os.pread(file.fileno(), min(left, SLOT), slot * SLOT) for slot, left in places)
            if len(data) < entry.nbytes:
                raise OSError("it was cut off")
        except OSError as error:
            self._give_up(error)
            return None
        # copied: memory that is aligned as torch's own, since the last bits of matrix products may depend on it
        return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape).to(entry.device, copy=True)

    def _open(self) -> IO[bytes]:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="fedara-")
            self._limit = min(self._limit, shutil.disk_usage(self._file.fileno()).free // 2 // SLOT)
        return self._file

    def _take(self) -> int:
        """The number of a slot to write to: a free one, else one of the tensor that was used longest ago."""
        if not self._free and self._end < self._limit:
            self._end += 1
            return self._end - 1
        while not self._free:
            self._free += self._held.popitem(last=False)[1].slots
        return self._free.pop()

    def _give_up(self, error: OSError) -> None:
        logger.warning("train.cache-disk-mb is off for the rest of this process: its scratch file failed (%s)", error)
        self._limit = 0
        self.clear()
