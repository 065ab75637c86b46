"""What nodes reach of a SuperLink: its Fleet API, and nothing else.

One port of a SuperLink answers nodes (Fleet), users (Control) and its own processes (Runtime). Node authentication covers the
first alone: whoever reaches the port could submit a run, so execute code on the server and on every node. So the SuperLink
listens on this machine only, and this gateway passes on what nodes need, with a limit on what one request may carry.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

MAX_MB = 64  # Flower cuts arrays into objects of 5 MiB
SUPERLINK_SECONDS = 60.0  # for one answer of the SuperLink
# headers of one connection, and those that tell where a message comes from and goes to
NOT_PASSED = {
    *("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
    *("host", "forwarded", "x-forwarded-for", "x-forwarded-proto"),
}


def application(superlink: str, ca: Path, max_mb: float = MAX_MB) -> Starlette:
    """The gateway as an ASGI application.

    Args:
        superlink: host:port of the SuperLink.
        ca: certificate that its certificate is checked against.
        max_mb: megabytes that one request may carry; a larger one is answered with 413.
    """
    limit = int(max_mb * 1e6)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
        context = ssl.create_default_context(cafile=str(ca))
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        async with httpx.AsyncClient(verify=context, timeout=SUPERLINK_SECONDS, limits=limits, trust_env=False) as client:
            yield {"client": client}

    async def fleet(request: Request) -> Response:
        name = request.path_params["name"]
        if not re.fullmatch("[a-z-]+", name):
            raise HTTPException(404)
        if int(request.headers.get("content-length", 0)) > limit:
            raise HTTPException(413)
        return await _pass_on(request, f"https://{superlink}/v1/fleet/{name}", _limited(request, limit))

    async def health(request: Request) -> Response:
        return await _pass_on(request, f"https://{superlink}/health", None)

    routes = [Route("/v1/fleet/{name}", fleet, methods=["POST"]), Route("/health", health, methods=["GET"])]
    return Starlette(routes=routes, lifespan=lifespan)


async def _limited(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The request's body, refused once it is longer than `limit`: the length that it states may be wrong or missing."""
    length = 0
    async for part in request.stream():
        length += len(part)
        if length > limit:
            raise HTTPException(413)
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


def serve(superlink: str, ca: Path, certificate: Path, key: Path, host: str, port: int, max_mb: float) -> None:
    """Run the gateway until the process is stopped.

    Args:
        superlink, ca, max_mb: as `application`.
        certificate, key: the server's own, PEM.
        host, port: to listen on.
    """
    uvicorn.run(
        application(superlink, ca, max_mb),
        host=host,
        port=port,
        ssl_certfile=str(certificate),
        ssl_keyfile=str(key),
        log_level="warning",
        server_header=False,
    )
