"""`full`: every parameter of backbone and head is trained and averaged (FedAvg, arXiv 1602.05629). The end of the scale.

The backbone travels as differences from the pre-trained values, all of it both ways: 4 bytes per parameter, client, round and
direction (91 MB for MiniLM), except that nothing of it goes down in round 1, when they are zero.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import Arrays
from fedara_flwr.strategies.base import Client, Method, State
from fedara_flwr.strategies.registry import register
from fedara_flwr.wire.plan import TrainPlan


@register
class Full(Method):
    """No module has a slot; the backbone is a part like any other."""

    name = "full"
    title = "full fine-tuning: every parameter, FedAvg"
    paper = "arXiv 1602.05629"
    learning_rate = 2e-4
    changes_backbone = True
    trained = frozenset({"backbone", "head"})

    def start_mask(self) -> RankMask:
        """No slot in any module: masks of length 0."""
        return RankMask.full([0] * len(self.spec.modules))

    def start_arrays(self, mask: RankMask) -> Arrays:
        """The head, and differences from the pre-trained backbone that are all 0."""
        return self.start_head() | {"backbone": np.zeros(self.spec.size("backbone"), dtype=np.float32)}

    def plan(self, state: State, client: Client) -> TrainPlan:
        """In round 1 the differences are zeros, which need not travel."""
        plan = super().plan(state, client)
        return plan if state.server_round else replace(plan, drawn=frozenset({"backbone"}))
