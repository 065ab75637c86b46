"""What nodes say of themselves, in words and figures: cut before anything looks at it, by names that the run knows."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import cache

from fedara_flwr.log import printable
from fedara_flwr.wire.arrays import MAX_DETAIL, MAX_NAME
from fedara_flwr.wire.figures import EXAMPLES, known_metrics

logger = logging.getLogger(__name__)
REASON = 10_000  # characters of a reason in which Ray's words are looked for
LIST = 100_000  # of a list of names


def text(value: object, most: int = MAX_DETAIL) -> str:
    """A text from outside on one line, cut first; '' where it is none."""
    return printable(value[:most]) if isinstance(value, str) else ""


def shown(value: object) -> str:
    """A value from outside as a line may hold it; of anything but texts and numbers only the kind."""
    if isinstance(value, str):
        return repr(text(value, MAX_NAME))
    return repr(value)[:MAX_NAME] if value is None or isinstance(value, int | float) else f"a {type(value).__name__}"


def names(value: object) -> set[str]:
    """Names that are joined by commas."""
    return set(value[:LIST].split(",")) if isinstance(value, str) else set()


def last_line(reason: str | None) -> str:
    """The last line of a traceback that came as a reason, cut to a readable length, without control characters."""
    return text((reason or "").rstrip().rpartition("\n")[2].lstrip()[:MAX_DETAIL]) or "no reason given"


def actor_died(reason: str | None) -> bool:
    """Whether Ray says that a process of the simulation died."""
    words = (reason or "")[:REASON].lower()
    return "actor" in words and ("is dead" in words or "died" in words)


def listed(client: str, metrics: Mapping[str, object]) -> dict[str, float]:
    """The figures that have a known name; how many have not is said. A tracker draws a line for each name, and keeps it."""
    known = {name: float(value) for name, value in metrics.items() if name in _known() and isinstance(value, int | float)}
    if more := [name for name in metrics if name not in known]:
        logger.warning("client %s: %d metrics are left out, nobody here knows %s", client, len(more), shown(min(more)))
    return known


@cache
def _known() -> frozenset[str]:
    return frozenset({*known_metrics(), EXAMPLES, "num-examples", "seconds-elapsed"})


def most_held_out(examples: int, share: float) -> int:
    """Most rows that a client that trains on so many can have held out; `share` is `data.client-validation`."""
    return math.ceil(examples * max(1.0, share / (1 - share)))
