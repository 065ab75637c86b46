"""Adapters on a backbone: PEFT's SVDLinear, placed without the AdaLoRA model wrapper, cut to the alive slots.

y = W0·x + s·B·diag(E)·A·x with s fixed for the whole run (methods.md, FedARA 1). LoRA is the same layer with E ≡ 1, frozen.
Shrinking slices (B, E, A) and nothing else; a module without a slot gives its place back to the bare linear layer, so that
autograd stops above the lowest living adapter by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from peft import AdaLoraConfig, inject_adapter_in_model
from peft.tuners.adalora.layer import SVDLinear
from torch import nn

from fedara_flwr.adapters.backbone import Backbone
from fedara_flwr.ranks import RankMask
from fedara_flwr.spec import SLOT_PARTS, Arrays, Vector

ADAPTER = "default"
PEFT_EPSILON = 1e-5  # AdaLoRA divides by (rank + 1e-5)


def peft_config(targets: list[str], rank: int, alpha: float, task_type: str | None = None) -> AdaLoraConfig:
    """AdaLoRA's configuration of layers whose scale is alpha / rank to float precision."""
    return AdaLoraConfig(
        target_modules=targets,
        init_r=rank,
        target_r=rank,
        lora_alpha=alpha * (1 + PEFT_EPSILON / rank),  # type: ignore[arg-type]
        total_step=1,
        task_type=task_type,
    )


class AdaptedModel:
    """A resident backbone whose adapters and head are swapped in place.

    Not safe for two clients at a time; `load` replaces every trainable value, so nothing passes from one client to the next.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.spec, self.model = backbone, backbone.spec, backbone.model
        inject_adapter_in_model(peft_config([m.name for m in self.spec.modules], 1, 1.0), self.model, ADAPTER)
        self.layers: list[SVDLinear] = []
        self._places: list[tuple[nn.Module, str]] = []
        for module in self.spec.modules:
            layer = self.model.get_submodule(module.name)
            if not isinstance(layer, SVDLinear):
                raise TypeError(f"{module.name} did not get an adapter")
            parent, _, child = module.name.rpartition(".")
            self.layers.append(layer)
            self._places.append((self.model.get_submodule(parent), child))
        self.head = backbone.head_parameters()
        self.mask = RankMask.full([0] * len(self.layers))
        self.model.requires_grad_(False)

    def load(
        self,
        arrays: Arrays,
        mask: RankMask,
        scales: tuple[float, ...],
        trainable: frozenset[str] = frozenset(),
    ) -> None:
        """Shrink to `mask` and take over values.

        Args:
            arrays: B, E, A packed under `mask` and head; E may be absent, then it is 1.
            scales: s, one per module.
            trainable: parts that get gradients.
        """
        self.mask = mask
        offsets = dict.fromkeys(SLOT_PARTS, 0)
        parts = {part: torch.from_numpy(np.array(arrays[part])) for part in SLOT_PARTS if part in arrays}
        parts.setdefault("E", torch.ones(mask.count))
        for module, layer, place, count, scale in zip(
            self.spec.modules, self.layers, self._places, mask.alive.tolist(), scales, strict=True
        ):
            setattr(*place, layer if count else layer.base_layer)
            if not count:
                self._fill(layer, {}, frozenset(), scale)
                continue
            values = {}
            for part, width in (("B", module.d_out), ("E", 1), ("A", module.d_in)):
                size = count * width
                values[part] = parts[part][offsets[part] : offsets[part] + size].view(count, width)
                offsets[part] += size
            self._fill(layer, values, trainable, scale)
        start = 0
        head = torch.from_numpy(np.array(arrays["head"]))
        for parameter in self.head:
            parameter.data = head[start : start + parameter.numel()].view_as(parameter).clone()
            parameter.grad = None
            parameter.requires_grad_("head" in trainable)
            start += parameter.numel()

    def _fill(self, layer: SVDLinear, values: dict[str, torch.Tensor], trainable: frozenset[str], scale: float) -> None:
        held = _held(layer)
        if not values:  # nothing of a dead module stays in memory
            for part in SLOT_PARTS:
                held[part][ADAPTER] = nn.Parameter(torch.empty(0, 0), requires_grad=False)
            return
        for part in SLOT_PARTS:
            value = values[part].T if part == "B" else values[part]
            held[part][ADAPTER] = nn.Parameter(value.contiguous().clone(), requires_grad=part in trainable)
        layer.ranknum[ADAPTER].data.fill_(1.0)
        layer.scaling[ADAPTER] = scale * (1.0 + PEFT_EPSILON)

    def alive(self) -> Iterator[tuple[int, dict[str, nn.Parameter]]]:
        """Index and B (d_out, k), E (k, 1), A (k, d_in) of every module with k > 0 alive slots."""
        for index, count in enumerate(self.mask.alive.tolist()):
            if count:
                held = _held(self.layers[index])
                yield index, {part: held[part][ADAPTER] for part in SLOT_PARTS}

    def parameters(self, part: str) -> list[nn.Parameter]:
        """The parameters of one part that exist now."""
        return list(self.head) if part == "head" else [values[part] for _, values in self.alive()]

    def collect(self, parts: frozenset[str]) -> Arrays:
        """The inverse of `load`: packed float32 vectors of `parts` under the present mask."""
        out: Arrays = {}
        for part in parts:
            rows = [(p.detach().T if part == "B" else p.detach()).contiguous().view(-1) for p in self.parameters(part)]
            out[part] = _vector(rows)
        return out

    def autocast(self) -> torch.autocast:
        """The context in which to run forward passes: bfloat16 where the backbone is."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.backbone.dtype == "bfloat16")

    def logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Forward pass without labels; float32 logits."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with self.autocast():
            return self.model(**inputs).logits.float()


def _held(layer: SVDLinear) -> dict[str, Any]:
    """PEFT's parameter dictionaries of one layer, by part."""
    return {"B": layer.lora_B, "E": layer.lora_E, "A": layer.lora_A}


def _vector(rows: list[torch.Tensor]) -> Vector:
    return (torch.cat(rows) if rows else torch.empty(0)).float().cpu().numpy()
