"""What a model's folder holds, looked at before anything is loaded: each kind that cannot serve is one line with a way out."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig

from fedara_flwr.keys import ConfigError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
NO_REAL = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "C64", "C128")  # as safetensors calls them
POINTER = b"version https://git-lfs"


def check_folder(name: str, folder: Path) -> None:
    """Refuse a folder that is no whole model of transformers in plain numbers; of its weights the sizes are checked.

    Args:
        name: as `model.name`, for messages.
        folder: where it lies; there is such a folder.

    Raises:
        ConfigError: for an adapter, GGUF, a quantised model, code of its own, and files that are missing or cut off.
    """
    if problem := _problem(folder):
        raise ConfigError(f"model.name = {name!r}: {problem}")


def check_class(name: str, config: PreTrainedConfig, auto_class: str) -> None:
    """Refuse a model that has no class for what a task needs.

    Args:
        name: as `model.name`, for messages.
        config: the model's.
        auto_class: as `Task.auto_class`.

    Raises:
        ConfigError: there is none; it is quantised; or the class takes one half of the model only.
    """
    kind = config.model_type
    problem = _of_config(config.to_dict())
    if not problem and type(config) not in getattr(transformers, auto_class)._model_mapping:
        problem = f"transformers has no {auto_class} for {kind!r}"
    if not problem and auto_class == "AutoModelForCausalLM" and config.is_encoder_decoder:
        problem = f"of {kind!r} {auto_class} takes the decoder alone, which was made to read an encoder; allowed are decoders"
    if problem:
        raise ConfigError(f"model.name = {name!r}: {problem}")


def check_file(name: str) -> None:
    """Refuse a file in the place of a folder.

    Raises:
        ConfigError: there is such a file.
    """
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):
        what = "a GGUF file" if path.suffix == ".gguf" else "a file"
        raise ConfigError(f"model.name = {name!r}: {what}, allowed is a folder with config.json, weights and tokenizer")


def _problem(folder: Path) -> str:
    """Why a folder cannot serve; '' where it may."""
    config = _read(folder / "config.json")
    if config is None:
        return _without_config(folder)
    if problem := _of_config(config):
        return problem
    if not any((folder / (file + end)).exists() for file in WEIGHTS for end in ("", INDEX)):
        return _no_weights(folder)
    return next(filter(None, map(_of_file, _weight_files(folder))), "")


def _read(file: Path) -> Any:
    """What a JSON file says; [] where it is none; None where there is no such file."""
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return []


def _without_config(folder: Path) -> str:
    adapter = _read(folder / "adapter_config.json")
    if adapter is not None:
        base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
        way = "merge it first (`fedara export RUN --format merged`, or PEFT's `merge_and_unload`) and name that folder"
        return f"an adapter on {base!r}, allowed are whole models; {way}"
    if any(folder.glob("*.gguf")):
        return "a GGUF file, allowed are safetensors; name the model that it was made of"
    below = sorted(file.parent for pattern in ("*", "snapshots/*") for file in folder.glob(f"{pattern}/config.json"))
    return f"has no config.json, allowed is a model's own folder{f', such as {below[0]}' if below else ''}"


def _of_config(config: Any) -> str:
    if not isinstance(config, dict):
        return "its config.json is no JSON object"
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "few bits") if isinstance(quantised, dict) else "few bits"
        way = "name the model that it was made of; model.dtype = 'int4' or 'int8' quantises it"
        return f"its weights are quantised already ({method}), allowed are plain numbers; {way}"
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return ""
    if config.get("auto_map"):
        return f"needs Python code of its own ({kind!r}, auto_map), never run here; allowed are architectures of transformers"
    if kind is None:
        return "its config.json names no model_type, allowed are those of transformers"
    return f"its architecture is {kind!r}, allowed are those that the installed transformers has"


def _no_weights(folder: Path) -> str:
    endings = {".safetensors", ".bin", ".h5", ".msgpack", ".onnx", ".gguf", ".pth", ".pt"}
    others = sorted(file.name for file in folder.iterdir() if file.suffix in endings)
    return f"has no {' or '.join(WEIGHTS)}{f' (but {others[0]})' if others else ''}"


def _weight_files(folder: Path) -> Iterator[Path]:
    """The files that transformers would read: safetensors before bin, one file before several."""
    for file in WEIGHTS:
        if (folder / file).exists():
            yield folder / file
            return
        if (index := _read(folder / (file + INDEX))) is not None:
            names = index.get("weight_map") if isinstance(index, dict) else None
            parts = list(names.values()) if isinstance(names, dict) else []
            sound = parts and all(isinstance(part, str) for part in parts)
            yield from (folder / part for part in (sorted(set(parts)) if sound else [file + INDEX]))
            return


def _of_file(file: Path) -> str:
    """Why a file of weights cannot be whole; '' where it may be."""
    if file.name.endswith(INDEX):
        return f"{file.name} names no files of weights"
    if not file.is_file():
        return f"{file.name} is missing, its index names it"
    with file.open("rb") as opened:
        start = opened.read(len(POINTER))
        if start == POINTER:
            return f"{file.name} is a pointer of Git LFS and not the file, `git lfs pull` gets it"
        if file.suffix == ".bin":
            # of the formats before torch 1.6 nothing can be told without loading them
            whole = not start.startswith(b"PK") or zipfile.is_zipfile(file)
            return "" if start and whole else f"{file.name} is cut off"
        size, length = file.stat().st_size, int.from_bytes(start[:8], "little")
        opened.seek(8)
        if size < 8 or length > size - 8:
            return f"{file.name} is cut off, or no safetensors file"
        try:
            tensors = json.loads(opened.read(length))
            tensors.pop("__metadata__", None)
            ends = [value["data_offsets"][1] for value in tensors.values()]
            other = {
                key: value["dtype"] for key, value in tensors.items() if key.endswith(".weight") and value["dtype"] in NO_REAL
            }
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return f"{file.name} is no safetensors file"
    if other:
        key, kind = next(iter(other.items()))
        return f"{file.name} has {key} in {kind}, quantised or complex, allowed are floating-point numbers"
    expected = 8 + length + max(ends, default=0)
    return f"{file.name} is cut off: {size} bytes of {expected}" if size < expected else ""
