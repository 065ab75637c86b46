"""`fedara worker`: a node's resident worker (node/worker.py)."""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def resident() -> None:
    """The processes that keep a node's model and data between messages: docs/deploy-device.md."""


@app.command("list")
def show() -> None:
    """List this user's workers: process, memory, socket."""
    import psutil

    from fedara_flwr.node import worker

    for pid, path in worker.running().items():
        typer.echo(f"{pid}  {psutil.Process(pid).memory_info().rss / 2**20:.0f} MB  {path}")


@app.command()
def stop() -> None:
    """End this user's workers. A node that is working goes on by itself; its next message starts a new worker."""
    from fedara_flwr.node import worker

    for pid, path in worker.running().items():
        os.kill(pid, signal.SIGTERM)
        typer.echo(f"{pid}  {path}")


@app.command(hidden=True)
def serve(
    listener: Annotated[int, typer.Argument(help="file descriptor of a listening socket")],
    launcher: Annotated[int, typer.Argument(help="process that starts the node's ClientApps")],
) -> None:
    """Serve a node's messages; its ClientApp starts this, nobody else needs to."""
    from fedara_flwr.client_app import HANDLERS
    from fedara_flwr.node import worker

    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    worker.serve(HANDLERS, socket.socket(fileno=listener), launcher)
