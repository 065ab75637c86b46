"""Models, tokenizers and lengths that do not fit each other are refused before anything runs."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import TASKS
from test_output import save_model
from test_templates import tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    OPTConfig,
    RobertaConfig,
)

from fedara_flwr.adapters import fit
from fedara_flwr.adapters.learner import open_learner
from fedara_flwr.adapters.output import OutputLayer
from fedara_flwr.keys import ConfigError
from fedara_flwr.tasks import Encoded, read_settings
from fedara_flwr.tasks.generation import Said, say

SHAPE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PLACES = 20


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BertConfig(**SHAPE, max_position_embeddings=PLACES), PLACES),
        (RobertaConfig(**SHAPE, max_position_embeddings=PLACES + 2, pad_token_id=1), PLACES),
        (DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=PLACES), PLACES),
        (GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=PLACES, pad_token_id=0), PLACES),
        (OPTConfig(**{k: v for k, v in SHAPE.items() if k != "intermediate_size"}, ffn_dim=24, word_embed_proj_dim=16,
                   max_position_embeddings=PLACES), PLACES),
        (BartConfig(vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, pad_token_id=1,
                    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=PLACES), PLACES),
        (LlamaConfig(**SHAPE, max_position_embeddings=PLACES, pad_token_id=0), None),
        (DebertaV2Config(**SHAPE, max_position_embeddings=PLACES, relative_attention=True, position_biased_input=False), None),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)  # fmt: skip
def test_as_many_tokens_as_a_model_has_positions(config, expected):
    """So many run, and one more does not; models without learned positions take any number."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert fit.positions(model) == expected
    for length, good in ((PLACES, True), (PLACES + 1, expected is None)):
        ids = torch.full((1, length), 5)
        ids[0, -1] = config.eos_token_id if config.model_type == "bart" else 5
        try:
            model(input_ids=ids)
        except (IndexError, RuntimeError):
            assert not good
        else:
            assert good


def settings(folder, **more):
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in more.items()}
    return read_settings({"data.task": "causal-lm", "model.name": str(folder), "model.dtype": "float32", **named})


def problem(folder, **more) -> str:
    with pytest.raises(ConfigError) as caught:
        open_learner(settings(folder, **more), ())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_texts_longer_than_the_positions(tmp_path, caplog):
    folder, words = tmp_path / "neo", tokenizer()
    kinds = {"attention_types": [[["global"], 2]], "num_layers": 2, "num_heads": 2, "hidden_size": 16, "pad_token_id": 3}
    config = GPTNeoConfig(vocab_size=len(words), max_position_embeddings=48, bos_token_id=0, eos_token_id=3, **kinds)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    key = f"model.name = {str(folder)!r}"
    assert problem(folder, data__max_length=49) == f"data.max-length = 49: with {key} allowed is at most 48, its positions"
    learner = open_learner(settings(folder, data__max_length=48), ())
    assert learner.adapted.positions == 48
    assert [len(said.text) > 0 or said.stopped for said in say(learner, [[5] * 40], 64)] == [True]  # as far as there is room
    assert say(learner, [[5] * 48], 64) == [Said("", False)]
    rotary = save_model(tmp_path / "llama", "llama", max_position_embeddings=48)
    open_learner(settings(rotary, data__max_length=49), ())
    assert f"data.max-length = 49: model.name = {str(rotary)!r} was made for texts of at most 48 tokens" in caplog.text


def test_tokens_that_the_model_does_not_know(tmp_path):
    """A tokenizer of another model, or a padding token that nobody made room for."""
    words = tokenizer()
    last = max(words.get_vocab().values())
    folder = save_model(tmp_path / "llama", "llama", vocabulary=last)
    line = f"its tokenizer has a token {last}, allowed are those below {last}, the model's embeddings"
    assert problem(folder) == f"model.name = {str(folder)!r}: {line}"
    open_learner(settings(save_model(tmp_path / "wide", "llama", vocabulary=last + 9)), ())


def test_an_encoder_is_no_language_model(tmp_path):
    """It sees the tokens that it should say: perplexity 1 without having learnt anything."""
    words = tokenizer()
    config = BertConfig(**SHAPE | {"vocab_size": len(words)}, max_position_embeddings=64, pad_token_id=3)
    torch.manual_seed(0)
    BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    words.save_pretrained(tmp_path / "bert")
    learner = open_learner(settings(tmp_path / "bert", data__max_length=32), ())
    with pytest.raises(ConfigError, match="BertLMHeadModel sees what comes after a token, allowed are decoders, which do not"):
        OutputLayer(learner.adapted)
    assert TASKS["causal-lm"].head == "none"


def test_a_folder_without_a_tokenizers_files(tmp_path):
    """transformers makes an empty one of five entries, to which every text is unknown."""
    config = BertConfig(**SHAPE, max_position_embeddings=64)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    line = f"model.name = {str(tmp_path)!r}: its tokenizer knows no word, allowed are models with a tokenizer's files"
    with pytest.raises(ConfigError) as caught:
        open_learner(read_settings({"model.name": str(tmp_path)}), ("a", "b"))
    assert str(caught.value) == line


@pytest.mark.parametrize("pad", [5, -1, None])
def test_one_padding_token_for_model_and_tokenizer(tmp_path, pad):
    """A decoder that looks for another one takes padding for the last token: a row's logits are those it has alone."""
    words = tokenizer()
    config = LlamaConfig(**SHAPE | {"vocab_size": len(words)}, pad_token_id=5)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**facts, "pad_token_id": pad}))
    named = {"model.name": str(tmp_path), "model.pooling": "pretrained"}
    learner = open_learner(read_settings(named), ("a", "b"))
    data = Encoded([[7, 8, 9, 10, 11], [12, 13]], [0, 1])
    with torch.no_grad():
        together = learner.adapted.outputs(learner.batch(data, [0, 1])).logits
        alone = torch.cat([learner.adapted.outputs(learner.batch(data, [row])).logits for row in (0, 1)])
    assert torch.allclose(together, alone, atol=1e-5) and learner.adapted.model.config.pad_token_id == words.pad_token_id
