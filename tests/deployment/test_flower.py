"""The app under Flower itself: real SuperLink, real Ray, real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest
from runs_helper import SMALL, WALL_CLOCK
from test_output import save_model

from fedara_flwr.runs.directory import read_facts

ROOT = Path(__file__).parents[2]
FEDARA = [sys.executable, "-m", "fedara_flwr.cli"]


def clone(target: Path) -> Path:
    """The files of this checkout that a user gets."""
    target.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "federation.toml"):
        shutil.copy(ROOT / name, target / name)
    shutil.copytree(ROOT / "fedara_flwr", target / "fedara_flwr", ignore=shutil.ignore_patterns("__pycache__"))
    (target / "federation.toml").write_text("num-supernodes = 4\nclient-resources-num-cpus = 1\n")
    return target


def overrides(model: Path, **more) -> list[str]:
    values = SMALL | {"num-server-rounds": 3, "model.name": str(model)} | more
    return [item for key, value in values.items() for item in ("-c", f"{key}={json.dumps(value)}")]


def fedara(app: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
    return subprocess.run([*FEDARA, "run", str(app), *arguments], env=env, cwd="/", capture_output=True, text=True, timeout=500)


def leftovers(*apps: Path) -> list[str]:
    """Flower and Ray processes of `fedara run` with these apps that are still there."""
    homes = {str(app / ".flwr") for app in apps}
    found = []
    for process in psutil.process_iter():
        try:
            if "FEDARA_LAUNCH" in (env := process.environ()) and env.get("FLWR_HOME") in homes:
                found.append(" ".join(process.cmdline())[:80])
        except (psutil.Error, OSError):
            continue
    return found


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in lines]


@pytest.mark.parametrize(
    "method, wire",
    [
        ("fedara", {}),
        *(pytest.param(m, {}, marks=pytest.mark.slow) for m in ("federa", "flora", "legend")),
        pytest.param("hetlora", {"wire.down": "int8", "wire.up": "int4", "wire.feedback": True}, marks=pytest.mark.slow),
    ],
)
def test_flower_and_in_process_runs_are_bit_equal(tiny_bert, tmp_path, method, wire):
    """Same seed: the same arrays, masks, bytes and metrics; and nothing is left running."""
    same_in_both(clone(tmp_path / "app"), tiny_bert, {"method": method, **wire})


@pytest.mark.slow
def test_a_language_model_learns_alike_under_flower(tmp_path):
    """Perplexity, answers by itself and all else of a run with a template of the tokenizer's own."""
    model, data = save_model(tmp_path / "llama", "llama"), tmp_path / "rows.jsonl"
    rows = [{"prompt": f"what is {n}?", "completion": f"the number {n}"} for n in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"data.task": "causal-lm", "data.path": str(data), "data.partition": "length", "train.checkpointing": True}
    more |= {"data.test": 0.2, "data.validation": 0.2, "data.max-length": 40}
    first, second = same_in_both(clone(tmp_path / "app"), model, more)
    facts = [json.loads((run / "federated.json").read_text()) for run in (first, second)]
    assert facts[0]["samples"] == facts[1]["samples"] and facts[0]["unadapted"] == facts[1]["unadapted"]


def same_in_both(app: Path, model: Path, more: dict) -> tuple[Path, Path]:
    """The folders of a run under Flower and in one process, after a look at whether they are the same."""
    flower = fedara(app, *overrides(model, **{"run.name": "flower"}, **more))
    assert flower.returncode == 0, flower.stdout[-3000:] + flower.stderr[-2000:]
    assert "run directory" in flower.stdout + flower.stderr
    inprocess = fedara(app, *overrides(model, **{"run.name": "inprocess"}, **more), "--engine", "inprocess")
    assert inprocess.returncode == 0, inprocess.stderr[-2000:]
    first, second = app / "runs" / "flower", app / "runs" / "inprocess"
    (weights,) = [*first.glob("adapter/*.safetensors"), *first.glob("model/*.safetensors")]
    assert weights.read_bytes() == (second / weights.relative_to(first)).read_bytes()
    assert any(line["type"] == "round" and line["modelled-seconds"] > 0 for line in metrics(first))
    assert metrics(first) == metrics(second)
    masks = [json.loads((run / "federated.json").read_text()) for run in (first, second)]
    assert masks[0]["mask"] == masks[1]["mask"] and masks[0]["bytes"] == masks[1]["bytes"]
    assert leftovers(app) == []
    return first, second


@pytest.mark.slow
def test_a_failed_run_has_a_failed_exit_code(tiny_bert, tmp_path):
    """The setting passes every check before the run; its model does not, in the ServerApp."""
    app = clone(tmp_path / "app")
    done = fedara(app, *overrides(tiny_bert, **{"run.name": "x", "model.name": "/nowhere"}))
    assert done.returncode == 1 and "no such directory" in done.stdout + done.stderr
    assert leftovers(app) == []


