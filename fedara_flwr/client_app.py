"""fedara_flwr: the Flower ClientApp. Thin; torch is imported when a handler needs it (contracts.md §3, §9)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedara_flwr.client import terms
from fedara_flwr.config import ConfigError, Settings
from fedara_flwr.wire import PROTOCOL

if TYPE_CHECKING:
    from fedara_flwr.client.session import Session
    from fedara_flwr.client.train import ClientData
    from fedara_flwr.spec import Arrays
    from fedara_flwr.wire.plan import TrainPlan

app = ClientApp()


def client_key(context: Context) -> str:
    """node-config `client-key`, else `partition-id`, else the node's id."""
    node = context.node_config
    for name in ("client-key", "partition-id"):
        if name in node:
            return str(node[name])
    return f"node-{context.node_id}"


def in_simulation(context: Context) -> bool:
    """Whether server and client are one user's processes: under Ray, or in the in-process engine."""
    ray = sys.modules.get("ray")
    return bool(ray is not None and ray.is_initialized()) or context.node_config.get("engine") == "inprocess"


def _open(context: Context, labels: tuple[str, ...] = ()) -> tuple[Session, ClientData]:
    """The resident session and this client's data. Labels are the server's, kept in the node's state from `ready` on."""
    import torch

    from fedara_flwr.client import session

    settings = Settings.from_flat(context.run_config)
    torch.set_num_threads(settings.train.threads)
    if labels:
        context.state["labels"] = ConfigRecord({"labels": list(labels)})
    elif "labels" in context.state:
        labels = tuple(context.state.config_records["labels"]["labels"])  # type: ignore[arg-type]
    else:
        raise ConfigError("this node was not asked whether it is ready, it has no labels")
    node = context.node_config
    settings, path = session.own_settings(settings, node, in_simulation(context))
    resident = session.resident(settings, labels)
    partition, partitions = int(node.get("partition-id", 0)), int(node.get("num-partitions", 1))
    return resident, resident.client_data(client_key(context), partition, partitions, path)


@app.query("whoami")
def whoami(message: Message, context: Context) -> Message:
    """Client key, number of partitions, protocol version and terms."""
    answer = ConfigRecord(
        {
            "protocol": PROTOCOL,
            "client-key": client_key(context),
            "num-partitions": int(context.node_config.get("num-partitions", 0)),
            "terms": ",".join(terms.names()),
        }
    )
    return Message(RecordDict({"whoami": answer}), reply_to=message)


@app.query("ready")
def ready(message: Message, context: Context) -> Message:
    """Whether this node can train: how many examples it has, and what it must have in common with the server."""
    labels = message.content.config_records["ready"]["labels"]
    examples = 0
    try:
        from fedara_flwr.adapters.backbone import tokenizer_digest
        from fedara_flwr.data.federation import federation

        resident, data = _open(context, tuple(labels))  # type: ignore[arg-type]
        examples = len(data.train)
        shared = not context.node_config.get("data-path")
        answer = ConfigRecord(
            {
                "fingerprint": resident.adapted.spec.fingerprint,
                "tokenizer": tokenizer_digest(resident.tokenizer),
                "data": federation(resident.settings.data, resident.settings.seed).digest if shared else "own",
            }
        )
    except ConfigError as error:
        answer = ConfigRecord({"error": str(error)})
    return Message(RecordDict({"ready": answer, "metrics": MetricRecord({"num-examples": examples})}), reply_to=message)


def _receive(message: Message, context: Context) -> tuple[Session, ClientData, TrainPlan, Arrays]:
    """What TRAIN and EVALUATE bring, checked against this node's model."""
    from fedara_flwr.wire.records import plan_from_content, read_arrays, received_parts

    resident, data = _open(context)
    spec = resident.adapted.spec
    plan = plan_from_content(message.content, len(spec.modules))
    parts = received_parts(plan, "E" not in message.content.array_records["arrays"])
    return resident, data, plan, read_arrays(message.content, spec, plan.mask, parts)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training by the plan."""
    from fedara_flwr.client.train import train as run
    from fedara_flwr.wire.records import update_to_content

    resident, data, plan, arrays = _receive(message, context)
    update = run(resident.adapted, resident.task, resident.tokenizer, data, plan, arrays, client_key(context))
    return Message(update_to_content(update, plan), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The received model on this client's own held-out rows."""
    from fedara_flwr.client.train import evaluate as run

    resident, data, plan, arrays = _receive(message, context)
    resident.adapted.load(arrays, plan.mask, plan.scales)
    metrics: dict[str, Any] = {"eval-examples": 0} | run(resident.adapted, resident.task, resident.tokenizer, data)
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
