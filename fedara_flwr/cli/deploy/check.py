"""What `fedara deploy check` looks at: a machine's folder of a site, in the order in which things have to be right.

Nothing is started or changed. Each check is a function that gives one Finding.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import stat
import tomllib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from http.client import HTTPConnection, HTTPException
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key, load_ssh_public_key
from packaging.requirements import Requirement

from fedara_flwr.cli.deploy.keys import CURVE
from fedara_flwr.cli.deploy.own import busy_when, device
from fedara_flwr.cli.deploy.proxy import connection as connection_to
from fedara_flwr.cli.deploy.proxy import proxy_to, shown
from fedara_flwr.cli.deploy.site import NODE_FILES, SECRETS, SERVER_FILES
from fedara_flwr.cli.doctor import PACKAGE, python, unmet
from fedara_flwr.cli.findings import Finding, run_checks
from fedara_flwr.config import Settings
from fedara_flwr.keys import ConfigError
from fedara_flwr.log import first_line
from fedara_flwr.node.settings import NodeSettings
from fedara_flwr.tasks import tasks

NOT_ON_DEVICES = {"matplotlib", "jinja2"}  # pages of runs; and of flwr[simulation] the extra, which is Ray
EXPIRES_SOON = timedelta(days=30)
# what Flower's node authentication allows: a node's clock may be behind the server's, hardly ahead of it
BEHIND_SECONDS, AHEAD_SECONDS = 300, 5
ANSWER_SECONDS = 5.0  # to wait for one answer
LABELS = 20  # that a line names
CONTROL = "/v1/control/list-nodes"  # of the SuperLink: for users, none of nodes' business


def examine(folder: Path) -> Iterator[tuple[str, Finding]]:
    """Every check's name and finding, as they come; those that need a folder's files are left out where some are missing.

    Raises:
        ConfigError: the folder is no machine's of a site.
    """
    server, node = (folder / "server.pem").exists(), (folder / "node.toml").exists()
    if server == node:
        raise ConfigError(f"{folder}: allowed is the folder server or node-NAME of what `fedara deploy init` wrote")
    finding = there(folder, SERVER_FILES if server else NODE_FILES)
    yield "files", finding
    if finding.level == "problem":
        return
    yield from run_checks({"permissions": partial(permissions, folder)})
    try:
        settings = read_settings(folder)
        checks = server_checks(folder, settings) if server else node_checks(folder, settings, own_settings(folder))
    except ConfigError as error:
        yield "settings", Finding("problem", str(error), "correct this first: the rest was not checked")
        return
    yield from run_checks(checks)


def server_checks(folder: Path, settings: dict[str, str]) -> dict[str, Callable[[], Finding]]:
    """The checks of a server's folder."""
    superlink, gateway = int(settings["SUPERLINK_PORT"]), int(settings["PORT"])
    return {
        "certificate": partial(server_certificate, folder),
        "key": partial(server_key, folder),
        "nodes": partial(node_keys, folder),
        "python": python,
        "packages": partial(packages, device=False),
        "SuperLink": partial(own_service, folder, superlink),
        "gateway": partial(own_service, folder, gateway),
        "reach of nodes": partial(reach, folder, gateway),
    }


def node_checks(folder: Path, settings: dict[str, str], node: NodeSettings) -> dict[str, Callable[[], Finding]]:
    """The checks of a node's folder."""
    host, _, port = settings["SUPERLINK"].rpartition(":")
    host = host.strip("[]")
    return {
        "certificate": partial(authority, folder),
        "key": partial(node_key, folder),
        "python": python,
        "packages": partial(packages, device=True),
        "port": partial(runtime_port, int(settings["RUNTIME_PORT"])),
        "server": partial(server_answers, folder, host, int(port)),
        "clock": partial(clock, folder, host, int(port)),
        "device": partial(device, node),
        "busy-when": partial(busy_when, node),
        "model": partial(model, node),
        "data": partial(data, node),
    }


