"""Push messages, pull their replies one at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

POLL = (0.02, 0.25)  # seconds between looks: first, longest


def replies(grid: Grid, messages: Sequence[Message], timeout: float) -> Iterator[tuple[int, Message | Exception]]:
    """Send `messages` and yield (index, reply) as replies come, until all are there or `timeout` seconds are over.

    One message id per pull: Flower confirms a batch before it inflates it, so one garbage reply would lose the good ones
    beside it. What cannot be inflated comes as the exception that it raised. A pull that has begun is not broken off.
    """
    ids = list(grid.push_messages(messages))
    pending = {message_id: index for index, message_id in enumerate(ids) if message_id}
    for index, message_id in enumerate(ids):
        if not message_id:
            yield index, ConnectionError("the message could not be sent")
    deadline, wait = time.monotonic() + timeout, POLL[0]
    while pending:
        found = False
        for message_id in list(pending):
            if time.monotonic() > deadline:
                return
            try:
                pulled = list(grid.pull_messages([message_id]))
            except Exception as error:  # whatever a reply does to the parser is that node's failure alone
                yield pending.pop(message_id), error
                continue
            for reply in pulled[:1]:
                found = True
                yield pending.pop(message_id), reply
        wait = POLL[0] if found else min(wait * 1.5, POLL[1])
        if pending:
            time.sleep(wait)
