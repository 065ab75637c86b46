"""Table of what run.py measured: each method at its best rate, by seed paired with fedlora.

python benchmarks/causal/table.py FILE [FILE ...]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from curves import mean_of, read  # noqa: E402

AGAINST = "fedlora"
COLUMNS = (
    "method",
    "rate",
    "seeds",
    "before round 1",
    "validation",
    "test",
    "MB",
    "TFLOP",
    "MB to target",
    "TFLOP to target",
    "dead modules",
)


def trials(files: list[Path]) -> dict[tuple[str, float, int], list[dict]]:
    """(method, rate, seed) → evaluations in the order of rounds."""
    found = defaultdict(list)
    for line in (line for file in files for line in read(file)):
        found[line["stage"], line["setting"]["train.learning-rate"], line["seed"]].append(line)
    return {key: sorted(lines, key=lambda line: line["round"]) for key, lines in sorted(found.items())}


def reached(lines: list[dict], target: float) -> dict | None:
    """The first evaluation that is at the target or below."""
    return next((line for line in lines if line["score"] <= target), None)


def to_target(found: list[dict | None], key: str, unit: float) -> str:
    """Mean over the seeds that reach the target, and how many do."""
    there = [line[key] / unit for line in found if line is not None]
    few = "" if len(there) == len(found) else f" ({len(there)} of {len(found)} seeds)"
    return f"{statistics.mean(there):.1f}{few}" if there else "not reached"


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    ran = trials(parser.parse_args().files)
    ended = {key: lines for key, lines in ran.items() if "test-score" in lines[-1]}
    # fedlora's last perplexity of the same seed: what is compared is what it costs to come as far
    target = {seed: lines[-1]["score"] for (method, _, seed), lines in ended.items() if method == AGAINST}
    print("|", " | ".join(COLUMNS), "|")
    print("|" + "---|" * len(COLUMNS))
    for method, rate in sorted({key[:2] for key in ended}):
        own = {seed: lines for (name, of, seed), lines in ended.items() if (name, of) == (method, rate)}
        found = [reached(lines, target[seed]) for seed, lines in own.items() if seed in target]
        last = [lines[-1] for lines in own.values()]
        cells = [
            mean_of([lines[0]["score"] for lines in own.values()], 2),
            mean_of([line["score"] for line in last], 2),
            mean_of([line["test-score"] for line in last], 2),
            mean_of([line["mb"] for line in last], 1),
            mean_of([line["client-flops"] / 1e12 for line in last], 1),
            to_target(found, "mb", 1),
            to_target(found, "client-flops", 1e12),
            mean_of([line["dead-modules"] for line in last], 0),
        ]
        print("|", " | ".join([method, f"{rate:.2g}", str(len(own)), *cells]), "|")
    print("\nRates that were tried (first seed, at the last round that all of a method's rates have):\n")
    for method in sorted({key[0] for key in ran}):
        first = min(seed for name, _, seed in ran if name == method)
        of = {rate: lines for (name, rate, seed), lines in ran.items() if name == method and seed == first}
        last = min(lines[-1]["round"] for lines in of.values())
        scores = {rate: next(line["score"] for line in lines if line["round"] == last) for rate, lines in of.items()}
        print(f"- {method}, round {last}: " + ", ".join(f"{rate:.2g} → {score:.2f}" for rate, score in sorted(scores.items())))


if __name__ == "__main__":
    main()
