"""`fedara deploy`: from one machine to a server and devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from fedara_flwr.keys import ConfigError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def deploy() -> None:
    """A server and devices over a real SuperLink, with TLS and a key for each node: docs/deploy.md."""


@app.command()
def init(
    server: Annotated[str, typer.Option(metavar="HOST", help="name or address under which nodes reach the server")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="new folder, outside of git work trees or ignored there")],
    port: Annotated[int, typer.Option(help="port that nodes reach")] = 8000,
    nodes: Annotated[int, typer.Option(help="how many nodes, named 1, 2, …")] = 3,
    names: Annotated[str, typer.Option(metavar="A,B,…", help="their names, in place of --nodes")] = "",
    days: Annotated[int, typer.Option(help="how long the certificates are valid")] = 365,
    superlink_port: Annotated[int, typer.Option(help="the SuperLink's own, on the server alone; 0: --port + 1")] = 0,
) -> None:
    """Write keys, certificates, settings and scripts: a folder for the server and one for each node."""
    from fedara_flwr.cli.deploy.site import create

    named = tuple(name.strip() for name in names.split(",")) if names else tuple(str(number + 1) for number in range(nodes))
    try:
        create(out, server, port, named, days, superlink_port or port + 1, typer.echo)
    except (ConfigError, OSError) as error:
        _fail(error)
    typer.echo(f"next: {out / 'server' / 'README.md'}")


@app.command("add-node")
def add_node(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    site: Annotated[Path, typer.Option(metavar="FOLDER", help="what `fedara deploy init` wrote")],
) -> None:
    """Add a node to a site."""
    from fedara_flwr.cli.deploy.site import add_node

    try:
        add_node(site, name, typer.echo)
    except (ConfigError, OSError) as error:
        _fail(error)


@app.command("check")  # not by the function's name: that would hide the module of that name
def check_up(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="the server's folder or a node's")] = Path("."),
) -> None:
    """Check this machine's folder, in order: files, keys, certificate, packages, network, data. Exits with 1 at a problem."""
    from rich.console import Console

    from fedara_flwr.cli.deploy.check import examine
    from fedara_flwr.cli.findings import print_findings

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    try:
        problems = print_findings(examine(folder.resolve()), console)
    except ConfigError as error:
        _fail(error)
    if not problems:
        typer.echo("ready")
    raise typer.Exit(int(problems > 0))


@app.command("nodes")  # as above
def list_nodes(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="the server's folder")] = Path("."),
) -> None:
    """Which nodes are registered and online, and what became of them in the newest run. Run it on the server."""
    from fedara_flwr.cli.deploy.nodes import show

    try:
        typer.echo("\n".join(show(folder.resolve())))
    except (ConfigError, OSError) as error:
        _fail(error)


@app.command()
def unregister(
    node: Annotated[str, typer.Argument(metavar="NODE", help="its name or id, as `fedara deploy nodes` shows it")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="the server's folder")] = Path("."),
) -> None:
    """Take a node's registration back, for good: a device that is lost. Its key is never accepted again."""
    from fedara_flwr.cli.deploy.nodes import unregister

    try:
        typer.echo(unregister(folder.resolve(), node))
    except (ConfigError, OSError) as error:
        _fail(error)


@app.command("gateway")  # as above
def start_gateway(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="the server's folder: certificate and key")],
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="where the SuperLink listens")],
    listen: Annotated[str, typer.Option(metavar="ADDRESS", help="::, all of this machine, IPv6 and IPv4; or one")] = "::",
    port: Annotated[int, typer.Option()] = 8000,
    max_request_mb: Annotated[float, typer.Option(min=0, help="a larger request is refused")] = 64,
    max_connections: Annotated[int, typer.Option(min=1, help="at once")] = 1024,
    max_per_address: Annotated[int, typer.Option(min=1, help="of these, from one address")] = 64,
    head_seconds: Annotated[float, typer.Option(min=0.1, help="for the TLS handshake, and for a request's headers")] = 10,
    body_seconds: Annotated[float, typer.Option(min=1, help="for a request's body")] = 300,
) -> None:
    """Pass on what nodes need of a SuperLink, and nothing else. The server's start.sh starts it."""
    from fedara_flwr.cli.deploy.gateway import Limits, serve
    from fedara_flwr.cli.deploy.settings import check_listen

    limits = Limits(max_request_mb, max_connections, max_per_address, head_seconds, body_seconds)
    try:
        check_listen(listen, "LISTEN=")
        serve(superlink, folder / "ca.crt", folder / "server.pem", folder / "server.key", listen, port, limits)
    except (ConfigError, OSError) as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    typer.secho(f"error: {error}", fg="red", err=True)
    raise typer.Exit(1)
