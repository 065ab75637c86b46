"""What `fedara deploy check` looks at on the network: own ports, the way to the server, clocks. It connects for real."""

from __future__ import annotations

import contextlib
import socket
import ssl
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from cryptography import x509

from fedara_flwr.cli.deploy import proxy
from fedara_flwr.cli.deploy.keys import names_of, read_certificate
from fedara_flwr.cli.findings import Finding
from fedara_flwr.cli.proxies import unusable
from fedara_flwr.log import first_line

# what Flower's node authentication allows: a node's clock may be behind the server's, hardly ahead of it
BEHIND_SECONDS, AHEAD_SECONDS = 300, 5
EXPIRES_SOON = timedelta(days=30)
ANSWER_SECONDS = 5.0  # to wait for one answer
CONTROL = "/v1/control/list-nodes"  # of the SuperLink: for users, none of nodes' business
LOCAL, ALL = "127.0.0.1", ("0.0.0.0", "::")  # nosec B104 # what is compared with


def ask(
    folder: Path, host: str, port: int, path: str = "/health", method: str = "GET", own: bool = False
) -> tuple[int, str, x509.Certificate]:
    """(status, Date header, certificate) of what answers there, which must be certified by our authority.

    Args:
        own: it is of this machine: no proxy is between, and which names the certificate is for does not matter.

    Raises:
        OSError, HTTPException: nothing answers, or not as it should.
    """
    made = proxy.connection(host, port, ANSWER_SECONDS, str(folder / "ca.crt"), own)
    with contextlib.closing(made) as connection:
        connection.connect()
        shown = connection.sock.getpeercert(binary_form=True)
        connection.request(method, path)
        answer = connection.getresponse()
        answer.read(1000)
        return answer.status, answer.headers.get("Date", ""), x509.load_der_x509_certificate(shown or b"")


def own_service(folder: Path, port: int, listen: str = LOCAL) -> Finding:
    """Whether the port is free, or this site's own server answers on it."""
    address = LOCAL if listen in ALL else listen
    if not _listening(port, address):
        return Finding("ok", f"port {port} is free; `sh start.sh` starts it")
    try:
        status, _, certificate = ask(folder, address, port, own=True)
    except (OSError, HTTPException) as error:
        return Finding(
            "problem", f"something else listens on port {port} ({first_line(error)})", "end it, or change settings.env"
        )
    if certificate != read_certificate(folder / "server.pem"):
        return Finding("warning", f"port {port} shows another certificate than server.pem", "start the server again")
    if status != 200:
        return Finding("problem", f"port {port} answers with {status}", "see what start.sh says; is the SuperLink up?")
    return Finding("ok", f"port {port} answers over TLS, with server.pem")


def address(folder: Path, port: int, listen: str) -> Finding:
    """Whether the gateway can be reached, or will be, under the name or address that nodes use."""
    host = names_of(read_certificate(folder / "server.pem"))[0]
    place, advice = join(host, port), "LISTEN=:: in settings.env: all addresses, IPv4 and IPv6"
    if listen not in ALL and not of_this_machine(listen):
        return Finding("problem", f"LISTEN={listen} is no address of this machine", advice)
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        return Finding("warning", f"{host} is not known here ({first_line(error)})", "nodes must know it; their check tells")
    if listen != "::" and not any((":" in one) == (":" in listen) for one in found):
        ours, theirs = ("IPv6", "IPv4") if ":" in listen else ("IPv4", "IPv6")
        return Finding(
            "problem", f"LISTEN={listen} hears {ours} alone, and {host} is {', '.join(sorted(found))}: {theirs}", advice
        )
    if not _listening(port, LOCAL if listen in ALL else listen):
        return Finding("ok", f"nodes will use {place}; nothing listens yet")
    try:
        status, _, certificate = ask(folder, host, port, own=True)
    except (OSError, HTTPException) as error:
        said = f"{place}, which nodes use, does not answer ({first_line(error)})"
        if any(map(of_this_machine, found)):
            return Finding("problem", f"{said}, though it is of this machine", f"see LISTEN, and the firewall. {advice}")
        return Finding("warning", f"{said}", "a router in between may lead nobody back inside; the nodes' check tells")
    if certificate != read_certificate(folder / "server.pem"):
        return Finding("problem", f"{place} is another server, by its certificate", "does the name lead to this machine?")
    if status != 200:
        return Finding("problem", f"{place} answers with {status}", "see what start.sh says; is the SuperLink up?")
    return Finding("ok", f"{place}, which nodes use, answers")


