"""The `fedara` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedara_flwr.config import ConfigError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def fedara() -> None:
    """Federated parameter-efficient fine-tuning on Flower."""


@app.command()
def run(
    application: Annotated[Path, typer.Argument(metavar="APP", help="folder of the Flower app")] = Path("."),
    run_config: Annotated[
        list[str] | None, typer.Option("--run-config", "-c", help="overrides as for `flwr run`: \"method='fedlora'\"")
    ] = None,
    federation_config: Annotated[
        Path | None, typer.Option("--federation-config", help="TOML file; default: federation.toml of the app")
    ] = None,
    engine: Annotated[str, typer.Option(help="'flower' (flwr run, Ray) or 'inprocess' (one process)")] = "flower",
) -> None:
    """Run the app in simulation; the exit code is the run's."""
    from fedara_flwr.cli.launch import RunError, launch

    try:
        launch(application.resolve(), run_config or [], federation_config, engine)
    except (ConfigError, RunError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.secho("stopped", fg="yellow", err=True)
        raise typer.Exit(130) from None


@app.command()
def config() -> None:
    """Print every configuration key, its default and what is allowed, as Markdown."""
    from fedara_flwr.config import reference

    typer.echo(reference(), nl=False)


@app.command()
def methods() -> None:
    """List the methods: built in and of installed packages, with the keys that each one reads."""
    from rich.console import Console

    from fedara_flwr.cli.listing import print_methods

    print_methods(Console(highlight=False))
