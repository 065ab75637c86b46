"""fedara_flwr: the Flower ClientApp. Thin; torch is imported when a handler needs it."""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedara_flwr.client import terms
from fedara_flwr.keys import ConfigError
from fedara_flwr.model.parts import declared
from fedara_flwr.node import power, told, worker
from fedara_flwr.node.settings import NodeSettings
from fedara_flwr.tasks import read_settings
from fedara_flwr.training import LocalTraining
from fedara_flwr.wire import NUM_TARGETS, PROTOCOL

if TYPE_CHECKING:
    from fedara_flwr.client.session import Session
    from fedara_flwr.client.train import ClientData
    from fedara_flwr.model.kept import Kept
    from fedara_flwr.model.spec import Arrays
    from fedara_flwr.node.kept import KeptStore
    from fedara_flwr.wire.plan import TrainPlan, Update

logger = logging.getLogger(__name__)
app = ClientApp()
HANDLERS: dict[str, worker.Handler] = {}


def client_key(context: Context) -> str:
    """The client's name: node-config `client-key`, else `partition-id`, else the node's id; unchecked, so any node has one."""
    node = context.node_config
    for name in ("client-key", "partition-id"):
        if name in node:
            return str(node[name])
    return f"node-{context.node_id}"


def in_simulation(context: Context) -> bool:
    """Whether server and client are one user's processes: under Ray, or in the in-process engine."""
    ray = sys.modules.get("ray")
    return bool(ray is not None and ray.is_initialized()) or context.node_config.get("engine") == "inprocess"


def _resident(handler: worker.Handler) -> worker.Handler:
    """The handler, called in this node's resident worker where it may have one; no words of its errors leave a device."""

    @wraps(handler)
    def guarded(message: Message, context: Context) -> Message:
        with told.without_words():
            return handler(message, context)

    HANDLERS[handler.__name__] = guarded

    @wraps(handler)
    def call(message: Message, context: Context) -> Message:
        if in_simulation(context):
            return handler(message, context)
        return worker.ask(guarded, message, context) if worker.wanted(context.node_config) else guarded(message, context)

    return call


def _pin(context: Context, node: NodeSettings, labels: tuple[str, ...]) -> None:
    """Keep the run's labels in the node's state, and refuse others later: who may ask for one list after the other counts rows.

    They are () where the run's task has none, which a record cannot hold as an empty list.

    Raises:
        ConfigError: the node was asked for others before, or says for which alone it answers.
    """
    trusted, record = in_simulation(context), ConfigRecord({"labels": list(labels)} if labels else {})
    if not trusted and context.state.get("labels", record) != record:
        raise ConfigError("the run has other labels than this node was first asked for")
    if not trusted and labels and node.label_names and set(labels) != node.label_names:
        raise ConfigError("the run's labels are not those of node-config labels")
    context.state["labels"] = record


def _open(context: Context, node: NodeSettings, labels: tuple[str, ...] | None = None) -> tuple[Session, ClientData]:
    """The resident session and this client's data. Labels are the server's, kept in the node's state from `ready` on."""
    import torch

    from fedara_flwr.client import session

    settings = read_settings(context.run_config)
    if labels is not None:
        _pin(context, node, labels)
    elif "labels" in context.state:
        labels = tuple(context.state.config_records["labels"].get("labels", ()))  # type: ignore[arg-type]
    else:
        raise ConfigError("this node was not asked whether it is ready: it does not know the run's labels")
    settings, path = session.own_settings(settings, node, in_simulation(context))
    torch.set_num_threads(settings.train.threads)
    resident = session.resident(settings, labels, session.pick_device(node))
    partition, partitions = node.partition_id or 0, node.num_partitions or 1
    with told.own_data() if path else nullcontext():
        data = resident.client_data(client_key(context), partition, partitions, path)
    _check_memory(node)
    return resident, data.at_least(node.examples_least) if path else data


def _check_memory(node: NodeSettings) -> None:
    if node.max_memory_mb and (peak := power.peak_memory()) > node.max_memory_mb:
        raise ConfigError(f"node-config max-memory-mb = {node.max_memory_mb:g}: this process took {peak:.0f} MB")


@app.query("whoami")
def whoami(message: Message, context: Context) -> Message:
    """Client key, number of partitions, protocol version, and the terms and parts that this node knows."""
    partitions = context.node_config.get("num-partitions", 0)
    answer = ConfigRecord(
        {
            "protocol": PROTOCOL,
            "client-key": client_key(context),
            "num-partitions": partitions if isinstance(partitions, int) else 0,
            "terms": ",".join(terms.names()),
            "parts": ",".join(declared()),
        }
    )
    return Message(RecordDict({"whoami": answer}), reply_to=message)


