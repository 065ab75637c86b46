"""fedara_flwr: the Flower ServerApp. Thin: settings, model, method, loop, run directory."""

from __future__ import annotations

import logging
import signal

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedara_flwr import log, strategies
from fedara_flwr.config import Settings
from fedara_flwr.flower import RunNotRunningException
from fedara_flwr.keys import ConfigError
from fedara_flwr.merging.private import accounting
from fedara_flwr.runs.directory import RunDirectory
from fedara_flwr.server.stopping import Interrupted, RunFailed, check_stopping, signals_raise
from fedara_flwr.tasks import read_settings

logger = logging.getLogger(__name__)
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one method from start to export; a user's mistake ends it before round 1 with one line."""
    log.show()
    try:
        with signals_raise():
            run(grid, read_settings(context.run_config))
    except (ConfigError, RunFailed) as error:
        log.ends_by(error)
        raise
    except (Interrupted, RunNotRunningException):
        signal.raise_signal(signal.SIGINT)  # Flower's own handler tells the SuperLink, and ends this process


def run(grid: Grid, settings: Settings) -> RunDirectory:
    """The whole run on a grid, Flower's or the in-process one; a new one, or one that goes on (`run.resume`).

    Raises:
        ConfigError: before the first round, for a setting that cannot work.
        RunFailed: too many rounds in a row without enough good replies; all that was reached is saved.
        TooFewNodes: they did not come in time.
        Interrupted, RunNotRunningException: this process is to end; all that was reached is saved.
    """
    log.show()
    strategies.find(settings.method).check(settings)
    resumed = RunDirectory.resume(settings) if settings.run.resume else None
    from fedara_flwr.runs.keeper import Keeper
    from fedara_flwr.runs.trackers import check
    from fedara_flwr.server.evaluate import ServerModel
    from fedara_flwr.server.loop import RoundLoop
    from fedara_flwr.server.state import ServerState

    directory = resumed
    try:
        check(settings.run.track)
        if settings.privacy.on:
            accounting()
        model = ServerModel(settings)
        method = strategies.find(settings.method)(settings, model)
        check_stopping(settings, method)
        start = None if resumed else ServerState(**vars(method.start()))
        directory = resumed or RunDirectory.create(settings)
        keeper = Keeper(directory, method, model)
        state = start or keeper.restored()
        logger.info("run directory: %s", directory.path)
        try:
            try:
                expected = model.expected(method.all_terms(), method.parts)
                loop = RoundLoop(settings, method, state, expected, keeper.callbacks(state), directory.facts["id"])
                keeper.begin(loop)
                loop.start(grid, loop.initial_arrays(), settings.num_server_rounds)
            except Exception as error:
                keeper.fail(str(error))
                raise
            keeper.conclude("completed", loop.stopped)
        except (Interrupted, RunNotRunningException):
            keeper.stop()
            raise
    finally:
        if directory is not None:
            directory.close()
    return directory
