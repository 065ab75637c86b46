"""Likeness of answers by hand: SQuAD's exact match and F1, ROUGE-L."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedara_flwr.tasks.overlap import exact, normalised, rouge_l, squad_exact, word_f1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat's pyjamas!", ["cats", "pyjamas"]),
        ("A man, a plan; an ant. THE END", ["man", "plan", "ant", "end"]),
        ("theatre another ban", ["theatre", "another", "ban"]),  # articles are whole words
        ("  spaces\n\tand lines ", ["spaces", "and", "lines"]),
        ("the-end", ["theend"]),  # punctuation goes first, as in SQuAD's own script
        ("1,000.5", ["10005"]),
        ("«Élan»", ["«élan»"]),  # ASCII's punctuation alone
        ("", []),
        ("The.", []),
    ],
)
def test_normalised(text, words):
    assert normalised(text) == words


def test_squads_exact_match():
    assert squad_exact("The Eiffel Tower.", "eiffel tower") == 1
    assert squad_exact("eiffel", "eiffel tower") == 0 and squad_exact("tower eiffel", "eiffel tower") == 0
    assert squad_exact("", "") == squad_exact("the", "") == 1 and squad_exact("a word", "") == 0
    assert squad_exact("...", "A") == squad_exact("+", "-") == 1, "as SQuAD's own script has it"


@pytest.mark.parametrize(
    ("answer", "expected", "value"),
    [
        ("The Eiffel Tower.", "eiffel tower", 1),
        ("eiffel", "eiffel tower", 0),
        ("tower eiffel", "eiffel tower", 0),
        ("a word", "", 0),
        ("", "", 1),
        ("", " \n", 1),
        ("the", "", 0),
        ("...", "A", 0),
        ("A.", "a", 1),  # an article is all there is: it counts, the full stop does not
        ("A", "an", 0),
        ("the", "the cat", 0),
        ("+", "-", 0),
        (" +\n", "+", 1),
        ("+", "A", 0),
        ("<", "", 0),
        ("C++", "c", 1),  # something is left of both
        ("да.", "Да", 1),
    ],
)
def test_exact_of_answers_that_are_written(answer, expected, value):
    """Articles and punctuation go where something is left of both."""
    assert exact(answer, expected) == exact(expected, answer) == value


@pytest.mark.parametrize(
    ("answer", "expected", "value"),
    [
        ("in the year 1990", "1990", 2 * 1 / (3 + 1)),  # in, year, 1990: precision 1/3, recall 1
        ("red red blue", "red blue blue", 2 * 2 / 6),  # red once, blue once
        ("b a c", "c b d", 2 * 2 / (2 + 3)),  # "a" is an article; the order does not matter
        ("one", "two", 0),
        ("", "", 1),
        ("The", "an", 1),
        ("", "one", 0),
        ("one", "the", 0),
        ("Same words, same number.", "same words same number", 1),
    ],
)
def test_f1(answer, expected, value):
    assert word_f1(answer, expected) == pytest.approx(value)


@pytest.mark.parametrize(
    ("answer", "expected", "value"),
    [
        ("police killed the gunman", "police kill the gunman", 2 * 3 / 8),  # Lin's own sentences: 3 of 4 in order
        ("the gunman kill police", "police kill the gunman", 2 * 2 / 8),
        ("the gunman police killed", "police killed the gunman", 2 * 2 / 8),
        ("a b c d e", "b x d", 2 * 2 / 8),  # articles count here
        ("x_y-z", "x y z", 1),  # letters and digits alone
        ("ONE two", "one, two!", 1),
        ("", "", 1),
        ("?", "", 0),  # without words on a side the texts themselves count
        ("+", "-", 0),
        (" + ", "+", 1),
        ("👍", "👍", 1),
        ("👍", "👎", 0),
        ("?", "one", 0),
        ("one", "", 0),
        ("one", "two", 0),
        ("совсем другое", "привет мир", 0),
        ("привет, мир!", "Привет большой мир", 2 * 2 / 5),
        ("x", "привет мир", 0),
        ("caf\u00e9", "cafe", 0),  # another word
        ("caf\u00e9", "caf", 0),
        ("le caf\u00e9", "le cafe\u0301 noir", 2 * 2 / 5),  # é in one character and in two
        ("错误", "正确的答案", 0),
        ("正确答案", "正确的答案。", 2 * 4 / 9),  # no spaces: characters
        ("東京タワー", "東京 tower", 2 * 2 / (5 + 3)),
        ("iPhone很好", "iphone 很差", 2 * 2 / 6),
        ("서울 타워", "서울 탑", 2 * 1 / 4),  # Korean has spaces
        ("ที่", "ที่นี่", 2 * 1 / 3),  # Thai: letters with their marks
        ("हिन्दी भाषा", "हिन्दी", 2 * 1 / 3),  # vowel signs are no ends of words
    ],
)
def test_rouge_l(answer, expected, value):
    assert rouge_l(answer, expected) == pytest.approx(value)


sentences = st.lists(st.sampled_from("a b c d".split()), max_size=7).map(" ".join)


@given(sentences, sentences)
def test_bounds_and_symmetry(one, two):
    """F1 does not ask which is the answer; no order is as alike as the words without one, articles aside."""
    for figure in (exact, squad_exact, word_f1, rouge_l):
        assert figure(one, two) == figure(two, one) and 0 <= figure(one, two) <= 1 and figure(one, one) == 1
    letters = [text.replace("a", "e") for text in (one, two)]
    assert rouge_l(*letters) <= word_f1(*letters) + 1e-12


@given(sentences, sentences)
def test_the_longest_common_subsequence_is_the_longest(one, two):
    """By trying all subsequences of the shorter one."""
    first, second = sorted((one.split(), two.split()), key=len)

    def inside(words) -> bool:
        rest = iter(second)
        return all(word in rest for word in words)

    chosen = ([w for i, w in enumerate(first) if bits >> i & 1] for bits in range(1 << len(first)))
    most = max(len(words) for words in chosen if inside(words))
    total = len(first) + len(second)
    assert rouge_l(one, two) == pytest.approx(2 * most / total if first and second else float(first == second))
