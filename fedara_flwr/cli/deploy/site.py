"""Writes a site: what the server and each node of one federation need, a folder for each machine."""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from string import Template

from fedara_flwr import __version__
from fedara_flwr.cli.deploy import keys
from fedara_flwr.cli.deploy.network import join
from fedara_flwr.keys import ConfigError

NAME = r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?"
LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
HOST = rf"(?=.{{1,253}}$)({LABEL}\.)*(?![0-9]+$|0[xX]){LABEL}"  # no number at the end: an address that is none
NODE_PORT = 9094  # of a SuperNode, on its own machine
RESTART_SECONDS = 65  # Flower takes a node for alive up to 60 s after its last sign
SERVER_FILES = ("ca.crt", "server.pem", "server.key", "superexec.secret", "settings.env", "start.sh", "environment.sh")
NODE_FILES = ("ca.crt", "node.key", "node.toml", "settings.env", "start.sh")
SECRETS = {"server.key", "superexec.secret", "node.key", "ca.key"}


def create(
    out: Path, host: str, port: int, names: tuple[str, ...], days: int, superlink_port: int, say: Callable[[str], None]
) -> None:
    """Write the folders of a new site: its authority, its server and its nodes.

    Args:
        out: folder that does not exist yet, or is empty.
        host: name or address under which nodes reach the server.
        port: of the gateway, which nodes reach.
        names: of the nodes.
        days: how long the certificates are valid.
        superlink_port: of the SuperLink, on the server's own machine.
        say: is given a line for each folder.

    Raises:
        ConfigError: a value is not allowed, the folder holds something, or git would see its secrets.
    """
    _check(host, port, names, days, superlink_port)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"--out {out}: there is something already, allowed is a new folder (fedara deploy add-node adds nodes)"
        )
    _check_git(out)
    authority = keys.new_authority(days)
    certificate, key = keys.new_server(authority, (host, *keys.LOCAL_NAMES), days)
    _folder(out)
    try:
        _folder(out / "ca")
        _write(out / "ca" / "ca.crt", keys.certificate_pem(authority.certificate))
        _write(out / "ca" / "ca.key", keys.key_pem(authority.key))
        _write(out / "site.toml", f'host = "{host}"\nport = {port}\n'.encode())
        server = out / "server"
        _folder(server)
        for name in ("nodes", "home", "state"):
            _folder(server / name)
        _write(server / "ca.crt", keys.certificate_pem(authority.certificate))
        _write(server / "server.pem", keys.certificate_pem(certificate))
        _write(server / "server.key", keys.key_pem(key))
        _write(server / "superexec.secret", secrets.token_bytes(32))
        for source, target in (
            ("server-settings.env", "settings.env"),
            ("server-environment.sh", "environment.sh"),
            ("server-start.sh", "start.sh"),
            ("register.sh", "register.sh"),
            ("run.sh", "run.sh"),
            ("flwr.sh", "flwr.sh"),
            ("server-compose.yml", "compose.yml"),
            *((f"{part}.container", f"fedara-{part}.container") for part in ("superlink", "superexec", "gateway")),
            *((f"{network}.network", f"fedara-{network}.network") for network in ("inside", "outside")),
            ("quadlet.sh", "quadlet.sh"),
            ("server-readme.md", "README.md"),
        ):
            _render(source, server / target, host=host, port=port, superlink_port=superlink_port)
        say(f"{server}: for the server, {host}")
        for number, name in enumerate(names):
            share = (
                f"# without data of its own, it takes its share of the run's built-in data: number {number} of {len(names)}\n"
            )
            share += f"partition-id = {number}\nnum-partitions = {len(names)}\n"
            say(_add(out, name, host, port, share))
    except BaseException:
        shutil.rmtree(out)  # a half-written site is none, and nothing in it was used
        raise
    say(f"{out / 'ca'}: signs the server's next certificate; keep it away from all machines")


def add_node(site: Path, name: str, say: Callable[[str], None]) -> None:
    """Add a node's folder to a site, and its public key to the server's.

    Raises:
        ConfigError: `site` is none, or has a node of this name.
    """
    try:
        facts = tomllib.loads((site / "site.toml").read_text())
        host, port = str(facts["host"]), int(facts["port"])
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"--site {site}: no site of fedara deploy init ({error!r})") from None
    _check_names((name,))
    if (site / f"node-{name}").exists() or (site / "server" / "nodes" / f"{name}.pub").exists():
        raise ConfigError(f"{name}: this site has a node of this name")
    say(_add(site, name, host, port, ""))
    say(f"next: {site / 'server' / 'nodes' / name}.pub to the server's folder nodes/, and there: sh register.sh")


