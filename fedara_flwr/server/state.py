"""All of the server's state that must survive a crash; random streams derive from the seed, so none is here."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedara_flwr.ranks import RankMask
from fedara_flwr.spec import Arrays


@dataclass
class ServerState:
    """State after `server_round` rounds.

    Attributes:
        arrays: the global model, packed under `mask`.
        mask: the global rank mask.
        bytes_total: bytes by "direction.part" since round 1.
        failed_rounds: rounds in a row that had too few good replies.
    """

    arrays: Arrays
    mask: RankMask
    server_round: int = 0
    bytes_total: dict[str, int] = field(default_factory=dict)
    failed_rounds: int = 0
