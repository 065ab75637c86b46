"""What `fedara run` checks of the machine before it starts, and the causes that its last line names."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import tomllib
import uuid
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
from test_flower import FEDARA, clone, overrides
from typer.testing import CliRunner

from fedara_flwr.cli import app, launch, simulation
from fedara_flwr.cli.launch import _parse_override
from fedara_flwr.cli.processes import TAG, AtOnce, end_tagged, interrupt, on_stop
from fedara_flwr.cli.simulation import Simulation, cause, fits, ray_folder, short_folder
from fedara_flwr.keys import ConfigError
from fedara_flwr.log import ends_by

ROOT = Path(__file__).parents[2]
HEALTH = ROOT / "docker" / "health.py"


def read(tmp_path: Path, text: str) -> Simulation:
    file = tmp_path / "f.TOML"
    file.write_text(text, encoding="utf-8")
    return Simulation.read(file)


def test_what_is_read_is_what_flower_is_told(tmp_path):
    text = (
        "num-supernodes = 20\nclient-resources-num-cpus = 1\nclient-resources-num-gpus = 1\ninit-args-log-to-driver = false\n"
    )
    assert tomllib.loads(read(tmp_path, "\ufeff" + text).toml()) == tomllib.loads(text)
    assert read(tmp_path, "") == Simulation() and Simulation().toml() == ""


@pytest.mark.parametrize(
    "text, line",
    [
        ("client-resources-num-cpus = 0.5", "client-resources-num-cpus = 0.5: input should be a valid integer"),
        ("num-supernodes = 0", "num-supernodes = 0: input should be greater than or equal to 1"),
        ("num-supernode = 4", "there is no such key; did you mean "),
        ("num-supernodes = four", "cannot be read (Invalid value"),
        ("num-supernodes = " + "[" * 5000, "cannot be read (maximum recursion depth exceeded"),
        (
            "[client-resources]\nnum-cpus = 1",
            "no table and no list is allowed, but flat keys such as client-resources-num-cpus",
        ),
        ("init-args-include-dashboard = true", "there is no such key; did you mean 'init-args-"),
        ("init-args-logging-level = 'LOUD'", "init-args-logging-level = 'LOUD': input should be 'DEBUG', "),
        ("client-resources-num-gpus = 'all'", "client-resources-num-gpus = 'all': input should be a valid number"),
    ],
)
def test_a_setting_that_flower_would_fail_at(tmp_path, text, line):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert f"{tmp_path}/f.TOML: " in str(caught.value) and line in str(caught.value) and "\n" not in str(caught.value)


def test_clients_larger_than_the_machine(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    Simulation(client_resources_num_cpus=4).check_machine()
    Simulation(client_resources_num_cpus=8, init_args_num_cpus=8).check_machine()  # the user says so
    with pytest.raises(ConfigError, match="client-resources-num-cpus = 8: allowed here is at most 4"):
        Simulation(client_resources_num_cpus=8).check_machine()
    with pytest.raises(ConfigError, match="client-resources-num-cpus = 4: allowed here is at most 2"):
        Simulation(client_resources_num_cpus=4, init_args_num_cpus=2).check_machine()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    for share, told, line in (
        (8.0, 4, "at most 4, init-args-num-gpus"),
        (0.5, 0, "at most 0"),
        (1.5, None, "whole numbers alone"),
    ):
        with pytest.raises(ConfigError, match=line):
            Simulation(client_resources_num_cpus=1, client_resources_num_gpus=share, init_args_num_gpus=told).check_machine()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match="client-resources-num-gpus = 0.5: allowed here is at most 0, the machine's GPUs"):
        Simulation(client_resources_num_cpus=1, client_resources_num_gpus=0.5).check_machine()


def test_a_folder_with_room_for_sockets(tmp_path, monkeypatch):
    """A long TMPDIR, as on a cluster's scratch disk, or one with letters that Ray cannot open, is passed by."""
    for name in ("a" * 60, "ä"):
        place = tmp_path / name
        place.mkdir()
        monkeypatch.setattr(simulation.tempfile, "tempdir", str(place))
        with short_folder() as folder:
            assert fits(str(folder)) and folder.stat().st_mode & 0o777 == 0o700 and place not in folder.parents
        assert not folder.exists()
    longest = simulation.LONGEST_SOCKET - len(simulation.SOCKET)
    assert longest == 39 and fits("/" * longest) and not fits("/" * (longest + 1))
    monkeypatch.setenv("RAY_TMPDIR", "/scratch/" + "a" * 40)
    with pytest.raises(ConfigError, match="RAY_TMPDIR = '/scratch/a+': allowed are at most 39 ASCII letters"):
        ray_folder(folder)
    for told in ("scratch", "/dev/null", "/dev/null/scratch"):
        monkeypatch.setenv("RAY_TMPDIR", told)
        with pytest.raises(ConfigError, match=f"RAY_TMPDIR = '{told}': allowed is an absolute folder that can be written"):
            ray_folder(folder)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert ray_folder(folder) == "/tmp"