def reach(folder: Path, port: int, listen: str = LOCAL) -> Finding:
    """Whether nodes can reach more than they should."""
    address = LOCAL if listen in ALL else listen
    if not _listening(port, address):
        return Finding("ok", "nothing listens for nodes yet")
    status, _, _ = ask(folder, address, port, CONTROL, "POST", own=True)
    if status != 404:
        return Finding(
            "problem",
            f"port {port} answers users, too ({status}): whoever reaches it can run code on the server and every node",
            "let nodes reach the gateway alone, never the SuperLink",
        )
    return Finding("ok", "nodes reach the Fleet API, nothing else")


def proxies() -> Finding:
    """Whether Flower's processes can make anything of what the environment says of proxies."""
    if not (words := unusable()):
        return Finding("ok", "nothing in the environment that Flower fails at")
    found = "; ".join(f"{name}: {why}" for name, why in words.items())
    advice = f"every process of Flower would end with this; in settings.env: {'; '.join(f'export {name}=' for name in words)}"
    return Finding("problem", found, advice)


def runtime_port(port: int) -> Finding:
    """Whether the SuperNode's own port is free."""
    if _listening(port):
        connection = HTTPConnection(LOCAL, port, timeout=ANSWER_SECONDS)
        with contextlib.closing(connection), contextlib.suppress(OSError, HTTPException):
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return Finding("ok", f"a SuperNode answers on port {port}")
        return Finding(
            "problem", f"something that is no SuperNode listens on port {port}", "another RUNTIME_PORT in settings.env"
        )
    return Finding("ok", f"port {port} is free; `sh start.sh` starts the SuperNode")


def server_answers(folder: Path, host: str, port: int) -> Finding:
    """Whether the server can be reached, and is the one that our authority certified."""
    place = join(host, port)
    try:
        between = proxy.proxy_to(host, port)
        place += f" by way of the proxy {proxy.shown(between)}" if between else ""
        status, _, certificate = ask(folder, host, port)
    except ssl.SSLCertVerificationError as error:
        names = f"for another server, or for another name than {host}"
        return Finding("problem", f"{place} shows a certificate {names} ({error.verify_message})", "see SUPERLINK, and ca.crt")
    except (OSError, HTTPException, ValueError) as error:
        advice = "is the server started, the port open in its firewall, the name known here?"
        if "proxy" in f"{place} {error}":
            advice = f"a server that needs no proxy: export no_proxy={host} in settings.env"
        return Finding("problem", f"{place} does not answer ({first_line(error)})", advice)
    if status != 200:
        return Finding("problem", f"{place} answers with {status}: the gateway is up, the SuperLink is not", "see the server")
    return dates(certificate, f"{place} answers over TLS; its certificate")


def clock(folder: Path, host: str, port: int) -> Finding:
    """The machine's clock against the server's, as Flower's node authentication will see it."""
    try:
        date = parsedate_to_datetime(ask(folder, host, port)[1])
    except (OSError, HTTPException, ValueError) as error:
        return Finding("warning", f"not compared, the server does not answer ({first_line(error)})")
    ahead = (datetime.now(UTC) - date).total_seconds()
    offset = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    if ahead > AHEAD_SECONDS or ahead < -BEHIND_SECONDS:
        return Finding("problem", offset, f"set it: allowed are {AHEAD_SECONDS} s ahead, {BEHIND_SECONDS} s behind")
    return Finding("ok", offset)


def dates(certificate: x509.Certificate, what: str) -> Finding:
    """Whether a certificate is valid, and for how long; `what` it is called."""
    now, start, end = datetime.now(UTC), certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < start:
        return Finding(
            "problem", f"{what} is valid from {start:%F %H:%M} UTC, here it is {now:%F %H:%M}", "set this machine's clock"
        )
    if now > end:
        return Finding(
            "problem", f"{what} ended on {end:%F}", "make a new site, or sign a new certificate (docs/deploy-server.md)"
        )
    if now > end - EXPIRES_SOON:
        return Finding("warning", f"{what} ends on {end:%F}", "make a new one in time (docs/deploy-server.md)")
    return Finding("ok", f"{what} is valid until {end:%F}")


def join(host: str, port: int | str) -> str:
    """host:port as it is written; IPv6 addresses stand in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listening(port: int, address: str = LOCAL) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.settimeout(1)
        return probe.connect_ex((address, port)) == 0


def of_this_machine(address: str) -> bool:
    """Whether an IP address is one of this machine's own."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe, contextlib.suppress(OSError):
        probe.bind((address, 0))
        return True
    return False
