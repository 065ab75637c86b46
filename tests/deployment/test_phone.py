"""docker/phone.sh, with stand-ins for the commands of Termux and of Debian: what it calls, in what order."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from deployment import wait_for

ROOT = Path(__file__).parents[2]
TOOLS = "sh env cat chmod dirname grep sed find sort cksum rm mkdir sleep touch".split()
# proot-distro: a userland is a file; what runs "in it" is the script itself, with the places of this test
DISTRO = """#!{python}
import os, sys
from pathlib import Path
root, words = Path({root!r}), sys.argv[1:]
with open(root / "calls", "a") as calls:
    calls.write("proot-distro " + " ".join(words).replace({root!r}, "") + "\\n")
if words[0] == "install":
    if (root / "broken").exists():
        sys.exit(1)
    (root / "userland").touch()
    sys.exit()
if not (root / "userland").exists():
    sys.exit("no such container")
command = words[words.index("--") + 1:]
if command == ["true"]:
    sys.exit()
places = {{"/opt/fedara": str(root / "venv")}}
places |= {{bind.rpartition(":")[2]: bind.rpartition(":")[0] for word, bind in zip(words, words[1:]) if word == "--bind"}}
text = (root / "repo/docker/phone.sh").read_text()
for place, here in places.items():
    for before, after in (("", "/"), ("=", " ")):
        text = text.replace(f"{{before}}{{place}}{{after}}", f"{{before}}{{here}}{{after}}")
(root / "inside.sh").write_text(text)
command = [str(root / "inside.sh") if word.endswith("/phone.sh") else word for word in command]
os.environ["PATH"] = f"{{root}}/debian:{{os.environ['PATH']}}"
os.execvp(command[0], command)
"""
INSTALL = """#!/bin/sh
# stands in for install-device.sh VENV
echo "install-device $TORCH|$PIP_EXTRA_INDEX_URL" >>{root}/calls
mkdir -p "$1/bin" "$1/lib/python3.13/site-packages/torch.dist-info"
[ ! -e {root}/early ] || {{ touch {root}/reached; sleep 60; }}
touch "$1/bin/pip"
chmod +x "$1/bin/pip"
[ ! -e {root}/late ] || {{ touch {root}/reached; sleep 60; }}
touch "$1/lib/python3.13/site-packages/torch.dist-info/INSTALLER"
mkdir -p "$1/lib/python3.13/site-packages/flwr.dist-info"
touch "$1/lib/python3.13/site-packages/flwr.dist-info/INSTALLER"
printf '#!/bin/sh\\necho "$(command -v fedara) $*" >>{root}/calls\\n' >"$1/bin/fedara"
chmod +x "$1/bin/fedara"
"""
START = """#!/bin/sh
echo "start.sh, $(command -v fedara)" >>{root}/calls
trap 'echo "node ends" >>{root}/calls; exit 0' TERM
[ ! -e {root}/stay ] || while :; do sleep 0.05; done
"""


class Phone:
    """A phone with a fresh Termux, a copy of the repository, and a node's folder in its home."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin, self.node = root, root / "termux", root / "home/node-phone"
        for folder in ("termux", "debian", "home/node-phone", "repo/docker", "repo/fedara_flwr"):
            (root / folder).mkdir(parents=True)
        for name in TOOLS:
            (self.bin / name).symlink_to(str(shutil.which(name)))
        shutil.copy(ROOT / "docker/phone.sh", root / "repo/docker")
        for file in ("repo/constraints.txt", "repo/pyproject.toml", "repo/fedara_flwr/a.py"):
            (root / file).write_text("1\n")
        for name in ("node.toml", "node.key"):
            (self.node / name).write_text("")
        self.program("repo/docker/install-device.sh", INSTALL.format(root=root))
        self.program("home/node-phone/start.sh", START.format(root=root))
        self.program("distro", DISTRO.format(python=sys.executable, root=str(root)))
        self.note("termux-wake-lock")
        self.note("termux-wake-unlock")
        self.note("pkg", f"cp {root}/distro {self.bin}/proot-distro; cp {self.bin}/pkg {self.bin}/termux-battery-status")
        (self.bin / "cp").symlink_to(str(shutil.which("cp")))
        self.program("termux/uname", "#!/bin/sh\necho aarch64\n")
        self.program("debian/python3", f"#!/bin/sh\n[ -e {root}/python ]\n")
        self.note("dpkg", folder="debian")
        self.note("apt-get", f'[ "$1" = update ] || touch {root}/python', folder="debian")

    def program(self, place: str, text: str) -> None:
        (self.root / place).write_text(text)
        (self.root / place).chmod(0o755)

    def note(self, name: str, then: str = ":", folder: str = "termux") -> None:
        self.program(f"{folder}/{name}", f'#!/bin/sh\necho "{name} $*" >>{self.root}/calls\n{then}\n')

    def env(self, **more: str) -> dict[str, str]:
        return {"PATH": str(self.bin), "HOME": str(self.root / "home")} | more

    def run(self, *words: object, **more: str) -> subprocess.CompletedProcess:
        command = ["sh", str(self.root / "repo/docker/phone.sh"), *map(str, words)]
        return subprocess.run(command, env=self.env(**more), capture_output=True, text=True, timeout=60)

    @contextlib.contextmanager
    def started(self, *words: object):
        command = ["sh", str(self.root / "repo/docker/phone.sh"), *map(str, words)]
        process = subprocess.Popen(command, env=self.env(), start_new_session=True, stderr=subprocess.PIPE, text=True)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def calls(self) -> list[str]:
        """What was called since the last look."""
        file = self.root / "calls"
        found = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [line.strip() for line in found]


