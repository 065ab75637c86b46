"""What the documents say can be done can be done: their commands, code, links and paths; slow: commands run as they stand.

Tutorials (docs/write-a-….md) are run by tests/strategies/test_plugin.py and tests/tasks/test_task_plugin.py, the README's
Python by tests/runs/test_export_command.py. Here they are only looked at.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import typer
import yaml
from flwr.cli.app import app as flower
from typer.testing import CliRunner

from fedara_flwr import __version__
from fedara_flwr.cli import app as fedara
from fedara_flwr.cli.launch import _parse_override, read_config
from fedara_flwr.cli.simulation import Simulation
from fedara_flwr.keys import ConfigError
from fedara_flwr.node.settings import NodeSettings

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MEASURED = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("benchmarks/*/README.md"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]
DEFAULTS = read_config(ROOT, [])
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
VARIABLES = set(re.findall(r"^([A-Z]+) *[?:]?=", MAKEFILE, re.MULTILINE))
FOLDERS = ("benchmarks/", "configs/", "docker/", "docs/", "fedara_flwr/", "tests/")
COMMANDS = {"fedara": typer.main.get_command(fedara), "flwr": typer.main.get_command(flower)}
# of others, and of a shell: what they are asked is theirs
OTHERS = set(". cd cp export head mkdir od scp sed ssh sudo tr umask".split())
OTHERS |= set("git lm_eval loginctl pkg podman ray rsync systemctl tensorboard".split())
THEIRS = {"convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "docs/benchmark-report.md"}  # llama.cpp's, PicoClaw's
MADE = {"docker/device.lock"}  # by docker/lock.sh


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    title: str
    text: str


class Command(NamedTuple):
    """One command of a block, without the variables set before it.

    Attributes:
        said: the line that it stands on.
        refused: the page says that it ends with an error.
    """

    page: str
    line: int
    words: list[str]
    said: str
    refused: bool


def read(page: str) -> str:
    return (ROOT / page).read_text()


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```[ ]*$", "", text, flags=re.MULTILINE | re.DOTALL)


def blocks(page: str, *languages: str) -> Iterator[Block]:
    text = read(page)
    for found in re.finditer(r"^```(\w*)([^\n]*)\n(.*?)^```[ ]*$", text, re.MULTILINE | re.DOTALL):
        if not languages or found[1] in languages:
            yield Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2].strip(), found[3])


def single(line: str) -> Iterator[list[str]]:
    """The commands of a line of a shell."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split, words.commenters = True, "#"
    command: list[str] = []
    redirected = False
    for word in [*words, ";"]:
        if redirected:
            redirected = False
        elif set(word) <= set("();<>|&"):
            redirected = bool(set(word) & set("<>"))
            while command and re.fullmatch(r"\w+=.*", command[0], re.DOTALL):
                del command[0]
            if command and not redirected:
                yield command
                command = []
        else:
            command.append(word)


def commands(page: str) -> Iterator[Command]:
    for block in blocks(page, "bash", "sh", "console"):
        lines = block.text.replace("\\\n", "  ").splitlines()
        for number, line in enumerate(lines):
            after = lines[number + 1] if number + 1 < len(lines) else ""
            for words in single(line.removeprefix("$ ")):
                yield Command(page, block.line + 1 + number, words, line.partition("  #")[0].strip(), "# error:" in after)


EVERY = [command for page in PAGES for command in commands(page)]


def in_text(page: str) -> Iterator[str]:
    """What stands between backticks on one line, outside of blocks."""
    yield from re.findall(r"`([^`\n]+)`", prose(read(page)))


# -- commands ----------------------------------------------------------------
def parse(command: click.Command, words: list[str]) -> list[dict[str, object]]:
    """By the command's own parser; the parameters of the command and of the one below it that is asked for."""
    context = command.make_context(command.name, list(words))
    if not isinstance(command, click.Group):
        return [context.params]
    _, below, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    return [context.params, *parse(below, rest)]


