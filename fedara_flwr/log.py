"""Where the package's own lines go: every module logs by its name, under `fedara_flwr`."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("fedara_flwr")


class _Lines(logging.Formatter):
    """Plain lines; a warning says that it is one."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def show() -> None:
    """Send the package's lines to standard output, once per process.

    Not through Flower's logger: its prefixes and colours would break the columns, and `fedara run` could not tell our lines
    from Flower's.
    """
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(_Lines())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
