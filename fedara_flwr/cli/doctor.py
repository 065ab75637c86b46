"""What `fedara doctor` looks at: whether a run will work here, and what of Flower's habits will bite.

Nothing is started or changed. Each check is a function that gives one Finding.
"""

from __future__ import annotations

import os
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement

from fedara_flwr.cli import application, habits
from fedara_flwr.cli.findings import Finding, count, reason, run_checks
from fedara_flwr.cli.launch import read_config
from fedara_flwr.config import BUILT_IN_DATA, QUANTISED, Settings
from fedara_flwr.files import data_cache, existing, flwr_home, unwritable
from fedara_flwr.keys import ConfigError
from fedara_flwr.runs import trackers as track
from fedara_flwr.runs.directory import PACKAGES
from fedara_flwr.strategies import methods, plugins
from fedara_flwr.tasks import read_settings, registry

PACKAGE = "fedara-flwr"
OLDEST_PYTHON = (3, 11)
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
MEMORY = 3e9  # bytes: Flower and Ray take 1 GB, each training client of the default model about as much
DISK = 2e9  # bytes
OPENED = 2e9  # bytes of weights above which the model is not loaded to see whether it can be


def examine(app: Path, overrides: list[str]) -> Iterator[tuple[str, Finding]]:
    """Every check's name and finding, as they come; those of a configuration that cannot be read are left out."""
    yield from run_checks({"python": python, "packages": packages})
    settings, finding = configuration(app, overrides)
    yield "configuration", finding
    yield from run_checks(
        {
            "app folder": partial(application.app_folder, app),
            "dependencies": habits.dependency_installation,
            "open ports": habits.open_ports,
            "local SuperLink": habits.local_superlink,
            "working folder": partial(habits.working_folder, app),
            "telemetry": habits.telemetry,
            "proxies": habits.proxies,
            "free port": habits.free_port,
            "methods": offered_methods,
            "tasks": offered_tasks,
            "device": device,
            "GPU for clients": partial(client_gpu, app),
        }
    )
    if settings is not None:
        yield from run_checks(
            {
                "folders": partial(folders, app, settings),
                "disk": partial(disk, settings),
                "model": partial(model, settings),
                "data": partial(data, settings),
                "trackers": partial(trackers, settings),
            }
        )


def python() -> Finding:
    """Whether Python is new enough."""
    running = f"Python {sys.version.split()[0]}, {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        return Finding("problem", running, f"Python {'.'.join(map(str, OLDEST_PYTHON))} or newer is needed")
    return Finding("ok", running)


def packages() -> Finding:
    """Installed versions against the ranges of this package's own requirements, extras such as flwr[simulation] included."""
    try:
        requirements = requires(PACKAGE) or []
    except PackageNotFoundError:
        return Finding("warning", f"{PACKAGE} is not installed, only its code is here", f"pip install -e . (or {PACKAGE})")
    if lacking := list(unmet(requirements, "")):
        needed = " ".join(f"'{requirement}'" for requirement, _ in lacking)
        return Finding("problem", "; ".join(reason for _, reason in lacking), f"pip install {needed}")
    return Finding("ok", ", ".join(f"{name} {version(name)}" for name in PACKAGES))


def unmet(requirements: Iterable[str], extra: str) -> Iterator[tuple[str, str]]:
    """Requirements that are not met, with the reason; with an extra, those that only it brings."""
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        if extra and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            yield wanted, f"{requirement.name} is missing"
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            yield wanted, f"{requirement.name} is {installed}, allowed is {requirement.specifier}"
        for name in requirement.extras:
            yield from unmet(requires(requirement.name) or [], name)


def configuration(app: Path, overrides: list[str]) -> tuple[Settings | None, Finding]:
    """The run configuration that `fedara run` would use; None where it is wrong. A folder that is no app has the defaults."""
    if not overrides and not (app / "pyproject.toml").is_file():
        advice = "name the app's folder: fedara doctor APP"
        return read_settings({}), Finding("warning", f"{app} is no Flower app; checked are the defaults", advice)
    try:
        settings = read_settings(read_config(app, overrides))
    except ConfigError as error:
        return None, Finding("problem", reason(error), "correct this first: model, data and folders were not checked")
    rounds = count(settings.num_server_rounds, "round")
    return settings, Finding("ok", f"{settings.method}, {rounds}, {settings.model.name}")


