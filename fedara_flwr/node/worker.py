"""The resident worker: a process that keeps torch, the backbone, the tokenizer and the tokenised data between messages.

Flower's deployment engine starts a process for every message. That process (`ask`) hands message and context to the node's
worker over a Unix socket and takes back the reply and the node's new state, all in Flower's own protobuf. Where there is no
worker, or it ends before it has answered, the process does the work itself: nothing of the lost attempt was kept, and random
streams derive from seed, round and client key, so the result is the same. An error of the handler is an answer like any
other and is not tried again. No torch here.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
from flwr.app import Context, Message

from fedara_flwr.flower import (
    APP_DIR,
    ProtoContext,
    ProtoMessage,
    TaskIdentity,
    context_from_proto,
    context_to_proto,
    get_flwr_home,
    message_from_proto,
    message_to_proto,
)
from fedara_flwr.keys import ConfigError
from fedara_flwr.node.power import peak_memory
from fedara_flwr.node.settings import NodeSettings

logger = logging.getLogger(__name__)

Handler = Callable[[Message, Context], Message]
APP = Path(__file__).resolve().parents[2]  # the FAB's folder
COMMAND = (sys.executable, "-P", "-m", "fedara_flwr.cli", "worker", "serve")
FRAME = 1 << 30  # bytes that one frame may have; protobuf itself ends at 2 GiB
READ_BYTES = 1 << 20  # bytes read at once: memory grows by what comes, not by what a frame says of itself
LOOK = 10.0  # seconds between two looks whether the app's folder is there
ASKER_PATIENCE = 60.0  # seconds without a byte after which a process that asks is given up


def wanted(node_config: Mapping[str, Any]) -> bool:
    """Whether this node's messages go to a worker: where Flower runs the app from a FAB, unless node-config says no.

    With a node-config that is not allowed they do not; the handler says what is wrong.
    """
    try:
        node = NodeSettings.read(node_config)
    except ConfigError:
        return False
    return node.worker and sys.platform == "linux" and APP.is_relative_to(get_flwr_home().resolve() / APP_DIR)


def folder() -> Path:
    """Where this user's workers listen; nobody else can enter.

    Raises:
        PermissionError: somebody else can.
    """
    place = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"fedara-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    facts = place.lstat()  # a link is open to all
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise PermissionError(f"{place} is not this user's alone")
    return place


def address(node_id: int) -> Path:
    """The socket of this node's worker for this app. The app's folder tells FLWR_HOME and the FAB's hash."""
    name = "\0".join((str(node_id), str(APP), sys.executable))
    return folder() / f"fedara-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def ask(handler: Handler, message: Message, context: Context) -> Message:
    """The handler's reply, from the node's worker if that answers, else from here; the context's state is the handler's.

    Raises:
        Exception: what the handler raised; Flower's words for it are the same wherever it ran.
    """
    try:
        parts = [handler.__name__.encode(), message_to_proto(message).SerializeToString(), _packed(context)]
        with _connect(address(context.node_id)) as connection:
            _check_peer(connection)
            _send(connection, parts)
            fault, answer, left = _receive(connection)
        state = context_from_proto(ProtoContext.FromString(left)).state
        if fault:
            module, name, words, trace = json.loads(fault)
            raised = type(name, (Exception,), {"__module__": module})(words)
            raised.add_note(trace)
        else:
            raised, reply = None, message_from_proto(ProtoMessage.FromString(answer))
            if reply.metadata.reply_to_message_id != message.metadata.message_id:
                raise ValueError("it answers another message")
    except Exception as error:  # whatever a worker that is broken or gone may cause
        logger.warning("no answer from a resident worker (%s: %s): working without", type(error).__name__, error)
        return handler(message, context)
    context.state = state
    if raised is not None:
        raise raised
    return reply


def serve(handlers: Mapping[str, Handler], listener: socket.socket, launcher: int) -> None:
    """Answer one process after the other, until there is no more use for the worker.

    That is: after node-config `worker-idle` seconds without a message, with more memory than `max-memory-mb` after one, when
    the node's data or backbone are other files than they were, and when the app's folder or the launcher is gone.

    Args:
        handlers: by name.
        listener: a listening socket.
        launcher: the process that starts the node's ClientApps.
    """
    path = Path(listener.getsockname())
    ends = _end_of(launcher)
    idle, since = NodeSettings().worker_idle, time.monotonic()
    files: Any = None
    try:
        while APP.exists() and psutil.pid_exists(launcher) and (left := since + idle - time.monotonic()) > 0:
            ready, _, _ = select.select([listener.fileno(), *ends], [], [], min(left, LOOK))
            if not ready:
                continue
            if ready != [listener.fileno()]:
                return
            connection, _ = listener.accept()
            with connection:
                try:
                    connection.settimeout(ASKER_PATIENCE)
                    _check_peer(connection)
                    name, request, given = _receive(connection)
                    handler, context = handlers[name.decode()], context_from_proto(ProtoContext.FromString(given))
                    node = NodeSettings.read(context.node_config)
                    files = files or _files(node)
                    if files != _files(node):
                        return
                    _answer(connection, handler, message_from_proto(ProtoMessage.FromString(request)), context)
                except Exception as error:  # it went away, or sent what is no message: the next one may be well
                    logger.warning("resident worker: no answer (%s: %s)", type(error).__name__, error)
                    continue
            idle, since = node.worker_idle, time.monotonic()
            used = peak_memory()
            if node.max_memory_mb and used > node.max_memory_mb:
                logger.warning("resident worker: ends, it took %.0f MB, max-memory-mb = %g", used, node.max_memory_mb)
                return
    finally:
        for file in (path, path.with_suffix(".lock")):
            file.unlink(missing_ok=True)


