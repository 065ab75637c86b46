"""A server and three devices as separate hosts: own network stacks, slow, far and lossy links, TLS and node keys, MiniLM.

Prints the byte table that benchmarks/devices/bytes.md shows (`pytest -s`).
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from deployment import wait_for
from hosts import HEADERS, Host, Switch, why_no_hosts
from test_deploy import environment, init
from test_flower import clone

PORT, SUPERLINK_PORT = 8000, 8001
RELAYED = 8010
LINKS = {"attic": ("100mbit", 0.0), "barn": ("20mbit", 0.05), "cellar": ("2mbit", 0.0)}  # rate, delay each way in seconds
LOST = 0.01  # of the packets that reach "barn"
RUN = {
    "adapter.rank": 4,
    "strategy.options": "final-rank = 2.0",
    "num-server-rounds": 5,
    "strategy.fraction-train": 1.0,
    "strategy.min-available-nodes": 3,
    "strategy.node-timeout": 300.0,
    "strategy.round-timeout": 300.0,
    "train.steps": 4,
    "train.batch-size": 8,
    "data.max-length": 32,
    "data.test": 0.02,
    "data.validation": 0.02,
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


class Process:
    """Something that runs on a host until it is closed, with all that it started."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with log.open("a") as file:
            self.process = subprocess.Popen(command, env=environment(), cwd="/", stdout=file, stderr=file)

    def says(self, pattern: str) -> None:
        wait_for(lambda: re.search(pattern, self.log.read_text(errors="replace")), what=self.log.read_text)

    def below(self, name: str) -> psutil.Process:
        """The process of this command among all below it."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return next(process for process in found if name in " ".join(process.cmdline()[:2]))

    def close(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(self.process.pid).children(recursive=True)
            self.process.send_signal(signal.SIGTERM)
            _, left = psutil.wait_procs([*below, psutil.Process(self.process.pid)], timeout=60)
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()


class Site:
    """The site's folders, each on a host of its own."""

    def __init__(self, root: Path, switch: Switch) -> None:
        self.root, self.started = root, list[Process]()
        self.server = switch.host("server")
        self.hosts = {name: switch.host(name) for name in LINKS}
        names = ",".join((*LINKS, "stranger"))
        words = ("--names", names, "--port", str(PORT), "--superlink-port", str(SUPERLINK_PORT))
        self.folder = init(root / "site", *words, host=self.server.address)
        self.app = clone(root / "app")
        for name, (rate, _) in LINKS.items():
            self.hosts[name].shape(rate)
            self.dress(self.folder / f"node-{name}", list(LINKS).index(name))
        self.hosts["barn"].lose(LOST)

    def dress(self, node: Path, number: int) -> None:
        """Settings of a node: its share of the docstrings, and the relay on its own host in place of the server."""
        (node / "node.toml").write_text(f'client-key = "{node.name}"\npartition-id = {number}\nnum-partitions = {len(LINKS)}\n')
        settings = (node / "settings.env").read_text()
        (node / "settings.env").write_text(re.sub("SUPERLINK=.*", f"SUPERLINK=127.0.0.1:{RELAYED}", settings))

    def run(self, host: Host, *command: str | Path, log: str) -> Process:
        """Start a command on a host."""
        process = Process([*host.prefix, *map(str, command)], self.root / f"{log}.log")
        self.started.append(process)
        return process

    def start(self) -> None:
        """Everything but the runs."""
        hosts = Path(__file__).with_name("hosts.py")
        server = self.folder / "server"
        for part in ("superlink", "superexec"):
            self.run(self.server, "sh", server / "start.sh", part, log=part)
        words = (server, f"127.0.0.1:{SUPERLINK_PORT}", self.server.address, str(PORT), self.root / "gateway.json")
        self.run(self.server, sys.executable, hosts, "gateway", *words, log="gateway")
        for name, host in self.hosts.items():
            words = (f"127.0.0.1:{RELAYED}", f"{self.server.address}:{PORT}", str(LINKS[name][1]), self.root / f"{name}.json")
            self.run(host, sys.executable, hosts, "relay", *words, log=f"relay-{name}")
        wait_for(lambda: self.flwr("supernode", "list").returncode == 0)
        (server / "nodes/stranger.pub").unlink()
        assert self.call("register.sh").returncode == 0
        self.nodes = {name: self.start_node(name) for name in LINKS}
        wait_for(lambda: self.flwr("supernode", "list", "--format", "json").stdout.count('"online"') == len(LINKS))

    def restart_superlink(self) -> None:
        """kill -9, and a new one after a moment, as start.sh without a part does."""
        old = self.started[0]
        for process in (*psutil.Process(old.process.pid).children(recursive=True), old.process):
            process.kill()
        old.process.wait()
        time.sleep(5)  # start.sh's own wait
        self.started[0] = Process([*self.server.prefix, "sh", str(self.folder / "server/start.sh"), "superlink"], old.log)

    def start_node(self, name: str, host: Host | None = None) -> Process:
        """A node's own script, on its host or on another."""
        return self.run(host or self.hosts[name], "sh", self.folder / f"node-{name}" / "start.sh", log=f"node-{name}")

    def call(self, script: str, *words: str) -> subprocess.CompletedProcess:
        """One of the server's scripts, on the server."""
        command = [*self.server.prefix, "sh", str(self.folder / "server" / script), *words]
        return subprocess.run(command, env=environment(), cwd="/", capture_output=True, text=True, timeout=900)

    def flwr(self, *words: str) -> subprocess.CompletedProcess:
        return self.call("flwr.sh", *words)

    def federate(self, name: str, **changes: object) -> tuple[list[dict], dict]:
        """A whole run; its lines and its facts."""
        values = RUN | {"run.name": name} | changes
        file = self.root / f"{name}.toml"
        file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
        done = self.call("run.sh", str(self.app), "--run-config", str(file))
        assert done.returncode == 0, done.stdout + done.stderr + self.tails()
        return self.lines(name), json.loads((self.runs / name / "federated.json").read_text())

    @property
    def runs(self) -> Path:
        return self.folder / "server/home/runs"

    def lines(self, name: str) -> list[dict]:
        """Whole lines of the run's metrics."""
        file = self.runs / name / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def tails(self) -> str:
        return "\n".join(f"{file.name}: {file.read_text(errors='replace')[-600:]}" for file in self.root.glob("*.log"))

    def counted(self, file: str) -> Counter[str]:
        path = self.root / f"{file}.json"
        return Counter(json.loads(path.read_text())) if path.exists() else Counter()

    def snapshot(self) -> dict[str, Counter[str]]:
        """All counters beside Flower's and our own, summed over the devices."""
        kernel, relays = (
            sum((one(name) for name in LINKS), Counter[str]())
            for one in (lambda name: self.hosts[name].counters(), lambda name: self.counted(name))
        )
        return {"kernel": kernel, "relays": relays, "gateway": self.counted("gateway")}

    def close(self) -> None:
        for process in reversed(self.started):
            process.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    if why := why_no_hosts():
        pytest.skip(why)
    with Switch() as switch:
        site = Site(tmp_path_factory.mktemp("hosts"), switch)
        try:
            site.start()
            yield site
        finally:
            site.close()
    left = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if str(site.root) in " ".join(p.info["cmdline"] or ())]
    assert not left


