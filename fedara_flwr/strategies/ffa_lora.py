"""`ffa-lora` (FFA-LoRA, arXiv 2403.12313): A stays at its random start, only B is trained and sent, so averaging is exact.

Stated by the paper: A frozen at a shared random start, B = 0 and trained.
This project's reading: clients draw A from the run's seed, eight bytes, so that it never travels.
"""

from __future__ import annotations

from dataclasses import replace

from fedara_flwr.strategies.base import Client, State
from fedara_flwr.strategies.fedlora import FedLoRA
from fedara_flwr.strategies.registry import register
from fedara_flwr.wire.plan import TrainPlan


@register
class FFALoRA(FedLoRA):
    """FedLoRA without A in training and on the wire."""

    name = "ffa-lora"
    title = "LoRA with A frozen at its start: only B is trained and sent, averaging is exact"
    paper = "arXiv 2403.12313"
    trained = frozenset({"B", "head"})

    def plan(self, state: State, client: Client) -> TrainPlan:
        """A is neither trained nor carried: clients draw it from the run's seed."""
        return replace(super().plan(state, client), drawn=frozenset({"A"}), draw_seed=self.settings.seed)
