"""Mutated messages: none crashes a side, hangs it, or gets past a check. What is mutated and what must hold: fuzz.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fuzz
import pytest
from deployment import Deployment, wait_for
from flwr.app import Array, ArrayRecord, RecordDict

from fedara_flwr.wire.arrays import Rejected, read_vector
from fedara_flwr.wire.meter import payload

HERE = Path(__file__).parent
COUNT = int(os.environ.get("FUZZ_COUNT", 1_000_000))
MEMORY = 512 * 2**20  # bytes that a whole campaign may take beyond what its imports took
# every reason that both levels of mutation reach within a few thousand messages
REACHED = fuzz.REASONS - {"delta"}


def test_mutated_replies_are_dropped_or_good():
    outcome = fuzz.fuzz_replies(14_000, seed=1)
    assert outcome.count >= 14_000
    assert REACHED <= set(outcome.reasons), REACHED - set(outcome.reasons)
    assert outcome.reasons["good"] > 500 and outcome.reasons["unreadable"] == outcome.raised.total()


def test_mutated_plans_are_refused_or_good():
    outcome = fuzz.fuzz_plans(6_000, seed=1)
    assert outcome.count == 6_000
    assert set(outcome.reasons) >= fuzz.PLAN_REASONS
    assert outcome.reasons["good"] > 200


def test_a_campaign_repeats():
    first, second = (fuzz.fuzz_replies(300, seed=2) for _ in range(2))
    assert (first.reasons, first.raised) == (second.reasons, second.raised)


@pytest.mark.parametrize("shape", [(10**4299,) * 2000, (2**62,) * 100_000])
def test_a_long_shape_is_not_multiplied(shape):
    """The product of the first takes two minutes."""
    array = Array("float32", shape, "numpy.ndarray", b"12345")
    assert sum(payload(RecordDict({"arrays": ArrayRecord({"B": array})})).values()) == len("B") + 5
    with pytest.raises(Rejected) as caught:
        read_vector(array, 4, "B")
    assert caught.value.reason == "shape" and len(str(caught.value)) < 400


def test_a_number_too_long_to_print_is_a_shape():
    with pytest.raises(Rejected, match="huge"):
        read_vector(Array("float32", (10**5000,), "numpy.ndarray", b""), 4, "B")


CAMPAIGN = """
import json, resource, sys, time
import fuzz
count, memory, progress = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
for name in ("fuzz_replies", "fuzz_plans"):
    getattr(fuzz, name)(100, seed=0)  # imports and caches are no message's
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + memory
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
began = time.monotonic()
def show(outcome):
    with open(progress, "w") as file:
        file.write(f"{outcome.count} in {time.monotonic() - began:.0f} s\\n")
replies = fuzz.fuzz_replies(count - count // 5, seed=20, progress=show)
plans = fuzz.fuzz_plans(count // 5, seed=21)
print(json.dumps({"replies": vars(replies), "plans": vars(plans), "seconds": time.monotonic() - began}))
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_million_mutated_messages(tmp_path):
    """FUZZ_COUNT of them, in a process that has no more memory to give than MEMORY; how far it is stands in `progress`."""
    progress = tmp_path / "progress"
    print(f"progress in {progress}")
    done = subprocess.run(
        [sys.executable, "-c", CAMPAIGN, str(COUNT), str(MEMORY), str(progress)],
        env=os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    print(json.dumps(found, indent=1))
    assert sum(found["replies"]["reasons"].values()) + sum(found["plans"]["reasons"].values()) >= COUNT
    assert not {"MemoryError"} & {*found["replies"]["raised"], *found["plans"]["raised"]}


SERVER = """
from pathlib import Path
from flwr.serverapp import ServerApp
from fedara_flwr import fuzz

app = ServerApp()


@app.main()
def main(grid, context):
    fuzz.serve(grid, Path(str(context.run_config["run.dir"])), int(context.run_config["num-server-rounds"]))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_mutated_objects_through_a_superlink(tmp_path):
    """A SuperNode that pushes mutated objects to a real SuperLink; a ServerApp there pulls them as every run does."""
    owner = Deployment(tmp_path, tmp_path)
    shutil.copy(HERE / "fuzz.py", owner.app / "fedara_flwr" / "fuzz.py")
    (owner.app / "fedara_flwr" / "fuzz_server.py").write_text(SERVER)
    project = owner.app / "pyproject.toml"
    project.write_text(project.read_text().replace("fedara_flwr.server_app:app", "fedara_flwr.fuzz_server:app"))
    results = tmp_path / "runs"
    results.mkdir()
    found = results / "outcome.json"
    try:
        owner.start_superlink()
        run, deadline = owner.submit("fuzz", **{"num-server-rounds": 6}), time.monotonic() + 1200
        sent = fuzz.attack(f"127.0.0.1:{owner.port}", 5, lambda: found.exists() or time.monotonic() > deadline)
        wait_for(found.exists, 30, lambda: run.log() + owner.tails())
    finally:
        owner.close()
    outcome = json.loads(found.read_text())
    print(json.dumps({"sent": sent, **outcome}))
    assert outcome["said"] == ""
    reasons = outcome["reasons"]
    assert sum(reasons.values()) == 6 * 56 and sent["pushed"] >= 300
    assert reasons["good"] > 20 and reasons["unreadable"] > 20
    assert reasons.get("timeout", 0) <= sent["refused"]
