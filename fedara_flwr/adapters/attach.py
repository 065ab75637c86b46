"""Adapters on a backbone: PEFT's SVDLinear (layer.py), placed without the AdaLoRA model wrapper, cut to the alive slots.

y = W0·x + s·B·diag(E)·A·x with s fixed for the whole run. LoRA is the same layer with E ≡ 1, frozen.
Shrinking slices (B, E, A) and nothing else; a module without a slot gives its place back to the bare linear layer, so that
autograd stops above the lowest living adapter by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import AdaLoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedara_flwr.adapters import fit
from fedara_flwr.adapters.backbone import Backbone
from fedara_flwr.adapters.layer import PEFT_EPSILON, LowRankLinear
from fedara_flwr.adapters.output import OutputLayer, checkpointed
from fedara_flwr.adapters.prefix import Prefix
from fedara_flwr.adapters.quantise import dequantised
from fedara_flwr.keys import ConfigError
from fedara_flwr.log import first_line
from fedara_flwr.model.deltas import Piece, factors
from fedara_flwr.model.parts import in_order, is_slot_part, of_backbone
from fedara_flwr.model.ranks import Ints, RankMask
from fedara_flwr.model.spec import SLOT_PARTS, Arrays, Vector
from fedara_flwr.tasks.base import Batch

ADAPTER, DELTA = "default", "delta"


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
    The resident backbone's tensors are never written: what changes in it is a frozen extra adapter, or a copy.
    """

    def __init__(
        self, backbone: Backbone, cache: str = "off", cache_mb: int = 0, cache_disk_mb: int = 0, checkpointing: bool = False
    ) -> None:
        """The last four are keys of `train`. ConfigError where PEFT lays no adapters on such a model."""
        self.backbone, self.spec, self.model = backbone, backbone.spec, backbone.model
        self.device = next(self.model.parameters()).device
        self._prefix: Prefix | None = None
        self._checkpointing = checkpointing
        # keys and values of former tokens are of use to whoever generates, and to nobody else
        self._plain = {"use_cache": False} if "use_cache" in signature(self.model.forward).parameters else {}
        if cache != "off":
            with self.autocast():
                head = backbone.head_parameters()
                prefix = Prefix(self.model, backbone.blocks, head, cache_mb, cache == "half", cache_disk_mb)
            self._prefix = prefix if prefix.fits else None
        self._frozen = [] if backbone.quantised else backbone.frozen_parameters()  # what may change
        self._resident = [p.data for p in self._frozen]
        self._base = self._resident
        self._positions: Ints | None = None
        self._changes: dict[str, list[nn.Parameter]] = {}
        self._delta: Piece | None = None
        try:
            inject_adapter_in_model(peft_config([m.name for m in self.spec.modules], 1, 1.0), self.model, ADAPTER)
        except ValueError as error:  # of some layers of Mamba's, whose weights are used past the layer itself
            raise ConfigError(f"model.name = {backbone.name!r}: PEFT lays no adapters on it ({first_line(error)})") from None
        self.layers: list[LowRankLinear] = []
        self._places: list[tuple[nn.Module, str]] = []
        for module in self.spec.modules:
            parent, _, child = module.name.rpartition(".")
            self.layers.append(LowRankLinear.take_over(self.model.get_submodule(module.name)))
            self._places.append((self.model.get_submodule(parent), child))
        self.head = backbone.head_parameters()
        self.mask = RankMask.full([0] * len(self.layers))
        self.lowest = self.spec.blocks
        """The lowest block with a living module, as `ModelSpec.lowest` of the mask."""
        self.costs: dict[Any, dict[str, int]] = {}
        """What client/step.count_flops found for a mask; forgotten with the delta, which has a share in it."""
        self.model.requires_grad_(False)

    def set_delta(self, piece: Piece | None) -> None:
        """Add `piece` to the backbone in place of the one before: a frozen adapter, or, where dense, a copy of the weights.

        Raises:
            ConfigError: it is dense, and the backbone quantised.
        """
        if piece is self._delta or (piece is not None and self._delta is not None and piece.digest == self._delta.digest):
            return
        if piece is not None and not piece.ranks:
            self._check_frozen()
        pairs = factors(piece, self.spec) if piece is not None and piece.ranks else []  # raises before anything is changed
        self._delta = None
        self._release()
        self.costs.clear()
        if self._prefix is not None:
            self._prefix.clear()
        for layer in self.layers:
            if DELTA in layer.lora_A:
                layer.set_adapter([ADAPTER], inference_mode=True)  # PEFT warns where the one that goes is active
                layer.delete_adapter(DELTA)
        config = peft_config([m.name for m in self.spec.modules], 1, 1.0)
        for layer, (left, right) in zip(self.layers, pairs, strict=False):
            if not len(right):
                continue
            layer.update_layer(DELTA, 1, 1, config)
            held = _held(layer)
            for part, value in (("B", left), ("E", np.ones((len(right), 1), dtype=np.float32)), ("A", right)):
                held[part][DELTA] = nn.Parameter(self._tensor(value), requires_grad=False)
            layer.ranknum[DELTA].data = torch.ones(1, device=self.device)  # float32 whatever the backbone is: PEFT adds 1e-5
            layer.scaling[DELTA] = 1.0 + PEFT_EPSILON
        self._delta = piece

    def _tensor(self, values: NDArray[Any]) -> torch.Tensor:
        """A copy of the values as a tensor on the model's device."""
        return torch.from_numpy(np.array(values)).to(self.device)

    def resident_weight(self, name: str) -> NDArray[np.float32]:
        """A module's weight as it was loaded, or the one that its quantised layer stands for.

        Float32, shape (d_out, d_in); read-only.
        """
        index = [module.name for module in self.spec.modules].index(name)
        if self.backbone.quantised:
            return dequantised(self.layers[index].base_layer)
        weight = self._weights()[index]
        data = next(data for p, data in zip(self._frozen, self._resident, strict=True) if p is weight)
        array: NDArray[np.float32] = data.float().numpy().view()
        array.flags.writeable = False
        return array

    def _weights(self) -> list[nn.Parameter]:
        """The frozen weight of each adapted layer, in the order of `spec.modules`."""
        return [layer.base_layer.get_parameter("weight") for layer in self.layers]

    def _check_frozen(self) -> None:
        if self.backbone.quantised:
            line = "quantised weights cannot change, allowed are 'float32' and 'bfloat16'"
            raise ConfigError(f"model.dtype = {self.backbone.dtype!r} (or node-config dtype): {line}")

    def _release(self) -> None:
        """Put the backbone back to its resident values, and drop every copy."""
        for parameter, data in zip(self._frozen, self._resident, strict=True):
            parameter.data, parameter.grad = data, None
            parameter.requires_grad_(False)
        self._base = self._resident

    def _change_backbone(self, changes: Arrays, positions: Ints | None, trainable: frozenset[str]) -> None:
        """Make the backbone one client's: the resident weights plus a dense delta plus `changes`; copied where it differs.

        Args:
            changes: differences from the pre-trained values by part of the backbone, each of the part's parameters or, with
                `positions`, at those of the modules' weights.
            positions: as `draws.sparse_positions`; None = all.
            trainable: parts that get gradients.
        """
        self._release()
        self._positions, self._changes = positions, {}
        weights = self._weights()
        if self._delta is not None and not self._delta.ranks:
            _add(weights, self._tensor(self._delta.arrays["dense"]))
            self._base = [p.data for p in self._frozen]
        for name, change in changes.items():
            values = self._tensor(change)
            if positions is None:
                members = self._members(name)
            else:
                members, values = weights, torch.zeros(sum(w.numel() for w in weights), device=self.device)
                values[self._tensor(positions)] = self._tensor(change)
            _add(members, values)
            self._changes[name] = members
            for parameter in members if name in trainable else ():
                parameter.requires_grad_(True)

    def _members(self, name: str) -> list[nn.Parameter]:
        """The parameters of a part of the backbone, in the order of `spec.parameters`."""
        held = {p.name for p in self.spec.parameters(name)}
        return [p for p, spec in zip(self._frozen, self.spec.backbone, strict=True) if spec.name in held]

    def gradient_masks(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """(weight, which of its numbers may change) where only drawn positions of the backbone are trained."""
        if self._positions is None:
            return []
        weights = self._weights()
        whole = torch.zeros(sum(w.numel() for w in weights), dtype=torch.bool, device=self.device)
        whole[self._tensor(self._positions)] = True
        pieces = whole.split([w.numel() for w in weights])
        return [(w, piece.view_as(w)) for w, piece in zip(weights, pieces, strict=True)]

    def load(
        self,
        arrays: Arrays,
        mask: RankMask,
        scales: tuple[float, ...],
        trainable: frozenset[str] = frozenset(),
        positions: Ints | None = None,
    ) -> None:
        """Cut the adapters to `mask` and take over the values of adapters, head and backbone.

        Args:
            arrays: B, E, A packed under `mask`, and head where the task has one; E may be absent, then it is 1; parts of the
                backbone only where they differ from the pre-trained values.
            scales: s, one per module.
            trainable: parts that get gradients.
            positions: numbers of the backbone that `arrays["backbone"]` holds, as `draws.sparse_positions`; None = all.

        Raises:
            ConfigError: there is a part of the backbone among the arrays, and that is quantised.
        """
        changes = {name: vector for name, vector in arrays.items() if of_backbone([name])}
        if changes:
            self._check_frozen()
        self.mask = mask
        self.lowest = self.spec.lowest(mask)
        self._change_backbone(changes, positions, trainable)
        factors = self.spec.rows(self.spec.complete(arrays, mask), mask)
        for rows, layer, place, scale in zip(factors, self.layers, self._places, scales, strict=True):
            count = len(rows["E"])
            active = [name for name, there in ((ADAPTER, count), (DELTA, DELTA in layer.lora_A)) if there]
            setattr(*place, layer if active else layer.base_layer)
            layer.set_adapter(active, inference_mode=True)
            values = {part: self._tensor(row) for part, row in rows.items()} if count else {}
            self._fill(layer, values, trainable, scale)
        start = 0
        head = self._tensor(arrays["head"]) if self.head else None  # a task may have none
        for parameter in self.head:
            assert head is not None
            parameter.data = head[start : start + parameter.numel()].view_as(parameter).clone()
            parameter.grad = None
            parameter.requires_grad_("head" in trainable)
            start += parameter.numel()

    def _fill(self, layer: LowRankLinear, values: dict[str, torch.Tensor], trainable: frozenset[str], scale: float) -> None:
        held = _held(layer)
        if not values:  # nothing of a dead module stays in memory
            for part in SLOT_PARTS:
                held[part][ADAPTER] = nn.Parameter(torch.empty(0, 0), requires_grad=False)
            return
        for part in SLOT_PARTS:
            value = values[part].T if part == "B" else values[part]
            held[part][ADAPTER] = nn.Parameter(value.contiguous().clone(), requires_grad=part in trainable)
        layer.ranknum[ADAPTER].data = torch.ones(1, device=self.device)
        layer.scaling[ADAPTER] = scale * (1.0 + PEFT_EPSILON)

    def alive(self) -> Iterator[tuple[int, dict[str, nn.Parameter]]]:
        """Index and B (d_out, k), E (k, 1), A (k, d_in) of every module with k > 0 alive slots."""
        for index, count in enumerate(self.mask.alive.tolist()):
            if count:
                held = _held(self.layers[index])
                yield index, {part: held[part][ADAPTER] for part in SLOT_PARTS}

    def parameters(self, part: str) -> list[nn.Parameter]:
        """The parameters of one part that exist now; of a part of the backbone those that are trained."""
        if part == "head":
            return list(self.head)
        if not is_slot_part(part):
            return [p for p in self._changes.get(part, ()) if p.requires_grad]
        return [values[part] for _, values in self.alive()]

    def collect(self, parts: frozenset[str]) -> Arrays:
        """The inverse of `load`: packed float32 vectors of `parts` under the present mask."""
        out: Arrays = {}
        for part in in_order(parts):
            if of_backbone([part]):
                out[part] = self._backbone_change(part)
                continue
            rows = [(p.detach().T if part == "B" else p.detach()).contiguous().view(-1) for p in self.parameters(part)]
            out[part] = _vector(rows)
        return out

    def _backbone_change(self, part: str) -> Vector:
        """What training made of a part of the backbone: differences from the resident values, the delta not counted."""
        base = dict(zip(self._frozen, self._base, strict=True))
        rows = _vector([(p.detach() - base[p]).float().view(-1) for p in self._changes[part]])
        return rows if self._positions is None else rows[self._positions]

    @torch.no_grad()
    def merge(self) -> None:
        """Put what the loaded adapters and the delta add into copies of the weights, and the bare layers in their places.

        The model is then one of stock transformers, until the next `load`, in the checkpoint's own type: transformers loads a
        whole model in one. Sums are float32, and rounded once.

        Raises:
            ConfigError: the backbone is quantised.
        """
        self._check_frozen()
        for layer, place in zip(self.layers, self._places, strict=True):
            if isinstance(getattr(*place), LowRankLinear):
                weight: Any = layer.base_layer.weight
                changed = weight.data.float() + sum(layer.get_delta_weight(name) for name in layer.active_adapters)
                weight.data = changed.to(self.backbone.stored)
                setattr(*place, layer.base_layer)
        for parameter in (*self._frozen, *self.head):
            parameter.data = parameter.data.to(self.backbone.stored)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The context in which to run forward passes: bfloat16 unless the backbone is float32."""
        on, kind = self.backbone.dtype != "float32", self.device.type
        # on a processor flash attention's backward pass in bfloat16 takes ten times that of float32
        plain = on and kind == "cpu" and torch.is_grad_enabled()
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=on), sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            yield

    @property
    def boundary(self) -> int:
        """Blocks whose output `below` keeps: those under `lowest`; 0 where that differs by client, or without cache."""
        return 0 if self._prefix is None or self._changes else self.lowest

    def below(self, batch: Batch) -> torch.Tensor | None:
        """What enters block `lowest`, shape (batch, longest, hidden), kept from before or run now; for `outputs`.

        None where `boundary` is 0.
        """
        if self._prefix is None or not self.boundary:
            return None
        with self.autocast():
            return self._prefix.states(_inputs(batch), self.boundary)

    def outputs(self, batch: Batch, below: torch.Tensor | None = None, **more: Any) -> Any:
        """Forward pass without labels, of all blocks or from what `below` gave for this batch.

        Args:
            more: further arguments of the model's own forward pass.

        Returns:
            The model's own output object, in the types that it computes in.
        """
        with self._running(below):
            return self.model(**_inputs(batch), **self._plain, **more)

    def hidden(self, batch: Batch, below: torch.Tensor | None = None) -> torch.Tensor:
        """What the last block gives, normed as the model does it, of every position: shape (batch, longest, hidden).

        For models whose output layer is large: `output_layer` then gives the logits of the positions that are wanted.

        Args:
            below: as in `outputs`.
        """
        with self._running(below):
            states: torch.Tensor = self.model.base_model(**_inputs(batch), **self._plain)[0]  # type: ignore[operator]
        return states

    @cached_property
    def positions(self) -> int | None:
        """How many tokens a model with learned positions can take; None for others."""
        return fit.positions(self.model)

    @cached_property
    def output_layer(self) -> OutputLayer:
        """What makes the model's logits from `hidden`; ConfigError where nothing does."""
        return OutputLayer(self)

    @contextmanager
    def _running(self, below: torch.Tensor | None) -> Iterator[None]:
        """Inside, the model runs as it is to run: in its types, from `below`, keeping for the backward pass what it should."""
        above = nullcontext() if self._prefix is None else self._prefix.above(below, self.boundary)
        upper = self.backbone.blocks[0 if below is None else self.boundary :]
        again = checkpointed(upper, self.autocast) if self._checkpointing and torch.is_grad_enabled() else nullcontext()
        with self.autocast(), above, again:
            yield


def _inputs(batch: Batch) -> Batch:
    """The tensors of a batch that the model is given: all but the labels."""
    return {name: value for name, value in batch.items() if not name.startswith("labels")}


def _add(parameters: list[nn.Parameter], change: torch.Tensor) -> None:
    """Replace each parameter's values by a float32 copy to which its share of `change` is added."""
    pieces = change.split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.data = parameter.data.float() + piece.view_as(parameter)


def _held(layer: LowRankLinear) -> dict[str, Any]:
    """PEFT's parameter dictionaries of one layer, by part."""
    return {"B": layer.lora_B, "E": layer.lora_E, "A": layer.lora_A}


def _vector(rows: list[torch.Tensor]) -> Vector:
    return (torch.cat(rows) if rows else torch.empty(0)).float().cpu().numpy()
