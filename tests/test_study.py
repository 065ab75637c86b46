"""The study's plan and the published settings: every run configuration in them is one that the app takes."""

import importlib
import json
import math
import re
import sys
import tomllib
from pathlib import Path

import pytest

from fedara_flwr import strategies
from fedara_flwr.keys import ConfigError
from fedara_flwr.tasks import read_settings

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "benchmarks" / "study"
sys.path.insert(0, str(STUDY))
import plan as study  # noqa: E402
import tables  # noqa: E402

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
PLAN = study.read_plan()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_published_setting_is_one_that_the_app_takes(path):
    settings = read_settings(study.flat(tomllib.loads(path.read_text())))
    strategies.find(settings.method).check(settings)
    assert f"configs/{path.name}" in path.read_text()  # how it is run


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
        assert one.rounds(cell, row) == (0 if row == "head from sums alone" else group.rounds)


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


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((["banking77, α = 0,1"], [], []), "--cells 'banking77, α = 0,1': allowed are 'banking77, α = 0.1', 'medquad', "),
        (([], ["piece"], []), "--groups 'piece': allowed are 'methods', 'pieces', 'language', 'questions'"),
        ((["qed"], [], ["LEGEND"]), "--rows 'LEGEND': allowed are 'head alone', 'FedARA', 'FedLoRA'"),
        ((["qed"], ["pieces"], ["FedARA"]), "--groups pieces: no cell of 'qed' has it"),
    ],
)
def test_a_name_that_the_plan_lacks_is_refused(names, said):
    """It would run nothing, without a word."""
    from run import chosen

    with pytest.raises(ValueError, match="^" + re.escape(said)):
        chosen(PLAN, *names)


def test_the_cells_of_these_names():
    from run import chosen

    assert chosen(PLAN, [], [], []) == list(PLAN.cells)
    found = chosen(PLAN, ["banking77, α = 0.1"], ["pieces"], ["FedARA"])
    assert [(cell.set, cell.alpha, cell.group) for cell in found] == [("banking77", 0.1, "pieces")]


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("run", ["--part", "0/2"], "argument --part: '0/2': allowed is i/n, i from 1 to n"),
        ("run", ["--done", "gone.jsonl"], "argument --done: 'gone.jsonl' is no file"),
        ("run", ["--cells", "qde"], "--cells 'qde': allowed are "),
        ("tables", ["gone.jsonl"], "argument files: 'gone.jsonl' is no file"),
        ("picture", ["gone.jsonl"], "argument files: 'gone.jsonl' is no file"),
    ],
)
def test_a_wrong_word_on_the_command_line_is_refused(script, words, said, tmp_path, monkeypatch, capsys):
    needed = ["--data", "/data", "--out", str(tmp_path / "out.jsonl")] if script == "run" else []
    monkeypatch.setattr(sys, "argv", [script, *needed, *words])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main()
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


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


def test_a_head_of_another_setting_is_another_file():
    """A plan that was tried with a small model or fewer rows leaves no head to the real one."""
    from trial import head_file

    plain = read_settings({"data.path": "/data/sst2", "model.dtype": "float32"})
    name = "sst2-0.5-42-statistics-float32-int4.npz"
    assert head_file(plain, {}) == head_file(plain, {"train.steps": 1, "model.dtype": "float32", "run.device": "cuda"}) == name
    others = {head_file(plain, over) for over in ({"head.rows": 16}, {"head.rows": 8}, {"model.name": "a/b"}, {})}
    assert len(others) == 4 and not any("/" in other for other in others)


def test_a_wrong_row_is_one_line():
    with pytest.raises(ConfigError, match="head.start = 'statistic'"):
        read_settings(study.row_config({"head.start": "statistic"}))
