"""Starts a run and gives back its outcome, which `flwr run` does not (its exit code is 0 even for a run that failed).

The simulation runs on a SuperLink of its own, on a free port and from a neutral folder: a shared one would keep the
environment and the folder of whoever came first, and its clients could import another checkout's code.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import psutil

from fedara_flwr.cli import cluster, superlink
from fedara_flwr.cli.processes import TAG, AtOnce, at_once, end_tagged, interrupt, on_stop
from fedara_flwr.cli.proxies import unusable, without_proxy
from fedara_flwr.cli.simulation import TMPDIR, Simulation, cause, ray_folder, short_folder
from fedara_flwr.data.partitions import check_partition
from fedara_flwr.files import flwr_home, unwritable
from fedara_flwr.flower import flatten_dict, parse_config_args
from fedara_flwr.keys import ConfigError, Scalar
from fedara_flwr.log import first_line, printable, show
from fedara_flwr.runs.directory import new_name
from fedara_flwr.runs.directory import read_config as run_config
from fedara_flwr.strategies import find
from fedara_flwr.tasks import open_task, read_settings

START_SECONDS = 60
SILENCE_SECONDS = 60.0  # without a line of the run, after which one says so, and again each time that it has doubled
NODES = {"clients", "num-clients", "num-nodes", "num-supernodes"}  # keys that others have for what federation.toml says
HIDDEN_KEPT = 60  # of Flower's lines, shown when a run fails
LAST_KEPT = 1000  # lines in which a failure's cause is looked for
# Flower's INFO and DEBUG lines, what Ray's processes print, blank lines, what is said of every run, and what Python by itself
# would not show (Flower turns it on); other warnings and errors are shown
NOISE = re.compile(
    r"\s*(\x1b\[\d+m)*(INFO|DEBUG|\(\S+ pid=\d+(, ip=\S+)?\)|Using SuperLink: |Successfully installed |warnings\.warn\($|$"
    r"|WARNING.*Since flwr 1\.32, default|.*FutureWarning: Tip: In future versions of Ray|.*\.py:\d+: DeprecationWarning: )"
)


class RunError(RuntimeError):
    """The run did not complete; the line says why."""


def launch(
    app: Path, overrides: list[str], federation: Path | None, engine: str, resume: Path | None = None, verbose: bool = False
) -> None:
    """Check the settings, run the app in simulation, show its lines. Ctrl-C exports the last checkpoint, a second one does not.

    Args:
        app: folder with pyproject.toml.
        overrides: `--run-config` strings as `flwr run` takes them, or one TOML file.
        federation: TOML file of Flower's simulation settings; None = federation.toml of the app.
        engine: "flower" or "inprocess".
        resume: folder of a run to go on with; its settings take the place of the app's.
        verbose: show Flower's and Ray's own lines, too.

    Raises:
        ConfigError: before anything is started.
        RunError: the run failed or was stopped.
    """
    if engine == "inprocess":
        show()  # what is said of the data is said once in a process, here when they are checked
    config = read_config(app, overrides, resume)
    simulation = Simulation.read(federation or app / "federation.toml")
    simulation.check_nodes(int(config["strategy.min-train-nodes"]))
    runs = resume or Path(str(config["run.dir"])).expanduser()
    if why := unwritable(runs):
        key = "run.resume" if resume else "run.dir"
        raise ConfigError(f"{key} = {str(runs)!r}: cannot be written ({why}), allowed is an absolute folder that can")
    try:
        with on_stop(interrupt):
            if engine == "inprocess":
                _run_in_process(config, simulation.num_supernodes)
            elif engine == "flower":
                with short_folder() as neutral:
                    run_flower(app, config, simulation, neutral, verbose)
            else:
                raise ConfigError(f"--engine {engine}: allowed are 'flower', 'inprocess'")
    except AtOnce:
        raise
    except KeyboardInterrupt:
        with on_stop(at_once):
            _keep(resume or Path(str(config["run.dir"])) / str(config["run.name"]))
        raise


def _run_in_process(config: dict[str, Scalar], nodes: int) -> None:
    from fedara_flwr import engine
    from fedara_flwr.server.loop import RunFailed

    try:
        engine.run(config, nodes)
    except (RunFailed, TimeoutError) as error:
        raise RunError(str(error)) from None


def _keep(run: Path) -> None:
    """Finish the folder of a run that was stopped, if it has come so far as to have one."""
    if (run / "federated.json").exists():
        from fedara_flwr import log
        from fedara_flwr.runs.keeper import conclude_stopped

        log.show()
        conclude_stopped(run)


def read_config(app: Path, overrides: list[str], resume: Path | None = None) -> dict[str, Scalar]:
    """The app's run configuration, or that of the run to go on with, and the overrides: names, types and values checked.

    Raises:
        ConfigError: as `Settings.from_flat`, or for an unknown method, task or option, or a partition that does not suit
            the task.
    """
    if resume is not None:
        config: dict[str, Scalar] = {**run_config(resume), "run.resume": str(resume)}
    else:
        try:
            table = tomllib.loads((app / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
            config = flatten_dict(table)
        except (OSError, KeyError, TypeError, AttributeError):  # there is none, or something that is no table
            raise ConfigError(f"{app}: no Flower app (no pyproject.toml with [tool.flwr.app.config])") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{app}/pyproject.toml cannot be read ({first_line(error)})") from None
    for text in overrides:
        config |= _parse_override(text)
    for key, value in config.items():
        if key.replace("_", "-") in NODES:
            raise ConfigError(f"{key} = {value}: there is no such key; see num-supernodes in federation.toml")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(f"{key} = {value}: allowed are whole numbers of 64 bits, as Flower sends them")
    config["run.dir"] = config.get("run.dir") or str(_runs(app))
    settings = read_settings(config)
    config["run.name"] = settings.run.name or new_name(settings.method)
    find(settings.method).check(settings)
    task = open_task(settings.data)
    check_partition(settings.data, task.grouped, task.group_key)
    # Flower runs apps from a folder of its own, where a relative path means nothing
    if settings.data.path:
        from fedara_flwr.data.files import places
        from fedara_flwr.data.sources import load

        found = places(settings.data.path, f"data.path = {settings.data.path!r}")
        config["data.path"] = ",".join(map(os.path.abspath, found))  # a link stays one: what it points to may have no ending

        data = read_settings(config).data
        load(data, settings.seed, open_task(data))
    if os.path.isdir(folder := os.path.expanduser(settings.model.name)):
        config["model.name"] = str(Path(folder).resolve())
    return config


def _runs(app: Path) -> Path:
    """Where runs go by default: into the app's folder, or, where that is read-only, below the user's own FLWR_HOME."""
    beside = app / "runs"
    return flwr_home() / "runs" if os.environ.get("FLWR_HOME") and unwritable(beside) else beside


def _home(app: Path) -> Path:
    """Flower's home for a run of the app: the user's own, or in the app's folder.

    Raises:
        ConfigError: it cannot be written.
    """
    home = flwr_home().absolute() if os.environ.get("FLWR_HOME") else app / ".flwr"
    if why := unwritable(home):
        line = f"Flower's folder {home} cannot be written ({why})"
        raise ConfigError(f"{line}: the environment variable FLWR_HOME names another, which also takes the runs")
    return home


def _parse_override(text: str) -> dict[str, Scalar]:
    """One `--run-config` string, by Flower's own parser, or TOML file; what Flower would pass over in silence is refused."""
    if text.lower().endswith(".toml") and "=" not in text:
        try:
            parsed = flatten_dict(tomllib.loads(Path(text).expanduser().read_text(encoding="utf-8-sig")))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"--run-config {text!r}: cannot be read ({first_line(error)})") from None
        if not parsed:
            raise ConfigError(f"--run-config {text!r}: it holds no key")
        return parsed
    pair = r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)"
    rest = re.sub(pair, "", text).strip()
    for key, value in re.findall(pair, text):
        try:
            tomllib.loads(f"value = {value}")
        except (ValueError, RecursionError):
            allowed = "numbers such as 0.01, true, false, and text in quotes"
            allowed += " (single ones where there is a \\ in it)" if "\\" in value else ""
            raise ConfigError(
                f"--run-config: {key} = {printable(value[:200])} is no TOML value, allowed are {allowed}"
            ) from None
    try:
        # Flower would open whatever ends with .toml
        parsed = {} if rest else parse_config_args([text])
    except (click.ClickException, ValueError, OSError) as error:
        raise ConfigError(f"--run-config {text!r}: {str(error).splitlines()[0]}") from None
    if not parsed:
        allowed = "\"key='text' key=1 key=true\", with blanks between pairs and nowhere else, or a .toml file by itself"
        raise ConfigError(f"--run-config {text!r}: {rest or text!r} is no key=value, allowed is {allowed}")
    return parsed