def own_names(page: str) -> set[str]:
    """Methods, tasks and the like that the page's code brings: what is said of them is tested where they are installed."""
    return set(re.findall(r'^    name = "([\w-]+)"$', read(page), re.MULTILINE))


def check_run_config(text: str, page: str, refused: bool = False) -> None:
    """Keys that there are, with values that a run would take; of files only the names."""
    if "…" in text:
        return
    text = str(ROOT / text) if text.startswith(FOLDERS) else text
    given = _parse_override(text)
    assert given.keys() <= DEFAULTS.keys(), set(given) - set(DEFAULTS)
    if refused or own_names(page) & set(map(str, given.values())):
        return
    without_files = re.sub(r"data\.path='[^']*' ?", "", text)
    read_config(ROOT, [without_files] if without_files else [])


def check_make(words: list[str], page: str) -> None:
    for word in words:
        name, equals, value = word.partition("=")
        assert name in (VARIABLES if equals else TARGETS), word
        if name == "CONFIG":
            check_run_config(value, page)
        if name == "ENGINE":
            assert value in ("flower", "inprocess")


def check_click(name: str, words: list[str], page: str, refused: bool = False) -> None:
    for params in parse(COMMANDS[name], words):
        given = params.get("run_config") or params.get("run_config_overrides") or []
        for text in given:
            check_run_config(text, page, refused)
        federation = str(params.get("federation_config") or "FILE")
        if federation != "FILE":
            Simulation.read(ROOT / federation)