@pytest.mark.slow
def test_two_clones_run_at_once_each_its_own_code(tiny_bert, tmp_path):
    """Clone b's clients report another key; a's must not."""
    apps = [clone(tmp_path / name / "app") for name in "ab"]
    source = apps[1] / "fedara_flwr" / "client_app.py"
    text = source.read_text()
    assert "return str(node[name])" in text
    source.write_text(text.replace("return str(node[name])", 'return "b" + str(node[name])'))
    env = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
    runs = [
        subprocess.Popen(
            [*FEDARA, "run", str(app), *overrides(tiny_bert, **{"run.name": "run"})],
            env=env,
            cwd=app,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for app in apps
    ]
    assert [run.wait(timeout=550) for run in runs] == [0, 0]
    sampled = [
        {key for line in metrics(app / "runs" / "run") if line["type"] == "round" for key in line["sampled"]} for app in apps
    ]
    assert all(not key.startswith("b") for key in sampled[0]) and all(key.startswith("b") for key in sampled[1])
    assert leftovers(*apps) == []


def begin(app: Path, *arguments: str) -> subprocess.Popen:
    """`fedara run` in a session of its own, its lines readable."""
    return subprocess.Popen(
        [*FEDARA, "run", str(app), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("FLWR_")},
    )


def wait_for_round(process: subprocess.Popen, number: int) -> None:
    assert any(line.lstrip().startswith(f"{number}/") for line in process.stdout), "the run ended before that round"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["flower", "inprocess"])
def test_interrupt_ends_everything_and_leaves_an_adapter(tiny_bert, tmp_path, engine):
    app = clone(tmp_path / "app")
    options = overrides(tiny_bert, **{"num-server-rounds": 2000, "run.name": "run"})
    process = begin(app, *options, "--engine", engine)
    wait_for_round(process, 2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=90) == 130, process.stdout.read()[-2000:]
    time.sleep(1)
    assert leftovers(app) == []
    run = app / "runs" / "run"
    facts = read_facts(run)
    assert facts["outcome"] == "stopped" and facts["rounds"] >= 2
    assert (run / "adapter" / "adapter_model.safetensors").exists() and (run / "report.html").exists()


@pytest.mark.slow
def test_a_killed_server_goes_on_to_the_same_end(tiny_bert, tmp_path):
    """kill -9 of the process that holds the ServerApp. Going on under Flower ends where an undisturbed run in-process does."""
    app = clone(tmp_path / "app")
    options = overrides(tiny_bert, **{"num-server-rounds": 40})
    process = begin(app, *options, "-c", "run.name='killed'")
    wait_for_round(process, 3)
    servers = [p for p in psutil.process_iter(["cmdline"]) if "flwr-simulation" in " ".join(p.info["cmdline"] or [])]
    mine = [p for p in servers if any(str(app) in value for value in p.environ().values())]
    assert mine
    for server in mine:
        server.kill()
    assert process.wait(timeout=200) == 1 and "ended as failed" in process.stdout.read()
    run = app / "runs" / "killed"
    assert read_facts(run)["outcome"] == "running" and 3 <= read_facts(run)["rounds"] < 40
    resumed = fedara(app, "--resume", str(run))
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-2000:]
    assert fedara(app, *options, "-c", "run.name='whole'", "--engine", "inprocess").returncode == 0
    whole = app / "runs" / "whole"
    weights = "adapter/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (whole / weights).read_bytes()
    ours, theirs = ([line for line in metrics(folder) if line["type"] == "round"] for folder in (run, whole))
    extra = sum(line["bytes"]["down"] + line["bytes"]["up"] for line in metrics(run) if line["type"] == "resume")
    assert ours[-1].pop("bytes-total") == theirs[-1].pop("bytes-total") + extra and ours[-1] == theirs[-1]
    assert [line["round"] for line in ours] == list(range(1, 41))
    assert leftovers(app) == []


def test_fab_holds_the_app_and_nothing_else(tmp_path):
    app = clone(tmp_path / "fedara-app")
    (app / "secret.json").write_text("{}")
    flwr = Path(sys.executable).parent / "flwr"
    done = subprocess.run(
        [str(flwr), "build"], cwd=app, capture_output=True, text=True, env=os.environ | {"FLWR_HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    fab = next(app.glob("*.fab"))
    names = set(zipfile.ZipFile(fab).namelist())
    package = {str(p.relative_to(app)) for p in (app / "fedara_flwr").rglob("*.py")}
    assert package <= names
    assert names - package <= {"pyproject.toml", "LICENSE", "README.md", ".info/CONTENT"}


def test_wrong_settings_end_before_anything_starts(tmp_path):
    app = clone(tmp_path / "app")
    for setting, words in {
        "metod='fedara'": ["metod = 'fedara'", "did you mean 'method'?"],
        "method='fedarra'": ["method = 'fedarra'", "did you mean 'fedara'?"],
        "strategy.options='final-rank = 20.0'": ["strategy.options.final-rank = 20.0", "at most adapter.rank = 12"],
        "train.dropout='yes'": ["train.dropout = 'yes'", "boolean"],
        "data.path='/nowhere.csv'": ["data.path = '/nowhere.csv'", "no such file"],
        "seed = 7": ["seed = 7", "no key=value"],
        "method": ["'method'", "no key=value"],
        "seed=[1]": ["seed=[1]", "needs to be of type"],
        "/nowhere.toml": ["/nowhere.toml"],
        "strategy.options='mu = 1'": ["strategy.options.mu = 1", "no such key"],
    }.items():
        done = fedara(app, "-c", setting)
        assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert all(word in done.stderr for word in words), done.stderr
    assert not (app / "runs").exists()
