"""A run on a Ray cluster: two Ray nodes on this machine, each with an address, a raylet and one CPU of its own.

The second one does not see the cluster's folder: an app in there is on the first machine only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
from deployment import kill_tagged, wait_for
from hypothesis import given
from hypothesis import strategies as st
from runs_helper import config
from test_flower import FEDARA, clone, leftovers, metrics, overrides

from fedara_flwr.cli import cluster
from fedara_flwr.cli.launch import NOISE, _free_port
from fedara_flwr.cli.processes import TAG, tagged
from fedara_flwr.cli.simulation import Simulation
from fedara_flwr.keys import ConfigError
from fedara_flwr.runs.directory import read_facts

RAY = str(Path(sys.executable).parent / "ray")
SECOND = "127.0.0.2"  # Linux answers on all of 127.0.0.0/8
SECONDS = 900  # for a run, on a busy machine
PROBE = '''
from pathlib import Path

import ray

import fedara_flwr


def probe(message, context, call_next):
    """Notes on which Ray node a client trains, and with whose code."""
    if message.metadata.message_type == "train":
        node, address = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
        with Path({file!r}).open("a") as file:
            file.write(f"{{node}} {{address}} {{fedara_flwr.__file__}}\\n")
    return call_next(message, context)
'''


class Cluster:
    """A head and a second Ray node; all their processes carry a tag in their environment."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray's sockets are below it
        self.address = f"127.0.0.1:{_free_port()}"
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "RAY_"))}
        self.env |= {TAG: uuid.uuid4().hex, "OMP_NUM_THREADS": "1"}

    def start(self) -> None:
        port = self.address.rpartition(":")[2]
        self._ray([RAY], "--head", f"--port={port}", f"--temp-dir={self.folder}", "--include-dashboard=false")
        apart = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(self.folder), RAY]
        self._ray(apart, f"--address={self.address}", f"--node-ip-address={SECOND}")

    def _ray(self, command: list[str], *words: str) -> None:
        common = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
        log = self.folder / "start.log"
        with log.open("a") as file:
            command = [*command, "start", *words, *common]
            started = subprocess.run(command, env=self.env, cwd="/", stdout=file, stderr=file, timeout=300)
        assert started.returncode == 0, log.read_text()[-3000:]

    def kill_second(self) -> None:
        """Power off the second node: its raylet, and every worker that the raylet started."""
        for process in tagged(self.env[TAG]):
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if f"--node_ip_address={SECOND}" in words or f"--node-ip-address={SECOND}" in words:
                    process.kill()

    def close(self) -> None:
        kill_tagged(self.env[TAG])
        shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, app: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
        env = {key: value for key, value in self.env.items() if key != TAG} | {"RAY_ADDRESS": self.address}
        return [*FEDARA, "run", str(app), *arguments], env

    def run(self, app: Path, *arguments: str) -> subprocess.CompletedProcess:
        command, env = self.command(app, *arguments)
        return subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=SECONDS)


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    if not shutil.which("unshare") or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("no `unshare --mount` here: it needs Linux and its administrator's rights")
    found = Cluster()
    try:
        found.start()
        yield found
    finally:
        found.close()