def run_flower(app: Path, config: dict[str, Scalar], simulation: Simulation, neutral: Path, verbose: bool) -> None:
    """Run any Flower app in simulation on a SuperLink of its own.

    Args:
        config: its run configuration, whole.
        neutral: an empty folder, as `short_folder` makes them.

    Raises:
        ConfigError: this machine, or the Ray cluster of RAY_ADDRESS, is not fit for it.
        RunError: the run failed or was stopped.
    """
    home = _home(app)
    lines = [f"{key} = {_toml(value)}\n" for key, value in config.items()]
    (neutral / "run.toml").write_text("".join(lines), encoding="utf-8")
    (neutral / "federation.toml").write_text(simulation.toml(), encoding="utf-8")
    env = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
        "TOKENIZERS_PARALLELISM": "false",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        TAG: uuid.uuid4().hex,
        **without_proxy(),
        **cluster.environment(app, home),
    }
    if env[cluster.ADDRESS] == cluster.LOCAL:
        simulation.check_machine()
        env[TMPDIR] = ray_folder(neutral)
    else:
        print(cluster.check(config, simulation, env, neutral), flush=True)
        if env.get(cluster.AUTH_MODE) != "token":
            print(cluster.OPEN, flush=True)
    for name, why in unusable().items():
        print(f"{name} is left out for Flower's processes, which would end at it: {why}", flush=True)
    print(f"starting Flower, {simulation.num_supernodes} simulated nodes: half a minute, longer on a busy machine", flush=True)
    with _superlink(env, neutral) as (process, port):
        env["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"] = str(port)
        arguments = ["run", str(app), *(f"--{kind}-config={neutral / kind}.toml" for kind in ("federation", "run"))]
        run_id = str(_flwr(arguments, env, neutral)["run-id"])
        hidden, last = _show_log(run_id, env, neutral, verbose)
        status, details = _wait(run_id, env, neutral, process)
        if status != "finished:completed":
            details = re.sub(r"^(Simulation|ServerApp) failed with exception: ", "", details)
            told = f"error: {details}\n" in last  # by the run itself, which knows better than what Flower prints
            sys.stdout.writelines([] if told else hidden)
            details = cause(last, errors=not told) or details
            raise RunError(f"run {run_id} ended as {status.partition(':')[2]}{': ' if details else ''}{details}")


