"""Folders that hold no whole model: each kind is one line that says what it is, before anything is loaded."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from conftest import CONFIGS, LABELS, TASKS
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BartConfig, CohereConfig, LlamaConfig

from fedara_flwr.adapters.backbone import Backbone, load_tokenizer
from fedara_flwr.keys import ConfigError

FILE = "model.safetensors"


def problem(path, task: str = "classification") -> str:
    """What tokenizer or backbone say of a folder, without its name; both say the same where it is the folder's fault."""
    with pytest.raises(ConfigError) as caught:
        Backbone(str(path), TASKS[task], LABELS, pad_token_id=0)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"model.name = {str(path)!r}: ")
    return line.removeprefix(f"model.name = {str(path)!r}: ")


@pytest.fixture
def folder(tiny_models, tmp_path):
    """A model that nothing is wrong with."""
    shutil.copytree(tiny_models["bert"], tmp_path / "model")
    Backbone(str(tmp_path / "model"), TASKS["classification"], LABELS, pad_token_id=0)
    return tmp_path / "model"


def changed(folder, **changes) -> None:
    """Its config.json says otherwise."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def shards(folder, kind: str = "safetensors") -> list[str]:
    """Its weights in two files."""
    tensors = list(load_file(folder / FILE).items())
    (folder / FILE).unlink()
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = [f"{stem}-0000{i}-of-00002.{kind}" for i in (1, 2)]
    for name, part in zip(names, (tensors[::2], tensors[1::2]), strict=True):
        save_file(dict(part), folder / name) if kind == "safetensors" else torch.save(dict(part), folder / name)
    index = {"metadata": {}, "weight_map": {key: names[i % 2] for i, (key, _) in enumerate(tensors)}}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return names


def test_an_adapters_folder(tiny_models, tmp_path):
    base = AutoModel.from_pretrained(tiny_models["bert"])
    get_peft_model(base, LoraConfig(target_modules=["query"])).save_pretrained(tmp_path)
    assert problem(tmp_path) == (
        f"an adapter on {str(tiny_models['bert'])!r}, allowed are whole models; merge it first "
        "(`fedara export RUN --format merged`, or PEFT's `merge_and_unload`) and name that folder"
    )
    with pytest.raises(ConfigError, match="an adapter on"):
        load_tokenizer(str(tmp_path))


def test_gguf(tmp_path):
    file = tmp_path / "model-Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    assert problem(tmp_path) == "a GGUF file, allowed are safetensors; name the model that it was made of"
    assert problem(file) == "a GGUF file, allowed is a folder with config.json, weights and tokenizer"


def test_a_file(folder):
    assert problem(folder / FILE) == "a file, allowed is a folder with config.json, weights and tokenizer"


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors", "mxfp4"])
def test_quantised_weights(folder, method):
    changed(folder, quantization_config={"quant_method": method, "load_in_4bit": True})
    assert problem(folder) == (
        f"its weights are quantised already ({method}), allowed are plain numbers; name the model that it was made of; "
        "model.dtype = 'int4' or 'int8' quantises it"
    )


def test_no_config(folder, tmp_path):
    (folder / "config.json").rename(folder / "other.json")
    assert problem(folder) == "has no config.json, allowed is a model's own folder"
    (folder / "other.json").rename(folder / "config.json")
    assert problem(tmp_path) == f"has no config.json, allowed is a model's own folder, such as {folder}"
    cached = tmp_path / "models--some--model" / "snapshots" / "0123abcd"
    shutil.copytree(folder, cached)
    assert problem(cached.parents[1]) == f"has no config.json, allowed is a model's own folder, such as {cached}"


def test_code_of_its_own(folder):
    """It is never run; an architecture that transformers has as well is loaded as such."""
    code = {"AutoModel": "modeling_new.NewModel", "AutoConfig": "modeling_new.NewConfig"}
    changed(folder, auto_map=code)
    Backbone(str(folder), TASKS["classification"], LABELS, pad_token_id=0)
    (folder / "modeling_new.py").write_text("raise SystemExit('run')")
    changed(folder, model_type="new")
    assert problem(folder) == (
        "needs Python code of its own ('new', auto_map), never run here; allowed are architectures of transformers"
    )
    changed(folder, auto_map={})
    assert problem(folder) == "its architecture is 'new', allowed are those that the installed transformers has"
    changed(folder, model_type=None)
    assert problem(folder) == "its config.json names no model_type, allowed are those of transformers"


def test_a_config_that_is_no_json(folder):
    (folder / "config.json").write_text("[]")
    assert problem(folder) == "its config.json is no JSON object"
    sound = '{"model_type": "bert"}'
    for content in (sound[:-1], "\ufeff" + sound, "[" * 100_000):
        (folder / "config.json").write_text(content, encoding="utf-8")
        assert problem(folder) == "its config.json is no JSON object"
    (folder / "config.json").write_text('{"model_type": ["bert"]}')
    assert problem(folder) == "its architecture is ['bert'], allowed are those that the installed transformers has"


@pytest.mark.parametrize("weights", [[], None, {}, {"a": 1, "b": FILE}])
def test_an_index_that_names_no_files(folder, weights):
    shards(folder)
    (folder / f"{FILE}.index.json").write_text(json.dumps({"weight_map": weights}))
    assert problem(folder) == f"{FILE}.index.json names no files of weights"


@pytest.mark.parametrize("name", ["~nobody-of-that-name/model", "a" * 5000])
def test_names_that_are_no_path(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert problem(name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(folder, value):
    """Of a token that the trial's texts do not have, too."""
    tensors = load_file(folder / FILE)
    name = next(key for key in tensors if key.endswith("word_embeddings.weight"))
    tensors[name][-1, 0] = value
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    assert problem(folder).endswith("word_embeddings.weight has NaN or infinity in it, allowed are finite numbers")


