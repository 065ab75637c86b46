"""A machine's settings.env, which its scripts and its compose file read, too."""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedara_flwr.keys import ConfigError

# numbers that the scripts and the gateway need, and the least that each may be: a pause that is none would be no pause at all
SERVER_NUMBERS = {
    **{"RESTART_SECONDS": 0.0, "POLL_SECONDS": 0.0, "MAX_REQUEST_MB": 0.0, "BODY_SECONDS": 1.0},
    **{"MAX_CONNECTIONS": 1, "MAX_PER_ADDRESS": 1, "ADDRESS_SPACE_MB": 0},
}
NODE_NUMBERS = {"RESTART_SECONDS": 0.0, "POLL_SECONDS": 0.0, "ADDRESS_SPACE_MB": 0}
OPTIONAL = {"ADDRESS_SPACE_MB": "0"}


def read_settings(folder: Path) -> dict[str, str]:
    """Keys and values of a machine's settings.env; ports, numbers and the address to listen on are checked.

    Raises:
        ConfigError: a line is no KEY=VALUE as a shell reads it, or a key is missing or no port, number or address where one
            is meant.
    """
    file, settings = folder / "settings.env", {}
    for line in _lines(file):
        if line.endswith("\r"):
            raise ConfigError(
                f"{file}: its lines end as on Windows, a shell needs them without the CR: sed -i 's/\\r$//' {file}"
            )
        if line.strip() and not line.startswith("#"):
            key, equals, text = line.removeprefix("export ").partition("=")
            try:
                words = shlex.split(text)
            except ValueError:
                words = [text, text]
            if not equals or not key.isidentifier() or len(words) > 1 or text[:1].isspace():
                raise ConfigError(f"{file}: {line!r} is no KEY=VALUE; a value with spaces stands in quotes")
            settings[key] = "".join(words)
    server = (folder / "server.pem").exists()
    for key in ("PORT", "SUPERLINK_PORT") if server else ("SUPERLINK", "RUNTIME_PORT"):
        host, _, number = settings.get(key, "").rpartition(":")
        named = key != "SUPERLINK" or (host and "/" not in host)
        if not (named and re.fullmatch("[0-9]{1,9}", number) and 1 <= int(number) <= 65535):
            wanted = "HOST:PORT" if key == "SUPERLINK" else "a port, 1 to 65535"
            raise ConfigError(f"{file}: {key}={settings.get(key, '')}, allowed is {wanted}")
    for key, least in (SERVER_NUMBERS if server else NODE_NUMBERS).items():
        number = settings.get(key) or OPTIONAL.get(key, "")
        whole = isinstance(least, int)
        if not re.fullmatch("[0-9]{1,12}" if whole else r"[0-9]{1,12}(\.[0-9]{1,12})?", number) or float(number) < least:
            wanted = f"a {'whole ' if whole else ''}number, {least:g} or more"
            raise ConfigError(f"{file}: {key}={settings.get(key, '')}, allowed is {wanted}")
    if server:
        if settings["PORT"] == settings["SUPERLINK_PORT"]:
            raise ConfigError(f"{file}: SUPERLINK_PORT={settings['SUPERLINK_PORT']}, allowed is another one than PORT")
        check_listen(settings.get("LISTEN", ""), f"{file}: LISTEN=")
    return settings


@contextmanager
def exported(folder: Path, settings: dict[str, str]) -> Iterator[None]:
    """Inside, the environment has what settings.env hands on to the processes that the folder's scripts start."""
    told = {line.partition("=")[0].removeprefix("export ") for line in _lines(folder / "settings.env") if line[:7] == "export "}
    before = dict(os.environ)
    handed = {key: os.path.expandvars(settings[key]) for key in settings if key in told | {"no_proxy"} or key in before}
    os.environ.update(handed)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _lines(file: Path) -> list[str]:
    return file.read_bytes().decode(errors="surrogateescape").split("\n")


def check_listen(address: str, key: str) -> None:
    """Whether a gateway can listen there, by how it is written.

    Raises:
        ConfigError: it is no IP address.
    """
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise ConfigError(
            f"{key}{address}, allowed is :: (all addresses, IPv4 and IPv6), 0.0.0.0 (IPv4 alone) or one address of this machine"
        ) from None
