"""All of the server's state that must survive a crash; random streams derive from the seed, so none is here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fedara_flwr.model.deltas import Holding
from fedara_flwr.strategies.base import State


@dataclass
class ServerState(State):
    """What the method changes (State), and what the loop remembers beside it.

    Attributes:
        holdings: which of the delta's pieces each client has.
        examples: how many examples each client that can train declared.
        unfit: clients that cannot, and why.
        norms: how far updates that counted moved, by part (merging/norms.py).
        bytes_total: bytes by "direction.part" since round 1.
        failed_rounds: rounds in a row that had too few good replies.
        strikes: failures in a row by client (server/strikes.py).
        secret: what real nodes are drawn by; owners: by client key, as what its node is registered (server/roster.py).
        best: `round` and main metric's `value` of the best round so far (server/best.py); {} before one was measured.
        stopping: for early stopping (server/stopping.py): `best` value, its `round`, `evaluations` since the last gain.
    """

    holdings: dict[str, Holding] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)
    norms: dict[str, list[float]] = field(default_factory=dict)
    bytes_total: dict[str, int] = field(default_factory=dict)
    failed_rounds: int = 0
    strikes: dict[str, list[Any]] = field(default_factory=dict)
    secret: int = 0
    owners: dict[str, str] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    stopping: dict[str, Any] = field(default_factory=dict)
