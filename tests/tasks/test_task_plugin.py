"""Tasks of other packages: docs/write-a-task.md, installed and run as it stands, and plug-ins that are broken."""

from __future__ import annotations

import json
import math
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import some_fast
from peft import PeftModel
from rich.console import Console
from test_plugin import fedara, install, python
from transformers import AutoModelForMaskedLM, AutoTokenizer

from fedara_flwr import strategies, tasks
from fedara_flwr.cli.exporting import export
from fedara_flwr.cli.launch import read_config
from fedara_flwr.cli.listing import print_tasks
from fedara_flwr.config import DataSettings
from fedara_flwr.keys import ConfigError
from fedara_flwr.report import read_run, write_report
from fedara_flwr.report.compare import check_target, tables
from fedara_flwr.report.compare import group as grouped
from fedara_flwr.report.series import to_target
from fedara_flwr.runs.keeper import open_run
from fedara_flwr.tasks import Task, read_settings, registry
from fedara_flwr.wire import figures

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "write-a-task.md").read_text()


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    return install(PAGE, tmp_path_factory.mktemp("task"))


@pytest.fixture
def in_process(package, monkeypatch):
    """The installed package is this process's own until the test ends."""
    monkeypatch.delitem(sys.modules, "masked_lm", raising=False)
    monkeypatch.syspath_prepend(str(package))
    forget = (registry.evaluation_metrics, figures.known_metrics)
    for function in forget:
        function.cache_clear()
    yield package
    for function in forget:
        function.cache_clear()


@pytest.fixture
def tutorial(in_process) -> dict:
    """The names of the tutorial's own test file."""
    return runpy.run_path(str(in_process.parent / "source" / "test_masked_lm.py"))


# -- the tutorial ------------------------------------------------------------
def test_tasks_lists_the_tutorials_task(package):
    """As the page shows it, in 80 columns, and without torch."""
    done = fedara(package, "tasks")
    assert done.returncode == 0, done.stderr
    shown = re.search(r"^```\n(masked-lm .*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert shown is not None and shown[1] in "\n".join(line.rstrip() for line in done.stdout.splitlines())
    assert "broken" not in done.stdout and max(len(line) for line in done.stdout.splitlines()) <= 80
    for name in tasks.built_in():
        assert re.search(rf"^{name}  AutoModel", done.stdout, re.MULTILINE)
    code = "import sys; from fedara_flwr import tasks; tasks.find('masked-lm'); sys.exit('torch' in sys.modules)"
    assert python(package, "-c", code).returncode == 0


def test_the_pages_commands_say_what_they_say(in_process):
    """The options of the first; the errors of the others."""
    commands = [shlex.split(line, comments=True) for line in PAGE.splitlines() if line.startswith("fedara run")]
    overrides = [[command[command.index("-c") + 1]] for command in commands]
    settings = read_settings(read_config(ROOT, overrides[0]))
    assert tasks.open_task(settings.data).options.share == 0.2
    for wrong in overrides[1:]:
        with pytest.raises(ConfigError) as caught:
            read_config(ROOT, wrong)
        assert f"# error: {caught.value}\n" in PAGE


def test_the_tutorials_own_tests_pass(tutorial, tmp_path):
    tutorial["test_loss_by_hand"]()
    tutorial["test_three_rounds"](tmp_path)


def stock(folder: Path, kind: str, base: str, batch: dict) -> np.ndarray:
    if kind == "merged":
        model = AutoModelForMaskedLM.from_pretrained(folder)
    else:
        model = PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(base), folder)
    with torch.no_grad():
        return model.eval()(**batch).logits.numpy()


