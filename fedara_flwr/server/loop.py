"""The rounds: Flower's Strategy, which owns a method (strategies/base.py) and does all that methods have in common.

`configure_train` builds the messages, `aggregate_train` takes the replies; Flower's own `Strategy.start` can drive them.
`start` here adds what that lacks: a deadline per round, replies taken one by one, failed rounds counted, callbacks.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedara_flwr.config import Settings
from fedara_flwr.merging.norms import Norms
from fedara_flwr.model.deltas import Holding
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import Arrays
from fedara_flwr.server.best import note_best
from fedara_flwr.server.dispatch import Dispatch
from fedara_flwr.server.evaluation import Evaluation
from fedara_flwr.server.fleet import Profile, assign, read_profiles
from fedara_flwr.server.lines import client_means, round_line, start_line, summary
from fedara_flwr.server.messages import replies as exchange
from fedara_flwr.server.progress import Progress
from fedara_flwr.server.roster import Expected, Node, Roster
from fedara_flwr.server.round import BUSY, Line, Round, merger_of, weight_cap
from fedara_flwr.server.state import ServerState
from fedara_flwr.server.statistics import solve_head
from fedara_flwr.server.stopping import RunFailed, note_gain, why_stop
from fedara_flwr.server.strikes import Strikes
from fedara_flwr.strategies.base import Client, Method, State
from fedara_flwr.tasks import find as find_task
from fedara_flwr.wire.arrays import read_vector, to_record
from fedara_flwr.wire.meter import ByteMeter
from fedara_flwr.wire.plan import TrainPlan

logger = logging.getLogger(__name__)
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class Callback:
    """What is told of a run as it goes: a subclass keeps lines, checkpoints, or sends figures elsewhere."""

    def record(self, line: Line) -> None:
        """A line of metrics: of the start, a round, a client's round, an evaluation."""

    def after_round(self, loop: RoundLoop) -> None:
        """Called after a round, and once the head is solved, with lines recorded and the loop's state the next one."""


