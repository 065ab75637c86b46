"""What clients make of a model on rows of their own: EVALUATE to every node that was ready, and the means of the replies."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import Message, MessageType, MetricRecord
from flwr.serverapp import Grid

from fedara_flwr.config import Settings
from fedara_flwr.model.deltas import Holding
from fedara_flwr.model.draws import draw
from fedara_flwr.model.spec import ModelSpec
from fedara_flwr.server.dispatch import Dispatch
from fedara_flwr.server.lines import client_means
from fedara_flwr.server.messages import replies
from fedara_flwr.server.roster import Node
from fedara_flwr.server.round import Line
from fedara_flwr.server.state import ServerState
from fedara_flwr.server.told import last_line, listed, most_held_out, text
from fedara_flwr.wire.arrays import Rejected
from fedara_flwr.wire.meter import ByteMeter
from fedara_flwr.wire.plan import TrainPlan
from fedara_flwr.wire.records import MAX_EXAMPLES, check_metrics

logger = logging.getLogger(__name__)


@dataclass
class _Asked:
    node: Node
    plan: TrainPlan
    message: Message
    examples: int


class Evaluation:
    """One evaluation by clients."""

    def __init__(self, settings: Settings, spec: ModelSpec, state: ServerState, dispatch: Dispatch, meter: ByteMeter) -> None:
        self._settings, self._spec, self._state, self._dispatch, self._meter = settings, spec, state, dispatch, meter
        self._asked: list[_Asked] = []
        self._good: dict[str, Line] = {}

    def ask(self, node: Node, plan: TrainPlan, examples: int) -> Message:
        """The message to a node that declared so many examples: the global model as it is, by the plan of its last round.

        It is sent whole, and drawn only where the draw is what the model holds.
        """
        state = self._state
        plan = replace(plan, mask=state.mask, sent=frozenset(), report=frozenset())
        drawn = draw(self._spec, state.mask, plan.drawn, plan.draw_seed, plan.entries)
        same = (p for p in drawn if p in state.arrays and np.array_equal(drawn[p], state.arrays[p]))
        plan = replace(plan, drawn=frozenset(same))
        plan, content = self._dispatch.pack(state, plan, state.holdings.get(node.key, Holding()))
        self._meter.count("down", content)
        self._asked.append(_Asked(node, plan, self._dispatch.message(content, node, MessageType.EVALUATE), examples))
        return self._asked[-1].message

    def receive(self, grid: Grid) -> Iterator[Message]:
        """Send the messages and give the replies as they come, until the round's deadline."""
        strategy = self._settings.strategy

        def again(index: int, reply: Message) -> Message | None:
            asked = self._asked[index]
            more = self._dispatch.again(self._state, asked.node, asked.plan, asked.message, reply)
            if more is None:
                return None
            self._meter.count("down", more[1].content)
            asked.plan, asked.message = more
            return more[1]

        messages = [asked.message for asked in self._asked]
        exchange = replies(
            grid,
            messages,
            strategy.round_timeout,
            again,
            lambda: len(self._good) >= strategy.replies_enough(len(messages)),
            strategy.straggler_timeout,
            "evaluation by clients",
        )
        for index, reply in exchange:
            node = self._asked[index].node
            if isinstance(reply, Exception):
                logger.warning("evaluation of client %s left out: unreadable (%s)", node.key, type(reply).__name__)
            elif reply.metadata.src_node_id != node.node_id:
                logger.warning("evaluation of client %s left out: answered by node %d", node.key, reply.metadata.src_node_id)
            else:
                yield reply

    def means(self, messages: Iterable[Message]) -> MetricRecord | None:
        """Means of the replies, weighted by held-out examples, as `client-eval-…`; a bad reply is left out."""
        by_node, good = {asked.node.node_id: asked for asked in self._asked}, self._good
        for reply in messages:
            asked = by_node.get(reply.metadata.src_node_id)
            if asked is None or asked.node.key in good:
                continue
            try:
                good[asked.node.key] = self._check(asked, reply)
            except Exception as error:  # no reply may end a run, whatever it does to the checks themselves
                logger.warning("evaluation of client %s left out: %s", asked.node.key, text(str(error)))
        if not good:
            return None
        means = client_means(list(good.values()), self._settings.strategy.weight_cap)
        return MetricRecord({**means, "clients": len(good)})

    def _check(self, asked: _Asked, reply: Message) -> Line:
        if reply.has_error():
            raise Rejected(f"error-{reply.error.code}", last_line(reply.error.reason))
        self._meter.count("up", reply.content)
        metrics = reply.content.metric_records.get("metrics", MetricRecord())
        count = check_metrics(metrics, "eval-examples", MAX_EXAMPLES)
        most = most_held_out(asked.examples, self._settings.data.client_validation)
        figures = {name: value for name, value in listed(asked.node.key, metrics).items() if name.startswith("eval-")}
        return {**figures, "eval-examples": min(count, most)}