@pytest.mark.parametrize("kind", [torch.int8, torch.complex64])
def test_weights_in_other_numbers(folder, kind):
    """Without a quantization_config nothing says what an integer stands for: transformers would take 1 for 1.0."""
    tensors = load_file(folder / FILE)
    save_file(tensors | {"position_ids": torch.arange(4)[None]}, folder / FILE, metadata={"format": "pt"})
    Backbone(str(folder), TASKS["classification"], LABELS, pad_token_id=0)
    name = next(key for key in tensors if key.endswith("query.weight"))
    save_file(tensors | {name: tensors[name].to(kind)}, folder / FILE, metadata={"format": "pt"})
    said = {torch.int8: "I8", torch.complex64: "C64"}[kind]
    assert problem(folder) == f"{FILE} has {name} in {said}, quantised or complex, allowed are floating-point numbers"


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_more_blocks_than_the_configuration_names(tiny_models, tmp_path, caplog, kind):
    """transformers takes the first of them without a word."""
    shutil.copytree(tiny_models[kind], tmp_path / "model")
    changed(tmp_path / "model", num_hidden_layers=1)
    assert len(Backbone(str(tmp_path / "model"), TASKS["classification"], LABELS, pad_token_id=0).blocks) == 1
    assert "more blocks in " in caplog.text and "than the 1 that its config.json names: they are left out" in caplog.text


def test_no_weights(folder):
    (folder / FILE).rename(folder / "tf_model.h5")
    assert problem(folder) == "has no model.safetensors or pytorch_model.bin (but tf_model.h5)"
    (folder / "tf_model.h5").unlink()
    assert problem(folder) == "has no model.safetensors or pytorch_model.bin"


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_file_that_is_cut_off(folder, kept):
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[:kept])
    assert problem(folder).startswith(f"{FILE} is cut off")
    if kept == -1:
        assert problem(folder) == f"{FILE} is cut off: {len(whole) - 1} bytes of {len(whole)}"


def test_other_files_under_that_name(folder):
    (folder / FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 8\n")
    assert problem(folder) == f"{FILE} is a pointer of Git LFS and not the file, `git lfs pull` gets it"
    (folder / FILE).write_bytes(struct.pack("<Q", 4) + b"<html>" + b" " * 90)
    assert problem(folder) == f"{FILE} is no safetensors file"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_several_files(folder, kind):
    """All there; one cut off; one missing."""
    names = shards(folder, kind)
    Backbone(str(folder), TASKS["classification"], LABELS, pad_token_id=0)
    whole = (folder / names[1]).read_bytes()
    (folder / names[1]).write_bytes(whole[:-200])
    assert problem(folder).startswith(f"{names[1]} is cut off")
    (folder / names[1]).unlink()
    assert problem(folder) == f"{names[1]} is missing, its index names it"


def test_weights_of_another_shape_or_none(folder):
    """What the sizes do not tell, loading does: in one line, too."""
    changed(folder, hidden_size=32)
    assert "shape" in problem(folder)
    changed(folder, hidden_size=16, num_hidden_layers=9)
    assert "lacks bert.encoder.layer." in problem(folder)


def test_architectures_without_the_class_that_a_task_needs(tmp_path):
    small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    AutoModel.from_config(CohereConfig(**small)).save_pretrained(tmp_path / "cohere")
    assert problem(tmp_path / "cohere") == "transformers has no AutoModelForSequenceClassification for 'cohere'"
    AutoModel.from_config(CONFIGS["distilbert"]).save_pretrained(tmp_path / "distilbert")
    assert problem(tmp_path / "distilbert", "causal-lm") == "transformers has no AutoModelForCausalLM for 'distilbert'"
    half = {f"{half}_{size}": 2 for half in ("encoder", "decoder") for size in ("layers", "attention_heads", "ffn_dim")}
    AutoModel.from_config(BartConfig(vocab_size=40, d_model=16, **half)).save_pretrained(tmp_path / "bart")
    assert problem(tmp_path / "bart", "causal-lm") == (
        "of 'bart' AutoModelForCausalLM takes the decoder alone, which was made to read an encoder; allowed are decoders"
    )


def test_a_quantised_model_of_the_hub(monkeypatch):
    """Its config.json is all that is looked at."""
    config = LlamaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    monkeypatch.setattr("fedara_flwr.adapters.backbone.AutoConfig.from_pretrained", lambda *args, **more: config)
    assert problem("somebody/a-model-GPTQ").startswith("its weights are quantised already (gptq)")
