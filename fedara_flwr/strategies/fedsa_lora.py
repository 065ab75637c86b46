"""`fedsa-lora` (FedSA-LoRA, arXiv 2410.01463): A is averaged, each client's B stays with it.

Stated by the paper: both factors are trained, only A is shared; what a client uses is the shared A with its own B.
This project's reading: the head is shared like A; a client's B starts at 0 and is kept in the node's store. Clients evaluate
with their own B (`data.client-validation`). The server has none: in the last round B is sent, too, and the mean of that
round's B is the global model that it tests and exports. Before, its own figures are those of B = 0, or of an earlier end's B.
"""

import logging
from dataclasses import replace

from fedara_flwr.model.deltas import Weights
from fedara_flwr.strategies.base import Client, State
from fedara_flwr.strategies.fedlora import FedLoRA
from fedara_flwr.strategies.registry import register
from fedara_flwr.wire.plan import TrainPlan

logger = logging.getLogger(__name__)


@register
class FedSALoRA(FedLoRA):
    """FedLoRA in which each client keeps its own B."""

    name = "fedsa-lora"
    title = "LoRA, A averaged and B kept by each client; at the end the mean B"
    paper = "arXiv 2410.01463"
    kept = frozenset({"B"})

    def plan(self, state: State, client: Client) -> TrainPlan:
        """B starts from what the client kept, or 0; it is sent in the last round alone."""
        plan = super().plan(state, client)
        last = plan.server_round >= self.settings.num_server_rounds
        return replace(plan, drawn=plan.kept, sent=plan.sent | plan.kept if last else plan.sent)

    def exported(self, state: State) -> Weights:
        """The mean B of the last round; before it there is none, which is said."""
        if not state.arrays["B"].any():
            logger.warning("fedsa-lora: clients send B in the last round, which was not reached: these adapters change nothing")
        return super().exported(state)
