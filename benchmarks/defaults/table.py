"""Draws the tables of README.md from the lines that tune.py wrote.

python benchmarks/defaults/table.py results.jsonl [...]
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from curves import Curve, first, read, smooth, spread  # noqa: E402


def curves_of(files: list[str]) -> dict[tuple[str, str, str, str], dict[int, Curve]]:
    """Evaluations of every (stage, data, method, setting), by seed, in the order of rounds."""
    curves: dict = defaultdict(lambda: defaultdict(list))
    for line in (line for file in files for line in read(Path(file))):
        key = (line["stage"], line["data"], line["method"], json.dumps(line["setting"], sort_keys=True))
        curves[key][line["seed"]].append(line)
    return {
        key: {seed: sorted(c, key=lambda line: line["round"]) for seed, c in seeds.items()} for key, seeds in curves.items()
    }


def at_bytes(curve: Curve, megabytes: float) -> float:
    """3-evaluation mean at the last evaluation within so many megabytes."""
    inside = [i for i, line in enumerate(curve) if line["mb"] <= megabytes]
    return smooth(curve, inside[-1]) if inside else float("nan")


def whole(seeds: dict[int, Curve]) -> dict[int, Curve]:
    """Seeds that ran to the last round of the stage, which is where the test is taken."""
    return {seed: curve for seed, curve in seeds.items() if "test-accuracy" in curve[-1]}


def short(setting: str) -> str:
    """A setting without what goes without saying."""
    names = {"train.learning-rate": "lr", "adapter.alpha": "alpha", "train.head-learning-rate": "head lr"}
    return ", ".join(f"{names.get(k, k)} {v}" for k, v in json.loads(setting).items()) or "defaults"


def main(files: list[str]) -> None:
    """Print the halving table and the comparison at the best settings, as Markdown."""
    curves = curves_of(files)
    print("| data | stage | method | setting | seeds | round | validation accuracy (mean of 3 evaluations) | MB |")
    print("|---|---|---|---|---|---|---|---|")
    for (stage, data, method, setting), seeds in sorted(curves.items()):
        last = max(curve[-1]["round"] for curve in seeds.values())
        ends = [curve for curve in seeds.values() if curve[-1]["round"] == last]
        accuracy = spread([smooth(curve, len(curve) - 1) for curve in ends])
        megabytes = statistics.mean(curve[-1]["mb"] for curve in ends)
        print(f"| {data} | {stage} | {method} | {short(setting)} | {len(ends)} | {last} | {accuracy} | {megabytes:.0f} |")
    for data in sorted({key[1] for key in curves}):
        compare(data, {key: seeds for key, seeds in curves.items() if key[1] == data})


def compare(data: str, curves: dict) -> None:
    """The best setting of each method that ran whole, at equal rounds and at equal bytes."""
    best: dict[str, tuple[tuple[int, float], str, dict[int, Curve]]] = {}
    for (_, _, method, setting), seeds in curves.items():
        done = whole(seeds)
        if not done:
            continue
        value = (len(done), statistics.mean(smooth(c, len(c) - 1) for c in done.values()))
        if method not in best or value > best[method][0]:
            best[method] = (value, setting, done)
    if "fedlora" not in best:
        return
    target = statistics.mean(smooth(c, len(c) - 1) for c in best["fedlora"][2].values())
    common = statistics.mean(c[-1]["mb"] for c in best.get("fedara", best["fedlora"])[2].values())
    print(f"\n{data}: target {target:.3f} (fedlora's last), equal bytes at {common:.0f} MB\n")
    print(
        "| method | setting | seeds | validation | test | test macro-F1 | MB | at equal bytes | MB to target | dead modules |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for method, (_, setting, done) in sorted(best.items(), key=lambda item: -item[1][0][1]):
        cs = list(done.values())
        hits = [megabytes for c in cs if (megabytes := first(c, target, "mb")) is not None]
        to_target = f"{statistics.mean(hits):.0f} ({len(hits)} of {len(cs)} seeds)" if hits else "not reached"
        cells = [
            method,
            short(setting),
            str(len(cs)),
            spread([smooth(c, len(c) - 1) for c in cs]),
            spread([c[-1]["test-accuracy"] for c in cs]),
            spread([c[-1]["test-macro-f1"] for c in cs]),
            f"{statistics.mean(c[-1]['mb'] for c in cs):.0f}",
            spread([at_bytes(c, common) for c in cs]),
            to_target,
            f"{statistics.mean(c[-1]['dead-modules'] for c in cs):.0f}",
        ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
