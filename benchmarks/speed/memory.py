"""Memory of server and clients against rounds, for many simulated clients.

    python benchmarks/speed/memory.py --data DIR/sst2 [--clients 10000] [--per-round 100] [--rounds 30] [--engine flower]

A real `fedara run` of MiniLM, one step of four rows per client; the resident set of all its processes is
read every half second, and of each round the largest is taken. `server`: the process of the rounds (in-process: clients, too),
`clients`: Ray's actors together, `rest`: SuperLink, Ray's own processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent.parent


def kind(process: psutil.Process) -> str:
    """Which part of the run a process is."""
    command = " ".join(process.cmdline())
    if command.startswith("ray::") and "ClientAppActor" in command:
        return "clients"
    return "server" if "flwr-simulation" in command or "--engine inprocess" in command else "rest"


def resident(run: psutil.Process) -> dict[str, float]:
    """MB by part."""
    found: dict[str, float] = defaultdict(float)
    for process in [run, *run.children(recursive=True)]:
        try:
            found[kind(process)] += process.memory_info().rss / 1e6
        except psutil.Error:
            continue
    return found


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--clients", type=int, default=10000)
    parser.add_argument("--per-round", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--engine", choices=("inprocess", "flower"), default="inprocess")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.jsonl")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        federation = Path(folder) / "federation.toml"
        federation.write_text(f"num-supernodes = {args.clients}\nclient-resources-num-cpus = 1\n")
        values = {
            "num-server-rounds": args.rounds,
            "data.path": str(Path(args.data).resolve()),
            "data.partition": "iid",
            "data.validation": 0.01,
            "train.steps": 1,
            "train.batch-size": 4,
            "strategy.fraction-train": args.per_round / args.clients,
            "strategy.node-timeout": 3600.0,
            "strategy.round-timeout": 3600.0,
            "run.threads": 1,
            "run.dir": folder,
            "run.name": "run",
        }
        overrides = [item for key, value in values.items() for item in ("-c", f"{key}={json.dumps(value)}")]
        command = [sys.executable, "-m", "fedara_flwr.cli", "run", str(ROOT), "--federation-config", str(federation)]
        command += [*overrides, "--engine", args.engine]
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=sys.stderr, env=os.environ | {"PYTHONPATH": str(ROOT)})
        watch(process, Path(folder) / "run" / "metrics.jsonl", args)
        print(f"{time.monotonic() - began:.0f} s, exit code {process.wait()}", file=sys.stderr)


def watch(process: subprocess.Popen, metrics: Path, args: argparse.Namespace) -> None:
    """Write a line for each round, with the largest memory seen while it ran."""
    largest: dict[str, float] = {}
    done, began, run = 0, time.monotonic(), psutil.Process(process.pid)
    while process.poll() is None:
        for name, megabytes in resident(run).items():
            largest[name] = max(largest.get(name, 0.0), megabytes)
        text = metrics.read_text() if metrics.exists() else ""
        rounds = sum('"type": "round"' in line for line in text.splitlines())
        if rounds > done:
            line = {
                "memory": args.engine,
                "clients": args.clients,
                "per-round": args.per_round,
                "round": rounds,
                "seconds": time.monotonic() - began,
                "mb": {name: round(megabytes) for name, megabytes in largest.items()},
            }
            print(json.dumps(line), flush=True)
            with args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            done, largest = rounds, {}
        time.sleep(0.5)


if __name__ == "__main__":
    main()
