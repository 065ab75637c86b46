"""Token classification: a tag for every word, as in named-entity recognition.

The label of a word stands on its first sub-token; other sub-tokens and special tokens have none. Words that `max_length`
cuts off, and words of which the tokenizer leaves nothing, are neither learnt nor evaluated.

Tags are 'O', 'B-PER' and 'I-PER' as IOB2 has them, or types without a prefix ('PER', 'O'); other ways to write them are
converted (tasks/schemes.py). A table may also have one word a row.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from fedara_flwr.data.examples import Examples
from fedara_flwr.data.labels import Labels
from fedara_flwr.data.reading import Column, Example
from fedara_flwr.data.skipped import LeftOut, absent, spelled
from fedara_flwr.keys import ConfigError, Group
from fedara_flwr.tasks.base import UNLABELLED, Batch, Encoded, Metric, Task, cross_entropies, pad, pad_labels
from fedara_flwr.tasks.schemes import OUTSIDE, conversion
from fedara_flwr.tasks.spelled import read

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
SHOWN = 12  # converted tags that a line names
SPACES = ("Ġ", "▁")  # sub-tokens that are nothing but the space before a word, in byte-level BPE and SentencePiece
EACH = "lists with one entry for each word"


class TokenClassificationOptions(Group):
    """Keys of `data.options` for token-classification."""

    sentence_column: str = Field(
        "", description="where a row is one word: column that names its sentence; nothing there = that of the row before"
    )


class TokenClassification(Task):
    """Cross-entropy over the tags of words; word accuracy and F1 of whole entities.

    A row's text is its words with spaces between them, its target (words, tags), its group its main type.
    """

    name = "token-classification"
    title = "a tag for every word, as in named-entity recognition"
    Options = TokenClassificationOptions
    auto_class = "AutoModelForTokenClassification"
    peft_task_type = "TOKEN_CLS"
    word_places = True
    classes = True
    label_word = "tags"
    bare_ids = False
    docstrings = "its words have no tags"
    metric = Metric("entity-f1")
    metrics = ("accuracy", "macro-f1", "entity-f1", "loss")
    pipeline = "token-classification"

    def table(self, table: Any) -> Any:
        """One sentence a row, its tags in IOB2 where they are written in another way."""
        settings, sentence = self.settings, self.options.sentence_column
        text, label = settings.text_column, settings.label_column
        if sentence:
            table = _sentences(table, sentence, text, label)
        if label not in table.column_names:
            return table
        ids, column = table.ids(label), table[label]
        names = [ids.values()] if ids else [tags for tags in column if isinstance(tags, list)]
        new = conversion(tag.strip() for tags in names for tag in tags if isinstance(tag, str))
        if not new:
            return table
        logger.info("tags are converted: %s", ", ".join(f"{old} to {tag}" for old, tag in list(new.items())[:SHOWN]))

        def converted(tag: Any) -> Any:
            tag = ids.get(tag, tag) if isinstance(tag, int) else tag
            return new.get(tag.strip(), tag) if isinstance(tag, str) else tag

        tags = [[converted(tag) for tag in tags] if isinstance(tags, list) else tags for tags in column]
        others = {name: table[name] for name in table.column_names if name != label}
        return type(table).from_columns({**others, label: tags}, table.short)

    def columns(self, there: Sequence[str]) -> Sequence[Column]:
        """The list of a sentence's words, and that of their tags."""
        words = Column("text", "text-column", self.settings.text_column, EACH)
        return [words, Column("label", "label-column", self.settings.label_column, EACH)]

    def read(self, row: Mapping[str, Any], labels: Labels) -> Example:
        """A sentence with as many tags as words, all of them known."""
        words, tags = row["text"], row["label"]
        if words is None or tags is None:
            raise LeftOut("without text" if words is None else "without label")
        if len(words) != len(tags):
            raise LeftOut("with more or fewer tags than words")
        words = ["" if absent(word) else spelled(word) for word in words]
        if not any(word.strip() for word in words):
            raise LeftOut("without text")
        places = tuple(labels.place(tag) for tag in tags)
        target = (tuple(words), places)
        return Example(" ".join(words), main_type(places, labels.names), target=target, identity=json.dumps(target))

    def check_labels(self, names: tuple[str, ...]) -> None:
        """Refuse schemes with other prefixes, such as E- and S-."""
        prefixed = [name for name in names if has_prefix(name)]
        bare = [name for name in names if name != OUTSIDE and not has_prefix(name)]
        if prefixed and bare:
            raise ConfigError(
                f"data.label-column = {self.settings.label_column!r}: tag {bare[0]!r} beside {prefixed[0]!r}, allowed are 'O', "
                "'B-…' and 'I-…', or types without a prefix"
            )

    def group_names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The name of the group without an entity, then the types, as `main_type` numbers them."""
        return (OUTSIDE, *types(names))

    def is_head(self, module: str) -> bool:
        """True for the name that the layer has in encoders, `classifier`, or in decoders, `score`."""
        return module in ("classifier", "score")

    def made_up(self, length: int) -> list[int]:
        """The first tag for each of the row's tokens."""
        return [0] * length

    def encode(self, tokenizer: Any, examples: Examples, max_length: int) -> Encoded:
        """Token ids with special tokens; per token the tag of the word that begins there, else UNLABELLED."""
        if not len(examples):
            return Encoded([], [])
        assert examples.targets is not None
        words, tags_of_rows = zip(*examples.targets, strict=True)
        encoded = read(
            tokenizer,
            _as_in_text(tokenizer, words),
            is_split_into_words=True,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
        )
        vocabulary = tokenizer.get_vocab()
        spaces = {vocabulary[token] for token in SPACES if token in vocabulary}
        labels = []
        for i, (ids, tags) in enumerate(zip(encoded["input_ids"], tags_of_rows, strict=True)):
            row, last = [UNLABELLED] * len(ids), None
            for place, word in enumerate(encoded.word_ids(i)):
                if word is not None and word != last and ids[place] not in spaces:
                    row[place], last = tags[word], word
            labels.append(row)
        return Encoded(encoded["input_ids"], labels)

    def collate(self, tokenizer: Any, ids: Sequence[list[int]], labels: Sequence[list[int]]) -> Batch:
        """As `pad`, and labels of shape (batch, longest)."""
        batch = pad(tokenizer, ids)
        return batch | {"labels": pad_labels(batch, labels)}

    def losses(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Cross-entropy of each row's words, summed; 0 for a row that has none; shape (rows,)."""
        import torch

        logits, labels = outputs.logits.flatten(0, 1).float(), batch["labels"]
        each = torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=UNLABELLED, reduction="none")
        return each.view(labels.shape).sum(1)

    def evaluation(self, data: Encoded, names: tuple[str, ...]) -> Entities:
        """True and predicted tags of every word."""
        return Entities(names)

    def snippet(self) -> list[str]:
        """Python lines that print a tag for each token of one text."""
        return [
            'logits = model(**tokenizer("some text", return_tensors="pt")).logits',
            "print([labels[int(i)] for i in logits[0].argmax(-1)])",
        ]


