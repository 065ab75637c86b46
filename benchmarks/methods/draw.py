"""Table and picture from the lines that compare.py wrote.

python benchmarks/methods/draw.py FILE [FILE ...] [--picture accuracy-mb.svg] [--target 0.7]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from curves import Curve, Line, draw, first, means, read, smooth, spread  # noqa: E402

COLUMNS = (
    "method",
    "rate",
    "seeds × rounds",
    "validation",
    "test",
    "macro-F1",
    "MB",
    "MB to target",
    "modelled h",
    "modelled h to target",
    "modelled kJ",
    "client s",
    "kept MB",
    "factor error",
)


def curves(files: list[Path]) -> dict[str, dict[str, dict[int, Curve]]]:
    """Data → method → seed → evaluations in the order of rounds, of the setting that ran furthest, then on most seeds."""
    found: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list))))
    for line in (line for file in files for line in read(file)):
        setting = json.dumps(line["setting"], sort_keys=True)
        found[line["data"]][line["method"]][setting][line["seed"]].append(line)
    chosen: dict = {}
    for data, methods in found.items():
        for method, settings in methods.items():
            for seeds in settings.values():
                for curve in seeds.values():
                    curve.sort(key=lambda line: line["round"])
            best = max(settings.values(), key=lambda seeds: (max(c[-1]["round"] for c in seeds.values()), len(seeds)))
            last = max(c[-1]["round"] for c in best.values())
            chosen.setdefault(data, {})[method] = {seed: c for seed, c in sorted(best.items()) if c[-1]["round"] == last}
    return chosen


def table(data: str, methods: dict[str, dict[int, Curve]], target: float | None = None) -> str:
    """Markdown; the target, where none is given, is what fedlora reaches at the end."""
    lines = []
    if target is None and "fedlora" in methods:
        target = statistics.mean(smooth(c, len(c) - 1) for c in methods["fedlora"].values())
    lines += [f"**{data}**" + (f", target {target:.3f}" if target else ""), ""]
    lines += [
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    ranked = sorted(methods.items(), key=lambda item: -statistics.mean(smooth(c, len(c) - 1) for c in item[1].values()))
    for method, seeds in ranked:
        cs = list(seeds.values())
        ends = [c[-1] for c in cs]
        setting = ends[0]["setting"]
        rate = setting.get("train.learning-rate") or f"head {setting.get('train.head-learning-rate')}"
        tests = [e["test-accuracy"] for e in ends if "test-accuracy" in e]
        f1 = [e["test-macro-f1"] for e in ends if "test-macro-f1" in e]
        reached = {name: [first(c, target, name) for c in cs] if target else [] for name in ("mb", "modelled-seconds")}
        hits = {name: [v for v in values if v is not None] for name, values in reached.items()}
        of = f" ({len(hits['mb'])} of {len(cs)})" if len(hits["mb"]) < len(cs) else ""
        errors = [e["factor-error"] for e in ends if e["factor-error"] is not None]
        cells = [
            method,
            f"{rate:g}" if isinstance(rate, float) else rate,
            f"{len(cs)} × {ends[0]['round']}",
            spread([smooth(c, len(c) - 1) for c in cs]),
            spread(tests) if tests else "–",
            spread(f1) if f1 else "–",
            f"{statistics.mean(e['mb'] for e in ends):.0f}",
            f"{statistics.mean(hits['mb']):.0f}{of}" if hits["mb"] else "not reached",
            f"{statistics.mean(e['modelled-seconds'] for e in ends) / 3600:.2f}",
            f"{statistics.mean(hits['modelled-seconds']) / 3600:.2f}{of}" if hits["modelled-seconds"] else "not reached",
            f"{statistics.mean(e['modelled-joules'] for e in ends) / 1e3:.0f}",
            f"{statistics.mean(e['client-seconds'] for e in ends):.0f}",
            f"{statistics.mean(e['mb-kept'] for e in ends):.1f}",
            f"{statistics.mean(errors):.3f}" if errors else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(data: dict[str, dict[str, dict[int, Curve]]], target: Path) -> None:
    """Validation accuracy against megabytes, means over seeds, one panel for each data set."""
    panels: dict[str, list[Line]] = {}
    for name, methods in sorted(data.items()):
        panels[name] = [
            (f"{method} ({len(seeds)})", *means(list(seeds.values())), {"linestyle": "--" if method == "head" else "-"})
            for method, seeds in sorted(methods.items())
        ]
    draw(panels, "method (seeds)", target)


def main() -> None:
    """Print the tables; draw where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--target", type=float, help="accuracy to reach; default: fedlora's last")
    args = parser.parse_args()
    data = curves(args.files)
    print("\n\n".join(table(name, methods, args.target) for name, methods in sorted(data.items())))
    if args.picture:
        picture(data, args.picture)


if __name__ == "__main__":
    main()
