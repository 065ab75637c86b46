"""Every table and picture of the study, from the lines that run.py left.

    python benchmarks/study/tables.py FILE [FILE ...] [--pictures FOLDER]       # pictures need matplotlib

± is the half width of a 95% interval over seeds; differences are paired by seed. Validation is the mean of a trial's last two
evaluations; "to target" is what a row had sent (computed) at its first evaluation as good as what the row that it is compared
with ends with, of the same seed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from plan import Cell, Plan, by_round, end, interval, parse_files, read, read_plan, row_rounds, say

Trials = dict[int, list[dict]]
"""Seed → evaluations in the order of rounds."""
COLUMNS = ("row", "rate", "seeds", "before", "validation", "test", "MB", "TFLOP", "modelled h", "modelled kJ", "dead")
AGAINST = ("row", "validation", "test", "MB", "TFLOP", "MB to target", "TFLOP to target")
COSTS = (("mb", 1.0), ("client-flops", 1e12))
PARTLY = "†"
NOTE = f"{PARTLY} counted without what blocks below the lowest adapter compute, once for each row of a round (older lines)"


def ended(plan: Plan, curves: dict[tuple, list[dict]], cell: Cell) -> dict[str, tuple[float, Trials]]:
    """Row → its rate and the trials that came to their end, by seed."""
    group, found = plan.groups[cell.group], {}
    for row in group.rows:
        rates: dict[float, Trials] = {}
        for (name, alpha, of, which, rate, seed), curve in curves.items():
            if (name, alpha, of, which) == (cell.set, cell.alpha, cell.group, row) and "test-score" in curve[-1]:
                rates.setdefault(rate, {})[seed] = curve
        if rates:
            rate = max(rates, key=lambda rate: len(rates[rate]))
            found[row] = rate, dict(sorted(rates[rate].items()))
            for other in sorted(rates.keys() - {rate}):
                say(f"{cell}, {cell.group}: {row}: not shown: × {other:g}, seeds {sorted(rates[other])}, which ended, too")
    return found


def remarks(plan: Plan, found: dict[str, tuple[float, Trials]], group: str) -> list[str]:
    """Trials whose figures are of something else than the plan has: other rounds, clients that are missing."""
    lines = []
    for row, (_, trials) in found.items():
        for seed, curve in trials.items():
            last, rounds = curve[-1], row_rounds(plan, group, row)
            if last["round"] != rounds:
                lines.append(f"- {row}, seed {seed}: **ended after {last['round']} rounds**, where the plan has {rounds}")
            if last.get("dropped"):
                lines.append(f"- {row}, seed {seed}: {last['dropped']:.0f} replies of clients were dropped")
    return lines and ["Not as planned:", "", *lines]


def shown(values: Sequence[float], digits: int, signed: bool = False) -> str:
    """Mean, and its interval from two values."""
    mean, half = interval(list(values))
    return f"{mean:{'+' if signed else ''}.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None and digits else "")


def partly(curves: Sequence[list[dict]]) -> str:
    """A mark where the blocks below the adapters were not counted."""
    return PARTLY if any("flops-below" not in curve[-1] for curve in curves) else ""


def says_little(curves: Sequence[list[dict]]) -> bool:
    """Whether what some of them lack is, by those that have it, most of the compute."""
    lasts = [curve[-1] for curve in curves]
    return bool(partly(curves)) and any(last.get("flops-below", 0.0) > last["client-flops"] / 2 for last in lasts)


def alike(curves: Sequence[list[dict]]) -> list[list[dict]]:
    """The curves, the compute of all of them counted in one way: without that part where one lacks it."""
    if not partly(curves):
        return list(curves)
    return [[{**line, "client-flops": line["client-flops"] - line.get("flops-below", 0.0)} for line in c] for c in curves]


def cell_table(found: dict[str, tuple[float, Trials]], digits: int) -> list[str]:
    """What each row reached, and what for."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row, (_, trials) in found.items():
        mark = partly(list(trials.values()))
        curves = alike(list(trials.values()))
        last = [curve[-1] for curve in curves]

        def mean(name: str, unit: float, digits: int, last: list[dict] = last) -> str:
            return f"{statistics.mean(line[name] for line in last) / unit:.{digits}f}"

        cells = [
            row,
            f"{last[0]['learning-rate']:.2g}" if last[0]["learning-rate"] else "own",
            str(len(trials)),
            shown([curve[0]["score"] for curve in curves], digits),
            shown([end(curve) for curve in curves], digits),
            shown([line["test-score"] for line in last], digits),
            mean("mb", 1, 1),
            ("-" if says_little(list(trials.values())) else mean("client-flops", 1e12, 1)) + mark,
            mean("modelled-seconds", 3600, 3) + mark,
            mean("modelled-joules", 1e3, 1) + mark,
            mean("dead-modules", 1, 1),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def to_target(curve: list[dict], target: float, better: Callable[[float, float], bool], name: str) -> float | None:
    """What had been spent at the first evaluation that is as good."""
    return next((line[name] for line in curve if better(line["score"], target)), None)


def against_table(found: dict[str, tuple[float, Trials]], against: str, lower: bool, points: float, digits: int) -> list[str]:
    """Each row against one, paired by seed; [] where that one did not end."""
    if against not in found:
        return []
    better = (lambda a, b: a <= b) if lower else (lambda a, b: a >= b)
    other = found[against][1]
    lines = [f"Against {against}, paired by seed:", "", "| " + " | ".join(AGAINST) + " |", "|---" * len(AGAINST) + "|"]
    for row, (_, trials) in found.items():
        seeds = sorted(set(trials) & set(other))
        if row == against or not seeds:
            continue
        curves = [curve for seed in seeds for curve in (trials[seed], other[seed])]
        mark, counted = partly(curves), alike(curves)
        pairs = list(zip(counted[::2], counted[1::2], strict=True))
        cells = [
            f"{row} ({len(pairs)})",
            shown([points * (end(own) - end(base)) for own, base in pairs], digits, signed=True),
            shown([points * (own[-1]["test-score"] - base[-1]["test-score"]) for own, base in pairs], digits, signed=True),
        ]
        for name, _ in COSTS:
            hollow = name == "client-flops" and says_little(curves)
            ratios = [own[-1][name] / base[-1][name] for own, base in pairs if base[-1][name] and not hollow]
            told = f"× {statistics.mean(ratios):.2f}" if len(ratios) == len(pairs) else "-"
            cells.append(told + (mark if name == "client-flops" else ""))
        for name, unit in COSTS:
            spent = [to_target(own, end(base), better, name) for own, base in pairs]
            there = [value / unit for value in spent if value is not None]
            of = "" if len(there) == len(spent) else f" ({len(there)} of {len(spent)})"
            cells.append(
                (f"{statistics.mean(there):.1f}{of}" if there else "not reached")
                + (mark if there and name == "client-flops" else "")
            )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def rates_table(plan: Plan, curves: dict[tuple, list[dict]], cell: Cell) -> list[str]:
    """Validation scores of all rates that were tried, on the first seed, at each rung."""
    group, lines = plan.groups[cell.group], []
    for row in group.rows:
        tried = {
            rate: {line["round"]: line["score"] for line in curve}
            for (name, alpha, of, which, rate, seed), curve in sorted(curves.items(), key=lambda item: item[0][4])
            if (name, alpha, of, which, seed) == (cell.set, cell.alpha, cell.group, row, plan.seeds[0])
        }
        rungs = []
        for number in (rung["rounds"] for rung in group.rungs):
            scores = [f"× {rate:g} {by_round[number]:.3f}" for rate, by_round in tried.items() if number in by_round]
            rungs += [f"round {number}: {', '.join(scores)}"] if scores else []
        if rungs:
            lines.append(f"- {row}: {'; '.join(rungs)}")
    return lines and ["Rates that were tried, as factors of the method's own, first seed:", "", *lines]


def picture(plan: Plan, cells: dict[Cell, dict[str, tuple[float, Trials]]], target: Path) -> None:
    """Validation score against megabytes, means over seeds, one panel for each cell."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "study"  # the same bytes from the same lines
    import matplotlib.pyplot as plt

    across = min(2, len(cells))
    down = -(-len(cells) // across)
    figure, axes = plt.subplots(down, across, figsize=(7 * across, 5 * down), squeeze=False)
    for axis, (cell, found) in zip(axes.flat, cells.items(), strict=False):
        for i, (row, (_, trials)) in enumerate(found.items()):
            points = by_round(list(trials.values()))
            mb = [max(statistics.mean(line["mb"] for line in point), 0.1) for point in points]
            score = [statistics.mean(line["score"] for line in point) for point in points]
            label = f"{row} ({len(trials)})"
            axis.plot(mb, score, color=plt.get_cmap("tab20")(i % 20), label=label, marker=".", linewidth=1.4)
        name = "perplexity" if plan.sets[cell.set].lower_is_better else "validation score"
        axis.set(xscale="log", xlabel="MB sent, both directions, all clients", ylabel=name, title=str(cell))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, title="row (seeds)")
    for axis in list(axes.flat)[len(cells) :]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    """Parse the command line, print, and draw where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="folder: one picture for each group of the plan")
    args = parse_files(parser)
    plan, curves = read_plan(), read(args.files)
    planned = {(cell.set, cell.alpha, cell.group, row) for cell in plan.cells for row in plan.groups[cell.group].rows}
    for trial in sorted({str(key[:4]) for key in curves if key[:4] not in planned}):
        say(f"left out, since plan.toml has no such row: {trial}")
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
    groups: dict[str, dict[Cell, dict[str, tuple[float, Trials]]]] = {}
    missing = []
    for cell in plan.cells:
        found, group = ended(plan, curves, cell), plan.groups[cell.group]
        missing += [
            f"{cell}, {cell.group}: {row}" + (f" ({len(found[row][1])} of {len(plan.seeds)} seeds)" if row in found else "")
            for row in group.rows
            if row not in found or len(found[row][1]) < len(plan.seeds)
        ]
        if not found:
            continue
        groups.setdefault(cell.group, {})[cell] = found
        lower = plan.sets[cell.set].lower_is_better
        lines = [line for _, trials in found.values() for curve in trials.values() for line in curve]
        hardware = sorted({f"{line['hardware']}, {line['dtype']}" for line in lines})
        print(f"### {cell}: {cell.group}\n")
        print("\n".join(cell_table(found, 2 if lower else 3)), end="\n\n")
        if partly([curve for _, trials in found.values() for curve in trials.values()]):
            print(NOTE, end="\n\n")
        if told := remarks(plan, found, cell.group):
            print("\n".join(told), end="\n\n")
        compared = against_table(found, group.against, lower, 1.0 if lower else 100.0, 2 if lower else 1)
        for block in (compared, rates_table(plan, curves, cell), ["Hardware: " + "; ".join(hardware)]):
            print("\n".join(block), end="\n\n" if block else "")
    print("### Not run\n\n" + ("\n".join(f"- {line}" for line in missing) or "Nothing."))
    for name, cells in groups.items() if args.pictures else ():
        picture(plan, cells, args.pictures / f"{name}.svg")


if __name__ == "__main__":
    main()