def _end_of(process: int) -> list[int]:
    """What can be read once the process has ended: its pidfd. Nothing on kernels before 5.3, and where Android refuses."""
    try:
        return [os.pidfd_open(process)]
    except OSError:
        return []


def running() -> dict[int, Path]:
    """Process id and socket of each of this user's workers."""
    workers = {}
    for file in folder().glob("*.lock"):
        with file.open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if text := lock.read():
                    workers[int(text)] = file.with_suffix("")
    return workers


def _connect(path: Path) -> socket.socket:
    """A connection to the worker at `path`, which is started where there is none."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        _start(path)
        connection.connect(str(path))
    return connection


def _start(path: Path) -> None:
    """Start a worker. It inherits a socket that listens already, so nobody has to wait for it, and a lock for its life.

    Raises:
        BlockingIOError: one is just starting or ending.
    """
    name = path.with_suffix(".lock")
    with name.open("a") as lock, socket.socket(socket.AF_UNIX) as listener:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock.fileno()), name.stat()):
            raise BlockingIOError("a worker has just ended")
        path.unlink(missing_ok=True)  # of one that was killed
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()
        search = [str(APP), *filter(None, [os.environ.get("PYTHONPATH")])]
        process = subprocess.Popen(
            [*COMMAND, str(listener.fileno()), str(os.getppid())],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(search)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(listener.fileno(), lock.fileno()),
        )
        lock.truncate(0)
        lock.write(str(process.pid))


def _answer(connection: socket.socket, handler: Handler, message: Message, context: Context) -> None:
    """Call the handler and send what came of it. A process that does not wait for it any more ends the worker."""
    TaskIdentity.run_id, TaskIdentity.node_id = context.run_id, context.node_id
    done = threading.Event()

    def watch() -> None:
        select.select([connection], [], [])  # nothing comes before the answer but the end
        if not done.is_set():
            os._exit(1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    fault = answer = b""
    try:
        answer = message_to_proto(handler(message, context)).SerializeToString()
    except Exception as error:
        name = type(error)
        fault = json.dumps([name.__module__, name.__qualname__, str(error), traceback.format_exc()]).encode()
    finally:
        done.set()
    try:
        _send(connection, [fault, answer, _packed(context)])
    finally:
        connection.shutdown(socket.SHUT_RDWR)
        watcher.join()


def _packed(context: Context) -> bytes:
    return context_to_proto(context).SerializeToString()


def _files(node: NodeSettings) -> list[tuple[str, int, int, int]]:
    """The node's own files as they are, with the names of labels beside them: path, inode, size, time."""
    found: set[str] = set()
    for name in filter(None, (node.data_path, *node.backbones.values())):
        for part in [name] if os.path.exists(os.path.expanduser(name)) else name.split(","):  # several files
            place = os.path.expanduser(part.strip())
            found.update(os.path.join(folder, file) for folder, _, files in os.walk(place) for file in files)
            found.update((place, os.path.join(os.path.dirname(place), "labels.json")))
    facts = ((file, os.stat(file)) for file in sorted(found) if os.path.isfile(file))
    return [(file, fact.st_ino, fact.st_size, fact.st_mtime_ns) for file, fact in facts]


def _check_peer(connection: socket.socket) -> None:
    own, other = socket.socketpair()
    with own, other:
        here, there = _user(own), _user(connection)
    if here != there:
        raise PermissionError(f"the other end is user {there}")


def _user(connection: socket.socket) -> int:
    """The user at the other end, by the kernel's own count: proot's fake root is user 0 to itself alone."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _send(connection: socket.socket, parts: list[bytes]) -> None:
    """Three frames: length as 4 bytes, big-endian, then so many bytes."""
    for part in parts:
        if len(part) > FRAME:
            raise ValueError(f"a frame of {len(part)} bytes, allowed are {FRAME}")
    for part in parts:
        connection.sendall(struct.pack(">I", len(part)) + part)


def _receive(connection: socket.socket) -> list[bytes]:
    parts = []
    for _ in range(3):
        (length,) = struct.unpack(">I", _read(connection, 4))
        if length > FRAME:
            raise ValueError(f"a frame of {length} bytes, allowed are {FRAME}")
        parts.append(_read(connection, length))
    return parts


def _read(connection: socket.socket, length: int) -> bytes:
    received = bytearray()
    while len(received) < length:
        piece = connection.recv(min(length - len(received), READ_BYTES))
        if not piece:
            raise ConnectionError("it ended")
        received += piece
    return bytes(received)
