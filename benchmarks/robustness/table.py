"""Draws the table of README.md from the lines that run.py wrote.

python benchmarks/robustness/table.py [results.jsonl]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

RULES = ("undefended", "mean", "bound 5", "norm-clip", "median", "trimmed-mean", "multi-krum")


def main(path: Path) -> None:
    """Print accuracies as Markdown: a row for each attack and share, a column for each rule."""
    lines = read(path)
    if not lines:
        sys.exit(f"{path}: no run is in it")
    found = {(line["attack"], line["share"], line["rule"]): line for line in lines}
    print("| attack | attackers | " + " | ".join(RULES) + " | dropped by the bound |")
    print("|---|---|" + "---|" * (len(RULES) + 1))
    for attack in dict.fromkeys(line["attack"] for line in lines):
        for share in sorted({line["share"] for line in lines if line["attack"] == attack}):
            cells = [_cell(found.get((attack, share, rule))) for rule in RULES]
            print(f"| {attack} | {share:.0%} | {' | '.join(cells)} | {_dropped(found.get((attack, share, 'mean')))} |")
    print(f"\n{len(lines)} runs, {sum(line['seconds'] for line in lines) / 60:.0f} minutes")


def read(path: Path) -> list[dict]:
    """The runs of a file, none where there is no file; a line that a kill cut off is left out, and said."""
    lines = []
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            print(f"{path}, line {number}: cut off, left out: {text[:60]!r}", file=sys.stderr)
    return lines


def _cell(line: dict | None) -> str:
    if line is None:
        return ""
    return f"{line['accuracy']:.3f}" + (" (ended)" if line["outcome"] == "failed" else "")


def _dropped(line: dict | None) -> str:
    if line is None:
        return ""
    asked = 10 * line["rounds"]
    bad, good = (line["dropped"].get(f"{who} norm", 0) for who in ("bad", "good"))
    of_bad = round(asked * line["share"])
    return "-" if not bad + good else f"{bad} of {of_bad} bad, {good} of {asked - of_bad} good"


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "results.jsonl"))
