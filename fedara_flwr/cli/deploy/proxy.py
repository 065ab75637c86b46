"""The proxy by which a SuperNode reaches its server, if there is one: as httpx, which Flower uses, chooses it."""

from __future__ import annotations

import base64
import ssl
from http.client import HTTPSConnection
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies

from fedara_flwr.cli.proxies import LOCAL_HOSTS, passed_by


def proxy_to(host: str, port: int) -> SplitResult | None:
    """The proxy that the environment names for a server, None where it is reached without one; never for this machine.

    Raises:
        ValueError: its address is none.
    """
    told = getproxies()
    address = told.get("https") or told.get("all")
    if not address or passed_by(host, port, f"{told.get('no', '')},{LOCAL_HOSTS}"):
        return None
    proxy = urlsplit(address if "://" in address else f"http://{address}")
    if not proxy.hostname or proxy.scheme not in ("http", "https"):
        raise ValueError(f"https_proxy names {proxy.scheme}://{shown(proxy)}, allowed are HTTP proxies")
    return proxy


def shown(proxy: SplitResult) -> str:
    """Its host and port, without name and password."""
    return f"{proxy.hostname}:{proxy.port or (443 if proxy.scheme == 'https' else 80)}"


def connection(host: str, port: int, timeout: float, authority: str, own: bool = False) -> HTTPSConnection:
    """A connection to a server that `authority` certified, by the proxy that the environment names, if any.

    Args:
        authority: file of its certificate.
        own: of this machine: without a proxy, and whatever name the certificate is for.

    Raises:
        ValueError: as `proxy_to`.
    """
    context = ssl.create_default_context(cafile=authority)
    context.check_hostname = not own
    if own or (proxy := proxy_to(host, port)) is None:
        return HTTPSConnection(host, port, timeout=timeout, context=context)
    tunnel = HTTPSConnection(str(proxy.hostname), proxy.port or 80, timeout=timeout, context=context)
    login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}" if proxy.username else ""
    more = {"Proxy-Authorization": "Basic " + base64.b64encode(login.encode()).decode()} if login else {}
    tunnel.set_tunnel(host, port, more)
    return tunnel
