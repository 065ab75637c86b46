"""`fedara export`: a run's model in the formats of stock PEFT and transformers, with a card; to the Hub only when asked."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from fedara_flwr.keys import ConfigError, nearest
from fedara_flwr.log import first_line
from fedara_flwr.runs.card import base_name, has_card, is_hub_id, write_card
from fedara_flwr.runs.directory import read_facts

if TYPE_CHECKING:
    from fedara_flwr.server.evaluate import Kind

EXPORT_FORMATS = ("peft", "lora", "merged")
# what an export of any format has at its top: an old one goes before a new one comes into its folder
EXPORTED_FILES = ("adapter_config.json", "adapter_model.*", "config.json", "model*.safetensors", "model.safetensors.index.json")


class PushError(RuntimeError):
    """The Hub did not take an export; one line that says why."""


def export(
    run: Path,
    kind: str = "peft",
    out: Path | None = None,
    *,
    force: bool = False,
    push: str = "",
    private: bool = True,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the model that a run leaves as `kind` ("peft", "lora", "merged"), tokenizer and card beside it.

    Args:
        out: folder; default `run/exports/kind`.
        force: whether the folder may hold what is not an export.
        push: repository of the Hub that gets it; "" = none, and the network is not used.
        private: whether the repository must be private.
        say: gets a line for each result.

    Raises:
        ConfigError: for an argument that cannot work; nothing is written then.
        PushError: the Hub did not take it; the folder stays.
    """
    if kind not in EXPORT_FORMATS:
        raise ConfigError(f"--format = {kind!r}: allowed are {', '.join(EXPORT_FORMATS)}{nearest(kind, EXPORT_FORMATS)}")
    _check_repository(push)
    out = out or run / "exports" / kind
    _check_folder(out, force)
    facts = read_facts(run)
    from fedara_flwr.runs.keeper import open_run

    saved = open_run(run)
    method, state, model = saved.method, saved.state, saved.model
    facts["export"] = saved.export
    if model.revision:
        facts["revision"] = model.revision
    with _beside(out) as made:
        model.save(made, method.weights(state) if kind == "merged" else method.exported(state), cast("Kind", kind))
        write_card(made, facts, kind)
        if push and kind != "merged" and not is_hub_id(facts["model"]):
            _rename_base(made, base_name(facts))
            say(f"the base model is a local folder: pushed as {base_name(facts)!r}, who loads the adapter must have it")
        files = sorted(str(file.relative_to(made)) for file in made.rglob("*") if file.is_file())
        _replace(made, out)
    say(f"{kind}: {out} ({saved.export['said']})")
    if push:
        say(f"pushed: {_push(out, files, push, private)}")
    return out


def _check_repository(name: str) -> None:
    try:
        if name:
            validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push = {name!r}: {first_line(error)}") from None


def _check_folder(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out = {str(out)!r}: this is a file, allowed is a folder")
    if out.is_dir() and any(out.iterdir()) and not has_card(out) and not force:
        raise ConfigError(f"--out = {str(out)!r}: the folder holds something else than an export, allowed with --force")


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """An empty folder on the same disk, gone afterwards: an export that fails halfway leaves nothing."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            yield made
    except OSError as error:
        raise ConfigError(f"--out = {str(out)!r}: cannot be written ({error.strerror or error})") from None


def _replace(made: Path, out: Path) -> None:
    """Put the new export in place of an old one; other files in the folder stay."""
    out.mkdir(exist_ok=True)
    for old in {old for pattern in EXPORTED_FILES for old in out.glob(pattern)}:
        old.unlink()
    shutil.copytree(made, out, dirs_exist_ok=True, copy_function=shutil.move)


def _rename_base(folder: Path, name: str) -> None:
    """Write `name` in place of a local base model's path, which others must not see."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"base_model_name_or_path": name}, indent=2) + "\n")


def _push(folder: Path, files: list[str], repository: str, private: bool) -> str:
    """Upload the export's own files; returns the repository's address."""
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        allowed = not private or api.repo_info(repository).private  # it may have been there before
        if allowed:
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                allow_patterns=files,
                delete_patterns=list(EXPORTED_FILES),  # of an export of another format
                commit_message="fedara export: model and card",
            )
    except Exception as error:  # no token, no right, no network, and each in many types
        raise PushError(f"--push = {repository!r}: {_why(error)}; the export is kept in {folder}") from error
    if not allowed:
        raise PushError(f"--push = {repository!r}: the repository exists and is public, allowed with --public")
    return str(url)


def _why(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or type(error).__name__ == "LocalTokenNotFoundError":
        return "the Hub wants a token that may write there (`hf auth login`, or HF_TOKEN)"
    return first_line(error)
