"""A whole deployment of this app in real processes: a SuperLink, SuperNodes with data of their own, runs by `flwr run`.

Nothing of Flower is replaced. Only the app gets one mod more (PROBE), which lets a test stop a node at a known place: before
it trains, or before it replies. Every process carries a tag in its environment and is gone when the deployment is closed.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
from runs_helper import SMALL
from test_flower import clone

from fedara_flwr.cli.processes import TAG, tagged
from fedara_flwr.data import docstrings

SCRIPTS = Path(sys.executable).parent
PATIENCE = 300  # seconds for what usually takes a few: the machine may be busy
T = TypeVar("T")
PROBE = '''
"""Stops this node at a known place, as the files in the folder `probe` of its home say."""

import os
import time
from pathlib import Path

from flwr.app import Error, Message


def probe(message, context, call_next):
    """`before` and `after` hold "hold" (until the file is gone), "raise" or "exit", `before` also "error" (in Ray's words);
    what was reached is written beside them."""
    if message.metadata.message_type != "train":
        return call_next(message, context)
    folder, number = Path(os.environ["FLWR_HOME"]) / "probe", message.content.config_records["plan"]["round"]
    if stop(folder, "before", number) == "error":
        return Message(Error(0, "The actor died unexpectedly. " * 10_000), reply_to=message)
    try:
        reply = call_next(message, context)
    except Exception:
        (folder / "raised").write_text(str(number))
        raise
    stop(folder, "after", number)
    (folder / "replied").write_text(str(number))
    return reply


def stop(folder, place, number):
    order = folder / place
    what = order.read_text() if order.exists() else ""
    if what:
        (folder / f"{place}.reached").write_text(str(number))
    if what == "raise":
        raise RuntimeError("the probe raises")
    if what == "exit":
        os._exit(1)
    while what == "hold" and order.exists():
        time.sleep(0.05)
    return what
'''


def wait_for(condition: Callable[[], T], seconds: float = PATIENCE, what: str | Callable[[], str] = "") -> T:
    """The condition's first true value; AssertionError, with what there is to say, after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s: {what() if callable(what) else what}")
        time.sleep(0.05)
    return found


def pace() -> float:
    """Seconds that this machine, as busy as it is, needs for what two clients do at once: start, and load the libraries."""
    began = time.monotonic()
    command = [sys.executable, "-c", "import flwr.clientapp, fedara_flwr.client.session, fedara_flwr.client.train"]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=PATIENCE) for process in both] == [0, 0]
    return time.monotonic() - began


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Link:
    """A network namespace, joined to this machine by one cable that can be cut. Needs root and iproute2.

    Attributes:
        prefix: starts a command inside.
        host: this machine's address as seen from inside; `guest` is the inside's own.
    """

    def __init__(self) -> None:
        number = os.getpid() % 4000
        self.name, self.outer, self.inner = f"fedara-{number}", f"fo{number}", f"fi{number}"
        subnet = f"10.231.{number // 64}"
        base = number % 64 * 4
        self.host, self.guest = f"{subnet}.{base + 1}", f"{subnet}.{base + 2}"
        self.prefix = ["ip", "netns", "exec", self.name]
        ip("netns", "add", self.name)
        ip("link", "add", self.outer, "type", "veth", "peer", "name", self.inner)
        ip("link", "set", self.inner, "netns", self.name)
        ip("addr", "add", f"{self.host}/30", "dev", self.outer)
        ip("link", "set", self.outer, "up")
        for words in (["link", "set", "lo", "up"], ["addr", "add", f"{self.guest}/30", "dev", self.inner]):
            ip("-n", self.name, *words)
        ip("-n", self.name, "link", "set", self.inner, "up")

    def cut(self) -> None:
        """Nothing passes any more, and nobody is told."""
        ip("link", "set", self.outer, "down")

    def join(self) -> None:
        ip("link", "set", self.outer, "up")

    def slow(self, rate: str) -> None:
        """What goes out of the namespace passes at this rate, "" as fast as it can."""
        shape = ["tc", "-n", self.name, "qdisc"]
        if rate:
            words = ["add", "dev", self.inner, "root", "tbf", "rate", rate, "burst", "1600", "latency", "10s"]
            subprocess.run([*shape, *words], check=True)
        else:
            subprocess.run([*shape, "del", "dev", self.inner, "root"], check=True)

    def close(self) -> None:
        subprocess.run(["ip", "link", "del", self.outer], capture_output=True)
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_no_link() -> str:
    """Why this machine can make no Link, "" if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if missing:
        return f"network namespaces need {' and '.join(missing)} (iproute2)"
    try:
        link = Link()
    except subprocess.CalledProcessError as error:
        return f"no network namespace can be made: {error.stderr.strip()}"
    link.close()
    return ""


class Node:
    """One SuperNode with a folder, a port and data of its own."""

    def __init__(self, owner: Deployment, key: int, partitions: int, link: Link | None) -> None:
        self.owner, self.key, self.link = owner, str(key), link
        self.home = owner.root / f"node-{key}"
        self.probe = self.home / "probe"
        self.probe.mkdir(parents=True)
        self.data = self.home / "own.csv"
        write_rows(self.data, seed=key)
        self.config = {
            "partition-id": key,
            "num-partitions": partitions,
            "data-path": str(self.data),
            "models": str(owner.model),
        }
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        host = self.link.host if self.link else "127.0.0.1"
        text = " ".join(f"{key}={json.dumps(value)}" for key, value in self.config.items())
        self.port = free_port()
        command = ["flower-supernode", "--insecure", "--superlink", f"{host}:{self.owner.port}", "--node-config", text]
        prefix = self.link.prefix if self.link else []
        command = [*prefix, *command, "--port", str(self.port)]
        self.process = self.owner.start(command, f"node-{self.key}", self.home)

    def end(self, number: int) -> None:
        """Send the SuperNode this signal and wait until it is gone."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(timeout=30)

    def apps(self) -> list[psutil.Process]:
        """The ClientApp processes that run for this node."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.cmdline())
                if "flwr-clientapp" in command and f":{self.port} " in command:
                    found.append(process)
        return found

    def said(self, text: str) -> int:
        """How often its log says so."""
        return self._log().count(text)

    def says_last(self, text: str) -> int:
        """Where in its log that stands last."""
        return self._log().rfind(text)

    def _log(self) -> str:
        return (self.owner.root / f"node-{self.key}.log").read_text(errors="replace")

    def order(self, place: str, what: str) -> None:
        """At its next training the node does this "before" it or "after" it: "hold", "raise", "exit" or "error"."""
        for old in ("before", "after", "before.reached", "after.reached", "raised"):
            (self.probe / old).unlink(missing_ok=True)
        (self.probe / place).write_text(what)

    def reached(self, place: str) -> int:
        """Wait until the node is there; in which round that was."""
        file = self.probe / f"{place}.reached"
        wait_for(lambda: file.exists() and file.read_text(), what=lambda: f"node {self.key}, {place}: {self.owner.tails()}")
        return int(file.read_text())

    def announced(self) -> int:
        """How many of its replies the SuperLink has heard of, whether their content came or not."""
        own = (self.owner.root / f"node-{self.key}.log").read_text().rpartition("SuperNode ID: ")[2].split()[0]
        return (self.owner.root / "superlink.log").read_text(errors="replace").count(f"Push replies from node_id={own}")

    def idle_in(self, number: int) -> None:
        """Wait until it has replied in this round and its reply has been taken."""
        file = self.probe / "replied"

        def look() -> bool:
            replied = file.exists() and file.read_text() == str(number)
            # of an earlier process of this node a message may have been received and never answered
            return replied and self.says_last("Sent successfully") > self.says_last("Received successfully")

        wait_for(look, what=lambda: f"node {self.key} replies in round {number}: {self.owner.tails()}")

    def raised(self) -> int:
        """Wait until its ClientApp raised; in which round that was."""
        file = self.probe / "raised"
        wait_for(lambda: file.exists() and file.read_text(), what=lambda: f"node {self.key} raises: {self.owner.tails()}")
        return int(file.read_text())

    def release(self) -> None:
        """Take the order back."""
        for place in ("before", "after"):
            (self.probe / place).unlink(missing_ok=True)


def write_rows(path: Path, seed: int, rows: int = 24) -> None:
    """A device's own data: docstrings' labels, a few rows."""
    everything, labels = docstrings.load()
    picked = random.Random(seed).sample(range(len(everything)), rows)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for row in picked:
            writer.writerow([everything.texts[row], labels[everything.groups[row]]])


class Run:
    """One run of the app, seen from its folder."""

    def __init__(self, owner: Deployment, name: str, run_id: str) -> None:
        self.owner, self.run_id = owner, run_id
        self.path = owner.root / "runs" / name

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl of one type; one that is being written is left out."""
        try:
            text = (self.path / "metrics.jsonl").read_text()
        except OSError:
            return []
        found = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return [line for line in found if line["type"] == kind]

    def round(self, number: int, seconds: float = PATIENCE) -> dict[str, Any]:
        """The line of this round, once it is there."""

        def look() -> dict[str, Any] | None:
            return next((line for line in self.lines("round") if line["round"] == number), None)

        return wait_for(look, seconds, lambda: f"round {number} of {self.path.name}: {self.owner.tails()}")

    def next_round(self, good: int | None = None, seconds: float = PATIENCE) -> dict[str, Any]:
        """The next round to end from now on; with `good`, the next in which so many replies count and none is dropped."""
        seen = len(self.lines("round"))

        def look() -> dict[str, Any] | None:
            for line in self.lines("round")[seen:]:
                if good is None or (line["good"] == good and not line["dropped"]):
                    return line
            return None

        return wait_for(look, seconds, lambda: f"a round with {good} good: {self.lines('round')[-3:]}; {self.owner.tails()}")

    def facts(self) -> dict[str, Any]:
        return json.loads((self.path / "federated.json").read_text())

    def status(self) -> tuple[str, str]:
        """Flower's own word on it, and why."""
        found = self.owner.flwr("list", "--run-id", self.run_id)["runs"][0]
        details = str(found.get("status-details") or "")
        return str(found["status"]), "" if details == "N/A" else details

    def log(self) -> str:
        """What the ServerApp said."""
        return self.owner.call("log", self.run_id, "--show").stdout

    def ended(self, seconds: float = PATIENCE) -> tuple[str, str]:
        """Flower's word on it, once it has ended."""
        path = self.path / "federated.json"
        wait_for(
            lambda: path.exists() and self.facts()["outcome"] != "running",
            seconds,
            lambda: f"the end of {self.path.name}: {self.lines('round')[-2:]}; {self.owner.tails()}",
        )
        return wait_for(lambda: (s := self.status())[0].startswith("finished") and s, 30, lambda: str(self.status()))


