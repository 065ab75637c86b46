"""Client-rounds per second of a whole FedARA run: ours, the bare PyTorch loop, and a plain Flower app like FlowerTune's.

    python benchmarks/speed/throughput.py [--engine inprocess|flower] [--dtypes float32,bfloat16] [--rounds 20] [--out FILE]
        [--device cuda] [--models minilm,bert-base,qwen-1b] [--as-it-comes] [--clients 5]

Same model (MiniLM, or by size with random weights), data, clients, batch size and number of steps. `inprocess`: every training
message of our run is at once done again by the bare loop (the same masks, batches and optimiser, nothing else) and by the plain
app for the same client, so all three are interleaved within seconds; seconds are of the process's own CPU time on one thread,
so other work on the machine counts less; on a GPU of the wall clock. Ours has its server in it: sampling, messages, checks,
votes, merging, masks, records. `flower`: whole runs under Ray, wall time, ours and the plain app's
in turn; needs a quiet machine.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict
from together import MINILM, SIZES, folder, unknown

from fedara_flwr import engine, seeds, strategies
from fedara_flwr.adapters.learner import Learner
from fedara_flwr.cli.launch import read_config, run_flower
from fedara_flwr.cli.processes import interrupt, on_stop
from fedara_flwr.cli.simulation import Simulation, short_folder
from fedara_flwr.client import train as client
from fedara_flwr.client.capacity import clock
from fedara_flwr.client.session import Session
from fedara_flwr.config import DataSettings, Settings
from fedara_flwr.server.evaluate import ServerModel
from fedara_flwr.server.loop import Callback, RoundLoop
from fedara_flwr.tasks import open_task, read_settings
from fedara_flwr.wire.arrays import read_arrays
from fedara_flwr.wire.plan import TrainPlan
from fedara_flwr.wire.records import plan_from_content

ROOT = Path(__file__).parent.parent.parent
FLOWERTUNE = Path(__file__).parent / "flowertune"
sys.path.insert(0, str(FLOWERTUNE))
CLIENTS = 20
TASK = open_task(DataSettings())


class BareLoop:
    """Forward, backward and optimiser steps of one client's round on resident model and tokenised data."""

    def __init__(self, settings: Settings, labels: tuple[str, ...]) -> None:
        self.settings = settings
        self.session = Session(settings, labels, settings.run.device)
        self.adapted, self.tokenizer = self.session.adapted, self.session.learner.tokenizer

    def prepare(self, message: Message, key: str) -> tuple[TrainPlan, client.ClientData]:
        """What is there before the loop begins: values, data."""
        plan = plan_from_content(message.content, len(self.adapted.spec.modules))
        arrays = read_arrays(message.content, self.adapted.spec, plan.mask, plan.carries, plan.entries, plan.down)
        client.load(self.adapted, plan, arrays)
        return plan, self.session.client_data(key, int(key), CLIENTS, "")

    def run(self, plan: TrainPlan, data: client.ClientData, key: str) -> None:
        """The loop."""
        adapted = self.adapted
        parameters = [p for part in sorted(plan.trained) for p in adapted.parameters(part)]
        optimizer = torch.optim.AdamW(parameters, lr=plan.train.learning_rate, weight_decay=0.0, fused=True)
        rng = np.random.default_rng(seeds.derive(plan.seed, "train", plan.server_round, key))
        adapted.model.train(plan.train.dropout)
        for rows in client.batches([len(ids) for ids in data.train.ids], plan.train, rng):
            batch = Learner(adapted, TASK, self.tokenizer).batch(data.train, rows)
            loss = TASK.losses(adapted.outputs(batch, adapted.below(batch)), batch).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()


