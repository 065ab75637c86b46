"""Images that are built and containers that run for real, without a registry and without a Docker engine.

buildah builds on a stand-in for the base image, made of Debian's own packages; podman runs what was built, on hosts of their
own (hosts.py), and podman-compose reads the compose.yml that `fedara deploy init` wrote.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hosts import Host, why_no_hosts

ROOT = Path(__file__).parents[2]
RELEASE, PACKAGES = "bookworm", "python3,python3-pip,python3-venv,ca-certificates"
TOOLS = ("buildah", "podman", "debootstrap", "conmon", "nsenter", "unshare")
STORE = "FEDARA_IMAGE_STORE"  # a folder that outlives the tests, so that the next ones build only what has changed


def why_no_images() -> str:
    """Why this machine can build or run none, "" if it can."""
    if why := why_no_hosts():
        return why
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    missing += [] if _runtime() else ["runc or crun"]
    missing += [name for name in ("netavark", "aardvark-dns", "catatonit") if not _helper(name)]
    if missing:
        return f"images need {', '.join(missing)} (apt-get install --no-install-recommends)"
    return "" if mirror() else f"apt knows no place of Debian {RELEASE}"


def mirror() -> str:
    """Where apt gets Debian's packages from, "" where it gets none."""
    words = ["apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages"]
    told = subprocess.run(words, capture_output=True, text=True).stdout if shutil.which("apt-get") else ""
    return next((line.split()[1] for line in told.splitlines() if line.split()[:1] == [RELEASE]), "")


def pip_settings() -> dict[str, str]:
    """This machine's settings of pip, as one file would have them; the environment's count most."""
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True).stdout
    found = dict[str, str]()
    for level in ("global.", "install.", "download.", ":env:."):
        for line in told.splitlines():
            key, _, value = line.partition("=")
            if key.startswith(level):
                found[key.removeprefix(level)] = " ".join(ast.literal_eval(value).split())
    return found


def places(settings: dict[str, str]) -> list[Path]:
    """Files and folders of this machine that these settings name; an index's files lie beside it."""
    found = set()
    for word in " ".join(settings.values()).split():
        path = Path(urlsplit(word).path).parent if word.startswith("file://") else Path(word)
        if path.is_absolute() and path.exists():
            found.add(path)
    return sorted(found)


