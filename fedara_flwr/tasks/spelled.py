"""Control tokens that a text spells out are text; tokens that somebody added to a tokenizer are tokens, as in transformers.

A control token is one of the model's own: those that a tokenizer names (bos, eos, unk, sep, pad, cls, mask), and of the other
special ones those of its chat template and what control tokens usually look like (`<|…|>`, `<s>`). A text that spells out
"[SEP]" has no separator in it. What else was added, such as markers of entities (`[E1]`), is read as `tokenizer(text)` does.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
USUAL = re.compile(
    r"<\|.+\|>|</?s>|<(bos|eos|unk|sep|pad|cls|mask|eo[dp]|(start|end)_of_turn)>|\[(UNK|SEP|PAD|CLS|MASK|/?INST)\]"
)
_readers: WeakKeyDictionary[Any, tuple[object, tuple[Any, list[str]]]] = WeakKeyDictionary()  # no value may hold its key


def special_tokens(tokenizer: Any) -> frozenset[str]:
    """All of a tokenizer's special tokens, whoever added them."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return frozenset({*tokenizer.all_special_tokens, *added} - {""})


def control_tokens(tokenizer: Any) -> frozenset[str]:
    """Those of the special tokens that are the model's own."""
    named = {str(token) for name in NAMED if (token := getattr(tokenizer, name, None))}
    template = str(tokenizer.chat_template or "")
    others = special_tokens(tokenizer) - named
    return frozenset(named | {token for token in others if USUAL.fullmatch(token) or token in template})


def read(tokenizer: Any, first: Any, second: Any = None, **options: Any) -> Any:
    """As `tokenizer(first, second, **options)`, but that control tokens which a text spells out are text; places stay.

    Args:
        first: a text, or a list of texts or of lists of words; so is `second`.
    """
    reader, blurred = _reader(tokenizer)
    if tokenizer.is_fast:
        options["split_special_tokens"] = True  # else it would keep it from finding added tokens, and ESM's from residues
    reader.truncation_side = tokenizer.truncation_side
    if blurred:
        first, second = (_blurred(side, blurred) for side in (first, second))
    return reader(first, second, **options)


def _blurred(text: Any, tokens: Sequence[str]) -> Any:
    """The texts, with a space for the first letter of each of these tokens that they spell out."""
    if isinstance(text, str):
        for token in tokens:
            text = text.replace(token, " " + token[1:])
        return text
    return [_blurred(one, tokens) for one in text] if text is not None else None


def _reader(tokenizer: Any) -> tuple[Any, list[str]]:
    """The tokenizer, or a copy whose only special tokens are control tokens; which tokens must not reach it."""
    special, controls = special_tokens(tokenizer), control_tokens(tokenizer)
    state = special, controls, frozenset(tokenizer.get_added_vocab())
    if (known := _readers.get(tokenizer)) is None or known[0] != state:
        fast = tokenizer.is_fast
        reader = _copy(tokenizer, controls) if fast and special != controls else tokenizer
        blurred = sorted(controls, key=len, reverse=True) if not fast or _makes(reader, controls) else []
        known = _readers[tokenizer] = (state, (None if reader is tokenizer else reader, blurred))
    reader, blurred = known[1]
    return tokenizer if reader is None else reader, blurred


def _makes(tokenizer: Any, controls: frozenset[str]) -> bool:
    """Whether the vocabulary makes a control token of its letters, as SentencePiece's may, in which it is a piece."""
    numbers = set(tokenizer.convert_tokens_to_ids(sorted(controls))) - {tokenizer.unk_token_id}
    texts = [f"a {token} a{token}a" for token in sorted(controls)]
    made = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []
    return any(not numbers.isdisjoint(ids) for ids in made)


def _copy(tokenizer: Any, controls: frozenset[str]) -> Any:
    """A copy to which no other token is special."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for entry in state["added_tokens"]:
        entry["special"] = entry["content"] in controls
    made = copy.deepcopy(tokenizer)
    made._tokenizer = Tokenizer.from_str(json.dumps(state))
    return made
