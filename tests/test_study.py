"""The study's plan and the published settings: every run configuration in them is one that the app takes."""

import json
import math
import re
import statistics
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from fedara_flwr import strategies
from fedara_flwr.keys import ConfigError
from fedara_flwr.tasks import read_settings

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "benchmarks" / "study"
sys.path.insert(0, str(STUDY))
import picture  # noqa: E402
import plan as study  # noqa: E402
import tables  # noqa: E402

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
PLAN = study.read_plan()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_published_setting_is_one_that_the_app_takes(path):
    settings = read_settings(study.flat(tomllib.loads(path.read_text())))
    strategies.find(settings.method).check(settings)
    text = path.read_text()
    assert f"configs/{path.name}" in text  # how it is run
    assert all(number in strategies.find(settings.method).paper for number in re.findall(r"arXiv ([\d.]+\d)", text))


def test_every_method_has_a_setting():
    named = {tomllib.loads(path.read_text())["method"] for path in CONFIGS}
    assert set(strategies.methods()) <= named
    default = read_settings(study.flat(tomllib.loads((ROOT / "configs" / "default.toml").read_text())))
    assert default == read_settings({})


@pytest.mark.parametrize("cell", PLAN.cells, ids=str)
def test_every_row_of_a_cell_is_a_run(cell):
    from run import Study

    one = Study(PLAN, Path("/data"), Path("/nowhere.jsonl"))
    group = PLAN.groups[cell.group]
    assert group.against in group.rows and cell.set in PLAN.sets
    for row in group.rows:
        settings = read_settings(one.config(cell, row))
        strategies.find(settings.method).check(settings)
        share = settings.strategy.fraction_train * PLAN.sets[cell.set].clients
        assert math.ceil(share - 0.5) <= settings.strategy.min_train_nodes
        assert cell.alpha in (None, settings.data.dirichlet_alpha)


def line(row, seed, number, score, rate=1.0, **more):
    names = {"set": "banking77", "alpha": 0.1, "group": "pieces", "row": row, "rate": rate, "seed": seed}
    figures = {"round": number, "score": score, "learning-rate": 0.0, "mb": 10.0 * number}
    figures |= {"client-flops": 1e12 * number, "flops-below": 0.0}
    return (
        names
        | figures
        | {"modelled-seconds": 36.0, "modelled-joules": 500.0, "dead-modules": 2, "hardware": "x", "dtype": "y"}
        | more
    )


def curves_of(path, lines):
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return study.read([path])


def test_tables_pair_by_seed_and_leave_out_what_did_not_end(tmp_path):
    """Differences 0.1 and 0.3 of seeds 1 and 2: +20 ± 12.71 · 14.14 / √2 points; seed 3 has no pair, row C no end."""
    lines = []
    for seed, other, own in ((1, 0.5, 0.6), (2, 0.5, 0.8)):
        lines += [line("FedARA", seed, 5, other), line("FedARA", seed, 10, other, **{"test-score": other})]
        lines += [line("LEGEND", seed, 5, own, mb=20.0), line("LEGEND", seed, 10, own, mb=40.0, **{"test-score": own})]
    lines += [line("LEGEND", 3, 10, 0.9, **{"test-score": 0.9}), line("plain loss", 1, 5, 0.9)]
    cell = study.Cell("banking77", "pieces", 0.1)
    found = tables.ended(PLAN, curves_of(tmp_path / "lines.jsonl", lines), cell)
    assert {row: sorted(trials) for row, (_, trials) in found.items()} == {"FedARA": [1, 2], "LEGEND": [1, 2, 3]}
    row = tables.against_table(found, "FedARA", lower=False, points=100.0, digits=1)[-1]
    assert row == "| LEGEND (2) | +20.0 ± 127.1 | +20.0 ± 127.1 | × 0.40 | × 1.00 | 20.0 | 5.0 |"
    row = tables.against_table(found, "FedARA", lower=True, points=100.0, digits=1)[-1]
    assert row.endswith("| not reached | not reached |")


