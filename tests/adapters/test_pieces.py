"""Folders with a SentencePiece file alone, as on the Hub: they load in a fresh install and give that file's own tokens."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DebertaV2Config, LlamaConfig
from words_helper import PIECES, sentencepiece_model

from fedara_flwr.adapters import pieces
from fedara_flwr.adapters.backbone import load_tokenizer
from fedara_flwr.adapters.learner import open_learner
from fedara_flwr.data.examples import Examples
from fedara_flwr.keys import ConfigError
from fedara_flwr.tasks import read_settings

TEXTS = ("The server merges what comes back.", "a fine file", "two of  five", "ﬁne\u00a0ﬁling… 1½", "Anna met Bob in Paris")
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def loaded(folder, kind):
    return pieces.as_published(str(folder), str(folder), AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("kind", sorted(set(PIECES) - {"llama"}))
def test_tokens_are_those_of_the_file(tmp_path, kind):
    own = sentencepiece_model(tmp_path, kind)
    tokenizer = loaded(tmp_path, kind)
    texts = TEXTS if not PIECES[kind].get("byte_fallback") else TEXTS[:2]  # Gemma's keep spaces, this small file's do not
    for text in texts:
        expected = own.encode(text, out_type=str)
        assert tokenizer(text, add_special_tokens=False).tokens() == expected
    for config in ({}, {"config.json": {"model_type": kind}}):  # beside adapters, and in a merged model's folder
        tokenizer.save_pretrained(tmp_path / "saved")
        for name, content in config.items():
            (tmp_path / "saved" / name).write_text(json.dumps(content))
        again = AutoTokenizer.from_pretrained(tmp_path / "saved")
        for arguments in ((list(TEXTS),), (list(TEXTS), list(TEXTS[::-1]))):
            assert dict(again(*arguments)) == dict(tokenizer(*arguments))
        assert again.pad_token_id == tokenizer.pad_token_id and again.model_input_names == tokenizer.model_input_names


def test_deberta_with_its_sentencepiece_file_alone(tmp_path):
    """As a run opens it, also once it was saved with a tokenizer.json, whose normalisation transformers leaves out again."""
    own = sentencepiece_model(tmp_path, "deberta-v2")
    torch.manual_seed(0)
    config = DebertaV2Config(vocab_size=own.get_piece_size() + 3, position_buckets=8, relative_attention=True, **SHAPE)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    settings = read_settings({"model.name": str(tmp_path), "data.max-length": 32})
    learner = open_learner(settings, ("a", "b"))
    rows = learner.encode(Examples(TEXTS), 32).ids
    begin, end = learner.tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]"])
    assert rows == [[begin, *own.encode(text), end] for text in TEXTS]
    whole = tmp_path / "whole"
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(whole)
    state = json.loads((whole / "tokenizer.json").read_text())
    state["normalizer"] = json.loads(learner.tokenizer.backend_tokenizer.to_str())["normalizer"]  # as transformers 4 wrote it
    (whole / "tokenizer.json").write_text(json.dumps(state))
    (whole / "config.json").write_text(json.dumps({"model_type": "deberta-v2"}))
    stock = AutoTokenizer.from_pretrained(whole)
    assert stock(TEXTS[3])["input_ids"] != rows[3]
    assert pieces.as_published("m", str(whole), stock)(TEXTS[3])["input_ids"] == rows[3]


@pytest.mark.parametrize("named", [True, False])
def test_llama_with_its_sentencepiece_file_alone(tmp_path, named):
    """Where nothing says that it is Llama's tokenizer, transformers leaves out the space before a text: refused."""
    own = sentencepiece_model(tmp_path, "llama")
    config = LlamaConfig(vocab_size=own.get_piece_size(), num_key_value_heads=1, **SHAPE)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True} if named else {})
    )
    if named:
        tokenizer = load_tokenizer(str(tmp_path))
        text = TEXTS[0]
        assert tokenizer(text, add_special_tokens=False).tokens() == own.encode(text, out_type=str)
        assert tokenizer(text)["input_ids"] == [own.bos_id(), *own.encode(text)]
        return
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(str(tmp_path))
    line = f"model.name = {str(tmp_path)!r}: what transformers makes of tokenizer.model gives other tokens than it has ("
    assert str(caught.value).startswith(line) and str(caught.value).endswith("), allowed is one with tokenizer.json")
