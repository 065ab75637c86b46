"""Token classification: a tag for every word, as in named-entity recognition.

The label of a word stands on its first sub-token; other sub-tokens and special tokens have none. Words that `max_length`
cuts off, and words of which the tokenizer leaves nothing, are neither learnt nor evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from nervaluate import Evaluator
from numpy.typing import NDArray
from transformers import AutoModelForTokenClassification

from fedara_flwr.data.examples import Examples
from fedara_flwr.data.tags import iob, types
from fedara_flwr.tasks.base import Batch, Encoded, cross_entropies, pad

UNLABELLED = -100  # torch's own mark of a place that has no label
SPACES = ("Ġ", "▁")  # sub-tokens that are nothing but the space before a word, in byte-level BPE and SentencePiece


class TokenClassification:
    """Cross-entropy over the tags of words; word accuracy and F1 of whole entities."""

    name = "token-classification"
    auto_class = AutoModelForTokenClassification
    peft_task_type = "TOKEN_CLS"
    words = True

    def is_head(self, module: str) -> bool:
        """Encoders: classifier; decoders: score."""
        return module in ("classifier", "score")

    def encode(self, tokenizer: Any, examples: Examples, max_length: int) -> Encoded:
        """Token ids with special tokens; per token the tag of the word that begins there, else UNLABELLED."""
        if not len(examples):
            return Encoded([], [])
        assert examples.words is not None and examples.tags is not None
        encoded = tokenizer(
            _as_in_text(tokenizer, examples.words),
            is_split_into_words=True,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            split_special_tokens=True,  # a word that spells out "[SEP]" is no separator
        )
        vocabulary = tokenizer.get_vocab()
        spaces = {vocabulary[token] for token in SPACES if token in vocabulary}
        labels = []
        for i, (ids, tags) in enumerate(zip(encoded["input_ids"], examples.tags, strict=True)):
            row, last = [UNLABELLED] * len(ids), None
            for place, word in enumerate(encoded.word_ids(i)):
                if word is not None and word != last and ids[place] not in spaces:
                    row[place], last = tags[word], word
            labels.append(row)
        return Encoded(encoded["input_ids"], labels)

    def collate(self, tokenizer: Any, ids: Sequence[list[int]], labels: Sequence[list[int]]) -> Batch:
        """As `pad`, and labels of shape (batch, longest)."""
        batch = pad(tokenizer, ids)
        longest = batch["input_ids"].shape[1]
        rows = [[*row, *[UNLABELLED] * (longest - len(row))] for row in labels]
        return batch | {"labels": torch.tensor(rows, dtype=torch.long)}

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy over the batch's words, in float32 whatever the backbone's type; 0 where it has none."""
        labels = batch["labels"].flatten()
        total = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels, ignore_index=UNLABELLED, reduction="sum"
        )
        return total / (labels != UNLABELLED).sum().clamp(min=1)

    def count(self, batch: Batch) -> int:
        """Its words."""
        return int((batch["labels"] != UNLABELLED).sum())

    def metrics(
        self, logits: Sequence[NDArray[np.float32]], labels: Sequence[list[int]], names: tuple[str, ...]
    ) -> dict[str, float]:
        """Accuracy and mean loss over words; entity-f1 over all entities; macro-f1, the mean of the types' entity F1.

        An entity counts where first word, last word and type are right. As conlleval does, an I- that follows no tag of its
        type begins an entity. Types that occur neither in truth nor in prediction are not in the mean; F1 is 0 without any
        entity.
        """
        tags = iob(names)
        truth, predicted, losses, hits = [], [], [], 0
        for row, label in zip(logits, labels, strict=True):
            places = np.flatnonzero(np.array(label) != UNLABELLED)
            words, wanted = row[places], np.array(label)[places]
            chosen = words.argmax(axis=1)
            losses.append(cross_entropies(words, wanted))
            hits += int((chosen == wanted).sum())
            truth.append([tags[i] for i in wanted])
            predicted.append([tags[i] for i in chosen])
        evaluator = Evaluator(truth, predicted, tags=list(types(names)), loader="list")
        evaluator.strategies = {"strict": evaluator.strategies["strict"]}  # the three lenient ones are not wanted
        found = evaluator.evaluate()
        # sorted: the library keeps types in a set, and the mean's last bits must not depend on the process
        scores = [result["strict"].f1 for _, result in sorted(found["entities"].items())]
        count = max(1, sum(len(row) for row in truth))
        return {
            "accuracy": hits / count,
            "macro-f1": float(np.mean(scores)) if scores else 0.0,
            "entity-f1": float(found["overall"]["strict"].f1),
            "loss": float(np.concatenate(losses).sum()) / count,
        }


def _as_in_text(tokenizer: Any, sentences: Sequence[tuple[str, ...]]) -> list[list[str]]:
    """The words as the tokenizer meets them in running text.

    Byte-level BPE (RoBERTa, Qwen, Llama 3) keeps the space before a word in its token, so a word without one is to it the
    inside of a word. Where a probe shows that, every word but the first gets its space.
    """
    running, apart = (
        tokenizer(text, is_split_into_words=split, add_special_tokens=False)["input_ids"]
        for text, split in (("a a", False), (["a", "a"], True))
    )
    space = "" if running == apart else " "
    return [[word if i == 0 else space + word for i, word in enumerate(words)] for words in sentences]
