"""The in-process engine: the same ServerApp and ClientApp code in one process, no Ray, no sockets.

Messages are the same Flower records, so bytes, checks and results are those of `flwr run`; only the transport is missing.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable
from contextlib import suppress

from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedara_flwr.client_app import Received, receive
from fedara_flwr.client_app import app as client_app
from fedara_flwr.config import OutputSettings
from fedara_flwr.data.partitions import check_partition
from fedara_flwr.flower import Run, TaskIdentity
from fedara_flwr.model.spec import Arrays
from fedara_flwr.node.settings import NodeSettings
from fedara_flwr.runs.directory import RunDirectory
from fedara_flwr.server_app import run as run_server
from fedara_flwr.tasks import open_task, read_settings
from fedara_flwr.wire.plan import Update

logger = logging.getLogger(__name__)

CLIENT_RAISED = 2  # Flower's code for a ClientApp that raised


class InProcessGrid(Grid):
    """A Grid whose nodes are calls of a ClientApp, made when their reply is pulled.

    With `run.together` above 1 the app's training is done for several of them at once where that is possible. Whoever gets no
    reply from it is called alone: so failures, and what cannot be done together, are as ever.
    """

    runs_clients = True  # so a pull takes as long as it takes, and they go one after the other (server/messages)
    simulation = True

    def __init__(self, run_config: UserConfig, nodes: int, app: ClientApp = client_app) -> None:
        # Message refuses to be made outside a Flower process unless these are set
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
        self.app = app
        # another app has keys of its own
        ours = read_settings(run_config).run if app is client_app else OutputSettings()
        self.together = ours.together
        self.contexts = {
            node_id: Context(
                run_id=1,
                node_id=node_id,
                node_config={"partition-id": i, "num-partitions": nodes, "engine": "inprocess", "device": ours.device},
                state=RecordDict(),
                run_config=run_config,
            )
            for i, node_id in enumerate(range(1000, 1000 + nodes))
        }
        self._waiting: dict[str, Message] = {}
        self._replies: dict[str, Message] = {}
        self._alone: set[str] = set()
        self._steps: dict[str, int] = {}

    def set_run(self, run: Run) -> None:
        """Do nothing: this grid has one run and needs no telling."""

    @property
    def run(self) -> Run:
        """Not available: there is no Run outside a SuperLink."""
        raise RuntimeError("the in-process engine has no SuperLink run")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to one node, made as Flower's own grids make it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The ids of all nodes, which are always there."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages and give back their ids; nothing runs yet."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            self._waiting[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the ClientApp for each queued message and return its reply."""
        return [self._reply(message_id) for message_id in message_ids if message_id in self._waiting]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push the messages and pull all their replies."""
        return self.pull_messages(self.push_messages(messages))

    def _reply(self, message_id: str) -> Message:
        message, tried = self._waiting[message_id], message_id in self._replies or message_id in self._alone
        if self.together > 1 and message.metadata.message_type == MessageType.TRAIN and not tried:
            self._train_together(message)
        del self._waiting[message_id]
        self._alone.discard(message_id)
        self._steps.pop(message_id, None)
        return self._replies.pop(message_id, None) or self._call(message)

    def _train_together(self, message: Message) -> None:
        """Train together those that can be trained with the receiver of `message`, and keep all their replies."""
        group = self._group(message)
        if len(group) < 2:
            return
        from fedara_flwr.client.together import train_together
        from fedara_flwr.client.train import Job

        self._alone |= {received.message.metadata.message_id for received, _ in group}
        jobs = [Job(r.data, r.plan, arrays, r.client_key, r.node.guard) for r, arrays in group]
        model = group[0][0].session
        try:
            updates = train_together(model.learner, jobs)
        except Exception as error:  # out of memory, for example
            names = ", ".join(job.client_key for job in jobs)
            logger.warning("clients %s are trained one after the other: %s: %s", names, type(error).__name__, error)
            return
        for (received, arrays), update in zip(group, updates, strict=True):
            with suppress(Exception):  # called alone, the client says what is wrong
                if isinstance(update, Update):
                    reply = received.answer(update, arrays)
                    self._replies[received.message.metadata.message_id] = self._from(reply, received.message)

    def _group(self, message: Message) -> list[tuple[Received, Arrays]]:
        """Who waits and can be trained with the receiver of `message`, that one first, each with the values that came."""
        plan = message.content.config_records.get("plan")
        busy = {message.metadata.message_id, *self._replies, *self._alone}
        waiting = [message, *(other for message_id, other in self._waiting.items() if message_id not in busy)]
        group: list[tuple[Received, Arrays]] = []
        for other in waiting:
            if len(group) == self.together:
                break
            if other.metadata.message_type != MessageType.TRAIN or other.content.config_records.get("plan") != plan:
                continue
            if group and self._steps.get(other.metadata.message_id, group[0][0].optimiser_steps) != group[0][0].optimiser_steps:
                continue
            candidate = self._receive(other, group[0][0] if group else None)
            if candidate is not None:
                group.append(candidate)
            elif not group:
                break
        return group

    def _receive(self, message: Message, first: Received | None) -> tuple[Received, Arrays] | None:
        """What a node received and the values in it; None where it cannot be trained together with others, or with `first`."""
        from fedara_flwr.client.together import allows

        context = self.contexts[message.metadata.dst_node_id]
        with suppress(Exception):  # called alone, the client says what is wrong
            received = receive(message, context, NodeSettings.read(context.node_config))
            if not isinstance(received, Received) or not allows(received.plan) or not len(received.data.train):
                return None
            self._steps[message.metadata.message_id] = received.optimiser_steps
            if first is not None:
                return (received, received.arrays()) if received.optimiser_steps == first.optimiser_steps else None
            if not received.session.apart:
                return received, received.arrays()
            logger.warning("run.together = %d: one after the other instead: %s", self.together, received.session.apart)
            self.together = 1
        return None

    def _call(self, message: Message) -> Message:
        try:
            reply = self.app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # as Flower does: whatever a client raises is its reply
            reply = Message(Error(CLIENT_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)
        return self._from(reply, message)

    @staticmethod
    def _from(reply: Message, message: Message) -> Message:
        reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
        return reply


def run(run_config: UserConfig, nodes: int) -> RunDirectory:
    """Do a whole run in this process, with so many simulated nodes.

    Raises:
        ConfigError: as `server_app.run`.
    """
    settings = read_settings(run_config)
    task = open_task(settings.data)
    check_partition(settings.data, task.grouped, task.group_key)
    return run_server(InProcessGrid(settings.to_flat(), nodes), settings)
