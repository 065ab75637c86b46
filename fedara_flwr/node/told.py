"""What a device says of its errors: a kind and a place, nothing of its own data. The words stay in its own log."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from errno import errorcode
from pathlib import Path

from fedara_flwr.keys import ConfigError
from fedara_flwr.node.store import MissingPieces
from fedara_flwr.wire.arrays import Rejected

logger = logging.getLogger(__name__)
PACKAGE = Path(__file__).parents[1]
MORE = "the node's log says more"
OPEN = (ConfigError, Rejected, MissingPieces, FloatingPointError)
"""Errors whose words are about settings, the server's own message or numbers; those about own data went through `own_data`."""


class Failed(RuntimeError):
    """An error as a device tells it."""


def kind(error: BaseException) -> str:
    """The error's kind and the place in this package where it came up; of the system's own errors also what is the matter."""
    inside = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(PACKAGE)]
    place = f" in {Path(inside[-1].filename).relative_to(PACKAGE)}, line {inside[-1].lineno}" if inside else ""
    # by its number: libraries put names of files into `strerror`
    number = error.errno if isinstance(error, OSError) else None
    why = f" ({os.strerror(number)})" if number is not None and number in errorcode else ""
    return f"{type(error).__name__}{why}{place}"


@contextmanager
def own_data() -> Iterator[None]:
    """Within, whatever is wrong with the device's own data is logged and raised without its words.

    Raises:
        ConfigError: a kind and a place, as a server may learn it.
    """
    try:
        yield
    except MemoryError:
        raise
    except ConfigError as error:
        logger.warning("%s", error)
        raise ConfigError(f"own data: {error.told or 'they cannot be used'}; {MORE}") from None
    except Exception as error:
        logger.exception("own data cannot be read")
        raise ConfigError(f"own data: {kind(error)}; {MORE}") from None


@contextmanager
def without_words() -> Iterator[None]:
    """Within, an error of any other code is logged and raised without its words, which may be the device's data.

    Raises:
        Failed: a kind and a place.
    """
    try:
        yield
    except OPEN:
        raise
    except Exception as error:
        logger.exception("a message could not be answered")
        raise Failed(f"{kind(error)}; {MORE}") from None
