"""The figures that replies have beside arrays, by name. No torch."""

from __future__ import annotations

from functools import cache

from fedara_flwr.tasks.registry import evaluation_metrics
from fedara_flwr.wire import NUM_TARGETS

EXAMPLES = "eval-examples"
TRAINING = (
    NUM_TARGETS,
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
    "flops-below",
    "coding-error",
    "feedback-norm",
)
"""Figures of training that may leave a client. Beside them go whole evaluations, no label's own: every task's metrics as
`eval-…`, and with them `eval-examples`; and `num-examples`, which every reply must have."""


@cache
def known_metrics() -> tuple[str, ...]:
    """All metrics that may leave a client: of training, and of every task that is installed here."""
    return (*TRAINING, *sorted(evaluation_metrics()))
