"""What every way of merging has in common."""

from __future__ import annotations

from typing import Protocol

from fedara_flwr.model.spec import Arrays
from fedara_flwr.wire.plan import Update


class Merger(Protocol):
    """Takes updates in the round's order, one at a time.

    `memory` says what it holds: "one" a running sum, "stack" all factors, "all" all updates. One that leaves whole updates out
    names their clients in `left_out` after `result`.
    """

    memory: str

    def add(self, client_key: str, update: Update, weight: int) -> None: ...

    def result(self) -> Arrays: ...

    def report(self) -> dict[str, object]:
        """What to write into the round's line, after `result`."""
        ...