def there(folder: Path, names: tuple[str, ...]) -> Finding:
    """Whether the folder has what its scripts need."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        return Finding("problem", f"{folder} lacks {', '.join(missing)}", "copy the whole folder again from where the site is")
    return Finding("ok", str(folder))


def permissions(folder: Path) -> Finding:
    """Whether others can read the keys."""
    secrets = [path for path in folder.rglob("*") if path.name in SECRETS]
    open_to_others = [path for path in (folder, *secrets) if stat.S_IMODE(path.stat().st_mode) & 0o077]
    if not open_to_others:
        return Finding("ok", f"{folder} and its keys are for their owner alone")
    names = " ".join(str(path) for path in open_to_others)
    return Finding("problem", f"others may enter or read {names}", f"chmod go= {names}")


def read_settings(folder: Path) -> dict[str, str]:
    """Keys and values of a machine's settings.env, its ports checked.

    Raises:
        ConfigError: a line is no KEY=VALUE, or a key is missing or no port where one is meant.
    """
    file, settings = folder / "settings.env", {}
    for line in file.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            key, equals, value = line.partition("=")
            if not equals or not key.isidentifier() or " " in value:
                raise ConfigError(f"{file}: {line!r} is no KEY=VALUE without spaces")
            settings[key] = value
    ports = ("PORT", "SUPERLINK_PORT") if (folder / "server.pem").exists() else ("SUPERLINK", "RUNTIME_PORT")
    for key in ports:
        number = settings.get(key, "").rpartition(":")[2]
        if not (number.isascii() and number.isdigit() and 1 <= int(number) <= 65535):
            wanted = "HOST:PORT" if key == "SUPERLINK" else "a port, 1 to 65535"
            raise ConfigError(f"{file}: {key}={settings.get(key, '')}, allowed is {wanted}")
    return settings


def _certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def _dates(certificate: x509.Certificate, what: str) -> Finding:
    now, start, end = datetime.now(UTC), certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < start:
        return Finding(
            "problem", f"{what} is valid from {start:%F %H:%M} UTC, here it is {now:%F %H:%M}", "set this machine's clock"
        )
    if now > end:
        return Finding("problem", f"{what} ended on {end:%F}", "make a new site, or sign a new certificate (docs/deploy.md)")
    if now > end - EXPIRES_SOON:
        return Finding("warning", f"{what} ends on {end:%F}", "make a new one in time (docs/deploy.md)")
    return Finding("ok", f"{what} is valid until {end:%F}")


def authority(folder: Path) -> Finding:
    """Whether the authority's certificate can be read and is not about to expire."""
    return _dates(_certificate(folder / "ca.crt"), "the authority's certificate")


def server_certificate(folder: Path) -> Finding:
    """The server's certificate: signed by our authority, for which names, until when."""
    certificate, ca = _certificate(folder / "server.pem"), _certificate(folder / "ca.crt")
    try:
        certificate.verify_directly_issued_by(ca)
    except Exception:  # of several kinds: another name, another key, another algorithm
        return Finding("problem", "server.pem was not signed by ca.crt's authority", "copy both from the same site")
    for one, what in ((ca, "the authority's certificate"), (certificate, "the server's certificate")):
        finding = _dates(one, what)
        if finding.level != "ok":
            return finding
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    host = str(next(iter(names)).value)
    return Finding("ok", f"{finding.found}, for {', '.join(str(name.value) for name in names)}; nodes use {host}")


def server_key(folder: Path) -> Finding:
    """Whether the server's key is the certificate's."""
    key = load_pem_private_key((folder / "server.key").read_bytes(), None)
    if key.public_key() != _certificate(folder / "server.pem").public_key():
        return Finding("problem", "server.key is not the key of server.pem", "copy both from the same site")
    return Finding("ok", "server.key is the certificate's")


