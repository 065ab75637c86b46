"""Messages to clients: a plan with what travels filled in, the arrays in the wire's format, and pieces that a node lacks."""

from __future__ import annotations

import logging
from dataclasses import replace

from flwr.app import Message, RecordDict

from fedara_flwr.config import Settings
from fedara_flwr.model.deltas import Holding
from fedara_flwr.model.parts import is_slot_part
from fedara_flwr.model.spec import ModelSpec
from fedara_flwr.server.roster import Node
from fedara_flwr.server.state import ServerState
from fedara_flwr.wire.codec import Broadcast
from fedara_flwr.wire.meter import ByteMeter
from fedara_flwr.wire.plan import TrainPlan
from fedara_flwr.wire.records import lacks_delta, plan_to_content

logger = logging.getLogger(__name__)


class Dispatch:
    """Packs what one round, or one evaluation, sends.

    Args:
        remade: parts of which nodes keep no rounding error.
        run_id: the name under which nodes keep things of this run: no other run may have it.
    """

    def __init__(self, settings: Settings, spec: ModelSpec, remade: frozenset[str], run_id: str, meter: ByteMeter) -> None:
        self._settings, self._spec, self._remade, self._run_id, self._meter = settings, spec, remade, run_id, meter
        self.broadcast = Broadcast(spec)

    def pack(self, state: ServerState, plan: TrainPlan, have: Holding) -> tuple[TrainPlan, RecordDict]:
        """The whole plan, and its message's content for a node that has the pieces `have` of the delta."""
        there, pieces = state.delta.fetch(have)
        slots = plan.mask.count > 0
        carries = frozenset(p for p in state.arrays if p not in plan.drawn and (slots or not is_slot_part(p)))
        feedback = plan.sent - self._remade if self._settings.wire.feedback else frozenset()
        run = self._run_id if feedback or plan.kept else ""
        plan = replace(plan, carries=carries, delta=there.digests, feedback=feedback, run=run)
        sliced = self._spec.slice(state.arrays, state.mask, plan.mask)
        return plan, plan_to_content(plan, self.broadcast.encode(plan, {part: sliced[part] for part in carries}), pieces)

    def message(self, content: RecordDict, node: Node, kind: str) -> Message:
        """A message of this kind to a node; it expires with the round."""
        return Message(content, node.node_id, kind, ttl=self._settings.strategy.round_timeout)

    def again(
        self, state: ServerState, node: Node, plan: TrainPlan, message: Message, reply: Message
    ) -> tuple[TrainPlan, Message] | None:
        """A second message for a node that lost pieces of the delta: the plan with all of them; None for any other reply."""
        if reply.has_error() or reply.metadata.src_node_id != node.node_id or not lacks_delta(reply.content, plan):
            return None
        self._meter.count("up", reply.content)
        state.holdings.pop(node.key, None)
        logger.info("client %s lacks pieces of the delta: they are sent again", node.key)
        plan, content = self.pack(state, plan, Holding())
        return plan, self.message(content, node, message.metadata.message_type)
