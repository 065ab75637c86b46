"""What merging and arbitration cost the server, against the number of clients; and how much memory a merge takes.

    python benchmarks/speed/merge.py [--clients 10,100,1000] [--repeats 5]

BERT-base's 72 adapted layers at rank 12 and a head of twelve labels; one thread, CPU seconds, medians of 5. "read" is the
checking of the replies' records before it (wire/records), "merge" SlotMean from the first update to the result.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np
from flwr.app import RecordDict

from fedara_flwr.merging.mean import SlotMean
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import ModelSpec, ModuleSpec, ParameterSpec
from fedara_flwr.strategies.allocation import Vote, arbitrate_budget
from fedara_flwr.training import LocalTraining
from fedara_flwr.wire.plan import TrainPlan, Update
from fedara_flwr.wire.records import update_from_content, update_to_content

WIDTH, INNER, BLOCKS, RANK, LABELS = 768, 3072, 12, 12, 12
SHAPES = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH), (WIDTH, INNER)]
SPEC = ModelSpec(
    "0" * 64,
    tuple(ModuleSpec(f"{b}.{i}", d_out, d_in, b) for b in range(BLOCKS) for i, (d_out, d_in) in enumerate(SHAPES)),
    (ParameterSpec("classifier.weight", (LABELS, WIDTH)), ParameterSpec("classifier.bias", (LABELS,))),
)
MASK = RankMask.full([RANK] * len(SPEC.modules))
PARTS = frozenset({"B", "E", "A", "head"})
DIFFERENT = 4  # updates; more would only fill the memory


def plan() -> TrainPlan:
    """As FedARA's in a round that prunes."""
    scales = (2.0,) * len(SPEC.modules)
    return TrainPlan(server_round=1, seed=0, mask=MASK, scales=scales, train=LocalTraining(), sent=PARTS, carries=PARTS)


def arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {part: rng.normal(0, 0.02, SPEC.length(part, MASK)).astype(np.float32) for part in PARTS}


def median(work: Callable[[], object], repeats: int) -> float:
    """Seconds, after a first time that does not count."""
    found = []
    for _ in range(repeats + 1):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return statistics.median(found[1:])


def merge(clients: int, start: dict[str, np.ndarray], updates: list[Update]) -> None:
    mean = SlotMean(SPEC, MASK, start)
    for i in range(clients):
        mean.add(str(i), updates[i % DIFFERENT], 100 + i)
    mean.result()


def main() -> None:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="10,100,1000", help="numbers of clients")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    start = arrays(rng)
    updates = [Update(arrays(rng), MASK, 100, {"loss": 1.0}) for _ in range(DIFFERENT)]
    orders = plan()
    contents: list[RecordDict] = [update_to_content(update, orders) for update in updates]
    size = sum(values.nbytes for values in start.values()) / 1e6
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, numpy {np.__version__}; {size:.1f} MB a reply, {MASK.count} slots\n")
    print("| clients | read, CPU s | merge, CPU s | memory of the merge, MB | arbitration, CPU ms |\n|---|---|---|---|---|")
    for clients in map(int, args.clients.split(",")):
        votes = []
        for i in range(clients):
            ranks = np.random.default_rng(i).permutation(MASK.count).astype(np.uint16)
            votes.append(Vote(ranks, MASK.count // 2))

        def read(clients: int = clients) -> None:
            for i in range(clients):
                update_from_content(contents[i % DIFFERENT], SPEC, orders, 1000)

        tracemalloc.start()
        merge(clients, start, updates)
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        merging = partial(merge, clients, start, updates)
        seconds = [median(work, args.repeats) for work in (read, merging)]
        voting = 1000 * median(partial(arbitrate_budget, MASK, votes, MASK.count // 2), args.repeats)
        print(f"| {clients} | {seconds[0]:.2f} | {seconds[1]:.2f} | {peak:.0f} | {voting:.1f} |", flush=True)


if __name__ == "__main__":
    main()