class Interleaved(engine.InProcessGrid):
    """Our engine; after each training message of ours the others do the same client's round."""

    def __init__(self, settings: Settings, labels: tuple[str, ...], flowertune_config: dict) -> None:
        super().__init__(settings.to_flat(), CLIENTS)
        from flowertune.client_app import app, load_model

        self.now = timer(settings.run.device)
        self.bare = BareLoop(settings, labels)
        self.plain = engine.InProcessGrid(flowertune_config, CLIENTS, app)
        self.arrays = ArrayRecord(get_peft_model_state_dict(load_model(flowertune_config, len(labels))))
        self.fedavg = FedAvg()
        self.replies: list[Message] = []
        self.elsewhere, self.bare_seconds, self.plain_seconds, self.in_client = 0.0, 0.0, 0.0, 0.0

    def _call(self, message: Message) -> Message:
        began = self.now()
        reply = super()._call(message)
        if message.metadata.message_type != MessageType.TRAIN:
            return reply
        ours = self.now()
        self.in_client += ours - began
        node_id = message.metadata.dst_node_id
        key = str(self.contexts[node_id].node_config["partition-id"])
        prepared = self.bare.prepare(message, key)
        before = self.now()
        self.bare.run(*prepared, key)
        bare = self.now()
        self.bare_seconds += bare - before
        content = RecordDict({"arrays": self.arrays, "config": ConfigRecord()})
        sent = self.plain.create_message(content, MessageType.TRAIN, node_id, "1")
        self.replies += self.plain.send_and_receive([sent])
        if self.replies[-1].has_error():
            raise SystemExit(f"the plain app: {self.replies[-1].error}")  # our server would only drop the reply
        self.plain_seconds += self.now() - bare
        self.elsewhere += self.now() - ours
        return reply

    def end_round(self) -> dict[str, float]:
        """Seconds since the last call of what ran beside ours; the plain app's server merges."""
        began = self.now()
        self.arrays = self.fedavg.aggregate_train(1, self.replies)[0] or self.arrays
        took = self.now() - began
        found = {
            "bare": self.bare_seconds,
            "plain": self.plain_seconds + took,
            "elsewhere": self.elsewhere + took,
            "in-client": self.in_client,
        }
        self.replies, self.elsewhere, self.bare_seconds, self.plain_seconds, self.in_client = [], 0.0, 0.0, 0.0, 0.0
        return found


def timer(device: str) -> Callable[[], float]:
    """Seconds of the process's CPU time, or of the wall clock once the GPU has done what it was given."""
    return time.process_time if device == "cpu" else lambda: clock(torch.device(device))


# The plain app neither solves its head nor shortens numbers.
LIKE_PLAIN = {"head.start": "random", "train.loss": "plain", "wire.down": "float32", "wire.up": "float32"}


def flat(
    dtype: str, rounds: int, clients: int, data: str, ours: dict[str, Any], model: str = MINILM, device: str = "cpu"
) -> dict[str, Any]:
    """Our run: the app's defaults but for `ours`."""
    where = {"model.name": model, "model.dtype": dtype, "run.device": device}
    where |= {"strategy.fraction-train": clients / CLIENTS}
    return {**where, **ours, "num-server-rounds": rounds, "data.path": data, "strategy.round-timeout": 86400.0}