def node_keys(folder: Path) -> Finding:
    """Whether the nodes' public keys are there and of the right kind."""
    names = []
    for path in sorted((folder / "nodes").glob("*.pub")):
        key = load_ssh_public_key(path.read_bytes())
        if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, CURVE)):
            return Finding("problem", f"{path} is no key of the kind ecdsa-sha2-nistp384", "ssh-keygen -t ecdsa -b 384")
        names.append(path.stem)
    if not names:
        return Finding("problem", f"no public key in {folder / 'nodes'}", "copy the nodes' .pub files into it")
    return Finding("ok", f"keys of {', '.join(names)}; `sh register.sh` tells the SuperLink")


def node_key(folder: Path) -> Finding:
    """Whether the node's private key can be read and is of the right kind."""
    key = load_ssh_private_key((folder / "node.key").read_bytes(), None)
    if not (isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, CURVE)):
        return Finding("problem", "node.key is no key of the kind ecdsa-sha2-nistp384", "ssh-keygen -t ecdsa -b 384")
    return Finding("ok", "node.key can be read")


def packages(device: bool) -> Finding:
    """Installed versions against this package's own requirements; a device needs neither Ray nor pages of runs."""
    try:
        requirements = [Requirement(text) for text in requires(PACKAGE) or []]
    except PackageNotFoundError:
        return Finding("warning", f"{PACKAGE} is not installed, only its code is here", "sh docker/install-device.sh")
    for requirement in requirements:
        requirement.extras = set()
    wanted = [str(one) for one in requirements if not (device and one.name in NOT_ON_DEVICES)]
    if lacking := list(unmet(wanted, "")):
        needed = " ".join(f"'{requirement}'" for requirement, _ in lacking)
        return Finding("problem", "; ".join(reason for _, reason in lacking), f"pip install {needed}")
    return Finding("ok", ", ".join(f"{name} {version(name)}" for name in (PACKAGE, "flwr", "torch", "transformers", "peft")))


def _ask(folder: Path, host: str, port: int, path: str = "/health", method: str = "GET") -> tuple[int, str, x509.Certificate]:
    """(status, Date header, certificate) of what answers there, which must be certified by our authority.

    Raises:
        OSError, HTTPException: nothing answers, or not as it should.
    """
    with contextlib.closing(connection_to(host, port, ANSWER_SECONDS, str(folder / "ca.crt"))) as connection:
        connection.connect()
        shown = connection.sock.getpeercert(binary_form=True)
        connection.request(method, path)
        answer = connection.getresponse()
        answer.read(1000)
        return answer.status, answer.headers.get("Date", ""), x509.load_der_x509_certificate(shown or b"")


def own_service(folder: Path, port: int) -> Finding:
    """Whether the port is free, or this site's own server answers on it."""
    if not _listening(port):
        return Finding("ok", f"port {port} is free; `sh start.sh` starts it")
    try:
        status, _, certificate = _ask(folder, "127.0.0.1", port)
    except (OSError, HTTPException) as error:
        return Finding(
            "problem", f"something else listens on port {port} ({first_line(error)})", "end it, or change settings.env"
        )
    if certificate != _certificate(folder / "server.pem"):
        return Finding("warning", f"port {port} shows another certificate than server.pem", "start the server again")
    if status != 200:
        return Finding("problem", f"port {port} answers with {status}", "see what start.sh says; is the SuperLink up?")
    return Finding("ok", f"port {port} answers over TLS, with server.pem")


def reach(folder: Path, port: int) -> Finding:
    """Whether nodes can reach more than they should."""
    if not _listening(port):
        return Finding("ok", "nothing listens for nodes yet")
    status, _, _ = _ask(folder, "127.0.0.1", port, CONTROL, "POST")
    if status != 404:
        return Finding(
            "problem",
            f"port {port} answers users, too ({status}): whoever reaches it can run code on the server and every node",
            "let nodes reach the gateway alone, never the SuperLink",
        )
    return Finding("ok", "nodes reach the Fleet API, nothing else")


