"""Which round's model a run leaves: the best by the task's main metric on the server's validation data, or the last.

A best round costs the copy on the disk that its checkpoint is, never more memory: the loop remembers its number and value.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedara_flwr.server.checkpoint import BadCheckpoint, Checkpoints
from fedara_flwr.server.state import ServerState
from fedara_flwr.strategies.base import Method
from fedara_flwr.tasks import Metric
from fedara_flwr.tasks import find as find_task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """What a run leaves.

    Attributes:
        state: the server's state after the round whose model that is.
        said: which round that is, and why.
    """

    state: ServerState
    said: str

    @property
    def facts(self) -> dict[str, Any]:
        """As federated.json has it."""
        return {"round": self.state.server_round, "said": self.said}


def why_last(method: Method) -> str:
    """Why the last round's model is left, whatever the figures are; '' where the best one is."""
    run = method.settings.run
    if run.export == "last":
        return "run.export = 'last'"
    if method.kept:  # the server's figures are of a model that no client has
        return f"each client keeps its own {', '.join(sorted(method.kept))}, and the server cannot measure with it"
    return "" if run.checkpoint_every else "run.checkpoint-every = 0 keeps no other"


def main_metric(method: Method) -> Metric:
    """The main metric of the run's task."""
    return find_task(method.settings.data.task).metric


def note_best(method: Method, state: ServerState, measured: Mapping[str, Any] | None) -> None:
    """Remember this round if it is the best so far; of equal ones the later, which has seen more.

    Before round 1 only a head that was solved counts: else nothing was learnt.
    """
    metric = main_metric(method)
    value = (measured or {}).get(metric.name, math.nan)
    if why_last(method) or not math.isfinite(value) or not (state.server_round or state.solved):
        return
    if not state.best or metric.better(value, state.best["value"]):
        state.best = {"round": state.server_round, "value": float(value)}


def choose(checkpoints: Checkpoints, method: Method, state: ServerState) -> Chosen:
    """What a run that has reached `state` leaves; the best round's state is read from its checkpoint.

    Where that cannot be read, the log says why, and it is the last.
    """
    last, name, best = f"round {state.server_round}, the last", main_metric(method).name, state.best
    if why := why_last(method):
        return Chosen(state, f"{last}: {why}")
    if not best:
        return Chosen(state, f"{last}: {name} was never measured on validation data")
    said = f"the best by {name} on validation data, {best['value']:.3f}"
    if best["round"] == state.server_round:
        return Chosen(state, f"{last} and {said}")
    path = checkpoints.path(best["round"])
    try:
        return Chosen(checkpoints.read(path, method.spec)[0], f"round {best['round']} of {state.server_round}, {said}")
    except BadCheckpoint as error:
        logger.warning("the best round's checkpoint %s is not used: %s", path.name, error)
        return Chosen(state, f"{last}: the checkpoint of round {best['round']} cannot be used, which was {said}")
