"""Writes what was trained in the formats that stock PEFT and transformers load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig, PeftConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import save_file
from torch.nn.functional import pad

from fedara_flwr.adapters.attach import AdaptedModel, peft_config
from fedara_flwr.adapters.backbone import Backbone, locate
from fedara_flwr.adapters.blocks import as_published
from fedara_flwr.adapters.packaged import NOTES
from fedara_flwr.adapters.rotary import name_rotary
from fedara_flwr.keys import ConfigError
from fedara_flwr.model.deltas import Weights
from fedara_flwr.model.spec import Vector


def save_adapters(folder: Path, backbone: Backbone, weights: Weights, task_type: str | None, plain: bool = False) -> None:
    """Write adapters in AdaLoRA's format where they have E, else as LoRA with a rank for each module.

    Also without E as AdaLoRA's where stock PEFT would lose a part of LoRA.

    Args:
        plain: as LoRA of one rank.

    Raises:
        ConfigError: of plain LoRA stock PEFT would lose a part.
    """
    lost = _lost(backbone, weights)
    if plain and lost:
        line = f"PEFT does not load LoRA on {lost[0]} of {backbone.model.config.model_type!r} (peft#3711)"
        raise ConfigError(f"--format lora: {line}, allowed are peft and merged")
    save = save_plain_lora if plain else save_peft if lost or "E" in weights.arrays else save_lora
    save(folder, backbone, weights, task_type)


def _lost(backbone: Backbone, weights: Weights) -> list[str]:
    """Modules whose LoRA stock PEFT takes for that of experts, which have their names: it is not loaded."""
    names = [backbone.spec.modules[m].name for m in _alive(weights)]
    config = LoraConfig(target_modules=names)
    try:
        convert_peft_config_for_transformers(config, backbone.model, None)
    except ValueError:  # it names one of two that it would fuse
        return names
    return [name for name in names if name not in set(config.target_modules or ())]


def save_peft(folder: Path, backbone: Backbone, weights: Weights, task_type: str | None) -> None:
    """An AdaLoRA directory that `PeftModel.from_pretrained` loads with the same logits.

    `rank_pattern` (JSON booleans) carries the mask; modules without slots are not in it. PEFT knows one scale for all
    modules: where ours differ, the ratio is folded into E. The head, and a pooler that was set to the identity, are
    `modules_to_save`.
    """
    spec, mask, scales = backbone.spec, weights.mask, weights.scales
    alive = _alive(weights)
    rank = max(mask.ranks[m] for m in alive)
    alpha = scales[alive[0]] * rank
    config = peft_config([spec.modules[m].name for m in alive], rank, alpha, task_type)
    config.rank_pattern = {}
    tensors = {}
    for m, rows in _rows(backbone, weights):
        name = spec.modules[m].name
        tensors[f"{name}.lora_A"] = rows["A"]
        tensors[f"{name}.lora_B"] = rows["B"].T.contiguous()
        tensors[f"{name}.lora_E"] = rows["E"] * (scales[m] * rank / alpha)
        bits = np.zeros(rank, dtype=bool)
        bits[: mask.ranks[m]] = mask.module(m)
        config.rank_pattern[f"{name}.lora_E"] = bits.tolist()
    _save(folder, backbone, config, tensors, weights.arrays.get("head"))


def save_lora(folder: Path, backbone: Backbone, weights: Weights, task_type: str | None) -> None:
    """A plain LoRA directory with the same logits; E, where there is one, is folded into B.

    Ranks and scales that differ by module are PEFT's `rank_pattern` and `alpha_pattern`.
    """
    spec, mask, scales = backbone.spec, weights.mask, weights.scales
    alive = _alive(weights)
    ranks = {spec.modules[m].name: int(mask.alive[m]) for m in alive}
    alphas = {spec.modules[m].name: scales[m] * int(mask.alive[m]) for m in alive}
    first = spec.modules[alive[0]].name
    config = LoraConfig(
        r=ranks[first],
        lora_alpha=alphas[first],  # type: ignore[arg-type]
        target_modules=list(ranks),
        rank_pattern={_exactly(name): rank for name, rank in ranks.items() if rank != ranks[first]},
        alpha_pattern={_exactly(name): alpha for name, alpha in alphas.items() if alpha != alphas[first]},  # type: ignore[misc]
        task_type=task_type,
    )
    tensors = {}
    for m, rows in _rows(backbone, weights):
        name = spec.modules[m].name
        tensors[f"{name}.lora_A.weight"] = rows["A"]
        tensors[f"{name}.lora_B.weight"] = (rows["B"] * rows["E"]).T.contiguous()
    _save(folder, backbone, config, tensors, weights.arrays.get("head"))


def save_plain_lora(folder: Path, backbone: Backbone, weights: Weights, task_type: str | None) -> None:
    """A LoRA directory for tools that know one rank only, with the same logits.

    Every living module has the rank r of the largest, filled up with zeros; lora_alpha = r, that is, scale 1: E and s are
    folded into B. Dead slots and modules are not in it, and no pattern.
    """
    spec, alive = backbone.spec, _alive(weights)
    rank = max(int(weights.mask.alive[m]) for m in alive)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[spec.modules[m].name for m in alive], task_type=task_type)
    tensors = {}
    for m, rows in _rows(backbone, weights):
        name, missing = spec.modules[m].name, rank - len(rows["E"])
        folded = rows["B"] * rows["E"] * weights.scales[m]
        tensors[f"{name}.lora_A.weight"] = pad(rows["A"], (0, 0, 0, missing))
        tensors[f"{name}.lora_B.weight"] = pad(folded, (0, 0, 0, missing)).T.contiguous()
    _save(folder, backbone, config, tensors, weights.arrays.get("head"))


def _exactly(name: str) -> str:
    """A module's name as a regular expression for it alone: PEFT would take a plain name for the end of others, too."""
    return "^" + name.replace(".", r"\.")


