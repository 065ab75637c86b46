"""Why a run ends before its last round: early stopping, `should_stop`, a signal, or a SuperLink that has ended it."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fedara_flwr.config import Settings
from fedara_flwr.keys import ConfigError
from fedara_flwr.server.state import ServerState
from fedara_flwr.strategies.base import Method
from fedara_flwr.tasks import find as find_task

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RunFailed(RuntimeError):
    """The run cannot go on; one line that says why."""


class TooFewNodes(RunFailed, TimeoutError):
    """Fewer nodes than the run needs came in time."""


class Interrupted(BaseException):
    """The process was told to end."""


@contextmanager
def on_signals(numbers: Iterable[int], handler: Any) -> Iterator[None]:
    """Inside, `handler` is called for these signals; in a thread nothing, as Python cannot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM raises Interrupted, further ones do nothing; not so in a thread."""

    def interrupt(number: int, frame: object) -> None:
        # Flower sends one of its own when the process that started this one is gone
        for one in SIGNALS:
            signal.signal(one, signal.SIG_IGN)
        raise Interrupted

    with on_signals(SIGNALS, interrupt):
        yield


def check_stopping(settings: Settings, method: Method) -> None:
    """Refuse early stopping where the server's figures are of a model that no client has; ConfigError then."""
    if settings.run.early_stopping_patience and method.kept:
        kept = ", ".join(sorted(method.kept))
        raise ConfigError(
            f"run.early-stopping-patience = {settings.run.early_stopping_patience}: with method {method.name!r} each client "
            f"keeps its own {kept}, which the server cannot measure with, allowed is 0"
        )


def note_gain(settings: Settings, state: ServerState, measured: Mapping[str, Any] | None) -> None:
    """Count how many evaluations in a row brought no gain over the best one; a round that changed nothing is none.

    Before round 1 only a head that was solved counts: else nothing was learnt.
    """
    metric = find_task(settings.data.task).metric
    if not (state.server_round or state.solved) or state.failed_rounds or metric.name not in (measured or {}):
        return
    value, best = float((measured or {})[metric.name]), state.stopping.get("best")
    better = math.isfinite(value) and (best is None or metric.better(value, best))
    gain = better and (best is None or abs(value - best) > settings.run.early_stopping_threshold)
    since = 0 if gain else state.stopping.get("evaluations", 0) + 1
    found = {"best": value, "round": state.server_round} if better else state.stopping
    state.stopping = {**found, "evaluations": since}


def why_stop(settings: Settings, state: ServerState, should_stop: Callable[[], bool] | None = None) -> str:
    """Why no further round is done after the state's; '' where the rounds go on."""
    patience, since = settings.run.early_stopping_patience, state.stopping.get("evaluations", 0)
    if 0 < patience <= since:
        name, best = find_task(settings.data.task).metric.name, state.stopping.get("round")
        line = f"stopped after round {state.server_round}: no gain of {name} in {since} evaluations"
        return line if best is None else f"{line}; best round {best}"
    if should_stop is not None and should_stop():
        return f"stopped after round {state.server_round}: should_stop says so"
    return ""
