"""What a client lets out, by its own node-config: which metrics, and whether its update is cut and noised before it is sent.

The server has no say in it and is not told. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedara_flwr.config import ConfigError, nearest
from fedara_flwr.seeds import secure_normal
from fedara_flwr.spec import Arrays

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
    "flops-forward",
    "flops-backward",
    "coding-error",
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

    @classmethod
    def read(cls, node_config: Mapping[str, Any]) -> Guard:
        """The keys `metrics` (names, comma-separated; '' = none), `update-clip` and `update-noise` of a node-config.

        Raises:
            ConfigError: a value is not allowed.
        """
        text = str(node_config.get("metrics", ",".join(METRICS)))
        metrics = tuple(name.strip() for name in text.split(",") if name.strip())
        for name in metrics:
            if name not in METRICS:
                raise ConfigError(f"node-config metrics = {text!r}: there is no metric {name!r}{nearest(name, METRICS)}")
        clip, noise = (_number(node_config, key) for key in ("update-clip", "update-noise"))
        if noise and not clip:
            raise ConfigError(f"node-config update-noise = {noise!r}: needs update-clip above 0")
        return cls(metrics, clip, noise)

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
        moved = {part: values.astype(np.float64) - received[part] for part, values in arrays.items()}
        length = math.sqrt(sum(float(change @ change) for change in moved.values()))
        share = min(1.0, self.clip / length) if length else 1.0
        spread = self.noise * self.clip
        out = {}
        for part, change in moved.items():
            noise = spread * normal(len(change)) if spread else 0.0
            out[part] = (received[part] + share * change + noise).astype(np.float32)
        return out


def _number(node_config: Mapping[str, Any], key: str) -> float:
    value = node_config.get(key, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(f"node-config {key} = {value!r}: allowed is a number from 0")
    return float(value)
