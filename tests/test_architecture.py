"""The direction of imports, and what must not be loaded where."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fedara_flwr"
LAYERS = """keys training config seeds files log plugins flower model data tasks adapters wire merging strategies node client
server report runs client_app server_app engine cli""".split()
LEVEL = {name: level for level, name in enumerate(LAYERS)}
NUMPY_ONLY = ("model", "merging", "strategies", "wire", "node", "data", "report")
FORBIDDEN = dict.fromkeys(NUMPY_ONLY, {"torch"}) | {"adapters": {"flwr"}, "tasks": {"flwr"}}
FORBIDDEN |= dict.fromkeys(("model", "merging", "strategies"), {"torch", "flwr"})
NEVER_MEET = {("server", "client"), ("server", "node")}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} if node.module != "fedara_flwr" else {f"fedara_flwr.{a.name}" for a in node.names}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for name in imports(path):
        top, _, rest = name.partition(".")
        if rest == "__version__":
            continue
        assert top not in FORBIDDEN.get(own, set()), f"{own} imports {name}"
        if top == "fedara_flwr":
            other = rest.partition(".")[0]
            assert LEVEL[other] <= LEVEL[own], f"{own} imports {other}, which stands above it"
            assert (own, other) not in NEVER_MEET


PUBLIC = re.compile(r"flwr\.(app|clientapp|serverapp|server_app|client_app)(\.\w+)?")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_is_flowers_own_stands_in_one_file(path):
    private = {name for name in imports(path) if name.partition(".")[0] == "flwr" and not PUBLIC.fullmatch(name)}
    assert not private or path.name == "flower.py"


def test_one_idea_a_file():
    """A file of more than 400 lines holds several."""
    assert {
        str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if len(path.read_text().splitlines()) > 400
    } == set()


def test_nothing_is_done_in_an_assertion():
    """With PYTHONOPTIMIZE=1 Python leaves all of them out."""
    found = {
        f"{path.name}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert) and any(isinstance(part, ast.NamedExpr) for part in ast.walk(node))
    }
    assert not found


@pytest.mark.parametrize("module", ["fedara_flwr.client_app", "fedara_flwr.server_app", "fedara_flwr.strategies.fedara"])
def test_apps_load_without_torch(module):
    """A node answers `whoami` in a fresh process per message: no torch, no transformers."""
    code = f"import {module}, sys; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'peft', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0


def test_whoami_answers_without_torch():
    code = """
import sys
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from fedara_flwr.client_app import app
TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
context = Context(1, 5, {"partition-id": 3, "num-partitions": 8}, RecordDict(), {})
answer = app(Message(RecordDict(), 5, "query.whoami"), context).content.config_records["whoami"]
assert dict(answer) == {"protocol": 4, "client-key": "3", "num-partitions": 8,
    "terms": "orthogonality,prox,slot-vote,tail-penalty", "parts": "B,E,A,head,backbone"}, answer
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
