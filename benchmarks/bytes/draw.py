"""Table and picture from the lines that run.py wrote; the target is what fedlora in float32 reaches at the end.

python benchmarks/bytes/draw.py FILE [FILE ...] [--picture accuracy-mb.svg]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from curves import Curve, Line, draw, first, means, read, smooth, spread  # noqa: E402

Curves = dict[str, list[Curve]]
"""By "method down-up", one curve for each seed."""
TARGET = "fedlora float32-float32"


def curves(files: list[Path]) -> dict[str, Curves]:
    """By data set."""
    found: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for line in (line for file in files for line in read(file)):
        name = f"{line['method']} {line['setting']['wire.down']}-{line['setting']['wire.up']}"
        found[line["data"]][name][line["seed"]].append(line)
    chosen: dict[str, Curves] = {}
    for data, names in found.items():
        for name, seeds in names.items():
            whole = [sorted(curve, key=lambda line: line["round"]) for _, curve in sorted(seeds.items())]
            chosen.setdefault(data, {})[name] = whole
    return chosen


def table(data: str, names: Curves) -> str:
    """Markdown."""
    ends = {name: statistics.mean(smooth(c, len(c) - 1) for c in cs) for name, cs in names.items()}
    target = ends.get(TARGET)
    needed = {name: [first(c, target, "mb") if target is not None else None for c in cs] for name, cs in names.items()}
    lines = [f"**{data}**" + (f", target {target:.3f}" if target is not None else ""), ""]
    lines += ["| method | down-up | seeds × rounds | validation | test | MB | MB to target | times fewer |", "|---" * 8 + "|"]
    for name, cs in sorted(names.items(), key=lambda item: -ends[item[0]]):
        mb = [value for value in needed[name] if value is not None]
        reference = [value for value in needed.get(TARGET, []) if value is not None]
        reached = len(mb) == len(cs) and bool(reference)
        cells = [
            *name.split(" "),
            f"{len(cs)} × {cs[0][-1]['round']}",
            spread([smooth(c, len(c) - 1) for c in cs]),
            spread([c[-1]["test-accuracy"] for c in cs]) if all("test-accuracy" in c[-1] for c in cs) else "–",
            f"{statistics.mean(c[-1]['mb'] for c in cs):.1f}",
            f"{statistics.mean(mb):.1f}" if reached else "not reached",
            f"{statistics.mean(reference) / statistics.mean(mb):.1f}" if reached else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(data: dict[str, Curves], target: Path) -> None:
    """Validation accuracy against megabytes, one panel for each data set; those on the front have a thick line."""
    panels: dict[str, list[Line]] = {}
    for dataset, names in sorted(data.items()):
        lines = {name: means(cs) for name, cs in sorted(names.items())}
        everywhere = [point for mb, accuracy in lines.values() for point in zip(mb, accuracy, strict=True)]
        panels[dataset] = []
        for name, (mb, accuracy) in lines.items():
            front = any(not any(m < x and a >= y for m, a in everywhere) for x, y in zip(mb, accuracy, strict=True))
            panels[dataset].append((name, mb, accuracy, {"linewidth": 2.4 if front else 1.0}))
    draw(panels, "method down-up", target)


def main() -> None:
    """Print the tables; draw where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    data = curves(args.files)
    print("\n\n".join(table(name, names) for name, names in sorted(data.items())))
    if args.picture:
        picture(data, args.picture)


if __name__ == "__main__":
    main()
