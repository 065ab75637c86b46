"""The built-in pairs of question and answer: functions of Python's standard library and what their docstrings say first.

Real text on every machine, no download. Sources are parsed with ast, never imported.
"""

from __future__ import annotations

import ast
from functools import cache
from typing import NamedTuple

from fedara_flwr.data.docstrings import sources

QUESTION = "Write the docstring of this Python function."
FEWEST_WORDS, MOST_WORDS = 3, 40  # of an answer
MOST_CHARACTERS = 700  # of a function without its docstring: a longer one tells more than a small model reads
FEWEST_LINES = 2


class Function(NamedTuple):
    """A row.

    Attributes:
        instruction: QUESTION.
        input: the function's code without its docstring.
        output: the docstring's first paragraph, on one line.
        area: of its module, one of docstrings.AREAS.
        module: the name of the top-level module or package.
    """

    instruction: str
    input: str
    output: str
    area: str
    module: str


@cache
def load() -> tuple[Function, ...]:
    """Every function whose docstring begins with a whole paragraph of 3 to 40 words, each code once; takes seconds, once."""
    found: dict[str, Function] = {}
    for path, area, module in sources():
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not (text := ast.get_docstring(node)):
                continue
            answer = " ".join(text.strip().split("\n\n")[0].split())
            words = len(answer.split())
            if not FEWEST_WORDS <= words <= MOST_WORDS or answer.endswith(":") or len(node.body) < 2:
                continue
            node.body = node.body[1:]
            code = ast.unparse(node)
            if len(code) <= MOST_CHARACTERS and code.count("\n") >= FEWEST_LINES - 1:
                found.setdefault(code, Function(QUESTION, code, answer, area, module))
    return tuple(found.values())