def _show_log(run_id: str, env: dict[str, str], cwd: Path, verbose: bool) -> tuple[Iterable[str], Iterable[str]]:
    """Show the run's lines until it ends; the last of Flower's and Ray's own, which were not shown, and the last of all."""
    hidden: deque[str] = deque(maxlen=HIDDEN_KEPT)
    last: deque[str] = deque(maxlen=LAST_KEPT)
    command = ["flwr", "log", run_id, "--stream"]
    spoken = threading.Event()
    threading.Thread(target=_watch, args=(spoken, run_id, env, cwd), daemon=True).start()
    with subprocess.Popen(command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as log:
        for line in log.stdout or ():
            last.append(line)
            if verbose or not NOISE.match(line[:1000]):  # its search takes the square of a line of blanks
                spoken.set()
                sys.stdout.write(line)
                sys.stdout.flush()
            else:
                hidden.append(line)
    spoken.set()
    return hidden, last


def _watch(spoken: threading.Event, run_id: str, env: dict[str, str], cwd: Path) -> None:
    """Say after a minute, and again ever less often, that nothing has come of the run, until it has `spoken`."""
    wait = silence = SILENCE_SECONDS
    while not spoken.wait(wait):
        status = "not known"
        with contextlib.suppress(RunError, LookupError):
            status = str(_flwr(["list", "--run-id", run_id], env, cwd)["runs"][0]["status"])
        what = "its server process does not speak" if status == "running" else "its server process has not begun"
        advice = "are there free cores and memory? -v shows Flower's lines, Ctrl-C ends it"
        print(f"no line of the run in {silence:g} s: {what} (Flower's status: {status}); {advice}", flush=True)
        wait, silence = silence, 2 * silence


def _toml(value: Scalar) -> str:
    # JSON's strings, numbers and booleans are TOML's
    return json.dumps(value, ensure_ascii=False)


def _flwr(arguments: list[str], env: dict[str, str], cwd: Path) -> dict:
    """Run a `flwr` command; its JSON answer, or RunError where it failed."""
    done = subprocess.run(["flwr", *arguments, "--format", "json"], env=env, cwd=cwd, capture_output=True, text=True)
    try:
        answer = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        raise RunError(f"flwr {arguments[0]} failed: {(done.stderr or done.stdout).strip()[-500:]}") from None
    if not answer.get("success", done.returncode == 0):
        raise RunError(f"flwr {arguments[0]} failed: {answer.get('error-message', answer)}")
    return answer


def _wait(run_id: str, env: dict[str, str], cwd: Path, process: subprocess.Popen) -> tuple[str, str]:
    """Wait for the run to end; its final status and the details."""
    while True:
        if process.poll() is not None:  # `flwr list` would start another one, which knows no run
            raise RunError(f"flower-superlink ended with code {process.returncode}: {_tail(cwd / 'superlink.log')}")
        run = _flwr(["list", "--run-id", run_id], env, cwd)["runs"][0]
        if str(run["status"]).startswith("finished"):
            return str(run["status"]), str(run.get("status-details") or "")
        time.sleep(0.5)


@contextlib.contextmanager
def _superlink(env: dict[str, str], cwd: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """A SuperLink of our own; it and every process that came of it are gone afterwards."""
    log = (cwd / "superlink.log").open("w")
    command = [*superlink.command(), "--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1"]
    try:
        for _ in range(5):
            port = _free_port()
            process = subprocess.Popen(
                [*command, "--port", str(port)], env=env, cwd=cwd, stdout=log, stderr=log, start_new_session=True
            )
            if _healthy(process, port):
                break
        else:
            raise RunError(f"flower-superlink does not start: {_tail(cwd / 'superlink.log')}")
        yield process, port
    finally:
        end_tagged(env[TAG])
        log.close()


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-500:].strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _healthy(process: subprocess.Popen, port: int) -> bool:
    """Whether our own process, still alive, answers on the port."""
    deadline, direct = time.monotonic() + START_SECONDS, urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with direct.open(f"http://127.0.0.1:{port}/health", timeout=2):
                return process.poll() is None and _listens(process.pid, port)
        except OSError:
            time.sleep(0.1)
    return False


def _listens(pid: int, port: int) -> bool:
    """Whether `pid` itself, not a stranger who took the port first, listens on it."""
    connections = psutil.Process(pid).net_connections(kind="tcp")
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections)
