"""Whether model, tokenizer and lengths fit together: said before the first round, not by an index error within one."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import AutoConfig

from fedara_flwr.keys import ConfigError

logger = logging.getLogger(__name__)
LEARNED = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


def check_tokens(name: str, source: str, tokenizer: Any) -> None:
    """Refuse, before weights are loaded, tokens that the model has no embedding for.

    Args:
        name: as `model.name`.
        source: folder or Hub id that it is loaded from.

    Raises:
        ConfigError: with the numbers of both.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception:  # who loads the model says it
        return
    if known := vocabulary(config):
        _check_numbers(name, tokenizer, known)


def vocabulary(config: Any) -> int:
    """How many tokens a model has embeddings for by its configuration; 0 where that does not say it."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else 0


def _check_numbers(name: str, tokenizer: Any, known: int) -> None:
    rest = [number for token, number in tokenizer.get_vocab().items() if token != tokenizer.pad_token]
    largest, pad = max(rest, default=0), tokenizer.pad_token_id or 0
    if largest >= known:
        line = f"its tokenizer has a token {largest}, allowed are those below {known}, the model's embeddings"
        raise ConfigError(f"model.name = {name!r}: {line}")
    if pad >= known:
        line = f"its padding token {str(tokenizer.pad_token)!r} is number {pad}, allowed are those below {known}"
        way = "the model's embeddings: resize these, or name another as pad_token in tokenizer_config.json"
        raise ConfigError(f"model.name = {name!r}: {line}, {way}")


def check_finite(name: str, model: nn.Module) -> None:
    """Refuse weights with NaN or infinity in them, as a training that failed leaves them.

    Raises:
        ConfigError: with the first such tensor.
    """
    for called, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ConfigError(f"model.name = {name!r}: {called} has NaN or infinity in it, allowed are finite numbers")


def check_fit(name: str, model: nn.Module, tokenizer: Any, max_length: int) -> None:
    """Refuse tokens that the model has no embedding for, and texts longer than its learned positions.

    Raises:
        ConfigError: with the numbers of both.
    """
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    if (known := getattr(embeddings, "num_embeddings", None)) is not None:
        _check_numbers(name, tokenizer, known)
    key = f"model.name = {name!r}"
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
