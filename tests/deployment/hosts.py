"""Separate hosts on one machine: network namespaces on one switch, with links of their own rate, delay and loss.

Delay is a relay's on the device's own side (this kernel may lack netem); the relay also counts what passes, and runs as
`python hosts.py RELAY-OPTIONS`. The gateway with counters on it runs as `python hosts.py gateway OPTIONS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

HEADERS = 14 + 20 + 20 + 12  # bytes of a packet that are no data: Ethernet, IP, TCP, its time stamps


class Host:
    """One namespace with an address.

    Attributes:
        prefix: starts a command inside.
    """

    def __init__(self, switch: Switch, name: str, address: str) -> None:
        self.address, self.name = address, f"{switch.name}{name[0]}"
        self.prefix = ["ip", "netns", "exec", self.name]
        self.outer, self.inner = f"{self.name}o", f"{self.name}i"
        _ip("netns", "add", self.name)
        _ip("link", "add", self.outer, "type", "veth", "peer", "name", self.inner)
        _ip("link", "set", self.outer, "master", switch.name)
        _ip("link", "set", self.inner, "netns", self.name)
        # packets as a real link has them, so that the kernel counts every header
        _ip("link", "set", self.outer, "gso_max_segs", "1")
        _ip("-n", self.name, "link", "set", self.inner, "gso_max_segs", "1")
        _ip("-n", self.name, "addr", "add", f"{address}/24", "dev", self.inner)
        _ip("link", "set", self.outer, "up")
        for device in ("lo", self.inner):
            _ip("-n", self.name, "link", "set", device, "up")

    def shape(self, rate: str) -> None:
        """Nothing passes faster, either way."""
        for place in (["tc"], ["tc", "-n", self.name]):
            device = self.outer if len(place) == 1 else self.inner
            words = [
                *place,
                "qdisc",
                "replace",
                "dev",
                device,
                "root",
                "tbf",
                "rate",
                rate,
                "burst",
                "32kbit",
                "latency",
                "400ms",
            ]
            subprocess.run(words, check=True, capture_output=True)

    def lose(self, share: float) -> None:
        """That share of the packets that arrive is lost."""
        rule = ["iptables", "-A", "INPUT", "-i", self.inner, "-m", "statistic", "--mode", "random", "--probability", str(share)]
        subprocess.run([*self.prefix, *rule, "-j", "DROP"], check=True, capture_output=True)

    def counters(self) -> Counter[str]:
        """What the kernel counted: bytes and packets of the link, and the bytes that `lose` took away after that."""
        shown = subprocess.run(
            ["ip", "-n", self.name, "-j", "-s", "link", "show", "dev", self.inner], check=True, capture_output=True, text=True
        )
        stats = json.loads(shown.stdout)[0]["stats64"]
        found = Counter({f"{way} {what}": stats[way][what] for way in ("rx", "tx") for what in ("bytes", "packets")})
        rules = subprocess.run([*self.prefix, "iptables", "-nvxL", "INPUT"], check=True, capture_output=True, text=True).stdout
        found["lost"] = sum(int(line.split()[1]) for line in rules.splitlines() if " DROP " in line and "statistic" in line)
        return found


class Switch:
    """A bridge, and the hosts that are on it. Needs root, iproute2 and iptables."""

    def __init__(self) -> None:
        number = os.getpid() % 60000
        self.name, self.net = f"fs{number:x}", f"10.{232 + number % 16}.{number // 16 % 256}"
        self.hosts: list[Host] = []
        _ip("link", "add", self.name, "type", "bridge")
        _ip("link", "set", self.name, "up")

    def host(self, name: str) -> Host:
        """One more; the first letters of names must differ."""
        host = Host(self, name, f"{self.net}.{len(self.hosts) + 2}")
        self.hosts.append(host)
        return host

    def close(self) -> None:
        for host in self.hosts:
            subprocess.run(["ip", "link", "del", host.outer], capture_output=True)
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)
        subprocess.run(["ip", "link", "del", self.name], capture_output=True)

    def __enter__(self) -> Switch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def why_no_hosts() -> str:
    """Why this machine can have none, "" if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "tc", "iptables") if not shutil.which(tool)]:
        return f"separate hosts need {', '.join(missing)}"
    try:
        with Switch() as switch:
            switch.host("a").shape("10mbit")
            switch.hosts[0].lose(0.01)
    except subprocess.CalledProcessError as error:
        return f"no host can be made: {error}"
    return ""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Counts:
    """Counters in a file, written while they grow."""

    def __init__(self, file: Path) -> None:
        self.file, self.counts = file, Counter[str]()

    async def keep(self) -> None:
        written = None
        while True:
            if self.counts != written:
                written = self.counts.copy()
                self.file.with_suffix(".new").write_text(json.dumps(written))
                self.file.with_suffix(".new").replace(self.file)
            await asyncio.sleep(0.2)


