"""What the environment says of proxies, as httpx reads it, by which Flower's processes reach each other and their server."""

from __future__ import annotations

import ipaddress
import os

import httpx

from fedara_flwr.log import first_line

LOCAL_HOSTS = "localhost,127.0.0.1,::1"
PROXIES, PAST = ("http_proxy", "https_proxy", "all_proxy"), "no_proxy"


def without_proxy() -> dict[str, str]:
    """The environment's words by which calls to this machine pass by every proxy, and no word that httpx fails at."""
    names = [PAST, PAST.upper()] + [name for name in ("no_grpc_proxy",) if os.environ.get(name)]
    past = {name: ",".join([*filter(_readable, _hosts(os.environ.get(name, ""))), LOCAL_HOSTS]) for name in names}
    return past | {name: "" for name in unusable() if name not in past}


def unusable() -> dict[str, str]:
    """Variables of the environment at which every process of Flower ends, and why: httpx cannot use what they name."""
    found = {}
    for name, value in os.environ.items():
        if name.lower() == PAST and not all(map(_readable, _hosts(value))):
            words = ", ".join(repr(host) for host in _hosts(value) if not _readable(host))
            found[name] = f"httpx cannot read {words}; allowed are names and addresses, no networks of IPv6 and no brackets"
        elif name.lower() in PROXIES and value:
            try:
                httpx.Client(proxy=value if "://" in value else f"http://{value}", trust_env=False).close()
            except (ImportError, ValueError, httpx.InvalidURL) as error:
                found[name] = first_line(error)
    return found


def passed_by(host: str, port: int, past: str) -> bool:
    """Whether `past`, the value of no_proxy, has httpx reach a host without a proxy."""
    host = host.lower()
    for entry in map(str.lower, _hosts(past)):
        scheme, _, name = entry.rpartition("://")
        if not _is_ipv6(name) and name.rpartition(":")[2] == str(port):
            name = name.rpartition(":")[0]
        if entry == "*" or (scheme in ("", "all", "https") and (name == host or _below(host, name))):
            return True
    return False


def _below(host: str, domain: str) -> bool:
    return domain not in ("", "localhost") and not _is_address(domain) and host.endswith(f".{domain.removeprefix('.')}")


def _hosts(past: str) -> list[str]:
    return [host for host in map(str.strip, past.split(",")) if host]


def _readable(host: str) -> bool:
    """Whether httpx makes one of its patterns of an entry of no_proxy; where it does not, no client can be made at all."""
    try:
        httpx.URL(host if "://" in host else f"all://[{host}]" if _is_ipv6(host) else f"all://*{host}")
    except httpx.InvalidURL:
        return False
    return True


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_ipv6(host: str) -> bool:
    return _is_address(host) and ":" in host
