"""Tiny random models by architecture, each with a tokenizer of its own kind, as folders that a user might bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from conftest import enlarge
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

TEXTS = ["the quick brown fox jumps over the lazy dog", "red green blue apples and pears", "nothing at all, twice"] * 9
SIZES = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
USUAL = {"hidden_size": 16, **SIZES}
NARROW = USUAL | {"embedding_size": 8}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
GROUPED = USUAL | {"num_key_value_heads": 1, "head_dim": 8}
EXPERTS = GROUPED | {"moe_intermediate_size": 8, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"shared_expert_intermediate_size": 8, "decoder_sparse_step": 1}
LATENT = USUAL | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 2, "topk_group": 1}
LATENT |= {"first_k_dense_replace": 1, "q_lora_rank": 6, "kv_lora_rank": 6, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
LATENT |= {"v_head_dim": 8, "num_key_value_heads": 2, "n_shared_experts": 1}
HALVES = {f"{half}_{size}": 2 for half in ("encoder", "decoder") for size in ("layers", "attention_heads", "ffn_dim")}
HALVES |= {"d_model": 16, "max_position_embeddings": 64}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
RELATIVE = {"relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}
RELATIVE |= {"pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0}
HYBRID = GROUPED | {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
}
HYBRID |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}


class Architecture(NamedTuple):
    """Which tokenizer of transformers a kind of model has, and what its configuration is told."""

    tokenizer: str
    shape: dict[str, Any]


WORDPIECE, BYTES, SENTENCES, WORDS = "BertTokenizer", "GPT2Tokenizer", "XLMRobertaTokenizer", "LlamaTokenizer"
ENCODERS = {
    "albert": Architecture("AlbertTokenizer", NARROW),
    "bert": Architecture(WORDPIECE, USUAL),
    "big_bird": Architecture("BigBirdTokenizer", USUAL | {"attention_type": "original_full"}),
    "camembert": Architecture("CamembertTokenizer", USUAL),
    "data2vec-text": Architecture("RobertaTokenizer", USUAL),
    "deberta": Architecture("DebertaTokenizer", USUAL),
    "deberta-v2": Architecture("DebertaV2Tokenizer", USUAL | RELATIVE),
    "distilbert": Architecture(WORDPIECE, {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}),
    "electra": Architecture(WORDPIECE, NARROW),
    "ernie": Architecture(WORDPIECE, USUAL),
    "esm": Architecture("EsmTokenizer", USUAL | {"position_embedding_type": "rotary", "mask_token_id": 4}),
    "eurobert": Architecture(BYTES, GROUPED),
    "funnel": Architecture(WORDPIECE, {"block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24}),
    "longformer": Architecture("RobertaTokenizer", USUAL | {"attention_window": 8}),
    "megatron-bert": Architecture(WORDPIECE, USUAL),
    "mobilebert": Architecture(WORDPIECE, USUAL | {"embedding_size": 16, "intra_bottleneck_size": 8}),
    "modernbert": Architecture(BYTES, USUAL | {"global_attn_every_n_layers": 2}),
    "mpnet": Architecture("MPNetTokenizer", USUAL),
    "nomic_bert": Architecture(WORDPIECE, USUAL),
    "rembert": Architecture("AlbertTokenizer", USUAL | {"input_embedding_size": 8, "output_embedding_size": 8}),
    "roberta": Architecture("RobertaTokenizer", USUAL),
    "roberta-prelayernorm": Architecture("RobertaTokenizer", USUAL),
    "xlm-roberta": Architecture(SENTENCES, USUAL),
    "xlm-roberta-xl": Architecture(SENTENCES, USUAL),
}
HALVED = {
    "bart": Architecture("RobertaTokenizer", HALVES),
    "mbart": Architecture("MBartTokenizer", HALVES),
    "mt5": Architecture("T5Tokenizer", T5),
    "t5": Architecture("T5Tokenizer", T5),
}
DECODERS = {
    "arcee": Architecture(WORDS, GROUPED),
    "bloom": Architecture(BYTES, {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "deepseek_v2": Architecture(WORDS, LATENT | {"n_group": None, "topk_group": None}),
    "deepseek_v3": Architecture(WORDS, LATENT),
    "exaone4": Architecture(BYTES, GROUPED),
    "falcon": Architecture(BYTES, USUAL),
    "gemma": Architecture("GemmaTokenizer", GROUPED),
    "gemma2": Architecture("GemmaTokenizer", GROUPED),
    "gemma3_text": Architecture("GemmaTokenizer", GROUPED),
    "glm": Architecture(WORDS, GROUPED),
    "glm4": Architecture(WORDS, GROUPED),
    "gpt2": Architecture(BYTES, GPT),
    "gpt_bigcode": Architecture(BYTES, GPT),
    "gpt_neo": Architecture(
        BYTES,
        {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
        | {"max_position_embeddings": 64},
    ),
    "gpt_neox": Architecture("GPTNeoXTokenizer", USUAL),
    "gpt_oss": Architecture(BYTES, EXPERTS),
    "gptj": Architecture(BYTES, GPT | {"rotary_dim": 4}),
    "helium": Architecture(WORDS, GROUPED),
    "hunyuan_v1_dense": Architecture(BYTES, GROUPED),
    "llama": Architecture(WORDS, GROUPED),
    "ministral": Architecture(WORDS, GROUPED),
    "mistral": Architecture(WORDS, GROUPED),
    "mixtral": Architecture(WORDS, EXPERTS),
    "modernbert-decoder": Architecture(BYTES, USUAL),
    "mpt": Architecture("GPTNeoXTokenizer", {"d_model": 16, "n_layers": 2, "n_heads": 2}),
    "nemotron": Architecture(BYTES, GROUPED),
    "olmo": Architecture("GPTNeoXTokenizer", GROUPED),
    "olmo2": Architecture(BYTES, GROUPED),
    "opt": Architecture(BYTES, USUAL | {"word_embed_proj_dim": 16, "ffn_dim": 24}),
    "phi": Architecture(BYTES, GROUPED),
    "phi3": Architecture(WORDS, GROUPED),
    "phimoe": Architecture(WORDS, EXPERTS),
    "qwen2": Architecture("Qwen2Tokenizer", GROUPED),
    "qwen2_moe": Architecture("Qwen2Tokenizer", EXPERTS),
    "qwen3": Architecture("Qwen2Tokenizer", GROUPED),
    "qwen3_5_text": Architecture("Qwen2Tokenizer", HYBRID),
    "qwen3_moe": Architecture("Qwen2Tokenizer", EXPERTS | {"mlp_only_layers": [0]}),
    "qwen3_next": Architecture("Qwen2Tokenizer", EXPERTS | HYBRID),
    "seed_oss": Architecture(BYTES, GROUPED),
    "smollm3": Architecture(BYTES, GROUPED),
    "stablelm": Architecture(BYTES, GROUPED),
    "starcoder2": Architecture(BYTES, GROUPED),
}
# language models for which transformers has no head that classifies
SPEAKERS = {
    "apertus": Architecture(BYTES, GROUPED),
    "cohere": Architecture("CohereTokenizer", GROUPED),
    "cohere2": Architecture("CohereTokenizer", GROUPED),
    "dots1": Architecture(BYTES, GROUPED | LATENT | {"num_key_value_heads": 1}),
    "ernie4_5": Architecture(WORDS, GROUPED),
    "glm4_moe": Architecture(BYTES, GROUPED | LATENT | {"num_key_value_heads": 1}),
    "granite": Architecture(BYTES, GROUPED),
    "granitemoe": Architecture(BYTES, EXPERTS),
    "nanochat": Architecture(BYTES, GROUPED),
    "olmo3": Architecture(BYTES, GROUPED),
    "olmoe": Architecture("GPTNeoXTokenizer", EXPERTS),
}
ARCHITECTURES = ENCODERS | HALVED | DECODERS | SPEAKERS


def words(kind: str, folder: Path) -> Any:
    """A tokenizer of a kind, made from TEXTS."""
    if kind == "EsmTokenizer":
        file = folder / "vocab.txt"
        file.write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", "<mask>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-"]))
        return transformers.EsmTokenizer(str(file))
    made = getattr(transformers, kind)()
    return made.train_new_from_iterator(TEXTS, 300, show_progress=False)


def save_architecture(name: str, folder: Path) -> Path:
    """A folder with a tiny random model, without a head, and its tokenizer."""
    kind, shape = ARCHITECTURES[name]
    folder.mkdir()
    tokenizer = words(kind, folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    special = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = AutoConfig.for_model(name, vocab_size=len(tokenizer), **special, **shape)
    torch.manual_seed(0)
    speaks = name in DECODERS or name in SPEAKERS
    model = (AutoModelForCausalLM if speaks else AutoModelForSequenceClassification).from_config(config)
    model = model if speaks else model.base_model
    enlarge(model, 4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def published(name: str, folder: Path, labels: int = 0, **more: Any) -> Any:
    """The folder's model in stock transformers: with a head for so many labels, or as a language model."""
    auto = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    return auto.from_pretrained(folder, **({"num_labels": labels} if labels else {}), **more).eval()