LOGIN = "proot-distro login debian --bind /repo:/fedara"
NODE = f"{LOGIN} --bind /home/node-phone:/node"


@pytest.fixture
def phone(tmp_path):
    return Phone(tmp_path)


def good(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stdout + done.stderr


def test_everything_once_and_the_second_time_the_start_alone(phone):
    good(phone.run(phone.node, PIP_EXTRA_INDEX_URL="file:///a file:///b", TORCH="torch==2.9.1"))
    variables = "env TORCH=torch==2.9.1 PIP_EXTRA_INDEX_URL=file:///a file:///b"
    start = [
        "termux-wake-lock",
        f"{NODE} -- sh /fedara/docker/phone.sh --inside-start",
        f"start.sh, {phone.root}/venv/bin/fedara",
        "termux-wake-unlock",
    ]
    assert phone.calls() == [
        "pkg install -y proot-distro termux-api",
        f"{LOGIN} -- true",
        "proot-distro install debian",
        f"{LOGIN} -- true",
        f"{LOGIN} -- {variables} sh /fedara/docker/phone.sh --inside-install",
        "dpkg --configure -a",
        "apt-get update",
        "apt-get install --yes --no-install-recommends python3 python3-venv ca-certificates",
        "install-device torch==2.9.1|file:///a file:///b",
        *start,
    ]
    assert (phone.node / "node.key").stat().st_mode & 0o077 == phone.node.stat().st_mode & 0o077 == 0
    again = [f"{LOGIN} -- true", f"{LOGIN} -- env TORCH=torch==2.9.1 sh /fedara/docker/phone.sh --inside-install", *start]
    good(phone.run(phone.node, TORCH="torch==2.9.1"))
    assert phone.calls() == again
    (phone.root / "repo/fedara_flwr/a.py").write_text("2\n")
    good(phone.run(phone.node, TORCH="torch==2.9.1"))
    assert phone.calls() == [*again[:2], "install-device torch==2.9.1|", *start]


def test_install_alone_and_check(phone):
    good(phone.run())
    assert phone.calls()[-1] == "install-device |"
    good(phone.run(phone.node, "check"))
    asked = f"{NODE} -- sh /fedara/docker/phone.sh --inside-check"
    assert phone.calls()[-2:] == [asked, f"{phone.root}/venv/bin/fedara deploy check /node"]


@pytest.mark.parametrize("when", ["early", "late"])
def test_killed_in_the_installation_the_next_run_finishes_it(phone, when):
    """A venv without pip is made anew; a package of which pip did not write all is no installed one."""
    (phone.root / when).touch()
    with phone.started(phone.node):
        wait_for((phone.root / "reached").exists, 30)
    phone.calls()
    (phone.root / when).unlink()
    packages = phone.root / "venv/lib/python3.13/site-packages"
    assert packages.exists() and not (phone.root / "venv/.installed").exists()
    (packages / "numpy.dist-info").mkdir()
    (packages / "numpy.dist-info/INSTALLER").touch()
    (packages / "half.dist-info").mkdir()
    good(phone.run(phone.node))
    assert "install-device |" in phone.calls()
    whole = {path.name for path in packages.iterdir()}
    assert whole == {"torch.dist-info", "flwr.dist-info"} | ({"numpy.dist-info"} if when == "late" else set())


def test_a_node_that_runs_is_not_started_again_and_ends_when_told(phone):
    good(phone.run())
    (phone.root / "stay").touch()
    phone.calls()
    with phone.started(phone.node) as process:
        wait_for(lambda: (phone.root / "calls").exists() and "start.sh" in (phone.root / "calls").read_text(), 30)
        number = (phone.node / "home/phone.pid").read_text().strip()
        again = phone.run(phone.node)
        assert again.returncode == 1 and again.stderr == f"error: this node is running: process {number}\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert phone.calls()[-2:] == ["node ends", "termux-wake-unlock"]


def test_a_node_whose_system_killed_it_starts_again(phone):
    good(phone.run())
    (phone.node / "home").mkdir()
    (phone.node / "home/phone.pid").write_text(f"{os.getpid()}\n")  # by now somebody else's number
    good(phone.run(phone.node))
    assert phone.calls()[-1] == "termux-wake-unlock"


def test_a_userland_that_is_not_whole(phone):
    (phone.root / "broken").touch()
    done = phone.run(phone.node)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: proot-distro has no whole debian: `proot-distro remove debian`")
    assert "inside" not in "".join(phone.calls())


def test_what_it_refuses(phone, tmp_path):
    def said(*words: object) -> str:
        done = phone.run(*words)
        assert done.returncode == 1 and not phone.calls()
        return done.stderr

    assert said(tmp_path).startswith(f"error: {tmp_path} is no folder node-NAME")
    outside = shutil.copytree(phone.node, tmp_path / "sdcard")
    assert said(outside).startswith(f"error: {outside} is outside of Termux's home")
    assert said(phone.node, "stop") == "error: stop: allowed is start or check\n"
    phone.program("termux/uname", "#!/bin/sh\necho armv7l\n")
    assert said() == "error: this is armv7l: torch has builds for 64-bit phones (aarch64) only\n"
    (phone.bin / "pkg").unlink()
    assert said().startswith("error: there is no pkg: this is for Termux on a phone")