def offered_methods() -> Finding:
    """Whether every method that installed packages offer can be used."""
    broken = [plugin for plugin in plugins() if plugin.offer is None]
    if broken:
        reasons = "; ".join(f"{plugin.name!r} of {plugin.package}: {plugin.reason}" for plugin in broken)
        return Finding("warning", f"broken {reasons}", "update or uninstall the package")
    return Finding("ok", ", ".join(methods()))


def offered_tasks() -> Finding:
    """Whether every task that installed packages offer can be used."""
    broken = [plugin for plugin in registry.plugins() if plugin.offer is None]
    if broken:
        reasons = "; ".join(f"{plugin.name!r} of {plugin.package}: {plugin.reason}" for plugin in broken)
        return Finding("warning", f"broken {reasons}", "update or uninstall the package")
    return Finding("ok", ", ".join(registry.tasks()))


def device() -> Finding:
    """Which torch, GPUs or cores there are, and whether enough memory is free."""
    import torch

    memory = psutil.virtual_memory()
    where = ", ".join(_gpus()) or f"no CUDA, {count(os.cpu_count() or 1, 'core')}"
    hardware = f"torch {torch.__version__}, {where}, {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB of memory free"
    if memory.available < MEMORY:
        advice = "fewer clients at once: a higher client-resources-num-cpus in federation.toml; or --engine inprocess"
        return Finding("warning", hardware, advice)
    return Finding("ok", hardware)


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def client_gpu(app: Path) -> Finding:
    """Whether Ray would hide the GPUs from the clients of a simulation."""
    if not (names := _gpus()):
        return Finding("ok", "there is none")
    file = app / "federation.toml"
    share = tomllib.loads(file.read_text()).get("client-resources-num-gpus", 0) if file.is_file() else 0
    if share:
        return Finding("ok", f"client-resources-num-gpus = {share}")
    return Finding(
        "warning",
        f"{names[0]} is not used by simulated clients: client-resources-num-gpus is 0 in {file}",
        "set it to a client's share of a GPU, for example 0.25, in a file for --federation-config",
    )


def folders(app: Path, settings: Settings) -> Finding:
    """Whether Flower's home (of plain `flwr run`, and unless it is set of `fedara run`) and the runs' folder can be written."""
    home = flwr_home()
    places = {"FLWR_HOME": home, "run.dir": _runs(settings)}
    places |= {} if os.environ.get("FLWR_HOME") else {"the app": app / ".flwr"}
    refused = {name: place for name, place in places.items() if unwritable(place)}
    if not refused:
        caches = [str(place) for place in (data_cache(), app / ".flwr" / data_cache().name) if place.is_dir()]
        copies = f"; copies of data, which may be removed, in {' and '.join(caches)}" if caches else ""
        return Finding("ok", f"Flower's home {home}, runs in {_runs(settings)}{copies}")
    reasons = "; ".join(f"{place} cannot be written ({name})" for name, place in refused.items())
    return Finding("problem", reasons, "set FLWR_HOME, run.dir to folders of yours, or copy the app to one")


def _runs(settings: Settings) -> Path:
    return Path(settings.run.dir).expanduser() if settings.run.dir else flwr_home() / "runs"


def disk(settings: Settings) -> Finding:
    """Whether there is room for runs, stores and checkpoints."""
    place = min((existing(path) for path in (flwr_home(), _runs(settings))), key=lambda path: shutil.disk_usage(path).free)
    free = shutil.disk_usage(place).free
    space = f"{free / 1e9:.1f} GB free in {place}"
    if free < DISK:
        return Finding("warning", space, "make room, or set FLWR_HOME and run.dir to another disk")
    return Finding("ok", space)