def test_lines_that_lack_a_part_of_the_compute_are_marked(tmp_path):
    whole, old = (line(row, 1, 10, 0.5, **{"test-score": 0.5}) for row in ("FedARA", "LEGEND"))
    del old["flops-below"]
    found = tables.ended(PLAN, curves_of(tmp_path / "l.jsonl", [whole, old]), study.Cell("banking77", "pieces", 0.1))
    first, second = tables.cell_table(found, 3)[2:]
    assert "| 10.0 |" in first and "| 10.0† |" in second
    assert "× 1.00† |" in tables.against_table(found, "FedARA", lower=False, points=100.0, digits=1)[-1]


def test_of_a_round_that_ran_twice_the_later_line_counts(tmp_path):
    curve = curves_of(
        tmp_path / "lines.jsonl", [line("FedARA", 1, 5, 0.1), line("FedARA", 1, 10, 0.2), line("FedARA", 1, 5, 0.3)]
    )
    assert [one["score"] for one in next(iter(curve.values()))] == [0.3, 0.2]


def test_an_interval_is_students():
    """Of 1, 2, 3: mean 2, deviation 1, t 4.30 with two degrees of freedom."""
    mean, half = study.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.30 / math.sqrt(3))
    assert study.interval([0.7]) == (0.7, None)


def test_a_trial_stops_at_its_time(tmp_path):
    from run import Study
    from trial import TimeUp

    one = Study(PLAN, Path("/data"), tmp_path / "out.jsonl", until=0.0)
    with pytest.raises(TimeUp):
        one.row(PLAN.cells[0], "FedARA", [1])


def test_a_row_is_halved_and_run_on_all_seeds(tmp_path, monkeypatch):
    """The best factor of each rung goes on; what a file holds is not run again."""
    from run import Study

    ran = []

    class Trial:
        def __init__(self, names, config, *_):
            self.names, self.rate = names, config["train.learning-rate"] / 0.01

        def run(self, rounds):
            ran.append((self.names["seed"], round(self.rate, 3), rounds))
            return {0.25: 0.6, 1.0: 0.9 if rounds < 10 else 0.5, 4.0: 0.1}[round(self.rate, 3)]

    monkeypatch.setattr("run.Trial", Trial)
    Study(PLAN, Path("/data"), tmp_path / "out.jsonl").row(PLAN.cells[0], "FedARA", [1, 2])
    assert ran == [(1, 0.25, 5), (1, 1.0, 5), (1, 4.0, 5), (1, 1.0, 10), (1, 0.25, 10), (1, 0.25, 20), (2, 0.25, 20)]


def test_a_trial_that_has_run_says_so(tmp_path, capsys):
    """With another --config, too: its name is the same."""
    from run import Study

    names = {"set": "qed", "alpha": None, "group": "questions"}
    (tmp_path / "done.jsonl").write_text(json.dumps(line("FedARA", 2, 10, 0.5) | names) + "\n")
    one = Study(PLAN, Path("/data"), tmp_path / "out.jsonl", [tmp_path / "done.jsonl"])
    one.over = {"train.steps": 1}
    one.row(next(cell for cell in PLAN.cells if cell.set == "qed"), "FedARA", [2])
    assert capsys.readouterr().out.startswith('has run, see --done: {"set": "qed", ')
    assert not (tmp_path / "out.jsonl").exists()


def test_every_row_of_a_group_has_as_many_rounds_unless_it_says_so():
    """A file of configs/ has rounds for a run alone, and twice as many would be no comparison."""
    for name, group in PLAN.groups.items():
        for row, own in group.rows.items():
            assert study.row_rounds(PLAN, name, row) == own.get("num-server-rounds", group.rounds)


