"""Tokens that somebody added are read as transformers reads them; control tokens that a text spells out are text."""

from __future__ import annotations

import pytest
from conftest import TASKS
from words_helper import KINDS

from fedara_flwr.data.examples import Examples
from fedara_flwr.tasks.base import text_examples
from fedara_flwr.tasks.spelled import control_tokens, read

MARKED = ["Anna [E1] met [/E1]Bob", "[E1]", "a file"]


@pytest.fixture(params=list(KINDS))
def tokenizer(request, tmp_path):
    return KINDS[request.param](tmp_path)


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_are_those_of_transformers(tokenizer, special):
    texts = ["MKT[E1]LLA[/E1]", "[E1]", "MKT"] if "Esm" in type(tokenizer).__name__ else MARKED
    before = text_examples(tokenizer, Examples(tuple(texts)), 64)
    tokenizer.add_tokens(["[E1]", "[/E1]"], special_tokens=special)
    marks = set(tokenizer.convert_tokens_to_ids(["[E1]", "[/E1]"]))
    for pairs in (None, texts[::-1]):
        expected = tokenizer(texts, pairs)["input_ids"]
        found = text_examples(tokenizer, Examples(tuple(texts), pairs=pairs and tuple(pairs)), 64)
        assert found == expected and marks & set(found[0])
    assert before[0] != expected[0]  # what was looked at before they came is not kept
    if tokenizer.is_fast:
        tags = TASKS["token-classification"].encode(tokenizer, Examples(("",), targets=((("Anna", "[E1]"), (0, 1)),)), 64)
        assert marks & set(tags.ids[0])


def test_control_tokens_in_a_text_are_text(tokenizer):
    """Alone, in words and beside letters; for SentencePiece they are pieces, which it would make of the letters."""
    controls = sorted(control_tokens(tokenizer))
    numbers = set(tokenizer.convert_tokens_to_ids(controls)) - {tokenizer.unk_token_id}
    texts = [text for token in controls for text in (token, f"met {token} Bob", f"met{token}Bob")]
    for row in read(tokenizer, texts, add_special_tokens=False)["input_ids"]:
        assert numbers.isdisjoint(row), tokenizer.convert_ids_to_tokens(row)
    around = tokenizer("met")["input_ids"]
    assert read(tokenizer, "met")["input_ids"] == around  # those that the tokenizer puts around a text stay
    assert any(numbers & set(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


def test_which_special_tokens_are_the_models_own():
    """Named ones, those of the chat template and those of a chat's form; what else is special is somebody's marker."""
    tokenizer = KINDS["byte-level BPE"](None)
    tokenizer.chat_template = "{{ '[INST]' + messages[0]['content'] }}"
    tokenizer.add_tokens(["[INST]", "[E1]", "<|tool|>"], special_tokens=True)
    assert control_tokens(tokenizer) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "[INST]", "<|tool|>"}
    assert tokenizer.convert_tokens_to_ids("[E1]") in read(tokenizer, "a [E1] b")["input_ids"]


def test_answers_behind_a_control_token(tmp_path):
    """They are found by their place in the text, which stays."""
    tokenizer, task = KINDS["SentencePiece"](tmp_path), TASKS["question-answering"]
    context = "[CLS] the [SEP] server decides"
    data = task.encode(tokenizer, Examples(("who",), pairs=(context,), targets=([["server", 16]],)), 48)
    first, last, *_ = data.labels[0]
    assert tokenizer.decode(data.ids[0][first : last + 1]).strip() == "server"
    assert data.ids[0].count(tokenizer.sep_token_id) == 2
