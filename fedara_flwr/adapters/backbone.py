"""Loads the backbone: a local directory, then an installed model package, then the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from fedara_flwr.adapters import blocks, fit, folders, heads, pieces
from fedara_flwr.adapters import packaged as packages
from fedara_flwr.adapters.precision import number_type
from fedara_flwr.adapters.quantise import library, quantise
from fedara_flwr.config import QUANTISED
from fedara_flwr.keys import ConfigError
from fedara_flwr.log import first_line
from fedara_flwr.model.spec import ModelSpec, ParameterSpec, Vector
from fedara_flwr.tasks.base import Task

logger = logging.getLogger(__name__)

LOAD_ERRORS = Exception  # of transformers, tokenizers, safetensors, pickle, for files that are not what they should be


def locate(name: str) -> str:
    """A local directory for `name` where there is one, else `name` itself (a Hub id).

    Raises:
        ConfigError: the folder holds no model that can serve; the packaged weights are not the published ones.
    """
    if os.path.isdir(os.path.expanduser(name)):  # os.path takes names of any length, and users that are not there
        folder = Path(os.path.expanduser(name)).resolve()
        folders.check_folder(name, folder)
        return str(folder)
    folders.check_file(name)
    if packaged := packages.find(name):
        return packaged
    if name.startswith(("/", ".", "~")):
        raise ConfigError(f"model.name = {name!r}: there is no such directory")
    return name


def load_tokenizer(name: str, task: Task | None = None) -> Any:
    """The backbone's tokenizer, with a padding token.

    Raises:
        ConfigError: it cannot be loaded, or lacks what `task` needs.
    """
    source = locate(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise ConfigError(f"model.name = {name!r}: cannot be loaded ({first_line(error)})") from error
    tokenizer = pieces.as_published(name, source, tokenizer)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes of a folder without its files
        raise ConfigError(f"model.name = {name!r}: its tokenizer knows no word, allowed are models with a tokenizer's files")
    if not isinstance(tokenizer.model_max_length, int | float):
        line = f"its tokenizer_config.json has model_max_length = {tokenizer.model_max_length!r}, allowed is a number"
        raise ConfigError(f"model.name = {name!r}: {line}")
    if task is not None:
        task.check_tokenizer(tokenizer, name)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            line = "its tokenizer has neither a padding token nor an end token, allowed are those with one of the two"
            raise ConfigError(f"model.name = {name!r}: {line}")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class Backbone:
    """A loaded model, what it is made of and which of its modules are the head.

    Attributes:
        model: the transformers model, every parameter frozen and eval() on.
        dtype: number type of its weights, as `model.dtype` but for "auto".
        spec: modules and head.
        blocks: the repeated blocks, from the lowest.
        convolutions: names of the linear layers that the published model has as Conv1D.
        key_mapping: what `from_pretrained` must be told of the checkpoint's names, {} where they are the model's own.
        head_modules: top-level modules that hold the head, for PEFT's `modules_to_save`.
        head_refused: why the checkpoint's own head is not kept; '' where it is, and where it has none.
        other_head: whether the checkpoint's own head has other shapes.
    """

    def __init__(
        self,
        name: str,
        task: Task,
        labels: tuple[str, ...],
        *,
        dtype: str = "float32",
        pooling: str = "pretrained",
        target_modules: str = "",
        pad_token_id: int | None = None,
        device: str = "cpu",
    ) -> None:
        """Load the model, and find its blocks, its head and the layers to adapt.

        Args:
            name: as `model.name`.
            labels: label names, in order; () where the task has none.
            dtype: of the frozen weights, as `model.dtype`.
            pooling: as `model.pooling`.
            target_modules: as `adapter.target-modules`.
            pad_token_id: the tokenizer's; decoders find a row's last token by it.
            device: where the model goes.

        Raises:
            ConfigError: the model cannot be loaded, or does not fit; bitsandbytes is needed and missing.
        """
        self.name, self.labels, self.dtype = name, labels, dtype
        if self.quantised:
            library(dtype)  # before minutes of loading
        source = locate(name)
        try:
            names = AutoConfig.from_pretrained(source, trust_remote_code=False).id2label or {}
            # ids with gaps do not say which output is which
            published = [str(names[i]) for i in range(len(names))] if set(names) == set(range(len(names))) else []
            config = AutoConfig.from_pretrained(source, trust_remote_code=False, **task.model_config(labels))
            for part in {id(part): part for part in (config, config.get_text_config())}.values():
                if part.pad_token_id is None or not 0 <= part.pad_token_id < (fit.vocabulary(config) or math.inf):
                    part.pad_token_id = pad_token_id
            folders.check_class(name, config, task.auto_class)
            # in the checkpoint's own type, whatever it is to become: a float32 copy of a large one would not fit
            open_model = partial(
                getattr(transformers, task.auto_class).from_pretrained,
                source,
                config=config,
                dtype="auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # what is of the head alone, heads.py says
                trust_remote_code=False,
            )
            # a head is drawn here, but never used: clients and server get theirs from the server's seed
            with torch.random.fork_rng(devices=[]):
                self.model, info = open_model()
                self.key_mapping = _other_names(self.model, info)
                if self.key_mapping:
                    self.model, info = open_model(key_mapping=self.key_mapping)
        except ConfigError:
            raise
        except LOAD_ERRORS as error:
            raise ConfigError(f"model.name = {name!r}: cannot be loaded ({first_line(error)})") from error
        self.stored = self.model.dtype
        """The checkpoint's own number type."""
        if dtype == "auto":
            self.dtype = number_type(device, self.model.num_parameters(), self.stored)
        # by another one decoders would take padding for a row's last token; RoBERTa's kind counts its positions from it, though
        if pad_token_id is not None and not fit.counts_from_padding(self.model):
            self.model.config.pad_token_id = self.model.config.get_text_config().pad_token_id = pad_token_id
        fit.check_finite(name, self.model)
        self.model.requires_grad_(False)
        self.model.eval()
        self.convolutions = blocks.to_linear(self.model)
        ran = blocks.try_out(name, self.model, pad_token_id)
        lists = blocks.block_lists(name, self.model, ran)
        self.blocks: list[nn.Module] = [block for place in lists for block in self.model.get_submodule(place).children()]
        blocks.tell_what_is_left_out(name, self.model, lists, info["unexpected_keys"])
        below = lists[0].split(".")[0]
        other = heads.other_shapes(name, info, below if task.head == "new" else "")
        missing = set(info["missing_keys"]) - set(other)
        self.head_modules, head = self._split_head(task, missing | set(other), lists)
        layer = [p.name for p in head if p.name.split(".")[0] != below]
        kept, self.head_refused = heads.order(labels, published, [p.name for p in head], layer, missing, other)
        self.other_head = bool(other)
        # a pooler below a trained head was trained with it
        self.identity_pooler = "" if kept is not None else self._set_pooling(pooling, head)
        adapted = partial(blocks.linear_modules, name, self.model, lists, ran, self.head_modules)
        modules, adaptable = adapted(target_modules), adapted("")
        blocks.tell_what_is_left_alone(name, self.model, lists, adaptable)
        names = {p.name for p in head}
        rest = tuple(ParameterSpec(n, tuple(p.shape)) for n, p in self.model.named_parameters() if n not in names)
        self.spec = ModelSpec(self._fingerprint(() if kept is not None else head), modules, head, rest)
        if kept is not None:
            self.spec = replace(self.spec, kept=self._packed_head(kept))
        wanted = torch.float32 if self.dtype == "float32" else torch.bfloat16
        for parameter in self.model.parameters():  # no buffers: rotary frequencies need their digits
            parameter.data = parameter.data.to(wanted)
        if self.quantised:
            quantise(self.model, [m.name for m in adaptable], self.dtype, device)
        for parameter in self.head_parameters():
            parameter.data = parameter.data.float()
        self.model.to(device)

    @property
    def quantised(self) -> bool:
        """Whether the blocks' linear layers are in 8 or 4 bits: they cannot change then."""
        return self.dtype in QUANTISED

    def _split_head(
        self, task: Task, missing: set[str], lists: tuple[str, ...]
    ) -> tuple[tuple[str, ...], tuple[ParameterSpec, ...]]:
        """Head: what the checkpoint lacks and the task layer, whole top-level modules; nothing where the task has no head."""
        inside = sorted(key for key in missing if any(key.startswith(place + ".") for place in lists))
        if inside:
            raise ConfigError(f"model.name = {self.name!r}: the checkpoint lacks {inside[0]} inside the blocks")
        if task.head == "none":
            if missing:
                line = f"the checkpoint lacks {sorted(missing)[0]}, and task {task.name!r} trains no head"
                raise ConfigError(f"model.name = {self.name!r}: {line}")
            return (), ()
        below = lists[0].split(".")[0]
        tops = {key.split(".")[0] for key in missing if "." in key and key.split(".")[0] != below}
        there = [name for name, child in self.model.named_children() if next(child.parameters(), None) is not None]
        tops |= {name for name in there if task.is_head(name)}
        tops = tops or set(there) - {below}  # of a whole checkpoint whose head has a name that the task does not know, T5's
        head = [(n, p) for n, p in self.model.named_parameters() if n.split(".")[0] in tops]
        left = missing - {name for name, _ in head}
        head += [(n, p) for n, p in self.model.named_parameters() if n in left]
        modules = tuple(dict.fromkeys(n.split(".")[0] if n.split(".")[0] in tops else n.rpartition(".")[0] for n, _ in head))
        if not head:
            raise ConfigError(f"model.name = {self.name!r}: no head found for task {task.name!r}")
        return modules, tuple(ParameterSpec(n, tuple(p.shape)) for n, p in head)

    @property
    def last_linear(self) -> str:
        """Name of the head's linear layer with an output for each label, the last of several; '' where there is none.

        What the checkpoint lacks is of the head, too, and comes after it: a pooler, say, which may be as wide.
        """
        modules = dict(self.model.named_modules())
        names = dict.fromkeys(parameter.name.rpartition(".")[0] for parameter in self.spec.head)
        fitting = [
            name for name in names if isinstance(layer := modules[name], nn.Linear) and layer.out_features == len(self.labels)
        ]
        return next((name for name in reversed(fitting) if "pooler" not in name), fitting[-1] if fitting else "")

    def _set_pooling(self, pooling: str, head: tuple[ParameterSpec, ...]) -> str:
        """Freeze a pre-trained square pooler at the identity; returns its module name, '' where there is none.

        Sentence encoders ship a pooler that their own training never used: its features are nearly constant. A model
        without such a pooler (or whose pooler is part of the head) stays as it is.
        """
        if pooling == "pretrained":
            return ""
        for name, module in self.model.named_modules():
            dense = getattr(module, "dense", None)
            trained = any(p.name.startswith(name + ".") for p in head)
            if name.rpartition(".")[2] == "pooler" and isinstance(dense, nn.Linear) and not trained:
                if dense.in_features == dense.out_features:
                    with torch.no_grad():
                        dense.weight.copy_(torch.eye(dense.in_features))
                        dense.bias.zero_()
                    return name
        return ""

    def _packed_head(self, order: list[int]) -> Vector:
        """The head's values as they were loaded, the outputs of the last layer in this order ([] = as they are)."""
        packed = []
        for parameter in self.spec.head:
            values = self.model.get_parameter(parameter.name).detach().float()
            if order and parameter.name.rpartition(".")[0] == self.last_linear:
                values = values[order]
            packed.append(values.flatten().cpu().numpy())
        return np.concatenate(packed)

    def _fingerprint(self, head: tuple[ParameterSpec, ...]) -> str:
        names = {p.name for p in head}
        digest = hashlib.sha256()
        for name, parameter in sorted(self.model.named_parameters()):
            if name not in names:
                digest.update(name.encode())
                digest.update(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def frozen_parameters(self) -> list[nn.Parameter]:
        """All parameters but the head's, in the order of `spec.backbone`; call it before adapters change their names."""
        return [self.model.get_parameter(p.name) for p in self.spec.backbone]

    def head_parameters(self) -> list[nn.Parameter]:
        """The head's parameters, in the order of `spec.head`."""
        return [self.model.get_parameter(p.name) for p in self.spec.head]


def _other_names(model: Any, info: Mapping[str, Any]) -> dict[str, str]:
    """The `key_mapping` for a checkpoint that calls the model below the head otherwise; {} where none is needed.

    Classes for question answering have a language model's blocks under "transformer" that its checkpoint has under "model".
    """
    missing, prefix = set(info["missing_keys"]), model.base_model_prefix
    for key in sorted(info["unexpected_keys"]):
        other, _, rest = key.partition(".")
        if other != prefix and f"{prefix}.{rest}" in missing:
            return {rf"^{other}\.": f"{prefix}."}
    return {}


def silence_libraries() -> None:
    """Keep transformers' loading report and progress bars out of the run's output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