def _alive(weights: Weights) -> list[int]:
    alive = np.flatnonzero(weights.mask.alive).tolist()
    if not alive:
        raise ValueError("no adapter is alive: export the model instead")
    return alive


def _rows(backbone: Backbone, weights: Weights) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Index and B (k, d_out), E (k, 1), A (k, d_in) of every module with k > 0 slots."""
    rows = backbone.spec.rows(backbone.spec.complete(weights.arrays, weights.mask), weights.mask)
    for m in _alive(weights):
        yield m, {part: torch.from_numpy(np.array(values)) for part, values in rows[m].items()}


def _save(folder: Path, backbone: Backbone, config: PeftConfig, tensors: dict[str, torch.Tensor], head: Vector | None) -> None:
    """Write configuration and tensors, the head and an identity pooler among them."""
    config.base_model_name_or_path = base_of(backbone)
    config.revision = revision(backbone)
    config.inference_mode = True
    config.fan_in_fan_out = bool(backbone.convolutions)  # type: ignore[attr-defined]
    whole = [*backbone.head_modules, *([backbone.identity_pooler] if backbone.identity_pooler else [])]
    config.modules_to_save = whole or None  # type: ignore[attr-defined]
    start = 0
    for parameter in backbone.spec.head:
        assert head is not None
        tensors[parameter.name] = torch.from_numpy(np.array(head[start : start + parameter.size])).view(parameter.shape)
        start += parameter.size
    if backbone.identity_pooler:
        for name, value in backbone.model.get_submodule(backbone.identity_pooler).named_parameters():
            tensors[f"{backbone.identity_pooler}.{name}"] = value.detach().float()
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(prefixed, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def base_of(backbone: Backbone) -> str:
    """Under what name stock libraries find the backbone: its Hub id or folder, and the folder of one that no hub has."""
    return locate(backbone.name) if backbone.name in NOTES else backbone.name


def revision(backbone: Backbone) -> str | None:
    """The Hub's commit that the backbone was loaded from; None for a local folder."""
    if Path(locate(backbone.name)).is_dir():
        return None
    cached = try_to_load_from_cache(backbone.name, "config.json")  # its folder has the commit's name
    return Path(cached).parent.name if isinstance(cached, str) else None


def save_model(folder: Path, adapted: AdaptedModel) -> None:
    """The loaded model, adapters and delta merged into it; loads in stock transformers. Leaves `adapted` merged."""
    adapted.merge()
    with as_published(adapted.model, adapted.backbone.convolutions):
        adapted.model.save_pretrained(str(folder))
    name_rotary(folder)
