"""Compares methods at equal rounds and examples, each at the best of the same few learning rates, on validation data.

    python benchmarks/methods/compare.py --data DIR --out FILE [--methods a,b] [--seeds 1,2,3] [--rounds 40] [--part 1/2]

For each method: three learning rates on the first seed for a third of the rounds, the best one to the end, then the other seeds
with it. Lines are appended as they come, and what FILE holds is not run again, so a cut-off run goes on. `--part i/n` takes
every n-th method: start one process for each core, with a FILE of its own. draw.py makes table and picture from all FILEs.
`--factors 1` takes a method at its own rate alone, where that was tuned already (../defaults).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from trials import EVERY, Trial  # noqa: E402

from fedara_flwr import strategies  # noqa: E402

FIRST = (
    "head",
    "fedara",
    "fedara-static",
    "fedlora",
    "federa",
    "legend",
    "ffa-lora",
    "hetlora",
    "flexlora",
    "flora",
    "fedex-lora",
    "slora",
    "full",
)
# methods whose clients may differ in rank get the ranks of a mixed fleet
OPTIONS = dict.fromkeys(("hetlora", "flexlora", "flora", "fedex-lora"), "ranks = [4, 8, 12]")


def settings_of(method: str, factors: Sequence[float]) -> list[dict]:
    """The grid of one method."""
    extra = {"strategy.options": OPTIONS[method]} if method in OPTIONS else {}
    if method == "head":
        # it has only the task layer's rate
        return [{"train.head-learning-rate": 1e-2 * factor} for factor in factors]
    rate = strategies.find(method).learning_rate
    return [{"train.learning-rate": rate * factor, **extra} for factor in factors]


def compare(settings: list[dict], make, seeds: list[int], rounds: int) -> None:
    """All trials of one method; `make(setting, seed)` gives a trial."""
    rung = max(2, rounds // 3 // EVERY) * EVERY
    trials = {i: make(setting, seeds[0]) for i, setting in enumerate(settings)}
    scores = {i: trial.run(rung) for i, trial in trials.items()}
    best = max(scores, key=lambda i: (scores[i], -i))
    trials[best].run(rounds)
    for seed in seeds[1:]:
        make(settings[best], seed).run(rounds)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="docstrings", help="folder of a data set named as in trials.DATASETS")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(FIRST))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--factors", default="1,0.25,4", help="of the rate that the method's file names")
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    part, parts = (int(number) for number in args.part.split("/"))
    seeds = [int(seed) for seed in args.seeds.split(",")]
    factors = [float(factor) for factor in args.factors.split(",")]
    for method in args.methods.split(",")[part - 1 :: parts]:

        def make(setting: dict, seed: int, method: str = method) -> Trial:
            return Trial(args.out, "methods", args.data, method, setting, seed, args.rounds, args.dtype)

        compare(settings_of(method, factors), make, seeds, args.rounds)


if __name__ == "__main__":
    main()
