"""The Flower Strategy under every method: hooks only. A method overrides the ones in which it differs.

The defaults are factor-wise FedAvg of B·diag(E)·A adapters and head without any allocation. The round is Flower's:
`configure_train` builds the messages, `aggregate_train` takes the replies; Flower's own `Strategy.start` can drive them.
`start` here adds what that lacks: a deadline per round, replies taken one by one, failed rounds counted, records written.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from numpy.typing import NDArray
from pydantic import BaseModel

from fedara_flwr import seeds
from fedara_flwr.config import ConfigError, Group, Settings, check_options
from fedara_flwr.ranks import RankMask
from fedara_flwr.server.messages import replies as exchange
from fedara_flwr.server.roster import Expected, Roster
from fedara_flwr.server.round import Merger, Record, Round
from fedara_flwr.server.state import ServerState
from fedara_flwr.spec import Arrays, ModelSpec
from fedara_flwr.strategies.aggregation import SlotMean
from fedara_flwr.wire.meter import ByteMeter
from fedara_flwr.wire.plan import TrainPlan, Update
from fedara_flwr.wire.records import Rejected, check_metrics, plan_to_content, read_vector, received_parts, to_record

logger = logging.getLogger("flwr")
EVALUATED = ("eval-accuracy", "eval-macro-f1", "eval-loss")
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class RunFailed(RuntimeError):
    """The run cannot go on; one line that says why."""


class ModelPort(Protocol):
    """What a strategy sees of the model; free of torch (contracts.md §3)."""

    spec: ModelSpec

    def weight(self, name: str) -> NDArray[np.float32]: ...

    def evaluate(
        self, arrays: Arrays, mask: RankMask, scales: tuple[float, ...], split: Literal["validation", "test"] = ...
    ) -> dict[str, float]: ...

    def expected(self, terms: frozenset[str]) -> Expected: ...


class NoOptions(Group):
    """`strategy.options` of a method that has none."""


class BaseStrategy(Strategy):
    """Hooks: trainable, start_mask, start_arrays, scales, client_mask, terms, plan, merger, take, next_mask."""

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    """One line for `fedara methods`."""
    paper: ClassVar[str] = ""
    keys: ClassVar[tuple[str, ...]] = ()
    """Configuration keys that only this method reads."""
    Options: ClassVar[type[BaseModel]] = NoOptions
    trainable: ClassVar[frozenset[str]] = frozenset({"B", "E", "A", "head"})

    def __init__(self, settings: Settings, model: ModelPort, write: Callable[[Record], None] = lambda record: None) -> None:
        self.settings, self.model, self.spec, self.write = settings, model, model.spec, write
        self.options = check_options(self.Options, settings.options, self.name)
        self.meter = ByteMeter()
        self.roster = Roster(settings.strategy, settings.seed, model.expected(frozenset(self.terms())), self.meter)
        mask = self.start_mask()
        self.state = ServerState(self.start_arrays(mask), mask)
        self._round: Round | None = None

    # -- hooks: the model -------------------------------------------------------------------------------------------
    def start_mask(self) -> RankMask:
        """Slots alive before round 1, which also sets every module's mask length r_m."""
        return RankMask.full([self.settings.adapter.rank] * len(self.spec.modules))

    def start_arrays(self, mask: RankMask) -> Arrays:
        """Values before round 1: A and B random, E = 0, so that ΔW = 0 (this project's reading of FedARA's start).

        `adapter.init = "unit"` draws N(0, init-scale²/d), columns of B and rows of A of norm init-scale, as singular vectors
        have; "gaussian" draws N(0, init-scale²), PEFT's AdaLoRA at 0.02.
        """
        arrays = {"head": self.start_head()}
        if mask.count:
            for part in ("B", "A"):
                arrays[part] = self.draw(part, mask)
            arrays["E"] = np.zeros(mask.count, dtype=np.float32)
        return arrays

    def draw(self, part: str, mask: RankMask) -> NDArray[np.float32]:
        """Random values of B or A by `adapter.init`, packed under `mask`, from the run's seed."""
        adapter, widths = self.settings.adapter, np.array(self.spec.widths(part))
        noise = seeds.generator(self.settings.seed, "start", part).standard_normal(self.spec.length(part, mask))
        per_slot = widths[mask.modules[mask.bits]]
        scale = np.repeat(1.0 / np.sqrt(per_slot), per_slot) if adapter.init == "unit" else 1.0
        return (noise * adapter.init_scale * scale).astype(np.float32)

    def start_head(self) -> NDArray[np.float32]:
        """The task layer: weights N(0, 0.02²) as in BERT, biases 0, norms 1; from the run's seed."""
        rng = seeds.generator(self.settings.seed, "start", "head")
        pieces = []
        for parameter in self.spec.head:
            if len(parameter.shape) > 1:
                pieces.append(rng.normal(0.0, 0.02, parameter.size))
            else:
                pieces.append(np.full(parameter.size, 0.0 if parameter.name.endswith("bias") else 1.0))
        return np.concatenate(pieces).astype(np.float32)

    def scales(self) -> tuple[float, ...]:
        """S of each module: alpha / r_m for the whole run, pruning or not."""
        return tuple(self.settings.adapter.alpha / max(r, 1) for r in self.state.mask.ranks)

    # -- hooks: the round -------------------------------------------------------------------------------------------
    def terms(self) -> Mapping[str, Mapping[str, float]]:
        """Client-side terms by name, with parameters."""
        train = self.settings.train
        terms: dict[str, dict[str, float]] = {}
        if train.prox_mu:
            terms["prox"] = {"mu": train.prox_mu}
        if train.orthogonality and {"A", "B"} <= self.trainable:
            terms["orthogonality"] = {"weight": train.orthogonality}
        return terms

    def client_mask(self, client_key: str) -> RankMask:
        """Slots that one client gets; the global mask covers them."""
        return self.state.mask

    def plan(self, server_round: int, client_key: str) -> TrainPlan:
        """One client's orders."""
        train = self.settings.train
        return TrainPlan(
            server_round=server_round,
            seed=self.settings.seed,
            mask=self.client_mask(client_key),
            scales=self.scales(),
            trainable=self.trainable,
            steps=train.steps,
            epochs=train.epochs,
            batch_size=train.batch_size,
            learning_rate=train.learning_rate,
            e_lr_factor=train.e_lr_factor,
            head_learning_rate=train.head_learning_rate,
            warmup_steps=train.warmup_steps,
            clip_norm=train.clip_norm,
            dropout=train.dropout,
            terms=self.terms(),
            evaluate=self.settings.data.client_validation > 0,
        )

    def merger(self) -> Merger:
        """What merges this round's updates into `state.arrays`."""
        return SlotMean(self.spec, self.state.mask, self.state.arrays)

    def take(self, client_key: str, update: Update, weight: int) -> None:
        """See one good update, in sampling order, beside the merger (votes, capacities)."""

    def next_mask(self, server_round: int) -> RankMask:
        """The global mask after this round; must be covered by the present one."""
        return self.state.mask

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
        limit = max(self.roster.examples.values(), default=0)
        for reply in replies:
            try:
                if reply.has_error():
                    raise Rejected(f"error-{reply.error.code}", str(reply.error.reason)[-300:])
                self.meter.count("up", reply.content)
                metrics = reply.content.metric_records.get("metrics", MetricRecord())
                examples = check_metrics(metrics, "eval-examples", limit)
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
        evaluate = evaluate_fn or self.evaluate_validation
        self._evaluate(0, arrays, evaluate, result)
        for server_round in range(self.state.server_round + 1, num_rounds + 1):
            began = time.monotonic()
            alive = self.state.mask.count
            messages = self.configure_train(server_round, arrays, train_config or ConfigRecord(), grid)
            merged, metrics = self.aggregate_train(server_round, self._receive(grid, timeout))
            trained = time.monotonic()
            if metrics is not None:
                result.train_metrics_clientapp[server_round] = metrics
            arrays = result.arrays = merged if merged is not None else arrays
            evaluated = self._evaluate(server_round, arrays, evaluate, result)
            self._record(server_round, alive, evaluated, trained - began, time.monotonic() - trained)
            del messages
            if self.state.failed_rounds >= self.settings.strategy.max_failed_rounds:
                raise RunFailed(
                    f"{self.state.failed_rounds} rounds in a row had fewer than strategy.min-replies = "
                    f"{self.settings.strategy.min_replies} good replies (strategy.max-failed-rounds)"
                )
        self._evaluate_on_clients(grid, arrays, evaluate_config or ConfigRecord(), result)
        return result

    # -- the rest ---------------------------------------------------------------------------------------------------
    def evaluate_validation(self, server_round: int, arrays: ArrayRecord) -> MetricRecord:
        """The global model on the server's validation data."""
        return MetricRecord(dict(self.model.evaluate(self.state.arrays, self.state.mask, self.scales())))

    def _receive(self, grid: Grid, timeout: float) -> Iterator[Message]:
        """Replies of the present round as they come, until its deadline."""
        work = self._round
        assert work is not None
        limit = min(timeout, self.settings.strategy.round_timeout)
        for index, reply in exchange(grid, work.messages, limit):
            if isinstance(reply, Exception):
                work.unreadable(index, reply)
            else:
                yield reply

    def _summarise(self, work: Round) -> dict[str, float]:
        """Means over the round's good clients of what they report: training loss, and metrics of what they received."""
        means: dict[str, float] = {}
        for name, count in [("loss", "num-examples"), *((name, "eval-examples") for name in EVALUATED)]:
            pairs = [(float(r[count]), float(r[name])) for r in work.records if name in r and count in r]  # type: ignore[arg-type]
            if pairs:
                means[f"client-{name}"] = sum(n * value for n, value in pairs) / sum(n for n, _ in pairs)
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


__all__ = ["BaseStrategy", "ConfigError", "ModelPort", "NoOptions", "RunFailed"]
