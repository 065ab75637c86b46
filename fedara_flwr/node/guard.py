"""What a client lets out, by its own settings (client/node): which metrics, and whether its update is cut and noised first.

The server has no say in it and is not told. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedara_flwr.model.difference import difference, share_within
from fedara_flwr.model.spec import Arrays
from fedara_flwr.seeds import secure_normal

METRICS = (
    "loss",
    "loss-last",
    "steps",
    "tokens",
    "blocks",
    "seconds-train",
    "seconds-forward",
    "seconds-backward",
    "seconds-all",
    "peak-memory-mb",
    "bytes-free",
    "bytes-block",
    "joules",
    "temperature",
    "flops-forward",
    "flops-backward",
    "coding-error",
    "feedback-norm",
    "eval-loss",
    "eval-accuracy",
    "eval-macro-f1",
    "eval-entity-f1",
)
"""All metrics that may leave a client: figures of training and of whole evaluations, no label's own. Beside them goes
`num-examples`, which every reply must have, and with `eval-…` their `eval-examples`."""


@dataclass(frozen=True)
class Guard:
    """A node's choice.

    Attributes:
        metrics: names that may leave.
        clip: length to which the update's difference from what was received is cut, over all parts together; 0 = not cut.
        noise: standard deviation of the noise on each number of the difference, over `clip`; 0 = none.
    """

    metrics: tuple[str, ...] = METRICS
    clip: float = 0.0
    noise: float = 0.0

    def let_out(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `metrics` that may leave."""
        found = {name: value for name, value in metrics.items() if name in self.metrics}
        if "eval-examples" in metrics and any(name.startswith("eval-") for name in found):
            found["eval-examples"] = metrics["eval-examples"]
        return found

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
