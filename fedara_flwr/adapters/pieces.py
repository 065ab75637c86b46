"""Tokenizers that transformers makes of a SentencePiece file: that they give that file's own tokens.

For some models (DeBERTa-V3, mBART) transformers 5 leaves out the file's normalisation (NFKC and more), with a tokenizer.json as
without: "ﬁ", "…" or a no-break space, which the model was taught as "fi", "..." and a space, are unknown then. It is put back.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from fedara_flwr.keys import ConfigError

logger = logging.getLogger(__name__)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ALIKE = ("model_input_names", "padding_side", "truncation_side", "model_max_length", "chat_template", "extra_special_tokens")
WORDS = 8  # of the vocabulary, in the text by which both are compared


def as_published(name: str, source: str, tokenizer: Any) -> Any:
    """The tokenizer, with the normalisation of its files where transformers left that out.

    Args:
        name: as `model.name`.
        source: folder or Hub id that it was loaded from.
        tokenizer: as transformers loaded it.

    Raises:
        ConfigError: made of a SentencePiece file alone, it gives other tokens than that.
    """
    pieces = getattr(tokenizer, "vocab_file", None) or ""
    if not tokenizer.is_fast:
        return tokenizer
    if (whole := _file(source, "tokenizer.json")) is None:
        if not pieces.endswith(".model") or (model := _processor(pieces)) is None:
            return tokenizer
        _compare(name, tokenizer, model, Path(pieces).name)
    if _normalises(tokenizer.backend_tokenizer.normalizer):
        return tokenizer
    normalizer = _of_file(whole) if whole is not None else _of_model(pieces, tokenizer.backend_tokenizer.normalizer)
    return tokenizer if normalizer is None else _with(tokenizer, normalizer)


def _file(source: str, file: str) -> Path | None:
    if Path(source).is_dir():
        return Path(source) / file if (Path(source) / file).is_file() else None
    cached = try_to_load_from_cache(source, file)
    return Path(cached) if isinstance(cached, str) else None


def _normalises(normalizer: Any) -> bool:
    return normalizer is not None and b"Precompiled" in normalizer.__getstate__()


def _of_file(file: Path) -> Any:
    """The normaliser of a tokenizer.json, None where it is not SentencePiece's."""
    from tokenizers import Tokenizer

    if '"Precompiled"' not in file.read_text(encoding="utf-8"):
        return None
    normalizer = Tokenizer.from_file(str(file)).normalizer
    return normalizer if _normalises(normalizer) else None


def _of_model(file: str, rest: Any) -> Any:
    """The normaliser of a SentencePiece file before what transformers has instead; None where the file has none."""
    from tokenizers import normalizers
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString(Path(file).read_bytes())
    if not (charsmap := proto.normalizer_spec.precompiled_charsmap):
        return None
    return normalizers.Sequence([normalizers.Precompiled(charsmap), *([rest] if rest is not None else [])])


def _processor(file: str) -> Any:
    """SentencePiece's own tokenizer; None where the file is of another kind (tiktoken)."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=file)
    except Exception:  # RuntimeError or OSError, by version
        return None


def _compare(name: str, tokenizer: Any, model: Any, file: str) -> None:
    known = [model.id_to_piece(number) for number in range(model.get_piece_size())]
    words = [piece[1:] for piece in known if piece[0] == "▁" and piece[1:].isascii() and piece[1:].isalpha() and len(piece) > 3]
    text = " ".join(word.lower() for word in words[:WORDS])
    made, own = tokenizer(text, add_special_tokens=False).tokens(), model.encode(text, out_type=str)
    if made == own:
        return
    place = next((i for i, (one, two) in enumerate(zip(made, own, strict=False)) if one != two), min(len(made), len(own)))
    found = f"{made[place : place + 3]} for {own[place : place + 3]}"
    line = f"what transformers makes of {file} gives other tokens than it has ({found}), allowed is one with tokenizer.json"
    raise ConfigError(f"model.name = {name!r}: {line}")


def _with(tokenizer: Any, normalizer: Any) -> Any:
    """The same tokenizer with another normaliser, of a class that takes it as it was saved."""
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizer
    named = {key: value for key in NAMED if (value := getattr(tokenizer, key)) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named, **{key: getattr(tokenizer, key) for key in ALIKE})