def probed(target: Path, notes: Path) -> Path:
    """A clone of the app whose clients note in a file where they train."""
    app = clone(target)
    (app / "fedara_flwr" / "probe.py").write_text(PROBE.format(file=str(notes)))
    source = app / "fedara_flwr" / "client_app.py"
    text = source.read_text()
    changed = text.replace("\napp = ClientApp()\n", "\nfrom fedara_flwr.probe import probe\napp = ClientApp(mods=[probe])\n")
    assert changed != text
    source.write_text(changed)
    return app


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("method, shared", [("fedara", False), ("flora", True)])
def test_a_run_on_two_ray_nodes_is_bit_equal_to_one_in_process(two_nodes, tiny_bert, tmp_path, method, shared):
    """Clients train on both; arrays, masks, bytes and metrics are those of one process.

    The app and FLWR_HOME are on the first machine only, or on both as on a shared file system, which `flora` needs to keep
    pieces of its delta in.
    """
    app = probed((tmp_path if shared else two_nodes.folder) / "app", tmp_path / "trained")
    done = two_nodes.run(app, *overrides(tiny_bert, **{"run.name": "cluster", "method": method}))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert f"Ray cluster {two_nodes.address}: machines: 2, clients at once: 2" in done.stdout
    assert (f"FLWR_HOME is not shared with {SECOND}:" in done.stdout) is not shared
    assert "ClientAppActor pid" not in done.stdout
    lines = (tmp_path / "trained").read_text().splitlines()
    nodes, addresses, files = (set(column) for column in zip(*map(str.split, lines), strict=True))
    assert len(nodes) == len(addresses) == 2 and SECOND in addresses
    assert all("runtime_resources" in file for file in files)  # brought by Ray
    whole = two_nodes.run(app, *overrides(tiny_bert, **{"run.name": "whole", "method": method}), "--engine", "inprocess")
    assert whole.returncode == 0, whole.stderr[-2000:]
    first, second = app / "runs" / "cluster", app / "runs" / "whole"
    (weights,) = [*first.glob("adapter/*.safetensors"), *first.glob("model/*.safetensors")]
    assert weights.read_bytes() == (second / weights.relative_to(first)).read_bytes()
    assert metrics(first) == metrics(second) and len(metrics(first)) > 6
    facts = [read_facts(run) for run in (first, second)]
    assert facts[0]["mask"] == facts[1]["mask"] and facts[0]["bytes"] == facts[1]["bytes"]
    wait_for(lambda: not leftovers(app), 60, lambda: str(leftovers(app)))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
def test_a_machine_without_the_model_is_named_before_anything_starts(two_nodes, tiny_bert, tmp_path):
    app = clone(tmp_path / "app")
    model = shutil.copytree(tiny_bert, two_nodes.folder / "bert")
    done = two_nodes.run(app, *overrides(model))
    said = f"machine {SECOND} of the Ray cluster at {two_nodes.address}: model.name = '{model}': there is no such directory"
    assert done.returncode == 1 and said in done.stderr, done.stdout[-1000:] + done.stderr[-1000:]
    assert not (app / "runs").exists() and leftovers(app) == []


