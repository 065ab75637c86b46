"""What a client lets out, by its own settings (node/settings): which metrics, and whether its update is cut and noised first.

The server has no say in it and is not told. No torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from fedara_flwr.log import printable
from fedara_flwr.model.difference import difference, share_within
from fedara_flwr.model.spec import Arrays
from fedara_flwr.seeds import secure_normal
from fedara_flwr.wire.figures import EXAMPLES, known_metrics

logger = logging.getLogger(__name__)


@cache
def _say_unknown(name: str) -> None:
    logger.warning("metric %r is not sent: neither training nor a task that is installed here knows it", printable(name))


@dataclass(frozen=True)
class Guard:
    """What a node lets out of its updates and metrics, as its owner chose.

    Attributes:
        metrics: names that may leave; None = all that are known here.
        clip: length to which the update's difference from what was received is cut, over all parts together; 0 = not cut.
        noise: standard deviation of the noise on each number of the difference, over `clip`; 0 = none.
    """

    metrics: tuple[str, ...] | None = None
    clip: float = 0.0
    noise: float = 0.0

    def let_out(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `metrics` that may leave; one that nobody knows is named in the log, once."""
        allowed: dict[str, Any] = {}
        for name, value in metrics.items():
            if name not in known_metrics() and name != EXAMPLES:
                _say_unknown(name)
            elif self.metrics is None or name in self.metrics:
                allowed[name] = value
        allowed.pop(EXAMPLES, None)
        if EXAMPLES in metrics and any(name.startswith("eval-") for name in allowed):
            allowed[EXAMPLES] = metrics[EXAMPLES]
        return allowed

    def protect(self, arrays: Arrays, received: Arrays, normal: Callable[[int], np.ndarray] = secure_normal) -> Arrays:
        """Trained arrays as they may leave: the difference from `received`, packed alike, cut to `clip` and noised."""
        if not self.clip:
            return arrays
        moved = difference(arrays, received)
        share = share_within(moved, self.clip)
        spread = self.noise * self.clip
        out = {}
        for part, change in moved.items():
            noise = spread * normal(len(change)) if spread else 0.0
            out[part] = (received[part] + share * change + noise).astype(np.float32)
        return out
