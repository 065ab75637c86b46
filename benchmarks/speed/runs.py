"""Whole runs with the frozen prefix kept and not: accuracy, and this machine's seconds inside clients.

    python benchmarks/speed/runs.py --out FILE [--data DIR] [--methods head,legend] [--seeds 1,2] [--rounds 20]

With the backbone's dropout off the two differ by rounding; with it on (`--dropout`), by the dropout below the living blocks.
Lines are appended as ../trials.py makes them, and what FILE holds is not run again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from trials import Trial  # noqa: E402


def main() -> None:
    """Parse the command line and run, the two ways of one seed after each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="docstrings", help="folder of a data set named as in trials.DATASETS")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default="head,legend,fedara")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dropout", action="store_true")
    args = parser.parse_args()
    for seed in map(int, args.seeds.split(",")):
        for method in args.methods.split(","):
            for cache in ("off", "exact"):
                setting = {"train.cache": cache, "train.dropout": args.dropout}
                Trial(args.out, "cache", args.data, method, setting, seed, args.rounds, "float32").run(args.rounds)


if __name__ == "__main__":
    main()