def test_a_temporary_folder_that_is_relative_or_none(tmp_path, monkeypatch):
    """Flower's processes run in another folder; a container's user may have no home."""
    monkeypatch.chdir("/tmp")
    monkeypatch.setattr(tempfile, "tempdir", ".")
    with short_folder() as folder:
        assert folder.is_absolute() and folder.parent == Path("/tmp")
    monkeypatch.setattr(tempfile, "gettempdir", Mock(side_effect=FileNotFoundError("no usable temporary directory")))
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("no home")))
    with short_folder() as folder:
        assert folder.parent == Path("/tmp")
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setenv("TMPDIR", "/full")
    with pytest.raises(ConfigError, match="TMPDIR = '/full': allowed are folders that can be written"), short_folder():
        pass


def test_docstrings_are_needed():
    done = subprocess.run([sys.executable, "-OO", "-m", "fedara_flwr.cli", "methods"], capture_output=True, text=True, cwd=ROOT)
    assert (
        done.returncode == 1
        and done.stderr == "error: PYTHONOPTIMIZE = 2: allowed are 0 and 1, transformers reads docstrings\n"
    )


def test_a_working_folder_that_is_gone_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    told = CliRunner().invoke(app, ["run"])
    assert told.exit_code == 1 and told.output == "error: the working folder is gone: cd to another one\n"


def test_the_health_check_passes_by_a_proxy(tmp_path):
    """The proxy is a port where nobody answers."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{closed.getsockname()[1]}"
    server = HTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    threading.Thread(target=server.handle_request).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    env = {key: value for key, value in os.environ.items() if key.lower() != "no_proxy"} | {"http_proxy": proxy}
    done = subprocess.run([sys.executable, HEALTH, url], env=env, capture_output=True, text=True, timeout=30)
    server.server_close()
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "lines, expected",
    [
        (["ValueError: ActorPool is empty. Stopping Simulation."], "no client fits: "),
        (["OSError: AF_UNIX path length cannot exceed 107 bytes: /scratch", "RuntimeError: later"], "RAY_TMPDIR is too long"),
        (["  fedara_flwr.keys.ConfigError: model.name = 'x': there is none", "RuntimeError: Exception in ServerApp thread."],
         "fedara_flwr.keys.ConfigError: model.name = 'x': there is none"),
        (["Exception: The current node timed out during startup. This", "RuntimeError: Simulation Runtime crashed.",
          "RuntimeError: An error was encountered. Ending simulation."], "Ray does not start: too little memory"),
        (["Exception: a backend", "RuntimeError: Simulation Runtime crashed."], "Exception: a backend"),
        (["OSError: [Errno 24] Too many open files: 'x'", "RuntimeError: later"], "ulimit -n allows too few open files"),
        (["RuntimeError: can't start new thread"], "ulimit -u allows too few"),
        (["INFO: all is well"], ""),
    ],
)  # fmt: skip
def test_what_a_failure_comes_from(lines, expected):
    found = cause(lines)
    assert found.startswith(expected) and bool(found) == bool(expected)
    assert cause(lines, errors=False) == ("" if expected.startswith(("fedara_flwr", "Exception")) else found)


@pytest.mark.parametrize(
    "text, line",
    [
        (
            "train.learning-rate=.01",
            "train.learning-rate = .01 is no TOML value, allowed are numbers such as 0.01, true, false",
        ),
        ("seed=1 train.checkpointing=True", "train.checkpointing = True is no TOML value"),
        ("method='fedara", "method = 'fedara is no TOML value"),
        ("method 'fedara'", "is no key=value"),
        ("method = 'fedara'", "with blanks between pairs and nowhere else, or a .toml file"),
        (r'data.path="C:\Users\x"', r"text in quotes (single ones where there is a \ in it)"),
        ("data.path='a\nb'", "data.path = 'a?b' is no TOML value"),
        ("seed=" + "1" * 5000, "111 is no TOML value"),
        ("seed=" + "[" * 5000, "[[[ is no TOML value"),
        ("absent.toml", "'absent.toml': cannot be read ([Errno 2] No such file"),
        ("seed=1 own.toml", "'own.toml' is no key=value, allowed is"),
        ("own.toml seed=1", "or a .toml file by itself"),
    ],
)
def test_an_override_that_is_none(text, line):
    with pytest.raises(ConfigError) as caught:
        _parse_override(text)
    assert line in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, line",
    [
        ("num_clients=5", "num_clients = 5: there is no such key; see num-supernodes in federation.toml"),
        (f"num-server-rounds={2**63}", f"num-server-rounds = {2**63}: allowed are whole numbers of 64 bits"),
    ],
)
def test_a_key_that_is_another_file_s_and_a_number_that_flower_cannot_send(text, line):
    with pytest.raises(ConfigError) as caught:
        launch.read_config(ROOT, [text])
    assert str(caught.value).startswith(line)


def test_a_folder_that_is_no_app_lacks_its_file(tmp_path):
    with pytest.raises(ConfigError, match=r"no Flower app \(no pyproject.toml with \[tool.flwr.app.config\]\)$"):
        launch.read_config(tmp_path, [])


@pytest.mark.parametrize(
    "text, line",
    [
        (b"tool = 3", "no Flower app"),
        (b"[tool.flwr.app]\nconfig = 3", "no Flower app"),
        (b"[tool.flwr.app.config]\nseed = [1]", "pyproject.toml cannot be read (The value for key seed needs to be of type"),
        (b"[tool.flwr.app.config]\nmethod = '\xe4'", "pyproject.toml cannot be read ('utf-8' codec"),
    ],
)
def test_an_app_s_file_that_cannot_be(tmp_path, text, line):
    (tmp_path / "pyproject.toml").write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        launch.read_config(tmp_path, [])
    assert line in str(caught.value)


def test_fewer_nodes_than_train_in_a_round_are_refused_before_anything_starts(tmp_path):
    """Nobody joins a simulation: the run would wait for `strategy.node-timeout`."""
    (federation := tmp_path / "federation.toml").write_text("num-supernodes = 1\n")
    with pytest.raises(ConfigError, match=r"^num-supernodes = 1: by strategy.min-train-nodes allowed is 2 or more$"):
        launch.launch(ROOT, [f"run.dir='{tmp_path}'"], federation, "inprocess")


def test_a_file_of_overrides(tmp_path):
    """As an editor of Windows leaves it."""
    file = tmp_path / "run.TOML"
    file.write_text("\ufeffseed = 3\n[train]\nlearning-rate = 0.01\n")
    assert _parse_override(str(file)) == {"seed": 3, "train.learning-rate": 0.01}
    file.write_text("seed = " + "[" * 5000)
    with pytest.raises(ConfigError, match="cannot be read .maximum recursion depth exceeded"):
        _parse_override(str(file))
    file.write_text("# nothing yet\n")
    with pytest.raises(ConfigError, match="it holds no key"):
        _parse_override(str(file))


def test_a_launch_in_a_thread():
    """Python lets the main thread alone take signals."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with on_stop(None):
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors


def test_flower_s_home_is_the_user_s_own(tmp_path, monkeypatch):
    """As where the clone is read-only; a file stands in for a folder that may not be written, which root always may."""
    app, mine = tmp_path / "app", tmp_path / "mine"
    app.mkdir()
    monkeypatch.delenv("FLWR_HOME", raising=False)
    assert launch._home(app) == app / ".flwr" and launch._runs(app) == app / "runs"
    for name in ("runs", ".flwr"):
        (app / name).write_text("a file")
    assert launch._runs(app) == app / "runs"
    with pytest.raises(ConfigError) as caught:
        launch._home(app)
    line = f"Flower's folder {app}/.flwr cannot be written ({app}/.flwr is no folder): the environment variable FLWR_HOME names"
    assert str(caught.value).startswith(line)
    monkeypatch.setenv("FLWR_HOME", str(mine))
    assert launch._home(app) == mine and launch._runs(app) == mine / "runs" and not mine.exists()
    monkeypatch.setenv("FLWR_HOME", str(app / "runs" / "mine"))
    with pytest.raises(ConfigError, match=r"runs/mine cannot be written \(.*app/runs is no folder\)"):
        launch._home(app)


@pytest.mark.parametrize("engine", ["flower", "inprocess"])
def test_runs_that_cannot_be_written(tmp_path, tiny_bert, engine):
    """Nothing is started, no model is loaded."""
    app = clone(tmp_path / "app")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run.dir = '.*file/runs': cannot be written \(.*file is no folder\), allowed is an"):
        launch.launch(app, [f"run.dir='{tmp_path}/file/runs'", f"model.name='{tiny_bert}'"], None, engine)


def test_a_run_without_a_word_is_spoken_of(tmp_path, monkeypatch, capsys):
    status, spoken = iter(["pending", "running"]), threading.Event()

    def flwr(*_):
        try:
            return {"runs": [{"status": next(status)}]}
        except StopIteration:
            spoken.set()
            raise launch.RunError("gone") from None

    monkeypatch.setattr(launch, "_flwr", flwr)
    monkeypatch.setattr(launch, "SILENCE_SECONDS", 0.02)
    launch._watch(spoken, "7", {}, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(";")[0] for line in lines] == [
        "no line of the run in 0.02 s: its server process has not begun (Flower's status: pending)",
        "no line of the run in 0.04 s: its server process does not speak (Flower's status: running)",
        "no line of the run in 0.08 s: its server process has not begun (Flower's status: not known)",
    ]
    assert all("are there free cores and memory?" in line for line in lines)


def test_the_second_ctrl_c_is_another(capsys):
    before = signal.getsignal(signal.SIGINT)
    with on_stop(interrupt):
        with pytest.raises(KeyboardInterrupt) as caught:
            signal.raise_signal(signal.SIGINT)
        assert not isinstance(caught.value, AtOnce) and "Ctrl-C again ends at once" in capsys.readouterr().err
        with pytest.raises(AtOnce):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_processes_end_at_once_where_one_is_interrupted(monkeypatch):
    """They do not heed SIGTERM, as a process that is stopped does not."""
    tag = uuid.uuid4().hex
    process = subprocess.Popen(["sleep", "60"], env=os.environ | {TAG: tag})
    process.send_signal(signal.SIGSTOP)
    wait, calls = psutil.wait_procs, []

    def impatient(found, timeout):
        calls.append([one.pid for one in found])
        if len(calls) == 1:
            raise AtOnce
        return wait(found, timeout)

    monkeypatch.setattr(psutil, "wait_procs", impatient)
    with pytest.raises(AtOnce):
        end_tagged(tag)
    assert calls == [[process.pid]] * 2 and not psutil.pid_exists(process.pid)


def test_an_error_that_ends_a_run_is_the_last_line(caplog, capsys):
    """Of what Flower says of it nothing is left; what it says of other things is."""
    error, flower = ConfigError("seed = -1: allowed is 0 or more"), logging.getLogger("flwr")
    filters = list(flower.filters)
    try:
        with caplog.at_level(logging.ERROR):
            ends_by(error)
            flower.error("%s raised an exception", "ServerApp", exc_info=error)
            flower.error("Exit Code: 201\nFor more information")
            flower.error("Failed to push task output: gone")
            flower.error("another", exc_info=ValueError("of another kind"))
    finally:
        flower.filters[:] = filters
    said = [record.getMessage() for record in caplog.records]
    assert said == ["seed = -1: allowed is 0 or more", "Failed to push task output: gone", "another"]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["s" * 80, "schräg"])
def test_a_run_with_an_odd_tmpdir_behind_a_proxy(tmp_path, tiny_bert, folder):
    """What a cluster gives its jobs: a long TMPDIR, and a proxy for all addresses, which here answers nobody."""
    place = tmp_path / folder
    place.mkdir()
    app = clone(tmp_path / "app")
    silent = socket.socket()
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    env = {key: value for key, value in os.environ.items() if key.lower() not in ("no_proxy", "ray_tmpdir")}
    env |= {"TMPDIR": str(place)}
    env |= dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy"), f"http://127.0.0.1:{silent.getsockname()[1]}")
    command = [*FEDARA, "run", str(app), *overrides(tiny_bert, **{"num-server-rounds": 1})]
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=300)
    silent.close()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "run directory: " in done.stdout and not list(place.glob("fedara-*"))