def test_a_file_of_configs_does_not_lengthen_a_row(tmp_path, monkeypatch):
    from run import Study

    told = []

    class Trial:
        def __init__(self, names, config, *_):
            self.rounds = config["num-server-rounds"]

        def run(self, rounds):
            told.append((self.rounds, rounds))

    monkeypatch.setattr("run.Trial", Trial)
    one = Study(PLAN, Path("/data"), tmp_path / "out.jsonl")
    cell = study.Cell("banking77", "pieces", 0.1)
    one.row(cell, "FedLoRA as usual", [1])
    one.over = {"num-server-rounds": 3}
    one.row(cell, "FedLoRA as usual", [1])
    one.row(PLAN.cells[0], "head from sums alone", [1])
    assert told == [(20, 20), (3, 3), (0, 0)]


def test_a_rate_that_came_to_no_number_is_the_worst(tmp_path, monkeypatch):
    from run import Study

    ran = []

    class Trial:
        def __init__(self, names, config, *_):
            self.rate = round(config["train.learning-rate"] / 0.01, 3)

        def run(self, rounds):
            ran.append((self.rate, rounds))
            return {0.25: 0.6, 1.0: math.nan, 4.0: 0.7}[self.rate]

    monkeypatch.setattr("run.Trial", Trial)
    Study(PLAN, Path("/data"), tmp_path / "out.jsonl").row(PLAN.cells[0], "FedARA", [1])
    assert ran[-1] == (4.0, 20) and (1.0, 10) not in ran


def test_a_head_of_another_setting_is_another_file():
    from trial import head_name

    usual = {"data.path": "/here/banking77", "train.steps": 8}
    name = head_name(read_settings(usual), "float32")
    assert name.startswith("banking77-0.5-42-statistics-float32-int4-") and "/" not in name
    assert name == head_name(read_settings(usual | {"data.path": "/there/banking77", "method": "fedlora"}), "float32")
    for change in ({"head.rows": 8}, {"model.name": "a/b"}, {"data.max-length": 16}, {"seed": 1}, {"wire.up": "float32"}):
        assert name != head_name(read_settings(usual | change), "float32")
    assert name != head_name(read_settings(usual), "bfloat16")


def test_the_last_round_is_evaluated_whatever_its_number():
    from trial import Trial

    one = Trial.__new__(Trial)
    one.every, one.rounds = 3, 5
    one.model = one.loop = type("All", (), {"__getattr__": lambda self, name: lambda *rest: {"accuracy": 0.5}})()
    one.loop.method, one.loop.state = one.loop, None
    assert [n for n in range(6) if one._evaluate(n, None)] == [0, 3, 5]


