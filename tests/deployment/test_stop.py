"""What is left, and how soon, when a run is told to end in the middle of a round: a site's server, and `fedara run`."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from deployment import PATIENCE, free_port, pace, wait_for
from runs_helper import SMALL
from test_deploy import call, environment, init
from test_flower import begin, clone, leftovers, overrides, wait_for_round

from fedara_flwr.cli import processes
from fedara_flwr.cli.deploy import network
from fedara_flwr.runs.directory import read_facts
from fedara_flwr.server.evaluate import ServerModel
from fedara_flwr.tasks import read_settings

# as in a container, the first process in it is the last: all others are killed when it ends
CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
END_SECONDS = 15.0  # on a machine that has nothing else to do
# a node that says what a real one says, and fails all training: a round costs no torch
NODE = """
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedara_flwr.client import terms
from fedara_flwr.model.parts import declared
from fedara_flwr.wire import PROTOCOL

app = ClientApp()


@app.query("whoami")
def whoami(message, context):
    who = {"protocol": PROTOCOL, "client-key": "a", "num-partitions": 0}
    who |= {"terms": ",".join(terms.names()), "parts": ",".join(declared())}
    return Message(RecordDict({"whoami": ConfigRecord(who)}), reply_to=message)


@app.query("ready")
def ready(message, context):
    answer = ConfigRecord(%r)
    return Message(RecordDict({"ready": answer, "metrics": MetricRecord({"num-examples": 24})}), reply_to=message)


@app.train()
def train(message, context):
    raise RuntimeError("it only looks like a node")
"""


def children() -> float:
    """Processor seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextmanager
def script(path: Path, *part: str, within: Sequence[str] = ()) -> Iterator[subprocess.Popen]:
    """A site's script in a session of its own, as in a terminal, and `within` a command; what came of it is gone afterwards."""

    def as_in_a_terminal() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with (path.parent / "test.log").open("a") as log:
        process = subprocess.Popen(
            [*within, "sh", str(path), *part],
            env=environment(),
            cwd="/",
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=as_in_a_terminal,
        )
    try:
        yield process
    finally:
        for one in psutil.process_iter():
            if _session(one) == process.pid:
                one.kill()
        process.wait()