class Deployment:
    """A SuperLink and its SuperNodes.

    Args:
        root: a fresh folder for homes, logs, the app and its runs.
        model: folder of the backbone that server and nodes use.
        durable: the SuperLink keeps its state in a database, and the ServerApp runs under a SuperExec of its own; so both
            outlive the SuperLink's process.
    """

    def __init__(self, root: Path, model: Path, durable: bool = False) -> None:
        self.root, self.model, self.durable = root, model, durable
        self.home = root / "home"
        self.home.mkdir()
        self.app = clone(root / "app")
        package = self.app / "fedara_flwr"
        (package / "probe.py").write_text(PROBE)
        source = (package / "client_app.py").read_text()
        changed = source.replace(
            "\napp = ClientApp()\n", "\nfrom fedara_flwr.probe import probe\napp = ClientApp(mods=[probe])\n"
        )
        assert changed != source
        (package / "client_app.py").write_text(changed)
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")} | {
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{SCRIPTS}{os.pathsep}{os.environ.get('PATH', '')}",
            "XDG_RUNTIME_DIR": tempfile.mkdtemp(prefix="fd-"),  # short: sockets of resident workers
            TAG: uuid.uuid4().hex,
        }
        self.env.pop("PYTHONPATH", None)  # the code under test comes as a FAB
        self.port = free_port()
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        self.nodes: list[Node] = []
        self.superlink: subprocess.Popen | None = None

    def start(self, command: list[str], name: str, home: Path | None = None) -> subprocess.Popen:
        env = self.env | {"FLWR_HOME": str(home or self.home)}
        with (self.root / f"{name}.log").open("a") as log:
            return subprocess.Popen(command, env=env, cwd=self.root, stdout=log, stderr=log, start_new_session=True)

    def start_superlink(self) -> None:
        command = ["flower-superlink", "--insecure", "--host", "0.0.0.0", "--port", str(self.port)]
        if self.durable:
            command += ["--isolation", "process", "--database", str(self.root / "superlink.db")]
        self.superlink = self.start(command, "superlink")
        wait_for(self._answers, what=self.tails)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                return True
        except OSError:
            return False

    def start_superexec(self) -> None:
        """For a durable SuperLink."""
        self.start(["flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{self.port}"], "superexec")

    def add(self, partitions: int, link: Link | None = None) -> Node:
        """Start one more SuperNode; `partitions` are the nodes that it says there are."""
        node = Node(self, len(self.nodes), partitions, link)
        self.nodes.append(node)
        node.start()
        return node

    def submit(self, name: str, **changes: object) -> Run:
        """`flwr run` of the app."""
        values: dict[str, object] = SMALL | {
            "model.name": str(self.model),
            "run.name": name,
            "run.dir": str(self.root / "runs"),
            "strategy.fraction-train": 1.0,
            "strategy.node-timeout": 20.0,
        }
        config = self.root / f"{name}.toml"
        config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in (values | changes).items()))
        return Run(self, name, str(self.flwr("run", str(self.app), "own", "--run-config", str(config))["run-id"]))

    def call(self, *words: str) -> subprocess.CompletedProcess:
        env = self.env | {"FLWR_HOME": str(self.home)}
        return subprocess.run(["flwr", *words], env=env, cwd=self.root, capture_output=True, text=True, timeout=PATIENCE)

    def flwr(self, *words: str) -> dict[str, Any]:
        """A `flwr` command's JSON answer."""
        done = self.call(*words, "--format", "json")
        try:
            answer = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            raise AssertionError(f"flwr {words[0]}: {done.stdout[-500:]} {done.stderr[-500:]}") from None
        assert answer.get("success", True), answer
        return answer

    def tails(self) -> str:
        """The last lines of all logs, for a failed test."""
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in self.root.glob("*.log"))

    def close(self) -> None:
        """End every process of this deployment."""
        kill_tagged(self.env[TAG])
        shutil.rmtree(self.env["XDG_RUNTIME_DIR"], ignore_errors=True)


def kill_tagged(tag: str) -> None:
    """Every process that carries the tag, those that were stopped by a signal, too, and those that start meanwhile."""
    for _ in range(20):
        mine = tagged(tag)
        if not mine:
            return
        for process in mine:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(mine, timeout=5)
    raise AssertionError(f"still there: {[process.pid for process in mine]}")


@contextlib.contextmanager
def deployment(root: Path, model: Path, nodes: int, link: Link | None = None, durable: bool = False) -> Iterator[Deployment]:
    """A deployment whose last node is behind `link`; it is gone afterwards."""
    root.mkdir(parents=True, exist_ok=True)
    found = Deployment(root, model, durable)
    try:
        found.start_superlink()
        if durable:
            found.start_superexec()
        for number in range(nodes):
            found.add(nodes, link if number == nodes - 1 else None)
        yield found
    finally:
        found.close()


KILL, TERM, STOP = signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP
