"""The built-in data set: docstrings of Python's standard library, labelled by the area of their module.

Real text on every machine, no download. Sources are parsed with ast, never imported. The twelve labels are fixed; one
without examples is legal, since some machines lack tkinter and newer Pythons lack distutils.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from fedara_flwr.data.examples import Examples

AREAS = {
    "gui": "tkinter idlelib turtle turtledemo curses",
    "networking": "http urllib socket socketserver ssl ftplib smtplib imaplib poplib nntplib telnetlib xmlrpc wsgiref "
    "ipaddress cgi cgitb webbrowser selectors asynchat asyncore smtpd uuid netrc",
    "mail": "email mailbox mimetypes mailcap quopri base64 uu binhex",
    "concurrency": "asyncio multiprocessing threading concurrent subprocess queue sched signal _threading_local",
    "archives": "tarfile zipfile bz2 gzip lzma zipapp _compression",
    "testing": "unittest doctest pdb bdb trace traceback cProfile profile pstats timeit tracemalloc",
    "packaging": "distutils importlib pkgutil venv ensurepip site sysconfig runpy zipimport modulefinder imp",
    "numbers": "_pydecimal _pylong statistics random fractions numbers datetime _pydatetime calendar _strptime zoneinfo "
    "heapq bisect colorsys",
    "text": "xml html json csv configparser re string textwrap difflib plistlib tomllib encodings codecs locale gettext",
    "language": "inspect ast dis symtable typing enum dataclasses types abc functools operator collections contextlib "
    "weakref pickle pickletools copy copyreg tokenize _collections_abc reprlib",
    "files": "os pathlib shutil tempfile ntpath posixpath genericpath glob fnmatch stat _pyio io fileinput filecmp",
    "tools": "logging argparse optparse getopt cmd code pydoc warnings getpass rlcompleter shlex pprint",
}
MIN_WORDS = 5


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join((ast.get_docstring(node) or "").split())
            if len(text.split()) >= MIN_WORDS:
                yield text


def sources() -> Iterator[tuple[Path, str, str]]:
    """Files of the standard library that belong to an area, without tests: path, area, top-level module; by path."""
    area_of = {module: area for area, modules in AREAS.items() for module in modules.split()}
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        module = parts[0].removesuffix(".py")
        if module in area_of and not {"test", "tests", "idle_test", "site-packages", "__pycache__"} & set(parts):
            yield path, area_of[module], module


@cache
def load() -> tuple[Examples, tuple[str, ...]]:
    """All unique docstrings of five words or more, grouped by area, and the twelve areas' names; takes a second, once."""
    places = {area: place for place, area in enumerate(AREAS)}
    area_by_text: dict[str, int] = {}
    for path, area, _ in sources():
        for text in _docstrings(path):
            area_by_text.setdefault(text, places[area])
    return Examples(tuple(area_by_text), np.array(list(area_by_text.values()), dtype=np.int64)), tuple(AREAS)
