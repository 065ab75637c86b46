"""The server's page and the device's (docs/) followed word for word, from a clone to a finished run; links of all pages."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from hosts import Host, Switch, why_no_hosts

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
SERVER, DEVICE = DOCS / "deploy-server.md", DOCS / "deploy-device.md"
DEVICES_TURN = "deploy-device.md#steps"  # where the server's page sends its reader to the devices'
PLACEHOLDERS = {"REPOSITORY": str(ROOT)}
INSTALL = "sh docker/install-"


def blocks(text: str) -> list[str]:
    """A page's command blocks."""
    return re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(name if name not in found else f"{name}-1")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_of_the_pages_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.M | re.S)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", link):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
                broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", [SERVER, DEVICE], ids=lambda path: path.name)
def test_each_block_of_commands_works_in_a_terminal_of_its_own(page):
    """It activates the environment, or is what makes it, and goes to the folder that it is about."""
    assert page.read_text().count(DEVICES_TURN) == (page == SERVER)
    for block in blocks(page.read_text()):
        subprocess.run(["sh", "-n"], input=block, text=True, check=True)
        assert INSTALL in block or block.startswith(". ~/venv/bin/activate\n"), block


class Machine:
    """A host with a home folder of its own, which is /root there; nothing is installed but what the system has."""

    def __init__(self, host: Host, folder: Path, names: dict[str, str]) -> None:
        self.host, self.home = host, folder / host.name
        self.started: list[subprocess.Popen] = []
        self.home.mkdir()
        self.log = folder / f"{host.name}.log"
        own = Path("/etc/netns") / host.name
        own.mkdir(parents=True)
        known = "".join(f"{address} {name}\n" for name, address in names.items())
        (own / "hosts").write_text(f"127.0.0.1 localhost\n::1 localhost\n{known}")
        if (pip := Path.home() / ".config" / "pip").exists():  # where this machine gets its packages from
            shutil.copytree(pip, self.home / ".config" / "pip")

    def command(self, *words: str, outside: bool = False) -> list[str]:
        """The words of a command there; `outside`: with this machine's network, which is where packages come from."""
        place = [] if outside else self.host.prefix
        at_home = 'mount --bind "$0" /root && cd /root && exec "$@"'
        return [*place, "unshare", "--mount", "sh", "-c", at_home, str(self.home), *words]

    @property
    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return kept | {"HOME": "/root", "USER": "root", "PATH": path, "LANG": "C.UTF-8"}

    def type(self, block: str) -> subprocess.CompletedProcess:
        """A block of commands in a terminal of its own, to its end."""
        command = self.command("sh", "-ec", block, outside=INSTALL in block)
        began = time.monotonic()
        nothing = subprocess.DEVNULL
        done = subprocess.run(command, stdin=nothing, env=self.environment, capture_output=True, text=True, timeout=3000)
        seconds = time.monotonic() - began
        with self.log.open("a") as log:
            log.write(f"\n[{seconds:.0f} s]\n{block}{done.stdout}{done.stderr}")
        assert done.returncode == 0, self.log.read_text()[-4000:]
        return done

    def leave_open(self, *words: str) -> None:
        """A command in a terminal that stays open."""
        nothing, command = subprocess.DEVNULL, self.command(*words)
        with self.log.open("a") as log:
            self.started.append(subprocess.Popen(command, env=self.environment, stdin=nothing, stdout=log, stderr=log))

    def close(self) -> None:
        for process in reversed(self.started):
            with contextlib.suppress(psutil.NoSuchProcess):
                below = psutil.Process(process.pid).children(recursive=True)
                for one in (*below, psutil.Process(process.pid)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.terminate()
                _, left = psutil.wait_procs(below, timeout=60)
                for one in left:
                    one.kill()
            process.wait()
        shutil.rmtree(Path("/etc/netns") / self.host.name)


def let_in(guest: Machine, hosts: list[Machine]) -> None:
    """A key with which `guest` may copy files to the hosts, by ssh."""
    (guest.home / ".ssh").mkdir(mode=0o700)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", guest.home / ".ssh/id_ed25519"], check=True)
    (guest.home / ".ssh/config").write_text("StrictHostKeyChecking accept-new\n")
    Path("/run/sshd").mkdir(exist_ok=True)
    for host in hosts:
        (host.home / ".ssh").mkdir(mode=0o700)
        shutil.copy(guest.home / ".ssh/id_ed25519.pub", host.home / ".ssh/authorized_keys")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", host.home / ".ssh/host"], check=True)
        words = ["HostKey=/root/.ssh/host", "PidFile=none", "UsePAM=no", "StrictModes=no", "Subsystem=sftp internal-sftp"]
        options = [word for option in words for word in ("-o", option)]
        host.leave_open("/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", *options)


@pytest.fixture
def machines(tmp_path) -> Iterator[dict[str, Machine]]:
    if why := why_no_hosts():
        pytest.skip(why)
    if not shutil.which("/usr/sbin/sshd"):
        pytest.skip("no sshd (openssh-server), by which the page copies folders")
    with Switch() as switch, contextlib.ExitStack() as stack:
        names = {"server": "fed.example.org", "attic": "attic", "cellar": "cellar"}
        hosts = {name: switch.host(name) for name in names}
        known = {known: hosts[name].address for name, known in names.items()}
        found = {}
        for name, host in hosts.items():
            found[name] = Machine(host, tmp_path, known)
            stack.callback(found[name].close)
        let_in(found["server"], [found["attic"], found["cellar"]])
        yield found


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_pages_word_for_word(machines):
    """Every block of both pages, in the order in which a reader comes to them."""
    server, attic, cellar = machines.values()
    before, after = SERVER.read_text().split(DEVICES_TURN)
    page = DEVICE.read_text()
    first, began = blocks(page)[0], time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        installed = pool.submit(follow, attic, [first])  # "meanwhile"
        follow(server, blocks(before)[:1])
        installed.result()
    follow(server, blocks(before)[1:])
    for folder in ("fedara-flwr", "venv"):  # cellar's disk is a copy of attic's
        shutil.copytree(attic.home / folder, cellar.home / folder, symlinks=True)
    for device, name in ((attic, "attic"), (cellar, "cellar")):
        follow(device, [block.replace("node-attic", f"node-{name}") for block in blocks(page)[1:]])
    follow(server, blocks(after))
    print(f"{time.monotonic() - began:.0f} s", *(machine.log.read_text() for machine in machines.values()))
    (shown,) = (block for block in blocks(SERVER.read_text()) if "fedara deploy nodes" in block)
    told = server.type(shown).stdout
    assert told.count(" 3 of 3 ") == 2 and "roof" not in told and told.endswith("run first, completed\n"), told
    facts = json.loads((server.home / "site/server/home/runs/first/federated.json").read_text())
    assert facts["outcome"] == "completed" and facts["rounds"] == 3 and not facts["left-out"], facts


def follow(machine: Machine, commands: list[str]) -> None:
    for block in commands:
        for placeholder, value in PLACEHOLDERS.items():
            block = block.replace(placeholder, value)
        if block.endswith("sh start.sh\n"):
            machine.leave_open("sh", "-ec", block)
        elif "fedara deploy nodes" in block:  # "again until both are online"
            end = time.monotonic() + 1800
            while machine.type(block).stdout.count(" online ") < 2:
                assert time.monotonic() < end, machine.log.read_text()[-4000:]
                time.sleep(10)
        else:
            machine.type(block)
