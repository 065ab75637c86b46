"""fedara_flwr: the Flower ServerApp. Thin: settings, model, strategy, run directory."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedara_flwr import strategies
from fedara_flwr.config import ConfigError, Settings
from fedara_flwr.runs import RunDirectory

if TYPE_CHECKING:
    from fedara_flwr.server.evaluate import ServerModel
    from fedara_flwr.strategies.base import BaseStrategy

logger = logging.getLogger("flwr")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one method from start to export; a user's mistake ends it before round 1 with one line."""
    try:
        run(grid, Settings.from_flat(context.run_config))
    except ConfigError as error:
        logger.error("%s", error)
        raise


def run(grid: Grid, settings: Settings) -> RunDirectory:
    """The whole run on a grid, Flower's or the in-process one.

    Raises:
        ConfigError: before round 1, for a setting that cannot work.
        RunFailed: too many rounds in a row without enough good replies; all that was reached is saved.
        TimeoutError: too few nodes came.
    """
    began = time.time()
    method = strategies.find(settings.method)
    from fedara_flwr.server.evaluate import ServerModel

    model = ServerModel(settings)
    strategy = method(settings, model)
    directory = RunDirectory.create(settings)
    strategy.write = directory.write
    logger.info("run directory: %s", directory.path)
    outcome = "failed"
    try:
        strategy.start(grid, strategy.initial_arrays(), settings.num_server_rounds)
        outcome = "completed"
    finally:
        if strategy.state.server_round:
            _finish(directory, strategy, model, outcome, time.time() - began)
        else:
            directory.discard()
    return directory


def _finish(directory: RunDirectory, strategy: BaseStrategy, model: ServerModel, outcome: str, seconds: float) -> None:
    """Test once, export what was reached, write and show the summary."""
    settings, state = strategy.settings, strategy.state
    end = {"type": "end", "outcome": outcome, "rounds": state.server_round, "seconds": seconds}
    test: dict[str, float] = {}
    if outcome == "completed":
        test = model.evaluate(strategy.weights(), "test")
        end |= {f"test-{name}": value for name, value in test.items()}
    directory.write(end)
    exported = model.export(directory.path, strategy.exported())
    directory.finish(
        {
            **end,
            "method": settings.method,
            "seed": settings.seed,
            "model": settings.model.name,
            "fingerprint": model.spec.fingerprint,
            "labels": list(model.data.labels),
            "ranks": list(state.mask.ranks),
            "modules": [module.name for module in model.spec.modules],
            "alive-per-module": state.mask.alive.tolist(),
            "mask": state.mask.to_bytes().hex(),
            "bytes": state.bytes_total,
            "modelled": directory.modelled(),
            "left-out": strategy.roster.unfit,
        }
    )
    logger.info("\n%s", directory.table())
    if outcome == "completed":
        logger.info("test: %s", ", ".join(f"{name} {value:.3f}" for name, value in test.items()))
    if modelled := directory.modelled():
        figures = tuple(modelled[name] for name in ("seconds", "joules", "waiting"))
        logger.info("modelled on %s: %.0f s, %.0f J; a client waits %.0f s", settings.fleet.profiles, *figures)
    logger.info("%s: %s", exported.name, exported)
    logger.info("run directory: %s", directory.path)