def plain_config(rounds: int, data: str, out: str = "", **changes: str | float) -> dict[str, Any]:
    """The same for the plain app."""
    import tomllib

    config = tomllib.loads((FLOWERTUNE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    return {**config, "num-server-rounds": rounds, "data-path": data, "out": out, **changes}


def in_process(
    dtype: str, rounds: int, clients: int, data: str, ours: dict[str, Any], model_name: str = MINILM, device: str = "cpu"
) -> list[dict[str, float]]:
    """Seconds of each round, by way; on a GPU the plain app computes in `dtype` too. The head's sums are in round 1."""
    torch.set_num_threads(1)
    settings = read_settings(flat(dtype, rounds, clients, data, ours, model_name, device))
    model = ServerModel(settings)
    changes = {"model-name": model_name, "device": device, "dtype": dtype if device == "cuda" else "float32"}
    grid = Interleaved(settings, model.labels, plain_config(rounds, data, **changes))
    now = timer(device)
    found: list[dict[str, float]] = []

    class Write(Callback):
        """A line for each round."""

        def record(self, record: dict) -> None:
            """What it took."""
            nonlocal began
            if record["type"] != "round":
                return
            if record["dropped"]:
                raise SystemExit(f"round {record['round']} lacks clients of ours: {record['dropped']}")
            beside = grid.end_round()
            line = {
                "round": record["round"],
                "clients": record["good"],
                "alive": record["alive"],
                "lowest": grid.bare.adapted.lowest,
                "ours": now() - began - beside["elsewhere"],
                **{name: beside[name] for name in ("in-client", "bare", "plain")},
            }
            found.append(line)
            print(json.dumps({"model": Path(model_name).name, "dtype": dtype, **line}), flush=True)
            began = now()

    method = strategies.find(settings.method)(settings, model)
    loop = RoundLoop(settings, method, method.start(), model.expected(method.all_terms(), method.parts), [Write()])
    arrays = loop.initial_arrays()
    began = now()
    loop.start(grid, arrays, rounds, evaluate_fn=lambda server_round, arrays: None)
    return found


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("inprocess", "flower"), default="inprocess")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of our backbone; the plain app's is float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the in-process engine")
    parser.add_argument("--models", default="minilm", help=f"in-process: minilm, {', '.join(SIZES)}, whose weights are random")
    parser.add_argument("--data", default="", help="folder of a data set; by default the built-in docstrings")
    parser.add_argument("--rounds", type=int, default=20, help="of one alone no first one is left out")
    parser.add_argument("--clients", type=int, default=5, help=f"of a round, of {CLIENTS}")
    parser.add_argument("--repeats", type=int, default=1, help="of whole runs under Flower")
    parser.add_argument("--as-it-comes", action="store_true", help="ours with its solved head, its loss and its formats")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.jsonl")
    args = parser.parse_args()
    if args.rounds < 1 or not 2 <= args.clients <= CLIENTS:
        parser.error(f"--rounds {args.rounds}, --clients {args.clients}: allowed are 1 or more, and 2 to {CLIENTS}")
    if unknown(args.models):
        parser.error(f"--models {args.models}: allowed are minilm, {', '.join(SIZES)}")
    there = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    machine = f"{there}, {os.cpu_count()} CPUs, torch {torch.__version__}"
    ours = {} if args.as_it_comes else LIKE_PLAIN
    common = {"rounds": args.rounds, "data": Path(args.data).name or "docstrings", "machine": machine}
    common |= {"as-it-comes": args.as_it_comes, "clients": args.clients}
    if args.engine == "inprocess":
        for model in args.models.split(","):
            with tempfile.TemporaryDirectory() as root:
                path = folder(model, Path(root) / model)
                for dtype in args.dtypes.split(","):
                    lines = in_process(dtype, args.rounds, args.clients, args.data, ours, path, args.device)
                    facts = {"model": model, "dtype": dtype, "device": args.device}
                    report(args.out, {"throughput": "inprocess", **facts, **common, **summary(lines)})
        return
    for _ in range(args.repeats):
        for dtype in args.dtypes.split(","):
            found = ours_under_ray(dtype, ours, args)
            report(args.out, {"throughput": "flower", "app": "ours", "dtype": dtype, **common, **found})
        report(args.out, {"throughput": "flower", "app": "plain", "dtype": "float32", **common, **plain_under_ray(args)})


def summary(lines: list[dict[str, float]]) -> dict[str, float]:
    """Client-rounds per second over the whole run and without its first round, and the rounds' median ratios to ours."""
    clients = sum(line["clients"] for line in lines)
    ways = ("ours", "in-client", "bare", "plain")
    rates = {f"per-second-{way}": clients / sum(line[way] for line in lines) for way in ways}
    rest = lines[1:] or lines
    rates |= {f"per-second-after-first-{way}": sum(r["clients"] for r in rest) / sum(r[way] for r in rest) for way in ways}
    ratios = {f"median-{way}-over-ours": statistics.median(line[way] / line["ours"] for line in lines) for way in ways[1:]}
    return rates | ratios


def ours_under_ray(dtype: str, ours: dict[str, Any], args: argparse.Namespace) -> dict[str, float]:
    """A whole run of this app by `fedara run`'s own way."""
    with tempfile.TemporaryDirectory() as folder:
        values = flat(dtype, args.rounds, args.clients, args.data, ours) | {"run.dir": folder, "run.name": "run"}
        overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        _run(ROOT, read_config(ROOT, overrides))
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["type"] == "round"]
    if dropped := [line["dropped"] for line in rounds if line["dropped"]]:
        raise SystemExit(f"rounds lack clients of ours: {dropped}")
    return wall([(line["good"], line["seconds"]) for line in rounds])


def plain_under_ray(args: argparse.Namespace) -> dict[str, float]:
    """A whole run of the plain app."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rounds.jsonl"
        share = {"fraction-train": args.clients / CLIENTS}
        _run(FLOWERTUNE, plain_config(args.rounds, args.data, str(out), **share))
        lines = [json.loads(line) for line in out.read_text().splitlines()]
    if len(lines) < args.rounds or any(line["failed"] for line in lines):
        raise SystemExit(f"the plain app: clients failed, or rounds are missing: {lines}")
    return wall([(line["clients"], line["seconds"]) for line in lines])


def wall(rounds: list[tuple[int, float]]) -> dict[str, float]:
    """Client-rounds per second of wall time, evaluation on the server left out; all rounds, and without the first.

    In the first round every process of ours loads its model, which the plain app does in every call.
    """
    total, rest = (tuple(map(sum, zip(*part, strict=True))) for part in (rounds, rounds[1:] or rounds))
    return {"per-second": total[0] / total[1], "per-second-after-first": rest[0] / rest[1]}


def _run(app: Path, config: dict[str, Any]) -> None:
    with on_stop(interrupt), short_folder() as neutral:  # killed, it takes Flower's processes along
        run_flower(app, config, Simulation.read(ROOT / "federation.toml"), neutral, verbose=False)


def report(out: Path, line: dict[str, Any]) -> None:
    """Print and append."""
    print(json.dumps(line), flush=True)
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
