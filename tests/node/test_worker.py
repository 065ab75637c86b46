"""The resident worker: same results as without, and whatever happens to it, each message is answered once."""

from __future__ import annotations

import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from data_helper import write
from deployment import PATIENCE, TERM, deployment, wait_for
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st
from runs_helper import WALL_CLOCK, config, start
from test_output import save_model
from typer.testing import CliRunner
from work import work

from fedara_flwr import client_app
from fedara_flwr.cli import app as cli
from fedara_flwr.keys import ConfigError
from fedara_flwr.node import worker
from fedara_flwr.node.settings import NodeSettings

NODE = 7
COMMAND = worker.COMMAND


def train(message: Message, context: Context) -> Message:
    """The handler where there is no worker."""
    return work(message, context, "here")


@pytest.fixture
def place(monkeypatch) -> Iterator[Path]:
    """Workers' sockets in a short path of this test alone; a worker that is started knows `work`. None is left."""
    base = Path(tempfile.mkdtemp(prefix="fw-"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    monkeypatch.setattr(worker, "COMMAND", (sys.executable, "-P", str(Path(__file__).with_name("work.py"))))
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    yield worker.folder()
    for pid in worker.running():
        psutil.Process(pid).kill()
        gone(pid)
    shutil.rmtree(base)


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "log"


def context(**node_config) -> Context:
    return Context(1, NODE, node_config, RecordDict(), {})


def message(log: Path, what: str = "", **more: str) -> Message:
    order = ConfigRecord({"what": what, "log": str(log)} | more)
    made = Message(RecordDict({"order": order}), NODE, "train")
    made.metadata.__dict__["_message_id"] = f"{what}-{os.urandom(4).hex()}"
    return made


def who(reply: Message) -> str:
    return str(reply.content.config_records["answer"]["who"])


def done(log: Path) -> list[str]:
    return log.read_text().split()


def gone(pid: int) -> None:
    """Wait for the end of a process, whoever's child it is."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([descriptor], [], [], PATIENCE)[0], f"{pid} is still there"
    os.close(descriptor)


def closed(connection: socket.socket) -> bool:
    """Whether the other end closes without an answer; it may not have read all before."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


class Thread(threading.Thread):
    """A worker in this process: for how it ends, and what it answers."""

    def __init__(self, launcher: int = 0) -> None:
        super().__init__(daemon=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.path = worker.address(NODE)
        self.listener.bind(str(self.path))
        self.listener.listen()
        self.launcher = launcher or os.getpid()
        self.at_once = self.most = 0
        self.start()

    def run(self) -> None:
        def train(message: Message, context: Context) -> Message:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            reply = work(message, context, "thread")
            self.at_once -= 1
            return reply

        worker.serve({"train": train}, self.listener, self.launcher)
        self.listener.close()

    def ended(self) -> bool:
        """Whether it ended and left nothing behind."""
        self.join(PATIENCE)
        return not self.is_alive() and not self.path.exists()

    def stop(self) -> None:
        worker.ask(train, message(Path(os.devnull)), context(**{"worker-idle": 1e-9}))
        assert self.ended()


# -- the same results --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedara", "flora"])  # flora: deltas, in the node's store and state
def test_a_run_by_a_worker_is_bit_equal(tiny_bert, place, monkeypatch, method):
    """Every client's ready, train and evaluate go through one real worker; what happens here instead fails."""
    by_a_worker(config(tiny_bert, method=method, num_server_rounds=3, data__client_validation=0.2), place, monkeypatch)


@pytest.mark.slow
def test_a_language_model_in_a_worker(tmp_path, place, monkeypatch):
    rows = [{"prompt": f"what is {n}?", "completion": f"the number {n}"} for n in range(60)]
    more = {"data__task": "causal-lm", "data__path": str(write(tmp_path / "d.jsonl", rows)), "data__max_length": 40}
    model = save_model(tmp_path / "llama", "llama")
    by_a_worker(config(model, num_server_rounds=3, data__test=0.1, data__client_validation=0.2, **more), place, monkeypatch)


def by_a_worker(flat: dict, place: Path, monkeypatch) -> None:
    """A run of `flat` in one real worker, compared with one without."""
    monkeypatch.setattr(worker, "COMMAND", COMMAND)
    monkeypatch.setattr(worker, "address", lambda node_id: place / "fedara-one")
    asked = []

    def app(message: Message, context: Context) -> Message:
        name = message.metadata.message_type.removeprefix("query.")
        if name == "whoami":
            return client_app.app(message, context)

        def here(*_):
            raise AssertionError("worked without the worker")

        here.__name__ = name
        asked.append(name)
        return worker.ask(here, message, context)

    without = start(flat)
    by_worker = start(flat, app=app)
    assert {"ready", "train"} <= set(asked) and len(worker.running()) == 1
    assert without.state.mask == by_worker.state.mask
    for part, values in without.state.arrays.items():
        assert np.array_equal(values, by_worker.state.arrays[part]), part
    lines = [
        [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in run.lines]
        for run in (without, by_worker)
    ]
    assert lines[0] == lines[1]


def test_reply_state_and_metadata_come_back(place, log):
    """As from the handler itself: a second message meets the first one's state, in the same process."""
    given = context()
    first = message(log)
    reply = worker.ask(train, first, given)
    pid = given.state.config_records["worker"]["pid"]
    assert who(reply) == f"worker {pid}" and pid != os.getpid()
    expected = train(first, context()).metadata
    for name in ("run_id", "src_node_id", "dst_node_id", "reply_to_message_id", "group_id", "message_type"):
        assert getattr(reply.metadata, name) == getattr(expected, name), name
    given.state["more"] = MetricRecord({"x": 0.1})
    assert who(worker.ask(train, message(log), given)) == f"worker {pid}"
    assert given.state.metric_records["more"]["x"] == 0.1
    process = psutil.Process(pid)
    assert os.getsid(pid) == pid and process.environ()["PYTHONPATH"].split(os.pathsep)[0] == str(worker.APP)


def test_an_error_of_the_handler_is_told_once_in_the_same_words(place, log):
    """Flower's reason is made of the type's name and the text; state that was set before stays, as without a worker."""
    given, alone = context(), context()
    with pytest.raises(Exception) as told:
        worker.ask(train, message(log, "raise"), given)
    with pytest.raises(ConfigError) as own:
        train(message(log, "raise"), alone)
    assert done(log) == ["worker", "here"]
    assert str(type(told.value)) == str(type(own.value)) and str(told.value) == str(own.value)
    assert "in work" in told.value.__notes__[0]  # where it happened, for the node's log
    assert list(given.state) == ["worker"]


# -- a worker that does not answer -------------------------------------------------------------------------------------


def test_killed_in_the_middle_the_message_is_worked_on_here(place, log, caplog):
    """Its state is discarded; its socket does not keep the next one from starting."""
    given = context()
    assert who(worker.ask(train, message(log, "die"), given)) == "here"
    assert done(log) == ["worker", "here"] and list(given.state) == ["here"]
    assert len(caplog.records) == 1 and "working without" in caplog.text
    assert worker.address(NODE).exists() and worker.running() == {}
    assert who(worker.ask(train, message(log), given)).startswith("worker")
    assert len(worker.running()) == 1


@pytest.mark.parametrize("command", [(sys.executable, "-c", "raise SystemExit(3)"), ("/nowhere/python",)])
def test_one_that_cannot_start_leaves_the_work_here(place, log, monkeypatch, caplog, command):
    monkeypatch.setattr(worker, "COMMAND", command)
    for _ in range(2):
        assert who(worker.ask(train, message(log), context())) == "here"
    assert done(log) == ["here", "here"] and len(caplog.records) == 2


@pytest.mark.parametrize(
    "nonsense",
    [b"", b"\0", b"\xff\xff\xff\xff", b"\0\0\0\4none" + 8 * b"\0", 12 * b"\0", b"\0\0\0\0" + 2 * b"\0\0\0\3\xff\xff\xff"],
)
def test_a_nonsense_answer_leaves_the_work_here(place, log, nonsense):
    """Nothing, half a frame, a frame too long, an error that is none, an empty reply, no protobuf."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(worker.address(NODE)))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                worker._receive(connection)
                connection.sendall(nonsense)

        thread = threading.Thread(target=answer)
        thread.start()
        given = context()
        assert who(worker.ask(train, message(log), given)) == "here"
        thread.join()
    assert done(log) == ["here"] and list(given.state) == ["here"]


def test_an_answer_to_another_message_does_not_count(place, log, caplog):
    other = train(message(log), context())
    reply = worker.message_to_proto(other).SerializeToString()
    answer = b"".join(struct.pack(">I", len(part)) + part for part in (b"", reply, worker._packed(context())))
    test_a_nonsense_answer_leaves_the_work_here(place, log.with_suffix(".2"), answer)
    assert "another message" in caplog.text


# -- what comes over the socket ----------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=300), min_size=3, max_size=3))
def test_frames_have_an_inverse(parts):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        worker._send(ours, parts)
        assert worker._receive(theirs) == parts


@given(st.binary(max_size=64))
def test_no_bytes_break_the_reader(noise):
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(noise)
        try:
            parts = worker._receive(theirs)
        except (ValueError, ConnectionError):
            return
        assert b"".join(struct.pack(">I", len(part)) + part for part in parts) == noise[: 12 + sum(map(len, parts))]


def test_garbage_is_not_answered_and_hurts_nobody(place, log, caplog):
    """Noise, a frame above the limit, an unknown handler: the connection closes, the next message is answered."""
    thread = Thread()
    frame = struct.pack(">I", 3)
    for garbage in (b"noise", struct.pack(">I", worker.FRAME + 1), frame + b"abc" + 2 * struct.pack(">I", 0)):
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(thread.path))
            other.sendall(garbage)
            other.shutdown(socket.SHUT_WR)
            assert closed(other)
    wait_for(lambda: len(caplog.records) == 3)
    assert f"{worker.FRAME + 1} bytes" in caplog.text
    assert who(worker.ask(train, message(log), context())) == "thread"
    thread.stop()


def test_a_message_above_the_limit_is_not_sent(place, log, monkeypatch, caplog):
    monkeypatch.setattr(worker, "FRAME", 10)
    assert who(worker.ask(train, message(log), context())) == "here"
    assert "allowed are 10" in caplog.text


def as_nobody(task) -> bool:
    """Whether it returns true in a child process of another user."""
    child = os.fork()
    if not child:
        try:
            os.setuid(65534)
            os._exit(0 if task() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's process needs root")
def test_another_user_gets_no_answer(place, log):
    """The folder keeps others out; and if it did not, the worker would."""
    thread = Thread()

    def refused() -> bool:
        with socket.socket(socket.AF_UNIX) as other:
            try:
                other.connect(str(thread.path))
                return closed(other)
            except PermissionError:
                return True

    def reached() -> bool:
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(thread.path))
            return closed(other)

    place.parent.chmod(0o755)
    assert as_nobody(refused) and not as_nobody(reached)
    place.chmod(0o755)
    thread.path.chmod(0o777)
    assert as_nobody(reached)
    place.chmod(0o700)
    assert who(worker.ask(train, message(log), context())) == "thread"
    thread.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's process needs root")
def test_another_users_socket_gets_no_message(place, log, caplog, monkeypatch):
    """One that somebody put there: who asks looks whose it is before a byte is sent."""
    place.parent.chmod(0o755)
    place.chmod(0o777)
    address = place / "fedara-theirs"
    ready = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setuid(65534)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(address))
            listener.listen()
            os.write(ready[1], b"x")
            connection, _ = listener.accept()
            os._exit(0 if connection.recv(1) == b"" else 1)
        finally:
            os._exit(2)
    os.read(ready[0], 1)
    monkeypatch.setattr(worker, "address", lambda node_id: address)  # the folder would be refused before
    assert who(worker.ask(train, message(log), context())) == "here"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert "user 65534" in caplog.text
    place.chmod(0o700)


# -- one at a time -----------------------------------------------------------------------------------------------------


def ask_all(log: Path, count: int) -> list[str]:
    """What so many that ask at once are answered."""
    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda: answers.append(who(worker.ask(train, message(log), context())))) for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_two_that_ask_at_once_are_answered_in_turn(place, log):
    thread = Thread()
    assert ask_all(log, 6) == ["thread"] * 6 and thread.most == 1
    thread.stop()


def test_several_that_ask_first_start_one_worker(place, log):
    """Who finds one just starting works by itself; each is answered once."""
    answers = ask_all(log, 4)
    workers = {answer for answer in answers if answer != "here"}
    assert len(answers) == 4 == len(done(log))
    assert len(workers) == 1 == len(worker.running())


def test_nobody_waits_for_the_work_ends_it(place, log, tmp_path):
    """The ClientApp was stopped: the worker does not work on for no one, and is not met by the next message."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    pid = int(who(worker.ask(train, message(log), context())).split()[1])
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(worker.address(NODE)))
        order = message(log, "hold", pipe=str(pipe))
        worker._send(other, [b"train", worker.message_to_proto(order).SerializeToString(), worker._packed(context())])
        wait_for(lambda: done(log) == ["worker", "worker"])
    gone(pid)
    assert who(worker.ask(train, message(log), context())).startswith("worker")


# -- its end -----------------------------------------------------------------------------------------------------------


def test_it_ends_when_idle(place, log):
    thread = Thread()
    assert who(worker.ask(train, message(log), context())) == "thread" and thread.is_alive()
    worker.ask(train, message(log), context(**{"worker-idle": 0.01}))
    assert thread.ended()


def test_it_ends_above_its_memory(place, log, caplog):
    """The answer is given; the next message finds a fresh one."""
    thread = Thread()
    assert who(worker.ask(train, message(log), context(**{"max-memory-mb": 1_000_000}))) == "thread"
    assert who(worker.ask(train, message(log), context(**{"max-memory-mb": 1}))) == "thread"
    assert thread.ended() and "max-memory-mb = 1" in caplog.text


def test_it_ends_with_the_launcher(place):
    launcher = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    thread = Thread(launcher.pid)
    launcher.kill()
    launcher.wait()
    assert thread.ended()


def test_on_a_kernel_that_gives_no_pidfd(place, log, monkeypatch):
    """Before 5.3, and where Android's filter refuses the call: it looks now and then."""
    launcher = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setattr(worker.os, "pidfd_open", lambda pid: os.stat("/no/such/call"))
    monkeypatch.setattr(worker, "LOOK", 0.01)
    thread = Thread(launcher.pid)
    assert who(worker.ask(train, message(log), context())) == "thread"
    launcher.kill()
    launcher.wait()
    assert thread.ended()


def test_a_user_who_is_another_to_itself(place, log, monkeypatch):
    """As proot's fake root is: files and getuid() say 0, the kernel's sockets the user that it really is."""
    monkeypatch.setattr(worker, "folder", lambda: place)
    thread = Thread()
    monkeypatch.setattr(worker.os, "getuid", lambda: 4321)
    assert who(worker.ask(train, message(log), context())) == "thread"
    thread.stop()


def test_it_ends_with_the_apps_folder(place, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "APP", tmp_path / "fab")
    monkeypatch.setattr(worker, "LOOK", 0.01)
    worker.APP.mkdir()
    thread = Thread()
    worker.APP.rmdir()
    assert thread.ended()


@pytest.mark.parametrize("change", ["rewritten", "gone"])
def test_other_data_under_the_old_name_is_not_what_it_has_in_memory(place, log, tmp_path, change):
    data = tmp_path / "own.csv"
    data.write_text("text,label\n")
    thread, given = Thread(), context(**{"data-path": str(data)})
    assert [who(worker.ask(train, message(log), given)) for _ in range(2)] == ["thread"] * 2
    if change == "gone":
        data.unlink()
    else:
        data.write_text("text,label\na,b\n")
    assert thread.is_alive()
    assert who(worker.ask(train, message(log), given)) == "here"
    assert thread.ended()


def test_what_its_own_files_are(tmp_path):
    """Each of several files, what lies deeper in a folder, and the labels' names beside them."""
    for name in ("a/one.csv", "b/two.csv", "b/labels.json", "c/data/train.csv", "c/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    both = NodeSettings.read({"data-path": f"{tmp_path}/a/one.csv, {tmp_path}/b/two.csv", "models": "~nobody-of-that-name/x"})
    folder = NodeSettings.read({"data-path": f"{tmp_path}/c", "models": "a" * 5000})
    found = [[file.removeprefix(f"{tmp_path}/") for file, *_ in worker._files(node)] for node in (both, folder)]
    assert found == [["a/one.csv", "b/labels.json", "b/two.csv"], ["c/README.md", "c/data/train.csv"]]


def test_only_files_that_the_node_names_count(place, log, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    thread, given = Thread(), context(**{"data-path": "", "models": "some/model"})
    for _ in range(3):  # the log grows beside it
        assert who(worker.ask(train, message(log), given)) == "thread"
    thread.stop()


def test_list_and_stop(place, log):
    assert CliRunner().invoke(cli, ["worker", "list"]).output == ""
    pid = int(who(worker.ask(train, message(log), context())).split()[1])
    shown = CliRunner().invoke(cli, ["worker", "list"]).output
    assert shown.startswith(f"{pid}  ") and str(worker.address(NODE)) in shown.replace("\n", "")
    assert CliRunner().invoke(cli, ["worker", "stop"]).output.startswith(f"{pid}  ")
    gone(pid)
    assert worker.running() == {} and list(place.iterdir()) == []


# -- whether and where -------------------------------------------------------------------------------------------------


def test_each_node_app_and_python_has_its_own_socket(place, tmp_path, monkeypatch):
    """FLWR_HOME and the FAB's hash are in the path of the app's folder, so another one's worker does not answer."""
    found = {worker.address(NODE), worker.address(NODE + 1)}
    for app in ("home/apps/fedara.fedara-flwr.0.1.0.00000000", "other/apps/fedara.fedara-flwr.0.1.0.00000000"):
        monkeypatch.setattr(worker, "APP", tmp_path / app)
        found.add(worker.address(NODE))
    monkeypatch.setattr(sys, "executable", "/other/python")
    found.add(worker.address(NODE))
    assert len(found) == 5 and all(len(os.fsencode(path)) <= 107 for path in found)


def test_a_folder_that_others_can_enter_is_not_used(place, log, caplog):
    place.chmod(0o750)
    assert who(worker.ask(train, message(log), context())) == "here"
    assert "not this user's alone" in caplog.text
    place.rmdir()
    place.symlink_to("/tmp")
    with pytest.raises(PermissionError):
        worker.folder()
    place.unlink()
    worker.folder()


def test_a_path_too_long_for_a_socket_leaves_the_work_here(place, log, monkeypatch, caplog):
    long = place / ("x" * 90)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    assert who(worker.ask(train, message(log), context())) == "here" and "too long" in caplog.text


def test_only_an_app_that_flower_installed_has_one(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    assert not worker.wanted({})
    monkeypatch.setattr(worker, "APP", tmp_path.resolve() / "apps" / "fedara.fedara-flwr.0.1.0.00000000")
    assert worker.wanted({}) and worker.wanted({"worker": True}) and not worker.wanted({"worker": False})


def test_with_settings_that_are_not_allowed_the_handler_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.setattr(worker, "APP", tmp_path.resolve() / "apps" / "fedara.fedara-flwr.0.1.0.00000000")
    assert not worker.wanted({"worker": "no"}) and not worker.wanted({"worker-idle": 0}) and not worker.wanted({"wrker": True})


def test_a_simulation_has_none(tiny_bert, monkeypatch):
    def refuse(*_):
        raise AssertionError("asked a worker")

    monkeypatch.setattr(worker, "ask", refuse)
    monkeypatch.setattr(worker, "wanted", lambda node_config: True)
    assert start(config(tiny_bert, num_server_rounds=1)).lines


# -- under Flower ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_worker_serves_all_rounds_and_ends_with_its_supernode(tiny_bert, tmp_path, monkeypatch):
    with deployment(tmp_path / "run", tiny_bert, nodes=2) as owner:
        monkeypatch.setenv("XDG_RUNTIME_DIR", owner.env["XDG_RUNTIME_DIR"])
        owner.nodes[1].config["worker"] = False
        owner.nodes[1].end(TERM)
        owner.nodes[1].start()
        run = owner.submit("three", **{"num-server-rounds": 3, "strategy.round-timeout": 300.0})
        seen = []
        for number in (1, 2, 3):
            assert run.round(number)["good"] == 2
            seen.append(worker.running())
        assert run.ended()[0] == "finished:completed", owner.tails()
        assert len(seen[0]) == 1 and seen[0] == seen[1] == seen[2], seen
        (pid,) = seen[0]
        assert owner.nodes[0].said("working without") == 0
        found = psutil.Process(pid).environ()["PYTHONPATH"]
        assert Path(found).is_relative_to(owner.nodes[0].home / "apps")
        owner.nodes[0].end(TERM)
        gone(pid)
