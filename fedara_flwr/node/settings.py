"""A node's own settings: Flower's node-config, checked. The server cannot change them and is not told. No torch."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from fedara_flwr.config import QUANTISED, NumberType
from fedara_flwr.files import flwr_home
from fedara_flwr.keys import ConfigError, Group, nearest, one_line
from fedara_flwr.log import printable
from fedara_flwr.node.command import ask
from fedara_flwr.node.guard import Guard
from fedara_flwr.tasks.base import USUAL
from fedara_flwr.training import LocalTraining
from fedara_flwr.wire.figures import known_metrics

BUSY_SECONDS = 10.0  # for busy-when to answer
BUSY_CHARACTERS = 200  # of what it says
TRACEBACK = "Traceback (most recent call last)"  # of a Python program that fails: its exit code is 1, too


class NodeSettings(Group):
    """The keys of node-config; '' and 0 mean unset where a description does not say otherwise."""

    client_key: str | int = Field("", description="name of this node; its random streams depend on it: keep it")
    partition_id: int | None = Field(None, ge=0, description="its share of the built-in data, and its name without client-key")
    num_partitions: int = Field(0, ge=0, description="number of shares")
    engine: Literal["", "inprocess"] = Field("", description="set by the in-process engine")
    store_dir: str = Field("", description="folder of what is kept between rounds; '' = FLWR_HOME/fedara-store")
    models: str = Field(
        str(USUAL["model.name"]),
        description="backbones it takes part with, comma-separated: the run's model.name, or NAME=PATH where it lies elsewhere",
    )
    dtype: Literal["", NumberType] = Field("", description="number type of the frozen backbone; '' = the run's")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where it computes; auto = cuda where torch sees it")
    threads: int = Field(0, ge=0, description="torch threads; results depend on them in the last bits; 0 = the run's")
    max_threads: int = Field(64, ge=1, description="most that a run may ask for, where threads is 0")
    cache_mb: int | None = Field(None, ge=1, description="memory for frozen blocks' outputs; unset = the run's train.cache-mb")
    cache_disk_mb: int | None = Field(None, ge=0, description="and disk, 0 = none; unset = the run's train.cache-disk-mb")
    max_steps: int = Field(10_000, ge=1, description="most optimiser steps of one round, counted by epochs too")
    max_epochs: int = Field(100, ge=1, description="most passes over its examples in one round")
    max_batch: int = Field(1024, ge=1, description="most examples of one step")
    max_rate: float = Field(1.0, gt=0, description="highest learning rate of any part")
    max_seconds: float = Field(3600.0, gt=0, description="longest training in one round")
    max_memory_mb: float = Field(
        0.0, ge=0, description="most memory a process of this node may have taken (peak of resident memory); 0 = no limit"
    )
    busy_when: str = Field("", description="command that says 'not now' by exit code 0")
    data_path: str = Field("", description="own data: a parquet, csv or jsonl file, or a folder with train.* and test.*")
    data_format: str = Field("", description="how its files are written, as the run's data.format; '' = found")
    data_subset: str = Field("", description="configuration of a copy of a Hub repository, as the run's data.subset")
    text_column: str = Field("text", min_length=1, description="column of the text in own data; the run's names do not count")
    pair_column: str = Field("", description="column of the second text; '' = none")
    label_column: str = Field("label", min_length=1, description="column of the label")
    data_options: str = Field(
        "",
        description="keys of the task alone, for own data, over the run's data.options; of columns' names only these count",
    )
    labels: str = Field(
        "", description="label names, comma-separated, for which alone own data are looked at; '' = those a run first asks for"
    )
    examples_least: int = Field(
        5,
        ge=1,
        description="own rows below which it does not say how many, and takes no part; as few held out are not evaluated",
    )
    validation: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of own rows held out for local evaluation; unset = the run's data.client-validation",
    )
    metrics: str | None = Field(None, description="metrics that may leave, comma-separated; '' = none, unset = all")
    statistics: bool = Field(True, description="whether it tells sums of its features, from which the head is solved")
    statistics_least: int = Field(
        5, ge=1, description="rows of a class below which its sums are not told; in a simulation every class's are"
    )
    update_clip: float = Field(0.0, ge=0, description="length to which an update's difference is cut; 0 = not cut")
    update_noise: float = Field(0.0, ge=0, description="standard deviation of the noise on it, over update-clip")
    worker: bool = Field(True, description="keep model and data in a process between messages")
    worker_idle: float = Field(600.0, gt=0, description="seconds without a message after which that process ends")

    @classmethod
    def read(cls, node_config: Mapping[str, Any]) -> NodeSettings:
        """The settings that a node-config gives, checked.

        Raises:
            ConfigError: for an unknown key, a wrong type or an impossible value.
        """
        try:
            settings = cls.model_validate(dict(node_config))
        except ValidationError as error:
            known = {f"node-config {field.alias}": field for field in cls.model_fields.values()}
            raise ConfigError(one_line(error, known, "node-config ")) from None
        settings._check_metrics()
        settings._check_command()
        part, parts = settings.partition_id or 0, settings.num_partitions or 1
        if part >= parts and not settings.data_path:
            raise ConfigError(f"node-config partition-id = {part}: without data-path allowed is below num-partitions = {parts}")
        return settings

    def _check_metrics(self) -> None:
        for name in self.guard.metrics or ():
            if name not in known_metrics():
                line = f"node-config metrics = {self.metrics!r}: there is no metric {name!r}{nearest(name, known_metrics())}"
                raise ConfigError(line)
        if self.update_noise and not self.update_clip:
            raise ConfigError(f"node-config update-noise = {self.update_noise!r}: needs update-clip above 0")

    def _check_command(self) -> None:
        if not self.busy_when:
            return
        try:
            words = shlex.split(self.busy_when)
        except ValueError as error:
            raise ConfigError(f"node-config busy-when = {self.busy_when!r}: {error}") from None
        if not words or not shutil.which(words[0]):
            raise ConfigError(f"node-config busy-when = {self.busy_when!r}: there is no such command here")

    def check_plan(self, plan: LocalTraining, examples: int) -> None:
        """Refuse what a server asks of one round where it is more than this node allows.

        Args:
            examples: that this node would train on.

        Raises:
            ConfigError: more steps, epochs or examples a step, or a higher learning rate.
        """
        rate = max(plan.learning_rate * max(1.0, plan.e_lr_factor), plan.head_learning_rate)
        asked = {
            "max-epochs": (0 if plan.steps else plan.epochs, self.max_epochs),
            "max-steps": (plan.optimiser_steps(max(examples, 1)), self.max_steps),
            "max-batch": (plan.batch_size, self.max_batch),
            "max-rate": (rate, self.max_rate),
        }
        for key, (wanted, allowed) in asked.items():
            if not wanted <= allowed:
                raise ConfigError(f"node-config {key} = {allowed:g}: the server asks for {wanted:g}")

    def check_threads(self, threads: int) -> None:
        """Refuse a run that wants more torch threads than this node allows; ConfigError then."""
        if not self.threads and threads > self.max_threads:
            raise ConfigError(f"node-config max-threads = {self.max_threads}: the run's train.threads = {threads}")

    def check_frozen(self, method: str) -> None:
        """Refuse `method`, which changes the backbone, where this node's is quantised.

        Raises:
            ConfigError: it is quantised.
        """
        if self.dtype in QUANTISED:
            line = f"method {method!r} changes the backbone, allowed are 'float32' and 'bfloat16'"
            raise ConfigError(f"node-config dtype = {self.dtype!r}: {line}")

    @property
    def guard(self) -> Guard:
        """What this node lets out, as these settings say."""
        if self.metrics is None:
            return Guard(clip=self.update_clip, noise=self.update_noise)
        names = tuple(name.strip() for name in self.metrics.split(",") if name.strip())
        return Guard(names, self.update_clip, self.update_noise)

    @property
    def silent(self) -> str:
        """Why this node tells no sums of its features; '' where it does."""
        if not self.statistics:
            return "node-config statistics"
        if self.update_clip:  # whoever has updates cut or noised does not mean sums to leave as they are
            return "node-config update-clip"
        return ""

    @property
    def backbones(self) -> dict[str, str]:
        """The run's model.name → what is opened here for it."""
        entries = (entry.partition("=") for entry in self.models.split(",") if entry.strip())
        return {name.strip(): (place or name).strip() for name, _, place in entries}

    @property
    def label_names(self) -> set[str]:
        """The label names for which alone it looks at own data; none = those that a run first asks for."""
        return {name.strip() for name in self.labels.split(",") if name.strip()}

    @property
    def store(self) -> Path:
        """Folder of what is kept between rounds: the delta's pieces; below it, parts that stay and residues of uploads."""
        return Path(self.store_dir).expanduser() if self.store_dir else flwr_home() / "fedara-store"

    def busy(self) -> str:
        """Why this node does not want to train now, by `busy-when`; '' where it does.

        Exit code 0 means busy, 1 free, as `test` and `grep` answer. A command that fails otherwise, or does not answer in
        time, cannot say that the device is free, so it counts as busy; the reason tells.
        """
        if not self.busy_when:
            return ""
        try:
            code, text = ask(shlex.split(self.busy_when), BUSY_SECONDS, 4 * BUSY_CHARACTERS)
        except OSError as error:
            return f"busy-when cannot be run ({error.strerror})"
        except subprocess.TimeoutExpired:
            return f"busy-when did not answer in {BUSY_SECONDS:g} s"
        said = printable(text.splitlines()[0].strip() if text.strip() else "")[:BUSY_CHARACTERS]
        if code == 1 and not said.startswith(TRACEBACK):
            return ""
        return (said or "busy-when says so") if code == 0 else f"busy-when failed with exit code {code}: {said}"
