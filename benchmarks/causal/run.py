"""Measures methods on a language model: perplexity by bytes and by counted compute, each site's rows a client.

    python benchmarks/causal/run.py --data DIR/medquad --out FILE [--methods fedlora] [--factors 1] [--seeds 1,2] [--rounds 15]

Each method's own rate times each factor on the first seed for a third of the rounds; the best by validation goes on with the
other seeds. Lines are appended as they come; what FILE holds is not run again. One seed of a method takes hours on two cores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from trials import EVERY, Trial  # noqa: E402

from fedara_flwr import strategies  # noqa: E402

METHODS = {"fedlora": "", "ffa-lora": "", "fedara": "", "fedara, all blocks": "depth-slack = 0.0"}


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by semicolons")
    parser.add_argument("--factors", default="0.3,1,3")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    rung = max(EVERY, args.rounds // 3 // EVERY * EVERY)
    for name in args.methods.split(";"):
        method = name.partition(",")[0]
        own = strategies.find(method).learning_rate
        options = {"strategy.options": METHODS[name]} if METHODS[name] else {}

        def trial(factor: float, seed: int, name=name, method=method, own=own, options=options) -> Trial:
            setting = {"train.learning-rate": own * factor, **options}
            return Trial(args.out, name, str(args.data), method, setting, seed, args.rounds, "bfloat16")

        factors = [float(factor) for factor in args.factors.split(",")]
        tried = {factor: trial(factor, seeds[0]) for factor in factors}
        best = min(factors, key=lambda factor: tried[factor].run(rung)) if len(factors) > 1 else factors[0]
        tried[best].run(args.rounds)
        for seed in seeds[1:]:
            trial(best, seed).run(args.rounds)


if __name__ == "__main__":
    main()
