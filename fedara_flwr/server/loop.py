"""The rounds: Flower's Strategy on this project's hooks.

`configure_train` builds the messages, `aggregate_train` takes the replies; Flower's own `Strategy.start` can drive them.
`start` here adds what that lacks: a deadline per round, replies taken one by one, failed rounds counted, records written.
"""

from __future__ import annotations

import logging
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedara_flwr.config import Settings
from fedara_flwr.ranks import RankMask
from fedara_flwr.server.messages import replies as exchange
from fedara_flwr.server.roster import Expected, Roster
from fedara_flwr.server.round import Merger, Record, Round
from fedara_flwr.server.state import ServerState
from fedara_flwr.spec import ModelSpec
from fedara_flwr.wire.meter import ByteMeter
from fedara_flwr.wire.plan import TrainPlan, Update
from fedara_flwr.wire.records import (
    MAX_EXAMPLES,
    Rejected,
    check_metrics,
    plan_to_content,
    read_vector,
    received_parts,
    to_record,
)

logger = logging.getLogger("flwr")
EVALUATED = ("eval-accuracy", "eval-macro-f1", "eval-loss")
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class RunFailed(RuntimeError):
    """The run cannot go on; one line that says why."""


class RoundLoop(Strategy):
    """Samples, plans, sends, checks, merges, moves on to the next mask, records. What differs by method is a hook."""

    name: ClassVar[str] = ""
    state: ServerState

    def __init__(self, settings: Settings, spec: ModelSpec, expected: Expected, write: Callable[[Record], None]) -> None:
        self.settings, self.spec, self.write = settings, spec, write
        self.meter = ByteMeter()
        self.roster = Roster(settings.strategy, settings.seed, expected, self.meter)
        self._round: Round | None = None

    # -- hooks ------------------------------------------------------------------------------------------------------
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
        state.arrays = {part: read_vector(array, self.spec.length(part, state.mask), part) for part, array in arrays.items()}
        if server_round == 1 or not self.roster.nodes:
            self.roster.wait(grid)
        else:
            self.roster.refresh(grid)
        asked = self.roster.sample(grid, server_round, self.roster.count())
        plans = [self.plan(server_round, node.key) for node in asked]
        work = Round(
            server_round,
            self.spec,
            asked,
            plans,
            [],
            self.roster.examples,
            self.meter,
            self.settings.strategy.weighting,
        )
        for node, plan in zip(asked, plans, strict=True):
            sliced = self.spec.slice(state.arrays, state.mask, plan.mask)
            wanted = received_parts(plan, "E" not in state.arrays)
            content = plan_to_content(plan, {part: vector for part, vector in sliced.items() if part in wanted})
            work.down.append(dict(self.meter.count("down", content)))
            work.messages.append(Message(content, node.node_id, MessageType.TRAIN, ttl=self.settings.strategy.round_timeout))
        self._round = work
        return work.messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check and merge the replies, then move on to the next mask. Too few good ones leave the model as it was."""
        state, work = self.state, self._round
        assert work is not None, "aggregate_train before configure_train"
        merger = self.merger()
        work.collect(replies, merger, self.take)
        for drop in work.drops:
            if drop.reason.startswith("error-"):
                self.roster.forget(drop.client)
        state.server_round = server_round
        if work.good < self.settings.strategy.min_replies:
            state.failed_rounds += 1
            logger.warning("round %d: %d good replies, the model stays as it was", server_round, work.good)
        else:
            state.failed_rounds = 0
            merged, mask = merger.result(), self.next_mask(server_round)
            state.arrays = self.spec.slice(merged, state.mask, mask)
            state.mask = mask
        metrics = self._summarise(work)
        return to_record(state.arrays), MetricRecord(dict(metrics)) if metrics else None

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """After the last round, and with `data.client-validation`, every node that was ready evaluates the final model.

        In the rounds before, clients evaluate what they receive for training, without a message more.
        """
        settings, state = self.settings, self.state
        if not settings.data.client_validation or server_round < settings.num_server_rounds:
            return []
        nodes = [node for key, node in self.roster.nodes.items() if key in self.roster.examples]
        messages = []
        for node in sorted(nodes, key=lambda node: (len(node.key), node.key)):
            plan = replace(self.plan(server_round, node.key), trainable=frozenset(), report=frozenset())
            content = plan_to_content(plan, self.spec.slice(state.arrays, state.mask, plan.mask))
            self.meter.count("down", content)
            messages.append(Message(content, node.node_id, MessageType.EVALUATE, ttl=settings.strategy.round_timeout))
        return messages

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
                good.append((examples, {name: float(metrics[name]) for name in EVALUATED}))  # type: ignore[arg-type]
            except (Rejected, KeyError) as error:
                logger.warning("evaluation of node %d left out: %s", reply.metadata.src_node_id, error)
        if not good:
            return None
        total = sum(examples for examples, _ in good)
        # fsum: the last bits must not depend on the order of the replies
        means = {name: math.fsum(k * values[name] for k, values in good) / total for name in EVALUATED}
        summary: dict[str, Any] = {f"client-{name}": value for name, value in means.items()}
        return MetricRecord({**summary, "clients": len(good)})

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

        Raises:
            RunFailed: `max-failed-rounds` rounds in a row had too few good replies.
            TimeoutError: too few nodes came.
        """
        self.summary()
        result, arrays = Result(arrays=initial_arrays), initial_arrays
        evaluate = evaluate_fn or (lambda server_round, arrays: MetricRecord(dict(self.evaluate())))
        self.write({"type": "start", **(self._evaluate(0, arrays, evaluate, result) or {})})
        for server_round in range(self.state.server_round + 1, num_rounds + 1):
            began = time.monotonic()
            alive = self.state.mask.count
            self.configure_train(server_round, arrays, train_config or ConfigRecord(), grid)
            merged, metrics = self.aggregate_train(server_round, self._receive(grid, timeout))
            trained = time.monotonic()
            if metrics is not None:
                result.train_metrics_clientapp[server_round] = metrics
            arrays = result.arrays = merged if merged is not None else arrays
            evaluated = self._evaluate(server_round, arrays, evaluate, result)
            self._record(server_round, alive, evaluated, trained - began, time.monotonic() - trained)
            if not self._asked_any() and self.roster.unfit:
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
        for index, reply in exchange(grid, work.messages, limit):
            if isinstance(reply, Exception):
                work.refuse(index, "unreadable", f"{type(reply).__name__}: {str(reply)[:200]}")
            elif reply.metadata.reply_to_message_id != work.messages[index].metadata.message_id:
                # whose reply it is, Flower knows by the id that was pulled; what the reply itself says may be forged
                work.refuse(index, "sender", "the reply names another message")
            else:
                yield reply

    def _summarise(self, work: Round) -> dict[str, float]:
        """Means over the round's good clients of what they report: training loss, and metrics of what they received."""
        means: dict[str, float] = {}
        for name, count in [("loss", "num-examples"), *((name, "eval-examples") for name in EVALUATED)]:
            pairs = [(float(r[count]), float(r[name])) for r in work.records if name in r and count in r]  # type: ignore[arg-type]
            if pairs:
                means[f"client-{name}"] = math.fsum(n * value for n, value in pairs) / math.fsum(n for n, _ in pairs)
        return means

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
        answers = exchange(grid, messages, self.settings.strategy.round_timeout)
        metrics = self.aggregate_evaluate(server_round, (a for _, a in answers if not isinstance(a, Exception)))
        self.state.bytes_total = dict(self.meter.total)
        if metrics is not None:
            result.evaluate_metrics_clientapp[server_round] = metrics
            self.write({"type": "client-evaluation", "round": server_round, **metrics, "bytes": self.meter.take_round()})

    def _record(self, server_round: int, alive: int, evaluated: MetricRecord | None, seconds: float, evaluation: float) -> None:
        """Write the round's line and its clients' lines, and log it."""
        work, state = self._round, self.state
        assert work is not None
        sent = self.meter.take_round()
        state.bytes_total = dict(self.meter.total)
        record: Record = {
            "type": "round",
            "round": server_round,
            **dict(evaluated or {}),
            **self._summarise(work),
            "slots": sum(state.mask.ranks),
            "alive-sent": alive,
            "alive": state.mask.count,
            "alive-per-module": state.mask.alive.tolist(),
            "dead-modules": state.mask.dead_modules,
            "bytes": sent,
            "bytes-total": sum(self.meter.total.values()),
            "sampled": [node.key for node in work.asked],
            "good": work.good,
            "dropped": [vars(drop) for drop in work.drops],
            "seconds": seconds,
            "seconds-evaluate": evaluation,
        }
        self.write(record)
        for line in work.records:
            self.write(line)
        logger.info(
            "round %d/%d: accuracy %s, alive %d of %d slots, %d of %d modules dead, %.2f MB down, %.2f MB up, %.1f s",
            server_round,
            self.settings.num_server_rounds,
            f"{float(evaluated['accuracy']):.3f}" if evaluated and "accuracy" in evaluated else "-",  # type: ignore[arg-type]
            state.mask.count,
            sum(state.mask.ranks),
            state.mask.dead_modules,
            len(state.mask.ranks),
            sent["down"] / 1e6,
            sent["up"] / 1e6,
            seconds + evaluation,
        )
