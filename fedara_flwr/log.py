"""Where the package's own lines go: every module logs by its name, under `fedara_flwr`."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

logger = logging.getLogger("fedara_flwr")


class _Lines(logging.Formatter):
    """Plain lines; a warning says that it is one."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {printable(text)}"


def printable(text: str) -> str:
    """The text on one line, "?" for whatever is no visible character: words from outside must not forge lines or colours."""
    return "".join(c if c.isprintable() else "?" for c in text)


def error_line(error: BaseException, most: int = 300) -> str:
    """An error as one line, "Kind: what it says", cut to `most` characters of its text."""
    text = " ".join(str(error).split())[:most]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def figure(value: float | None) -> str:
    """A metric in at most seven characters where it is below a million; "-" for none."""
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.1f}" if abs(value) < 100_000 else f"{value:.3g}"


class _StandardOutput(logging.StreamHandler):
    """Writes to what standard output is now, not to what it was when logging began: notebooks and tests replace it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)  # StreamHandler's own would set `stream`

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout


def show() -> None:
    """Send the package's lines to standard output, once per process.

    Not through Flower's logger: its prefixes and colours would break the columns, and `fedara run` could not tell our lines
    from Flower's.
    """
    if not logger.handlers:
        handler = _StandardOutput()
        handler.setFormatter(_Lines())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def ends_by(error: BaseException) -> None:
    """Say in one line the error that ends this process's run; what Flower says of it, with a traceback, is left out."""

    def other(record: logging.LogRecord) -> bool:
        return not (record.exc_info and record.exc_info[1] is error or record.getMessage().startswith("Exit Code: "))

    logger.error("%s", error)
    logging.getLogger("flwr").addFilter(other)
