"""The rounds: Flower's Strategy on this project's hooks.

`configure_train` builds the messages, `aggregate_train` takes the replies; Flower's own `Strategy.start` can drive them.
`start` here adds what that lacks: a deadline per round, replies taken one by one, failed rounds counted, records written.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
import uuid
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedara_flwr.config import Settings
from fedara_flwr.merging.merger import Merger
from fedara_flwr.merging.norms import Norms
from fedara_flwr.model.deltas import Holding
from fedara_flwr.model.draws import draw
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import SLOT_PARTS, Arrays, ModelSpec
from fedara_flwr.server.fleet import Profile, assign, read_profiles
from fedara_flwr.server.lines import client_means, round_line, shared_metrics
from fedara_flwr.server.messages import replies as exchange
from fedara_flwr.server.progress import Progress
from fedara_flwr.server.roster import Expected, Node, Roster
from fedara_flwr.server.round import ACTOR_DIED, BUSY, Record, Round
from fedara_flwr.server.state import ServerState
from fedara_flwr.tasks import find as find_task
from fedara_flwr.wire.codec import Broadcast
from fedara_flwr.wire.meter import ByteMeter
from fedara_flwr.wire.plan import TrainPlan, Update
from fedara_flwr.wire.records import (
    MAX_EXAMPLES,
    Rejected,
    check_metrics,
    lacks_delta,
    plan_to_content,
    read_vector,
    to_record,
)

logger = logging.getLogger(__name__)
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class RunFailed(RuntimeError):
    """The run cannot go on; one line that says why."""


class RoundLoop(Strategy):
    """Samples, plans, sends, checks, merges, moves on to the next mask, records. What differs by method is a hook."""

    name: ClassVar[str] = ""
    state: ServerState

    def __init__(self, settings: Settings, spec: ModelSpec, expected: Expected, write: Callable[[Record], None]) -> None:
        self.settings, self.spec, self.write = settings, spec, write
        self.save: Callable[[ServerState], None] = lambda state: None
        self.meter = ByteMeter()
        asked = {**self.calibration, **({"changes-backbone": 1} if self.changes_backbone else {})}
        self.roster = Roster(settings.strategy, settings.seed, expected, self.meter, self.ready, asked)
        self.fleet = read_profiles(settings.fleet.profiles)
        self.planned = 0
        self.run_id = uuid.uuid4().hex  # nodes keep things under it: no other run may have it
        self._round: Round | None = None

    def profile(self, node: Node) -> Profile | None:
        """The device that a simulated node stands for, drawn by seed and client key; None for a real one."""
        return assign(self.fleet, self.settings.seed, node.key) if node.simulated else None

    # -- hooks ------------------------------------------------------------------------------------------------------
    calibration: ClassVar[Mapping[str, int]] = {}
    """Added to the question whether a node is ready; `calibrate-batch` and `calibrate-rank` ask for one timed batch."""

    changes_backbone: ClassVar[bool] = False
    """Whether the frozen weights change during the run, as quantised ones cannot: nodes that have such are left out."""

    remade: ClassVar[frozenset[str]] = frozenset()
    """Parts whose numbers mean something else after each round (fresh or split anew): nodes keep no rounding error of them."""

    @abstractmethod
    def ready(self, node: Node, metrics: Mapping[str, float]) -> None:
        """See what a node reports of itself when it is first drawn."""

    @abstractmethod
    def prepare(self, server_round: int, nodes: Sequence[Node]) -> None:
        """See all nodes of a round before the first plan is made."""

    @abstractmethod
    def finish_round(self, server_round: int) -> None:
        """Change the state once the round is merged: fresh values, what joins the delta."""

    @abstractmethod
    def plan(self, server_round: int, client_key: str) -> TrainPlan:
        """One client's orders."""

    @abstractmethod
    def merger(self) -> Merger:
        """What merges this round's updates into `state.arrays`."""

    @abstractmethod
    def take(self, client_key: str, update: Update, weight: int) -> None:
        """See one good update, in sampling order, beside the merger (votes, capacities)."""

    @abstractmethod
    def leave_out(self, client_key: str) -> None:
        """Forget what `take` saw of a client whose update the merger left out."""

    @abstractmethod
    def next_mask(self, server_round: int) -> RankMask:
        """The global mask after this round; must be covered by the present one."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Metrics of the present global model on the server's validation data."""

    # -- Flower's Strategy ------------------------------------------------------------------------------------------
    def initial_arrays(self) -> ArrayRecord:
        """The start as Flower wants it."""
        return to_record(self.state.arrays)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Sample, plan and build one message per client; `arrays` is the global model under `state.mask`."""
        state = self.state
        lengths = {part: len(vector) for part, vector in state.arrays.items()}
        state.arrays = {part: read_vector(array, lengths[part], part) for part, array in arrays.items()}
        if server_round == 1 or not self.roster.nodes:
            self.roster.wait(grid)
        else:
            self.roster.refresh(grid)
        self.planned = self.roster.count()
        asked = self.roster.sample(grid, server_round, self.planned)
        self.prepare(server_round, asked)
        plans = [self.plan(server_round, node.key) for node in asked]
        # longest first: where fewer train at a time than there are, the last to begin should not be the last to end
        effort = [plan.work(self.spec, self.roster.examples[node.key]) for node, plan in zip(asked, plans, strict=True)]
        order = sorted(range(len(asked)), key=lambda index: -effort[index])
        asked, plans = [asked[index] for index in order], [plans[index] for index in order]
        self._broadcast = Broadcast(self.spec)
        private = self.settings.privacy.on  # a bound on lengths would tell of them, and every update is cut anyway
        work = Round(
            server_round,
            self.spec,
            asked,
            plans,
            [],
            self.roster.examples,
            self.meter,
            self.settings.strategy.weighting,
            Norms(0.0 if private else self.settings.strategy.norm_bound, state.norms),
            self._start(),
            self._weight_cap(asked),
            private,
        )
        work.stand_out(self.roster.busy)
        for index, node in enumerate(asked):
            plans[index], content = self._pack(node, plans[index], self._held_by(node))
            work.down.append(dict(self.meter.count("down", content)))
            work.messages.append(self._message(content, node, MessageType.TRAIN))
        work.coding = self._broadcast.report()
        self._round = work
        return work.messages

    def _start(self) -> Callable[[TrainPlan, RankMask], Arrays]:
        """The values that this round's updates start from, unrounded, under any mask that the global one covers."""
        arrays, mask = self.state.arrays, self.state.mask
        return lambda plan, sub: plan.start(self.spec, arrays, mask, sub)

    def _weight_cap(self, asked: Sequence[Node]) -> float:
        """The most examples that one client may weigh: a multiple of the median that the round's clients declared."""
        cap = self.settings.strategy.weight_cap
        if not cap or not asked:
            return math.inf
        return max(1.0, cap * statistics.median_low([self.roster.examples[node.key] for node in asked]))

    def _held_by(self, node: Node) -> Holding:
        return self.state.holdings.get(node.key, Holding())

    def _message(self, content: RecordDict, node: Node, kind: str) -> Message:
        return Message(content, node.node_id, kind, ttl=self.settings.strategy.round_timeout)

    def _pack(self, node: Node, plan: TrainPlan, have: Holding) -> tuple[TrainPlan, RecordDict]:
        """The plan with what travels filled in, and its message: values under its mask, and the pieces that the node lacks."""
        state = self.state
        there, pieces = state.delta.fetch(have)
        slots = plan.mask.count > 0
        carries = frozenset(p for p in state.arrays if p not in plan.drawn and (slots or p not in SLOT_PARTS))
        feedback = plan.trainable - self.remade if self.settings.wire.feedback else frozenset()
        run = self.run_id if feedback else ""
        plan = replace(plan, carries=carries, delta=there.digests, feedback=feedback, run=run)
        sliced = self.spec.slice(state.arrays, state.mask, plan.mask)
        return plan, plan_to_content(plan, self._broadcast.encode(plan, {part: sliced[part] for part in carries}), pieces)

    def _again(self, node: Node, plan: TrainPlan, message: Message, reply: Message) -> tuple[TrainPlan, Message] | None:
        """A second message for a node that lost pieces of the delta: the plan with all of them; None for any other reply."""
        if reply.has_error() or reply.metadata.src_node_id != node.node_id or not lacks_delta(reply.content, plan):
            return None
        self.meter.count("up", reply.content)
        self.state.holdings.pop(node.key, None)
        logger.info("client %s lacks pieces of the delta: they are sent again", node.key)
        plan, content = self._pack(node, plan, Holding())
        return plan, self._message(content, node, message.metadata.message_type)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check and merge the replies, then move on to the next mask. Too few good ones leave the model as it was."""
        state, work = self.state, self._round
        assert work is not None, "aggregate_train before configure_train"
        merger = self.merger()
        # a private update is for the merger alone
        work.collect(replies, merger, self.take if not work.private else lambda client_key, update, weight: None)
        for drop in work.drops:
            if drop.reason.startswith("error-") or drop.reason == BUSY:
                self.roster.forget(drop.client)
            elif drop.reason == "delta":
                state.holdings.pop(drop.client, None)
        for node, plan in zip(work.asked, work.plans, strict=True):
            if node.key in work.answered and plan.delta:
                state.holdings[node.key] = Holding(state.delta.version, plan.delta)
        state.server_round = server_round
        if work.good < self.settings.strategy.min_replies:
            state.failed_rounds += 1
            logger.warning("round %d: %d good replies, the model stays as it was", server_round, work.good)
        else:
            state.failed_rounds = 0
            state.arrays = merger.result()
            for client_key in getattr(merger, "left_out", ()):
                self.leave_out(client_key)
            mask = self.next_mask(server_round)
            state.arrays, state.mask = self.spec.slice(state.arrays, state.mask, mask), mask
            self.finish_round(server_round)
            work.merging = merger.report()
        metrics = client_means(work.records)
        return to_record(state.arrays), MetricRecord(dict(metrics)) if metrics else None

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """After the last round, and with `data.client-validation`, every node that was ready evaluates the final model.

        In the rounds before, clients evaluate what they receive for training, without a message more.
        """
        settings, state = self.settings, self.state
        if not settings.data.client_validation or server_round < settings.num_server_rounds:
            return []
        ready = [node for key, node in self.roster.nodes.items() if key in self.roster.examples]
        ready.sort(key=lambda node: (len(node.key), node.key))
        self._evaluators, self._broadcast = [], Broadcast(self.spec)
        for node in ready:
            # the global model as it is: whole, and drawn only where the draw is what the model holds
            plan = replace(self.plan(server_round, node.key), mask=state.mask, trainable=frozenset(), report=frozenset())
            drawn = draw(self.spec, state.mask, plan.drawn, plan.draw_seed, plan.entries)
            same = (p for p in drawn if p in state.arrays and np.array_equal(drawn[p], state.arrays[p]))
            plan = replace(plan, drawn=frozenset(same))
            plan, content = self._pack(node, plan, self._held_by(node))
            self.meter.count("down", content)
            self._evaluators.append((node, plan, self._message(content, node, MessageType.EVALUATE)))
        return [message for *_, message in self._evaluators]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Means over clients, weighted by their held-out examples; a bad reply is left out."""
        good: list[tuple[int, dict[str, float]]] = []
        for reply in replies:
            try:
                if reply.has_error():
                    raise Rejected(f"error-{reply.error.code}", str(reply.error.reason)[-300:])
                self.meter.count("up", reply.content)
                metrics = reply.content.metric_records.get("metrics", MetricRecord())
                examples = check_metrics(metrics, "eval-examples", MAX_EXAMPLES)
                good.append((examples, {name: float(value) for name, value in metrics.items()}))  # type: ignore[arg-type]
            except Rejected as error:
                logger.warning("evaluation of node %d left out: %s", reply.metadata.src_node_id, error)
        if not good:
            return None
        total = sum(examples for examples, _ in good)
        # fsum: the last bits must not depend on the order of the replies
        names = shared_metrics([values for _, values in good])
        means = {name: math.fsum(k * values[name] for k, values in good) / total for name in names}
        summary: dict[str, Any] = {f"client-{name}": value for name, value in means.items()}
        return MetricRecord({**summary, "clients": len(good)})

    def restore(self, state: ServerState) -> None:
        """Go on from this state: `start` then begins with the round after it."""
        self.state = state
        self.meter.total = Counter(state.bytes_total)

    def _rejoin(self, grid: Grid) -> None:
        """Find the nodes again; what that costs is in the totals, and apart from every round."""
        state = self.state
        self.roster.wait(grid)
        self.roster.rejoin(grid, state.examples, state.unfit, state.holdings)
        state.bytes_total = dict(self.meter.total)
        self.write({"type": "resume", "round": state.server_round, "bytes": self.meter.take_round()})

    def summary(self) -> None:
        """Log what will happen."""
        mask = self.state.mask
        logger.info("%s: %d modules, %d slots, head of %d", self.name, len(mask.ranks), mask.count, self.spec.head_size)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run all rounds; Flower's signature. Without `evaluate_fn` the server's validation data is used.

        `write` gets a record of each round and client, `save` the state after each round.

        Raises:
            RunFailed: `max-failed-rounds` rounds in a row had too few good replies.
            TimeoutError: too few nodes came.
        """
        self.summary()
        result, arrays = Result(arrays=initial_arrays), initial_arrays
        evaluate = evaluate_fn or (lambda server_round, arrays: MetricRecord(dict(self.evaluate())))
        if self.state.server_round:
            self._rejoin(grid)
        else:
            self.write({"type": "start", **(self._evaluate(0, arrays, evaluate, result) or {})})
        progress = Progress(self.settings.num_server_rounds, find_task(self.settings.data.task).metric)
        for server_round in range(self.state.server_round + 1, num_rounds + 1):
            began = time.monotonic()
            self.configure_train(server_round, arrays, train_config or ConfigRecord(), grid)
            merged, metrics = self.aggregate_train(server_round, self._receive(grid, timeout))
            trained = time.monotonic()
            if metrics is not None:
                result.train_metrics_clientapp[server_round] = metrics
            arrays = result.arrays = merged if merged is not None else arrays
            evaluated = self._evaluate(server_round, arrays, evaluate, result)
            record = self._record(server_round, evaluated, trained - began, time.monotonic() - trained)
            self.save(self.state)
            logger.info("%s", progress.line(record))  # a round that is shown is kept
            if self._round is not None and any(drop.reason == ACTOR_DIED for drop in self._round.drops):
                raise RunFailed(
                    "a client process of the simulation died (out of memory?); Flower keeps giving it messages, and all fail. "
                    "All rounds so far are kept: `fedara run --resume`, with fewer clients at a time"
                )
            if not self._asked_any() and self.roster.unfit and not self.roster.busy:
                client, reason = next(iter(self.roster.unfit.items()))
                raise RunFailed(f"no node can train; client {client}: {reason}")
            if self.state.failed_rounds >= self.settings.strategy.max_failed_rounds:
                raise RunFailed(
                    f"{self.state.failed_rounds} rounds in a row had fewer than strategy.min-replies = "
                    f"{self.settings.strategy.min_replies} good replies (strategy.max-failed-rounds)"
                )
        self._evaluate_on_clients(grid, arrays, evaluate_config or ConfigRecord(), result)
        return result

    # -- the rest ---------------------------------------------------------------------------------------------------
    def _asked_any(self) -> bool:
        return self._round is not None and bool(self._round.asked)

    def _receive(self, grid: Grid, timeout: float) -> Iterator[Message]:
        """Replies of the present round as they come, until its deadline."""
        work = self._round
        assert work is not None
        limit = min(timeout, self.settings.strategy.round_timeout)

        def again(index: int, reply: Message) -> Message | None:
            more = self._again(work.asked[index], work.plans[index], work.messages[index], reply)
            if more is None:
                return None
            work.plans[index], work.messages[index] = more
            sent = Counter(work.down[index]) + self.meter.count("down", more[1].content)
            work.down[index] = dict(sent)
            return more[1]

        work.began = time.monotonic()
        for index, reply in exchange(grid, work.messages, limit, again):
            if isinstance(reply, Exception):
                work.refuse(index, "unreadable", f"{type(reply).__name__}: {str(reply)[:200]}")
            elif reply.metadata.reply_to_message_id != work.messages[index].metadata.message_id:
                # whose reply it is, Flower knows by the id that was pulled; what the reply itself says may be forged
                work.refuse(index, "sender", "the reply names another message")
            else:
                yield reply

    def _evaluate(self, server_round: int, arrays: ArrayRecord, evaluate: EvaluateFn, result: Result) -> MetricRecord | None:
        found = evaluate(server_round, arrays)
        if found is not None:
            result.evaluate_metrics_serverapp[server_round] = found
        return found

    def _evaluate_on_clients(self, grid: Grid, arrays: ArrayRecord, config: ConfigRecord, result: Result) -> None:
        server_round = self.state.server_round
        messages = list(self.configure_evaluate(server_round, arrays, config, grid))
        if not messages:
            return

        def again(index: int, reply: Message) -> Message | None:
            more = self._again(*self._evaluators[index], reply)
            if more is not None:
                self.meter.count("down", more[1].content)
                self._evaluators[index] = (self._evaluators[index][0], *more)
            return more[1] if more is not None else None

        answers = exchange(grid, messages, self.settings.strategy.round_timeout, again)
        metrics = self.aggregate_evaluate(server_round, (a for _, a in answers if not isinstance(a, Exception)))
        self.state.bytes_total = dict(self.meter.total)
        if metrics is not None:
            result.evaluate_metrics_clientapp[server_round] = metrics
            self.write({"type": "client-evaluation", "round": server_round, **metrics, "bytes": self.meter.take_round()})

    def _record(self, server_round: int, evaluated: MetricRecord | None, seconds: float, evaluation: float) -> Record:
        """Write the round's line and its clients' lines."""
        work, state = self._round, self.state
        assert work is not None
        sent = self.meter.take_round()
        state.bytes_total = dict(self.meter.total)
        state.examples, state.unfit = dict(self.roster.examples), dict(self.roster.unfit)
        profiles = {node.key: self.profile(node) for node in work.asked}
        record = {
            **round_line(work, state, dict(evaluated or {}), profiles),
            "bytes": sent,
            "bytes-total": sum(self.meter.total.values()),
            "seconds": seconds,
            "seconds-evaluate": evaluation,
        }
        self.write(record)
        for line in work.records:
            self.write(line)
        return record
