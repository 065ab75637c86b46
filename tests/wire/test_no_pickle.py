"""Nothing in the package can be made to run code by what it reads: no pickle, no eval, no shell, no remote code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "fedara_flwr").rglob("*.py"))
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle", "yaml"}
"""Never imported; `yaml` because its safe loader is not its default."""
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "torch.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "pandas.read_pickle",
    "importlib.import_module",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
}
NUMPY_READERS = {"load", "fromregex", "lib.npyio", "memmap"}
FORBIDDEN_ARGUMENTS = {"shell": True, "allow_pickle": True, "trust_remote_code": True, "weights_only": False}


def name_of(node: ast.expr, aliases: dict[str, str]) -> str:
    """The dotted name of an expression, with import aliases resolved; "" where it is no name."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = name_of(node.value, aliases)
        return f"{base}.{node.attr}" if base else ""
    return ""


def findings(text: str) -> list[str]:
    """What is forbidden in a module's source, as "line: what"."""
    tree = ast.parse(text)
    aliases: dict[str, str] = {}
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                aliases[item.asname or item.name.partition(".")[0]] = item.name if item.asname else item.name.partition(".")[0]
                if item.name.partition(".")[0] in MODULES:
                    found.append((node.lineno, f"import {item.name}"))
        elif isinstance(node, ast.ImportFrom):
            for item in node.names:
                aliases[item.asname or item.name] = f"{node.module}.{item.name}"
            if (node.module or "").partition(".")[0] in MODULES:
                found.append((node.lineno, f"from {node.module} import"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in BUILTINS and node.id not in aliases:
            found.append((node.lineno, node.id))
        elif isinstance(node, (ast.Name, ast.Attribute)) and name_of(node, aliases) in CALLS:
            found.append((node.lineno, name_of(node, aliases)))
        elif isinstance(node, ast.Call):
            name = name_of(node.func, aliases)
            package, _, rest = name.partition(".")
            if package in {"np", "numpy"} and rest in NUMPY_READERS:
                found.append((node.lineno, name))  # its default refuses pickles, but it allocates what a header claims
            for keyword in node.keywords:
                forbidden = FORBIDDEN_ARGUMENTS.get(keyword.arg or "")
                if forbidden is not None and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is not forbidden
                ):
                    found.append((node.lineno, f"{keyword.arg}={ast.unparse(keyword.value)}"))
    return [f"{line}: {what}" for line, what in sorted(set(found))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_can_be_made_to_run_code(path):
    assert findings(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import pickle as p",
        "from cloudpickle import loads",
        "import joblib.memory",
        "def f():\n    import dill",
        "import torch\ntorch.load('x')",
        "import torch as t\nread = t.load",
        "from torch import load as read\nread('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x')",
        "import numpy\nnumpy.load('x', allow_pickle=flag)",
        "import yaml\nyaml.load(text)",
        "eval('1')",
        "exec(text)",
        "__import__('pickle')",
        "import importlib\nimportlib.import_module('pickle')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "from subprocess import Popen\nPopen('ls', shell=anything)",
        "import os\nos.system('ls')",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
    ],
)
def test_the_search_finds(text):
    assert findings(text)


@pytest.mark.parametrize(
    "text",
    [
        "import re\nre.compile('x')",
        "model.eval()",
        "import numpy as np\nnp.savez('x')",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "AutoModel.from_pretrained('x', trust_remote_code=False)",
    ],
)
def test_the_search_lets_pass(text):
    assert findings(text) == []
