"""Extractive question answering: the answer is a stretch of a text, or there is none (SQuAD, arXiv 1606.05250, 1806.03822).

A text that is longer than `data.max-length` is read in windows that overlap. Each is a row of its own when the model learns; a
window without the answer, like a question without one, has its answer at the first token. Nothing is learnt of a window that
holds a part of it, nor of any window where none holds the whole: that there is no answer would be wrong. For an evaluation the
best span of all windows counts, cut out of the original text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedara_flwr.data.examples import Examples
from fedara_flwr.data.labels import Labels
from fedara_flwr.data.reading import Column, Example, refuse_shared, text
from fedara_flwr.keys import ConfigError, Group
from fedara_flwr.tasks.annotations import answers_of, is_mark, is_true, placed, placed_beside, unfolded
from fedara_flwr.tasks.base import UNLABELLED, Batch, Encoded, Metric, Task, pad
from fedara_flwr.tasks.overlap import squad_exact, word_f1
from fedara_flwr.tasks.spelled import read

if TYPE_CHECKING:
    import torch

BEST = 20  # starts and ends of a window from which spans are made
BESIDE = {"starts": "answer_start", "impossible": "is_impossible"}  # columns of their own in flat copies of SQuAD
NONE = 0  # the token at which "no answer" stands: the first


class QuestionAnsweringOptions(Group):
    """Keys of `data.options` for question-answering."""

    context_column: str = Field("context", min_length=1, description="column of the text that has the answers")
    answers_column: str = Field(
        "answers", min_length=1, description="column of the answers: SQuAD's text and answer_start, or texts; empty = no answer"
    )
    stride: int = Field(0, ge=0, description="tokens that two windows share; 0 = a quarter of data.max-length")
    longest: int = Field(30, ge=1, description="most tokens of an answer")


@dataclass(frozen=True)
class Window:
    """A stretch of one example's context, as the model reads it.

    Attributes:
        example: its place among the examples.
        offsets: where in the context each token begins and ends, marks on its last letter included, shape (tokens, 2);
            (-1, -1) of others.
    """

    example: int
    offsets: NDArray[np.int32]


class QuestionAnswering(Task):
    """Cross-entropy of an answer's first and last token; F1 and exact match by SQuAD's definition.

    A row's text is its question, its pair the context, its target the answers, each with where it begins.
    """

    name = "question-answering"
    title = "the stretch of a text that answers a question, or that there is none"
    Options = QuestionAnsweringOptions
    auto_class = "AutoModelForQuestionAnswering"
    peft_task_type = "QUESTION_ANS"
    word_places = True
    labelled = False
    grouped = False
    docstrings = "its rows have no questions"
    metric = Metric("f1")
    metrics = ("f1", "exact-match", "has-answer-f1", "answerability", "loss")
    defaults = {"data.max-length": 256, "data.validation-rows": 500}  # noqa: RUF012
    pipeline = "question-answering"
    load_options = ""

    # -- reading rows
    def table(self, table: Any) -> Any:
        """SQuAD's own nested JSON as one row a question; other tables as they are.

        Raises:
            ConfigError: one column is named for two uses.
        """
        nested = next((name for name in ("data", "paragraphs") if name in table.column_names), "")
        if not nested or self.options.context_column in table.column_names:
            refuse_shared(self.columns(table.column_names))
            return table
        articles = [row for rows in table["data"] for row in rows] if nested == "data" else list(table)
        return type(table).from_list(list(unfolded(articles)))

    def columns(self, there: Sequence[str]) -> Sequence[Column]:
        """Question, context and answers; where these begin and whether there are none, if those are columns of their own."""
        settings, options = self.settings, self.options
        # a flat copy of SQuAD has the question under its name, and the answer under 'text'
        usual = settings.text_column == "text" and ("question" in there or "text" not in there)
        question = "question" if usual else settings.text_column
        return [
            Column("text", "text-column", question),
            Column("context", "options context-column", options.context_column),
            Column("answers", "options answers-column", options.answers_column, nested=True),
            *(Column(role, "options answers-column", name, nested=True) for role, name in BESIDE.items() if name in there),
        ]

    def read(self, row: Mapping[str, Any], labels: Labels) -> Example:
        """A question, its context, and where in it the answers stand."""
        question, context = text(row["text"], "question"), text(row["context"], "context")
        given = placed_beside(row["answers"], row["starts"]) if "starts" in row else row["answers"]
        given = None if is_true(row.get("impossible")) else given
        answers = [placed(answer, start, context) for answer, start in answers_of(given)]
        return Example(question, pair=context, target=answers, identity=json.dumps([question, context, answers]))

    # -- the model
    def peft_type(self, tokenizer: Any) -> str | None:
        """QUESTION_ANS, but none for models with token types: PEFT's class of that name drops these, and gives other logits."""
        return None if "token_type_ids" in tokenizer.model_input_names else self.peft_task_type

    def is_head(self, module: str) -> bool:
        """True for `qa_outputs`."""
        return module == "qa_outputs"

    # -- learning
    def encode(self, tokenizer: Any, examples: Examples, max_length: int) -> Encoded:
        """Windows of every row; a label is [first token, last token, first and last of the context, the window's number].

        The first two are NONE where there is no answer, and UNLABELLED where nothing is learnt (`_spans`).
        """
        stride = self._stride(max_length)
        room = max_length - tokenizer.num_special_tokens_to_add(pair=True) - stride - 1  # one token more than is shared
        most = min(max_length // 2, room)
        if most < 1 or stride >= max_length // 2:
            raise ConfigError(f"data.options stride = {stride}: allowed is less than half of data.max-length = {max_length}")
        ids: list[list[int]] = []
        labels: list[list[int]] = []
        windows: list[Window] = []
        cut = empty = unlearnt = 0
        for number in range(len(examples)):
            question, shortened = _shortened(tokenizer, examples.texts[number], most)
            assert examples.pairs is not None and examples.targets is not None
            found = _windows(tokenizer, question, examples.pairs[number], max_length, stride)
            spans = _spans([offsets for _, offsets in found], examples.targets[number])
            for (tokens, offsets), span in zip(found, spans, strict=True):
                where = _of_context(offsets)
                labels.append([*span, int(where[0]), int(where[-1]), len(windows)])
                ids.append(tokens)
                windows.append(Window(number, offsets))
            cut += shortened
            empty += not found
            unlearnt += bool(found) and all(span[0] == UNLABELLED for span in spans)
        said = (
            (cut, f"cut at {most} tokens"),
            (empty, "left out, of whose context no token is left"),
            (unlearnt, "whose answer is in no window whole (data.options stride)"),
        )
        notes = ", ".join(f"{count} {what}" for count, what in said if count)
        return Encoded(ids, labels, (windows, examples), f"of {len(examples)} questions {notes}" if notes else "")

    def _stride(self, max_length: int) -> int:
        """Tokens that two windows share."""
        return int(self.options.stride) or max_length // 4

    def collate(self, tokenizer: Any, ids: Sequence[list[int]], labels: Sequence[list[int]]) -> Batch:
        """As `pad`, and labels of shape (batch, 5)."""
        import torch

        return pad(tokenizer, ids) | {"labels": torch.tensor(labels, dtype=torch.long)}

    def made_up(self, length: int) -> list[int]:
        """A window that is all context."""
        return [0, 0, 0, length - 1, 0]

    def counts(self, batch: Batch) -> torch.Tensor:
        """One for each window of which something is learnt, shape (rows,)."""
        return (batch["labels"][:, 0] != UNLABELLED).long()

    def losses(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Mean of both cross-entropies of each window in nats, over its context and the token of no answer; shape (rows,).

        0 of a window of which nothing is learnt.
        """
        import torch

        labels = batch["labels"]
        both = zip(_logits(outputs, labels), (labels[:, 0], labels[:, 1]), strict=True)
        loss = torch.nn.functional.cross_entropy
        losses = [loss(logits, truth, ignore_index=UNLABELLED, reduction="none") for logits, truth in both]
        return (losses[0] + losses[1]) / 2

    def evaluation(self, data: Encoded, names: tuple[str, ...]) -> Spans:
        """The best span of each example so far, and its score as having none."""
        windows, examples = data.more
        return Spans(self, windows, examples)

    # -- words
    def snippet(self) -> list[str]:
        """Python lines that cut an answer out of a text: transformers 5 has no pipeline for it.

        Whether the model may say that there is none depends on the data: there is a line to say so.
        """
        length = self.settings.max_length or int(self.defaults["data.max-length"])
        return [
            'question, context = "Who wrote it?", "The page was written by Ada Lovelace in 1843."',
            f"# one window: a longer context needs windows, here of {length} tokens that share {self._stride(length)};",
            "# the best span of all counts",
            'batch = tokenizer(question, context, truncation="only_second", return_offsets_mapping=True, return_tensors="pt")',
            'offsets, places = batch.pop("offset_mapping")[0], batch.sequence_ids(0)',
            "outputs = model(**batch)",
            "begin, end = outputs.start_logits[0], outputs.end_logits[0]",
            f"pairs = [(i, j) for i in range(len(places)) for j in range(i, min(i + {self.options.longest}, len(places)))]",
            "pairs = [(i, j) for i, j in pairs if places[i] == places[j] == 1]",
            "i, j = max(pairs, key=lambda pair: begin[pair[0]] + end[pair[1]])",
            "may_be_none = False  # True if it learnt from questions without an answer, too",
            "none = may_be_none and begin[0] + end[0] >= begin[i] + end[j]",
            'print("no answer" if none else context[offsets[i][0] : offsets[j][1]])',
        ]


class Spans:
    """f1 and exact-match: of the answer with the best of those that the data has, means over questions; has-answer-f1: of those
    that have one; answerability: share of questions of which the model rightly says whether there is an answer (always, where
    every question has one: then it must answer); loss: mean over windows of which something is learnt.
    """

    def __init__(self, task: QuestionAnswering, windows: Sequence[Window], examples: Examples) -> None:
        self.task, self.windows, self.examples = task, windows, examples
        count = len(examples)
        self.best, self.none = np.full(count, -np.inf), np.full(count, np.inf)
        self.places = np.zeros((count, 2), dtype=np.int64)
        self.loss, self.rows = 0.0, 0

    def add(self, outputs: Any, batch: Batch) -> None:
        """Take a batch of windows."""
        labels = batch["labels"]
        self.loss += float(self.task.losses(outputs, batch).double().sum())
        self.rows += int(self.task.counts(batch).sum())
        starts, ends = (logits.float().cpu().numpy() for logits in _logits(outputs, labels))
        for start, end, (_, _, first, last, number) in zip(starts, ends, labels.tolist(), strict=True):
            window = self.windows[number]
            none = float(start[NONE] + end[NONE])
            self.none[window.example] = min(self.none[window.example], none)
            score, begin, stop = best_span(start, end, first, last, self.task.options.longest)
            if score > self.best[window.example]:
                self.best[window.example] = score
                self.places[window.example] = window.offsets[begin, 0], window.offsets[stop, 1]

    def answers(self) -> list[str]:
        """What the model says to each question; "" where it says that there is no answer, if there are such questions."""
        assert self.examples.pairs is not None and self.examples.targets is not None
        may = any(not target for target in self.examples.targets)
        said = []
        for number, context in enumerate(self.examples.pairs):
            begin, end = self.places[number]
            silent = may and self.none[number] >= self.best[number]
            said.append("" if silent else context[begin:end])
        return said

    def result(self) -> dict[str, float]:
        """The metrics by name; of no question at all those of a model that knows everything."""
        assert self.examples.targets is not None or not len(self.examples)
        said = self.answers() if len(self.examples) else []
        f1, hits, right, having = list[float](), list[float](), list[float](), list[float]()
        for answer, target in zip(said, self.examples.targets or (), strict=True):
            texts = [each for each, _ in target] or [""]
            f1.append(max(word_f1(answer, each) for each in texts))
            hits.append(max(squad_exact(answer, each) for each in texts))
            right.append(float(bool(answer) == bool(target)))
            having += [f1[-1]] if target else []
        means = {"f1": f1, "exact-match": hits, "has-answer-f1": having, "answerability": right}
        loss = self.loss / max(self.rows, 1)
        return {**{name: float(np.mean(values)) if values else 1.0 for name, values in means.items()}, "loss": loss}


def best_span(
    start: NDArray[np.float32], end: NDArray[np.float32], first: int, last: int, longest: int
) -> tuple[float, int, int]:
    """Score, first and last token of the best span within tokens `first` to `last`, of at most `longest` tokens."""
    begins = first + np.argsort(-start[first : last + 1], kind="stable")[:BEST]
    stops = first + np.argsort(-end[first : last + 1], kind="stable")[:BEST]
    spans = [
        (float(start[begin] + end[stop]), int(begin), int(stop))
        for begin in begins
        for stop in stops
        if begin <= stop < begin + longest
    ]
    top = int(begins[0])
    return max(spans, key=lambda span: (span[0], -span[1], -span[2])) if spans else (float(start[top] + end[top]), top, top)


def _logits(outputs: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of first and last tokens, float32, shape (rows, longest); the lowest number outside of context and NONE."""
    import torch

    place = torch.arange(outputs.start_logits.shape[1], device=labels.device)
    inside = (place >= labels[:, 2:3]) & (place <= labels[:, 3:4]) | (place == NONE)
    low = torch.finfo(torch.float32).min / 4
    start, end = (logits.float().masked_fill(~inside, low) for logits in (outputs.start_logits, outputs.end_logits))
    return start, end


def _windows(
    tokenizer: Any, question: str, context: str, max_length: int, stride: int
) -> list[tuple[list[int], NDArray[np.int32]]]:
    """Token ids and `Window.offsets` of each window of a context, from its beginning on; none without a token of it."""
    with _cut_at_the_end(tokenizer):
        encoded = read(
            tokenizer,
            question,
            context,
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
    ends = _ends(context)
    found = []
    for place, tokens in enumerate(encoded["input_ids"]):
        inside = np.array([sequence == 1 for sequence in encoded.sequence_ids(place)])
        if not inside.any():
            continue
        offsets = np.where(inside[:, None], np.array(encoded["offset_mapping"][place]), -1).astype(np.int32)
        offsets[inside, 1] = ends[offsets[inside, 1]]
        found.append((list(tokens), offsets))
    return found


@contextmanager
def _cut_at_the_end(tokenizer: Any) -> Iterator[None]:
    """A tokenizer that cuts at the beginning makes windows from the end on, of other stretches than all others make."""
    side = tokenizer.truncation_side
    tokenizer.truncation_side = "right"
    try:
        yield
    finally:
        tokenizer.truncation_side = side


def _of_context(offsets: NDArray[np.int32]) -> NDArray[np.int64]:
    """The tokens of a window that are its context's."""
    return np.flatnonzero(offsets[:, 0] >= 0)


def _spans(windows: Sequence[NDArray[np.int32]], target: Sequence[Sequence[Any]]) -> list[tuple[int, int]]:
    """First and last token of the first answer in each window of a question.

    NONE twice where the window has nothing of it; UNLABELLED twice where it has a part of it, and in every window where none
    has all of it that is in tokens (a space at its end may be in none).

    Args:
        windows: the offsets of each.
    """
    if not target:
        return [(NONE, NONE)] * len(windows)
    answer, begin = target[0]
    end = begin + len(answer)
    touched = [np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > begin)) for offsets in windows]
    held = [
        (int(offsets[tokens[0], 0]), int(offsets[tokens[-1], 1])) if len(tokens) else None
        for offsets, tokens in zip(windows, touched, strict=True)
    ]
    there = [part for part in held if part is not None]
    whole = (min(part[0] for part in there), max(part[1] for part in there)) if there else None
    if whole is None or whole not in held:
        return [(UNLABELLED, UNLABELLED)] * len(windows)
    spans = []
    for part, tokens in zip(held, touched, strict=True):
        absence = NONE if part is None else UNLABELLED
        spans.append((int(tokens[0]), int(tokens[-1])) if part == whole else (absence, absence))
    return spans


def _ends(context: str) -> NDArray[np.int32]:
    """Where a stretch that ends at each place ends with the marks on its last letter, shape (characters + 1,).

    What a mark is written with may be in no token: an uncased BERT drops accents.
    """
    ends = np.arange(len(context) + 1, dtype=np.int32)
    if not context.isascii():
        for place in range(len(context) - 1, -1, -1):
            if is_mark(context[place]):
                ends[place] = ends[place + 1]
    return ends


def _shortened(tokenizer: Any, question: str, most: int) -> tuple[str, bool]:
    """A question of at most so many tokens, cut at the end of one, and whether it was cut."""
    encoded = read(tokenizer, question, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    return (question, False) if len(offsets) <= most else (question[: offsets[most][0]].rstrip(), True)