@cache
def site() -> set[str]:
    """The names of the files that `fedara deploy init` writes."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["deploy", "init", "--server", "fed.example.org", "--nodes", "1", "--out", f"{folder}/site"]
        done = CliRunner().invoke(fedara, words)
        assert done.exit_code == 0, done.output
        return {path.name for path in Path(folder).rglob("*")}


def check_sh(words: list[str], page: str) -> None:
    """A script of this repository, or one that `fedara deploy init` writes."""
    name = re.sub("^(~/)?fedara-flwr/", "", words[0])
    assert (ROOT / name).is_file() or name in site(), name
    if "--run-config" in words:
        check_run_config(words[words.index("--run-config") + 1], page)


def check_python(words: list[str]) -> None:
    if words[0] == "-c":
        compile(words[1], "-c", "exec")
    elif words[0] != "-m":
        assert words[0] in THEIRS or (ROOT / words[0]).is_file(), words[0]


def check_pip(words: list[str]) -> None:
    for word in words:
        for extra in re.findall(r"^(?:fedara-flwr|\.)\[([\w,]+)\]", word):
            assert set(extra.split(",")) <= PROJECT["project"]["optional-dependencies"].keys(), word
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file()


def check_docker(words: list[str]) -> None:
    """A file that there is, and arguments that it takes."""
    if words[0] == "build":
        text = (ROOT / words[words.index("--file") + 1]).read_text()
        given = {words[i + 1].partition("=")[0] for i, word in enumerate(words) if word == "--build-arg"}
        assert given <= set(re.findall(r"^ARG (\w+)", text, re.MULTILINE))


@pytest.mark.parametrize("command", EVERY, ids=lambda command: f"{command.page}:{command.line}")
def test_a_command_can_be_given_like_this(command):
    program, words, page = command.words[0].rpartition("/")[2], command.words[1:], command.page
    for word in words:
        if word.startswith(FOLDERS) and not set(word) & set("…*"):
            assert (ROOT / word).exists(), word
    if program == "make":
        check_make(words, page)
    elif program in COMMANDS:
        check_click(program, words, page, command.refused)
    elif program in ("sh", "bash"):
        check_sh(words, page)
    elif program in ("python", "python3"):
        check_python(words)
    elif program == "pip":
        check_pip(words)
    elif program == "docker":
        check_docker(words)
    else:
        assert program in OTHERS, f"{program}: neither this project's nor one of OTHERS"


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_a_sentence(page):
    """They may leave out what follows: `fedara export`, `make run CONFIG=…`."""
    for said in in_text(page):
        program, _, rest = said.removeprefix(".venv/bin/").partition(" ")
        if program == "make" and rest:
            check_make(shlex.split(rest), page)
        if program not in COMMANDS or not rest:
            continue
        try:
            check_click(program, shlex.split(rest), page)
        except (click.MissingParameter, click.exceptions.Exit, click.exceptions.NoArgsIsHelpError):
            pass
        except click.BadOptionUsage as error:
            assert "requires an argument" in error.format_message(), said


def test_what_is_looked_at_is_what_the_pages_show():
    """So that no change of the pages' form makes the tests above pass over everything."""
    programs = Counter(Path(command.words[0]).name for command in EVERY)
    assert len(EVERY) > 60 and {"make", "fedara", "flwr", "sh", "pip"} <= programs.keys() and programs["make"] > 20
    assert [list(single(line)) for line in ("A=1 make run  # a 'b", "x 'a; b' && (y | z) > out", "# all", "export A=1")] == [
        [["make", "run"]],
        [["x", "a; b"], ["y"], ["z"]],
        [],
        [["export", "A=1"]],
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["fedara", "run", "--enigne", "flower"],
        ["fedara", "exprot", "NAME"],
        ["fedara", "run", "--federation-config", "federations.toml"],
        ["fedara", "run", "-c", "metod='fedlora'"],
        ["fedara", "run", "-c", "method='fedlara'"],
        ["flwr", "run", ".", "--steam"],
        ["flwr", "run", ".", "--run-config", "seed='a'"],
        ["make", "rnu"],
        ["make", "run", "CONFG=seed=1"],
        ["make", "run", "CONFIG=sed=1"],
        ["sh", "docker/install-servers.sh"],
        ["python", "benchmarks/none.py"],
        ["pip", "install", ".[privat]"],
        ["docker", "build", "--file", "docker/device.Dockerfile", "--build-arg", "BAS=x"],
        ["docker", "build", "--file", "docker/devices.Dockerfile"],
        ["doker", "build"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_is_found(words):
    with pytest.raises((AssertionError, click.ClickException, ConfigError, OSError)):
        test_a_command_can_be_given_like_this(Command("README.md", 1, words, "", False))


# -- code --------------------------------------------------------------------
@pytest.mark.parametrize("page", PAGES)
def test_code_is_code(page):
    for block in blocks(page):
        where = f"{page}:{block.line}"
        if block.language == "python":
            compile(block.text, where, "exec")
        elif block.language == "yaml":
            yaml.safe_load(block.text)
        elif block.language == "toml":
            given = set(tomllib.loads(block.text))
            node = {field.alias for field in NodeSettings.model_fields.values()}
            federation = {field.alias for field in Simulation.model_fields.values()}
            known = any(given <= keys for keys in (DEFAULTS.keys(), node, federation))
            assert known or "title=" in block.title, f"{where}: {given} are no keys of a run, a node or a federation"


# -- links and paths ---------------------------------------------------------
def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#{1,6} +(.*?)(?: +#+)? *$", prose(path.read_text()), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        names.add(f"{name}-{found[name]}" if found[name] else name)
        found[name] += 1
    return names


def links(page: str) -> list[str]:
    """Relative ones, of text and of pictures."""
    text = re.sub(r"`[^`\n]+`", "", prose(read(page)))
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [link for link in found if not re.match(r"\w+:", link)]


@pytest.mark.parametrize("page", [*PAGES, *MEASURED])
def test_links_lead_somewhere(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}: {sorted(anchors(target))}"


def test_anchors_are_githubs(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("# `a b`: a *door*, [it](b.md)\n```bash\n# none\n```\n## Twice\n## Twice ##\n### Rank_one – d'accord\n")
    assert anchors(page) == {"a-b-a-door-it", "twice", "twice-1", "rank_one--daccord"}


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_a_sentence_exist(page):
    for said in in_text(page):
        for place in re.findall(rf"(?:^|(?<=\s))((?:{'|'.join(FOLDERS)})[\w./-]+)", said):
            assert place in MADE or (ROOT / place.partition("::")[0]).exists(), place


def tracked(*endings: str) -> list[Path]:
    """Files of the repository by their endings."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name.endswith(endings) and (ROOT / name).is_file()]


def test_pages_that_code_and_scripts_name_exist():
    for path in tracked(".py", ".sh", ".toml", ".yml", ".Dockerfile", ".env", "Makefile"):
        pages = r"\b(docs/[\w-]+\.md|(?:README|CONTRIBUTING|SECURITY)\.md)(?:#([\w-]+))?"
        for name, anchor in re.findall(pages, path.read_text()):
            assert name in THEIRS or not name.startswith("docs/") or (ROOT / name).is_file(), f"{path}: {name}"
            if anchor:
                assert anchor in anchors(ROOT / name), f"{path}: {name}#{anchor}"


def test_the_index_has_every_page():
    own = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert own <= {link.partition("#")[0] for link in links("docs/README.md")}
    assert "docs/README.md" in links("README.md")


def test_the_readme_is_read_in_some_minutes():
    text = re.sub(r"\A---\n.*?^---\n", "", read("README.md"), flags=re.MULTILINE | re.DOTALL)
    assert len(text.split()) <= 1000


def test_the_readmes_figures_are_those_measured():
    script = [sys.executable, "benchmarks/study/picture.py"]
    rows = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [re.fullmatch(r"(\w+), .*: (.*) on test for (\d+) MB \((\d) seeds?, 20 rounds\)", row) for row in rows]
    lines = {line.split(" |")[0].lower().replace("-", ""): line for line in read("README.md").split("\n| ") if " MB" in line}
    for name, test, mb, seeds in map(re.Match.groups, found):
        assert f"{test}, {mb} MB{' (one seed)' if seeds == '1' else ''} |" in lines[name]
    assert len(found) == 6


# -- one version, and files that others read ---------------------------------
def test_one_version():
    assert __version__ == yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION
    assert re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[1] == VERSION
    tags = {}
    for path in tracked(".md", ".sh", ".yml", ".Dockerfile", ".env", ".py"):
        tags |= dict.fromkeys(re.findall(r"\bfedara/\w+:(\d[\w.]*)", path.read_text()), path.name)
    assert set(tags) == {VERSION}, tags


def test_the_command_tells_the_version(capsys):
    with pytest.raises(click.exceptions.Exit):
        parse(COMMANDS["fedara"], ["--version"])
    assert capsys.readouterr().out == f"fedara-flwr {VERSION}\n"


def test_what_services_call_is_a_target():
    """The workflow, the hooks before a commit, the templates."""
    called = [path for path in tracked(".yml", ".yaml", ".md") if path.is_relative_to(ROOT / ".github")]
    names = {name for path in called for name in re.findall(r"(?:run: |`)make ([\w-]+)", path.read_text())}
    assert {"install", "lint", "test"} <= names <= TARGETS
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    dev = {re.match(r"[\w-]+", name)[0] for name in PROJECT["project"]["optional-dependencies"]["dev"]}
    assert {Path(hook["entry"].split()[0]).name for hook in hooks} <= dev


def test_make_help_lists_every_target():
    shown = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = dict(line.split(maxsplit=1) for line in shown.splitlines())
    assert lines.keys() == TARGETS and all(lines.values())


# -- run as they stand -------------------------------------------------------
# in this order; a word NAME is the last run's
RUN = (
    "make help",
    "make run ENGINE=inprocess",
    "make run CONFIG=\"method='fedlora' seed=1\"",
    "make run CONFIG=\"method='head' num-server-rounds=0\"",
    "make run CONFIG=\"privacy.clip=0.5 privacy.noise-multiplier=8.0 strategy.weighting='uniform' head.start='random'\"",
    "make run CONFIG=\"run.track='tensorboard'\"",
    "make run",
    ".venv/bin/fedara export NAME --format merged",
    ".venv/bin/fedara compare NAME NAME --target 0.76",
    ".venv/bin/fedara doctor",
    "fedara methods",
    "fedara tasks",
)
# what is not run here, and why; regular expressions of the whole command
NOT_RUN = {
    r"make (install|format|lint|test|test-all)": "they are how this test came to run",
    r"make test-versions .*": "gigabytes of environments; docs/versions.md",
    r"(cd|export|umask|mkdir|head|od|tr|\.) .*": "the shell's",
    r"make run CONFIG=.*(data\.path|data\.name)=.*": "the reader's data, or the Hub's; tests/data, tests/tasks",
    r"make run CONFIG=\"?data\.task='causal-lm'\"?": "ten minutes; tests/tasks/test_causal_lm.py with fewer rounds",
    r"make run CONFIG=\"wire\..*": "as `make run`; formats: tests/wire",
    r"\S*fedara chat .*": "needs a language model's run; tests/runs/test_chat.py",
    r"\S*fedara run --resume .*": "needs a run that was stopped; tests/deployment/test_simulation.py",
    r"flwr run .*": "its SuperLink stays; tests/deployment/test_flower.py",
    r"fedara run \. -c .*(last-layers|masked-).*": "the tutorials' own, which run elsewhere (above)",
    r"pip install .*": "packages; those of the tutorials: as above",
    r"RAY_ADDRESS=.*|\S*ray start .*": "a cluster; tests/deployment/test_ray_cluster.py",
    r"\S*tensorboard .*": "a server without an end",
    r"python convert_.*|lm_eval .*|BASE=.*": "other projects' tools",
}
# whole pages, by the beginnings of their names
NOT_RUN_PAGES = {
    "docs/deploy": "several machines; tests/deployment",
    "docs/containers": "images; tests/deployment",
    "docs/phone": "a phone",
    "docs/hub": "an account",
}


def test_every_command_is_run_or_has_a_reason_not_to_be():
    said = {command.said for command in EVERY}
    here = {command.said for command in EVERY if not command.page.startswith(tuple(NOT_RUN_PAGES))}
    left = [line for line in here if line not in RUN and not any(re.fullmatch(why, line, re.DOTALL) for why in NOT_RUN)]
    assert not left
    assert set(RUN) - said == {"make help"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The repository's files as they are now, with an environment in .venv: this one's."""
    folder = tmp_path_factory.mktemp("clone")
    for path in tracked(""):
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (folder / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != ".ready":
            (folder / ".venv" / path.name).symlink_to(path)
    (folder / ".venv" / ".ready").touch()
    return folder


def outcome(clone: Path, command: str) -> str:
    """What the command prints, run in the clone by a user whose home is new."""
    runs = sorted((clone / "runs").glob("*"), key=os.path.getmtime)
    assert runs or " NAME" not in command, "no command before it made a run"
    name = runs[-1].name if runs else ""
    env = os.environ | {
        "HOME": str(clone / "home"),
        "PATH": f"{clone / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(clone),
        "FLWR_HOME": str(clone / "home" / ".flwr"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # docs/running.md says to set it before the first flwr command
    }
    (clone / "home").mkdir(exist_ok=True)
    words = ["bash", "-c", command.replace(" NAME", f" {name}")]
    done = subprocess.run(words, cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", RUN)
def test_a_command_does_what_is_said(clone, command):
    """`pytest tests/test_documents.py -m slow` runs them in order; those with NAME need one before that made a run."""
    said = outcome(clone, command)
    if command.startswith("make run"):
        run = max((clone / "runs").iterdir(), key=os.path.getmtime)
        left = {path.name for path in run.iterdir()}
        assert "test: accuracy" in said and {"report.html", "config.json"} <= left
        assert ("model" if "'head'" in command else "adapter") in left
