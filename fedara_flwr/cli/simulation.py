"""What a simulation runs on, checked before anything starts: Flower's settings of it, the machine's cores, Ray's sockets."""

from __future__ import annotations

import json
import os
import re
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from fedara_flwr.files import unwritable
from fedara_flwr.keys import ConfigError, Group, one_line

TMPDIR = "RAY_TMPDIR"
LONGEST_SOCKET = 107  # bytes of a Unix socket's path on Linux, and 103 on macOS: below both
SOCKET = "/ray/session_2000-01-01_00-00-00_000000_0000000/sockets/plasma_store"  # where Ray has its longest one, below TMPDIR
# of what Flower and Ray print, what a failure comes from: the line itself, and what helps
CAUSES = (
    (r"AF_UNIX path length|AF_UNIX path too long|socket path .{0,200}too long", f"{TMPDIR} is too long for Ray's sockets"),
    (r"ActorPool is empty", "no client fits: client-resources-num-cpus or -num-gpus in federation.toml is more than there is"),
    (
        r"(timed out after \d+ seconds.{0,80}|Failed to (start|connect to) (the )?)(GCS|gcs|raylet|node)|node timed out dur",
        "Ray does not start: too little memory, or too low a limit (ulimit -n, -u, -v)?",
    ),
    (r"OutOfMemoryError|Ray killed .{0,80}memory|Killed process", "memory ran out: a smaller model, or fewer clients at once"),
    (r"No space left on device", "a disk is full"),
    (r"Too many open files", "ulimit -n allows too few open files"),
    (r"can't start new thread|fork.{0,80}Resource temporarily unavailable", "ulimit -u allows too few processes and threads"),
)
# a traceback's last line, but those of Flower that say nothing of what was wrong
EMPTY = "Exception in ServerApp thread|Simulation Runtime crashed|An error was encountered"
ERROR = re.compile(rf"[\w.]{{0,100}}(Error|Exception|Failed): (?!{EMPTY})\S")


class Simulation(Group):
    """Flower's settings of a simulation, federation.toml, with Flower's own defaults."""

    num_supernodes: int = Field(2, ge=1, description="simulated clients")
    client_resources_num_cpus: int = Field(2, ge=1, description="cores of a client; so many clients run at once as cores allow")
    client_resources_num_gpus: float = Field(0.0, ge=0, description="share of a GPU of a client")
    backend: Literal["ray"] = "ray"
    verbose: bool = False
    init_args_num_cpus: int | None = Field(None, ge=1, description="cores that Ray takes this machine to have; unset = all")
    init_args_num_gpus: int | None = Field(None, ge=0, description="GPUs that Ray takes this machine to have; unset = all")
    init_args_logging_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "WARNING"
    init_args_log_to_driver: bool = True

    @classmethod
    def read(cls, file: Path) -> Simulation:
        """What a TOML file says.

        Raises:
            ConfigError: it cannot be read, or has a key or value that Flower would fail at.
        """
        key = f"--federation-config {file}"
        try:
            told = tomllib.loads(file.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{key}: cannot be read ({error})") from None
        for name, value in told.items():
            if isinstance(value, dict | list):
                line = "no table and no list is allowed, but flat keys such as client-resources-num-cpus = 1"
                raise ConfigError(f"{key}: {name} = {value!r}: {line}")
        told = {name: float(value) if _whole_gpus(name, value) else value for name, value in told.items()}
        try:
            return cls.model_validate(told)
        except ValidationError as error:
            known = {str(field.alias): field for field in cls.model_fields.values()}
            raise ConfigError(f"{key}: {one_line(error, known)}") from None

    def check_nodes(self, least: int) -> None:
        """Refuse fewer clients than train in each round: the run would wait for more, and no more come; ConfigError then."""
        if self.num_supernodes < least:
            raise ConfigError(f"num-supernodes = {self.num_supernodes}: by strategy.min-train-nodes allowed is {least} or more")

    def check_machine(self) -> None:
        """Refuse clients that this machine has no room for; ConfigError then."""
        cores = self.init_args_num_cpus or os.cpu_count() or 1
        if self.client_resources_num_cpus > cores:
            raise ConfigError(f"client-resources-num-cpus = {self.client_resources_num_cpus}: allowed here is at most {cores}")
        if share := self.client_resources_num_gpus:
            whose, gpus = "init-args-num-gpus", self.init_args_num_gpus
            if gpus is None:
                import torch

                whose, gpus = "the machine's GPUs", torch.cuda.device_count()
            if share > gpus:
                raise ConfigError(f"client-resources-num-gpus = {share:g}: allowed here is at most {gpus}, {whose}")
            if share > 1 and share % 1:
                raise ConfigError(f"client-resources-num-gpus = {share:g}: above 1 Ray allows whole numbers alone")

    def toml(self) -> str:
        """The settings as a file for `flwr run --federation-config`."""
        told = self.model_dump(by_alias=True, exclude_unset=True)
        return "".join(f"{key} = {json.dumps(value)}\n" for key, value in told.items() if value is not None)


def _whole_gpus(name: str, value: Any) -> bool:
    return name == "client-resources-num-gpus" and isinstance(value, int) and not isinstance(value, bool)


@contextmanager
def short_folder() -> Iterator[Path]:
    """A new folder for this user alone in which Ray has room for its sockets' names; gone afterwards.

    Raises:
        ConfigError: no such folder can be written.
    """
    usual = []
    with suppress(FileNotFoundError):  # there is none that can be written
        usual.append(os.path.abspath(tempfile.gettempdir()))
    places = [*usual, "/tmp", "/var/tmp", os.path.expanduser("~")]  # nosec B108 # mkdtemp's folders are the user's own
    for place in places:
        if not fits(f"{place}/fedara-00000000") or not os.access(place, os.W_OK):
            continue
        with tempfile.TemporaryDirectory(prefix="fedara-", dir=place, ignore_cleanup_errors=True) as folder:
            yield Path(folder)
        return
    limit = LONGEST_SOCKET - len(SOCKET) - len("/fedara-00000000")
    told = os.environ.get("TMPDIR", places[0])
    raise ConfigError(f"TMPDIR = {told!r}: allowed are folders that can be written, of at most {limit} ASCII letters")


def fits(folder: str) -> bool:
    """Whether Ray can open its sockets below a folder."""
    return folder.isascii() and len(folder) + len(SOCKET) <= LONGEST_SOCKET


def ray_folder(own: Path) -> str:
    """Where Ray keeps sockets and logs: where the user says, else `own`.

    Raises:
        ConfigError: the user's is too long, has letters that Ray cannot open, or cannot be written.
    """
    told = os.environ.get(TMPDIR)
    if told and not fits(told):
        limit = LONGEST_SOCKET - len(SOCKET)
        raise ConfigError(f"{TMPDIR} = {told!r}: allowed are at most {limit} ASCII letters")
    if told and (why := unwritable(Path(told).absolute()) if os.path.isabs(told) else "it is relative"):
        raise ConfigError(f"{TMPDIR} = {told!r}: allowed is an absolute folder that can be written ({why})")
    return told or str(own)


def cause(lines: Iterable[str], errors: bool = True) -> str:
    """What a failed simulation comes from, by the last telling one of the lines that were printed; '' where none tells.

    Without `errors` only known causes tell, not the last line of any traceback.
    """
    texts = [line[:2000].strip() for line in lines]
    for text in reversed(texts):
        for pattern, meaning in CAUSES:
            if re.search(pattern, text):
                return f"{meaning} ({text[:200]})"
    return next((text[:300] for text in reversed(texts) if errors and ERROR.match(text)), "")