def model(settings: Settings) -> Finding:
    """Whether the backbone is here and opens, or can be fetched: local folder, installed package, Hub cache, Hub."""
    name = settings.model.name
    try:
        from huggingface_hub import try_to_load_from_cache

        from fedara_flwr.adapters.backbone import locate
        from fedara_flwr.adapters.quantise import library

        source = Path(locate(name))
    except ConfigError as error:
        return Finding("problem", reason(error), "reinstall the model's package, or name another model")
    if settings.model.dtype in QUANTISED:
        try:
            library(settings.model.dtype)
        except ConfigError as error:
            return Finding("problem", reason(error), "install it, or choose another model.dtype")
    if source.is_dir():
        return _opened(settings, str(source), source)
    found = _on_hub(name, "model", partial(_model_cached, name))
    cached = try_to_load_from_cache(name, "config.json")
    return _opened(settings, found.found, Path(cached).parent) if found.level == "ok" and isinstance(cached, str) else found


def _opened(settings: Settings, found: str, folder: Path) -> Finding:
    """The model opened as a run does; of one with large weights what shows without them."""
    from fedara_flwr.adapters.learner import look
    from fedara_flwr.server.evaluate import ServerModel

    task = registry.open_task(settings.data)
    size = sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
    try:
        try:
            here = bool(settings.data.path) or settings.data.name in BUILT_IN_DATA or _data_cached(settings.data.name)
            labels = _rows(settings).labels if here else None
        except ConfigError:  # which the check of the data says
            labels = None
        names = ("a", "b") if labels is None and task.labelled else labels or ()
        if size > OPENED:
            look(settings, names)
            return Finding("ok", f"{found}: tokenizer and architecture; {size / 1e9:.1f} GB of weights were not opened")
        if settings.model.dtype == "auto":  # a product would be timed, and its outcome written
            settings = settings.model_copy(update={"model": settings.model.model_copy(update={"dtype": "float32"})})
        opened = ServerModel(settings, names)
    except ConfigError as error:
        return Finding("problem", reason(error), "correct the folder, or name another model")
    return Finding("ok", "; ".join([found, *(opened.checkpoints_head() if labels is not None else [])]))


def _model_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    config, *weights = (isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", *WEIGHT_FILES))
    return config and any(weights)


def data(settings: Settings) -> Finding:
    """Whether the data can be read, and how much there is; a data set of the Hub that is not here is not fetched for it."""
    name = settings.data.name
    if not settings.data.path and name not in BUILT_IN_DATA:
        finding = _on_hub(name, "dataset", partial(_data_cached, name))
        if finding.level != "ok" or not _data_cached(name):
            return finding
    try:
        task = registry.open_task(settings.data)
        dataset = _rows(settings)
    except ConfigError as error:
        return Finding("problem", reason(error), "see data.* in `fedara config`")
    rows = f"{len(dataset.train)} training and {len(dataset.test)} test rows"
    labels = f", {count(len(dataset.labels), 'label')}" if task.labelled else ""
    said = f"{settings.data.path or name}: {rows}{labels}"
    if dataset.skipped:
        return Finding("warning", f"{said}; {'; '.join(dataset.skipped)}", "a run leaves these rows out")
    return Finding("ok", said)


@lru_cache(maxsize=1)
def _rows(settings: Settings) -> Any:
    """The run's data, read once for all checks."""
    from fedara_flwr.data.sources import load

    return load(settings.data, settings.seed, registry.open_task(settings.data))


def _data_cached(name: str) -> bool:
    import datasets

    return (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()


def _on_hub(name: str, kind: Literal["model", "dataset"], cached: Callable[[], bool]) -> Finding:
    import huggingface_hub

    try:
        if cached():
            return Finding("ok", f"{name}, in the cache of the Hugging Face Hub")
        api: Any = huggingface_hub.HfApi()
        (api.model_info if kind == "model" else api.dataset_info)(name, timeout=habits.NETWORK_SECONDS)
    except Exception as error:  # no network, offline by HF_HUB_OFFLINE, no such name, gated: all the same to a run
        advice = "name a local folder (model.name) or file (data.path), or see that the network is there"
        return Finding("problem", f"{name} is not in the cache, and the Hub does not give it ({reason(error)})", advice)
    return Finding("ok", f"{name}, on the Hugging Face Hub; the first run downloads it")


def trackers(settings: Settings) -> Finding:
    """Whether what run.track names is installed."""
    try:
        track.check(settings.run.track)
    except ConfigError as error:
        return Finding("problem", reason(error), "install it, or leave it out")
    return Finding("ok", settings.run.track or "none asked for (run.track)")
