"""Who fails again and again sits out: one round, then two, four, … until a reply of theirs counts.

A node that never answers costs every round that draws it all of `strategy.round-timeout`. Rounds are counted and not seconds,
and a round's failures are taken together at its end, so a run that is repeated or goes on leaves out the same clients.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

logger = logging.getLogger(__name__)
LONGEST = 2**16  # rounds to sit out


class Strikes:
    """Failures in a row by client.

    Args:
        allowed: failures in a row from which on a client sits out (`strategy.max-client-failures`).
        kept: by client its failures in a row, the first round in which it is asked again, and why it failed last; changed in
            place, so it can be of a state that is saved.

    Attributes:
        round: the present one.
    """

    def __init__(self, allowed: int, kept: dict[str, list[Any]] | None = None) -> None:
        self._allowed, self._kept = allowed, {} if kept is None else kept
        self.round = 0

    def failed(self, client: str, why: str) -> None:
        """Count a failure; `why` is shown."""
        failures = self._kept.get(client, [0])[0] + 1
        rest = min(2 ** (failures - self._allowed), LONGEST) if failures >= self._allowed else 0
        self._kept[client] = [failures, self.round + 1 + rest if rest else self.round, why]
        if rest:
            logger.warning("client %s %s", client, self.sitting(self.round + 1)[client])

    def settle(self, failed: Iterable[tuple[str, str]], well: Iterable[str]) -> None:
        """Take a round's outcome: (client, why) of those that failed, and those whose replies counted."""
        good = set(well)
        for client in good:
            self._kept.pop(client, None)
        for client, why in sorted(dict(failed).items()):
            if client not in good:
                self.failed(client, why)

    def sits_out(self, client: str) -> bool:
        """Whether the client is not asked in the present round."""
        return client in self._kept and self._kept[client][1] > self.round

    def sitting(self, server_round: int) -> dict[str, str]:
        """Who sits out that round, as things are: until when, and why."""
        return {
            client: f"failed {failures} times in a row ({why}), and sits out until round {until}"
            for client, (failures, until, why) in sorted(self._kept.items())
            if until > server_round
        }
