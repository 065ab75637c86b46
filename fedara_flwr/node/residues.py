"""Where a node keeps what rounding took from its uploads (wire/upload): files, so that it outlives the process.

A file per round, the last two of each run. A round that is trained again, after a lost attempt or when the run goes on from its
last checkpoint, starts from the residue that it started from before, and so gives the same bits.
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
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.node.store import LIMIT
from fedara_flwr.wire.upload import Residue

logger = logging.getLogger(__name__)
KEPT = 2  # the residue that the last round left, and the one that it started from


class ResidueStore:
    """One client's residues of one run, in a folder of their own below `root`, which other clients and processes share.

    Args:
        limit: bytes below `root`; the clients that wrote longest ago go first.
    """

    def __init__(self, root: Path, run: str, client_key: str, limit: int = LIMIT) -> None:
        self.root, self.limit = root, limit
        self.folder = root / sha256(f"{run}\x1f{client_key}".encode()).hexdigest()  # both come from outside

    def take(self, server_round: int) -> Residue | None:
        """What rounds before this one left; None, which counts as zero, where nothing did, or it is lost or damaged.

        Later residues are of a course that the run did not take. They are removed.
        """
        files = self._files()
        for number in [number for number in files if number >= server_round]:
            files.pop(number).unlink(missing_ok=True)
        # never an older one: it is in an upload already
        return _read(files[max(files)]) if files else None

    def put(self, residue: Residue, server_round: int) -> None:
        """Keep what this round left. A disk that does not take it costs the residue, and not the round."""
        try:
            if not self.folder.exists():
                self._make_room(KEPT * sum(values.nbytes for values in residue.arrays.values()))
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # it tells of the client's own data
            part = self.folder / f"{server_round}.part"
            part.write_bytes(_packed(residue))
            os.replace(part, self.folder / f"{server_round}.safetensors")
            files = self._files()
            for number in sorted(files)[:-KEPT]:
                files[number].unlink(missing_ok=True)
        except OSError as error:
            logger.warning("what rounding took cannot be kept and is lost (%s)", error)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> dict[int, Path]:
        return {int(file.stem): file for file in self.folder.glob("*.safetensors")}

    def _make_room(self, needed: int) -> None:
        folders = sorted(self._others())
        total = sum(size for _, size, _ in folders) + needed
        for _, size, folder in folders:
            if total <= self.limit:
                break
            shutil.rmtree(folder, ignore_errors=True)
            total -= size

    def _others(self) -> Iterator[tuple[int, int, Path]]:
        """Time of the last write, size and folder of every client and run."""
        for folder in self.root.glob("*/"):
            with suppress(OSError):  # another process may be making room, too
                yield folder.stat().st_mtime_ns, sum(file.stat().st_size for file in folder.iterdir()), folder


def _packed(residue: Residue) -> bytes:
    mask = residue.mask
    text = json.dumps(
        {
            "ranks": list(mask.ranks),
            "mask": mask.to_bytes().hex(),
            "draw-seed": residue.draw_seed,
            "entries": residue.entries,
        }
    )
    return save(residue.arrays, metadata={"facts": text, "sha256": tensors_digest(residue.arrays, text)})


def _read(file: Path) -> Residue | None:
    try:
        with safe_open(file, "numpy") as tensors:
            arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no dictionary)
            found = tensors.metadata() or {}
        if found["sha256"] != tensors_digest(arrays, found["facts"]):
            raise ValueError("sha256 differs")
        facts = json.loads(found["facts"])
        mask = RankMask.from_bytes(facts["ranks"], bytes.fromhex(facts["mask"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        logger.warning("what rounding took is lost: %s is damaged (%s)", file.name, str(error)[:120])
        return None
    good = {part: values for part, values in arrays.items() if np.isfinite(values).all()}
    return Residue(good, mask, facts["draw-seed"], facts["entries"])
