"""How alike an answer and an expected one are: SQuAD's exact match and F1 (arXiv 1606.05250), and ROUGE-L (Lin, 2004).

SQuAD's own figures are for answers cut out of a text, and leave nothing of "A" or "+". `exact` and `rouge_l` are for answers
that a model writes: of any kind, in any script.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
# how Unicode's names of the letters begin whose scripts have no spaces between words
SPACELESS = (
    "CJK",
    "IDEOGRAPHIC",
    "HIRAGANA",
    "KATAKANA",
    "HALFWIDTH KATAKANA",
    "THAI",
    "LAO",
    "KHMER",
    "MYANMAR",
)


def normalised(text: str) -> list[str]:
    """Words as SQuAD compares them: in lower case, without punctuation and English articles."""
    return ARTICLES.sub(" ", _bare(text)).split()


def squad_exact(answer: str, expected: str) -> float:
    """1 where both are the same words as SQuAD compares them, else 0; so, too, where nothing is left of either."""
    return float(normalised(answer) == normalised(expected))


def exact(answer: str, expected: str) -> float:
    """1 where both are the same words, else 0; articles, then punctuation, count where one of both is nothing else."""
    own, other = normalised(answer), normalised(expected)
    for shown in (_bare, str.lower):
        if not own or not other:
            own, other = shown(answer).split(), shown(expected).split()
    return float(own == other)


def word_f1(answer: str, expected: str) -> float:
    """F1 of the words, each counted as often as it occurs; where either has none, whether both have none."""
    own, other = normalised(answer), normalised(expected)
    if not own or not other:
        return float(own == other)
    shared = (Counter(own) & Counter(other)).total()
    return 2 * shared / (len(own) + len(other))


def rouge_l(answer: str, expected: str) -> float:
    """F1 of the longest sequence of words that both have in this order; where either has none, whether both are one text."""
    own, other = _words(answer), _words(expected)
    if not own or not other:
        return float(answer.strip() == expected.strip())
    return 2 * _common(own, other) / (len(own) + len(other))


def _bare(text: str) -> str:
    """In lower case, without ASCII's punctuation."""
    return "".join(c for c in text.lower() if c not in string.punctuation)


def _words(text: str) -> list[str]:
    """Stretches of letters and digits in lower case, each letter by itself where its script has no spaces; marks stay with it.

    ROUGE's own words are of a to z alone, and would leave nothing of most scripts.
    """
    words: list[str] = []
    inside = goes_on = False  # whether the last character belongs to the last word, and the next letter may, too
    for char in unicodedata.normalize("NFC", text.lower()):
        kind = unicodedata.category(char)[0]
        if kind == "M":
            if inside:
                words[-1] += char
            continue
        inside = kind in "LN"
        alone = inside and unicodedata.name(char, "").startswith(SPACELESS)
        if inside and goes_on and not alone:
            words[-1] += char
        elif inside:
            words.append(char)
        goes_on = inside and not alone
    return words


def _common(one: Sequence[str], two: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(two) + 1)
    for word in one:
        before = 0
        for place, other in enumerate(two, 1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]