def _add(site: Path, name: str, host: str, port: int, share: str) -> str:
    node = site / f"node-{name}"
    _folder(node)
    for mounted in ("home", "data", "models"):  # a container engine may want what it mounts to be there
        _folder(node / mounted)
    private, public = keys.new_node_key(name)
    _write(node / "ca.crt", (site / "ca" / "ca.crt").read_bytes())
    _write(node / "node.key", private)
    _write(site / "server" / "nodes" / f"{name}.pub", public)
    runtime_port = NODE_PORT + len(list((site / "server" / "nodes").iterdir())) - 1  # so that all can be on one machine
    values = {"name": name, "address": join(host, port), "share": share, "runtime_port": runtime_port}
    for source, target in (
        ("node-settings.env", "settings.env"),
        ("node.toml", "node.toml"),
        ("node-start.sh", "start.sh"),
        ("node-compose.yml", "compose.yml"),
        ("node-jetson.yml", "jetson.yml"),
        ("node.container", f"fedara-node-{name}.container"),
        ("quadlet.sh", "quadlet.sh"),
        ("node-readme.md", "README.md"),
    ):
        _render(source, node / target, **values)
    return f"{node}: for node {name}"


def template(name: str) -> str:
    """The text of a template of files/. What Flower's Hub would not take, as .sh, lies there as NAME.md, fenced."""
    folder = files("fedara_flwr.cli.deploy") / "files"
    if (fenced := folder / f"{name}.md").is_file():
        return fenced.read_text().partition("\n")[2].removesuffix("```\n")
    return (folder / name).read_text()


def _render(source: str, target: Path, **values: object) -> None:
    """Write one of the templates; scripts and files for containers are copied as they are, their $ is another's."""
    text = template(source)
    if target.suffix in (".env", ".toml", ".md"):
        owner = {"uid": os.getuid() or 1000, "gid": os.getgid() or 1000}
        always = {"restart_seconds": RESTART_SECONDS, "version": __version__}
        text = Template(text).substitute(values | owner | always)
    _write(target, text.encode())


def _folder(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)


def _write(path: Path, content: bytes) -> None:
    keys.write_secret(path, content)
    if path.suffix in (".crt", ".pem", ".pub"):
        path.chmod(0o644)
    elif path.suffix == ".sh":
        path.chmod(0o700)


def _check(host: str, port: int, names: tuple[str, ...], days: int, superlink_port: int) -> None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not re.fullmatch(HOST, host):
            letters = "letters a-z, digits, - and . between them; other letters as xn--…"
            line = f"allowed is a host name ({letters}) or an IP address, no port, no scheme"
            raise ConfigError(f"--server {host!r}: {line}") from None
    else:
        link_local = address.version == 6 and address.is_link_local  # which needs a zone, another on each machine
        if address.is_unspecified or address.is_multicast or link_local or host == "255.255.255.255":
            raise ConfigError(f"--server {host}: allowed is one address that nodes can reach, without a zone")
    for option, value in (("--port", port), ("--superlink-port", superlink_port)):
        if not 1 <= value <= 65535:
            raise ConfigError(f"{option} {value}: allowed is 1 to 65535")
    if port == superlink_port:
        raise ConfigError(f"--superlink-port {superlink_port}: allowed is another one than --port")
    if not 1 <= days <= 3650:
        raise ConfigError(f"--days {days}: allowed is 1 to 3650")
    _check_names(names)


def _check_names(names: tuple[str, ...]) -> None:
    if not names:
        raise ConfigError("--nodes 0: allowed is 1 or more")
    for name in names:
        if not re.fullmatch(NAME, name):
            raise ConfigError(f"node name {name!r}: allowed are a-z, 0-9 and -, 32 characters at most, no - at the ends")
    if len(set(names)) < len(names):
        raise ConfigError(f"--names {','.join(names)}: each name once")


def _check_git(out: Path) -> None:
    """Refuse a folder whose secrets the next `git add` could take in."""
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    if not any((folder / ".git").exists() for folder in (place, *place.parents)):
        return
    if git := shutil.which("git"):
        target = os.path.relpath(out.absolute(), place) + "/"
        done = subprocess.run([git, "-C", str(place), "check-ignore", "--quiet", target], capture_output=True)
        if done.returncode == 0:
            return
    raise ConfigError(
        f"--out {out}: it is in a git work tree that does not ignore it, so keys could be committed; allowed is a folder "
        "outside, or one that .gitignore names"
    )
