"""Tiny tokenizers of every kind, as folders with the files that models on the Hub have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import EsmTokenizer, PreTrainedTokenizerFast

TEXT = """The server decides which parts of a model each client trains, and merges what comes back.
A fine file of five filings flows over the office floor; 1/2 of it is final.
Devices keep their own data, and send a few numbers in every round: Anna met Bob in Paris."""
PIECES = {  # of SentencePiece, as the published files of these models have them
    "deberta-v2": {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "pad_piece": "[PAD]", "bos_piece": "[CLS]"}
    | {"eos_piece": "[SEP]", "unk_piece": "[UNK]", "user_defined_symbols": "[MASK]"},
    "xlnet": {"unk_id": 0, "bos_id": 1, "eos_id": 2, "control_symbols": "<cls>,<sep>,<pad>,<mask>,<eod>,<eop>"},
    "albert": {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "control_symbols": "[CLS],[SEP],[MASK]"},
    "t5": {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "xlm-roberta": {},
    "gemma": {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "byte_fallback": True, "model_type": "bpe"}
    | {"normalization_rule_name": "identity", "add_dummy_prefix": False, "user_defined_symbols": "<mask>,<start_of_turn>"},
    "llama": {"byte_fallback": True, "model_type": "bpe", "normalization_rule_name": "identity"},
}
FILES = {"deberta-v2": "spm.model", "xlnet": "spiece.model", "albert": "spiece.model", "t5": "spiece.model"} | {
    "xlm-roberta": "sentencepiece.bpe.model"
}
CONFIGS = {"deberta-v2": {"do_lower_case": False, "vocab_type": "spm"}, "albert": {"do_lower_case": False}}


def sentencepiece_model(folder: Path, kind: str) -> sentencepiece.SentencePieceProcessor:
    """The folder gets a trained SentencePiece file, `tokenizer_config.json` and nothing else of a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILES.get(kind, "tokenizer.model")
    size = 512 if PIECES[kind].get("byte_fallback") else 140
    with file.open("wb") as written:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT.split("\n") * 4), model_writer=written, vocab_size=size, hard_vocab_limit=False,
            minloglevel=2, **{"character_coverage": 1.0, **PIECES[kind]},
        )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIGS.get(kind, {})))
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


def word_pieces() -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    trained.train_from_iterator([TEXT], trainers.WordPieceTrainer(special_tokens=list(named.values()), vocab_size=200))
    return PreTrainedTokenizerFast(tokenizer_object=trained, **named)


def byte_pairs() -> PreTrainedTokenizerFast:
    """With the tokens of a chat's turns, as Qwen's."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    own = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator([TEXT], trainers.BpeTrainer(special_tokens=own, vocab_size=300, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=own[2], pad_token=own[0], extra_special_tokens=own[1:2])


def residues(folder: Path) -> EsmTokenizer:
    """ESM's: a token for each amino acid, found without spaces between them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<mask>"]))
    return EsmTokenizer(str(folder / "vocab.txt"))


def pieces(folder: Path, kind: str = "deberta-v2") -> Any:
    """A tokenizer that transformers makes of a SentencePiece file."""
    from transformers import AutoTokenizer

    sentencepiece_model(folder, kind)
    return AutoTokenizer.from_pretrained(folder)


KINDS: dict[str, Callable[[Path], Any]] = {
    "WordPiece": lambda folder: word_pieces(),
    "byte-level BPE": lambda folder: byte_pairs(),
    "SentencePiece": pieces,
    "SentencePiece BPE": lambda folder: pieces(folder, "gemma"),
    "ESM": residues,
}
