"""The `fedara` command line: a function for each command, which imports what it needs when it is called."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedara_flwr import __version__
from fedara_flwr.cli import deploy, worker
from fedara_flwr.keys import ConfigError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(deploy.app, name="deploy")
app.add_typer(worker.app, name="worker")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedara-flwr {__version__}")
        raise typer.Exit


@app.callback()
def fedara(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Federated parameter-efficient fine-tuning on Flower."""
    try:
        os.getcwd()
    except OSError:  # torch's libraries end the whole process there
        typer.secho("error: the working folder is gone: cd to another one", fg="red", err=True)
        raise typer.Exit(1) from None
    if sys.flags.optimize > 1:
        typer.secho("error: PYTHONOPTIMIZE = 2: allowed are 0 and 1, transformers reads docstrings", fg="red", err=True)
        raise typer.Exit(1)


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
    resume: Annotated[str, typer.Option(metavar="RUN", help="go on with this run at its next round, by its settings")] = "",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="show Flower's and Ray's own lines, too")] = False,
) -> None:
    """Run the app in simulation; the exit code is the run's. Ctrl-C stops it and keeps what the last checkpoint has."""
    from fedara_flwr.cli.launch import RunError, launch
    from fedara_flwr.runs.directory import find_run

    try:
        run_folder = find_run(resume) if resume else None
        launch(application.resolve(), run_config or [], federation_config, engine, run_folder, verbose)
    except (ConfigError, RunError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.secho("stopped", fg="yellow", err=True)
        raise typer.Exit(130) from None


@app.command()
def config() -> None:
    """Print every configuration key, its default and what is allowed, as Markdown."""
    from fedara_flwr.cli.reference import reference

    typer.echo(reference(), nl=False)


@app.command()
def methods() -> None:
    """List the methods: built in and of installed packages, with the keys that each one reads."""
    from rich.console import Console

    from fedara_flwr.cli.listing import print_methods

    print_methods(Console(highlight=False))


@app.command()
def tasks() -> None:
    """List the tasks: built in and of installed packages, with their metrics and their keys of data.options."""
    from rich.console import Console

    from fedara_flwr.cli.listing import print_tasks

    print_tasks(Console(highlight=False))


@app.command("doctor")  # not by the function's name, which would hide the module of that name
def check_up(
    application: Annotated[Path, typer.Argument(metavar="APP", help="folder of the Flower app")] = Path("."),
    run_config: Annotated[list[str] | None, typer.Option("--run-config", "-c", help="overrides as for `fedara run`")] = None,
) -> None:
    """Check what a run needs: versions, Flower's settings, device, model, data, ports. Exits with 1 if a run would fail."""
    from rich.console import Console

    from fedara_flwr.cli.doctor import examine
    from fedara_flwr.cli.findings import print_findings

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # no narrower than need be: paths stay whole
    raise typer.Exit(int(print_findings(examine(application.resolve(), run_config or []), console) > 0))


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's folder, or its name under ./runs or FLWR_HOME/runs")],
    kind: Annotated[
        str, typer.Option("--format", help="'peft' (a rank per layer), 'lora' (one rank for all) or 'merged' (the whole model)")
    ] = "peft",
    out: Annotated[Path | None, typer.Option(help="folder; default: RUN/exports/FORMAT")] = None,
    force: Annotated[bool, typer.Option("--force", help="write into a folder that holds something else")] = False,
    push: Annotated[str, typer.Option(metavar="REPO", help="upload to this repository of the Hugging Face Hub")] = "",
    private: Annotated[bool, typer.Option("--private/--public", help="who may see REPO")] = True,
) -> None:
    """Write a run's model for stock PEFT or transformers, with a model card."""
    from fedara_flwr.cli.exporting import PushError
    from fedara_flwr.cli.exporting import export as write
    from fedara_flwr.runs.directory import find_run

    try:
        write(find_run(run), kind, out, force=force, push=push, private=private, say=typer.echo)
    except (ConfigError, PushError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from None


@app.command()
def chat(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's folder, or its name under ./runs or FLWR_HOME/runs")],
    prompt: Annotated[
        str | None, typer.Option(help="ask this once, and print the answer alone; - = from standard input")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="the model as it was before the run")] = False,
    system: Annotated[str, typer.Option(help="system text in place of the run's")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="most tokens of an answer")] = 256,
) -> None:
    """Talk to a language model that a run has tuned, on this machine, without a network."""
    from rich.console import Console

    from fedara_flwr.cli.chat import chat as talk
    from fedara_flwr.runs.directory import find_run

    try:
        talk(find_run(run), prompt, max_tokens, system, base, Console(highlight=False))
    except ConfigError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from None


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's folder, or its name under ./runs or FLWR_HOME/runs")],
    out: Annotated[Path | None, typer.Option(help="file to write; default: report.html in the run's folder")] = None,
) -> None:
    """Write the page of a run, finished or not: one file that needs no network."""
    from rich.console import Console

    from fedara_flwr.cli.reporting import report

    try:
        report(run, out, Console(highlight=False))
    except ConfigError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from None


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="folders or names, as for `fedara report`")],
    target: Annotated[
        float | None, typer.Option(help="rounds, MB, seconds until 3 evaluations in a row have this mean")
    ] = None,
    out: Annotated[Path, typer.Option(help="page to write")] = Path("comparison.html"),
) -> None:
    """Compare runs: a table here, and a page with their curves over each other."""
    from rich.console import Console

    from fedara_flwr.cli.reporting import compare

    try:
        compare(runs, out, target, Console(highlight=False))
    except ConfigError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
