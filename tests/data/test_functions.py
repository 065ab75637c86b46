"""The built-in pairs: functions of the standard library without their docstrings, and what these say first."""

from __future__ import annotations

import ast
from collections import Counter

import numpy as np
import pytest
from conftest import TASKS
from data_helper import federation, load, shares

from fedara_flwr.config import DataSettings
from fedara_flwr.data import functions
from fedara_flwr.data.docstrings import AREAS
from fedara_flwr.tasks import read_settings

SOURCE = '''
class Thing:
    def good(self, x):
        """Give back what came in.

        And more about it.
        """
        return x

    async def also(self):
        """Wait for a
        while."""
        y = await self.good(1)
        return y

def bare(x):
    return x

def short():
    """Too short."""
    return 1

def promise(x):
    """What follows is this list:

    - one
    """
    return x

def nothing():
    """Says what it does, and does nothing."""

def one_line(x):
    """Comes down to a single line of code: %s."""
'''


@pytest.fixture
def library(tmp_path, monkeypatch):
    """load() of one file of our own."""

    def read(text: str, area: str = "text"):
        (tmp_path / "thing.py").write_text(text)
        monkeypatch.setattr(functions, "sources", lambda: iter([(tmp_path / "thing.py", area, "thing")]))
        return functions.load.__wrapped__()

    return read


def test_by_hand(library):
    """Short docstrings, those that end in a colon, and functions that are nothing but a docstring are none."""
    assert library(SOURCE) == (
        functions.Function(functions.QUESTION, "def good(self, x):\n    return x", "Give back what came in.", "text", "thing"),
        functions.Function(
            functions.QUESTION,
            "async def also(self):\n    y = await self.good(1)\n    return y",
            "Wait for a while.",
            "text",
            "thing",
        ),
    )


def test_bounds(library):
    """3 to 40 words; at most 700 characters of code."""

    def made(words: int, code: int = 1) -> int:
        body = "".join(f"    x = {100 + i}\n" for i in range(code))
        return len(library(f'def f(x):\n    """{"word " * words}"""\n{body}'))

    assert [made(words) for words in (2, 3, 40, 41)] == [0, 1, 1, 0]
    assert made(5, 40) == 1 and made(5, 80) == 0


def test_equal_code_counts_once_and_broken_files_not_at_all(library):
    twice = 'def f(x):\n    """{} words are here."""\n    return x\n'
    (one,) = library(twice.format("First") + twice.format("Other"))
    assert one.output == "First words are here."
    assert library("def f(:\n") == () and library("\0") == ()


def test_the_standard_library():
    """Many, of every area; each is code that can be read, and its answer is not in it."""
    rows = functions.load()
    assert len(rows) > 1500 and len({row.input for row in rows}) == len(rows)
    areas = Counter(row.area for row in rows)
    assert set(areas) <= set(AREAS) and len(areas) >= 11 and min(areas.values()) >= 5
    for row in rows[::50]:
        node = ast.parse(row.input).body[0]
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) is None
        assert 3 <= len(row.output.split()) <= 40 and "\n" not in row.output and len(row.input) <= 700
        assert row.instruction == functions.QUESTION and row.module in AREAS[row.area].split()
    assert functions.load() is rows


def test_a_run_of_language_models_has_them_by_itself():
    """Question and code are the prompt, areas what dirichlet goes by."""
    settings = read_settings({"data.task": "causal-lm"}).data
    assert settings.name == "functions" and settings.partition == "dirichlet"
    data, row = load(settings, 0), functions.load()[0]
    by_answer = {messages[1][1]: messages for messages in (data.train.targets + data.test.targets)}
    assert len(data.train) + len(data.test) == len(functions.load()) and data.skipped == () and data.labels == ()
    prompt = f"{functions.QUESTION}\n\n{row.input}"
    found = {messages[0][1]: messages[1][1] for messages in (*data.train.targets, *data.test.targets)}
    assert found[prompt] == row.output and row.output in by_answer
    assert set(data.train.categories) <= set(AREAS) and data.train.groups is None
    dealt = shares(settings, 0, 4)
    pool = federation(settings, 0).pool
    counts = [Counter(pool.categories[i] for i in part) for part in dealt]
    assert sum(map(len, dealt)) == len(pool)
    # Dir(0.5) deals areas out unevenly: some client has more than half of an area that all could share
    whole = sum(counts, Counter())
    assert max(count[area] / whole[area] for count in counts for area in whole) > 0.5


def test_another_task_may_read_them_too():
    """Which area code is of."""
    settings = DataSettings(name="functions", text_column="input", label_column="area", partition="iid")
    data = load(settings, 0)
    assert set(data.labels) <= set(AREAS) and len(np.unique(data.train.groups)) == len(data.labels)


def test_what_knows_no_functions_says_which_data_it_takes():
    assert TASKS["causal-lm"].docstrings and "'functions' has" in TASKS["causal-lm"].docstrings
