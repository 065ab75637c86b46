"""How alike an answer and an expected one are: SQuAD's exact match and F1 (arXiv 1606.05250), and ROUGE-L (Lin, 2004)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(text: str) -> list[str]:
    """Words as SQuAD compares them: in lower case, without punctuation and English articles."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return ARTICLES.sub(" ", bare).split()


def exact(answer: str, expected: str) -> float:
    """1 where both are the same words, else 0."""
    return float(normalised(answer) == normalised(expected))


def word_f1(answer: str, expected: str) -> float:
    """F1 of the words, each counted as often as it occurs; where either has none, whether both have none."""
    own, other = normalised(answer), normalised(expected)
    if not own or not other:
        return float(own == other)
    shared = (Counter(own) & Counter(other)).total()
    return 2 * shared / (len(own) + len(other))


def rouge_l(answer: str, expected: str) -> float:
    """F1 of the longest sequence of words that both have in this order, by ROUGE's own words: letters and digits."""
    own, other = (re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, expected))
    if not own or not other:
        return float(own == other)
    return 2 * _common(own, other) / (len(own) + len(other))


def _common(one: Sequence[str], two: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(two) + 1)
    for word in one:
        before = 0
        for place, other in enumerate(two, 1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]
