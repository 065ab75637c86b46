"""Runs the `fedara` command as `python -m fedara_flwr.cli`."""

from fedara_flwr.cli import app

app()
