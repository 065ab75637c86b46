"""One round's replies: checked as they come, merged in the round's order as the gaps close."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from flwr.app import Message

from fedara_flwr.config import Settings, StrategySettings
from fedara_flwr.merging.merger import Merger
from fedara_flwr.merging.norms import Norms, Sizes, reach
from fedara_flwr.merging.private import PrivateMean
from fedara_flwr.merging.robust import RULES
from fedara_flwr.model.difference import difference, peaks, root_mean_squares
from fedara_flwr.model.parts import declared
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import Arrays, ModelSpec
from fedara_flwr.server.roster import Node, Roster
from fedara_flwr.server.told import actor_died, last_line, listed, most_held_out
from fedara_flwr.strategies.base import Client, Method, Reply, State
from fedara_flwr.wire.arrays import Rejected
from fedara_flwr.wire.figures import EXAMPLES
from fedara_flwr.wire.meter import ByteMeter
from fedara_flwr.wire.plan import TrainPlan, Update
from fedara_flwr.wire.records import lacks_delta, says_busy, update_from_content

logger = logging.getLogger(__name__)
Line = dict[str, object]
ACTOR_DIED, BUSY = "actor-died", "busy"


@dataclass(frozen=True)
class Drop:
    """A reply that did not count, and why."""

    client: str
    reason: str
    detail: str


def weight_cap(cap: float, weights: Sequence[int]) -> float:
    """The most that one client may weigh: `cap` times the median of the round's clients; 0 = any."""
    if not cap or not weights:
        return math.inf
    return max(1.0, cap * statistics.median_low(weights))


def merger_of(method: Method, state: State, settings: Settings, plans: Sequence[TrainPlan], planned: int) -> Merger:
    """What merges a round that meant to ask `planned` clients: the method's own, or the run's rule.

    That is `strategy.robust`, or PrivateMean with `privacy.clip`.
    """
    strategy, privacy, spec = settings.strategy, settings.privacy, method.spec
    own = method.merger(state)
    if (own is not None) != method.own_merger:
        raise TypeError(f"method {method.name!r}: own_merger is {method.own_merger}, its merger says otherwise")
    if own is not None:
        return own
    if privacy.on:
        sent = frozenset[str]().union(*(plan.sent for plan in plans))
        return PrivateMean(spec, state.mask, state.arrays, sent, privacy.clip, privacy.noise_multiplier, planned)
    return RULES[strategy.robust](spec, state.mask, state.arrays, strategy.attackers)