def _session(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except OSError:
        return 0


def seconds_to_end(processes: list[psutil.Process], send: Callable[[], object], adapter: Path) -> dict[str, float]:
    """Seconds from `send` until each process, by its command, is gone and the adapter is there."""
    names, took, began = {process: _name(process) for process in processes}, {}, time.monotonic()
    send()
    while time.monotonic() < began + PATIENCE and (processes or "adapter" not in took):
        time.sleep(0.1)
        gone = [process for process in processes if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE]
        processes = [process for process in processes if process not in gone]  # of an orphan init may take its time to know
        now = time.monotonic() - began
        took |= {names[process]: now for process in gone} | ({"adapter": now} if adapter.exists() else {}) | took
    print(took)
    assert not processes and "adapter" in took, (took, [names[process] for process in processes])
    return took


def _name(process: psutil.Process) -> str:
    words = [word for word in process.cmdline() if re.search("flwr-|flower-|gateway|start.sh", word)]
    return f"{process.pid} {Path(words[0]).name if words else process.name()}"


# the ServerApp as Flower's own process runs it: on the main thread, under Flower's signal handlers
SERVER = """
import json, sys
from types import SimpleNamespace

from flwr.supercore.exit import register_signal_handlers
from flwr.supercore.telemetry import EventType

from fedara_flwr.engine import InProcessGrid
from fedara_flwr.server_app import app

config = json.loads(sys.argv[1])
gone = [lambda: print("Flower knows", flush=True)]
register_signal_handlers(EventType.FLWR_SERVERAPP_RUN_LEAVE, "Task stopped by user.", exit_handlers=gone)
app(InProcessGrid(config, 4), SimpleNamespace(run_config=config))
"""


def test_a_signal_that_comes_twice_by_one_wish_is_one(monkeypatch):
    """`timeout` tells the whole group, and make hands SIGTERM on; Ctrl-C twice, or SIGTERM later, ends at once."""
    monkeypatch.setattr(processes, "ECHO", 60.0)
    with processes.on_stop(processes.interrupt):
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(processes.AtOnce):
            os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(processes, "ECHO", -1.0)
    with processes.on_stop(processes.interrupt):
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(processes.AtOnce):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_process_that_is_ended_leaves_an_adapter(tmp_path, tiny_bert, number):
    """A second signal, as Flower sends one where the SuperExec is gone, changes nothing; Flower's own handler comes last."""
    values = SMALL | {"model.name": str(tiny_bert), "num-server-rounds": 2000, "run.name": "run", "run.dir": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, json.dumps(values)],
        env=environment() | {"FLWR_TELEMETRY_ENABLED": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_round(process, 2)
    before = sum(psutil.Process(process.pid).cpu_times()[:2]) + children()
    process.send_signal(number)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("stopped: what is left is of the"):
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    took = children() - before
    print(f"{signal.Signals(number).name}: {took:.1f} s of a core")
    text, facts = "".join(lines), read_facts(tmp_path / "run")
    assert "Traceback" not in text, text
    assert facts["outcome"] == "stopped" and facts["reason"] == "stopped by the user" and facts["rounds"] >= 2
    assert f"stopped: what is left is of the {facts['rounds']} whole rounds\n" in lines
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert text.index("adapter: ") < text.index("Task stopped by user.") < text.index("Flower knows")
    assert took < END_SECONDS


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_server_that_is_ended_leaves_an_adapter(tmp_path, tiny_bert):
    """`flwr stop`, Ctrl-C on start.sh and SIGTERM, each in the middle of a run; SIGTERM for the SuperExec's own container."""
    names, port = ["stop", "int", "term", "container"], free_port()
    ports = ["--port", str(port), "--superlink-port", str(free_port())]
    site = init(tmp_path / "site", *ports, "--names", "a", host="localhost")
    for folder in ("server", "node-a"):
        file = site / folder / "settings.env"
        text = re.sub("RUNTIME_PORT=.*", f"RUNTIME_PORT={free_port()}", file.read_text())
        file.write_text(text.replace("POLL_SECONDS=0.05", "POLL_SECONDS=0.5"))
    values = SMALL | {"model.name": str(tiny_bert), "num-server-rounds": 1000, "head.start": "random"}
    model = ServerModel(read_settings(values)).expected(frozenset(), frozenset())
    values |= {"strategy.min-train-nodes": 1, "strategy.min-available-nodes": 1, "strategy.max-failed-rounds": 1000}
    app = clone(tmp_path / "app")
    answer = {"fingerprint": model.fingerprint, "tokenizer": model.tokenizer, "data": "own"}
    (app / "fedara_flwr" / "client_app.py").write_text(NODE % answer)

    def running(name: str) -> tuple[str, Path]:
        """The id of a new run that has done a round, and its folder."""
        config = tmp_path / f"{name}.toml"
        given = values | {"run.name": name, "strategy.node-timeout": float(PATIENCE)}
        config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in given.items()))
        told = call(site / "server/flwr.sh", "run", str(app), "site", "--run-config", str(config), "--format", "json").stdout
        folder = site / "server/home/runs" / name
        wait_for(lambda: list(folder.glob("checkpoint/*1.safetensors")), 2 * PATIENCE, (site / "server/test.log").read_text)
        return json.loads(told[told.index("{") :])["run-id"], folder

    def ended(folder: Path, processes: list[psutil.Process], send: Callable[[], object]) -> None:
        took = seconds_to_end(processes, send, folder / "adapter" / "adapter_model.safetensors")
        facts = read_facts(folder)
        assert facts["outcome"] == "stopped" and facts["reason"] == "stopped by the user" and facts["rounds"] >= 1, facts
        assert max(took.values()) < max(END_SECONDS, 2 * pace()), took

    def answers() -> bool:
        return network.own_service(site / "server", port).found.endswith("with server.pem")

    def whole(process: subprocess.Popen) -> list[psutil.Process]:
        above = psutil.Process(process.pid)
        return [above, *above.children(recursive=True)]

    with ExitStack() as stack:
        with script(site / "server/start.sh") as server:
            wait_for(answers)
            assert call(site / "server/register.sh").returncode == 0
            stack.enter_context(script(site / "node-a/start.sh"))
            number, folder = running(names[0])
            apps = [process for process in whole(server) if "flwr-serverapp" in _name(process)]
            ended(folder, apps, lambda: call(site / "server/flwr.sh", "stop", number))
            _, folder = running(names[1])
            ended(folder, whole(server), lambda: os.killpg(server.pid, signal.SIGINT))
        with script(site / "server/start.sh") as server:
            _, folder = running(names[2])
            ended(folder, whole(server), lambda: server.send_signal(signal.SIGTERM))
        if os.getuid() or not shutil.which("unshare"):
            return
        start = site / "server/start.sh"
        for part in ("superlink", "gateway"):
            stack.enter_context(script(start, part))
        wait_for(answers)
        with script(start, "superexec", within=CONTAINER) as outside:
            _, folder = running(names[3])
            inside = psutil.Process(outside.pid).children()[0]
            ended(folder, whole(outside), inside.terminate)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["flower", "inprocess"])
def test_a_second_interrupt_ends_at_once(tiny_bert, tmp_path, engine):
    """Nothing is left running; what the run has kept is there to go on from."""
    app = clone(tmp_path / "app")
    process = begin(app, *overrides(tiny_bert, **{"num-server-rounds": 2000, "run.name": "run"}), "--engine", engine)
    wait_for_round(process, 2)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    for line in process.stdout:
        if "Ctrl-C again ends at once" in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=90) == 130, process.stdout.read()[-2000:]
    print(f"{engine}: {time.monotonic() - began:.1f} s")
    assert leftovers(app) == []
    facts = read_facts(app / "runs" / "run")
    assert facts["outcome"] == "running" and facts["rounds"] >= 2 and not (app / "runs" / "run" / "adapter").exists()
