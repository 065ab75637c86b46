"""The Ray cluster that a run joins: what its machines need, given to them or checked before anything starts.

Flower calls `ray.init` without an address, which then joins what RAY_ADDRESS names. Flower's actors on the other machines
import the app by name, and have the environment of their `ray start`. So Ray is told to bring them the app's package and
FLWR_HOME. Model, data and installed packages stay where they are: a client may run on any machine, so all must have the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedara_flwr.cli.simulation import Simulation
from fedara_flwr.keys import ConfigError, Scalar
from fedara_flwr.runs.directory import PACKAGES
from fedara_flwr.tasks import read_settings

ADDRESS = "RAY_ADDRESS"
LOCAL = "local"
AUTH_MODE = "RAY_AUTH_MODE"
# of a Ray of our own: who has no token runs nothing on it, and it listens on this machine alone (the second, named after the
# systems where Ray does so by default, works on all)
CLOSED = {AUTH_MODE: "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
OPEN = (
    f"warning: {AUTH_MODE} is not 'token': whoever reaches the ports of this Ray cluster runs programs on all of its machines "
    "(docs/simulation.md)"
)
CONNECT_SECONDS = 5
CHECK_SECONDS = 300  # for the slowest machine to load its data
JOIN_SECONDS = 120  # for Ray to let this machine in
FREE_SECONDS = 30  # for Ray to notice that a run before this one has ended
FLOWER_THREADS = 32  # Flower runs min(32, cores + 4) clients at once (a ThreadPoolExecutor's default), whatever the cluster has


def environment(app: Path, home: Path) -> dict[str, str]:
    """What Flower's processes need in their environment to join the cluster of RAY_ADDRESS, or to start a Ray of their own.

    Args:
        app: folder of the Flower app, whose package is brought to all machines.
        home: FLWR_HOME of the run, on every machine.

    Raises:
        ConfigError: RAY_ADDRESS is no address that Flower's Ray backend can join, or `app` has no ClientApp.
    """
    address = os.environ.get(ADDRESS, "")
    if address in ("", LOCAL):
        # without an address Ray joins whatever was last started on this machine, by whomever
        return {ADDRESS: LOCAL, **CLOSED, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    if address != "auto" and not re.fullmatch(r"[^/]+:\d+", address):
        raise ConfigError(f"{ADDRESS} = {address!r}: allowed are 'HOST:PORT' of a cluster's head, 'auto', '{LOCAL}'")
    try:
        client_app = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["components"]["clientapp"]
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{app}: no Flower app ({error!r})") from None
    package = app / client_app.partition(":")[0].partition(".")[0]
    runtime = {"py_modules": [str(package)], "excludes": ["__pycache__"], "env_vars": {"FLWR_HOME": str(home)}}
    # where Ray looks for more of a job's runtime environment than the program itself gives; Flower gives PYTHONPATH
    return {ADDRESS: address, "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": runtime})}


def check(config: dict[str, Scalar], simulation: Simulation, env: dict[str, str], cwd: Path) -> str:
    """A line on the cluster that `env` names, once it is reached and all its machines have what the run needs.

    Args:
        config: the flat run configuration.
        env: of Flower's processes, with `environment`.
        cwd: a folder without modules of its own.

    Raises:
        ConfigError: the cluster cannot be reached, has no room or is in use, or a machine lacks something or differs from
            this one.
    """
    address = env[ADDRESS]
    for key, value in (
        ("init-args-num-cpus", simulation.init_args_num_cpus),
        ("init-args-num-gpus", simulation.init_args_num_gpus),
    ):
        if value is not None:
            raise ConfigError(f"{key} = {value}: not with {ADDRESS} = {address!r}, a cluster says what it has")
    if address != "auto":
        _reach(address)
    home = Path(env["FLWR_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=home, prefix=".cluster-") as mark:
        question = {
            "config": config,
            "mark": mark.name,
            "cpus": simulation.client_resources_num_cpus,
            "gpus": simulation.client_resources_num_gpus,
        }
        # a process of its own: ray.init takes over signal handlers, and ends the process when the head dies
        search = [str(Path(__file__).parents[2]), *filter(None, [env.get("PYTHONPATH")])]
        try:
            done = subprocess.run(
                [sys.executable, "-c", "from fedara_flwr.cli.cluster import main; main()"],
                input=json.dumps(question),
                env=env | {"PYTHONPATH": os.pathsep.join(search)},
                cwd=cwd,
                capture_output=True,
                text=True,
                timeout=JOIN_SECONDS + CHECK_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise ConfigError(f"{ADDRESS} = {address!r}: the cluster does not let this machine in") from None
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise ConfigError(f"{ADDRESS} = {address!r}: {' '.join(done.stderr[-500:].split())}") from None
    return judge(answer, address, simulation.client_resources_num_cpus, simulation.client_resources_num_gpus)


def _reach(address: str) -> None:
    """Refuse an address where nothing answers within CONNECT_SECONDS; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{ADDRESS} = {address!r}: no Ray head answers there ({error})") from None


