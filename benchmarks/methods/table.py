"""Table of what choices.py measured: each choice against another one, paired by set and seed.

python benchmarks/methods/table.py FILE [FILE ...] [--against fedara]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from curves import mean_of, read  # noqa: E402

COLUMNS = ("set", "choice", "seeds", "before round 1", "validation", "test", "MB", "client TFLOP", "dead modules")
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 9: 2.31, 10: 2.26, 12: 2.20, 15: 2.14}
"""Student's t for 95%, two-sided, by the number of pairs."""


def runs(files: list[Path]) -> dict[tuple[str, str, int], list[dict]]:
    """(set, choice, seed) → evaluations in the order of rounds, of trials that came to their end."""
    found = defaultdict(list)
    for line in (line for file in files for line in read(file)):
        found[line["data"], line["stage"], line["seed"]].append(line)
    ended = {}
    for key, lines in found.items():
        lines.sort(key=lambda line: line["round"])
        if "test-score" in lines[-1]:
            ended[key] = lines
    return ended


def figures(lines: list[dict]) -> tuple[float, ...]:
    """Validation before round 1, at the end (mean of the last two), test, MB, TFLOP and dead modules of one trial."""
    last = lines[-1]
    end = statistics.mean(line["score"] for line in lines[-2:])
    return lines[0]["score"], end, last["test-score"], last["mb"], last["client-flops"] / 1e12, last["dead-modules"]


def interval(values: list[float]) -> str:
    """Mean and its 95% interval, in points."""
    if len(values) < 2:
        return f"{100 * values[0]:+.1f} (one pair)"
    half = T95.get(len(values), 2.0) * statistics.stdev(values) / len(values) ** 0.5
    return f"{100 * statistics.mean(values):+.1f} ± {100 * half:.1f} ({len(values)} pairs)"


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--against", default="fedara")
    args = parser.parse_args()
    ended = runs(args.files)
    print("|", " | ".join(COLUMNS), "|")
    print("|" + "---|" * len(COLUMNS))
    for data, choice in sorted({key[:2] for key in ended}):
        trials = [figures(lines) for key, lines in sorted(ended.items()) if key[:2] == (data, choice)]
        columns = [list(column) for column in zip(*trials, strict=True)]
        cells = [mean_of(column, digits) for column, digits in zip(columns, (3, 3, 3, 0, 1, 1), strict=True)]
        print("|", " | ".join([data, choice, str(len(trials)), *cells]), "|")
    print(f"\nAgainst {args.against}, paired by set and seed:\n\n| choice | validation, points | test, points | MB | TFLOP |")
    print("|" + "---|" * 5)
    for choice in sorted({key[1] for key in ended} - {args.against}):
        pairs = [
            (figures(lines), figures(ended[data, args.against, seed]))
            for (data, name, seed), lines in sorted(ended.items())
            if name == choice and (data, args.against, seed) in ended
        ]
        if not pairs:
            continue
        ratios = [statistics.mean(own[i] / other[i] for own, other in pairs) for i in (3, 4)]
        scores = [interval([own[i] - other[i] for own, other in pairs]) for i in (1, 2)]
        print("|", " | ".join([choice, *scores, *(f"× {ratio:.2f}" for ratio in ratios)]), "|")


if __name__ == "__main__":
    main()
