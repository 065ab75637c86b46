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
from words_helper import word_pieces

from fedara_flwr.adapters import fit
from fedara_flwr.adapters.learner import open_learner
from fedara_flwr.adapters.output import OutputLayer
from fedara_flwr.cli import doctor
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


def test_a_tokenizers_length_as_text(tmp_path):
    settings = bare(tmp_path, tokenizer())
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": "512"}))
    assert refused(settings) == "its tokenizer_config.json has model_max_length = '512', allowed is a number"


def bare(folder, words, vocabulary=None, **config):
    """A classifier's folder: a Llama of so many embeddings, and this tokenizer."""
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": vocabulary or len(words)}
    AutoModelForSequenceClassification.from_config(LlamaConfig(**shape, pad_token_id=0)).save_pretrained(folder)
    words.save_pretrained(folder)
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, **config}))
    rows = folder.parent / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"number {i},{'ab'[i % 2]}\n" for i in range(20)))
    return read_settings({"model.name": str(folder), "data.path": str(rows), "data.max-length": 16})


def refused(settings) -> str:
    with pytest.raises(ConfigError) as caught:
        open_learner(settings, ("a", "b"))
    said = doctor.model(settings)
    assert said.level == "problem" and said.found == str(caught.value) and "\n" not in said.found
    return said.found.removeprefix(f"model.name = {settings.model.name!r}: ")


def test_a_padding_token_that_nobody_made_room_for(tmp_path):
    """One line in a run and in `fedara doctor`; with resized embeddings it works."""
    words = tokenizer()
    before = len(words)
    words.add_special_tokens({"pad_token": "[PAD]"})
    why = f"its padding token '[PAD]' is number {before}, allowed are those below {before}, the model's embeddings: "
    found = refused(bare(tmp_path / "small", words, before))
    assert found == why + "resize these, or name another as pad_token in tokenizer_config.json"
    assert padded_alike(open_learner(bare(tmp_path / "resized", words), ("a", "b"))) == before


def test_a_tokenizer_without_padding_and_end(tmp_path):
    words = tokenizer()
    settings = bare(tmp_path, words)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (tmp_path / name).exists():
            facts = json.loads((tmp_path / name).read_text())
            (tmp_path / name).write_text(json.dumps({k: v for k, v in facts.items() if not k.startswith(("pad_", "eos_"))}))
    line = "its tokenizer has neither a padding token nor an end token, allowed are those with one of the two"
    assert refused(settings) == line


def padded_alike(learner) -> int:
    """The padding token, once the logits of a batch are those of its rows one by one."""
    data = Encoded([[7, 8, 9, 10, 11], [12, 13]], [0, 1])
    with torch.no_grad():
        together = learner.adapted.outputs(learner.batch(data, [0, 1])).logits
        alone = torch.cat([learner.adapted.outputs(learner.batch(data, [row])).logits for row in (0, 1)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert learner.evaluate(data)["accuracy"] == float((alone.argmax(1) == torch.tensor([0, 1])).float().mean())
    return learner.batch(data, [0, 1])["input_ids"][1, -1].item()


@pytest.mark.parametrize("pad", [5, -1, None, 9999])
@pytest.mark.parametrize("ends", [False, True], ids=["", "adds its end"])
def test_decoders_find_the_last_token(tmp_path, pad, ends):
    """Whatever padding token their configuration names, or that is the token that ends a text."""
    words = tokenizer()
    words.pad_token = words.eos_token
    learner = open_learner(bare(tmp_path, words, pad_token_id=pad), ("a", "b"))
    assert padded_alike(learner) == words.eos_token_id
    data = Encoded([[7, 8, 9, *([words.eos_token_id] if ends else [])], [12, 13]], [0, 1])
    with torch.no_grad():
        both = learner.adapted.outputs(learner.batch(data, [0, 1])).logits
        one = learner.adapted.outputs(learner.batch(data, [0])).logits
    torch.testing.assert_close(both[:1], one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pad", [1, 3, -1, 9999])
@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**SHAPE, max_position_embeddings=PLACES),
        RobertaConfig(**SHAPE, max_position_embeddings=PLACES + 9),
        DebertaV2Config(**SHAPE, max_position_embeddings=PLACES, relative_attention=True, position_biased_input=False),
        DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=PLACES),
    ],
    ids=lambda config: config.model_type,
)
def test_encoders_leave_padding_out(tmp_path, config, pad):
    """With another padding token in their configuration, RoBERTa's positions count from that one, for a row alone, too."""
    words = word_pieces()
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(
        type(config)(**config.to_dict() | {"vocab_size": len(words), "pad_token_id": 1})
    ).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**facts, "pad_token_id": pad}))
    named = {"model.name": str(tmp_path), "data.max-length": 16}
    assert padded_alike(open_learner(read_settings(named), ("a", "b"))) == words.pad_token_id
