"""FedAvg over LoRA's state, without evaluation; the wall time of every round goes to the file `out`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict

from flowertune.client_app import load_federation, load_model

app = ServerApp()


class Timed(FedAvg):
    """FedAvg that notes when a round begins and ends."""

    out = ""

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """As FedAvg."""
        self.began = time.perf_counter()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """As FedAvg."""
        replies = list(replies)
        merged = super().aggregate_train(server_round, replies)
        line = {
            "round": server_round,
            "seconds": time.perf_counter() - self.began,
            "clients": sum(not reply.has_error() for reply in replies),
            "failed": sum(reply.has_error() for reply in replies),
        }
        with Path(self.out).open("a") as file:
            file.write(json.dumps(line) + "\n")
        return merged


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    config: Any = context.run_config
    _, split = load_federation(config)
    arrays = ArrayRecord(get_peft_model_state_dict(load_model(config, len(split.labels))))
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.1)
    time.sleep(2.0)  # FedAvg samples from the nodes that are there in the first round
    strategy = Timed(fraction_train=config["fraction-train"], fraction_evaluate=0.0)
    strategy.out = config["out"]
    strategy.start(grid, arrays, num_rounds=config["num-server-rounds"])
