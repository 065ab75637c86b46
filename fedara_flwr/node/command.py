"""A command of the device's owner or system, run for what it says. The standard library alone."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence


def ask(words: Sequence[str], seconds: float, most: int, errors: bool = True) -> tuple[int, str]:
    """Exit code of a command, and the first `most` bytes that it writes; what is no UTF-8 is replaced.

    Args:
        words: the command line, without a shell.
        seconds: after which it is ended, with all that it started.
        errors: whether what it writes to standard error is wanted, too.

    Raises:
        OSError: it cannot be run.
        subprocess.TimeoutExpired: it did not answer in time.
    """
    with tempfile.TemporaryFile() as output:  # not a pipe: what the command leaves behind could hold it open
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if errors else subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        output.seek(0)
        return code, output.read(most).decode(errors="replace")
