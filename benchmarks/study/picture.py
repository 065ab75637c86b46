"""The README's picture: this project's default and its method's rivals, accuracy against megabytes, from the study's lines.

python benchmarks/study/picture.py [FILE ...] [--sets banking77,sst2] [--picture docs/images/accuracy-mb.svg]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from plan import by_round, parse_files, read

GROUP, ALPHA = "pieces", 0.1
SHOWN = {  # rows of the group: how the picture calls them
    "FedARA": ("FedARA as it comes", "tab:blue"),
    "FedLoRA, else the same": ("FedLoRA, else the same", "tab:orange"),
    "FedLoRA as usual": ("FedLoRA as usual", "tab:gray"),
}
NAMES = {"banking77": "Banking77", "sst2": "SST-2", "docstrings": "docstrings", "20news": "20 Newsgroups"}

Trials = dict[str, list[list[dict]]]
"""Row → its seeds' evaluations, in the order of rounds."""


def trials(files: list[Path], data: str) -> Trials:
    """What the picture shows of one data set."""
    found: Trials = {row: [] for row in SHOWN}
    alike: dict[str, set[tuple]] = {row: set() for row in SHOWN}
    for (name, alpha, group, row, rate, _), curve in sorted(read(files).items(), key=lambda item: str(item[0])):
        if (name, alpha, group) == (data, ALPHA, GROUP) and row in SHOWN and "test-score" in curve[-1]:
            found[row].append(curve)
            alike[row].add((rate, curve[-1]["round"]))
    for row, kinds in alike.items():
        if len(kinds) > 1:
            sys.exit(f"{data}: {row!r} has trials of several rates and rounds, which are no seeds of one: {sorted(kinds)}")
    return found


def spread(values: list[float]) -> str:
    """Mean, and sample standard deviation where there are several values."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def row(data: str, choice: str, seeds: list[list[dict]]) -> str:
    """A line of what was measured at the end."""
    ends = [lines[-1] for lines in seeds]
    test = spread([end["test-score"] for end in ends]).replace("0.", ".")
    of = f"{len(ends)} seed{'s' if len(ends) > 1 else ''}, {ends[0]['round']} rounds"
    return f"{data}, {choice}: {test} on test for {statistics.mean(end['mb'] for end in ends):.0f} MB ({of})"


def draw(panels: dict[str, Trials], target: Path) -> None:
    """Means over seeds, and from the lowest to the highest one; linear axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "fedara", "font.size": 11}
    figure, axes = plt.subplots(1, len(panels), figsize=(5.4 * len(panels), 3.8), squeeze=False)
    for axis, (data, choices) in zip(axes[0], panels.items(), strict=True):
        for choice, seeds in choices.items():
            name, color = SHOWN[choice]
            points = by_round(seeds)
            mb = [statistics.mean(line["mb"] for line in point) for point in points]
            scores = [[line["score"] for line in point] for point in points]
            label = f"{name} ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})"
            axis.plot(mb, [statistics.mean(values) for values in scores], color=color, marker="o", markersize=4, label=label)
            axis.fill_between(
                mb, [min(values) for values in scores], [max(values) for values in scores], color=color, alpha=0.2
            )
        axis.set(xlabel="MB sent, both ways, all clients", title=NAMES[data], ylim=(0, 1), xlim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9, loc="lower right")
    axes[0][0].set_ylabel("validation accuracy")
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def main() -> None:
    """Print what was measured; draw where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default="banking77,sst2")
    parser.add_argument("--picture", type=Path)
    args = parse_files(parser)
    panels = {data: trials(args.files, data) for data in args.sets.split(",")}
    for data, choices in panels.items():
        for choice, seeds in choices.items():
            if not seeds:
                sys.exit(f"{data}: no trial of {choice!r} came to its end")
            print(row(data, choice, seeds))
    if args.picture:
        draw(panels, args.picture)


if __name__ == "__main__":
    main()