def test_a_run_without_labels_and_head(tutorial, tmp_path, capsys):
    """Lines, facts, report, comparison by a metric that falls, and exports that stock libraries load alike."""
    directory = tutorial["run"](tmp_path, **{"method": "fedara", "data.client-validation": 0.2})
    path, facts = directory.path, directory.facts
    assert "perplexity" in capsys.readouterr().out
    assert facts["labels"] == facts["groups"] == [] and all(len(rows) == 1 for rows in facts["partition"].values())
    assert set(facts["test"]) == {"perplexity", "accuracy", "loss"}
    assert all(f"client-eval-{name}" in directory.records("round")[-1] for name in facts["test"])
    config = json.loads((path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None and config["task_type"] is None
    run = read_run(path)
    page = write_report(path).read_text()
    assert "Examples by client" in page and "AutoModelForMaskedLM" in page and "mask_token" in page
    values = [line["perplexity"] for line in run.rounds]
    mean = sum(values) / 3
    assert to_target(run, mean + 1).rounds == 3 and to_target(run, mean - 1) is None
    check_target(mean, [run])
    with pytest.raises(ConfigError, match=r"--target 0\.5: allowed with perplexity is a number at least 1"):
        check_target(0.5, [run])
    assert "at most that" in tables(grouped([run]), mean)[1].note
    saved = open_run(path)
    model = saved.model
    batch = dict(model.learner.tokenizer(["some [MASK] text"], return_tensors="pt"))
    model.load(saved.method.weights(saved.state))
    with torch.no_grad():
        expected = model.adapted.outputs(batch).logits.numpy()
    base = facts["model"]
    for kind in ("peft", "lora", "merged"):
        folder = export(path, kind, say=lambda line: None)
        assert np.allclose(stock(folder, kind, base, batch), expected, atol=1e-4), kind
        card = (folder / "README.md").read_text()
        assert "pipeline_tag: fill-mask" in card and "## Labels" not in card and "(main metric, lower is better)" in card
        names: dict = {}
        code = card[card.index("```python\n") + 10 : card.rindex("```")].replace("path/to/this/folder", str(folder))
        exec(code.replace(f"'{Path(base).name}'", repr(base)), names)
        assert names["logits"].shape[-1] == len(AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("method", some_fast(sorted(set(strategies.built_in()) - {"head"}), {"full", "fedsa-lora", "slora"}))
def test_every_method_without_a_head(tutorial, tmp_path, method):
    directory = tutorial["run"](tmp_path, **{"method": method, "num-server-rounds": 2, "wire.up": "int8", "wire.down": "int8"})
    assert directory.facts["outcome"] == "completed"
    assert all(math.isfinite(line["perplexity"]) for line in directory.records("round"))


def test_head_alone_is_refused(tutorial, tmp_path):
    with pytest.raises(
        ConfigError, match="^method = 'head': data.task = 'masked-lm' has no head, and nothing else would be trained$"
    ):
        tutorial["run"](tmp_path, method="head")


def test_several_clients_at_once(tutorial, tmp_path):
    """As one after the other, to float tolerance."""
    found = []
    for name, together in (("alone", 1), ("together", 4)):
        directory = tutorial["run"](tmp_path, **{"method": "fedlora", "run.together": together, "run.name": name})
        found.append([line["perplexity"] for line in directory.records("round")])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_checkpoint_that_lacks_something_is_refused(in_process, tiny_bert):
    """A sentence encoder has no layer for gaps, and nothing would train a new one."""
    from fedara_flwr.adapters.backbone import Backbone

    with pytest.raises(ConfigError, match=r"the checkpoint lacks .*, and task 'masked-lm' trains no head"):
        Backbone(str(tiny_bert), tasks.open_task(DataSettings(task="masked-lm")), ())


def test_partitions_by_label_are_refused_by_the_command(package):
    done = fedara(package, "run", str(ROOT), "-c", "data.task='masked-lm' data.partition='dirichlet'")
    assert done.returncode == 1 and done.stderr == (
        "error: data.partition = 'dirichlet': rows of data.task = 'masked-lm' have no label to go by, allowed are 'iid', "
        "'length', and 'natural' with data.id-column\n"
    )


# -- plug-ins that are broken ------------------------------------------------------------
BROKEN = {
    "absent": ("nowhere_at_all:Task", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
    "leaves": ("odd_leaves:Task", "SystemExit: 3"),
    "function": ("odd:function", "odd:function is no subclass of Task"),
    "renamed": ("odd:Sound", "odd:Sound has the name 'sound', its entry point 'renamed'"),
    "optionless": ("odd:Optionless", "odd:Optionless.Options is no pydantic model"),
    "wordless": ("odd:Wordless", "odd:Wordless: title and auto_class must be texts, metrics a tuple of texts"),
    "metricless": ("odd:Metricless", "odd:Metricless: metric must be a Metric whose name is among metrics"),
    "headless": ("odd:Headless", "odd:Headless: head is 'maybe', allowed are 'new' and 'none'"),
    "regression": ("odd:Impostor", "this package has a task of that name"),
}
MODULES = {
    "odd": """
from fedara_flwr.tasks import Metric, Task
def function(): ...
class Sound(Task):
    name = "sound"
    title = "[red]brackets[/red] are text"
class Optionless(Task):
    name, Options = "optionless", dict
class Wordless(Task):
    name, metrics = "wordless", "loss"
class Metricless(Task):
    name, metric = "metricless", Metric("bleu")
class Headless(Task):
    name, head = "headless", "maybe"
class Impostor(Task):
    name = "regression"
""",
    "odd_leaves": "raise SystemExit(3)",
}


@pytest.fixture
def strangers(tmp_path, monkeypatch) -> None:
    """An installed package with one sound task and every kind of broken one."""
    for name, code in MODULES.items():
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    info = tmp_path / "odd_tasks-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-tasks\nVersion: 1.2\n")
    points = [f"{name} = {value}" for name, (value, _) in BROKEN.items()] + ["sound = odd:Sound"]
    (info / "entry_points.txt").write_text("\n".join(["[fedara_flwr.tasks]", *points]))
    monkeypatch.syspath_prepend(str(tmp_path))


def test_broken_plugins_leave_the_others_as_they_are(strangers):
    known = tasks.tasks()
    assert set(known) == {*tasks.built_in(), "sound"}
    assert known["regression"] is tasks.find("regression") is tasks.built_in()["regression"]


@pytest.mark.parametrize("name", [name for name in BROKEN if name != "regression"])
def test_a_broken_plugin_cannot_be_run_and_says_why(strangers, name):
    with pytest.raises(ConfigError) as caught:
        tasks.find(name)
    assert str(caught.value) == f"data.task = {name!r}: the plug-in of odd-tasks 1.2 is broken: {BROKEN[name][1]}"


def test_the_list_shows_broken_plugins_with_their_reason(strangers, capsys):
    print_tasks(Console(highlight=False, width=80))
    printed = " ".join(capsys.readouterr().out.split())
    for name, (_, reason) in BROKEN.items():
        assert f"{name} broken plug-in of odd-tasks 1.2 {reason}" in printed
    assert "sound plug-in of odd-tasks 1.2 [red]brackets[/red] are text" in printed


def test_the_list_says_what_holds_where_a_task_names_nothing(capsys):
    """config.md sends its readers there for the model that '' stands for."""
    print_tasks(Console(highlight=False, width=80))
    first = " ".join(capsys.readouterr().out.partition("\n\n")[0].split())
    assert "model.name = 'sentence-transformers/all-MiniLM-L6-v2'" in first and "data.max-length = 64" in first


def test_an_unknown_task_is_one_line(strangers):
    with pytest.raises(ConfigError, match=r"^data\.task = 'sond': allowed are .*; did you mean 'sound'\?$"):
        tasks.find("sond")


def test_the_page_names_what_a_task_says():
    """Every member of the base stands on the page, or has a default that base.py explains."""
    explained = {"group_names", "check_labels", "label_word", "bare_ids", "word_places", "peft_task_type"}
    members = {name for name in vars(Task) if not name.startswith("_")} - explained
    assert {name for name in members if name not in PAGE} == set()


def test_no_other_file_names_a_task():
    """Their names stand in their own files, and as the default of one key."""
    package = ROOT / "fedara_flwr"
    named = re.compile("|".join(f"[\"']{name}[\"']" for name in tasks.built_in()))
    own = {Path(sys.modules[cls.__module__].__file__) for cls in tasks.built_in().values()}
    others = [path for path in package.rglob("*.py") if path not in own]
    found = {path.relative_to(package).as_posix() for path in others if named.search(path.read_text())}
    assert found == {"config.py"}
