"""Regression and multi-label classification: rows, losses and metrics by hand, whole runs, stock PEFT."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TASKS, mean_loss, metrics
from data_helper import federation, load, load_own, shares, write
from export_helper import stock_run
from runs_helper import config, start

from fedara_flwr import engine
from fedara_flwr.cli.exporting import export
from fedara_flwr.cli.launch import read_config
from fedara_flwr.config import DataSettings
from fedara_flwr.data.examples import Examples
from fedara_flwr.keys import ConfigError
from fedara_flwr.runs.keeper import open_run
from fedara_flwr.tasks import Encoded, read_settings
from fedara_flwr.tasks.regression import pearson, ranks

REGRESSION, MULTI = TASKS["regression"], TASKS["multi-label"]
NAMES = ("a", "b", "c")
PAD = SimpleNamespace(pad_token_id=0, sep_token_id=None, model_input_names=["input_ids"])


pytestmark = pytest.mark.usefixtures("private_cache")


def problem(call) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- regression: rows ------------------------------------------------------------
def test_numbers_and_what_is_none(tmp_path):
    """Ints, floats and numbers as text count; infinity, NaN, words and lists are left out and counted."""
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(["1", "2.5", "-3e-1", "inf", "nan", "good", None])]
    data = load(DataSettings(task="regression", path=str(write(tmp_path / "d.jsonl", rows))), 0)
    found = dict(zip(data.train.texts + data.test.texts, data.train.targets + data.test.targets, strict=True))
    assert found == {"t0": 1.0, "t1": 2.5, "t2": -0.3}
    assert data.labels == () and data.train.groups is None
    (line,) = data.skipped
    assert line.endswith("train: 4 of 7 rows skipped: 3 with a label that is no number up to 1e+18, 1 without label")


def test_numbers_of_a_csv(tmp_path):
    (tmp_path / "d.csv").write_text("a,b,score\nx,y,4.5\nx,,2\n,y,3\nz,y,\n")
    settings = DataSettings(
        task="regression", path=str(tmp_path / "d.csv"), text_column="a", pair_column="b", label_column="score"
    )
    own = load_own(settings, ())
    assert (own.train.texts, own.train.pairs, own.train.targets) == (("x", "x"), ("y", ""), (4.5, 2.0))
    assert str(own.skipped) == "2 of 4 rows skipped: 1 without label, 1 without text"


def test_the_digest_sees_numbers():
    one, other = (Examples(("a", "b"), targets=(1.0, number)) for number in (2.0, 3.0))
    assert one.digest() != other.digest() and one.keys(0) == other.keys(0)
    assert one.take([1]).targets == (2.0,) and one.take([]).targets == ()


@pytest.mark.parametrize("kind", ["dirichlet", "pathological"])
def test_partitions_that_need_a_label_say_which_do_not(tmp_path, kind):
    rows = [{"text": f"t{i}", "label": i / 7, "who": "ab"[i % 2]} for i in range(40)]
    settings = DataSettings(task="regression", path=str(write(tmp_path / "d.jsonl", rows)), partition=kind)
    assert problem(lambda: shares(settings, 0, 4)) == (
        f"data.partition = {kind!r}: rows of data.task = 'regression' have no label to go by, allowed are 'iid', 'length', "
        "and 'natural' with data.id-column"
    )
    natural = settings.model_copy(update={"partition": "natural", "id_column": "who"})
    owners = federation(natural, 0).pool.owners
    assert [{owners[i] for i in part} for part in shares(natural, 0, 2)] == [{"a"}, {"b"}]
    assert sum(map(len, shares(settings.model_copy(update={"partition": "iid"}), 0, 4))) == len(owners)


# -- regression: learning ------------------------------------------------------------
def test_loss_by_hand():
    """Squared errors 1, 4 and 0.25: their mean is 1.75."""
    batch = REGRESSION.collate(PAD, [[5], [5], [5]], [1.0, -1.0, 0.5])
    outputs = SimpleNamespace(logits=torch.tensor([[2.0], [1.0], [0.0]]).bfloat16())
    assert REGRESSION.losses(outputs, batch).tolist() == [1, 4, 0.25]
    assert mean_loss(REGRESSION, outputs, batch).item() == 1.75


def test_ranks_share_their_mean():
    assert ranks(np.array([10.0, 2.0, 10.0, -1.0])).tolist() == [3.5, 2, 3.5, 1]


def test_correlations_by_hand():
    """Predicted 1 2 3 4, true 1 4 9 100: ranks are equal, so spearman is 1.

    pearson: deviations -1.5 -0.5 0.5 1.5 and -27.5 -24.5 -19.5 71.5; their product 41.25 + 12.25 - 9.75 + 107.25 = 151; squares
    5 and 756.25 + 600.25 + 380.25 + 5112.25 = 6849. Errors 0, 2, 6, 96: (4 + 36 + 9216) / 4.
    """
    found = metrics(REGRESSION, [[1.0], [2.0], [3.0], [4.0]], [1.0, 4.0, 9.0, 100.0], ())
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] == pytest.approx(151 / math.sqrt(5 * 6849))
    assert found["loss"] == pytest.approx(2314)
    assert set(found) == set(REGRESSION.metrics)


def test_ties_by_hand():
    """Ranks 1.5 1.5 3 and 1 2 3: deviations -0.5 -0.5 1 and -1 0 1; 1.5 / sqrt(1.5 · 2)."""
    found = metrics(REGRESSION, [[0.0], [0.0], [5.0]], [1.0, 2.0, 3.0], ())
    assert found["spearman"] == pytest.approx(1.5 / math.sqrt(3))


@pytest.mark.parametrize("values", [([2.0, 2.0], [1.0, 5.0]), ([1.0, 5.0], [2.0, 2.0]), ([3.0], [4.0])])
def test_a_constant_has_no_correlation(values):
    predicted, true = values
    found = metrics(REGRESSION, [[value] for value in predicted], true, ())
    assert found["spearman"] == found["pearson"] == 0 and math.isfinite(found["loss"])


def test_pearson_is_numpys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=50), rng.normal(size=50)
    assert pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert pearson(a, -a) == pytest.approx(-1)


# -- multi-label: rows ------------------------------------------------------------
ROWS = [{"text": "t0", "label": ["b", "a"]}, {"text": "t1", "label": []}, {"text": "t2", "label": ["c"]}]


def test_lists_of_names(tmp_path):
    """Groups: the first label in the order of the names, from 1; 0 without one."""
    path = write(tmp_path / "d.jsonl", [*ROWS, {"text": "t3", "label": None}])
    data = load(DataSettings(task="multi-label", path=str(path)), 0)
    assert data.labels == NAMES
    found = {
        text: (target, group)
        for part in (data.train, data.test)
        for text, target, group in zip(part.texts, part.targets, part.groups.tolist(), strict=True)
    }
    assert found == {"t0": ((0, 1), 1), "t1": ((), 0), "t2": ((2,), 3)}
    assert data.skipped[0].endswith("1 of 4 rows skipped: 1 without label")
    assert MULTI.group_names(NAMES) == ("(none)", "a", "b", "c")


def test_unknown_names(tmp_path):
    path = write(tmp_path / "d.jsonl", ROWS)
    settings = DataSettings(task="multi-label", path=str(path), labels="a,b")
    assert problem(lambda: load(settings, 0)) == f"data.path = {str(path)!r}: row 2 has label 'c', allowed are a, b"
    own = load_own(settings, ("a", "b"))
    assert own.train.texts == ("t0", "t1")
    assert str(own.skipped) == "1 of 3 rows skipped: 1 with unknown labels ('c' 1)"


def test_one_value_is_no_list(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"text": "t", "label": "a"}])
    assert problem(lambda: load(DataSettings(task="multi-label", path=str(path)), 0)) == (
        "data.label-column = 'label': it holds single values, allowed with data.task = 'multi-label' are lists of label names, "
        "which may be empty"
    )


@pytest.mark.parametrize("rows", [[[0, 1, 0], [1, 0, 0]], [[0, 1], [1, 0]], [[1.0, 1.0], [0.0, 0.0]]])
def test_a_number_for_each_label_is_no_list_of_ids(tmp_path, rows):
    """[0, 1, 0] is the second label alone; as ids it were the first and the second."""
    path = write(tmp_path / "d.jsonl", [{"text": f"t{i}", "label": row} for i, row in enumerate(rows)])
    settings = DataSettings(task="multi-label", path=str(path), labels="a,b,c")
    assert problem(lambda: load(settings, 0)) == (
        "data.label-column = 'label': it holds 0 or 1 for each label, allowed are lists of the labels that a row has"
    )


# -- multi-label: learning ------------------------------------------------------------
def test_binary_cross_entropy_by_hand():
    """Probabilities 1/2, 3/4, 1/4 with labels a and b: -(ln 1/2 + ln 3/4 + ln 3/4) / 3; without labels (1/2, 1/4, 3/4)."""
    logits = torch.tensor([[0.0, math.log(3), -math.log(3)]] * 2)
    batch = MULTI.collate(PAD, [[5], [5]], [(0, 1), ()])
    losses = MULTI.losses(SimpleNamespace(logits=logits), batch).tolist()
    expected = [(math.log(2) + 2 * math.log(4 / 3)) / 3, (math.log(2) + math.log(4) + math.log(4 / 3)) / 3]
    assert losses == pytest.approx(expected)
    assert MULTI.counts(batch).tolist() == [1, 1]
    assert MULTI.collate(PAD, [[5], [5]], [(), ()])["labels"].shape == (2, 0)


def test_f1_by_hand():
    """True a b | c | none, predicted a c | c | b.

    Hits a 1, b 0, c 1; predicted 1, 1, 2; true 1, 1, 1. micro: 2·2/(4 + 3); macro: (1 + 0 + 2/3)/3. d occurs nowhere.
    """
    logits = [[1.0, -1, 1, -1], [-1, -1, 1, -1], [-1, 1, -1, -1]]
    found = metrics(MULTI, logits, [(0, 1), (2,), ()], (*NAMES, "d"))
    assert found["micro-f1"] == pytest.approx(4 / 7) and found["macro-f1"] == pytest.approx(5 / 9)
    # -ln σ(1) where right, -ln σ(-1) where wrong: wrong are b and c in the first row and b in the third
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.e)
    assert found["loss"] == pytest.approx((9 * right + 3 * wrong) / 12)
    assert set(found) == set(MULTI.metrics)


def test_no_label_at_all():
    assert metrics(MULTI, [[-1.0, -1]], [()], ("a", "b"))["micro-f1"] == 0


# -- whole runs ------------------------------------------------------------
def data_of(task: str, folder: Path) -> Path:
    """120 rows that say their labels in words."""
    words = ("red", "green", "blue")
    rows = []
    for i in range(120):
        chosen = [word for bit, word in enumerate(words) if i >> bit & 1]
        label = chosen if task == "multi-label" else len(chosen) / 2
        rows.append({"text": f"{' and '.join(chosen) or 'nothing'} number {i}", "label": label})
    return write(folder / f"{task}.jsonl", rows)


@pytest.mark.parametrize("method", ["fedara", "fedlora", "full"])
@pytest.mark.parametrize("task", ["regression", "multi-label"])
def test_a_whole_run_and_what_stock_libraries_make_of_it(tiny_bert, tmp_path, task, method):
    """Facts, clients' metrics, card's code; stock PEFT or transformers gives the logits that the server's model has."""
    changes = {"data__task": task, "data__path": str(data_of(task, tmp_path)), "data__partition": "iid", "method": method}
    changes |= {"data__client_validation": 0.3, "data__test": 0.2, "data__validation": 0.2, "run__dir": str(tmp_path)}
    flat = config(tiny_bert, run__name="run", **changes)
    directory = engine.run(flat, 4)
    facts = directory.facts
    main = TASKS[task].metric
    assert facts["outcome"] == "completed" and facts["metric"] == main.facts()
    assert set(facts["test"]) == set(TASKS[task].metrics) and np.isfinite(list(facts["test"].values())).all()
    assert facts["labels"] == ([] if task == "regression" else ["blue", "green", "red"])
    sums = [sum(counts) for counts in facts["partition"].values()]
    width = {"regression": 1, "multi-label": 4}[task]
    assert len(sums) == 4 and {len(counts) for counts in facts["partition"].values()} == {width}
    assert len(facts["groups"]) == (0 if task == "regression" else 4)
    client = directory.records("client")[-1]
    assert {f"eval-{name}" for name in TASKS[task].metrics} <= set(client)
    assert main.name in directory.records("round")[-1]
    exported = directory.path / facts["exported"]
    card = (exported / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and ("## Labels" in card) == (task == "multi-label")
    code = card[card.index("```python\n") + 10 : card.rindex("```")].replace("path/to/this/folder", str(exported))
    printed, logits = stock_run(code.replace(f"'{tiny_bert.name}'", repr(str(tiny_bert))))
    assert printed.strip().startswith("[") if task == "multi-label" else math.isfinite(float(printed))
    saved = open_run(directory.path)
    model = saved.model
    model.load(saved.method.exported(saved.state))
    with torch.no_grad():
        expected = model.adapted.outputs(dict(model.learner.tokenizer("some text", return_tensors="pt"))).logits
    assert np.allclose(logits, expected.numpy(), atol=1e-5)
    page = (directory.path / "report.html").read_text()
    assert main.name in page and "AutoModelForSequenceClassification" in page


def test_the_formats_of_a_regression_give_the_same_numbers(tiny_bert, tmp_path):
    flat = config(
        tiny_bert,
        run__name="run",
        run__dir=str(tmp_path),
        data__task="regression",
        data__path=str(data_of("regression", tmp_path)),
        data__partition="iid",
        data__test=0.2,
        data__validation=0.2,
    )
    directory = engine.run(flat, 4)
    found = []
    for kind in ("peft", "lora", "merged"):
        folder = export(directory.path, kind, say=lambda line: None)
        card = (folder / "README.md").read_text()
        code = card[card.index("```python\n") + 10 : card.rindex("```")].replace("path/to/this/folder", str(folder))
        found.append(stock_run(code.replace(f"'{tiny_bert.name}'", repr(str(tiny_bert))))[1])
    assert np.allclose(found[0], found[1], atol=1e-5) and np.allclose(found[0], found[2], atol=1e-5)


def test_regression_learns(tiny_bert, tmp_path):
    """The loss falls below that of the mean's, whose correlation is 0."""
    flat = config(
        tiny_bert,
        num_server_rounds=8,
        data__task="regression",
        data__path=str(data_of("regression", tmp_path)),
        data__partition="iid",
        data__test=0.2,
        data__validation=0.3,
        train__steps=6,
        train__batch_size=8,
    )
    lines = [line for line in start(flat).lines if line["type"] == "round"]
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["spearman"] > 0.2


def test_paths_are_told_in_full(tmp_path, monkeypatch):
    """Flower runs the app in a folder of its own. A link stays one: what it points to may have no ending."""
    for name in ("one", "two"):
        (tmp_path / name).write_text("text,label\n" + "".join(f"{name} {i},a\n" for i in range(4)))
        (tmp_path / f"{name}.csv").symlink_to(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    found = read_config(Path(__file__).parents[2], ["data.path='one.csv, two.csv'"])["data.path"]
    assert found == f"{tmp_path / 'one.csv'},{tmp_path / 'two.csv'}"
    assert read_config(Path(__file__).parents[2], ["data.path='two.csv'"])["data.path"] == str(tmp_path / "two.csv")


def test_a_partition_that_does_not_suit_is_said_before_anything_starts(tmp_path):
    override = f"data.task='regression' data.path='{data_of('regression', tmp_path)}'"
    root = Path(__file__).parents[2]
    asked = [f"{override} data.partition='dirichlet'"]
    assert "data.partition = 'dirichlet': rows of data.task = 'regression'" in problem(lambda: read_config(root, asked))
    assert read_settings(read_config(root, [override])).data.partition == "iid"
    assert "data.name = 'docstrings': its rows are a text and the name of an area" in problem(
        lambda: load(read_settings({"data.task": "regression"}).data, 0)
    )


def test_evaluation_needs_no_order():
    """Batches in any order give the same numbers, to rounding."""
    rng = np.random.default_rng(0)
    labels = [tuple(np.flatnonzero(rng.random(3) < 0.5).tolist()) for _ in range(9)]
    logits = torch.from_numpy(rng.normal(size=(9, 3)))
    results = []
    for order in (range(9), rng.permutation(9)):
        evaluation = MULTI.evaluation(Encoded([[1]] * 9, labels), NAMES)
        for row in order:
            evaluation.add(SimpleNamespace(logits=logits[[row]]), MULTI.collate(PAD, [[1]], [labels[row]]))
        results.append(evaluation.result())
    assert results[0] == pytest.approx(results[1])


# -- what a node lets out, and what is shown ------------------------------------------------------------
def test_every_tasks_metrics_may_leave_and_what_nobody_knows_is_said_once(caplog):
    """Not in silence; an allow-list of the node's own is obeyed without a word."""
    from fedara_flwr.node.guard import _say_unknown
    from fedara_flwr.node.settings import NodeSettings

    _say_unknown.cache_clear()
    metrics = {
        "eval-spearman": 0.5,
        "eval-micro-f1": 0.4,
        "eval-loss": 1.0,
        "eval-examples": 3,
        "eval-bl\neu": 1.0,
        "loss": 2.0,
    }
    free, strict = NodeSettings.read({}).guard, NodeSettings.read({"metrics": "loss, eval-spearman"}).guard
    for _ in range(2):
        assert set(free.let_out(metrics)) == set(metrics) - {"eval-bl\neu"}
        assert strict.let_out(metrics) == {"eval-spearman": 0.5, "loss": 2.0, "eval-examples": 3}
    assert [record.getMessage() for record in caplog.records] == [
        "metric 'eval-bl?eu' is not sent: neither training nor a task that is installed here knows it"
    ]
    assert "there is no metric 'eval-spearmen'; did you mean 'eval-spearman'?" in problem(
        lambda: NodeSettings.read({"metrics": "eval-spearmen"})
    )


def test_a_device_may_have_options_of_its_own(tiny_bert):
    from fedara_flwr.client.session import own_settings
    from fedara_flwr.node.settings import NodeSettings

    flat = {"data.task": "question-answering", "data.options": "stride = 1"}
    settings = read_settings(flat | {"model.name": str(tiny_bert)})
    for given, expected in (("{stride = 2}", "stride = 2"), ("", "stride = 1")):
        node = NodeSettings.read({"data-path": "/d.csv", "models": str(tiny_bert), "data-options": given})
        assert own_settings(settings, node, trusted=False)[0].data.options == expected
    wrong = DataSettings(options="{limit = 1}")
    assert problem(lambda: type(TASKS["classification"])(wrong)) == (
        "data.options.limit = 1: there is no such key (task 'classification')"
    )
    assert problem(lambda: type(TASKS["classification"])(DataSettings(options="a ="))).startswith(
        "data.options = 'a =': not TOML"
    )


def test_the_line_of_a_round_has_the_main_metric_whatever_its_size():
    from fedara_flwr.server.progress import Progress
    from fedara_flwr.tasks import Metric

    record = {"round": 1, "alive": 1, "slots": 2, "dead-modules": 0, "alive-per-module": [1], "bytes": {"down": 0, "up": 0}}
    record |= {"bytes-total": 0, "good": 1, "sampled": ["a"], "seconds": 1.0, "seconds-evaluate": 0.0, "loss": 9.66}
    for name, value, shown in (("perplexity", 15649.67, "15649.7"), ("accuracy", 0.5, "0.500"), ("perplexity", 3e9, "3e+09")):
        heading, line = Progress(1, Metric(name)).line({**record, name: value}).split("\n")
        assert heading.split()[:3] == ["round", name, "loss"] and line.split()[:3] == ["1/1", shown, "9.660"]
        assert len(heading) == len(line)
    assert Progress(1, Metric("accuracy")).line(record).split("\n")[1].split()[1] == "-"


@pytest.mark.parametrize(
    ("metric", "target", "limits"),
    [
        ("accuracy", 0.0, "above 0 and at most 1"),
        ("accuracy", 70.0, "above 0 and at most 1"),
        ("accuracy", math.nan, "above 0 and at most 1"),
        ("spearman", -1.0, "above -1 and at most 1"),
        ("perplexity", 0.9, "at least 1"),
        ("perplexity", math.inf, "at least 1"),
    ],
)
def test_targets_that_say_nothing_are_refused(metric, target, limits):
    from fedara_flwr.report.compare import check_target
    from fedara_flwr.report.read import Run
    from fedara_flwr.tasks import Metric

    known = {"accuracy": TASKS["classification"].metric, "spearman": REGRESSION.metric}
    known["perplexity"] = Metric("perplexity", higher=False, low=1.0, high=math.inf)
    runs = [Run(Path("a"), {"metric": known[metric].facts()})]
    assert problem(lambda: check_target(target, runs)) == f"--target {target:g}: allowed with {metric} is a number {limits}"
    check_target({"perplexity": 20.0}.get(metric, 0.9), runs)
    check_target(None, runs)
    other = Run(Path("b"), {"metric": Metric("bleu").facts()})
    assert problem(lambda: check_target(0.5, [*runs, other])).startswith("--target 0.5: allowed with one main metric, these")


def test_facts_of_a_metric_come_back():
    for metric in (*(task.metric for task in TASKS.values()), type(REGRESSION.metric)("p", False, 1.0, math.inf)):
        assert type(metric).of_facts(json.loads(json.dumps(metric.facts()))) == metric
        assert metric.better(0.5, 0.5) and metric.better(0.6, 0.5) == metric.higher and not metric.better(math.nan, 0.5)


@pytest.mark.parametrize(("row", "task"), [({"label": "a"}, "classification"), ({"label": ["a"]}, "multi-label")])
def test_a_devices_file_says_for_which_task_it_is_fit(tmp_path, row, task):
    from fedara_flwr.cli.deploy.check import data
    from fedara_flwr.node.settings import NodeSettings

    path = write(tmp_path / "d.jsonl", [{"text": "t", **row}] * 3)
    assert f"fit for {task}; labels a" in data(NodeSettings.read({"data-path": str(path)})).found
