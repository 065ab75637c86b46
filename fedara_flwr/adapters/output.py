"""The logits of some positions instead of all, and blocks whose insides are computed twice instead of kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from fedara_flwr.adapters.prefix import TOLERANCE
from fedara_flwr.keys import ConfigError

if TYPE_CHECKING:
    from fedara_flwr.adapters.attach import AdaptedModel


class OutputLayer:
    """A language model's own way from what its blocks give to logits, with its caps and scales, whatever they are.

    No architecture's output is written again: the model's own forward pass runs, and where it asks its blocks it gets what
    they gave before, of the wanted positions alone.
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        """Try it on two rows.

        Raises:
            ConfigError: what comes out are not the model's logits; or the model sees the tokens that it is to say.
        """
        self._adapted, self._base = adapted, adapted.model.base_model
        tokens = torch.arange(12, device=adapted.device).view(2, 6) % adapted.model.config.get_text_config().vocab_size
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        with torch.no_grad():
            whole = adapted.outputs(batch).logits
            again = self(adapted.hidden(batch).flatten(0, 1)).view_as(whole)
            batch["input_ids"] = torch.cat([tokens[:, :-1], tokens.roll(1, 0)[:, -1:]], dim=1)  # another last token
            before = adapted.outputs(batch).logits[:, :-1]
        kind = torch.float32 if adapted.backbone.dtype == "float32" else torch.bfloat16
        name, bound = type(adapted.model).__name__, TOLERANCE[kind] * whole.abs().max()
        if not bool((before - whole[:, :-1]).abs().max() <= bound):
            line = f"{name} sees what comes after a token, allowed are decoders, which do not"
            raise ConfigError(f"model.name = {adapted.backbone.name!r}: {line}")
        if not bool((again - whole).abs().max() <= bound):
            raise ConfigError(f"model.name = {adapted.backbone.name!r}: {name} makes its logits from more than its last block")

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Logits of shape (n, vocabulary) of positions whose `AdaptedModel.hidden` are `states`, shape (n, hidden)."""
        given = _Given(last_hidden_state=states[None])
        tokens = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        asked: list[Any] = [self._base, getattr(self._base, "decoder", None)]  # OPT asks the second
        for module in filter(None, asked):
            module.forward = lambda *args, **kwargs: given
        try:
            logits: torch.Tensor = self._adapted.outputs({"input_ids": tokens}).logits[0]
        finally:
            for module in filter(None, asked):
                del module.forward
        return logits


class _Given(BaseModelOutputWithPastAndCrossAttentions):
    """What blocks gave, in which whatever else a model looks for, such as its routers' choices, is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def checkpointed(blocks: Sequence[nn.Module], autocast: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Forward passes inside keep the inputs of these blocks for the backward pass, and nothing of what happens in them.

    transformers' own checkpointing is on only in training mode, with the backbone's dropout.

    Args:
        autocast: the context in which a block is run, which is then made again: other kernels would keep other tensors.
    """

    def again(forward: Any) -> Any:
        return lambda *args, **kwargs: checkpoint(
            forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), autocast()), **kwargs
        )

    for block in blocks:
        block.forward = again(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