@app.query("ready")
@_resident
def ready(message: Message, context: Context) -> Message:
    """Whether this node can train: how many examples it has, and what it must have in common with the server.

    Or `busy`, why not now; or `error`, why not at all.
    """
    question: Any = message.content.config_records["ready"]
    metrics: dict[str, Any] = {"num-examples": 0}
    try:
        node = NodeSettings.read(context.node_config)
        if why := node.busy():
            return Message(RecordDict({"ready": ConfigRecord({"busy": why})}), reply_to=message)
        if "changes-backbone" in question:
            node.check_frozen(read_settings(context.run_config).method)
        resident, data = _open(context, node, tuple(map(str, question.get("labels", ()))))
        where = f"node-config data-path = {node.data_path!r}" if node.data_path else f"client {client_key(context)}"
        data.overview.log(logger, f"{where}: ")
        if "holds" in question and in_simulation(context):  # what this node was sent before the run stopped
            context.state["delta"] = ConfigRecord({"digests": list(question["holds"])})
        if node.data_path and not len(data.train):
            raise ConfigError(f"fewer than {node.examples_least} examples (node-config examples-least)")
        metrics["num-examples"] = len(data.train)
        if NUM_TARGETS in question and len(data.train):
            metrics |= node.guard.let_out({NUM_TARGETS: resident.learner.count(data.train)})
        if "calibrate-rank" in question and len(data.train):
            from fedara_flwr.client.capacity import measure
            from fedara_flwr.node.store import NodeStore

            resident.set_delta((), NodeStore(node.store))  # a run before this one may have left its own
            batch, rank = question["calibrate-batch"], question["calibrate-rank"]
            node.check_plan(LocalTraining(steps=1, batch_size=batch), len(data.train))
            tokens = read_settings(context.run_config).train.batch_tokens
            measured = measure(resident.learner, data.train, batch, tokens, rank)
            metrics |= node.guard.let_out(measured)
        shared = not node.data_path
        answer = ConfigRecord(
            {
                "fingerprint": resident.adapted.spec.fingerprint,
                "tokenizer": resident.learner.tokenizer_digest,
                "data": resident.federation.digest if shared else "own",
                "dtype": resident.adapted.backbone.dtype,
            }
        )
    except ConfigError as error:
        answer = ConfigRecord({"error": str(error)})
    return Message(RecordDict({"ready": answer, "metrics": MetricRecord(metrics)}), reply_to=message)


@app.query("statistics")
@_resident
def statistics(message: Message, context: Context) -> Message:
    """Sums of this client's features by class, from which the server solves the head; or why it does not tell them."""
    from fedara_flwr.client.statistics import gather, some
    from fedara_flwr.node.store import NodeStore
    from fedara_flwr.seeds import generator
    from fedara_flwr.wire import statistics as wire

    question: Any = message.content.config_records[wire.STATISTICS]
    node, simulated = NodeSettings.read(context.node_config), in_simulation(context)
    why, settings = node.silent or node.busy(), read_settings(context.run_config)
    if not simulated and not why:  # two drawings of rows may differ by one row, whose features their sums would tell
        first = context.state.config_records.setdefault("statistics", ConfigRecord(dict(question)))
        why = "" if first == question else "the run asks for other sums than it first did"
    if why:
        return Message(wire.refusal(why), reply_to=message)
    try:
        resident, data = _open(context, node)
        resident.set_delta((), NodeStore(node.store))
        least = 1 if simulated else node.statistics_least
        seed, tokens = question["seed"], settings.train.batch_tokens
        rows = some(data.train, question["rows"], generator(seed, "statistics-rows", client_key(context)))
        told = gather(resident.learner, rows, seed, question[wire.SCATTER], least, tokens, simulated)
        if not told.statistics.rows:
            return Message(wire.refusal(f"no class has {least} rows (node-config statistics-least)"), reply_to=message)
        metrics = {"num-examples": len(data.train), **node.guard.let_out(told.metrics)}
        rng = generator(seed, "statistics", client_key(context))
        content = wire.to_content(told.statistics, question["up"], rng, metrics)
    except ConfigError as error:
        return Message(wire.refusal(str(error)), reply_to=message)
    if told.left_out:
        logger.info("%d rows of classes with fewer than %d are in no sum (node-config statistics-least)", told.left_out, least)
    return Message(content, reply_to=message)