@dataclass
class Round:
    """The work of one round from sampling to the last reply.

    Attributes:
        asked: nodes in the round's order: those with more to do first, equal ones as they were drawn; `plans` and `messages`
            go with them.
        limits: examples that each node declared first; weights: what it weighs with all of them.
        norms: judges how far an update may move; `start` gives the values that it started from, under its mask.
        client: what the method may know of a node; `read` is its reading of terms' reports.
        coding: what the arrays that were sent lost in their format.
        cap: the largest weight that one client may have.
        quorum: good replies that are enough; `closing` once they are there and the others are not waited for much longer.
        held_out: `data.client-validation`.
        rates: learning rates over those of the first round.
        private: of a reply nothing is used or written but its arrays and whether it counted.
        sitting: clients that sit out (server/strikes.py).
        down: bytes sent to each client, by part.
        cut: what was cut of updates that counted, by client, in words.
        answered: clients whose updates counted; `replies`, what the method sees of them, none in a private run.
        merging: what the merger reports of itself.
        began: when the messages were pushed, by the monotonic clock.
    """

    number: int
    spec: ModelSpec
    asked: list[Node]
    plans: list[TrainPlan]
    messages: list[Message]
    limits: dict[str, int]
    meter: ByteMeter
    weights: dict[str, int]
    norms: Norms
    start: Callable[[TrainPlan, RankMask], Arrays]
    client: Callable[[Node], Client]
    read: Callable[[TrainPlan, str, bytes], Any]
    cap: float = math.inf
    quorum: int = 0
    closing: bool = False
    held_out: float = 0.0
    rates: float = 1.0
    private: bool = False
    sitting: list[str] = field(default_factory=list)
    coding: Line = field(default_factory=dict)
    down: list[dict[str, int]] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    records: list[Line] = field(default_factory=list)
    sizes: list[Sizes] = field(default_factory=list)
    merging: Line = field(default_factory=dict)
    cut: dict[str, list[str]] = field(default_factory=dict)
    answered: list[str] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    _results: dict[int, tuple[Update, Line] | None] = field(default_factory=dict)
    _next: int = 0
    _held: list[tuple[Node, TrainPlan, Update, Line, Sizes, Sizes]] = field(default_factory=list)

    @property
    def good(self) -> int:
        """How many replies counted."""
        return len(self.answered)

    def collect(self, replies: Iterable[Message], merger: Merger) -> None:
        """Feed every good update to `merger`, in the round's order, whatever order the replies come in.

        While there is no history to judge lengths by, updates are held until the last one is there.
        """
        by_message: dict[str, int] = {}
        for reply in replies:
            if reply.metadata.reply_to_message_id not in by_message:
                # ids are set when the messages are sent, which a lazy iterable does at its first reply; one may be sent again
                by_message = {message.metadata.message_id: i for i, message in enumerate(self.messages)}
            index = by_message.get(reply.metadata.reply_to_message_id)
            if index is None:
                self._drop(f"node {reply.metadata.src_node_id}", "not-asked", "a reply to no message of this round")
                continue
            if index in self._results or index < self._next:
                self._drop(self.asked[index].key, "duplicate", "a second reply in one round")
                continue
            try:
                self._results[index] = self._check(index, reply)
            except Exception as error:  # no reply may end a run, whatever it does to the checks themselves
                self.refuse(index, "unreadable", f"{type(error).__name__}: {str(error)[:200]}")
            self._feed(merger)
        late = ("straggler", "no reply soon after the quorum") if self.closing else ("timeout", "no reply before the deadline")
        for index in range(self._next, len(self.asked)):
            if index not in self._results:
                self._drop(self.asked[index].key, *late)
                self._results[index] = None
        self._feed(merger)
        beside = [moved for *_, moved, _ in self._held]
        for held in self._held:
            self._judge(*held, beside, merger)
        self._held.clear()
        self.norms.learn(self.sizes)
        place = {node.key: i for i, node in enumerate(self.asked)}
        self.records.sort(key=lambda record: place[str(record["client"])])
        self.drops.sort(key=lambda drop: (place.get(drop.client, len(place)), drop.client, drop.reason))

    def enough(self) -> bool:
        """Whether the quorum has replied, by what the checks alone say."""
        passed = self.good + len(self._held) + sum(result is not None for result in self._results.values())
        self.closing = self.closing or passed >= self.quorum
        return self.closing

    def failures(self) -> list[tuple[str, str]]:
        """(client, reason) of each asked client whose reply did not count by its own fault."""
        asked = {node.key for node in self.asked}
        return [(drop.client, drop.reason) for drop in self.drops if drop.client in asked and drop.reason != BUSY]

    def refuse(self, index: int, reason: str, detail: str) -> None:
        """Drop a reply that does not reach `collect`: Flower could not read or deliver it, or it is forged."""
        self._drop(self.asked[index].key, reason, detail)
        self._results[index] = None

    def drop_busy(self, busy: Mapping[str, str]) -> None:
        """Drop clients that were drawn and said why they do not train now, before anything was sent to them."""
        for client, why in busy.items():
            self._drop(client, BUSY, why)

    def failure(self, roster: Roster, failed_rounds: int, strategy: StrategySettings, rounds: int) -> str:
        """Why the run cannot go on after this round, or is none after all its `rounds`; '' where it can."""
        if any(drop.reason == ACTOR_DIED for drop in self.drops):
            return (
                "a client process of the simulation died (out of memory?); Flower keeps giving it messages, and all fail. "
                "All rounds so far are kept: `fedara run --resume`, with fewer clients at a time"
            )
        if roster.nodes and roster.nodes.keys() <= roster.unfit.keys():
            client, reason = next(iter(roster.unfit.items()))
            return f"no node can train; client {client}: {reason}"
        if failed_rounds >= strategy.max_failed_rounds:
            return (
                f"{failed_rounds} rounds in a row had fewer than strategy.min-replies = "
                f"{strategy.min_replies} good replies (strategy.max-failed-rounds)"
            )
        if failed_rounds >= rounds:
            return (
                f"none of {rounds} rounds had strategy.min-replies = {strategy.min_replies} good replies: they taught nothing"
            )
        return ""

    def _feed(self, merger: Merger) -> None:
        while self._next in self._results:
            checked, node, plan = self._results.pop(self._next), self.asked[self._next], self.plans[self._next]
            self._next += 1
            if checked is None:
                continue
            update, record = checked
            moved, largest = self._moved(plan, update)
            if self.norms.known(moved):
                self._judge(node, plan, update, record, moved, largest, (), merger)
            else:
                self._held.append((node, plan, update, record, moved, largest))

    def _moved(self, plan: TrainPlan, update: Update) -> tuple[Sizes, Sizes]:
        """How far an update moved, by part: root mean square, and the largest single change."""
        if not self.norms.bound:
            return {}, {}
        moved = difference(update.arrays, self.start(plan, update.mask))
        return root_mean_squares(moved), peaks(moved)

    def _within_reach(
        self, node: Node, plan: TrainPlan, update: Update, moved: Sizes, largest: Sizes, beside: Sequence[Sizes]
    ) -> tuple[Update, Sizes]:
        """The update with no number further than its steps reach, and how far it then moved."""
        far = reach(plan, self.limits[node.key], self.rates)
        if all(size <= far.get(part, math.inf) for part, size in largest.items()):
            return update, moved
        arrays, said = self.norms.cut(update.arrays, self.start(plan, update.mask), far, beside)
        if not said:
            return update, moved
        self.cut[node.key] = said
        logger.warning("round %d: update of client %s cut: %s", self.number, node.key, "; ".join(said))
        update = replace(update, arrays=arrays)
        return update, self._moved(plan, update)[0]

    def _judge(
        self,
        node: Node,
        plan: TrainPlan,
        update: Update,
        record: Line,
        moved: Sizes,
        largest: Sizes,
        beside: Sequence[Sizes],
        merger: Merger,
    ) -> None:
        """Let an update count, no number of it further than steps reach, unless all of it moved too far."""
        step = {name: part.rate(plan.train) for name, part in declared().items() if name in moved}
        if excess := self.norms.excess(moved, beside, step):
            self._drop(node.key, "norm", excess)
            return
        update, moved = self._within_reach(node, plan, update, moved, largest, beside)
        weight = int(min(max(1, self.weights[node.key] * update.num_examples // self.limits[node.key]), self.cap))
        self.answered.append(node.key)
        self.records.append(record)
        self.sizes.append(moved)
        merger.add(node.key, update, weight)
        if not self.private:  # a private update is for the merger alone
            self.replies.append(Reply(self.client(node), weight, update.mask, update.metrics, update.reports))

    def _check(self, index: int, reply: Message) -> tuple[Update, Line] | None:
        node, plan = self.asked[index], self.plans[index]
        if reply.has_error():
            detail = last_line(reply.error.reason)
            # a process of the simulation died, and Flower gives every later message to it, too; a device's words are its own
            died = node.simulated and reply.error.code == 0 and actor_died(reply.error.reason)
            self._drop(node.key, ACTOR_DIED if died else f"error-{reply.error.code}", detail)
            return None
        if reply.metadata.src_node_id != node.node_id:
            self._drop(node.key, "sender", f"answered by node {reply.metadata.src_node_id}, asked was {node.node_id}")
            return None
        up = dict(self.meter.count("up", reply.content))
        if why := says_busy(reply.content):
            self._drop(node.key, BUSY, why)
            return None
        if lacks_delta(reply.content, plan):
            self._drop(node.key, "delta", "the node still lacks pieces of the delta")
            return None
        try:
            limit, start = self.limits[node.key], partial(self.start, plan)
            update = update_from_content(reply.content, self.spec, plan, limit, start, self.read)
            # measured here; what a client says under that name does not count
            figures = {**listed(node.key, update.metrics), "seconds-elapsed": time.monotonic() - self.began}
            if EXAMPLES in figures:
                figures[EXAMPLES] = float(min(figures[EXAMPLES], most_held_out(limit, self.held_out)))
            update = replace(update, metrics=figures)
        except Rejected as error:
            self._drop(node.key, error.reason, str(error))
            return None
        said: Line = {**update.metrics, "num-examples": update.num_examples}
        if self.private:
            update, said = replace(update, num_examples=1, metrics={}), {}
        return update, {
            **said,  # first: a client's names cannot replace ours
            "type": "client",
            "round": self.number,
            "client": node.key,
            "bytes-down": self.down[index],
            "bytes-up": up,
        }

    def _drop(self, client: str, reason: str, detail: str) -> None:
        detail = "not told: the run is private" if self.private else detail
        logger.warning("round %d: reply of client %s dropped: %s (%s)", self.number, client, reason, detail)
        self.drops.append(Drop(client, reason, detail))
