"""`rolora` (RoLoRA, arXiv 2409.02346): A and B are trained and sent in turn, so that averaging is exact at half the upload.

Stated by the paper: in one round only one factor is trained and averaged, the other is frozen and the same everywhere; then
they change roles. This project's reading: B first, since A has no gradient while B = 0; both factors go down in every round,
since a client that is not drawn each time has not got what the others made of the frozen one.
"""

from dataclasses import replace

from fedara_flwr.strategies.base import Client, State
from fedara_flwr.strategies.fedlora import FedLoRA
from fedara_flwr.strategies.registry import register
from fedara_flwr.wire.plan import TrainPlan


@register
class RoLoRA(FedLoRA):
    """FedLoRA that trains one factor at a time."""

    name = "rolora"
    title = "LoRA, A and B trained in turn: averaging is exact, half is sent back"
    paper = "arXiv 2409.02346"

    def plan(self, state: State, client: Client) -> TrainPlan:
        """B in rounds 1, 3, …, A in the others; the head in all."""
        plan = super().plan(state, client)
        return replace(plan, sent=plan.sent - {"A" if plan.server_round % 2 else "B"})
