"""What a round costs beside training, deployed on this machine: with a resident worker, without, and by Flower's defaults.

One SuperLink with two SuperNodes for each way, all up at the same time; runs of them take turns. Times are read off the nodes'
logs and the run's metrics.jsonl as their lines appear. Writes results.jsonl: a line per round, one per run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
TESTS = HERE.parent.parent / "tests"
sys.path += [str(TESTS), *(str(folder) for folder in TESTS.iterdir() if folder.is_dir())]

from deployment import Deployment, Node  # noqa: E402

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
WAYS = {  # (node-config worker, seconds between a SuperExec's looks)
    "worker": (True, "0.05"),
    "process per message": (False, "0.05"),
    "process per message, Flower's poll": (False, "1.0"),
}
SETTING = {
    "method": "fedara",
    "adapter.rank": 12,
    "strategy.options": "final-rank = 3.0",
    "train.steps": 5,
    "train.batch-size": 16,
    "data.max-length": 64,
    "data.validation": 0.02,
    "data.test": 0.1,
    "strategy.node-timeout": 300.0,
}
ROLES = ("flower-superlink", "flower-superexec", "flower-supernode", "flwr-serverapp", "flwr-clientapp", "worker")


class Tail(threading.Thread):
    """Notes when each line of a file appears."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path, self.lines = path, list[tuple[float, str]]()
        self.start()

    def run(self) -> None:
        while not self.path.exists():
            time.sleep(0.02)
        with self.path.open(errors="replace") as file:
            text = ""
            while True:
                text += file.readline()
                if text.endswith("\n"):
                    self.lines.append((time.monotonic(), text))
                    text = ""
                else:
                    time.sleep(0.005)

    def last(self, pattern: str, before: float) -> float:
        """When the last line that matches appeared, before this time."""
        return max((at for at, line in self.lines if at <= before and re.search(pattern, line)), default=float("nan"))


class Memory(threading.Thread):
    """Looks once a second at the processes of a deployment: the most that one of each role had, in MB."""

    def __init__(self, home: Path) -> None:
        super().__init__(daemon=True)
        self.home, self.most = str(home), defaultdict[str, dict[str, float]](lambda: {"rss": 0.0, "pss": 0.0})
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.wait(1.0):
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error, OSError):
                    words = process.cmdline()
                    role = next((role for role in ROLES if any(word.endswith(role) for word in words)), "")
                    if role and process.environ().get("FLWR_HOME", "").startswith(self.home):
                        used = process.memory_full_info()
                        for name in ("rss", "pss"):
                            self.most[role][name] = max(self.most[role][name], getattr(used, name) / 2**20)


def measure(owner: Deployment, name: str, rounds: int) -> Iterator[dict[str, Any]]:
    """One run: a line per round, then one of the run.

    Of a round of `cycle` seconds, from the end of the round before to its own, by the node that replied last: `idle`, in
    which the SuperNode slept and had no message; `message`, from its pull to the reply, of which `train` is the client's own
    work, and `steps` the training steps alone; `server`, the rest, of which `evaluate` is the evaluation.
    """
    logs = [Tail(owner.root / f"node-{node.key}.log") for node in owner.nodes]
    memory = Memory(owner.root)
    run = owner.submit(name, **SETTING, **{"num-server-rounds": rounds})
    metrics = Tail(run.path / "metrics.jsonl")
    outcome, _ = run.ended(1800)
    if outcome != "finished:completed":
        raise SystemExit(f"{name}: {outcome}\n{owner.tails()}")
    memory.over.set()
    memory.join()
    read = [(at, json.loads(line)) for at, line in metrics.lines]
    told = {line["round"]: (at, line) for at, line in read if line["type"] == "round"}
    for number in range(2, rounds + 1):
        (began, _), (ended, whole) = told[number - 1], told[number]
        log = max(logs, key=lambda log: log.last("Sent successfully", ended))  # noqa: B023
        sent, received = log.last("Sent successfully", ended), log.last("Receiving: train", ended)
        clients = [line for _, line in read if line["type"] == "client" and line["round"] == number]
        trained = max(line["seconds-all"] for line in clients)
        yield {
            "round": number,
            "cycle": ended - began,
            "idle": received - began,
            "message": sent - received,
            "train": trained,
            "steps": max(line["seconds-train"] for line in clients),
            "server": ended - sent,
            "evaluate": whole["seconds-evaluate"],
        }
    yield {"first-round": told[1][1]["seconds"], "memory": {role: dict(used) for role, used in memory.most.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="per run, the first of which is not counted")
    parser.add_argument("--turns", type=int, default=2, help="runs of each way")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS), metavar="WAY", help="; ".join(WAYS))
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    options = parser.parse_args()
    if options.rounds < 2 or options.turns < 1:
        parser.error("--rounds and --turns: allowed are 2 and 1, or more; the first round is not counted")
    root = Path(tempfile.mkdtemp(prefix="fo-"))
    hardware = {"cpu": cpu(), "cores": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}
    with contextlib.ExitStack() as stack, options.out.open("a") as out:
        owners = {}
        for index, way in enumerate(options.ways):
            resident, poll = WAYS[way]
            (root / str(index)).mkdir()
            owner = owners[way] = Deployment(root / str(index), Path(MODEL))
            stack.callback(owner.close)
            owner.env["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = poll
            owner.start_superlink()
            for key in range(2):
                node = Node(owner, key, 2, None)
                del node.config["data-path"]
                node.config["worker"] = resident
                owner.nodes.append(node)
                node.start()
        for turn in range(options.turns):
            for way, owner in owners.items():
                for line in measure(owner, f"turn-{turn}", options.rounds):
                    record = {"way": way, "turn": turn, **line, **hardware}
                    out.write(json.dumps(record) + "\n")
                    out.flush()
                    print({k: round(v, 2) if isinstance(v, float) else v for k, v in {"way": way, **line}.items()}, flush=True)
    shutil.rmtree(root)
    table(options.out)


def cpu() -> str:
    """The processor's name."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found.group(1) if found else platform.machine()


def table(path: Path) -> None:
    """Medians by way, as Markdown."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = ("cycle", "idle", "message", "train", "steps", "server", "evaluate")
    print("| way | rounds | " + " | ".join(names) + " | message - train | first round |")
    print("|---" * (len(names) + 4) + "|")
    for way in WAYS:
        mine = [line for line in lines if line["way"] == way and "round" in line]
        if not mine:
            continue
        nan = [float("nan")]  # lines of before lack some
        values = [statistics.median([line[name] for line in mine if name in line] or nan) for name in names]
        values.append(statistics.median(line["message"] - line["train"] for line in mine))
        values.append(statistics.median(line["first-round"] for line in lines if line["way"] == way and "first-round" in line))
        print(f"| {way} | {len(mine)} | " + " | ".join(f"{value:.2f}" for value in values) + " |")


if __name__ == "__main__":
    main()
