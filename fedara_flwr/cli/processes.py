"""The processes of one launch, which end with it, and what Ctrl-C does meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from typing import Any

import psutil

from fedara_flwr.server.stopping import on_signals

TAG = "FEDARA_LAUNCH"  # marks every process of one launch in its environment
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO = 3.0  # seconds


class AtOnce(KeyboardInterrupt):
    """Ctrl-C came a second time."""


def end_tagged(tag: str) -> None:
    """End every process of this launch: asked first, killed after ten seconds, or at once where these are interrupted."""
    try:
        mine = tagged(tag)
        for process in mine:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        psutil.wait_procs(mine, timeout=10)
    finally:
        with on_stop(signal.SIG_IGN):
            rest = tagged(tag)
            for process in rest:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(rest, timeout=10)


def tagged(tag: str) -> list[psutil.Process]:
    """Processes that carry the launch's tag in their environment, this one left out."""
    tagged = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(TAG) == tag:
                tagged.append(process)
    return tagged


def on_stop(handler: Any) -> contextlib.AbstractContextManager[None]:
    """Inside, `handler` is called for Ctrl-C, `kill` and a closed terminal; in a thread nothing."""
    return on_signals(STOPS, handler)


def interrupt(number: int, frame: object) -> None:
    """The first Ctrl-C: say what comes of it; the next one is `at_once`.

    Not so SIGTERM and SIGHUP within some seconds: `timeout` and a closed terminal tell a whole group of processes, of which
    make or a shell passes on what it was told, so one wish comes twice.
    """
    after = time.monotonic() + ECHO

    def again(number: int, frame: object) -> None:
        if number == signal.SIGINT or time.monotonic() > after:
            at_once(number, frame)

    for one in STOPS:
        signal.signal(one, again)
    print("stopping with what the last whole round has; Ctrl-C again ends at once", file=sys.stderr, flush=True)
    raise KeyboardInterrupt


def at_once(number: int, frame: object) -> None:
    """A further Ctrl-C."""
    raise AtOnce
