"""Clients of one round trained together (`run.together`) against one after the other: milliseconds of a client's step.

    python benchmarks/speed/together.py [--device cuda] [--models minilm,distilbert,bert-base] [--clients 2,5]
        [--steps 3] [--repeats 3] [--dtypes float32,bfloat16] [--out FILE]

Docstrings, rank 12 on every module, batches of 16; all but MiniLM by their sizes, with random weights. Medians of
interleaved repetitions, the first left out: on a processor of the process's own CPU time with one thread, on a GPU of the
wall clock. Everything a client's round takes is in it: loading, batches, steps, collecting. `tokens` are those that go through
the model, padding counted.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, BertConfig, DistilBertConfig, PretrainedConfig, Qwen2Config

from fedara_flwr.adapters.backbone import load_tokenizer
from fedara_flwr.adapters.learner import Learner, open_learner
from fedara_flwr.adapters.packaged import PACKAGED
from fedara_flwr.adapters.stack import problem
from fedara_flwr.client.capacity import clock
from fedara_flwr.client.together import train_together
from fedara_flwr.client.train import ClientData, Job, train
from fedara_flwr.config import DataSettings
from fedara_flwr.data.federation import federation
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.tasks import Encoded, open_task, read_settings
from fedara_flwr.training import LocalTraining
from fedara_flwr.wire.plan import TrainPlan

RANK, SIZE, ROWS = 12, 16, 64
TASK = open_task(DataSettings())
PARTS = frozenset({"B", "E", "A", "head"})
MINILM = next(iter(PACKAGED))
SIZES: dict[str, Callable[..., PretrainedConfig]] = {
    "distilbert": DistilBertConfig,
    "bert-base": BertConfig,
    "tiny": partial(BertConfig, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2),
    "qwen-1b": partial(
        Qwen2Config,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=16,
        num_key_value_heads=4,
    ),
}


def unknown(models: str) -> set[str]:
    """Names that no model has."""
    return set(models.split(",")) - {"minilm", *SIZES}


def folder(model: str, root: Path) -> str:
    """What `model.name` is to be: MiniLM, or a folder with a random model of another size and MiniLM's tokenizer."""
    if model == "minilm":
        return MINILM
    tokenizer = load_tokenizer(MINILM)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # drawing a thousand million numbers takes time
        drawn = AutoModel.from_config(SIZES[model](vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id))
    drawn.save_pretrained(root)
    tokenizer.save_pretrained(root)
    return str(root)


def measure(model: str, path: str, dtype: str, counts: list[int], args: argparse.Namespace) -> bool:
    """Every number of clients on one open model; whether there is something to measure."""
    settings = read_settings({"model.name": path, "model.dtype": dtype})
    data = federation(settings.data, settings.seed, TASK)
    learner = open_learner(settings, data.labels, args.device)
    adapted, tokenizer = learner.adapted, learner.tokenizer
    if why := problem(adapted):
        print(json.dumps({"model": model, "dtype": dtype, "problem": why}), flush=True)
        return False
    spec = adapted.spec
    mask = RankMask.full([RANK] * len(spec.modules))
    plan = TrainPlan(
        server_round=1,
        seed=0,
        mask=mask,
        scales=(2.0,) * len(mask.ranks),
        train=LocalTraining(steps=args.steps, batch_size=SIZE, learning_rate=1e-3, head_learning_rate=1e-2),
        sent=PARTS,
        terms={"slot-vote": {"budget": mask.count // 2}},
        report=frozenset({"slot-vote"}),
    )
    if max(counts) * ROWS > len(data.pool):
        sys.exit(f"--clients {max(counts)}: there are rows for {len(data.pool) // ROWS}")
    rng = np.random.default_rng(0)
    arrays = {part: rng.normal(0, 0.02, spec.length(part, mask)).astype(np.float32) for part in PARTS}
    chosen = rng.permutation(len(data.pool))[: max(counts) * ROWS].reshape(-1, ROWS)
    jobs = []
    for number, rows in enumerate(chosen):
        own = TASK.encode(tokenizer, data.pool.take(rows), settings.data.max_length)
        jobs.append(Job(ClientData(own, Encoded([], [])), plan, arrays, str(number)))

    def one_by_one(jobs: list[Job]) -> None:
        for job in jobs:
            train(Learner(adapted, TASK, tokenizer), job.data, plan, arrays, job.client_key, simulated=True)

    def together(jobs: list[Job]) -> None:
        train_together(Learner(adapted, TASK, tokenizer), jobs)

    ways: dict[str, Callable[[list[Job]], None]] = {"alone": one_by_one, "together": together}
    now = time.process_time if args.device == "cpu" else lambda: clock(adapted.device)
    seen: list[int] = []
    adapted.model.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs["input_ids"].numel()), with_kwargs=True)
    there = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    for clients in counts:
        times: dict[str, list[float]] = {way: [] for way in ways}
        tokens: dict[str, float] = {}
        for _ in range(args.repeats + 1):
            for way, call in ways.items():
                seen.clear()
                began = now()
                call(jobs[:clients])
                times[way].append(1000 * (now() - began) / (clients * args.steps))
                tokens[way] = sum(seen) / (clients * args.steps)
        medians = {f"ms-{way}": statistics.median(found[1:]) for way, found in times.items()}
        line = {
            **{"device": args.device, "model": model, "dtype": dtype, "clients": clients},
            **{name: getattr(args, name) for name in ("steps", "repeats")},
            **medians,
            "gain": medians["ms-alone"] / medians["ms-together"],
            **{f"tokens-{way}": round(count) for way, count in tokens.items()},
            "machine": f"{there}, {os.cpu_count()} CPUs, torch {torch.__version__}",
        }
        with args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    return True


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", default="minilm", help=f"minilm, {', '.join(SIZES)}")
    parser.add_argument("--dtypes", default="float32", help="of the backbone")
    parser.add_argument("--clients", default="5", help="numbers of clients")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "together.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts = [int(count) for count in args.clients.split(",")]
    if min(counts, default=0) < 1 or unknown(args.models):
        parser.error(f"--clients {args.clients}, --models {args.models}: allowed are 1 or more; minilm, {', '.join(SIZES)}")
    measured = True
    for model in args.models.split(","):
        with tempfile.TemporaryDirectory() as root:
            path = folder(model, Path(root))
            for dtype in args.dtypes.split(","):
                measured &= measure(model, path, dtype, counts, args)
    if not measured:
        sys.exit("not everything was measured: see the lines with a problem")


if __name__ == "__main__":
    main()
