"""Writes what was trained for stock PEFT and transformers (contracts.md §8)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from fedara_flwr.adapters.attach import AdaptedModel, peft_config
from fedara_flwr.adapters.backbone import Backbone
from fedara_flwr.ranks import RankMask
from fedara_flwr.spec import Arrays


def save_peft(
    folder: Path, backbone: Backbone, arrays: Arrays, mask: RankMask, scales: tuple[float, ...], task_type: str
) -> None:
    """An AdaLoRA directory that `PeftModel.from_pretrained` loads with the same logits.

    `rank_pattern` (JSON booleans) carries the mask; modules without slots are not in it. PEFT knows one scale for all
    modules: where ours differ, the ratio is folded into E. The head, and a pooler that was set to the identity, are
    `modules_to_save`.
    """
    alive = np.flatnonzero(mask.alive).tolist()
    if not len(alive):
        raise ValueError("no adapter is alive: export the model instead")
    spec = backbone.spec
    rank = max(mask.ranks[m] for m in alive)
    alpha = scales[alive[0]] * rank
    config = peft_config([spec.modules[m].name for m in alive], rank, alpha, task_type)
    config.base_model_name_or_path = backbone.name
    config.inference_mode = True
    config.modules_to_save = list(backbone.head_modules) + ([backbone.identity_pooler] if backbone.identity_pooler else [])
    config.rank_pattern = {}
    tensors: dict[str, torch.Tensor] = {}
    e_part = arrays.get("E", np.ones(mask.count, dtype=np.float32))
    starts = {"B": 0, "E": 0, "A": 0}
    for m in alive:
        module, count = spec.modules[m], int(mask.alive[m])
        rows = {}
        for part, width, source in (
            ("B", module.d_out, arrays["B"]),
            ("E", 1, e_part),
            ("A", module.d_in, arrays["A"]),
        ):
            rows[part] = torch.from_numpy(np.array(source[starts[part] : starts[part] + count * width])).view(count, width)
            starts[part] += count * width
        prefix = f"base_model.model.{module.name}"
        tensors[f"{prefix}.lora_A"] = rows["A"]
        tensors[f"{prefix}.lora_B"] = rows["B"].T.contiguous()
        tensors[f"{prefix}.lora_E"] = rows["E"] * (scales[m] * rank / alpha)
        bits = np.zeros(rank, dtype=bool)
        bits[: mask.ranks[m]] = mask.module(m)
        config.rank_pattern[f"{module.name}.lora_E"] = bits.tolist()
    start = 0
    for parameter in spec.head:
        values = arrays["head"][start : start + parameter.size]
        tensors[f"base_model.model.{parameter.name}"] = torch.from_numpy(np.array(values)).view(parameter.shape)
        start += parameter.size
    if backbone.identity_pooler:
        for name, value in backbone.model.get_submodule(backbone.identity_pooler).named_parameters():
            tensors[f"base_model.model.{backbone.identity_pooler}.{name}"] = value.detach().float()
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def save_model(folder: Path, adapted: AdaptedModel) -> None:
    """The whole model without adapters, for methods that train none; loads in stock transformers."""
    if adapted.mask.count:
        raise ValueError("adapters are alive: export them with save_peft")
    adapted.model.save_pretrained(str(folder))
