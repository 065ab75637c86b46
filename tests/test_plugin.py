"""Methods of other packages: docs/write-a-strategy.md, installed and run as it stands, and plug-ins that are broken."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from peft import PeftModel
from rich.console import Console
from runs_helper import SMALL, config, prepare, start
from transformers import AutoModelForSequenceClassification

from fedara_flwr import strategies
from fedara_flwr.cli.launch import read_config
from fedara_flwr.cli.listing import print_methods
from fedara_flwr.client import terms
from fedara_flwr.config import ConfigError, Settings, describe
from fedara_flwr.strategies.base import Method

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "write-a-strategy.md").read_text()
CLIENT_HALF = "## A half on the client"


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
    return install(PAGE[: PAGE.index(CLIENT_HALF)], tmp_path_factory.mktemp("method"))


@pytest.fixture(scope="module")
def with_client_half(tmp_path_factory) -> Path:
    return install(PAGE, tmp_path_factory.mktemp("both"))


def python(target: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`python …` with the package installed, no terminal and a line of 80 columns."""
    environment = os.environ | {"PYTHONPATH": f"{target}{os.pathsep}{ROOT}"}
    environment.pop("COLUMNS", None)
    return subprocess.run([sys.executable, *arguments], env=environment, cwd="/", capture_output=True, text=True)


def fedara(target: Path, *arguments: str) -> subprocess.CompletedProcess:
    return python(target, "-m", "fedara_flwr.cli", *arguments)


@pytest.fixture
def in_process(monkeypatch):
    """A function that makes an installed package this process's own, until the test ends."""

    def add(target: Path) -> None:
        for module in ("last_layers", "small_e"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setattr(terms, "TERMS", dict(terms.TERMS))  # loaded terms stay in it
        monkeypatch.syspath_prepend(str(target))
        terms._installed.cache_clear()

    yield add
    terms._installed.cache_clear()


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
        settings = Settings.from_flat(read_config(ROOT, overrides))
        assert (settings.method, settings.options) == ("last-layers", {"layers": 3, "mu": 0.1})
    with pytest.raises(ConfigError) as caught:
        read_config(ROOT, misspelt)
    assert f"# error: {caught.value}\n" in PAGE


def test_the_tutorials_own_test_passes(method_alone, in_process):
    """Two rounds of the default model, found by its entry point."""
    in_process(method_alone)
    runpy.run_path(str(method_alone.parent / "source" / "test_last_layers.py"))["test_two_rounds"]()


def test_more_layers_than_there_are_is_refused(method_alone, in_process, tiny_bert):
    in_process(method_alone)
    with pytest.raises(ConfigError, match=r"strategy\.options\.layers = 4: with this model allowed is up to 3"):
        prepare(config(tiny_bert, method="last-layers", strategy__options="layers = 4"))


def test_the_terms_act(with_client_half, in_process, tiny_bert):
    """The penalty makes E small; FedProx holds the head, which starts away from 0, near its start."""
    in_process(with_client_half)

    def after_two_rounds(**options: float):
        toml = "\n".join(f"{key} = {value}" for key, value in options.items())
        rounds = {"num_server_rounds": 2, "fedara__warmup_rounds": 0, "fedara__final_rounds": 0}
        return start(config(tiny_bert, method="last-layers-small-e", strategy__options=toml, **rounds))

    free, pulled, held = after_two_rounds(mu=0.0, pull=0.0), after_two_rounds(mu=0.0, pull=100.0), after_two_rounds(mu=100.0)
    assert pulled.plan(1, "0").terms == {"prox": {"mu": 0.0}, "small-e": {"weight": 100.0}}
    e_free, e_pulled = (np.abs(strategy.state.arrays["E"]).sum() for strategy in (free, pulled))
    assert 0 < e_pulled < 0.9 * e_free
    first = free.start_head()
    moved = [np.abs(strategy.state.arrays["head"] - first).sum() for strategy in (free, held)]
    assert 0 < moved[1] < 0.9 * moved[0]


def test_a_run_of_the_command(with_client_half, tiny_bert, tmp_path):
    """Slots only where the mask says so, finite metrics, an adapter that stock PEFT loads."""
    rows = [{"text": f"number {i} is {'even' if i % 2 else 'odd'}", "label": ("odd", "even")[i % 2]} for i in range(120)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "federation.toml").write_text("num-supernodes = 4\n")
    changes = SMALL | {
        "num-server-rounds": 2,
        "strategy.warmup-rounds": -1,
        "strategy.final-rounds": -1,
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
    "keyless": ("stranger:Keyless", "stranger:Keyless: title and paper must be texts, keys a tuple of texts"),
    "fedara": ("stranger:Impostor", "this package has a method of that name"),
}
MODULES = {
    "stranger": """
from pydantic import Field
from fedara_flwr.config import Group
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
class Keyless(Method):
    name, keys = "keyless", "adapter.rank"
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
    assert first.method is not None and second.method is None
    assert second.reason == f"{first.package} has a method of that name"


def test_a_decorated_class_does_not_replace_a_built_in_method():
    """Not even one that is called the same."""
    impostor = type("FedARA", (strategies.find("fedara"),), {})
    with pytest.raises(ValueError, match="'fedara' is empty or taken"):
        strategies.register(impostor)


def test_methods_name_keys_that_exist():
    for name, cls in strategies.built_in().items():
        assert set(cls.keys) <= set(describe()), name


@pytest.mark.parametrize("base", [Method, terms.Term])
def test_the_page_names_every_hook(base):
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    helpers = set(re.findall(r"`(\w+)\(", PAGE[PAGE.index("To call, not to override") :]))
    named = {name for row in rows for name in re.findall(r"`(\w+)", row)} | helpers
    assert {name for name in vars(base) if not name.startswith("_")} <= named
