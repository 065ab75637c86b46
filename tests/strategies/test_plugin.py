"""Methods of other packages: docs/write-a-strategy.md, installed and run as it stands, and plug-ins that are broken."""

from __future__ import annotations

import inspect
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord
from peft import PeftModel
from rich.console import Console
from runs_helper import CLIENTS, SMALL, TamperedGrid, config, options, prepare, start
from transformers import AutoModelForSequenceClassification

from fedara_flwr import strategies
from fedara_flwr.cli.launch import read_config
from fedara_flwr.cli.listing import print_methods
from fedara_flwr.client import terms
from fedara_flwr.engine import InProcessGrid, run
from fedara_flwr.keys import ConfigError
from fedara_flwr.model import parts
from fedara_flwr.runs.keeper import open_run
from fedara_flwr.strategies.base import Client, Method, Reply, State
from fedara_flwr.tasks import read_settings
from fedara_flwr.wire.arrays import Rejected
from fedara_flwr.wire.records import plan_from_content

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "write-a-strategy.md").read_text()
CLIENT_HALF, PART, HOOKS = "## A half on the client", "## A part of the model's own parameters", "## The hooks"
CLIENT_HALF_AT, PART_AT, HOOKS_AT = (PAGE.index(heading) for heading in (CLIENT_HALF, PART, HOOKS))


def install(text: str, folder: Path) -> Path:
    """The package that the titled code blocks of `text` make up (a later file replaces an earlier one), built and installed."""
    source, target = folder / "source", folder / "installed"
    source.mkdir()
    for title, code in re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```$', text, re.MULTILINE | re.DOTALL):
        (source / title).write_text(code)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)
    return target


@pytest.fixture(scope="module")
def method_alone(tmp_path_factory) -> Path:
    return install(PAGE[:CLIENT_HALF_AT], tmp_path_factory.mktemp("method"))


@pytest.fixture(scope="module")
def with_client_half(tmp_path_factory) -> Path:
    return install(PAGE[:PART_AT], tmp_path_factory.mktemp("both"))


@pytest.fixture(scope="module")
def with_part(tmp_path_factory) -> Path:
    """The second package, which declares a part."""
    return install(PAGE[PART_AT:HOOKS_AT], tmp_path_factory.mktemp("part"))


def python(target: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`python …` with the package installed, no terminal and a line of 80 columns."""
    environment = os.environ | {"PYTHONPATH": f"{target}{os.pathsep}{ROOT}"}
    environment.pop("COLUMNS", None)
    return subprocess.run([sys.executable, *arguments], env=environment, cwd="/", capture_output=True, text=True)


def fedara(target: Path, *arguments: str) -> subprocess.CompletedProcess:
    return python(target, "-m", "fedara_flwr.cli", *arguments)


def forget() -> None:
    """What this process has found of installed packages."""
    terms._installed.cache_clear()
    parts.declared.cache_clear()


@pytest.fixture
def in_process(monkeypatch):
    """A function that makes an installed package this process's own, until the test ends."""
    with monkeypatch.context() as patch:

        def add(target: Path) -> None:
            for module in ("last_layers", "small_e", "bias_lora"):
                patch.delitem(sys.modules, module, raising=False)
            patch.setattr(terms, "TERMS", dict(terms.TERMS))  # loaded terms stay in it
            patch.syspath_prepend(str(target))
            forget()

        yield add
    forget()


# -- the tutorial ------------------------------------------------------------
def test_methods_lists_the_tutorials_method(method_alone):
    """As the page shows it; the output block there is what the command prints."""
    done = fedara(method_alone, "methods")
    assert done.returncode == 0, done.stderr
    shown = re.search(r"^```\n(last-layers .*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert shown is not None and shown[1] in "\n".join(line.rstrip() for line in done.stdout.splitlines())
    assert "last-layers-small-e" not in done.stdout and "broken" not in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 80


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("{layer = 2}", "strategy.options.layer = 2: there is no such key; did you mean 'strategy.options.layers'?"),
        ("layers = 0", "strategy.options.layers = 0: input should be greater than or equal to 1"),
        ("mu = 'much'", "strategy.options.mu = 'much': input should be a valid number"),
    ],
)
def test_a_wrong_option_ends_with_one_line(method_alone, options, problem):
    done = fedara(method_alone, "run", str(ROOT), "-c", "method='last-layers'", "-c", f"strategy.options={json.dumps(options)}")
    assert (done.returncode, done.stderr) == (1, f"error: {problem} (method 'last-layers')\n")


