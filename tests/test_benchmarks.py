"""The scripts of benchmarks/ run, each in its smallest setting: nobody else does between two measurements.

tests/test_study.py looks at the study's, without a run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs_helper import CLIENTS, config

from fedara_flwr import engine

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.slow


def script(folder: Path, *words: object, code: int = 0) -> str:
    """What `python SCRIPT WORDS` prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)
    assert done.returncode == code, done.stderr[-2000:]
    return done.stdout if code == 0 else done.stderr


def speed(folder: Path, name: str, *words: object, code: int = 0) -> str:
    return script(folder, BENCHMARKS / "speed" / name, *words, code=code)


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def cells(text: str) -> list[list[float]]:
    """The numbers of a Markdown table's rows."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if re.match(r"\| \d", line)]
    return [[float(cell) for cell in row if re.fullmatch(r"[\d.]+", cell)] for row in rows]


def test_a_kept_step_is_faster_than_one_without(tmp_path):
    printed = lines(speed(tmp_path, "step.py", "--repeats", 1, "--lowest", "6", "--out", "out.jsonl"))
    assert printed == lines((tmp_path / "out.jsonl").read_text()) and len(printed) == 1
    assert printed[0]["ms-kept"] < printed[0]["ms-without"] / 2


def test_a_row_is_read_faster_than_it_is_run(tmp_path):
    found = lines(speed(tmp_path, "disk.py", "--rows", 2, "--repeats", 1))
    assert [line["model"] for line in found] == ["MiniLM", "BERT-base's size"]
    assert all(line["mb"] > 0 and line["warm, cpu"] < line["run and written, cpu"] for line in found)


def test_merging_takes_longer_with_more_clients(tmp_path):
    few, many = cells(speed(tmp_path, "merge.py", "--clients", "2,16", "--repeats", 1))
    assert (few[0], many[0]) == (2, 16) and many[2] > few[2] > 0


def test_what_merging_costs_is_a_table_of_both_shapes(tmp_path):
    text = speed(tmp_path, "merge_cost.py")
    found = cells(text)
    assert len(found) == 12 and "of it" in text
    assert all(abs(dense / qr - ratio) < 0.1 * ratio + 0.1 for _, qr, dense, ratio in found if qr > 1)


def test_clients_together_send_as_many_tokens_as_alone_or_more(tmp_path):
    words = ["--models", "tiny", "--clients", 2, "--steps", 1, "--repeats", 1, "--out", "out.jsonl"]
    (line,) = lines(speed(tmp_path, "together.py", *words))
    assert line["tokens-together"] >= line["tokens-alone"] > 0
    assert line["gain"] == pytest.approx(line["ms-alone"] / line["ms-together"])


@pytest.mark.parametrize(
    "words, code, said", [(["--clients", 1000, "--models", "tiny"], 1, "rows for"), (["--models", "tony"], 2, "--models tony")]
)
def test_what_cannot_be_measured_together_is_refused(tmp_path, words, code, said):
    assert said in speed(tmp_path, "together.py", *words, "--out", "out.jsonl", code=code)
    assert not (tmp_path / "out.jsonl").exists()


def test_throughput_counts_every_client_of_every_way(tmp_path):
    words = ["--rounds", 1, "--clients", 2, "--dtypes", "float32", "--models", "tiny", "--out", "out.jsonl"]
    round_line, line = lines(speed(tmp_path, "throughput.py", *words))
    assert round_line["clients"] == 2 and lines((tmp_path / "out.jsonl").read_text()) == [line]
    for way in ("ours", "bare", "plain"):
        assert line[f"per-second-{way}"] == pytest.approx(2 / round_line[way])


def test_one_round_under_ray_is_a_rate(tmp_path):
    """Here without Ray: of one round no first one can be left out."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import throughput; print(throughput.wall([(4, 2.0)]))"
    assert (
        script(tmp_path, "-c", code, BENCHMARKS / "speed")
        .strip()
        .endswith("{'per-second': 2.0, 'per-second-after-first': 2.0}")
    )


def test_throughput_ends_where_the_plain_app_fails(tmp_path):
    """No figure, whatever ours did."""
    shutil.copytree(BENCHMARKS / "speed", tmp_path / "speed")
    project = tmp_path / "speed" / "flowertune" / "pyproject.toml"
    project.write_text(project.read_text().replace("steps = 6", 'steps = "6"'))
    words = ["--rounds", 1, "--clients", 2, "--dtypes", "float32", "--models", "tiny", "--out", "out.jsonl"]
    assert "the plain app: " in script(tmp_path, tmp_path / "speed" / "throughput.py", *words, code=1)
    assert not (tmp_path / "out.jsonl").exists()


def test_memory_of_a_step_is_less_as_the_run_ended(tiny_bert, tmp_path):
    flat = config(tiny_bert, fedara__final_rank=1.0, num_server_rounds=3, run__dir=str(tmp_path), run__name="run")
    engine.run(flat, CLIENTS)
    text = speed(tmp_path, "memory.py", tmp_path / "run", "--batch", 4, "--steps", 1)
    whole, ended = (float(re.search(r"'states': ([\d.]+)", line)[1]) for line in text.splitlines()[:2])
    assert ended <= whole and "less by" in text


def test_memory_of_no_run_is_no_figure(tmp_path):
    assert "the process that measures it failed" in speed(tmp_path, "memory.py", tmp_path / "nowhere", code=1)


ATTACKED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import run, table
run.BASE |= {"model.name": sys.argv[2], "num-server-rounds": 1, "train.steps": 1, "adapter.target-modules": ""}
run.RULES = {"mean": {}, "median": run.RULES["median"]}
run.SHARES = (0.0, 0.2)
run.main(Path("lines.jsonl"))
table.main(Path("lines.jsonl"))
"""


def test_every_attack_is_a_row(tiny_bert, tmp_path):
    text = script(tmp_path, "-c", ATTACKED, BENCHMARKS / "robustness", tiny_bert)
    found = lines((tmp_path / "lines.jsonl").read_text())
    assert {line["outcome"] for line in found} <= {"completed", "failed"} and len(found) > 4
    for attack in {line["attack"] for line in found}:
        assert f"| {attack} | " in text


@pytest.mark.parametrize(
    "steps, python, code, said", [("study tests", "false", 1, "failed: tests study table"), ("stduy", "false", 2, "stduy")]
)
def test_the_lane_of_a_gpu_ends_as_its_steps_did(tmp_path, steps, python, code, said):
    """Here with a Python that fails at all of them."""
    (tmp_path / "content").mkdir()
    subprocess.run(["tar", "-cJf", "lane.tar.xz", "content"], cwd=tmp_path, check=True)
    environment = os.environ | {"STEPS": steps, "PYTHON": python}
    command = ["bash", BENCHMARKS / "gpu" / "lane.sh", "--dry", "lane.tar.xz", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code and said in done.stderr
    assert [line["code"] for line in lines((tmp_path / "out" / "steps.jsonl").read_text())] == [1, 1] if code == 1 else True