def call(*words: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """What a command says; AssertionError, with all that it said, if it fails."""
    done = subprocess.run([str(word) for word in words], env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


class Images:
    """A store of images, and what builds them.

    Args:
        folder: for files of the tests; the store lies in it unless STORE names another place.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Path(os.environ.get(STORE) or folder / "store")
        self.env = _environment(folder, self.store, [])
        self.env["BUILDAH_ISOLATION"] = "chroot"

    def buildah(self, *words: object) -> str:
        return call("buildah", *words, env=self.env)

    def base(self, name: str) -> None:
        """Put a stand-in for this image into the store: a Debian with a Python that pip may install into."""
        with contextlib.suppress(AssertionError):
            self.buildah("inspect", "--type", "image", name)
            return
        root = self.folder / "base"
        call("debootstrap", "--variant=minbase", f"--include={PACKAGES}", RELEASE, root, mirror())
        for mark in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
            mark.unlink()
        container = self.buildah("from", "scratch").strip()
        self.buildah("add", container, root, "/")
        self.buildah("commit", "--rm", container, f"docker.io/library/{name}")
        shutil.rmtree(root)

    def build(self, dockerfile: Path, tag: str, *words: str) -> str:
        """Build as the Dockerfile's first lines say, with pip's settings of this machine; what buildah said."""
        settings = pip_settings()
        secret = self.folder / "pip.conf"
        secret.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
        volumes = [f"--volume={place}:{place}:ro" for place in places(settings)]
        options = ["--pull-never", "--layers", "--format=docker", f"--secret=id=pip,src={secret}", f"--tag={tag}"]
        return self.buildah("bud", *options, *volumes, *words, f"--file={dockerfile}", ROOT)

    def facts(self, tag: str) -> dict[str, Any]:
        """What the image says of itself."""
        return dict(json.loads(self.buildah("inspect", "--type", "image", tag)))

    @contextlib.contextmanager
    def files(self, tag: str) -> Iterator[Path]:
        """The image's root file system."""
        container = self.buildah("from", "--pull-never", tag).strip()
        try:
            yield Path(self.buildah("mount", container).strip())
        finally:
            self.buildah("rm", container)


class Engine:
    """podman on a host: its containers, networks and published ports are that host's alone."""

    def __init__(self, host: Host, images: Images, compose: Path) -> None:
        self.host = host
        self.root = Path(tempfile.mkdtemp(prefix=f"{host.name}-", dir="/tmp"))  # podman wants a short path
        self.env = _environment(self.root, self.root / "store", [images.store]) | {"PYTHONPATH": str(compose)}
        self.path = self.root / "podman"
        # the name server of podman's networks has one place on a machine: each host here sees its own there
        (self.root / "run").mkdir()
        own = f"mkdir -p /run/containers; mount --bind {self.root}/run /run/containers; echo; exec sleep infinity"
        words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", own]
        self.space = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert self.space.stdout is not None and self.space.stdout.readline()
        enter = f"nsenter --target {self.space.pid} --mount --net=/run/netns/{host.name}"
        self.path.write_text(f'#!/bin/sh\nexec {enter} podman "$@"\n')
        self.path.chmod(0o755)

    def podman(self, *words: object) -> str:
        return call(self.path, *words, env=self.env)

    def code(self, *words: object) -> int:
        """The exit code alone."""
        return subprocess.run([self.path, *map(str, words)], env=self.env, capture_output=True).returncode

    def compose(self, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
        """`docker compose --env-file settings.env …` in a machine's folder."""
        command = [sys.executable, "-m", "podman_compose", "--podman-path", str(self.path), "--env-file", "settings.env"]
        # Docker's own takes the profile of the service that `run` names
        command += [*(["--profile", "command"] if words[0] == "run" else []), *words]
        return subprocess.run(command, env=self.env, cwd=folder, capture_output=True, text=True, timeout=1800)

    def close(self) -> None:
        self.code("rm", "--all", "--force", "--depend", "--time", "30")  # the server's parts depend on the SuperLink
        self.code("network", "prune", "--force")
        self.space.kill()
        self.space.wait()
        shutil.rmtree(self.root, ignore_errors=True)


def podman_compose(target: Path) -> Path:
    """Install it there, for the engines."""
    call(sys.executable, "-m", "pip", "install", "--quiet", "--target", target, "podman-compose")
    return target


def _environment(folder: Path, store: Path, others: list[Path]) -> dict[str, str]:
    """Environment of buildah and podman with settings of their own, and a store beside others that are only read."""
    conf, storage = folder / "containers.conf", folder / "storage.conf"
    conf.write_text(
        f"""[containers]
default_ulimits = ["nofile=1024:4096", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "{_runtime()}"
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
"""
    )
    storage.write_text(
        f"""[storage]
driver = "overlay"
graphroot = "{store}/images"
runroot = "{store}/run"
[storage.options]
additionalimagestores = {json.dumps([f"{other}/images" for other in others])}
"""
    )
    (folder / "networks").mkdir()
    # health checks by systemd's timers need a systemd that runs; here the tests ask
    own = {"CONTAINERS_CONF": str(conf), "CONTAINERS_STORAGE_CONF": str(storage), "DISABLE_HC_SYSTEMD": "true"}
    return dict(os.environ) | own


def _runtime() -> str:
    """Which OCI runtime; crun of Debian 12 refuses machines with both kinds of control groups."""
    return next((name for name in ("runc", "crun") if shutil.which(name)), "")


def _helper(name: str) -> bool:
    return any((Path(folder) / name).exists() for folder in ("/usr/libexec/podman", "/usr/lib/podman", "/usr/bin"))
