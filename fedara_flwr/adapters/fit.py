"""Whether model, tokenizer and lengths fit together: said before the first round, not by an index error within one."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from fedara_flwr.keys import ConfigError

logger = logging.getLogger(__name__)
LEARNED = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


def check_fit(name: str, model: nn.Module, tokenizer: Any, max_length: int) -> None:
    """Refuse tokens that the model has no embedding for, and texts longer than its learned positions.

    Raises:
        ConfigError: with the numbers of both.
    """
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    known, largest = getattr(embeddings, "num_embeddings", None), max(tokenizer.get_vocab().values(), default=0)
    key = f"model.name = {name!r}"
    if known is not None and max(largest, tokenizer.pad_token_id or 0) >= known:
        raise ConfigError(
            f"{key}: its tokenizer has a token {largest}, allowed are those below {known}, the model's embeddings"
        )
    places, config = positions(model), model.config.get_text_config()  # type: ignore[operator,union-attr]
    if places is not None and max_length > places:
        raise ConfigError(f"data.max-length = {max_length}: with {key} allowed is at most {places}, its positions")
    made_for = getattr(config, "max_position_embeddings", None)
    if places is None and isinstance(made_for, int) and max_length > made_for > 0:
        logger.warning("data.max-length = %d: %s was made for texts of at most %d tokens", max_length, key, made_for)


def positions(model: nn.Module) -> int | None:
    """How many tokens a model with learned positions can take; None for others."""
    module = _learned(model)
    if module is None:
        return None
    before = getattr(module, "offset", None)  # BART's and OPT's first two rows stand for no place
    if before is None:
        before = 0 if module.padding_idx is None else module.padding_idx + 1  # nor RoBERTa's up to the padding
    return module.num_embeddings - int(before)


def counts_from_padding(model: nn.Module) -> bool:
    """Whether a token's position depends on which token is padding, as in RoBERTa."""
    module = _learned(model)
    return module is not None and module.padding_idx is not None


def _learned(model: nn.Module) -> nn.Embedding | None:
    named = ((name.rpartition(".")[2], module) for name, module in model.named_modules())
    return next((module for name, module in named if isinstance(module, nn.Embedding) and name in LEARNED), None)
