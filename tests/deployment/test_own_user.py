"""The SuperLink of `fedara run` is for its user alone."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess

import psutil
import pytest
from deployment import free_port, wait_for

from fedara_flwr.cli import superlink

pytestmark = pytest.mark.skipif(not superlink.TABLES[0].is_file(), reason="this system does not tell whose a connection is")


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::ffff:127.0.0.1")])
def test_whose_a_connection_is(family, host):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(family) as client:
        client.connect((host, server.getsockname()[1]))
        connection, peer = server.accept()
        with connection:
            assert superlink.owner(peer, connection.getsockname()) == os.getuid()
            assert superlink.owner((peer[0], 1), connection.getsockname()) is None
            assert superlink.owner(("127.0.0.9", peer[1]), connection.getsockname()) is None


def test_whoever_else_connects_is_hung_up_on(monkeypatch):
    sent: list[str] = []

    class Transport:
        def __init__(self, user: int | None) -> None:
            monkeypatch.setattr(superlink, "owner", lambda client, server: user)

        def get_extra_info(self, name: str) -> tuple[str, int]:
            return ("127.0.0.1", 7)

        def abort(self) -> None:
            sent.append("abort")

    monkeypatch.setattr(superlink.H11Protocol, "connection_made", lambda self, transport: None)
    protocol = superlink.OwnUser.__new__(superlink.OwnUser)
    for user in (os.getuid(), os.getuid() + 1, None):
        protocol.connection_made(Transport(user))
    assert sent == ["abort"] * 2


ASK = "import sys, urllib.request as r; print(r.urlopen(f'http://127.0.0.1:{sys.argv[1]}/health', timeout=9).status)"


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be another user")
def test_a_superlink_answers_its_own_user_alone(tmp_path):
    port = free_port()
    options = ["--insecure", "--simulation", "--isolation", "process", "--port", str(port)]
    env = os.environ | {"FLWR_HOME": str(tmp_path), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    with subprocess.Popen([*superlink.command(), *options], env=env, cwd=tmp_path) as process:
        try:
            wait_for(lambda: any(c.laddr.port == port for c in psutil.Process(process.pid).net_connections("tcp")))
            asked = {}
            for user in (0, 65534):
                command = ["/usr/bin/env", "python3", "-c", ASK, str(port)]
                with contextlib.suppress(subprocess.TimeoutExpired):
                    asked[user] = subprocess.run(command, user=user, cwd="/", capture_output=True, text=True, timeout=30)
            assert asked[0].stdout == "200\n" and asked[65534].stdout == "" and "reset" in asked[65534].stderr.lower(), asked
        finally:
            process.terminate()