@dataclass(frozen=True)
class Received:
    """What TRAIN and EVALUATE bring, checked against this node's model."""

    message: Message
    node: NodeSettings
    session: Session
    data: ClientData
    plan: TrainPlan
    client_key: str

    @property
    def optimiser_steps(self) -> int:
        """Optimiser steps that this client would do."""
        return self.plan.train.optimiser_steps(len(self.data.train))

    def arrays(self) -> Arrays:
        """The values that came with the plan."""
        from fedara_flwr.wire.arrays import read_arrays

        plan = self.plan
        content, spec = self.message.content, self.session.adapted.spec
        return read_arrays(content, spec, plan.mask, plan.carries, plan.entries, plan.down, down=True)

    def stayed(self, server_round: int) -> Kept | None:
        """What this node kept before `server_round` of the parts that stay with it."""
        return self._store("parts").take(server_round) if self.plan.kept else None

    def _store(self, what: str) -> KeptStore:
        """Where this client keeps vectors of this run; `what` names the folder and, in warnings, what is kept there."""
        from fedara_flwr.node.kept import KeptStore

        return KeptStore(self.node.store / what, self.plan.run, self.client_key)

    def answer(self, update: Update, arrays: Arrays) -> Message:
        """The reply to TRAIN; `arrays` are what `arrays()` gave."""
        from fedara_flwr.model.kept import Kept
        from fedara_flwr.wire.records import update_to_content
        from fedara_flwr.wire.upload import code_update, residue_of

        _check_memory(self.node)
        plan, spec, guard = self.plan, self.session.adapted.spec, self.node.guard
        store, residue = self._store("residues"), None
        if plan.feedback and not guard.clip:  # what a guard has cut, and noised, is all that may leave
            residue = residue_of(store.take(plan.server_round), plan, spec)
        coded, said = code_update(update, plan, spec, arrays, self.client_key, residue)
        if residue is not None:
            store.put(residue, plan.server_round)
        if plan.kept:
            self._store("parts").put(Kept(update.stays, plan.mask, plan.draw_seed, plan.entries), plan.server_round)
        update = replace(update, metrics={**update.metrics, **guard.let_out(said)})
        return Message(update_to_content(update, plan, coded), reply_to=self.message)


def receive(message: Message, context: Context, node: NodeSettings) -> Received | Message:
    """What the message brought, or the reply that says which pieces of the delta are missing."""
    from fedara_flwr.node.store import MissingPieces
    from fedara_flwr.wire.records import need_delta, plan_from_content

    session, data = _open(context, node)
    plan = plan_from_content(message.content, len(session.adapted.spec.modules))
    if not in_simulation(context):
        node.check_plan(plan.train, len(data.train))
    try:
        _take_delta(message, context, node, session, plan)
    except MissingPieces as error:
        return Message(need_delta(error.digests, plan.server_round), reply_to=message)
    return Received(message, node, session, data, plan, client_key(context))


def _take_delta(message: Message, context: Context, node: NodeSettings, resident: Session, plan: TrainPlan) -> None:
    """Keep the pieces of the delta that came, and set the one that the plan names."""
    from fedara_flwr.node.store import MissingPieces, NodeStore
    from fedara_flwr.wire.records import read_pieces

    store = NodeStore(node.store)
    came = read_pieces(message.content, resident.adapted.spec)
    for piece in came:
        store.put(piece)
    if plan.delta and in_simulation(context):
        # simulated nodes share a folder, but not what they were sent
        known: Any = context.state.config_records.get("delta", ConfigRecord()).get("digests", [])
        have = {*known, *(piece.digest for piece in came)} & set(plan.delta)
        if have:
            context.state["delta"] = ConfigRecord({"digests": sorted(have)})
        if missing := [digest for digest in plan.delta if digest not in have]:
            raise MissingPieces(missing)
    resident.set_delta(plan.delta, store)


@app.train()
@_resident
def train(message: Message, context: Context) -> Message:
    """One round of local training as the plan says, or the reply why not now."""
    from fedara_flwr.wire.records import busy

    node = NodeSettings.read(context.node_config)
    if why := node.busy():
        return Message(busy(why), reply_to=message)
    received = receive(message, context, node)
    if isinstance(received, Message):
        return received
    from fedara_flwr.client.train import train as run

    model, simulated = received.session, in_simulation(context)
    data, plan, arrays, key = received.data, received.plan, received.arrays(), received.client_key
    longest = 0.0 if simulated else node.max_seconds
    stayed = received.stayed(plan.server_round)
    update = run(model.learner, data, plan, arrays, key, simulated, node.guard, stayed, longest)
    return received.answer(update, arrays)


@app.evaluate()
@_resident
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received model, with the parts that stay here, on this client's own held-out rows."""
    received = receive(message, context, NodeSettings.read(context.node_config))
    if isinstance(received, Message):
        return received
    from fedara_flwr.client.train import evaluate as run
    from fedara_flwr.client.train import load

    model, plan = received.session, received.plan
    load(model.adapted, plan, received.arrays(), received.stayed(plan.server_round + 1))
    scores = run(model.learner, received.data, plan.train.batch_tokens)
    metrics: dict[str, Any] = {"eval-examples": 0} | received.node.guard.let_out(scores)
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
