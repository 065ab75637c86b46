"""Adapters and heads of several clients over one backbone: one forward and backward pass serves all of them.

A batch has each client's rows in turn, as many of every client. The frozen layers take all rows in one product; every
adapter and every linear layer of the head takes each client's rows with that client's own values, which lie stacked along a
first axis. No row of one client meets another's values, so each slice of a gradient is that client's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fedara_flwr.adapters.attach import ADAPTER, AdaptedModel
from fedara_flwr.adapters.layer import stacked_linear
from fedara_flwr.adapters.prefix import TOLERANCE
from fedara_flwr.log import error_line
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import SLOT_PARTS

STACKED_PARTS = (*SLOT_PARTS, "head")


def loaded(adapted: AdaptedModel) -> list[torch.Tensor]:
    """Adapters and head of the client that was loaded last; the next `AdaptedModel.load` leaves these tensors alone."""
    return [p.data for part in STACKED_PARTS for p in adapted.parameters(part)]


class Stack:
    """Trainable values of several clients with one mask, and their gradients.

    The model's own parameters stay what score, terms, clipping and `AdaptedModel.collect` know: `show` makes them views of one
    client's slices, so whatever is done to them in place is done to that client.
    """

    def __init__(self, adapted: AdaptedModel, values: Sequence[list[torch.Tensor]]) -> None:
        """`values` are what `loaded` gave of each client; the last of them is still loaded."""
        self.adapted, self.clients = adapted, len(values)
        self._own = {part: adapted.parameters(part) for part in STACKED_PARTS}
        own = [p for parameters in self._own.values() for p in parameters]
        self._stacked = [
            nn.Parameter(torch.stack(rows), requires_grad=p.requires_grad)
            for p, rows in zip(own, zip(*values, strict=True), strict=True)
        ]
        for p in self._stacked:
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        self._views = [
            [(mine, p.data[i], None if p.grad is None else p.grad[i]) for mine, p in zip(own, self._stacked, strict=True)]
            for i in range(self.clients)
        ]

    def parameters(self, part: str) -> list[nn.Parameter]:
        """All clients' values of one part, each of shape (clients, ...), in the order of `AdaptedModel.parameters`.

        Their gradients are to be zeroed in place, never dropped: what `show` hands out are views of them.
        """
        start = sum(len(self._own[before]) for before in STACKED_PARTS[: STACKED_PARTS.index(part)])
        return self._stacked[start : start + len(self._own[part])]

    def show(self, client: int) -> None:
        """Make the model's parameters and their gradients views of one client's."""
        for parameter, data, grad in self._views[client]:
            parameter.data, parameter.grad = data, grad

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Forward passes inside are of a batch that has each client's rows in turn."""
        layers = [self.adapted.layers[index] for index, _ in self.adapted.alive()]
        heads = linear_layers(self.adapted)
        factors = zip(*(self.parameters(part) for part in SLOT_PARTS), strict=True)
        by_name = dict(zip((p.name for p in self.adapted.spec.head), self.parameters("head"), strict=True))
        try:
            for layer, (b, e, a) in zip(layers, factors, strict=True):
                layer.stacked = {ADAPTER: (b, e, a)}
            for name, module in heads.items():
                weight, bias = by_name[f"{name}.weight"], by_name.get(f"{name}.bias")
                module.forward = partial(stacked_linear, weight=weight, bias=bias)  # type: ignore[method-assign]
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop("stacked", None)
            for module in heads.values():
                module.__dict__.pop("forward", None)


def linear_layers(adapted: AdaptedModel) -> dict[str, nn.Module]:
    """The modules that hold the head's parameters, by name."""
    names = dict.fromkeys(parameter.name.rpartition(".")[0] for parameter in adapted.spec.head)
    return {name: adapted.model.get_submodule(name) for name in names}


def problem(adapted: AdaptedModel) -> str:
    """Why several clients cannot go through the model together; '' where they can.

    Tried with two made-up clients, together and one after the other. What was loaded is gone afterwards.
    """
    for name, module in linear_layers(adapted).items():
        if type(module) is not nn.Linear:
            return f"{name} of its head is not a linear layer"
    try:
        bound = TOLERANCE[getattr(torch, adapted.backbone.dtype)]
        return "" if _difference(adapted) <= bound else "a layer takes other rows than those of the batch"
    except Exception as error:  # whatever a model that is not built like that may raise
        return error_line(error)


@torch.no_grad()
def _difference(adapted: AdaptedModel) -> float:
    """Largest difference between outputs of two clients together and one after the other, over the largest output."""
    spec, rng = adapted.spec, np.random.default_rng(0)
    mask = RankMask.full([1] * len(spec.modules))
    config = adapted.model.config
    tokens = torch.arange(24, device=adapted.device).view(4, 6) % config.get_text_config().vocab_size
    real = torch.ones_like(tokens)
    real[1, 4:] = real[2, 5:] = 0
    batch = {"input_ids": tokens.where(real > 0, config.pad_token_id or 0), "attention_mask": real}
    adapted.model.eval()
    values, alone = [], []
    for rows in (slice(0, 2), slice(2, 4)):
        # large, so that a client's values in place of another's are seen
        arrays = {part: rng.normal(0, 0.5, spec.length(part, mask)).astype(np.float32) for part in ("B", "A", "head")}
        adapted.load(arrays, mask, (1.0,) * len(spec.modules))
        values.append(loaded(adapted))
        alone.append(_numbers(adapted.outputs({name: value[rows] for name, value in batch.items()})))
    with Stack(adapted, values).whole():
        together = _numbers(adapted.outputs(batch))
    expected = torch.cat(alone)
    return float((together - expected).abs().max() / expected.abs().max())


def _numbers(outputs: Any) -> torch.Tensor:
    """What a model gives for each row, such as logits, or starts and ends of answers; float32, shape (rows, ...)."""
    tensors = [value.float().flatten(1) for value in outputs.values() if isinstance(value, torch.Tensor)]
    return torch.cat(tensors, dim=1)
