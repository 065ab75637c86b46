"""What one training step costs by the lowest living block, with and without the frozen prefix kept (`train.cache`).

    python benchmarks/speed/step.py [--data DIR] [--dtype bfloat16] [--out FILE] [--repeats 5] [--lowest 0,3,6]

MiniLM, rank 12 on every module from the lowest living block up, batches of 16 as in training, one thread. Milliseconds are of
the process's own CPU time, medians of interleaved repetitions, so that other work on the machine counts less.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.learner import open_learner
from fedara_flwr.client.capacity import saved_bytes
from fedara_flwr.config import DataSettings
from fedara_flwr.data.federation import federation
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.strategies.allocation import last_blocks
from fedara_flwr.tasks import open_task, read_settings
from fedara_flwr.tasks.base import Batch

RANK, SIZE, BATCHES = 12, 16, 2
TASK = open_task(DataSettings())
PARTS = frozenset({"B", "E", "A", "head"})


def load(adapted: AdaptedModel, lowest: int) -> torch.optim.Optimizer:
    """Random adapters from block `lowest` up, and their optimiser."""
    spec = adapted.spec
    mask = last_blocks(spec, RankMask.full([RANK] * len(spec.modules)), spec.blocks - lowest)
    rng = np.random.default_rng(0)
    arrays = {part: rng.normal(0, 0.02, spec.length(part, mask)).astype(np.float32) for part in PARTS}
    adapted.load(arrays, mask, (2.0,) * len(spec.modules), PARTS)
    adapted.model.train(False)
    parameters = [p for part in sorted(PARTS) for p in adapted.parameters(part)]
    return torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)


def step(adapted: AdaptedModel, optimizer: torch.optim.Optimizer, batch: Batch, cached: bool) -> None:
    """As client/train.py."""
    loss = TASK.losses(adapted.outputs(batch, adapted.below(batch) if cached else None), batch).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def activations(adapted: AdaptedModel, batch: Batch, cached: bool) -> int:
    """Bytes of activations that autograd keeps for the backward pass."""
    below = adapted.below(batch) if cached else None
    with saved_bytes(adapted.model) as kept:
        loss = TASK.losses(adapted.outputs(batch, below), batch).mean()
    total = sum(kept.values())
    del loss
    return total


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="folder of a data set; by default the built-in docstrings")
    parser.add_argument("--dtype", default="float32", help="of the backbone")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.jsonl")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lowest", default="", help="lowest living blocks; by default all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = read_settings({"data.path": args.data, "model.dtype": args.dtype, "train.cache-mb": 1024})
    data = federation(settings.data, settings.seed, TASK)
    learner = open_learner(settings, data.labels)
    adapted, tokenizer = learner.adapted, learner.tokenizer
    chosen = np.random.default_rng(0).permutation(len(data.pool))[: BATCHES * SIZE]
    rows = TASK.encode(tokenizer, data.pool.take(chosen), settings.data.max_length)
    order = np.argsort([len(row) for row in rows.ids], kind="stable").reshape(BATCHES, SIZE)
    batches = [TASK.collate(tokenizer, [rows.ids[i] for i in group], [rows.labels[i] for i in group]) for group in order]
    boundaries = [int(number) for number in args.lowest.split(",") if number] or range(adapted.spec.blocks + 1)
    if adapted._prefix is None:
        sys.exit("nothing can be kept for this model: a step with the cache is one without")
    times: dict[tuple[int, str], list[float]] = {}
    for _ in range(args.repeats + 1):
        for lowest in boundaries:
            optimizer = load(adapted, lowest)
            for way in ("without", "first", "kept"):
                if way == "first":
                    adapted._prefix.clear()
                began = time.process_time()
                for batch in batches:
                    step(adapted, optimizer, batch, way != "without")
                times.setdefault((lowest, way), []).append(1000 * (time.process_time() - began) / BATCHES)
    for lowest in boundaries:
        load(adapted, lowest)
        line = {
            "data": Path(args.data).name or "docstrings",
            "dtype": args.dtype,
            "lowest": lowest,
            **{f"ms-{way}": statistics.median(times[lowest, way][1:]) for way in ("without", "first", "kept")},
            **{f"mb-{way}": activations(adapted, batches[-1], way == "kept") / 1e6 for way in ("without", "kept")},
            "repeats": args.repeats,
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}",
        }
        with args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
