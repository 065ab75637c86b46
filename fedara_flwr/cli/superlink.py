"""Flower's SuperLink for one user alone: whoever else of this machine connects is hung up on.

It has no login for users, and a run that one submits is code. Of a connection within this machine Linux tells whose it is.
"""

from __future__ import annotations

import os
import socket
import sys
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
LOADED = "import sys; sys.path.insert(0, sys.argv.pop(1)); from fedara_flwr.cli.superlink import main; del sys.path[0]; main()"


def command() -> list[str]:
    """The SuperLink's command, before its options: Flower's own where the system does not tell whose a connection is."""
    if not TABLES[0].is_file():
        return ["flower-superlink"]
    return [sys.executable, "-P", "-c", LOADED, str(Path(__file__).parents[2])]  # it starts in a folder without this package


def owner(client: tuple[str, int], server: tuple[str, int]) -> int | None:
    """The user id behind the client's end of a connection within this machine, over IPv4; None where there is none."""
    ends = [f"{socket.inet_aton(host)[::-1].hex().upper()}:{port:04X}" for host, port in (client, server)]
    for table in TABLES:  # in the second with zeros before it: who asked for IPv6
        for line in table.read_text().splitlines()[1:] if table.is_file() else ():
            local, remote, *_, user = line.split()[1:8]
            if local.endswith(ends[0]) and remote.endswith(ends[1]):
                return int(user)
    return None


class OwnUser(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, with this process's user alone."""

    def connection_made(self, transport: Any) -> None:
        """Hang up on anybody else."""
        super().connection_made(transport)
        if owner(transport.get_extra_info("peername"), transport.get_extra_info("sockname")) != os.getuid():
            transport.abort()


def main() -> None:
    """Run `flower-superlink`, with its own options."""
    flower, *_ = entry_points(group="console_scripts", name="flower-superlink")  # flwr's, and flwr-nightly's over it
    uvicorn.run = partial(uvicorn.run, http=OwnUser)  # Flower calls it, and has no option for that
    flower.load()()