HOLD = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
holder = ray.remote(num_cpus=1)(type("Holder", (), {"there": lambda self: True})).remote()
print(ray.get(holder.there.remote()), flush=True)
time.sleep(3600)
"""


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
def test_a_cluster_in_use_is_refused(two_nodes, tiny_bert, tmp_path):
    """Flower would give half of the messages to an actor that never starts, and could not be stopped by its own deadline."""
    app = clone(tmp_path / "app")
    command = [sys.executable, "-c", HOLD, two_nodes.address]
    with subprocess.Popen(command, env=two_nodes.env, cwd="/", stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "True\n"
            done = two_nodes.run(app, *overrides(tiny_bert))
        finally:
            holder.kill()
    assert done.returncode == 1 and "other jobs hold 1 of 2 CPU" in done.stderr, done.stdout[-1000:] + done.stderr[-1000:]
    assert not (app / "runs").exists() and leftovers(app) == []


@pytest.mark.slow
@pytest.mark.timeout(3 * SECONDS)
def test_a_ray_node_that_dies_ends_the_run_which_then_goes_on(two_nodes, tiny_bert, tmp_path):
    """Last: the second node does not come back."""
    app = clone(tmp_path / "app")
    options = overrides(tiny_bert, **{"num-server-rounds": 60})
    command, env = two_nodes.command(app, *options, "-c", "run.name='died'")
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/")
    watchdog = threading.Timer(SECONDS, process.kill)
    watchdog.start()
    try:
        said = ""
        for line in process.stdout:
            said += line
            if line.lstrip().startswith("3/"):
                two_nodes.kill_second()
        assert process.wait() == 1 and "a client process of the simulation died" in said, said[-3000:]
    finally:
        watchdog.cancel()
        process.send_signal(signal.SIGTERM)  # ends what it started; nothing where it has ended
        process.wait(120)
    run = app / "runs" / "died"
    assert 3 <= read_facts(run)["rounds"] < 60
    resumed = two_nodes.run(app, "--resume", str(run))
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-2000:]
    assert "machines: 1, clients at once: 1" in resumed.stdout and read_facts(run)["rounds"] == 60


# -- without a cluster ----------------------------------------------------------------------------------------------
def test_without_an_address_ray_starts_afresh(monkeypatch, tmp_path):
    """Else Ray would join what somebody started on this machine last."""
    for value in (None, "", "local"):
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        if value is not None:
            monkeypatch.setenv("RAY_ADDRESS", value)
        found = cluster.environment(tmp_path, tmp_path)
        assert found.pop("RAY_AUTH_TOKEN") != cluster.environment(tmp_path, tmp_path)["RAY_AUTH_TOKEN"]  # one for each run
        assert found == {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


HOLD = """
import psutil, ray
ray.init(include_dashboard=False, num_cpus=1, log_to_driver=False)
processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
hosts = {c.laddr.ip.removeprefix("::ffff:") for p in processes for c in p.net_connections("inet") if c.status == "LISTEN"}
print(ray.get_runtime_context().gcs_address, *hosts, flush=True)
input()
"""
JOIN = """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False)
print("ran", ray.get(ray.remote(num_cpus=0)(lambda: 7).remote()))
"""


@pytest.mark.slow
def test_a_ray_of_our_own_is_closed(monkeypatch, tmp_path):
    """It listens on this machine alone, and a process without its token runs nothing there."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    env = os.environ | cluster.environment(tmp_path, tmp_path)
    stranger = {key: value for key, value in env.items() if key not in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS")}
    strangers = [stranger, stranger | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD], env=env, **pipes) as holder:
        address, *hosts = holder.stdout.readline().split()
        assert hosts == ["127.0.0.1"]
        command = [sys.executable, "-c", JOIN, address]
        joins = [
            subprocess.Popen(command, env=one, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for one in strangers
        ]
        owner = env | {"RAY_ADDRESS": address}
        assert "ran 7" in subprocess.run(command, env=owner, capture_output=True, text=True, timeout=120).stdout
        for join in joins:
            try:
                said, _ = join.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                join.kill()
                said, _ = join.communicate()
            assert "ran" not in said.split(), said
        holder.communicate("\n")


def test_a_cluster_is_brought_the_app_and_its_home(monkeypatch, tmp_path):
    app = clone(tmp_path / "app")
    monkeypatch.setenv("RAY_ADDRESS", "head.example:6379")
    found = cluster.environment(app, tmp_path / "home")
    runtime = json.loads(found["RAY_JOB_CONFIG_JSON_ENV_VAR"])["runtime_env"]
    assert found["RAY_ADDRESS"] == "head.example:6379"
    assert runtime["py_modules"] == [str(app / "fedara_flwr")] and runtime["env_vars"] == {"FLWR_HOME": str(tmp_path / "home")}


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:", "6379"])
def test_an_address_that_flower_cannot_join_is_refused(monkeypatch, tmp_path, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS = .*allowed are 'HOST:PORT'"):
        cluster.environment(tmp_path, tmp_path)


def test_a_head_that_does_not_answer_ends_the_run_at_once(tiny_bert, tmp_path, monkeypatch):
    """Ray tries for minutes. A port that is bound, but not listened on, refuses every connection."""
    app = clone(tmp_path / "app")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        command = [*FEDARA, "run", str(app), *overrides(tiny_bert)]
        env = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")} | {"RAY_ADDRESS": address}
        done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and f"RAY_ADDRESS = '{address}': no Ray head answers there" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (app / "runs").exists()


def test_resources_that_only_a_new_ray_can_be_given_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="init-args-num-cpus = 4: not with RAY_ADDRESS = 'auto'"):
        cluster.check({}, Simulation(init_args_num_cpus=4), {"RAY_ADDRESS": "auto", "FLWR_HOME": str(tmp_path)}, tmp_path)


HERE = {"torch": "2.13.0", "the digest of the data": "aa", "shared": True}


def answer(*machines: dict, short: str = "") -> dict:
    named = [{"address": f"10.0.0.{i}", "room": 2, "found": HERE} | machine for i, machine in enumerate(machines, start=1)]
    return {"here": HERE, "machines": named, "short": short}


def test_what_is_said_of_a_cluster(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    say = lambda found: cluster.judge(found, "head:6379", 1, 0.0)  # noqa: E731
    assert say(answer({}, {})) == "Ray cluster head:6379: machines: 2, clients at once: 4"
    assert say(answer({"room": 20})).endswith("clients at once: 20")  # 16 + 4
    assert say(answer({"room": 21})).endswith("clients at once: 21, of which Flower runs 20 from this machine")
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert say(answer({"room": 33})).endswith("of which Flower runs 32 from this machine")
    assert "FLWR_HOME is not shared with 10.0.0.2:" in say(answer({}, {"found": HERE | {"shared": False}}))


@pytest.mark.parametrize(
    "found, words",
    [
        (answer(), "client-resources-num-cpus = 2, client-resources-num-gpus = 0.5: no machine of the Ray cluster"),
        (answer({}, {"found": {"error": "data.path = '/x': no such file"}}), "machine 10.0.0.2 .*: data.path = '/x': no such"),
        (answer({}, {"found": HERE | {"torch": "2.9.1"}}), r"10.0.0.2 .*: torch is 2.9.1, on this machine 2.13.0"),
        (answer({}, short="3 of 4 CPU"), "RAY_ADDRESS = 'head:6379': other jobs hold 3 of 4 CPU"),
        ({"error": "Version mismatch"}, "RAY_ADDRESS = 'head:6379': Version mismatch"),
    ],
)
def test_a_cluster_that_does_not_do_is_refused_with_the_machine_and_why(found, words):
    with pytest.raises(ConfigError, match=words):
        cluster.judge(found, "head:6379", 2, 0.5)


def test_what_a_machine_finds(tiny_bert, tmp_path):
    """The same twice; another digest for other data; a word for what is not there; whether FLWR_HOME is the asker's."""
    mark = tmp_path / "home" / "mark"
    flat = config(tiny_bert)
    first, again = (cluster.look(flat, str(mark)) for _ in range(2))
    assert first == again and first["shared"] is False and first["torch"] == version("torch").partition("+")[0]
    mark.touch()
    other = cluster.look(flat | {"data.validation": 0.02}, str(mark))
    assert other["shared"] is True and {key for key in first if first[key] != other[key]} == {
        "the digest of the data",
        "shared",
    }
    copy = shutil.copytree(tiny_bert, tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()) | {"layer_norm_eps": 1e-5}))
    name = f"the folder of model.name = {str(copy)!r}"
    assert cluster.look(flat | {"model.name": str(copy)}, str(mark))[name] not in first.values()
    assert "no such directory" in cluster.look(flat | {"model.name": "/nowhere"}, str(mark))["error"]