def test_who_is_not_of_the_site_is_refused(site, tmp_path):
    """An unregistered key, and a device that was given another CA's certificate."""
    site.dress(site.folder / "node-stranger", 0)
    settings = site.folder / "node-stranger" / "settings.env"
    settings.write_text(settings.read_text().replace("RUNTIME_PORT=", "RUNTIME_PORT=1"))
    stranger = site.start_node("stranger", site.hosts["attic"])
    stranger.says(r"Failed to activate SuperNode[\s\S]*the SuperNode ended with code \d+; again in 65 s")
    stranger.close()
    shutil.copytree(site.folder / "node-stranger", site.folder / "node-deceived")
    shutil.copy(init(tmp_path / "other") / "ca/ca.crt", site.folder / "node-deceived/ca.crt")
    deceived = site.start_node("deceived", site.hosts["attic"])
    deceived.says("(?i)certificate.verify.failed")
    deceived.close()
    assert site.flwr("supernode", "list", "--format", "json").stdout.count('"online"') == len(LINKS)


def test_the_bytes_of_a_run_add_up(site):
    """What we count, what Flower counts, what passes the gateway, the relays and the kernel: each explained by the one before.

    A run of FedARA, 5 rounds. Between payload and kernel are npy headers and names, Flower's envelopes and polling, HTTP, TLS,
    TCP and IP.
    """
    before = site.snapshot()
    lines, facts = site.federate("fedara")
    found = {place: count - before[place] for place, count in site.snapshot().items()}
    rounds = [line for line in lines if line["type"] == "round"]
    assert [line["good"] for line in rounds] == [3] * 5 and not any(line["dropped"] for line in rounds)
    table = byte_table(facts["bytes"], flower_traffic(site), found)
    print(show(table, found))
    for way in ("down", "up"):
        row = {place: sizes[way] for place, sizes in table.items()}
        # Flower counts whole objects: ours, and each record's and message's own envelope
        assert row["our records"] <= row["flower"] <= 1.02 * row["our records"] + 60_000, row
        # HTTP bodies that Flower does not count for the run: the app, looks for messages, signs of life
        assert abs(row["http bodies, run"] - row["flower"]) <= 0.02 * row["flower"], row
        explained = row["http"] + row["tls, estimated"]
        assert abs(row["tcp data"] - explained) <= 0.02 * row["tcp data"], row
        explained = row["tcp data"] + row["headers"] + row["lost on arrival"]
        assert abs(row["kernel"] - explained) <= 0.02 * row["kernel"], row