class RoundLoop(Strategy):
    """Samples, plans, sends, checks, merges, moves on to the next state, records.

    Attributes:
        state: all that must survive a crash.
        planned: how many clients the present round meant to ask.
        work: the present round; None before the first.
        failure: why the run ends after that round; '' where it goes on.
        stopped: why it ended before its last round without a failure, in one line; '' where it did not.
    """

    def __init__(
        self,
        settings: Settings,
        method: Method,
        state: State,
        expected: Expected,
        callbacks: Sequence[Callback] = (),
        run_id: str = "",
    ) -> None:
        """Take over settings, method and state; nothing is sent or computed yet.

        Args:
            state: where the method starts (`method.start()`), or went on to.
            expected: what every node must agree on.
            run_id: a name that no other run has; '' = a new one.
        """
        self.settings, self.method, self.spec, self.callbacks = settings, method, method.spec, list(callbacks)
        self.state = state if isinstance(state, ServerState) else ServerState(**vars(state))
        self.meter = ByteMeter(Counter(self.state.bytes_total))
        asked = {**method.calibration, **({"changes-backbone": 1} if method.touches_backbone() else {})}
        strikes = Strikes(settings.strategy.max_client_failures, self.state.strikes)
        self.roster = Roster(settings.strategy, settings.seed, expected, self.meter, self._ready, asked, strikes)
        self.roster.secret, self.roster.owners = self.state.secret, self.state.owners
        self.fleet = read_profiles(settings.fleet.profiles)
        self._speeds = sorted({profile.flops for profile in self.fleet})
        self.planned = 0
        self.run_id = run_id or uuid.uuid4().hex
        self.work: Round | None = None
        self.failure = self.stopped = ""
        self._head_asked = bool(self.state.solved)
        self._evaluation: Evaluation | None = None
        self._dispatch = self._new_dispatch()

    def _new_dispatch(self) -> Dispatch:
        return Dispatch(self.settings, self.spec, self.method.remade, self.run_id, self.meter)

    # -- what the method sees ---------------------------------------------------------------------------------------
    def profile(self, node: Node) -> Profile | None:
        """The device that a simulated node stands for, drawn by seed and client key; None for a real one."""
        return assign(self.fleet, self.settings.seed, node.key) if node.simulated else None

    def client(self, node: Node) -> Client:
        """A node as the method sees it."""
        profile = self.profile(node)
        speed = (self._speeds.index(profile.flops), len(self._speeds)) if profile is not None else None
        return Client(node.key, self.roster.examples.get(node.key, 0), profile, speed)

    def _ready(self, node: Node, metrics: Mapping[str, float]) -> None:
        self.method.ready(self.state, self.client(node), metrics)

    # -- Flower's Strategy ------------------------------------------------------------------------------------------
    def initial_arrays(self) -> ArrayRecord:
        """The state's arrays as a Flower record, from which the rounds start."""
        return to_record(self.state.arrays)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Sample, plan and build one message per client; `arrays` is the global model under `state.mask`."""
        state, method = self.state, self.method
        lengths = {part: len(vector) for part, vector in state.arrays.items()}
        state.arrays = {part: read_vector(array, lengths[part], part) for part, array in arrays.items()}
        state.server_round = server_round - 1
        self.roster.begins(server_round)
        if server_round == 1 and not self._head_asked:  # as Flower's own `Strategy.start` begins
            self._solve_head(grid)
        if server_round == 1 or not self.roster.nodes:
            self.roster.wait(grid)
        else:
            self.roster.refresh(grid)
        self.planned = self.roster.count()
        sitting = sorted(self.roster.strikes.sitting(server_round).keys() - self.roster.able())
        asked = self.roster.sample(grid, server_round, self.planned)
        clients = [self.client(node) for node in asked]
        method.prepare(state, clients)
        plans = [method.plan(state, client) for client in clients]
        # longest first: where fewer train at a time than there are, the last to begin should not be the last to end
        effort = [plan.work(self.spec, client.examples) for client, plan in zip(clients, plans, strict=True)]
        order = sorted(range(len(asked)), key=lambda index: -effort[index])
        asked, plans = [asked[index] for index in order], [plans[index] for index in order]
        self._dispatch = self._new_dispatch()
        private = self.settings.privacy.on  # a bound on lengths would tell of them, and every update is cut anyway
        work = Round(
            number=server_round,
            spec=self.spec,
            asked=asked,
            plans=plans,
            messages=[],
            limits=self.roster.examples,
            meter=self.meter,
            weights=self.roster.weights,
            norms=Norms(0.0 if private else self.settings.strategy.norm_bound, state.norms),
            start=self._start(),
            client=self.client,
            read=method.read_report,
            quorum=self.settings.strategy.replies_enough(len(asked)),
            held_out=self.settings.data.client_validation,
            rates=self.settings.train.share((server_round - 1) / max(self.settings.num_server_rounds - 1, 1)),
            cap=weight_cap(self.settings.strategy.weight_cap, [self.roster.weights[node.key] for node in asked]),
            private=private,
            sitting=sitting,
        )
        work.drop_busy(self.roster.busy)
        for index, node in enumerate(asked):
            plans[index], content = self._dispatch.pack(state, plans[index], state.holdings.get(node.key, Holding()))
            work.down.append(dict(self.meter.count("down", content)))
            work.messages.append(self._dispatch.message(content, node, MessageType.TRAIN))
        work.coding = self._dispatch.broadcast.report()
        self.work = work
        return work.messages

    def _start(self) -> Callable[[TrainPlan, RankMask], Arrays]:
        """The values that this round's updates start from, unrounded, under any mask that the global one covers."""
        arrays, mask = self.state.arrays, self.state.mask
        return lambda plan, sub: plan.start(self.spec, arrays, mask, sub)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check and merge the replies, then move on to the next state. Too few good ones leave the model as it was."""
        state, work = self.state, self.work
        assert work is not None, "aggregate_train before configure_train"
        merger = merger_of(self.method, state, self.settings, work.plans, self.planned)
        work.collect(replies, merger)
        for drop in work.drops:
            if drop.reason.startswith("error-") or drop.reason == BUSY:
                self.roster.forget(drop.client)
            elif drop.reason == "delta":
                state.holdings.pop(drop.client, None)
        self.roster.strikes.settle(work.failures(), work.answered)
        for node, plan in zip(work.asked, work.plans, strict=True):
            if node.key in work.answered and plan.delta:
                state.holdings[node.key] = Holding(state.delta.version, plan.delta)
        state.server_round = server_round
        if work.good < self.settings.strategy.min_replies:
            state.failed_rounds += 1
            logger.warning("round %d: %d good replies, the model stays as it was", server_round, work.good)
        else:
            state.failed_rounds = 0
            merged = merger.result()
            left_out = set(getattr(merger, "left_out", ()))
            self.method.next(state, merged, [reply for reply in work.replies if reply.client.key not in left_out], merger)
            work.merging = merger.report()
        metrics = client_means(work.records, self.settings.strategy.weight_cap)
        return to_record(state.arrays), MetricRecord(dict(metrics)) if metrics else None

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """After the last round, and with `data.client-validation`, every node that was ready evaluates the final model.

        In the rounds before, clients evaluate what they receive for training, without a message more.
        """
        settings, state = self.settings, self.state
        if not settings.data.client_validation or not (server_round >= settings.num_server_rounds or self.stopped):
            return []
        ready = [node for key, node in self.roster.nodes.items() if key in self.roster.examples]
        ready.sort(key=lambda node: (len(node.key), node.key))
        self._evaluation = Evaluation(settings, self.spec, state, self._new_dispatch(), self.meter)
        last = replace(state, server_round=server_round - 1)  # whose plan is that of the round that was
        plans = [self.method.plan(last, self.client(node)) for node in ready]
        examples = self.roster.examples
        return [self._evaluation.ask(node, plan, examples[node.key]) for node, plan in zip(ready, plans, strict=True)]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Means over clients, weighted by their held-out examples; a bad reply is left out."""
        return self._evaluation.means(replies) if self._evaluation is not None else None

    def _rejoin(self, grid: Grid) -> None:
        """Find the nodes again; what that costs is in the totals, and apart from every round."""
        state = self.state
        self.roster.begins(state.server_round + 1)
        self.roster.wait(grid)
        changed = self.roster.rejoin(grid, state.examples, state.unfit, state.holdings)
        state.bytes_total = dict(self.meter.total)
        line = {"type": "resume", "round": state.server_round, "bytes": self.meter.take_round()}
        self._tell({**line, "changed-examples": changed} if changed else line)

    def summary(self) -> None:
        """Log what the run starts with."""
        logger.info("%s", summary(self.method.name, self.state, self.spec.size("head"), self.method.kept))

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
        *,
        should_stop: Callable[[], bool] | None = None,
    ) -> Result:
        """Run all rounds that are left; Flower's signature. Without `evaluate_fn` the server's validation data is used.

        Between rounds `should_stop` is asked whether to end, as early stopping is.

        Raises:
            RunFailed: `max-failed-rounds` rounds in a row, or all, had too few good replies; without rounds, the head was not
                solved.
            TooFewNodes: they did not come in time.
        """
        self.summary()
        result, arrays = Result(arrays=initial_arrays), initial_arrays
        evaluate = evaluate_fn or self._validate
        progress = Progress(self.settings.num_server_rounds, find_task(self.settings.data.task).metric)
        if self.state.server_round or self.state.solved:
            self._rejoin(grid)
        else:
            record = self._begin(grid, result, evaluate)
            arrays = result.arrays
            if self.state.solved:
                self._keep(progress.line(record))
            elif not num_rounds:
                raise RunFailed("num-server-rounds = 0, and the head could not be solved: nothing was learnt")
            elif not self.spec.head:
                logger.info("%s", progress.line(record))
        self.stopped = why_stop(self.settings, self.state, should_stop)
        for server_round in range(self.state.server_round + 1, num_rounds + 1):
            if self.stopped:
                logger.info("%s", self.stopped)
                break
            began = time.monotonic()
            self.configure_train(server_round, arrays, train_config or ConfigRecord(), grid)
            merged, metrics = self.aggregate_train(server_round, self._receive(grid, timeout))
            trained = time.monotonic()
            result.train_metrics_clientapp |= {server_round: metrics} if metrics is not None else {}
            arrays = result.arrays = merged if merged is not None else arrays
            evaluated = self._evaluate(server_round, arrays, evaluate, result)
            record = self._record(evaluated, trained - began, time.monotonic() - trained)
            assert self.work is not None
            self.failure = self.work.failure(self.roster, self.state.failed_rounds, self.settings.strategy, num_rounds)
            self.stopped = why_stop(self.settings, self.state, should_stop) if server_round < num_rounds else ""
            self._keep(progress.line(record))
            if self.failure:
                raise RunFailed(self.failure)
        self._evaluate_on_clients(grid, arrays, evaluate_config or ConfigRecord(), result)
        return result

    # -- the rest ---------------------------------------------------------------------------------------------------
    def _keep(self, shown: str) -> None:
        """Let the callbacks keep what the run has reached, then show its line: a round that is shown is kept."""
        for callback in self.callbacks:
            callback.after_round(self)
        logger.info("%s", shown)

    def _tell(self, line: Line) -> None:
        for callback in self.callbacks:
            callback.record(line)

    def _receive(self, grid: Grid, timeout: float) -> Iterator[Message]:
        """Replies of the present round as they come, until its deadline."""
        work = self.work
        assert work is not None
        limit = min(timeout, self.settings.strategy.round_timeout)

        def again(index: int, reply: Message) -> Message | None:
            more = self._dispatch.again(self.state, work.asked[index], work.plans[index], work.messages[index], reply)
            if more is None:
                return None
            work.plans[index], work.messages[index] = more
            sent = Counter(work.down[index]) + self.meter.count("down", more[1].content)
            work.down[index] = dict(sent)
            return more[1]

        work.began = time.monotonic()
        patience, what = self.settings.strategy.straggler_timeout, f"round {work.number}"
        for index, reply in exchange(grid, work.messages, limit, again, work.enough, patience, what):
            if isinstance(reply, Exception):
                work.refuse(index, "unreadable", f"{type(reply).__name__}: {str(reply)[:200]}")
            elif reply.metadata.reply_to_message_id != work.messages[index].metadata.message_id:
                # whose reply it is, Flower knows by the id that was pulled; what the reply itself says may be forged
                work.refuse(index, "sender", "the reply names another message")
            else:
                yield reply

    def _validate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord:
        return MetricRecord(dict(self.method.model.evaluate(self.method.weights(self.state))))

    def _evaluate(self, server_round: int, arrays: ArrayRecord, evaluate: EvaluateFn, result: Result) -> MetricRecord | None:
        if (metrics := evaluate(server_round, arrays)) is not None:
            result.evaluate_metrics_serverapp[server_round] = metrics
        note_gain(self.settings, self.state, metrics)
        note_best(self.method, self.state, metrics)
        return metrics

    def _evaluate_on_clients(self, grid: Grid, arrays: ArrayRecord, config: ConfigRecord, result: Result) -> None:
        server_round = self.state.server_round
        if not list(self.configure_evaluate(server_round, arrays, config, grid)):
            return
        assert self._evaluation is not None
        metrics = self.aggregate_evaluate(server_round, self._evaluation.receive(grid))
        self.state.bytes_total = dict(self.meter.total)
        if metrics is not None:
            result.evaluate_metrics_clientapp[server_round] = metrics
            self._tell({"type": "client-evaluation", "round": server_round, **metrics, "bytes": self.meter.take_round()})

    def _solve_head(self, grid: Grid) -> tuple[list[Line], list[str]]:
        self._head_asked = True
        return solve_head(self.settings, self.method.model, self.state, self.roster, grid)

    def _begin(self, grid: Grid, result: Result, evaluate: EvaluateFn) -> Line:
        """Solve the head where the run wants that, evaluate, and record what was before round 1."""
        began = time.monotonic()
        clients, asked = self._solve_head(grid)
        result.arrays, solved = self.initial_arrays(), time.monotonic()
        evaluated = self._evaluate(0, result.arrays, evaluate, result)
        devices = {key: self.profile(node) for key, node in self.roster.nodes.items()}
        record = start_line(self.state, evaluated or {}, clients, asked, devices)
        return self._tell_costs(record, clients, solved - began, time.monotonic() - solved)

    def _tell_costs(self, record: Line, clients: Sequence[Line], seconds: float, evaluation: float) -> Line:
        """Tell a round's line with bytes and seconds, then its clients' lines; the state has all bytes then."""
        sent, state = self.meter.take_round(), self.state
        state.bytes_total = dict(self.meter.total)
        state.examples, state.unfit, state.secret = dict(self.roster.examples), dict(self.roster.unfit), self.roster.secret
        record |= {"bytes": sent, "bytes-total": sum(self.meter.total.values())}
        record |= {"seconds": seconds, "seconds-evaluate": evaluation}
        for line in (record, *clients):
            self._tell(line)
        return record

    def _record(self, evaluated: MetricRecord | None, seconds: float, evaluation: float) -> Line:
        """Record the round's line and its clients' lines."""
        work = self.work
        assert work is not None
        devices, cap = {node.key: self.profile(node) for node in work.asked}, self.settings.strategy.weight_cap
        record = round_line(work, self.state, dict(evaluated or {}), devices, cap)
        return self._tell_costs(record, work.records, seconds, evaluation)
