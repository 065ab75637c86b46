"""Where a node keeps vectors from one of its rounds to the next: files, so that they outlive the process.

Two things are kept so: parts of the model that stay with the node, and what rounding took from its uploads (wire/upload.py). A
file per round, the last three of each run. A round that is trained again, after a lost attempt or when the run goes on from its
last checkpoint, starts from what it started from before, and so gives the same bits.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedara_flwr.files import tensors_digest
from fedara_flwr.model.kept import Kept
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.node.store import LIMIT, sweep

logger = logging.getLogger(__name__)
ROUNDS_KEPT = 3  # what the last round left, what it started from, and one more should the newest checkpoint be damaged


class KeptStore:
    """What one client keeps of one run, in a folder of its own below `root`, which other clients and processes share.

    The folder `root` has the name of what is kept in it, which warnings repeat.

    Args:
        limit: bytes below `root`, held at every `put`: clients that wrote longest ago go first, then this one's older rounds,
            and what is larger by itself is not kept.
    """

    def __init__(self, root: Path, run: str, client_key: str, limit: int = LIMIT) -> None:
        self.root, self.limit = root, limit
        self.folder = root / sha256(f"{run}\x1f{client_key}".encode()).hexdigest()  # both come from outside

    def take(self, server_round: int) -> Kept | None:
        """What rounds before this one left; None where nothing did, or it is lost or damaged.

        What later rounds left is of a course that the run did not take. It is removed.
        """
        files = self._files()
        later = [number for number in files if number >= server_round]
        for number in later:
            with suppress(OSError):  # a read-only disk: it is not taken all the same
                files.pop(number).unlink(missing_ok=True)
        if later and not files:
            logger.warning("%s of a client are lost: none of before round %d is left", self.root.name, server_round)
        # never an older one: what it holds is used up, an upload has it already
        return self._read(files[max(files)]) if files else None

    def put(self, kept: Kept, server_round: int) -> None:
        """Keep what this round left. A disk that does not take it costs what was to be kept, and not the round."""
        try:
            packed = _packed(kept)
            rounds = min(ROUNDS_KEPT, self.limit // len(packed))
            if not rounds:
                raise OSError(f"{len(packed)} bytes, there is room for {self.limit}")
            for folder in (self.root.parent, self.root, self.folder):  # they tell of the client's own data
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make_room(rounds * len(packed))
            self._forget(rounds - 1)
            part = self.folder / "next.part"  # one name: a process that is killed here leaves one file at most
            part.write_bytes(packed)
            os.replace(part, self.folder / f"{server_round}.safetensors")
        except OSError as error:
            logger.warning("%s of a client cannot be kept: they are lost (%s)", self.root.name, error)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _forget(self, rounds: int) -> None:
        """Remove all but the last so many rounds."""
        files = self._files()
        for number in sorted(files)[: len(files) - rounds]:
            files[number].unlink(missing_ok=True)

    def _files(self) -> dict[int, Path]:
        return {int(file.stem): file for file in self.folder.glob("*.safetensors") if file.stem.isdecimal() and file.is_file()}

    def _make_room(self, needed: int) -> None:
        sweep(self.folder)
        folders = sorted(self._others())
        total, removed = sum(size for _, size, _ in folders) + needed, 0
        for _, size, folder in folders:
            if total <= self.limit:
                break
            shutil.rmtree(folder, ignore_errors=True)
            total, removed = total - size, removed + 1
        if removed:
            line = "%s of %d clients or runs are removed, those written longest ago: there is room for %d bytes"
            logger.warning(line, self.root.name, removed, self.limit)

    def _others(self) -> Iterator[tuple[int, int, Path]]:
        """Time of the last write, size and folder of every other client and run."""
        for folder in self.root.glob("*/"):
            if folder == self.folder:
                continue
            sweep(folder)
            with suppress(OSError):  # another process may be making room, too
                yield folder.stat().st_mtime_ns, sum(file.stat().st_size for file in folder.iterdir()), folder

    def _read(self, file: Path) -> Kept | None:
        try:
            with safe_open(file, "numpy") as tensors:
                arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no dictionary)
                header = tensors.metadata() or {}
            if header["sha256"] != tensors_digest(arrays, header["facts"]):
                raise ValueError("sha256 differs")
            facts = json.loads(header["facts"])
            mask = RankMask.from_bytes(facts["ranks"], bytes.fromhex(facts["mask"]))
            draw_seed, entries = int(facts["draw-seed"]), int(facts["entries"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s of a client are lost: %s is damaged (%s)", self.root.name, file.name, str(error)[:120])
            return None
        good = {part: values for part, values in arrays.items() if np.isfinite(values).all()}
        if len(good) < len(arrays):
            logger.warning("%s of a client: %s has numbers that are not finite, they are lost", self.root.name, file.name)
        return Kept(good, mask, draw_seed, entries)


def _packed(kept: Kept) -> bytes:
    facts = {
        "ranks": list(kept.mask.ranks),
        "mask": kept.mask.to_bytes().hex(),
        "draw-seed": kept.draw_seed,
        "entries": kept.entries,
    }
    text = json.dumps(facts)
    return save(kept.arrays, metadata={"facts": text, "sha256": tensors_digest(kept.arrays, text)})
