"""Lines on what is waited for: after a minute, and again each time that the wait has doubled."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)
FIRST = 60.0  # seconds without news until the first line


class Waiting:
    """One wait. News begin it anew: what comes slowly is not what never comes.

    Args:
        say: what is waited for, and until when, of a wait that has begun so many seconds ago.
    """

    def __init__(self, say: Callable[[float], str]) -> None:
        self._say = say
        self._began = time.monotonic()
        self._next = FIRST

    def news(self) -> None:
        """Something came."""
        self._began, self._next = time.monotonic(), FIRST

    def look(self) -> None:
        """Say the line if it is time for it."""
        if (passed := time.monotonic() - self._began) >= self._next:
            self._next *= 2
            logger.info("%s", self._say(passed))
