"""Measures what the project decides on top of a solved head, on validation data: five sets, three seeds, paired by seed.

    python benchmarks/methods/choices.py --data DIR --out FILE [--choices "fedara;plain loss"] [--sets sst2] [--seeds 1,2]

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
from trials import DATASETS, DRAWN, Trial  # noqa: E402

from fedara_flwr.server import loop  # noqa: E402

ROUNDS = 20
OPTIONS = "strategy.options"
CHOICES: dict[str, tuple[str, dict]] = {
    "fedara": ("fedara", {}),
    "fedlora": ("fedlora", {}),
    "fedara, drawn head": ("fedara", {"head.start": "random"}),
    "fedlora, drawn head": ("fedlora", {"head.start": "random"}),
    "head from means": ("fedara", {"head.start": "means"}),
    "fixed head": ("fedara", {"train.head-learning-rate": 0.0}),
    "plain loss": ("fedara", {"train.loss": "plain"}),
    "all blocks": ("fedara", {OPTIONS: "depth-slack = 0.0"}),
    "more blocks gone": ("fedara", {OPTIONS: "depth-slack = 0.1"}),
    "40% of rounds at the final budget": ("fedara", {OPTIONS: "final-rounds = 8"}),
    "falling rates": ("fedara", {"train.final-rate": 0.1}),
    "float32": ("fedara", {"wire.down": "float32", "wire.up": "float32"}),
    "int4 down": ("fedara", {"wire.down": "int4"}),
    "int4 down, more blocks gone": ("fedara", {"wire.down": "int4", OPTIONS: "depth-slack = 0.1"}),
    "paper, solved head": ("fedara", {**DRAWN, "head.start": "statistics", OPTIONS: "depth-slack = 0.0"}),
    "paper": ("fedara", {**DRAWN, OPTIONS: "depth-slack = 0.0"}),
    "fedlora as the field runs it": ("fedlora", DRAWN),
    "head": ("head", {}),
    "legend": ("legend", {}),
    "federa": ("federa", {}),
    "ffa-lora": ("ffa-lora", {}),
    **{
        f"{method}, rate {rate}": (method, {"train.learning-rate": rate})
        for method, rates in (("fedara", (1e-2, 5e-3, 1e-3)), ("fedlora", (2e-3, 1e-3, 2.5e-4)))
        for rate in rates
    },
}


def keep_heads(folder: Path, solve_head):
    """`solve_head`, asked once for a set and seed; what it gave is read back from `folder` afterwards, with its bytes."""

    def solve(settings, model, state, roster, grid):
        if settings.head.start == "random":
            return [], []
        data = Path(settings.data.path).name or settings.data.name
        path = folder / f"{data}-{settings.seed}-{settings.head.start}-{settings.model.dtype}-{settings.wire.up}.npz"
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
    parser.add_argument("--choices", default=";".join(CHOICES), help="separated by semicolons")
    parser.add_argument("--sets", default="banking77,20news,sst2,docstrings,wnut17")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--heads", type=Path, default=Path("heads"), help="folder of solved heads")
    args = parser.parse_args()
    args.heads.mkdir(exist_ok=True, parents=True)
    loop.solve_head = keep_heads(args.heads, loop.solve_head)
    for seed in args.seeds.split(","):
        for name in args.sets.split(","):
            for choice in args.choices.split(";"):
                method, setting = CHOICES[choice]
                assert name in DATASETS
                Trial(args.out, choice, str(args.data / name), method, setting, int(seed), ROUNDS, "bfloat16").run(ROUNDS)


if __name__ == "__main__":
    main()