def test_the_pages_commands_say_what_they_say(method_alone, in_process):
    """Two ways to write the options, and the error of a misspelt one."""
    in_process(method_alone)
    commands = [shlex.split(line, comments=True) for line in PAGE.splitlines() if line.startswith("fedara run")]
    first, second, misspelt = ([command[command.index("-c") + 1]] for command in commands)
    for overrides in (first, second):
        settings = read_settings(read_config(ROOT, overrides))
        assert (settings.method, settings.options) == ("last-layers", {"layers": 3, "mu": 0.1})
    with pytest.raises(ConfigError) as caught:
        read_config(ROOT, misspelt)
    assert f"# error: {caught.value}\n" in PAGE


@pytest.mark.parametrize("test", ["test_without_a_server", "test_two_rounds"])
def test_the_tutorials_own_tests_pass(method_alone, in_process, test):
    """Found by its entry point; by hand, and two rounds of the default model."""
    in_process(method_alone)
    runpy.run_path(str(method_alone.parent / "source" / "test_last_layers.py"))[test]()


def test_the_tutorials_tests_are_these(method_alone):
    code = (method_alone.parent / "source" / "test_last_layers.py").read_text()
    assert re.findall(r"^def (test_\w+)", code, re.MULTILINE) == ["test_without_a_server", "test_two_rounds"]


def test_more_layers_than_there_are_is_refused(method_alone, in_process, tiny_bert):
    in_process(method_alone)
    with pytest.raises(ConfigError, match=r"strategy\.options\.layers = 4: with this model allowed is up to 3"):
        prepare(config(tiny_bert, method="last-layers", strategy__options="layers = 4"))


def small_e(model: Path, num_server_rounds: int = 2, strategy__fraction_train: float = 0.5, **values: float) -> dict:
    """A run of the tutorial's second method with these options."""
    changes = {"num_server_rounds": num_server_rounds, "strategy__fraction_train": strategy__fraction_train}
    return config(model, method="last-layers-small-e", strategy__options=options(**values), **changes)


def test_the_terms_act(with_client_half, in_process, tiny_bert):
    """The penalty makes E small; FedProx holds the head, which starts away from 0, near its start."""
    in_process(with_client_half)

    def after_two_rounds(**values: float):
        return start(small_e(tiny_bert, **values))

    free, pulled, held = after_two_rounds(mu=0.0, pull=0.0), after_two_rounds(mu=0.0, pull=100.0), after_two_rounds(mu=100.0)
    plan = pulled.method.plan(pulled.state, Client("0"))
    assert plan.terms == {"prox": {"mu": 0.0}, "small-e": {"weight": 100.0}}
    e_free, e_pulled = (np.abs(loop.state.arrays["E"]).sum() for loop in (free, pulled))
    assert 0 < e_pulled < 0.9 * e_free
    first = free.method.start_head()["head"]
    moved = [np.abs(loop.state.arrays["head"] - first).sum() for loop in (free, held)]
    assert 0 < moved[1] < 0.9 * moved[0]


def test_the_terms_report_reaches_the_method(with_client_half, in_process, tiny_bert):
    """|E| of every slot, of the clients themselves and as the method reads it; counted beside the arrays."""
    in_process(with_client_half)
    loop, grid = prepare(small_e(tiny_bert, num_server_rounds=1))
    slots, seen, next_mask = loop.state.mask.count, [], loop.method.next_mask

    def spied(state, replies):
        seen.extend(replies)
        return next_mask(state, replies)

    loop.method.next_mask = spied
    messages = list(loop.configure_train(1, loop.initial_arrays(), {}, grid))
    answers = list(grid.send_and_receive(messages))
    loop.aggregate_train(1, answers)
    sent = [np.abs(answer.content.array_records["arrays"]["E"].numpy()) for answer in answers]
    assert len(seen) == 3 and all(np.array_equal(r.reports["small-e"], e) for r, e in zip(seen, sent, strict=True))
    assert loop.meter.total["up.mask"] == 3 * 4 * slots


