"""Push messages, pull their replies one at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from fedara_flwr.server.waiting import Waiting

POLL = (0.02, 0.25)  # seconds between looks: first, longest
PULL_PATIENCE = 1.0  # seconds for which a look may keep the others waiting
Again = Callable[[int, Message], Message | None]


def simulates(grid: Grid) -> bool:
    """Whether the server's own side runs the nodes: in Flower's simulation, or in the in-process engine."""
    # by name: a SuperLink's server has no need of the module, which takes a second to import
    return bool(getattr(grid, "simulation", type(grid).__name__ == "InMemoryGrid"))


class _Look(threading.Thread):
    """Pulls one reply. Flower waits for up to three minutes where a node began to send its reply and was cut off."""

    def __init__(self, grid: Grid, message_id: str) -> None:
        super().__init__(daemon=True)
        self.grid, self.message_id = grid, message_id
        self.pulled: list[Message] | BaseException = []

    def run(self) -> None:
        try:
            self.pulled = list(self.grid.pull_messages([self.message_id]))
        except BaseException as error:  # whatever a reply does to the parser is that node's failure alone
            self.pulled = error


class Exchange:
    """Messages that were sent, and their replies as they come; a message is named by its index.

    One message id per pull: Flower confirms a batch before it inflates it, so one garbage reply would lose the good ones
    beside it. What cannot be inflated comes as the exception that it raised. A pull that takes long goes on beside the others;
    only a grid whose pull runs the client (`runs_clients`) is waited for.

    Attributes:
        beside: whether pulls go on beside each other.
    """

    def __init__(self, grid: Grid, messages: Sequence[Message], again: Again = lambda index, reply: None) -> None:
        self.beside = not getattr(grid, "runs_clients", False)
        self._grid, self._again = grid, again
        self._ids: dict[int, str] = dict(enumerate(grid.push_messages(messages)))
        self._repeated: set[int] = set()
        self._looks: dict[str, _Look] = {}

    @property
    def open(self) -> list[int]:
        """Messages without a reply so far."""
        return list(self._ids)

    def look(self, index: int) -> Message | Exception | None:
        """The reply of one message, which is open no more then; None where it is not there yet."""
        if not (message_id := self._ids[index]):
            return self._closed(index, ConnectionError("the message could not be sent"))
        if message_id not in self._looks:
            look = self._looks[message_id] = _Look(self._grid, message_id)
            if self.beside:
                look.start()
                look.join(PULL_PATIENCE)
            else:
                look.run()
        if self._looks[message_id].is_alive():
            return None
        pulled = self._looks.pop(message_id).pulled
        if isinstance(pulled, Exception):
            return self._closed(index, pulled)
        if isinstance(pulled, BaseException):  # Flower's word that the run has ended is none, and belongs to no node
            raise pulled
        if not pulled:
            return None
        try:
            more = None if index in self._repeated else self._again(index, pulled[0])
        except Exception as error:  # as above: reading it may raise
            return self._closed(index, error)
        if more is None:
            return self._closed(index, pulled[0])
        self._repeated.add(index)
        self._ids[index] = next(iter(self._grid.push_messages([more])), "")
        return None

    def _closed(self, index: int, reply: Message | Exception) -> Message | Exception:
        del self._ids[index]
        return reply


def replies(
    grid: Grid,
    messages: Sequence[Message],
    timeout: float,
    again: Again = lambda index, reply: None,
    enough: Callable[[], bool] = lambda: False,
    patience: float = 0.0,
    what: str = "",
    limit: str = "strategy.round-timeout",
) -> Iterator[tuple[int, Message | Exception]]:
    """Send `messages` and yield (index, reply) as replies come, until all are there or `timeout` seconds are over.

    Where `again` answers a reply with a message, that is sent and its reply waited for instead; once per message, so that no
    node can keep the others waiting. Once there is `enough`, the others have `patience` seconds more; not where a pull runs
    the client, which nobody waits for. Pulls that still go on at the deadline are left to themselves. A wait without replies
    is spoken of, as one for `what` by the key `limit`.
    """
    exchange = Exchange(grid, messages, again)
    deadline, wait, closing = time.monotonic() + timeout, POLL[0], not exchange.beside

    def say(passed: float) -> str:
        there, left = len(messages) - len(exchange.open), max(0.0, deadline - time.monotonic())
        return f"{what}: no reply in {passed:.0f} s, {there} of {len(messages)} are there; at most {left:.0f} s more ({limit})"

    waiting = Waiting(say)
    while exchange.open:
        any_came = False
        for index in exchange.open:
            if not closing and enough():
                deadline, closing = min(deadline, time.monotonic() + patience), True
            if time.monotonic() > deadline:
                return
            if (reply := exchange.look(index)) is not None:
                any_came = True
                yield index, reply
                waiting.news()
        waiting.look()
        wait = POLL[0] if any_came else min(wait * 1.5, POLL[1])
        if exchange.open:
            time.sleep(wait)
