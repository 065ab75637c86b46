"""A machine's settings.env, which its scripts and its compose file read, too."""

from __future__ import annotations

import ipaddress
import shlex
from pathlib import Path

from fedara_flwr.keys import ConfigError


def read_settings(folder: Path) -> dict[str, str]:
    """Keys and values of a machine's settings.env, its ports and the address to listen on checked.

    Raises:
        ConfigError: a line is no KEY=VALUE as a shell reads it, or a key is missing or no port or address where one is meant.
    """
    file, settings = folder / "settings.env", {}
    for line in file.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
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
        number = settings.get(key, "").rpartition(":")[2]
        if not (number.isascii() and number.isdigit() and 1 <= int(number) <= 65535):
            wanted = "HOST:PORT" if key == "SUPERLINK" else "a port, 1 to 65535"
            raise ConfigError(f"{file}: {key}={settings.get(key, '')}, allowed is {wanted}")
    if server:
        check_listen(settings.get("LISTEN", ""), f"{file}: LISTEN=")
    return settings


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
