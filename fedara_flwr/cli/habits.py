"""What of Flower's habits bites a user of plain `flwr run`: checks of `fedara doctor`. Nothing is started or changed."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from fedara_flwr.cli.findings import Finding
from fedara_flwr.cli.proxies import unusable

NO_INSTALLATION = "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"
PORTS = {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": 39091, "FLWR_LOCAL_CONTROL_API_PORT": 39093}  # of plain `flwr run`
NETWORK_SECONDS = 3


def dependency_installation() -> Finding:
    """Whether plain `flwr run` would install the app's dependencies afresh for every run."""
    if os.environ.get(NO_INSTALLATION) == "1":
        return Finding("ok", f"{NO_INSTALLATION}=1")
    return Finding(
        "warning",
        f"{NO_INSTALLATION} is not 1: plain `flwr run` downloads all dependencies for every run, offline it fails",
        f"export {NO_INSTALLATION}=1 before the first flwr command (`fedara run` sets it itself)",
    )


def open_ports() -> Finding:
    """Whether plain `flwr run` would start a Ray that others can use."""
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return Finding("ok", "RAY_AUTH_MODE=token")
    return Finding(
        "warning",
        "RAY_AUTH_MODE is not token: plain `flwr run` starts a Ray on which whoever reaches this machine can run programs",
        "export RAY_AUTH_MODE=token before the first flwr command (`fedara run` sets it itself)",
    )


def local_superlink() -> Finding:
    """Who listens where plain `flwr run` expects its local SuperLink, and what that one was started with."""
    ports = {name: int(os.environ.get(name) or default) for name, default in PORTS.items()}
    taken = {name: port for name, port in ports.items() if _listening(port)}
    if not taken:
        return Finding("ok", f"none runs; its ports {' and '.join(map(str, ports.values()))} are free")
    name, port = next(iter(taken.items()))
    process = _owner(port)
    other_port = f"another port for plain `flwr run`: export {name}=… (`fedara run` takes a free one itself)"
    if process is None:
        return Finding("warning", f"a process that cannot be looked into listens on port {port}", other_port)
    with contextlib.suppress(psutil.Error):
        if not any("flower-superlink" in part for part in process.cmdline()):
            return Finding("warning", f"process {process.pid} ({process.name()}) listens on port {port}", other_port)
    with contextlib.suppress(psutil.Error):
        if process.uids().real != os.getuid():
            whose = f"process {process.pid} on port {port} is {process.username()}'s"
            return Finding("warning", f"{whose}: plain `flwr run` would hand it its runs", other_port)
    bites = []
    owner = f"process {process.pid} on port {port}"
    with contextlib.suppress(psutil.Error):
        folder = Path(process.cwd())
        owner += f", started in {folder}"
        if (folder / "fedara_flwr").is_dir():
            bites.append("clients import fedara_flwr from there, whatever app is run")
    with contextlib.suppress(psutil.Error):
        told = "--disable-runtime-dependency-installation" in process.cmdline()
        if process.environ().get(NO_INSTALLATION) != "1" and not told:
            bites.append(f"it was started without {NO_INSTALLATION}=1 and installs dependencies for every run")
    if bites:
        return Finding("warning", f"{owner}: {'; '.join(bites)}", f"kill {process.pid}; the next `flwr run` starts a new one")
    return Finding("ok", owner)


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _owner(port: int) -> psutil.Process | None:
    """The process that listens on a port; None where the system does not tell (another user's, macOS)."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return psutil.Process(connection.pid)
    return None


def working_folder(app: Path) -> Finding:
    """Whether the working folder has another copy of the package: Ray puts that folder ahead of the app's."""
    here = Path.cwd()
    if (here / "fedara_flwr").is_dir() and here.resolve() != app.resolve():
        return Finding(
            "warning",
            f"{here} has a folder fedara_flwr: the clients of plain `flwr run` import that one, not the app's",
            "start flwr from another folder (`fedara run` does so itself)",
        )
    return Finding("ok", str(here))


def telemetry() -> Finding:
    """Whether Flower's telemetry is on, as it is by default, although its server cannot be reached."""
    if os.environ.get("FLWR_TELEMETRY_ENABLED", "1") != "1":
        return Finding("ok", "Flower's is off")
    from fedara_flwr.flower import TELEMETRY_EVENTS_URL

    if _reachable(str(urlsplit(TELEMETRY_EVENTS_URL).hostname), 443):
        return Finding("ok", "Flower's is on (`fedara run` sets it off)")
    return Finding(
        "warning",
        "Flower's is on, but its server cannot be reached",
        "export FLWR_TELEMETRY_ENABLED=0, and FLWR_DISABLE_UPDATE_CHECK=1 (`fedara run` sets both)",
    )


def _reachable(host: str, port: int) -> bool:
    """Whether a connection opens; name look-ups have no time limit of their own, so another thread waits for them."""
    opened = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=NETWORK_SECONDS):
            opened.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(NETWORK_SECONDS)
    return opened.is_set()


def proxies() -> Finding:
    """Whether plain `flwr` fails at what the environment says of proxies."""
    if not (words := unusable()):
        return Finding("ok", "nothing in the environment that Flower fails at")
    found = "; ".join(f"{name}: {why}" for name, why in words.items())
    return Finding("warning", f"every flwr command ends at {found}", "correct or unset it (`fedara run` leaves it out)")


def free_port() -> Finding:
    """Whether a local port can be had, as `fedara run` needs for its SuperLink."""
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return Finding("ok", f"127.0.0.1:{probe.getsockname()[1]}, for example")
    except OSError as error:
        return Finding(
            "problem", f"no port of 127.0.0.1 can be bound ({error.strerror})", "allow this, or use --engine inprocess"
        )
