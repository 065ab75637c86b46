"""What `fedara deploy check` looks at: a machine's folder of a site, in the order in which things have to be right.

Nothing is started or changed. Each check is a function that gives one Finding.
"""

from __future__ import annotations

import os
import shutil
import stat
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key, load_ssh_public_key
from packaging.requirements import Requirement

from fedara_flwr.cli.deploy import network
from fedara_flwr.cli.deploy.keys import CURVE, names_of, read_certificate
from fedara_flwr.cli.deploy.own import busy_when, device
from fedara_flwr.cli.deploy.settings import exported, read_settings
from fedara_flwr.cli.deploy.site import NODE_FILES, SECRETS, SERVER_FILES
from fedara_flwr.cli.doctor import PACKAGE, python, unmet
from fedara_flwr.cli.findings import Finding, run_checks
from fedara_flwr.config import Settings
from fedara_flwr.keys import ConfigError
from fedara_flwr.node.settings import NodeSettings
from fedara_flwr.tasks import tasks

NOT_ON_DEVICES = {"matplotlib", "jinja2"}  # pages of runs; and of flwr[simulation] the extra, which is Ray
LABELS = 20  # that a line names


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
    with exported(folder, settings):
        yield from run_checks(checks)


def server_checks(folder: Path, settings: dict[str, str]) -> dict[str, Callable[[], Finding]]:
    """The checks of a server's folder."""
    superlink, gateway, listen = int(settings["SUPERLINK_PORT"]), int(settings["PORT"]), settings["LISTEN"]
    return {
        "certificate": partial(server_certificate, folder),
        "key": partial(server_key, folder),
        "nodes": partial(node_keys, folder),
        "python": python,
        "packages": partial(packages, device=False),
        "commands": partial(commands, settings, "flower-superlink"),
        "proxies": network.proxies,
        "SuperLink": partial(network.own_service, folder, superlink),
        "gateway": partial(network.own_service, folder, gateway, listen),
        "address": partial(network.address, folder, gateway, listen),
        "reach of nodes": partial(network.reach, folder, gateway, listen),
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
        "commands": partial(commands, settings, "flower-supernode"),
        "proxies": network.proxies,
        "port": partial(network.runtime_port, int(settings["RUNTIME_PORT"])),
        "server": partial(network.server_answers, folder, host, int(port)),
        "clock": partial(network.clock, folder, host, int(port)),
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


def authority(folder: Path) -> Finding:
    """Whether the authority's certificate can be read and is not about to expire."""
    return network.dates(read_certificate(folder / "ca.crt"), "the authority's certificate")


def server_certificate(folder: Path) -> Finding:
    """The server's certificate: signed by our authority, for which names, until when."""
    certificate, ca = read_certificate(folder / "server.pem"), read_certificate(folder / "ca.crt")
    try:
        certificate.verify_directly_issued_by(ca)
    except Exception:  # of several kinds: another name, another key, another algorithm
        return Finding("problem", "server.pem was not signed by ca.crt's authority", "copy both from the same site")
    for one, what in ((ca, "the authority's certificate"), (certificate, "the server's certificate")):
        finding = network.dates(one, what)
        if finding.level != "ok":
            return finding
    names = names_of(certificate)
    return Finding("ok", f"{finding.found}, for {', '.join(names)}; nodes use {names[0]}")


def server_key(folder: Path) -> Finding:
    """Whether the server's key is the certificate's."""
    key = load_pem_private_key((folder / "server.key").read_bytes(), None)
    if key.public_key() != read_certificate(folder / "server.pem").public_key():
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


def commands(settings: dict[str, str], name: str) -> Finding:
    """Whether start.sh will find the command that it starts, by VENV or in PATH."""
    told, advice = settings.get("VENV", ""), "in settings.env VENV=FOLDER, the virtual environment that has fedara-flwr"
    place = os.path.join(os.path.expanduser(os.path.expandvars(told)), "bin")
    if told and not shutil.which(name, path=place):
        return Finding("problem", f"VENV={told}: there is no {name} in {place}", advice)
    found = shutil.which(name, path=place if told else None)
    if not found:
        return Finding(
            "warning", f"{name} is not in PATH, start.sh would not find it", f"activate its environment, or {advice}"
        )
    return Finding("ok", found)


def own_settings(folder: Path) -> NodeSettings:
    """node.toml, checked as the node itself checks it.

    Raises:
        ConfigError: it is no TOML, or a key or value is not allowed.
    """
    try:
        return NodeSettings.read(tomllib.loads((folder / "node.toml").read_text(encoding="utf-8")))
    except ValueError as error:
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