@given(cpus=st.integers(0, 64), gpus=st.integers(0, 8), one=st.integers(1, 8), share=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_the_room_of_a_machine_is_what_flower_counts(cpus, gpus, one, share):
    """Clients are placed one by one until CPUs or GPUs run out."""
    expected, used_cpus, used_gpus = 0, one, share
    while used_cpus <= cpus and (share == 0 or used_gpus <= gpus):
        expected, used_cpus, used_gpus = expected + 1, used_cpus + one, used_gpus + share
    assert cluster._room({"CPU": cpus, "GPU": gpus}, one, share) == expected


@pytest.mark.parametrize(
    "line", ["(ClientAppActor pid=7) x", "(ClientAppActor pid=7, ip=10.0.0.2) x", "\x1b[36m(f pid=7, ip=::1) x"]
)
def test_what_clients_print_is_hidden_on_whatever_machine(line):
    assert NOISE.match(line) and not NOISE.match(line.replace(" pid=", " id="))


def test_deprecations_that_python_hides_by_itself_are_hidden():
    """Flower turns them on for everybody."""
    line = "/a b/torch/jit/_script.py:365: DeprecationWarning: `torch.jit.script_method` is deprecated."
    assert NOISE.match(line) and not NOISE.match(line.replace("Deprecation", "Runtime"))