def start(monkeypatch, *words):
    import run

    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, words)])
    monkeypatch.setattr(run, "keep_heads", lambda folder: None)
    monkeypatch.setattr(run.Study, "cell", lambda *rest: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as stopped:
        run.main()
    return str(stopped.value)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--cells", "20news"], "--cells '20news': allowed are 'banking77, α = 0.1', "),
        (["--groups", "method"], "--groups 'method': allowed are 'methods', "),
        (["--rows", "fedara"], "--rows 'fedara': allowed are 'head from sums alone', "),
        (["--seeds", "4"], "--seeds 4: allowed are 1, 2, 3"),
        (["--cells", "medquad", "--groups", "pieces"], "--groups pieces: no cell"),
        (["--part", "3/2"], "--part 3/2: allowed is i/n"),
        (["--part", "0/1"], "--part 0/1: allowed is i/n"),
        (["--part", "x"], "--part x: allowed is i/n"),
        (["--done", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--config", "{"], "--config {: no JSON"),
        (["--config", "[]"], "--config []: allowed is a table"),
        (["--config", '{"seed": 3}'], "which --seeds has"),
        (["--config", '{"train.step": 3}'], "train.step"),
        (["--config", '{"train.learning-rate": 0.1}'], "tries rates of its own"),
        (["--data", "nowhere"], "--data nowhere: lacks the folders 20news, "),
        (["--out", "."], "directory"),
    ],
)
def test_what_cannot_run_is_one_line_before_anything_runs(tmp_path, monkeypatch, words, said):
    for name in PLAN.sets:
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    line = start(monkeypatch, "--data", ".", "--out", "out.jsonl", *words)
    assert line.startswith("error: ") and said in line and "\n" not in line


def test_lines_that_a_kill_cut_off_are_left_out_and_said(tmp_path, capsys):
    """The next line begins a new one, and the sums of feedback.py are no evaluations."""
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps(line("FedARA", 1, 5, 0.1)) + "\n" + json.dumps(line("FedARA", 1, 10, 0.2))[:50])
    study.append(path, line("FedARA", 1, 10, 0.3))
    sums = {name: value for name, value in line("FedARA", 1, -1, 0.0).items() if name != "score"}
    study.append(path, sums)
    (curve,) = study.read([path]).values()
    assert [one["score"] for one in curve] == [0.1, 0.3]
    study.read([path])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"{path}, line 2: no line of a trial, left out" in said[0]


def test_trials_that_are_not_as_planned_are_named(tmp_path):
    lines = [
        line("FedARA", 1, 5, 0.1, **{"test-score": 0.1, "dropped": 0.0}),
        line("LEGEND", 1, 20, 0.1, **{"test-score": 0.1, "dropped": 3.0}),
    ]
    found = tables.ended(PLAN, curves_of(tmp_path / "lines.jsonl", lines), study.Cell("banking77", "pieces", 0.1))
    assert tables.remarks(PLAN, found, "pieces")[2:] == [
        "- FedARA, seed 1: **ended after 5 rounds**, where the plan has 20",
        "- LEGEND, seed 1: 3 replies of clients were dropped",
    ]


def test_seeds_whose_compute_is_counted_in_two_ways_are_not_averaged(tmp_path):
    """What one lacks is taken from the others; no ratio where that is most of it."""
    whole = line("head alone, trained", 1, 10, 0.5, **{"test-score": 0.5, "client-flops": 9e12, "flops-below": 8e12})
    old = line("head alone, trained", 2, 10, 0.5, **{"test-score": 0.5, "client-flops": 1e12})
    del old["flops-below"]
    others = [line("FedARA", seed, 10, 0.5, **{"test-score": 0.5, "client-flops": 4e12}) for seed in (1, 2)]
    curves = curves_of(tmp_path / "lines.jsonl", [whole, old, *others])
    found = tables.ended(PLAN, curves, study.Cell("banking77", "pieces", 0.1))
    assert [c[-1]["client-flops"] for c in tables.alike(list(found["head alone, trained"][1].values()))] == [1e12, 1e12]
    assert "| -† |" in tables.cell_table(found, 3)[-1]
    row = tables.against_table(found, "head alone, trained", lower=False, points=100.0, digits=1)[-1]
    assert row.endswith("| × 1.00 | -† | 100.0 | 4.0† |")


def test_tables_say_what_they_leave_out(tmp_path, monkeypatch, capsys):
    path = tmp_path / "lines.jsonl"
    monkeypatch.setattr(sys, "argv", ["tables.py", str(path)])
    with pytest.raises(SystemExit):
        tables.main()
    assert f"no such file: {path}" in capsys.readouterr().err
    path.write_text("")
    tables.main()
    assert "### Not run" in capsys.readouterr().out
    lines = [line("another row", 1, 20, 0.5, **{"test-score": 0.5})]
    lines += [line("FedARA", seed, 20, 0.5, rate, **{"test-score": 0.5}) for rate, seed in ((1.0, 1), (1.0, 2), (4.0, 1))]
    lines += [line("FedARA", 3, 20, 0.5, hardware="another machine", **{"test-score": 0.5})]
    curves_of(path, lines)
    tables.main()
    shown = capsys.readouterr()
    assert "plan.toml has no such row: ('banking77', 0.1, 'pieces', 'another row')" in shown.err
    assert "FedARA: not shown: × 4, seeds [1]" in shown.err
    assert "Hardware: another machine, y; x, y" in shown.out


def test_a_picture_is_of_seeds_that_ended_alike(tmp_path, monkeypatch, capsys):
    path = tmp_path / "lines.jsonl"
    lines = [line(row, 1, number, 0.5, **{"test-score": 0.5}) for row in picture.SHOWN for number in (5, 20)]
    curves_of(path, lines + [line("FedARA", 2, 20, 0.7, **{"test-score": 0.7})])
    monkeypatch.setattr(sys, "argv", ["picture.py", str(path), "--sets", "banking77", "--picture", str(tmp_path / "a.svg")])
    picture.main()
    assert "FedARA: .600 ± .141 on test for 200 MB (2 seeds, 20 rounds)" in capsys.readouterr().out
    assert (tmp_path / "a.svg").stat().st_size
    curves_of(path, lines + [line("FedARA", 2, 15, 0.7, **{"test-score": 0.7})])
    with pytest.raises(SystemExit, match="several rates and rounds"):
        picture.main()


def test_evaluations_are_put_together_by_round():
    one, two = ([{"round": number, "of": name} for number in rounds] for name, rounds in (("a", (0, 5, 10)), ("b", (0, 10))))
    assert [[line["round"] for line in point] for point in study.by_round([one, two])] == [[0, 0], [10, 10]]


def test_students_t_is_that_of_the_integral():
    """Its density is integrated here, from -t to t."""
    for freedom, t in enumerate(study.T95, 1):
        x = np.linspace(-t, t, 200_001)
        density = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
        density = density * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        assert np.sum(density[1:] + density[:-1]) / 2 * (x[1] - x[0]) == pytest.approx(0.95, abs=5e-4)


@pytest.mark.parametrize("seed", range(5))
def test_a_comparison_is_what_another_computation_finds(tmp_path, seed):
    rng = np.random.default_rng(seed)
    lines = [
        line(row, s, n, float(rng.uniform()), **{"mb": float(rng.uniform(1, 9)) * n, "test-score": float(rng.uniform())})
        for row in ("FedARA", "LEGEND")
        for s in (1, 2, 3)
        for n in (5, 10, 15, 20)
        if not (row == "LEGEND" and s == 2)
    ]
    found = tables.ended(PLAN, curves_of(tmp_path / "lines.jsonl", lines), study.Cell("banking77", "pieces", 0.1))
    by = {(one["row"], one["seed"], one["round"]): one for one in lines}
    ends = {(row, s): (by[row, s, 15]["score"] + by[row, s, 20]["score"]) / 2 for row, s, n in by if n == 20}
    differences = np.array([ends["LEGEND", s] - ends["FedARA", s] for s in (1, 3)])
    half = 12.706 * differences.std(ddof=1) / math.sqrt(2)
    spent = []
    for s in (1, 3):
        spent += [by["LEGEND", s, n]["mb"] for n in (5, 10, 15, 20) if by["LEGEND", s, n]["score"] >= ends["FedARA", s]][:1]
    cells = tables.against_table(found, "FedARA", lower=False, points=100.0, digits=1)[-1].split(" | ")
    mean, interval = map(float, re.fullmatch(r"([+-][\d.]+) ± ([\d.]+)", cells[1]).groups())
    assert mean == pytest.approx(100 * differences.mean(), abs=0.06) and interval == pytest.approx(
        100 * half, rel=1e-3, abs=0.06
    )
    ratio = statistics.mean(by["LEGEND", s, 20]["mb"] / by["FedARA", s, 20]["mb"] for s in (1, 3))
    assert cells[3] == f"× {ratio:.2f}"
    assert cells[5].startswith(f"{statistics.mean(spent):.1f}" if spent else "not reached")


def test_a_wrong_row_is_one_line():
    with pytest.raises(ConfigError, match="head.start = 'statistic'"):
        read_settings(study.row_config({"head.start": "statistic"}))
