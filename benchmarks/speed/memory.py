"""Measures what a client's step takes in memory: with all slots alive, and as a finished run of fedara left them.

    python benchmarks/speed/memory.py RUN [--batch 16] [--steps 5]

Two figures: bytes that autograd keeps for the backward pass, and the process's peak above what it had before the first step, by
the kernel's own count (VmHWM, Linux), each mask in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

WAYS = ("all slots", "as the run ended")


def measured(run: Path, way: str, batch: int, steps: int) -> dict[str, float]:
    """Megabytes of one mask: kept by autograd, above the resident model at the peak, and of gradients and optimiser."""
    import numpy as np
    import torch

    from fedara_flwr.client.capacity import saved_bytes
    from fedara_flwr.model.ranks import RankMask
    from fedara_flwr.runs.keeper import open_run

    torch.set_num_threads(1)
    saved = open_run(run)
    model, learner = saved.model, saved.model.learner
    weights = saved.method.weights(saved.state)
    mask = weights.mask if way == WAYS[1] else RankMask.full(list(weights.mask.ranks))
    trained = frozenset({"B", "E", "A", "head"}) & frozenset(weights.arrays)
    rng = np.random.default_rng(0)
    arrays = {part: rng.standard_normal(model.spec.length(part, mask)).astype(np.float32) * 0.01 for part in trained - {"head"}}
    arrays |= {part: weights.arrays[part] for part in trained & {"head"}}
    adapted = learner.adapted
    adapted.load(arrays, mask, weights.scales, trained)
    data = learner.encode(model.federation.validation, model.settings.data.max_length)
    parameters = [p for part in sorted(trained) for p in adapted.parameters(part)]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    kept_most = 0
    order = np.argsort([len(row) for row in data.ids])[::-1][: batch * steps].tolist()
    batches = [learner.batch(data, order[i::steps]) for i in range(steps)]
    for one in batches:  # what a client has from earlier rounds
        adapted.below(one)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    for one in batches:
        optimizer.zero_grad(set_to_none=True)
        with saved_bytes(adapted.model) as kept:
            loss = learner.task.losses(learner.task.outputs(learner, one, adapted.below(one)), one).mean()
        kept_most = max(kept_most, sum(kept.values()))
        loss.backward()
        optimizer.step()
    states = 12 * sum(p.numel() for p in parameters)
    return {"kept": kept_most / 1e6, "peak": (_status("VmHWM") - before) / 1e6, "states": states / 1e6}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def main() -> None:
    """Print a line for each mask, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--way", choices=WAYS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measured(args.run, args.way, args.batch, args.steps)))
        return
    found = []
    for way in WAYS:
        options = ["--batch", str(args.batch), "--steps", str(args.steps), "--way", way]
        command = [sys.executable, __file__, str(args.run), *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{way}: the process that measures it failed")
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(way, {name: round(value, 1) for name, value in found[-1].items()})
    print("less by", {name: f"{1 - found[1][name] / found[0][name]:.0%}" for name in found[0] if found[0][name]})


if __name__ == "__main__":
    main()