def judge(answer: Mapping[str, Any], address: str, cpus: float, gpus: float) -> str:
    """The line that `check` gives, from what `main` learnt of the cluster's machines.

    Raises:
        ConfigError: as `check`.
    """
    if "error" in answer:
        raise ConfigError(f"{ADDRESS} = {address!r}: {answer['error']}")
    here, machines = answer["here"], answer["machines"]
    room = sum(machine["room"] for machine in machines)
    if not room:
        raise ConfigError(
            f"client-resources-num-cpus = {cpus:g}, client-resources-num-gpus = {gpus:g}: "
            f"no machine of the Ray cluster at {address} has as much"
        )
    if short := answer["short"]:
        raise ConfigError(f"{ADDRESS} = {address!r}: other jobs hold {short}, Flower would wait for them without end")
    for machine in machines:
        name, there = f"machine {machine['address']} of the Ray cluster at {address}", machine["found"]
        if "error" in there:
            raise ConfigError(f"{name}: {there['error']}")
        if differs := [key for key in here if key != "shared" and there[key] != here[key]]:
            key = differs[0]
            raise ConfigError(f"{name}: {key} is {there[key]}, on this machine {here[key]}; all must have the same")
    line = f"Ray cluster {address}: machines: {len(machines)}, clients at once: {room}"
    if room > (threads := min(FLOWER_THREADS, (os.cpu_count() or 1) + 4)):
        line += f", of which Flower runs {threads} from this machine"
    if alone := [machine["address"] for machine in machines if not machine["found"]["shared"]]:
        line += f"; FLWR_HOME is not shared with {', '.join(alone)}: what changes the backbone is sent again there, and counted"
    return line


def look(config: dict[str, Scalar], mark: str) -> dict[str, Any]:
    """What this machine has of what a run needs everywhere; `error` where something is missing.

    Args:
        config: the flat run configuration.
        mark: a file that the asking machine put into FLWR_HOME.
    """
    from fedara_flwr.adapters.backbone import locate
    from fedara_flwr.data.federation import federation
    from fedara_flwr.tasks import open_task

    try:
        has: dict[str, Any] = {name: version(name) for name in PACKAGES if name != "fedara-flwr"}  # the app's code is brought
        has = {name: number.partition("+")[0] for name, number in has.items()}  # builds for CPU and CUDA may meet
        settings = read_settings(config)
        model, home = Path(locate(settings.model.name)), Path(mark).parent
        if model.is_dir():  # else each machine has it from the Hub
            files = sorted((str(file.relative_to(model)), file.stat().st_size) for file in model.rglob("*") if file.is_file())
            has[f"the folder of model.name = {settings.model.name!r}"] = hashlib.sha256(repr(files).encode()).hexdigest()[:12]
        has["the digest of the data"] = federation(settings.data, settings.seed, open_task(settings.data)).digest[:12]
        home.mkdir(parents=True, exist_ok=True)
        if not os.access(home, os.W_OK):
            return {"error": f"FLWR_HOME = {str(home)!r}: cannot be written"}
        return {**has, "shared": Path(mark).exists()}
    except PackageNotFoundError as error:
        return {"error": f"package {error.name} is not installed"}
    except (ConfigError, OSError) as error:
        return {"error": str(error)}


def main() -> None:
    """Join the cluster, let every machine with room for a client look, print what was found as JSON."""
    question = json.loads(sys.stdin.read())
    try:
        answer = _ask(question)
    except Exception as error:  # Ray raises what it likes
        answer = {"error": " ".join(str(error).split())[:500]}
    print("\n" + json.dumps(answer))


def _ask(question: dict[str, Any]) -> dict[str, Any]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    remote = ray.remote(num_cpus=0, max_retries=0)(look)
    machines, replies = [], []
    for node in ray.nodes():
        has = node["Resources"] if node["Alive"] else {}
        if room := _room(has, question["cpus"], question["gpus"]):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            replies.append(remote.options(scheduling_strategy=there).remote(question["config"], question["mark"]))
            machines.append({"address": node["NodeManagerAddress"], "room": room})
    here = look(question["config"], question["mark"])
    if "error" in here:
        return {"error": f"this machine: {here['error']}"}
    done, _ = ray.wait(replies, num_returns=len(replies), timeout=CHECK_SECONDS) if replies else ([], [])
    for machine, reply in zip(machines, replies, strict=True):
        try:
            answer = ray.get(reply) if reply in done else {"error": f"no answer in {CHECK_SECONDS} s"}
        except Exception as error:  # its worker cannot start, or the machine left
            answer = {"error": " ".join(str(error).split())[-500:]}
        machine["found"] = answer
    room = sum(machine["room"] for machine in machines)
    wanted = {"CPU": room * question["cpus"], "GPU": room * question["gpus"]}
    deadline = time.monotonic() + FREE_SECONDS
    while (short := _short(ray.available_resources(), wanted)) and time.monotonic() < deadline:
        time.sleep(1)
    return {"here": here, "machines": machines, "short": short}


def _short(free: Mapping[str, float], wanted: Mapping[str, float]) -> str:
    """The resources of `wanted` that are not free, in words; '' where all are. Flower will ask for all that there are."""
    held = {name: amount - free.get(name, 0) for name, amount in wanted.items()}
    return " and ".join(f"{lack:g} of {wanted[name]:g} {name}" for name, lack in held.items() if lack > 1e-3)


def _room(has: Mapping[str, float], cpus: float, gpus: float) -> int:
    """How many clients a machine with these resources takes, as Flower counts."""
    room = has.get("CPU", 0) / cpus
    return math.floor(min(room, has.get("GPU", 0) / gpus) if gpus else room)