def runtime_port(port: int) -> Finding:
    """Whether the SuperNode's own port is free."""
    if _listening(port):
        connection = HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
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
    place = f"{host}:{port}"
    try:
        proxy = proxy_to(host)
        place += f" by way of the proxy {shown(proxy)}" if proxy else ""
        status, _, certificate = _ask(folder, host, port)
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
    return _dates(certificate, f"{place} answers over TLS; its certificate")


def clock(folder: Path, host: str, port: int) -> Finding:
    """The machine's clock against the server's, as Flower's node authentication will see it."""
    try:
        date = parsedate_to_datetime(_ask(folder, host, port)[1])
    except (OSError, HTTPException, ValueError) as error:
        return Finding("warning", f"not compared, the server does not answer ({first_line(error)})")
    ahead = (datetime.now(UTC) - date).total_seconds()
    offset = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    if ahead > AHEAD_SECONDS or ahead < -BEHIND_SECONDS:
        return Finding("problem", offset, f"set it: allowed are {AHEAD_SECONDS} s ahead, {BEHIND_SECONDS} s behind")
    return Finding("ok", offset)


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def own_settings(folder: Path) -> NodeSettings:
    """node.toml, checked as the node itself checks it.

    Raises:
        ConfigError: it is no TOML, or a key or value is not allowed.
    """
    try:
        return NodeSettings.read(tomllib.loads((folder / "node.toml").read_text()))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"node.toml cannot be read ({error})") from None


def model(node: NodeSettings) -> Finding:
    """Whether the backbones are here, or can be fetched."""
    from fedara_flwr.cli.doctor import model as search

    defaults = Settings()
    findings = [
        search(defaults.model_copy(update={"model": defaults.model.model_copy(update={"name": place})}))
        for place in node.backbones.values()
    ]
    if not findings:
        return Finding("problem", "node-config models = '': the node takes part with no backbone", "see node.toml")
    return next((one for one in findings if one.level != "ok"), Finding("ok", "; ".join(one.found for one in findings)))


def data(node: NodeSettings) -> Finding:
    """Whether the node's own data can be read, and what is in it; columns and labels may be the run's."""
    if not node.data_path:
        return Finding(
            "warning", "no data-path: the node trains on its share of the run's built-in data", "set it in node.toml"
        )
    from fedara_flwr.data.sources import look

    names = ("text_column", "pair_column", "label_column")
    columns = {name: column for name in names if (column := getattr(node, name))}
    settings = Settings().data.model_copy(
        update={"path": node.data_path, "format": node.data_format, "subset": node.data_subset, "id_column": "", **columns}
    )
    usual = settings.task  # the default one is tried first
    order = sorted(tasks(), key=lambda name: (name != usual, name))
    try:
        # of which task the run will be nobody says here, so the columns and the node's own options tell
        readers, unfit = [], None
        for name in order:
            try:
                readers.append(tasks()[name](settings.model_copy(update={"task": name, "options": node.data_options})))
            except ConfigError as error:
                unfit = error
        if not readers and unfit is not None:
            raise unfit
        contents = look(settings, readers)
    except ConfigError as error:
        return Finding("problem", str(error), "see node.toml")
    rows = ", ".join(f"{count} {name} rows" for name, count in contents.rows.items())
    said = f"{node.data_path}: {rows}, columns {', '.join(contents.columns)}"
    if not contents.task:
        advice = "name the columns of text and label: text-column, label-column"
        return Finding("warning", f"{said}; no labels read", advice)
    labels = ", ".join(contents.labels[:LABELS]) + (", …" if len(contents.labels) > LABELS else "")
    words = (said, f"fit for {contents.task}", labels and f"labels {labels}", str(contents.skipped))
    return Finding("ok", "; ".join(filter(None, words)))
