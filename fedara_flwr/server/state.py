"""All of the server's state that must survive a crash; random streams derive from the seed, so none is here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from fedara_flwr.model.deltas import Holding
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import Arrays, ModelSpec
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
        average: mean of the arrays of the last rounds, packed under `mask`; {} where there is none.
    """

    holdings: dict[str, Holding] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)
    norms: dict[str, list[float]] = field(default_factory=dict)
    bytes_total: dict[str, int] = field(default_factory=dict)
    failed_rounds: int = 0
    average: Arrays = field(default_factory=dict)

    def shown(self) -> ServerState:
        """The state whose arrays are evaluated and exported: the average where there is one."""
        return replace(self, arrays=self.average) if self.average else self

    def take_average(self, spec: ModelSpec, share: float, mask: RankMask, version: int) -> None:
        """Move the average on to this round's arrays; where these are of another model than the last ones, begin anew.

        Args:
            share: of the average so far in the new one.
            mask: the global mask before this round.
            version: of the delta before this round: what it adds is of the model, too.
        """
        if not share:
            self.average = {}
            return
        former = spec.slice(self.average, mask, self.mask)
        if former.keys() != self.arrays.keys() or version != self.delta.version:
            former = self.arrays
        mixed = {part: share * former[part] + (1 - share) * values for part, values in self.arrays.items()}
        self.average = {part: values.astype(np.float32) for part, values in mixed.items()}
