"""Measures what the project decides on top of a solved head, on validation data: five sets, three seeds, paired by seed.

    python benchmarks/methods/choices.py --data DIR --out FILE [--choices a,b] [--sets banking77,sst2] [--seeds 1,2,3]

A choice is a method and the settings that differ from it. Lines are appended as they come, and what FILE holds is not run
again. The head of a set and seed is solved once and kept beside FILE: it is the same for every choice. table.py reads FILE.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from trials import DATASETS, Trial  # noqa: E402

from fedara_flwr.server import loop  # noqa: E402

ROUNDS = 20
CHOICES: dict[str, tuple[str, dict]] = {
    "fedlora": ("fedlora", {}),
    "fedara": ("fedara", {}),
    "fedlora-random": ("fedlora", {"head.start": "random"}),
    "fedara-random": ("fedara", {"head.start": "random"}),
    "fedara-fixed": ("fedara", {"train.head-learning-rate": 0.0}),
    "adjusted": ("fedara", {"train.loss": "logit-adjusted"}),
    "fedlora-adjusted": ("fedlora", {"train.loss": "logit-adjusted"}),
    "upper-half": ("fedara", {"strategy.options": "depth-slack = 0.99"}),
    "depth-0.1": ("fedara", {"strategy.options": "depth-slack = 0.1"}),
    "zero-b": ("fedara", {"strategy.options": "start = 'zero-b'"}),
    "decay": ("fedara", {"train.final-rate": 0.1}),
    "final-40%": ("fedara", {"strategy.options": "final-rounds = 8"}),
    "int8": ("fedara", {"wire.down": "int8", "wire.up": "int8"}),
    "int8-int4": ("fedara", {"wire.down": "int8", "wire.up": "int4"}),
    "fedlora-fixed": ("fedlora", {"train.head-learning-rate": 0.0}),
}


def keep_heads(folder: Path, solve_head):
    """`solve_head`, asked once for a set and seed; what it gave is read back from `folder` afterwards, with its bytes."""

    def solve(settings, model, state, roster, grid):
        if settings.head.start == "random":
            return [], []
        name = f"{Path(settings.data.path).name or settings.data.name}-{settings.seed}-{settings.head.start}"
        path = folder / f"{name}-{settings.model.dtype}.npz"
        if not path.exists():
            before = dict(roster.meter.total)
            lines, _ = solve_head(settings, model, state, roster, grid)
            sent = {part: size - before.get(part, 0) for part, size in roster.meter.total.items()}
            lines = [{name: line[name] for name in line if not isinstance(line[name], dict)} for line in lines]
            facts = json.dumps({"solved": state.solved, "bytes": sent, "lines": lines})
            np.savez(path, head=state.arrays["head"], facts=np.array(facts))
            roster.meter.total.subtract(sent)  # counted below, as it is every time
        roster.wait(grid)
        kept = np.load(path)
        facts = json.loads(str(kept["facts"]))
        state.arrays["head"], state.solved = kept["head"], facts["solved"]
        roster.meter.total.update(facts["bytes"])
        return [{**line, "bytes-down": {}, "bytes-up": {}} for line in facts["lines"]], []

    return solve


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets' folders")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--choices", default=",".join(CHOICES))
    parser.add_argument("--sets", default="banking77,20news,sst2,docstrings,wnut17")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--heads", type=Path, default=Path("heads"), help="folder of solved heads")
    args = parser.parse_args()
    args.heads.mkdir(exist_ok=True, parents=True)
    loop.solve_head = keep_heads(args.heads, loop.solve_head)
    for seed in args.seeds.split(","):
        for name in args.sets.split(","):
            for choice in args.choices.split(","):
                method, setting = CHOICES[choice]
                assert name in DATASETS
                Trial(args.out, choice, str(args.data / name), method, setting, int(seed), ROUNDS, "bfloat16").run(ROUNDS)


if __name__ == "__main__":
    main()
