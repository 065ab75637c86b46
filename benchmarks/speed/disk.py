"""Reading a row of the frozen prefix back from the scratch file (`train.cache-disk-mb`) against running the blocks again.

    python benchmarks/speed/disk.py [--rows 64] [--repeats 5]

Boundary 3, docstrings, one thread: MiniLM, and a model of BERT-base's size with random weights. Milliseconds a row, medians
over the repetitions: CPU time and, for what waits for a disk, wall time. *cold* is after the system was told to drop the file's
pages, *warm* as it comes.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from together import MINILM
from transformers import AutoModel, BertConfig

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.backbone import load_tokenizer
from fedara_flwr.adapters.learner import Learner, open_learner
from fedara_flwr.config import DataSettings
from fedara_flwr.data.federation import federation
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.tasks import open_task, read_settings
from fedara_flwr.tasks.base import Batch

BOUNDARY = 3
TASK = open_task(DataSettings())


def timed(adapted: AdaptedModel, batches: list[Batch]) -> tuple[float, float]:
    """Milliseconds of CPU and of the wall a row."""
    cpu, wall = time.process_time(), time.perf_counter()
    for batch in batches:
        adapted.below(batch)
    return tuple(
        1000 * (now - before) / len(batches) for now, before in ((time.process_time(), cpu), (time.perf_counter(), wall))
    )


def measure(adapted: AdaptedModel, batches: list[Batch], repeats: int) -> dict[str, float]:
    """Every way in turn, so that other work on the machine counts alike; no row stays in memory."""
    spec = adapted.spec
    mask = RankMask.full([12 if module.block >= BOUNDARY else 0 for module in spec.modules])
    arrays = {part: np.zeros(spec.length(part, mask), np.float32) for part in ("B", "E", "A", "head")}
    adapted.load(arrays, mask, (2.0,) * len(spec.modules))
    prefix = adapted._prefix
    assert prefix is not None and adapted.lowest == BOUNDARY
    prefix._limit = 0

    def drop_pages() -> None:
        file = prefix._disk._open()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    ways: dict[str, Callable[[], None]] = {"run and written": prefix.clear, "warm": lambda: None, "cold": drop_pages}
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(repeats + 1):
        for way, before in ways.items():
            before()
            found[way].append(timed(adapted, batches))
    if not prefix._disk.nbytes:
        sys.exit("no row went to the scratch file: is there room in the temporary folder?")
    rest = {
        f"{way}, {kind}": statistics.median(t[i] for t in found[way][1:])
        for way in ways
        for i, kind in enumerate(("cpu", "wall"))
    }
    return rest | {"mb": prefix._disk.nbytes / 2**20}


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(MINILM)
        torch.manual_seed(0)
        AutoModel.from_config(BertConfig(vocab_size=len(tokenizer))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for name, model in (("MiniLM", MINILM), ("BERT-base's size", folder)):
            settings = read_settings({"model.name": model, "train.cache-disk-mb": 1024})
            data = federation(settings.data, settings.seed, TASK)
            learner = open_learner(settings, data.labels)
            adapted, tokenizer = learner.adapted, learner.tokenizer
            chosen = np.random.default_rng(0).permutation(len(data.pool))[: args.rows]
            rows = TASK.encode(tokenizer, data.pool.take(chosen), settings.data.max_length)
            batches = [Learner(adapted, TASK, tokenizer).batch(rows, [i]) for i in range(len(rows))]
            found = {key: round(value, 3) for key, value in measure(adapted, batches, args.repeats).items()}
            print(json.dumps({"model": name, "rows": len(rows), "tokens": sum(map(len, rows.ids)), **found}), flush=True)


if __name__ == "__main__":
    main()
