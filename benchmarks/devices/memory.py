"""What memory a node takes, and what it does in less: one node of this machine under a limit, all its processes together.

The limit is a memory cgroup's (version 1 or 2; root), so files that the node reads first count, too: with --venv it has its own
copy of the packages, whose pages nobody else has read. Appends a line per case to memory.jsonl and prints the table.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
TESTS = HERE.parent.parent / "tests"
sys.path += [str(HERE), str(TESTS), *(str(folder) for folder in TESTS.iterdir() if folder.is_dir())]

from deployment import Deployment, Node, write_rows  # noqa: E402
from overhead import MODEL, cpu  # noqa: E402

V2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
TOP = Path("/sys/fs/cgroup" if V2 else "/sys/fs/cgroup/memory")
FILES = ("memory.max", "memory.peak", "memory.events") if V2 else (
    "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"
)  # fmt: skip
ROLES = ("flower-superexec", "flower-supernode", "flwr-clientapp", "worker")


class Limit:
    """A memory cgroup, as the `link` of a node: what is started with `prefix` is in it."""

    host = "127.0.0.1"

    def __init__(self, name: str, megabytes: int, venv: Path | None) -> None:
        self.folder = TOP / f"fedara-{os.getpid()}-{name}"
        self.folder.mkdir()
        if megabytes:
            (self.folder / FILES[0]).write_text(str(megabytes << 20))
        search = f"PATH={venv}/bin:$PATH " if venv else ""
        self.prefix = ["sh", "-c", f'echo $$ >{self.folder}/cgroup.procs; {search}exec "$@"', "sh"]

    def peak(self) -> float:
        """The most that all had at once, with files that they read first, MB."""
        return int((self.folder / FILES[1]).read_text()) / 2**20

    def kills(self) -> int:
        """How many processes the kernel has ended for want of memory."""
        found = re.search(r"^oom_kill (\d+)", (self.folder / FILES[2]).read_text(), re.MULTILINE)
        return int(found.group(1)) if found else 0

    def processes(self) -> list[psutil.Process]:
        found = []
        for pid in (self.folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(psutil.Error):
                found.append(psutil.Process(int(pid)))
        return found

    def close(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(1)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


class Watch(threading.Thread):
    """Looks twice a second at the node's processes: the most of each role (resident, and of it anonymous), of all together."""

    def __init__(self, limit: Limit) -> None:
        super().__init__(daemon=True)
        self.limit, self.most = limit, dict[str, float]()
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.5):
            together = anonymous = 0.0
            for process in self.limit.processes():
                with contextlib.suppress(psutil.Error, OSError):
                    words = process.cmdline()
                    role = next((role for role in ROLES if any(word.endswith(role) for word in words)), "other")
                    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                    used = {key: int(value) / 1024 for key, value in re.findall(r"^(\w+): +(\d+) kB", text, re.MULTILINE)}
                    self._more(role, used["Rss"])
                    self._more(f"{role} anonymous", used["Anonymous"])
                    together, anonymous = together + used["Pss"], anonymous + used["Anonymous"]
            self._more("together", together)
            self._more("together anonymous", anonymous)

    def _more(self, name: str, megabytes: float) -> None:
        self.most[name] = round(max(self.most.get(name, 0.0), megabytes), 1)


def forget(folder: Path) -> None:
    """Have the kernel drop what it holds of these files, so that the node's own reading counts as its own."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One run of one node; `case` has the limit in MB (0 = none), keys of node-config, of the run, of the environment."""
    root = Path(tempfile.mkdtemp(prefix="fm-"))
    if options.venv:
        forget(options.venv)
    limit = Limit(str(time.monotonic_ns()), case["limit"], options.venv)
    owner = Deployment(root, Path(MODEL))
    try:
        owner.start_superlink()
        node = Node(owner, 0, 1, limit)  # type: ignore[arg-type]
        write_rows(node.data, seed=0, rows=options.rows)
        node.config |= case.get("node", {})
        owner.nodes.append(node)
        owner.env |= case.get("env", {})
        node.start()
        watch = Watch(limit)
        rounds = {"num-server-rounds": options.rounds, "strategy.min-train-nodes": 1, "strategy.min-available-nodes": 1}
        patience = {"strategy.node-timeout": 240.0, "strategy.round-timeout": 600.0, "data.task": "classification"}
        run = owner.submit("run", **(DEFAULTS | rounds | patience | case.get("run", {})))
        try:
            outcome = run.ended(1500)[0]
        except AssertionError:
            outcome = "not ended"
        watch.over.set()
        watch.join()
        lines = run.lines("round")
        clients = run.lines("client")
        return {
            **case,
            "outcome": outcome,
            "good": [line["good"] for line in lines],
            "dropped": [drop["reason"] for line in lines for drop in line["dropped"]],
            "round": round(statistics.median(line["seconds"] for line in lines[1:]), 1) if lines[1:] else None,
            "train": round(statistics.median(line["seconds-all"] for line in clients), 1) if clients else None,
            "accuracy": lines[-1].get("accuracy") if lines else None,
            "peak": round(limit.peak()),
            "kills": limit.kills(),
            "memory": watch.most,
            "said": (root / "node-0.log").read_text(errors="replace").count("working without"),
        }
    finally:
        owner.close()
        limit.close()


DEFAULTS = {  # those of the package, where tests have smaller ones
    "method": "fedara", "adapter.rank": 12, "train.steps": 6, "train.batch-size": 0, "data.max-length": 0,
    "strategy.options": "", "data.validation": 0.02, "data.test": 0.02,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, help="an environment for the node alone, best a fresh copy")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=300, help="of the node's own data")
    parser.add_argument("--cases", default="[{'limit': 0}]", help="a list of cases, as Python writes it")
    parser.add_argument("--out", type=Path, default=HERE / "memory.jsonl")
    options = parser.parse_args()
    for case in ast.literal_eval(options.cases):
        line = measure(case, options) | {"cpu": cpu(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
        with options.out.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(line, flush=True)


if __name__ == "__main__":
    main()