def test_slots_that_fade_with_every_client_die(with_client_half, in_process, tiny_bert):
    """None reaches 10^9: the largest alone lives from round 1 on, and it is the largest of what the clients reported."""
    in_process(with_client_half)
    loop = start(small_e(tiny_bert, least=1e9))
    assert [line["alive"] for line in loop.lines if line["type"] == "round"] == [1, 1]
    assert start(small_e(tiny_bert)).state.mask.count == loop.method.start_mask().count


@pytest.mark.parametrize("report", [b"1234", b"\xff" * 4, None])
def test_a_report_that_cannot_be_drops_the_reply_alone(with_client_half, in_process, tiny_bert, report):
    """Too short, not finite (a NaN for every slot), or none at all."""
    in_process(with_client_half)

    def tamper(number, node, reply):
        if node == 1:
            record = dict(reply.content.config_records["reply"])
            size = len(record.pop("report.small-e"))
            more = {} if report is None else {"report.small-e": report * (size // 4) if report[0] == 255 else report}
            reply.content["reply"] = ConfigRecord(record | more)
        return reply

    flat = small_e(tiny_bert, num_server_rounds=1, strategy__fraction_train=1.0)
    loop = start(flat, TamperedGrid, clients=3, tamper=tamper)
    (line,) = (line for line in loop.lines if line["type"] == "round")
    assert [(drop["client"], drop["reason"]) for drop in line["dropped"]] == [("1", "report")] and line["good"] == 2


def test_what_reports_decide_cannot_be_private(with_client_half, in_process):
    in_process(with_client_half)
    flat = {"method": "last-layers-small-e", "privacy.clip": 1.0, "privacy.noise-multiplier": 1.0}
    settings = read_settings(flat | {"strategy.weighting": "uniform", "head.start": "random"})
    with pytest.raises(ConfigError, match="'last-layers-small-e' goes by what devices report"):
        strategies.find(settings.method).check(settings)


def test_a_run_of_the_command(with_client_half, tiny_bert, tmp_path):
    """Slots only where the mask says so, finite metrics, an adapter that stock PEFT loads."""
    rows = [{"text": f"number {i} is {'even' if i % 2 else 'odd'}", "label": ("odd", "even")[i % 2]} for i in range(120)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "federation.toml").write_text("num-supernodes = 4\n")
    changes = SMALL | {
        "num-server-rounds": 2,
        "strategy.options": "{layers = 2, pull = 0.5}",
        "method": "last-layers-small-e",
        "model.name": str(tiny_bert),
        "data.path": str(tmp_path / "rows.jsonl"),
        "data.partition": "iid",
        "data.test": 0.2,
        "data.validation": 0.1,
        "run.dir": str(tmp_path),
        "run.name": "run",
    }
    overrides = [item for key, value in changes.items() for item in ("-c", f"{key}={json.dumps(value)}")]
    federation = ["--federation-config", str(tmp_path / "federation.toml")]
    done = fedara(with_client_half, "run", str(ROOT), "--engine", "inprocess", *federation, *overrides)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    facts = json.loads((folder / "federated.json").read_text())
    assert facts["outcome"] == "completed"
    in_last = [".layer.0." not in name for name in facts["modules"]]
    assert facts["alive-per-module"] == facts["ranks"] == [4 * last for last in in_last]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [line[key] for line in lines for key in ("loss", "accuracy", "client-loss", "test-loss") if key in line]
    assert len(numbers) >= 8 and np.isfinite(numbers).all()
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    model = PeftModel.from_pretrained(base, folder / "adapter")
    assert sum(name.endswith("lora_E.default") for name, _ in model.named_parameters()) == sum(in_last)


# -- a part of another package ------------------------------------------------------------
DECLARATION = '[project.entry-points."fedara_flwr.parts"]\nbiases = "bias_lora:BIASES"\n'


def biased(model: Path, **changes) -> dict:
    return config(model, method="bias-lora", num_server_rounds=2, **changes)


def test_the_parts_own_test_passes(with_part, in_process):
    in_process(with_part)
    found = runpy.run_path(str(with_part.parent / "source" / "test_bias_lora.py"))
    assert [name for name in found if name.startswith("test_")] == ["test_the_part"]
    found["test_the_part"]()


def test_a_run_trains_counts_and_exports_the_part(with_part, in_process, tiny_bert, tmp_path):
    """All biases and no other parameter of the backbone differ in the merged model, by what the checkpoint has."""
    in_process(with_part)
    flat = biased(tiny_bert, run__dir=str(tmp_path), run__name="run", run__checkpoint_every=1)
    folder = run(flat, CLIENTS).path
    facts = json.loads((folder / "federated.json").read_text())
    assert (facts["outcome"], facts["exported"]) == ("completed", "model") and (folder / "report.html").exists()
    before, after = (
        dict(AutoModelForSequenceClassification.from_pretrained(path, num_labels=12).named_parameters())
        for path in (tiny_bert, folder / "model")
    )
    state, spec = open_run(folder).state, open_run(folder).model.spec
    assert set(state.arrays) == {"B", "A", "head", "biases"} == set(state.norms)
    size = sum(parameter.numel() for name, parameter in before.items() if name.endswith(".bias") and "classifier" not in name)
    assert state.arrays["biases"].shape == (size,) and (state.arrays["biases"] != 0).mean() > 0.5
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if line["type"] == "client":
            assert line["bytes-down"]["biases"] == line["bytes-up"]["biases"] == 4 * size
        if line["type"] == "round":
            assert line["good"] == 3 and line["bytes"]["up.biases"] == line["bytes"]["down.biases"] == 3 * 4 * size
    starts = np.cumsum([0, *(parameter.size for parameter in spec.parameters("biases"))])
    moved = {
        p.name: state.arrays["biases"][start:][: p.size] for p, start in zip(spec.parameters("biases"), starts, strict=False)
    }
    adapted = {f"{module.name}.weight" for module in spec.modules}
    head = {parameter.name for parameter in spec.head}
    for name, parameter in before.items():
        if name.endswith("pooler.dense.weight"):  # the identity here
            continue
        change = (after[name] - parameter).detach().numpy().reshape(-1)
        if name in moved:
            np.testing.assert_allclose(change, moved[name], atol=1e-7)
        elif name not in head:
            assert change.any() == (name in adapted), name


def test_each_client_starts_from_the_mean_of_the_part(with_part, in_process, tiny_bert):
    """What is merged is the weighted mean of differences; what goes down in round 2 is that, and the nodes train on from it."""
    in_process(with_part)
    loop, grid = prepare(biased(tiny_bert, strategy__fraction_train=1.0), clients=3)
    arrays, sent = loop.initial_arrays(), []
    for number in (1, 2):
        messages = list(loop.configure_train(number, arrays, {}, grid))
        answers = list(grid.send_and_receive(messages))
        arrays, _ = loop.aggregate_train(number, answers)
        weights = [answer.content.metric_records["metrics"]["num-examples"] for answer in answers]
        values = [answer.content.array_records["arrays"]["biases"].numpy() for answer in answers]
        sent.append(
            (messages[0].content.array_records["arrays"]["biases"].numpy(), np.average(values, axis=0, weights=weights))
        )
        np.testing.assert_allclose(loop.state.arrays["biases"], sent[-1][1], atol=1e-7)
    assert not sent[0][0].any() and np.abs(sent[1][0]).max() > 1e-3
    np.testing.assert_allclose(sent[1][0], sent[0][1], atol=1e-7)
    steps = 2 * 2e-3  # AdamW moves a number by its learning rate in a step, at most
    assert 0 < np.abs(sent[1][1] - sent[1][0]).max() < 1.1 * steps


@pytest.mark.parametrize(
    "changes",
    [
        {"train__cache": "off"},
        {"strategy__robust": "multi-krum"},
        {"wire__down": "int8", "wire__up": "int4"},
    ],
    ids=["cache", "krum", "wire"],
)
def test_all_that_is_done_with_parts_is_done_with_it(with_part, in_process, tiny_bert, changes):
    """The cached output of lower blocks must not be used, where their biases differ by client: the same bits without."""
    in_process(with_part)
    loop = start(biased(tiny_bert, **changes))
    assert [line["good"] for line in loop.lines if line["type"] == "round"] == [3, 3]
    assert all(np.isfinite(values).all() for values in loop.state.arrays.values()) and loop.state.arrays["biases"].any()
    if "train__cache" in changes:
        plain = start(biased(tiny_bert))
        assert all(np.array_equal(plain.state.arrays[part], values) for part, values in loop.state.arrays.items())
    if "wire__up" in changes:  # half a byte a number, and four for each vector
        (line,) = [line for line in loop.lines if line["type"] == "client" and line["round"] == 1][:1]
        size, vectors = loop.spec.size("biases"), len(loop.spec.parameters("biases"))
        assert line["bytes-up"]["biases"] == (size + 1) // 2 + 4 * vectors


class Without(InProcessGrid):
    """Node 1001 has not installed the package."""

    def _call(self, message):
        reply = super()._call(message)
        if message.metadata.message_type == "query.whoami" and message.metadata.dst_node_id == 1001:
            who = reply.content.config_records["whoami"]
            who["parts"] = who["parts"].replace(",biases", "")
        return reply


def test_a_node_without_the_declaration_is_left_out_in_one_line(with_part, in_process, tiny_bert):
    in_process(with_part)
    loop, grid = prepare(biased(tiny_bert), Without)
    loop.start(grid, loop.initial_arrays(), 2)
    assert loop.roster.left_out() == {"node 1001": "client '1' does not know the part 'biases' that this run needs"}
    assert not any("1" in line["sampled"] for line in loop.lines if line["type"] == "round")


def test_a_node_without_the_declaration_refuses_the_plan(with_part, in_process, tiny_bert, monkeypatch):
    """A server that asks it all the same gets a line, and nothing is trained."""
    in_process(with_part)
    loop, grid = prepare(biased(tiny_bert))
    message, *_ = loop.configure_train(1, loop.initial_arrays(), {}, grid)
    modules = len(loop.spec.modules)
    assert "biases" in plan_from_content(message.content, modules).sent
    with monkeypatch.context() as patch:
        patch.setattr(parts, "declared", lambda: parts.BUILT_IN)
        with pytest.raises(Rejected, match="plan: .*part 'biases' is not declared") as caught:
            plan_from_content(message.content, modules)
    assert len(str(caught.value).splitlines()) == 1 and caught.value.reason == "plan"


def test_a_server_without_the_declaration_refuses_in_one_line(tmp_path):
    """The method is there, its part is not."""
    text = PAGE[PART_AT:HOOKS_AT]
    assert DECLARATION in text
    target = install(text.replace(DECLARATION, ""), tmp_path)
    done = fedara(target, "run", str(ROOT), "--engine", "inprocess", "-c", "method='bias-lora'", "-c", f"run.dir='{tmp_path}'")
    declared = ", ".join(parts.BUILT_IN)
    line = f"error: method = 'bias-lora': part 'biases' is not declared, declared are {declared}\n"
    assert (done.returncode, done.stderr) == (1, line)


DECLARATIONS = {
    "absent": ("nowhere_at_all:PART", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
    "leaves": ("odd_parts:LEAVES", "AttributeError: module 'odd_parts' has no attribute 'LEAVES'"),
    "no-part": ("odd_parts:NAME", "odd_parts:NAME is no Part of the backbone's parameters (with `holds`, without `width`)"),
    "slots": ("odd_parts:SLOTS", "odd_parts:SLOTS is no Part of the backbone's parameters (with `holds`, without `width`)"),
    "renamed": ("odd_parts:NORMS", "odd_parts:NORMS has the name 'norms', its entry point 'renamed'"),
    "head": ("odd_parts:HEAD", "this package has a part of that name"),
    "delta": ("odd_parts:DELTA", "this package has a part of that name"),
}


def test_declarations_that_cannot_be_used_are_left_out(tmp_path, in_process, caplog):
    """Each with a line that says why; the sound one beside them is there, and so are the built-in ones."""
    (tmp_path / "odd_parts.py").write_text(
        "from fedara_flwr.model.parts import Part\n"
        "rate, holds = (lambda train: 0.1), (lambda name: 'Norm' in name)\n"
        "NAME, SLOTS = 'norms', Part('slots', rate, width=lambda module: 1, holds=holds)\n"
        "NORMS, HEAD, DELTA = (Part(name, rate, holds=holds) for name in ('norms', 'head', 'delta'))\n"
    )
    info = tmp_path / "odd_parts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-parts\nVersion: 1.0\n")
    points = [f"{name} = {value}" for name, (value, _) in DECLARATIONS.items()] + ["norms = odd_parts:NORMS"]
    (info / "entry_points.txt").write_text("\n".join(["[fedara_flwr.parts]", *points]))
    in_process(tmp_path)
    with caplog.at_level("WARNING", logger="fedara_flwr"):
        found = parts.declared()
    assert list(found) == [*parts.BUILT_IN, "norms"] and all(found[name] is part for name, part in parts.BUILT_IN.items())
    said = {f"part {name!r} of odd-parts 1.0 cannot be used: {reason}" for name, (_, reason) in DECLARATIONS.items()}
    assert {record.getMessage() for record in caplog.records} == said


# -- plug-ins that are broken ------------------------------------------------------------
BROKEN = {
    "absent": ("nowhere_at_all:Method", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
    "classless": ("stranger:Nothing", "AttributeError: module 'stranger' has no attribute 'Nothing'"),
    "raises": ("stranger_raises:Method", "RuntimeError: first line second line"),
    "leaves": ("stranger_leaves:Method", "SystemExit: 3"),
    "syntax": ("stranger_syntax:Method", "SyntaxError: "),
    "function": ("stranger:function", "stranger:function is no subclass of Method"),
    "unrelated": ("stranger:Unrelated", "stranger:Unrelated is no subclass of Method"),
    "renamed": ("stranger:Sound", "stranger:Sound has the name 'sound', its entry point 'renamed'"),
    "nameless": ("stranger:Nameless", "stranger:Nameless has the name '', its entry point 'nameless'"),
    "optionless": ("stranger:Optionless", "stranger:Optionless.Options is no pydantic model"),
    "untitled": ("stranger:Untitled", "stranger:Untitled: title and paper must be texts"),
    "fedara": ("stranger:Impostor", "this package has a method of that name"),
}
MODULES = {
    "stranger": """
from pydantic import Field
from fedara_flwr.keys import Group
from fedara_flwr.strategies.base import Method
def function(): ...
class Unrelated: ...
class Sound(Method):
    name = "sound"
    title = "[red]brackets[/red] are text"
    class Options(Group):
        words: list[str] = Field(default_factory=lambda: ["a"], description="some words")
        limit: int | None = None
        needed: float
class Nameless(Method): ...
class Optionless(Method):
    name, Options = "optionless", dict
class Untitled(Method):
    name, title = "untitled", 5
class Impostor(Method):
    name = "fedara"
""",
    "stranger_raises": "raise RuntimeError('first line\\nsecond line')",
    "stranger_leaves": "raise SystemExit(3)",
    "stranger_syntax": "def (",
}


@pytest.fixture
def strangers(tmp_path, monkeypatch) -> None:
    """An installed package with one sound method and every kind of broken one."""
    for name, code in MODULES.items():
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    info = tmp_path / "strange_methods-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strange-methods\nVersion: 1.2\n")
    points = [f"{name} = {value}" for name, (value, _) in BROKEN.items()] + ["sound = stranger:Sound"]
    (info / "entry_points.txt").write_text("\n".join(["[fedara_flwr.strategies]", *points]))
    monkeypatch.syspath_prepend(str(tmp_path))


def test_broken_plugins_leave_the_others_as_they_are(strangers):
    """A built-in method is never replaced, and not even looked for among plug-ins."""
    found = strategies.methods()
    assert found["fedara"].__module__ == "fedara_flwr.strategies.fedara" and strategies.find("fedara") is found["fedara"]
    assert strategies.find("sound") is found["sound"]
    assert not set(BROKEN) - {"fedara"} & set(found)
    assert "stranger_raises" not in sys.modules


@pytest.mark.parametrize("name", [name for name in BROKEN if name != "fedara"])
def test_a_broken_plugin_cannot_be_run_and_says_why(strangers, name):
    with pytest.raises(ConfigError) as caught:
        strategies.find(name)
    start = f"method = {name!r}: the plug-in of strange-methods 1.2 is broken: {BROKEN[name][1]}"
    assert str(caught.value).startswith(start) and len(str(caught.value).splitlines()) == 1


def test_the_list_shows_broken_plugins_with_their_reason(strangers, capsys):
    print_methods(Console(highlight=False, width=80))
    printed = capsys.readouterr().out
    blocks = {block.split()[0]: " ".join(block.split()) for block in printed.split("\n\n") if "plug-in of" in block}
    for name, (_, reason) in BROKEN.items():
        assert f"{name} broken plug-in of strange-methods 1.2 {reason}" in blocks[name]
    sound = blocks["sound"]
    assert "sound plug-in of strange-methods 1.2 [red]brackets[/red] are text" in sound
    assert (
        "words list[str] ['a'] some words" in sound and "limit int | None None" in sound and "needed number required" in sound
    )
    assert max(len(line) for line in printed.splitlines()) <= 80


def test_the_nearest_name_may_be_a_plugins(strangers):
    with pytest.raises(ConfigError, match="did you mean 'sound'"):
        strategies.find("sond")


def test_two_packages_may_not_share_a_name(strangers, tmp_path):
    info = tmp_path / "later-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zz-later\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[fedara_flwr.strategies]\nsound = stranger:Sound\n")
    first, second = strategies.plugins("sound")
    assert first.offer is not None and second.offer is None
    assert second.reason == f"{first.package} has a method of that name"


def test_a_decorated_class_does_not_replace_a_built_in_method():
    """Not even one that is called the same."""
    impostor = type("FedARA", (strategies.find("fedara"),), {})
    with pytest.raises(ValueError, match="'fedara' is empty or taken"):
        strategies.register(impostor)


# -- the page's tables ------------------------------------------------------------
def table(heading: str, column: int = 1) -> dict[str, str]:
    """First cell's names -> a row's cell, of all tables of a section."""
    section = PAGE[PAGE.index(heading) :]
    section = section[: section.find("\n## ", 1)]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {name: row[column] for row in rows if len(row) > column for name in re.findall(r"`([^`]+)`", row[0])}


def public(cls: type) -> set[str]:
    return {name for name in vars(cls) if not name.startswith("_")}


@pytest.mark.parametrize(("base", "heading"), [(Method, HOOKS), (terms.Term, CLIENT_HALF)])
def test_the_page_names_every_hook_and_no_other(base, heading):
    """With its parameters as they are called."""
    named = set(table(heading)) - {"State", "Client", "Reply"}
    if base is Method:
        sentence = re.search(r"To call, not to override: ([^;]+);", PAGE)[1]
        named.update(re.findall(r"`([^`]+)`", sentence))
    assert {re.sub(r"\(.*", "", name) for name in named} - {"__init__"} == public(base)
    for name in named:
        found = inspect.getattr_static(base, re.sub(r"\(.*", "", name))
        assert ("(" in name) == (inspect.isfunction(found) or isinstance(found, classmethod)), name
        if "(" in name and not name.startswith("__init__"):
            parameters = list(inspect.signature(getattr(base, name.partition("(")[0])).parameters)
            said = [each for each in name.partition("(")[2].rstrip(")").split(", ") if each]
            assert [each for each in parameters if each != "self"] == said, name


@pytest.mark.parametrize("cls", [State, Client, Reply])
def test_the_page_names_all_that_a_hook_is_given(cls):
    said = re.findall(r"`(\w+)`", table(HOOKS)[cls.__name__])
    assert said == [field.name for field in fields(cls)]


def test_the_page_tells_the_attributes_defaults():
    said = {name: cell.rstrip(" |") for name, cell in table(HOOKS, column=2).items() if "(" not in name and name.islower()}
    none = {frozenset(): "none", False: "no", "": "empty"}
    apart = ("calibration", "trained")
    found = {name: value for name, value in vars(Method).items() if name in said and name not in apart}
    assert {name: none.get(value, str(value)) for name, value in found.items()} == {name: said[name] for name in found}
    assert said["trained"] == ", ".join(("B", "E", "A", "head")) and Method.trained == frozenset(said["trained"].split(", "))
