"""Tunes each method alike, by successive halving on validation data, and writes every evaluation as it comes.

    python benchmarks/defaults/tune.py STAGE --data DIR --out FILE [--methods a,b] [--seeds 1,2,3]

Stages: `grid` (the same grid for every method: all settings for 10 rounds, the best three for 30, the best one to the end and
with more seeds) and `ablate` (given settings on every seed).
Trials whose lines are in FILE already are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import trials  # noqa: E402
from trials import Trial  # noqa: E402

GRID = [
    {"train.learning-rate": lr, "adapter.alpha": alpha, "train.head-learning-rate": head}
    for lr, alpha, head in [
        (5e-4, 24.0, 1e-2),
        (5e-4, 24.0, 3e-2),
        (5e-4, 96.0, 1e-2),
        (2e-3, 24.0, 1e-2),
        (2e-3, 24.0, 3e-2),
        (2e-3, 96.0, 1e-2),
        (2e-3, 96.0, 3e-2),
        (1e-2, 24.0, 1e-2),
        (1e-2, 24.0, 3e-2),
        (1e-2, 96.0, 1e-2),
        (3e-2, 24.0, 1e-2),
    ]
]


def halve(make, settings: list[dict], seeds: list[int], rounds: int, rungs: list[tuple[int, int]]) -> dict:
    """Successive halving on the first seed: (rounds, survivors) per rung; the winner runs whole on all seeds."""
    trials = [make(setting, seeds[0]) for setting in settings]
    for reached, survivors in rungs:
        trials = sorted(trials, key=lambda trial: -trial.run(reached))[:survivors]
    best = trials[0]
    best.run(rounds)
    for seed in seeds[1:]:
        make(best.key["setting"], seed).run(rounds)
    return best.key["setting"]


trials.BASE |= trials.DRAWN


def main() -> None:
    """Parse the command line and run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["grid", "ablate"])
    parser.add_argument("--data", default="docstrings", help="folder of a data set named like one of DATASETS")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default="fedlora,fedara-static,fedara")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--dtype", default="float32", help="of the backbone; bfloat16 is faster where the processor has it")
    parser.add_argument("--setting", default="[]", help="JSON list of settings; stage grid has one of its own")
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]

    def maker(method: str):
        return lambda setting, seed: Trial(args.out, args.stage, args.data, method, setting, seed, args.rounds, args.dtype)

    for method in args.methods.split(","):
        if args.stage == "grid":
            halve(maker(method), json.loads(args.setting) or GRID, seeds, args.rounds, [(10, 3), (30, 1)])
        else:
            for setting, seed in itertools.product(json.loads(args.setting), seeds):
                maker(method)(setting, seed).run(args.rounds)


if __name__ == "__main__":
    main()