COUNTED_BY_FLOWER = ("pull-messages", "push-messages", "pull-object", "push-object")
HANDSHAKE = {"up": 550, "down": 1400}  # bytes of a TLS handshake of such a site, about
RECORD, RECORD_DATA = 22, 16384  # bytes that TLS adds to a record, and the data of a full one


def byte_table(ours: dict[str, int], flower: dict[str, int], found: dict[str, Counter[str]]) -> dict[str, dict[str, float]]:
    """Bytes by place and direction; `found` are the counters' differences over the run."""
    gateway, relays, kernel = found["gateway"], found["relays"], found["kernel"]
    requests = sum(count for name, count in gateway.items() if name.endswith(" requests"))
    table: dict[str, dict[str, float]] = {}
    for way, link in (("down", "rx"), ("up", "tx")):
        bodies = {name.removesuffix(f" {way}"): size for name, size in gateway.items() if name.endswith(f" {way}")}
        headers = sum(size for name, size in gateway.items() if name.endswith(f" {way} headers"))
        http = sum(bodies.values()) + headers
        row: dict[str, float] = {
            "our payload": sum(size for name, size in ours.items() if name.startswith(way) and "other" not in name),
            "our records": sum(size for name, size in ours.items() if name.startswith(way)),
            "flower": flower[way],
            "http bodies, run": sum(bodies.get(name, 0) for name in COUNTED_BY_FLOWER),
            "http bodies": sum(bodies.values()),
            "http": http,
            "tls, estimated": HANDSHAKE[way] * relays["connections"] + RECORD * (2 * requests + http / RECORD_DATA),
            "tcp data": relays[way],
            "headers": HEADERS * kernel[f"{link} packets"],
            "lost on arrival": kernel["lost"] * (way == "down"),
            "kernel": kernel[f"{link} bytes"],
        }
        for place, size in row.items():
            table.setdefault(place, {})[way] = size
    return table


def show(table: dict[str, dict[str, float]], found: dict[str, Counter[str]]) -> str:
    """The table as Markdown, and the counters beside it."""
    rows = [f"| {place} | {sizes['down']:,.0f} | {sizes['up']:,.0f} |" for place, sizes in table.items()]
    return "\n".join(["", "| bytes | down | up |", "|---|---|---|", *rows, *(f"{k}: {dict(v)}" for k, v in found.items())])


def flower_traffic(site: Site) -> dict[str, int]:
    """What the SuperLink counted for its newest run."""
    told = json.loads(site.flwr("list", "--format", "json").stdout)["runs"]
    traffic = max(told, key=lambda run: run.get("timestamps", {}).get("started-at") or "")["network-traffic"]
    return {"down": traffic["outbound-bytes"], "up": traffic["inbound-bytes"]}


def test_the_slow_device_trains_fewer_blocks(site):
    """LEGEND by what devices really take: the one with the slow link ends up with the least.

    The three share this machine's cores, so one with a good link may have had a slow round as well.
    """
    lines, _ = site.federate("legend", method="legend", **{"adapter.rank": 8})
    blocks = {line["client"]: line["blocks"] for line in lines if line["type"] == "client" and line["round"] == 5}
    print(blocks)
    assert blocks["node-cellar"] == min(blocks.values()) < max(blocks.values())


def test_a_killed_device_and_a_killed_superlink_end_no_run(site):
    """kill -9 of a SuperNode in mid-round, and once it is back of the SuperLink: both come back, and the run completes."""

    def rounds() -> list[dict]:
        return [line for line in site.lines("killed") if line["type"] == "round"]

    def whole(after: int) -> int:
        """The first round after this one in which all three count."""
        return next((line["round"] for line in rounds() if line["round"] > after and line["good"] == 3), 0)

    values = {"num-server-rounds": 12, "strategy.round-timeout": 60.0, "strategy.max-failed-rounds": 5}
    results: list[tuple[list[dict], dict]] = []
    # run.sh outlives the SuperLink, too
    run = threading.Thread(target=lambda: results.append(site.federate("killed", **values)))
    run.start()
    first = wait_for(lambda: whole(0), what=site.tails)
    site.nodes["cellar"].below("flower-supernode").kill()
    lost = wait_for(
        lambda: next((line for line in rounds() if line["round"] > first and line["good"] == 2), None), what=site.tails
    )
    back = wait_for(lambda: whole(lost["round"]), what=site.tails)
    site.restart_superlink()
    again = wait_for(lambda: whole(back + 1), what=site.tails)
    print({"killed after": first, "without it": lost, "back": back, "whole after the SuperLink's restart": again})
    run.join(900)
    (lines, facts) = results[0]
    assert facts["outcome"] == "completed" and len([line for line in lines if line["type"] == "round"]) == 12