async def relay(listen: str, to: str, seconds: float, file: str) -> None:
    """Passes what comes to `listen` on to `to` and back, each piece so many seconds later."""
    tally = Counts(Path(file))

    async def passes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(4096)

        async def deliver() -> None:
            while piece := await queue.get():
                await asyncio.sleep(piece[0] - time.monotonic())
                if not piece[1]:
                    break
                writer.write(piece[1])
                await writer.drain()

        sender = asyncio.create_task(deliver())
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                tally.counts[way] += len(data)
                await queue.put((time.monotonic() + seconds, data))
        await queue.put((time.monotonic() + seconds, b""))
        with contextlib.suppress(OSError):
            await sender
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tally.counts["connections"] += 1
        try:
            far = await asyncio.open_connection(*to.rsplit(":", 1))
        except OSError:
            writer.close()
            return
        await asyncio.gather(passes(reader, far[1], "up"), passes(far[0], writer, "down"))

    host, port = listen.rsplit(":", 1)
    server = await asyncio.start_server(connected, host, int(port))
    await asyncio.gather(server.serve_forever(), tally.keep())


async def gateway(folder: str, superlink: str, host: str, port: int, file: str) -> None:
    """`fedara deploy gateway` with counters: HTTP bytes, headers too, by path and direction."""
    import uvicorn

    from fedara_flwr.cli.deploy.gateway import application

    inner, tally, place = application(superlink, Path(folder) / "ca.crt"), Counts(Path(file)), Path(folder)

    async def counting(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await inner(scope, receive, send)
        name = re.sub(".*/", "", scope["path"])
        tally.counts[f"{name} requests"] += 1
        tally.counts[f"{name} up headers"] += len(scope["method"]) + len(scope["raw_path"]) + 13 + _length(scope["headers"])

        async def count_in() -> Any:
            event = await receive()
            tally.counts[f"{name} up"] += len(event.get("body", b""))
            return event

        async def count_out(event: Any) -> None:
            if event["type"] == "http.response.start":
                tally.counts[f"{name} down headers"] += 17 + 37 + _length(event["headers"])  # status line, date
            tally.counts[f"{name} down"] += len(event.get("body", b""))
            await send(event)

        await inner(scope, count_in, count_out)

    certificate = {"ssl_certfile": str(place / "server.pem"), "ssl_keyfile": str(place / "server.key")}
    config = uvicorn.Config(counting, host=host, port=port, log_level="warning", server_header=False, **certificate)
    await asyncio.gather(uvicorn.Server(config).serve(), tally.keep())


def _length(headers: list[tuple[bytes, bytes]]) -> int:
    return 2 + sum(len(name) + len(value) + 4 for name, value in headers)


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "relay":
        asyncio.run(relay(words[0], words[1], float(words[2]), words[3]))
    else:
        asyncio.run(gateway(words[0], words[1], words[2], int(words[3]), words[4]))
