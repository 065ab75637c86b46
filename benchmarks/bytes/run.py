"""Methods and wire formats: what accuracy each megabyte buys.

    python benchmarks/bytes/run.py --data DIR --out FILE [--only fedara-int4-int4,…] [--seeds 1] [--rounds 20] [--part 1/2]

float32 settings run for `--rounds`, coded ones for half as many again: what counts is the bytes that an accuracy takes, not the
rounds. Every setting runs at its method's own learning rate, evaluated on validation data every two rounds. Lines are appended
as they come, and what FILE holds is not run again, so a cut-off run goes on. `--part i/n` takes every n-th setting: start one
process for each core, with a FILE of its own. draw.py makes table and picture from all FILEs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import trials  # noqa: E402

trials.EVERY = 2
trials.BASE |= trials.DRAWN
METHODS = ("fedlora", "ffa-lora", "fedara")
RUNS = [(method, form, form) for form in ("float32", "int4") for method in METHODS]


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="docstrings", help="folder of a data set named as in trials.DATASETS")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join("-".join(run) for run in RUNS), help="method-down-up, comma-separated")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", default="float32", help="of the backbone")
    parser.add_argument("--part", default="1/1")
    args = parser.parse_args()
    part, parts = (int(number) for number in args.part.split("/"))
    for name in args.only.split(",")[part - 1 :: parts]:
        method, down, up = name.rsplit("-", 2)
        rounds = args.rounds if down == up == "float32" else args.rounds * 3 // 4 * 2  # even: the last is evaluated
        for seed in args.seeds.split(","):
            setting = {"wire.down": down, "wire.up": up}
            trials.Trial(args.out, "bytes", args.data, method, setting, int(seed), rounds, args.dtype).run(rounds)


if __name__ == "__main__":
    main()
