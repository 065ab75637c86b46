"""What Flower's Hub takes of this repository works by itself, and what `flwr run` sends has no more than it needs."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from flwr.cli.app_cmd.publish import _validate_files
from flwr.cli.build import build_fab_from_files
from flwr.cli.utils import filter_paths_for_publish
from runs_helper import SMALL

ROOT = Path(__file__).parents[2]
NOT_TAKEN = {
    ".ci",
    "Makefile",
    "constraints.txt",
    "docker",
    "benchmarks",
    "docs/images",
    "fedara_flwr/py.typed",
    "CITATION.cff",
}
MADE = {"runs", "dist", "comparison.html"}  # by what the README tells, and kept out of git


def checkout() -> dict[str, Path]:
    """What Flower's collect_files gives, without a virtual environment's fifty thousand files."""
    there = [place for place in ROOT.iterdir() if place.name not in MADE]
    places = [place for place in there if place.name in (".ci", ".gitignore") or not place.name.startswith(".")]
    found = [path for place in places for path in ([place] if place.is_file() else place.rglob("*")) if path.is_file()]
    return {path.relative_to(ROOT).as_posix(): path for path in found if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def uploaded() -> dict[str, Path]:
    return filter_paths_for_publish(checkout())


@pytest.fixture(scope="module")
def copy(uploaded: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `flwr new @fedara/fedara-flwr` gives."""
    folder = tmp_path_factory.mktemp("hub") / "fedara-flwr"
    for name, path in uploaded.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / name)
    return folder


def fedara(copy: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """The command of the copy's own package."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-P", "-m", "fedara_flwr.cli", *map(str, words)],
        cwd=copy.parent,
        env=env | {"PYTHONPATH": str(copy), "FLWR_HOME": str(copy.parent / "home")},
        capture_output=True,
        text=True,
    )


def test_the_hub_takes_all_but_what_builds_and_pictures(uploaded, capsys):
    _validate_files(list(uploaded.values()))  # how many, how large each, how large all, UTF-8
    assert "Validation passed" in capsys.readouterr().out
    left_out = {name for name in checkout().keys() - uploaded.keys() if not name.endswith(".fab")}
    assert {name for name in left_out if not any(name == one or name.startswith(f"{one}/") for one in NOT_TAKEN)} == set()
    assert not any(name.endswith((".py", ".toml", ".md", ".jsonl")) for name in left_out)
    assert {"README.md", "LICENSE", "pyproject.toml", "federation.toml", "configs/paper.toml", "docs/deploy.md"} <= set(
        uploaded
    )


def test_front_matter_is_of_the_kind_that_flower_reads():
    _, front, text = (ROOT / "README.md").read_text().split("---\n", 2)
    assert {key: type(value) for key, value in yaml.safe_load(front).items()} == dict.fromkeys(
        ("tags", "dataset", "framework"), list
    )
    assert text.startswith("\n# fedara-flwr\n")


def test_the_bundle_holds_the_package_and_nothing_else(uploaded):
    bundle, versions = build_fab_from_files(checkout())
    names = set(zipfile.ZipFile(io.BytesIO(bundle)).namelist())
    package = {name for name in uploaded if name.startswith("fedara_flwr/") and name.endswith(".py")}
    assert names == package | {"pyproject.toml", "README.md", "LICENSE", ".info/CONTENT"}
    assert (versions.fab_format_version, versions.flwr_version_min, versions.flwr_version_target) == (1, "1.41.0", "1.42.0")
    assert len(bundle) < 2e6


def test_a_copy_writes_a_site(copy, tmp_path):
    done = fedara(copy, "deploy", "init", "--server", "fed.example", "--nodes", "1", "--out", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    start = (tmp_path / "site" / "server" / "start.sh").read_text()
    assert start.startswith("#!/bin/sh\n") and start.endswith("\n") and "```" not in start
    assert "PORT=8000\n" in (tmp_path / "site" / "server" / "settings.env").read_text()
    for folder, count in (("server", 18), ("node-1", 10)):
        assert sum(path.is_file() for path in (tmp_path / "site" / folder).iterdir()) == count


@pytest.mark.slow
def test_a_copy_runs(copy, tmp_path, tiny_bert):
    values = SMALL | {"num-server-rounds": 1, "model.name": str(tiny_bert), "run.dir": str(tmp_path), "run.name": "one"}
    given = [word for key, value in values.items() for word in ("-c", f"{key}={json.dumps(value)}")]
    looked = fedara(copy, "doctor", copy, *given)
    assert looked.returncode == 0 and f"app folder       {copy}" in looked.stdout, looked.stdout + looked.stderr
    (copy / "federation.toml").write_text("num-supernodes = 4\n")
    done = fedara(copy, "run", copy, "--engine", "inprocess", *given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "one" / "federated.json").read_text())["outcome"]
    assert (tmp_path / "one" / "report.html").is_file()