class Entities:
    """Accuracy and mean loss over words; entity-f1 over all entities; macro-f1, the mean of the types' entity F1.

    An entity counts where first word, last word and type are right. As conlleval does, an I- that follows no tag of its type
    begins an entity. Types that occur neither in truth nor in prediction are not in the mean; F1 is 0 without any entity.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names, self.tags = names, iob(names)
        self.truth: list[list[str]] = []
        self.predicted: list[list[str]] = []
        self.loss, self.hits = 0.0, 0

    def add(self, outputs: Any, batch: Batch) -> None:
        """Keep the batch's tags, a few for each row."""
        logits, labels = outputs.logits.float().cpu().numpy(), batch["labels"].cpu().numpy()
        for row, label in zip(logits, labels, strict=True):
            places = np.flatnonzero(label != UNLABELLED)
            words, wanted = row[places], label[places]
            chosen = words.argmax(axis=1)
            self.loss += float(cross_entropies(words, wanted).sum())
            self.hits += int((chosen == wanted).sum())
            self.truth.append([self.tags[i] for i in wanted])
            self.predicted.append([self.tags[i] for i in chosen])

    def result(self) -> dict[str, float]:
        """Entities are scored by nervaluate, strictly: place and type must be right."""
        from nervaluate import Evaluator

        evaluator = Evaluator(self.truth, self.predicted, tags=list(types(self.names)), loader="list")
        evaluator.strategies = {"strict": evaluator.strategies["strict"]}  # the three lenient ones are not wanted
        scores = evaluator.evaluate()
        # sorted: the library keeps types in a set, and the mean's last bits must not depend on the process
        by_type = [result["strict"].f1 for _, result in sorted(scores["entities"].items())]
        count = max(1, sum(len(row) for row in self.truth))
        return {
            "accuracy": self.hits / count,
            "macro-f1": float(np.mean(by_type)) if by_type else 0.0,
            "entity-f1": float(scores["overall"]["strict"].f1),
            "loss": self.loss / count,
        }


def _sentences(table: Any, sentence: str, text: str, label: str) -> Any:
    """Rows of one word each as rows of one sentence each.

    Raises:
        ConfigError: a column is not there.
    """
    for key, name in (("options sentence-column", sentence), ("text-column", text), ("label-column", label)):
        if name not in table.column_names:
            raise ConfigError(f"data.{key} = {name!r}: no such column, allowed are {table.column_names}")
    rows: list[dict[str, Any]] = []
    for name, word, tag in zip(table[sentence], table[text], table[label], strict=True):
        if not rows or not (absent(name) or name == rows[-1][sentence]):
            rows.append({sentence: name, text: [], label: []})
        rows[-1][text].append(word)
        rows[-1][label].append(tag)
    return type(table).from_list(rows)


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


def has_prefix(name: str) -> bool:
    """Whether a tag is B-something or I-something; 'B' and 'I' alone are tags of a single type without a name."""
    return name.partition("-")[0] in ("B", "I")


def iob(names: Sequence[str]) -> tuple[str, ...]:
    """Every tag as 'O', 'B-type' or 'I-type'.

    Types without a prefix become I-type, so that a run of equal tags is one entity.
    """
    prefixed = any(has_prefix(name) for name in names)

    def read(name: str) -> str:
        if name == OUTSIDE:
            return name
        return f"{name[0]}-{name[2:]}" if prefixed else f"I-{name}"

    return tuple(read(name) for name in names)


def types(names: Sequence[str]) -> tuple[str, ...]:
    """Entity types in the order in which the tags name them first."""
    return tuple(dict.fromkeys(tag[2:] for tag in iob(names) if tag != OUTSIDE))


def main_type(tags: Sequence[int], names: Sequence[str]) -> int:
    """What partitions by label take for a sentence's label.

    This project's reading: the entity type that most of its words have, as 1 + its place in `types`, the first of equals;
    0 where every word is outside.
    """
    place = {kind: 1 + i for i, kind in enumerate(types(names))}
    numbers = [0 if tag == OUTSIDE else place[tag[2:]] for tag in iob(names)]
    counts = np.bincount([numbers[tag] for tag in tags], minlength=1 + len(place))
    counts[0] = 0
    return int(counts.argmax())
