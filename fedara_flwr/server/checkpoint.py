"""Checkpoints: the server's whole state, one safetensors file per checkpoint with the rest as JSON in its header.

A file is written under another name, forced to the disk and renamed, and the last two are kept; so there is always one to go
on from, whenever the server dies. The best round's is kept besides (server/best.py).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedara_flwr.files import tensors_digest, write_whole
from fedara_flwr.model.deltas import DeltaLog, Holding
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import ModelSpec
from fedara_flwr.server.state import ServerState

logger = logging.getLogger(__name__)
CHECKPOINT_FORMAT = 4
CHECKPOINTS_KEPT = 2
Tensors = dict[str, np.ndarray]


class BadCheckpoint(ValueError):
    """A file that cannot be gone on from; the line says why."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they are.
        identity: what a checkpoint must agree on to be this run's: the run's id and the backbone's fingerprint.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self.folder, self.identity = folder, dict(identity)

    def save(self, state: ServerState, lines: int) -> Path:
        """Write the state after `state.server_round` rounds; `lines` are the bytes that metrics.jsonl has by then."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors, facts = encode(state)
        facts = {**facts, "identity": self.identity, "metrics-bytes": lines}
        text = json.dumps(facts)
        path = self.path(state.server_round)
        write_whole(path, save(tensors, metadata={"state": text, "sha256": tensors_digest(tensors, text)}))
        for old in self._files()[CHECKPOINTS_KEPT:]:
            if old != self.path(state.best.get("round", state.server_round)):
                old.unlink()
        return path

    def path(self, server_round: int) -> Path:
        """Where the checkpoint after so many rounds is, or would be."""
        return self.folder / f"round-{server_round:06d}.safetensors"

    def newest(self, spec: ModelSpec) -> tuple[ServerState, int] | None:
        """(state, bytes of metrics.jsonl) of the newest checkpoint that is whole and this run's; None where there is none.

        One that is not gets a warning with the reason, and the one before it is taken.
        """
        for path in self._files():
            try:
                return self.read(path, spec)
            except BadCheckpoint as error:
                logger.warning("checkpoint %s is not used: %s", path.name, error)
        return None

    def read(self, path: Path, spec: ModelSpec) -> tuple[ServerState, int]:
        """Read one checkpoint: the state, and the bytes that metrics.jsonl had by then.

        Raises:
            BadCheckpoint: cut off, changed, of another format, of another run, or not of this model.
        """
        try:
            with safe_open(path, "numpy") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
                header = file.metadata() or {}
            text = header["state"]
            facts = json.loads(text)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise BadCheckpoint(f"it is cut off or no checkpoint ({type(error).__name__}: {str(error)[:120]})") from None
        if facts.get("format") != CHECKPOINT_FORMAT:
            raise BadCheckpoint(f"it has format {facts.get('format')!r}, this version reads {CHECKPOINT_FORMAT}")
        if header.get("sha256") != tensors_digest(tensors, text):
            raise BadCheckpoint("its content is not what was written (sha256 differs)")
        for name, mine in self.identity.items():
            if facts["identity"].get(name) != mine:
                theirs = str(facts["identity"].get(name))
                raise BadCheckpoint(f"it is another run's: its {name} is {theirs[:16]!r}, this run's is {mine[:16]!r}")
        return decode(spec, tensors, facts), int(facts["metrics-bytes"])

    def _files(self) -> list[Path]:
        """The checkpoint files, newest first."""
        return sorted(self.folder.glob("round-*.safetensors"), reverse=True)


def encode(state: ServerState) -> tuple[Tensors, dict[str, Any]]:
    """The state as tensors and JSON."""
    pieces, delta = state.delta.dump()
    tensors: Tensors = {f"arrays.{part}": vector for part, vector in state.arrays.items()}
    tensors |= {f"delta.{name}": array for name, array in pieces.items()}
    tensors["mask"] = np.packbits(state.mask.bits)
    facts = {
        "format": CHECKPOINT_FORMAT,
        "round": state.server_round,
        "ranks": list(state.mask.ranks),
        "delta": delta,
        "holdings": {key: [holding.version, list(holding.digests)] for key, holding in state.holdings.items()},
        "clients": state.clients,
        "examples": state.examples,
        "unfit": state.unfit,
        "norms": state.norms,
        "bytes-total": state.bytes_total,
        "failed-rounds": state.failed_rounds,
        "strikes": state.strikes,
        "secret": state.secret,
        "owners": state.owners,
        "best": state.best,
        "stopping": state.stopping,
        "solved": state.solved,
    }
    return tensors, facts


def decode(spec: ModelSpec, tensors: Tensors, facts: Mapping[str, Any]) -> ServerState:
    """The inverse of `encode`.

    Raises:
        BadCheckpoint: lengths are not those of this model.
    """
    ranks = tuple(facts["ranks"])
    if len(ranks) != len(spec.modules):
        raise BadCheckpoint(f"it has {len(ranks)} modules, the model has {len(spec.modules)}")
    mask = RankMask(ranks, np.unpackbits(tensors["mask"], count=sum(ranks)).astype(bool))
    arrays = {name.partition(".")[2]: array for name, array in tensors.items() if name.startswith("arrays.")}
    for part, vector in arrays.items():
        try:  # of the backbone a run may train drawn entries alone, whose number is the method's
            expected = spec.length(part, mask) if part != "backbone" else len(vector)
        except ValueError as error:
            raise BadCheckpoint(str(error)) from None
        if vector.shape != (expected,):
            raise BadCheckpoint(f"{part} has shape {vector.shape}, this model needs ({expected},)")
    pieces = {name.partition(".")[2]: array for name, array in tensors.items() if name.startswith("delta.")}
    return ServerState(
        arrays=arrays,
        mask=mask,
        delta=DeltaLog.restored(spec, pieces, facts["delta"]),
        holdings={key: Holding(version, tuple(digests)) for key, (version, digests) in facts["holdings"].items()},
        clients=facts["clients"],
        examples=facts["examples"],
        unfit=facts["unfit"],
        norms=facts["norms"],
        server_round=facts["round"],
        bytes_total=facts["bytes-total"],
        failed_rounds=facts["failed-rounds"],
        strikes=facts["strikes"],
        secret=facts["secret"],
        owners=facts["owners"],
        best=facts["best"],
        stopping=facts.get("stopping", {}),  # which earlier versions did not write
        solved=facts["solved"],
    )
