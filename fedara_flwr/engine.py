"""The in-process engine: the same ServerApp and ClientApp code in one process, no Ray, no sockets.

Messages are the same Flower records, so bytes, checks and results are those of `flwr run`; only the transport is missing.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedara_flwr.client_app import app as client_app
from fedara_flwr.config import Settings
from fedara_flwr.runs import RunDirectory
from fedara_flwr.server_app import run as run_server

CLIENT_RAISED = 2  # Flower's code for a ClientApp that raised


class InProcessGrid(Grid):
    """A Grid whose nodes are calls of a ClientApp, made when their reply is pulled."""

    runs_clients = True  # so a pull takes as long as it takes, and they go one after the other (server/messages)

    def __init__(self, run_config: UserConfig, nodes: int, app: ClientApp = client_app) -> None:
        # Message refuses to be made outside a Flower process unless these are set
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
        self.app = app
        self.contexts = {
            node_id: Context(
                run_id=1,
                node_id=node_id,
                node_config={"partition-id": i, "num-partitions": nodes, "engine": "inprocess"},
                state=RecordDict(),
                run_config=run_config,
            )
            for i, node_id in enumerate(range(1000, 1000 + nodes))
        }
        self._waiting: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Not needed: there is one run."""

    @property
    def run(self) -> Run:
        """There is no Run outside a SuperLink."""
        raise RuntimeError("the in-process engine has no SuperLink run")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As Flower's own."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes, always there."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue; nothing runs yet."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            self._waiting[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the ClientApp for each queued message and return its reply."""
        return [self._call(self._waiting.pop(i)) for i in message_ids if i in self._waiting]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push and pull all."""
        return self.pull_messages(self.push_messages(messages))

    def _call(self, message: Message) -> Message:
        try:
            reply = self.app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # as Flower does: whatever a client raises is its reply
            reply = Message(Error(CLIENT_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
        return reply


def run(run_config: UserConfig, nodes: int) -> RunDirectory:
    """A whole run in this process.

    Raises:
        ConfigError: as `server_app.run`.
    """
    settings = Settings.from_flat(run_config)
    return run_server(InProcessGrid(settings.to_flat(), nodes), settings)
