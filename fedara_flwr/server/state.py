"""All of the server's state that must survive a crash; random streams derive from the seed, so none is here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fedara_flwr.model.deltas import DeltaLog, Holding
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import Arrays


@dataclass
class ServerState:
    """State after `server_round` rounds.

    Attributes:
        arrays: the global model, packed under `mask`.
        mask: the global rank mask.
        delta: what has been added to the backbone.
        holdings: which of the delta's pieces each client has.
        clients: what the method remembers of each client, numbers and lists of numbers by name.
        examples: how many examples each client that can train declared.
        unfit: clients that cannot, and why.
        norms: how far updates that counted moved, by part (server/norms).
        bytes_total: bytes by "direction.part" since round 1.
        failed_rounds: rounds in a row that had too few good replies.
    """

    arrays: Arrays
    mask: RankMask
    delta: DeltaLog
    holdings: dict[str, Holding] = field(default_factory=dict)
    clients: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)
    norms: dict[str, list[float]] = field(default_factory=dict)
    server_round: int = 0
    bytes_total: dict[str, int] = field(default_factory=dict)
    failed_rounds: int = 0
