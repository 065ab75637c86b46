"""What nodes reach of a SuperLink: its Fleet API, and nothing else.

One port of a SuperLink answers nodes (Fleet), users (Control) and its own processes (Runtime). Node authentication covers the
first alone: whoever reaches the port could submit a run, so execute code on the server and on every node. So the SuperLink
listens on this machine only, and this gateway passes on what nodes need. It is the one part that strangers reach, so it limits
how many connections there are, how long heads and bodies take, and what one request may carry; without the headers of a node's
signature no body is read. Whether the signature is good the SuperLink says.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import ssl
from asyncio import constants
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedara_flwr.flower import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER

SIGNED = (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER)
HEAD_BYTES = 16 << 10
CLOSE = {"connection": "close"}  # what is left of the body is not waited for
SUPERLINK_SECONDS = 60.0  # for one answer of the SuperLink
# headers of one connection, and those that tell where a message comes from and goes to
NOT_PASSED = {
    *("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
    *("host", "forwarded", "x-forwarded-for", "x-forwarded-proto"),
}


@dataclass(frozen=True)
class Limits:
    """What the gateway grants to those who connect.

    Attributes:
        megabytes: that one request may carry; a larger one is answered with 413. Flower cuts arrays into objects of 5 MiB.
        connections: at once.
        per_address: of these, from one address, with IPv6 from one /64: a household's nodes share theirs.
        head_seconds: for the TLS handshake, and from the first byte of a request to the end of its headers.
        body_seconds: for one request's body; a slower one is answered with 408.
    """

    megabytes: float = 64
    connections: int = 1024
    per_address: int = 64
    head_seconds: float = 10.0
    body_seconds: float = 300.0


def application(superlink: str, ca: Path, limits: Limits = Limits()) -> Starlette:  # noqa: B008 (frozen)
    """The gateway as an ASGI application.

    Args:
        superlink: host:port of the SuperLink.
        ca: certificate that its certificate is checked against.
    """
    most = int(limits.megabytes * 1e6)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
        context = ssl.create_default_context(cafile=str(ca))
        pool = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        async with httpx.AsyncClient(verify=context, timeout=SUPERLINK_SECONDS, limits=pool, trust_env=False) as client:
            yield {"client": client}

    async def fleet(request: Request) -> Response:
        name = request.path_params["name"]
        if not re.fullmatch("[a-z-]+", name):
            raise HTTPException(404)
        if not all(request.headers.get(header) for header in SIGNED):
            raise HTTPException(401, headers=CLOSE)
        if int(request.headers.get("content-length", 0)) > most:
            raise HTTPException(413, headers=CLOSE)
        body = _limited(request, most, limits.body_seconds)
        return await _pass_on(request, f"https://{superlink}/v1/fleet/{name}", body)

    async def health(request: Request) -> Response:
        return await _pass_on(request, f"https://{superlink}/health", None)

    routes = [Route("/v1/fleet/{name}", fleet, methods=["POST"]), Route("/health", health, methods=["GET"])]
    return Starlette(routes=routes, lifespan=lifespan)


async def _limited(request: Request, most: int, seconds: float) -> AsyncIterator[bytes]:
    """The request's body, refused once it is longer than `most` bytes (the length that it states may be wrong) or too slow."""
    length, stream, now = 0, request.stream(), asyncio.get_running_loop().time
    end = now() + seconds
    while True:
        try:
            part = await asyncio.wait_for(anext(stream), end - now())
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise HTTPException(408, headers=CLOSE) from None
        length += len(part)
        if length > most:
            raise HTTPException(413, headers=CLOSE)
        yield part


async def _pass_on(request: Request, url: str, body: AsyncIterator[bytes] | None) -> Response:
    client: httpx.AsyncClient = request.state.client
    headers = {name: value for name, value in request.headers.items() if name not in NOT_PASSED}
    if request.client is not None:
        headers["x-forwarded-for"] = request.client.host  # for the SuperLink's log
    try:
        answer = await client.send(client.build_request(request.method, url, headers=headers, content=body), stream=True)
    except ClientDisconnect:
        return Response(status_code=400)  # which nobody reads
    except httpx.HTTPError as error:
        return PlainTextResponse(f"the SuperLink does not answer ({type(error).__name__})", 502)
    kept = {name: value for name, value in answer.headers.items() if name not in NOT_PASSED}
    return StreamingResponse(answer.aiter_raw(), answer.status_code, kept, background=BackgroundTask(answer.aclose))


def protocol(limits: Limits) -> type[H11Protocol]:
    """HTTP/1.1 as uvicorn speaks it, for so many connections, none of which may take long over a request's headers."""
    there: Counter[str] = Counter()

    class Limited(H11Protocol):
        counted, slow, address = False, None, ""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.address = place((transport.get_extra_info("peername") or ("",))[0])
            if there.total() >= limits.connections or there[self.address] >= limits.per_address:
                transport.abort()
                return
            self.counted = True
            there[self.address] += 1
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop()
            if self.counted:
                there[self.address] -= 1
                if not there[self.address]:
                    del there[self.address]

        def _watch(self) -> None:
            """The time runs while a head is under way; between two requests it is uvicorn's keep-alive."""
            if self.conn.their_state is not h11.IDLE:
                self._stop()
            elif self.slow is None:
                self.slow = self.loop.call_later(limits.head_seconds, self.transport.abort)

        def _stop(self) -> None:
            if self.slow is not None:
                self.slow.cancel()
                self.slow = None

    return Limited


def place(address: str) -> str:
    """Of an IPv6 address its network of 64 bits, in which one machine may have any number; IPv4 as it is."""
    try:
        found = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    return str(found.ipv4_mapped or ipaddress.IPv6Network((int(found) >> 64 << 64, 64)))


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; on "::" for IPv4, too, and where the system has no IPv6 for IPv4 alone.

    Raises:
        OSError: the port is taken, or the address is none of this machine.
    """
    both = host == "::" and socket.has_dualstack_ipv6()
    if host == "::" and not both:
        host = "0.0.0.0"  # nosec B104 # nodes come from outside
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both)


def serve(superlink: str, ca: Path, certificate: Path, key: Path, host: str, port: int, limits: Limits) -> None:
    """Run the gateway until the process is stopped.

    Args:
        superlink, ca: as `application`.
        certificate, key: the server's own, PEM.
        host, port: to listen on.

    Raises:
        OSError: it cannot listen there.
    """
    constants.SSL_HANDSHAKE_TIMEOUT = limits.head_seconds  # type: ignore[misc] # uvicorn has no option for it
    config = uvicorn.Config(
        application(superlink, ca, limits),
        ssl_certfile=str(certificate),
        ssl_keyfile=str(key),
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        http=protocol(limits),
        loop="asyncio",
        h11_max_incomplete_event_size=HEAD_BYTES,
    )
    with listening(host, port) as taken, contextlib.suppress(KeyboardInterrupt):
        print(f"gateway: nodes are heard on port {port}", flush=True)
        server = uvicorn.Server(config)
        server.run(sockets=[taken])
        if not server.started:
            raise OSError("the gateway did not start")
