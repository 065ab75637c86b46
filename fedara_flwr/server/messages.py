"""Push messages, pull their replies one at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

POLL = (0.02, 0.25)  # seconds between looks: first, longest
PULL_PATIENCE = 1.0  # seconds for which a look may keep the others waiting


class _Look(threading.Thread):
    """Pulls one reply. Flower waits for up to three minutes where a node began to send its reply and was cut off."""

    def __init__(self, grid: Grid, message_id: str) -> None:
        super().__init__(daemon=True)
        self.grid, self.message_id = grid, message_id
        self.pulled: list[Message] | Exception = []

    def run(self) -> None:
        try:
            self.pulled = list(self.grid.pull_messages([self.message_id]))
        except Exception as error:  # whatever a reply does to the parser is that node's failure alone
            self.pulled = error


def replies(
    grid: Grid,
    messages: Sequence[Message],
    timeout: float,
    again: Callable[[int, Message], Message | None] = lambda index, reply: None,
) -> Iterator[tuple[int, Message | Exception]]:
    """Send `messages` and yield (index, reply) as replies come, until all are there or `timeout` seconds are over.

    Where `again` answers a reply with a message, that is sent and its reply waited for instead; once per message, so that no
    node can keep the others waiting.

    One message id per pull: Flower confirms a batch before it inflates it, so one garbage reply would lose the good ones
    beside it. What cannot be inflated comes as the exception that it raised. A pull that takes long goes on beside the others,
    and at the deadline is left to itself; only a grid whose pull runs the client (`runs_clients`) is waited for.
    """
    beside = not getattr(grid, "runs_clients", False)
    ids = list(grid.push_messages(messages))
    pending = {message_id: index for index, message_id in enumerate(ids) if message_id}
    for index, message_id in enumerate(ids):
        if not message_id:
            yield index, ConnectionError("the message could not be sent")
    deadline, wait = time.monotonic() + timeout, POLL[0]
    repeated: set[int] = set()
    looks: dict[str, _Look] = {}
    while pending:
        any_came = False
        for message_id in list(pending):
            if time.monotonic() > deadline:
                return
            if message_id not in looks:
                look = looks[message_id] = _Look(grid, message_id)
                if beside:
                    look.start()
                    look.join(PULL_PATIENCE)
                else:
                    look.run()
            if looks[message_id].is_alive():
                continue
            pulled = looks.pop(message_id).pulled
            if isinstance(pulled, Exception):
                yield pending.pop(message_id), pulled
                continue
            for reply in pulled[:1]:
                any_came = True
                index = pending.pop(message_id)
                try:
                    more = again(index, reply) if index not in repeated else None
                except Exception as error:  # as above: reading it may raise
                    yield index, error
                    continue
                repeated.add(index)
                if more is None:
                    yield index, reply
                elif new_id := next(iter(grid.push_messages([more])), None):
                    pending[new_id] = index
                else:
                    yield index, ConnectionError("the message could not be sent")
        wait = POLL[0] if any_came else min(wait * 1.5, POLL[1])
        if pending:
            time.sleep(wait)
