"""Answers to questions about a text as data sets write them: SQuAD's columns, its nested articles, and texts alone."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedara_flwr.data.skipped import LeftOut, absent, spelled


def is_mark(char: str) -> bool:
    """Whether it combines with the character before it, such as an accent."""
    return unicodedata.category(char).startswith("M")


def answers_of(value: Any) -> list[tuple[str, Any]]:
    """Answers with where they begin, None where the data does not say; none of an annotator who gave no text."""
    if isinstance(value, Mapping):
        if value and "text" not in value:
            raise LeftOut("with answers that are no text")
        texts, starts = (_listed(value.get(name)) for name in ("text", "answer_start"))
        if not texts and not isinstance(value.get("answer_start"), list | tuple):
            return []  # one annotator's, who gave a place alone
        starts = starts or [None] * len(texts)
        if len(texts) != len(starts):
            raise LeftOut("with answers of which not each has a place")
        pairs = [(_text(answer), start) for answer, start in zip(texts, starts, strict=True)]
        return [(answer, start) for answer, start in pairs if answer]
    if isinstance(value, list | tuple):
        return [answer for each in value for answer in answers_of(each)]
    answer = _text(value)
    return [(answer, None)] if answer else []


def _text(value: Any) -> str:
    """An answer as text, a number too; '' where there is none, or nothing but spaces."""
    if absent(value):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise LeftOut("with answers that are no text")
    answer = spelled(value)
    return answer if answer.strip() else ""


def _listed(value: Any) -> list[Any]:
    """The values of a list; a bare one as a list of it."""
    return [] if absent(value) else list(value) if isinstance(value, list | tuple) else [value]


def placed_beside(answers: Any, starts: Any) -> Any:
    """Answers with their places of a column of its own, where they have none themselves."""
    texts = _listed(answers)
    return answers if any(isinstance(each, Mapping) for each in texts) else {"text": texts, "answer_start": starts}


def is_true(value: Any) -> bool:
    """Whether a column of yes and no says yes; csv files have it as text."""
    return str(value).strip().casefold() in ("true", "yes", "1", "1.0")


def placed(answer: str, start: Any, context: str) -> list[Any]:
    """The answer, marks on its last letter included, and where it begins.

    Where the data does not say: its first occurrence that is no part of a word, else the first.
    """
    try:
        begin = _found(answer, context) if absent(start) else int(start)
        whole = absent(start) or begin == float(start)
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise LeftOut("with an answer whose place is no whole number")
    if begin < 0 or context[begin : begin + len(answer)] != answer:
        raise LeftOut("with an answer that is not where it should be")
    end = begin + len(answer)
    while end < len(context) and is_mark(context[end]):
        end += 1
    return [context[begin:end], begin]


def _found(answer: str, context: str) -> int:
    """Where it stands: "he" is in "The", too, but the answer it is not."""
    begins = [found.start() for found in re.finditer(f"(?={re.escape(answer)})", context)]
    whole = (begin for begin in begins if not _joined(context, begin) and not _joined(context, begin + len(answer)))
    return next(whole, begins[0] if begins else -1)


def _joined(context: str, place: int) -> bool:
    """Whether the characters before and at a place are of one word."""
    return 0 < place < len(context) and context[place - 1].isalnum() and context[place].isalnum()


def unfolded(articles: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row a question of SQuAD's articles."""
    for article in articles:
        for paragraph in article.get("paragraphs") or ():
            for qa in paragraph.get("qas") or ():
                answers = [] if is_true(qa.get("is_impossible")) else qa.get("answers") or []
                yield {
                    "title": article.get("title") or "",
                    "context": paragraph["context"],
                    "question": qa["question"],
                    "answers": _in_lists(answers),
                }


def _in_lists(answers: Any) -> dict[str, list[Any]]:
    """A question's answers of SQuAD's articles as the texts of all and the places of all, as a table's column can hold them."""
    if isinstance(answers, Mapping):
        texts, starts = _listed(answers["text"]), _listed(answers.get("answer_start"))
    else:
        entries = [each if isinstance(each, Mapping) else {"text": each} for each in _listed(answers)]
        texts, starts = [each["text"] for each in entries], [each.get("answer_start") for each in entries]
    return {"text": [None if absent(text) else spelled(text) for text in texts], "answer_start": starts}
