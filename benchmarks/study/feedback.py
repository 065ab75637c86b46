"""Error feedback (`wire.feedback`) with int4 uploads: accuracy, and what rounding takes from the sum of all updates.

    python benchmarks/study/feedback.py --out FILE [--clients 20] [--seeds 1,2] [--rounds 6]

Five clients a round, on docstrings. Beside every upload the exact differences are summed: `client-sum-error` is
‖Σ decoded - Σ exact‖ / ‖Σ exact‖ of each client's own sum over its rounds, over all clients together; `run-sum-error` that of
the sum over all clients and rounds, which is what the model takes in.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from plan import append, read_plan, row_config
from trial import Trial

from fedara_flwr import strategies
from fedara_flwr.model.parts import is_slot_part
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.wire import upload
from fedara_flwr.wire.codec import CODECS, CodingError

EVERY = 3
METHODS = ("ffa-lora", "fedara")
Sums = dict[tuple[str, str], np.ndarray]
code_update = upload.code_update


class Ledger:
    """Sums of exact and of decoded differences, by client and part, over all slots that there ever were."""

    def __init__(self) -> None:
        self.exact: Sums = {}
        self.decoded: Sums = {}
        self.times: Counter[str] = Counter()

    def code(self, update: Any, plan: Any, spec: Any, received: Any, key: str, residue: Any = None) -> Any:
        """As `upload.code_update`."""
        coded, said = code_update(update, plan, spec, received, key, residue)
        start, full = plan.start(spec, received, plan.mask, update.mask), RankMask.full(plan.mask.ranks)
        self.times[key] += 1
        for part, values in update.arrays.items():
            decoded = CODECS[plan.up].decode(coded[part], spec.row_lengths(part, update.mask, plan.entries))
            for sums, change in ((self.exact, values - start[part]), (self.decoded, decoded)):
                if is_slot_part(part):
                    change = spec.scatter(part, change, full, update.mask, np.zeros(spec.length(part, full)))
                sums[key, part] = sums.get((key, part), 0.0) + change.astype(np.float64)
        return coded, said

    def errors(self) -> dict[str, float]:
        """Of the clients' own sums, and of the sum over clients."""
        each, whole = CodingError(), CodingError()
        for name, exact in self.exact.items():
            each.add(exact, self.decoded[name])
        for part in {part for _, part in self.exact}:
            both = [sum(values for (_, p), values in sums.items() if p == part) for sums in (self.exact, self.decoded)]
            whole.add(*both)
        uploads = sum(self.times.values()) / len(self.times)
        return {"client-sum-error": each.value, "run-sum-error": whole.value, "uploads-per-client": uploads}


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    if unknown := set(args.methods.split(",")) - set(strategies.methods()):
        parser.error(f"--methods {','.join(sorted(unknown))}: allowed are {', '.join(strategies.methods())}")
    usual = row_config({"config": "fedlora.toml"})  # a drawn head, plain loss, float32
    for method in args.methods.split(","):
        for seed in args.seeds.split(","):
            for feedback in (False, True):
                ledger = Ledger()
                upload.code_update = ledger.code
                names = {"set": "docstrings", "alpha": 0.5, "group": f"feedback of {args.clients}", "rate": 1.0}
                names |= {"row": f"{method}, {'with' if feedback else 'without'}", "seed": int(seed)}
                config = read_plan().base | usual | {"method": method, "seed": int(seed), "num-server-rounds": args.rounds}
                config |= {"strategy.fraction-train": 5 / args.clients, "wire.up": "int4", "wire.feedback": feedback}
                Trial(names, config, args.clients, EVERY, args.out, (args.out,)).run(args.rounds)
                if ledger.times:
                    append(args.out, {**names, "round": -1, **ledger.errors()})
                    print(method, seed, feedback, ledger.errors(), flush=True)


if __name__ == "__main__":
    main()
