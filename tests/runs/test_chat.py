"""`fedara chat`: the prompt it makes, its commands, what it prints, and runs that have nothing to say."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from conftest import TASKS
from rich.console import Console
from runs_helper import config
from test_output import save_model
from test_templates import CHAT, tokenizer
from typer.testing import CliRunner

from fedara_flwr import engine
from fedara_flwr.cli import app
from fedara_flwr.cli.chat import HELP, Chat, _streamer, chat
from fedara_flwr.keys import ConfigError
from fedara_flwr.runs.directory import find_run
from fedara_flwr.runs.keeper import open_run
from fedara_flwr.tasks.generation import say

NUMBERS = ("one", "two", "three")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("chat")


def make(root: Path, name: str, model: Path, rows: list[dict], **changes: object) -> Path:
    path = root / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    usual = {"num_server_rounds": 1, "data__path": str(path), "data__partition": "iid", "data__test": 0.1, "method": "fedlora"}
    flat = config(model, run__dir=str(root), run__name=name, **{**usual, "data__validation": 0.1, **changes})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedara_flwr.runs.keeper.write_report", lambda path: path / "report.html")  # pictures take seconds
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        return engine.run(flat, 4).path


@pytest.fixture(scope="module")
def run(root) -> Path:
    """A tiny Llama that has learnt so fast that it answers otherwise than before; its template has 96 places."""
    model = save_model(root / "llama", "llama", tie_word_embeddings=True, max_position_embeddings=96)
    rows = [{"prompt": f"what is number {i}?", "completion": NUMBERS[i % 3]} for i in range(60)]
    options = "generate = 0\nsystem = 'Be brief.'"
    more = {"train__learning_rate": 0.1, "train__steps": 8, "data__max_length": 48, "model__dtype": "float32"}
    return make(root, "talk", model, rows, data__task="causal-lm", data__options=options, **more)


@pytest.fixture
def talk(run) -> Chat:
    return Chat(run, most=16)


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=100, force_terminal=False)


def text(talk: Chat, ids: list[int]) -> str:
    return talk.template.tokenizer.decode(ids)


def turn(role: str, content: str) -> str:
    return f"<|turn|>{role}\n{content}<|end|>\n"


# -- the prompt ------------------------------------------------------------
def test_a_prompt_is_what_training_had_before_an_answer(talk):
    """The run's system text among it; what was said stands between."""
    ids = talk.prompt("what is number 3?")
    assert text(talk, ids) == turn("system", "Be brief.") + turn("user", "what is number 3?") + "<|turn|>assistant\n"
    task, encoded = talk.model.task, talk.model.learner
    from fedara_flwr.data.examples import Examples

    target = [["system", "Be brief."], ["user", "what is number 3?"], ["assistant", "one"]]
    row = task.encode(encoded.tokenizer, Examples(("one",), targets=(target,)), 64)
    assert row.ids[0][: len(ids)] == ids and row.labels[0].index(row.ids[0][len(ids)]) == len(ids)
    talk.keep("a", "b")
    middle = turn("user", "a") + turn("assistant", "b")
    assert text(talk, talk.prompt("c")) == f"{turn('system', 'Be brief.')}{middle}{turn('user', 'c')}<|turn|>assistant\n"


@pytest.mark.parametrize(
    "pieces, shown",
    [
        (("<think>\n\n", "</think>\n\n", "two ", "three"), "two three"),
        (("<think>", "\n\n</think>\n\ntwo"), "two"),
        (("<think>\n", "red is ", "one"), "<think>\nred is one"),
        (("two ", "three"), "two three"),
        (("<think>",), "<think>"),
        (("<think>\n\n</think>",), ""),
    ],
)
def test_what_a_template_opens_answers_with_is_not_shown(pieces, shown):
    thought = "('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') + m['content']"
    qwen = CHAT.replace("m['content']", thought)
    found: list[str] = []
    streamer = _streamer(tokenizer(qwen), found.append)
    for place, piece in enumerate(pieces):
        streamer.on_finalized_text(piece, stream_end=place == len(pieces) - 1)
    assert "".join(found) == shown


def test_another_system_text(run):
    assert text(Chat(run, 16, "Be kind."), Chat(run, 16, "Be kind.").prompt("a")).startswith(turn("system", "Be kind."))


def test_control_tokens_that_somebody_types_are_text(talk):
    ids = talk.prompt("a<|end|>\n<|turn|>assistant\nb")
    assert ids.count(talk.template.tokenizer.convert_tokens_to_ids("<|end|>")) == 2


def test_the_oldest_turns_go_first(talk):
    """80 places are for the prompt: as many whole turns as fit, the newest."""
    for number in ("one", "two", "three"):
        talk.keep(f"hello {number}", "world " * 10)
    sizes = [len(talk.prompt("red"))]
    shown = text(talk, talk.prompt("red"))
    assert sizes[0] <= 80 and "hello one" not in shown and "hello three" in shown
    assert shown.startswith(turn("system", "Be brief.")) and shown.endswith(turn("user", "red") + "<|turn|>assistant\n")
    first = shown.index("<|turn|>", 1)
    assert shown[first:].startswith("<|turn|>user\nhello")
    # one turn more would not have fitted
    gone = 2 if "hello two" in shown else 4
    messages = [{"role": "system", "content": "Be brief."}, *talk.turns[gone - 2 :], {"role": "user", "content": "red"}]
    ids = talk.template.tokenizer(talk.template.render(messages, answering=True), add_special_tokens=False)["input_ids"]
    assert len(ids) > 80
    assert len(talk.turns) == 6  # they are forgotten for the model alone


@pytest.mark.parametrize("most, allowed", [(16, 80), (400, 48)])
def test_a_question_longer_than_all_places_is_refused(run, most, allowed):
    """Nothing of it is cut away, nor of what stands before it; half of a small model's places are the prompt's at least."""
    talk = Chat(run, most)
    beside = len(talk.prompt("hello")) - 1
    fitting = "hello" + " hello" * (allowed - beside - 1)
    talk.keep("a", "b")
    assert len(talk.prompt(fitting)) == allowed and talk.left_out == 2
    line = f"the question has {allowed + 1} tokens with the system text and the template, allowed are {allowed}: "
    line += f"the model has 96 places, and {96 - allowed} are kept for the answer"
    with pytest.raises(ConfigError, match=f"^{line}$"):
        talk.prompt(fitting + " hello")


# -- voices ------------------------------------------------------------
def answer_of(run: Path, tuned: bool, most: int = 16) -> str:
    """What the run's model, or its base, says to a question; by the product's own loading, without a chat."""
    saved = open_run(run)
    weights = saved.method.weights(saved.state) if tuned else saved.model.unadapted()
    saved.model.load(weights)
    rendered = turn("system", "Be brief.") + turn("user", "what is number 3?") + "<|turn|>assistant\n"
    ids = saved.model.learner.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return say(saved.model.learner, [ids], most)[0].text


def test_the_voices_differ_and_are_the_run_and_its_base(run, talk):
    said, heard = [], []
    for voice in ("tuned", "base", "tuned"):
        pieces: list[str] = []
        said.append(talk.ask(talk.prompt("what is number 3?"), voice, pieces.append))
        heard.append("".join(pieces).strip())
    assert said == heard == [answer_of(run, True), answer_of(run, False), answer_of(run, True)] and said[0] != said[1]


def converse(run: Path, console: Console, monkeypatch, lines: list[str], **options: object) -> tuple[str, Chat]:
    """A conversation of these lines, until the input ends: what was shown, and the chat."""
    left, made = list(lines), []

    class Kept(Chat):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            made.append(self)

    def read(_: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    monkeypatch.setattr("fedara_flwr.cli.chat.Chat", Kept)
    monkeypatch.setattr(console, "input", read)
    monkeypatch.setattr(
        "fedara_flwr.cli.chat._write", lambda piece: console.print(piece, end="", markup=False, highlight=False)
    )
    chat(run, None, 16, "", bool(options.get("base", False)), console)
    assert not left
    return console.export_text(), made[0]


def test_commands(run, console, monkeypatch):
    """/base changes who answers, /both asks both, /clear forgets; what starts with a slash is no question."""
    lines = ["", "what is number 3?", "/base", "what is number 3?", "/both", "/clear", "what is number 3?", "/what", "/tuned"]
    shown, talk = converse(run, console, monkeypatch, lines)
    assert shown.startswith("talk  ") and HELP in " ".join(shown.split())
    said = [line.split()[0] for line in shown.splitlines() if line.split()[:1] in (["tuned"], ["base"])]
    # an answer, what /base says, an answer, what /both says, two answers, what /tuned says
    assert said == ["tuned", "base", "base", "base", "base", "tuned", "tuned"]
    for line in ("base answers from here on", "base and tuned answers from here on", "tuned answers from here on", "forgotten"):
        assert line in shown
    assert talk.voices == ("tuned",) and [turn["role"] for turn in talk.turns] == ["user", "assistant"]
    assert talk.turns[1]["content"] == answer_of(run, True)  # of two voices the tuned one's is remembered


def test_the_base_from_the_start_and_the_end(run, console, monkeypatch):
    shown, talk = converse(run, console, monkeypatch, ["what is number 3?", "/quit"], base=True)
    assert talk.voices == ("base",) and talk.turns[1]["content"] == answer_of(run, False)


def test_a_question_that_fails_is_one_line_and_not_remembered(run, console, monkeypatch):
    def fail(*_: object) -> str:
        raise RuntimeError("no [memory]\nat all")

    monkeypatch.setattr(Chat, "ask", fail)
    shown, talk = converse(run, console, monkeypatch, ["hello"])
    assert "error: no [memory]" in shown and "at all" not in shown and talk.turns == []


def test_that_turns_are_left_out_is_said_once_until_all_are_forgotten(run, console, monkeypatch):
    line = "the conversation is longer than the model reads: its oldest turns are left out"
    long = "hello " * 30
    shown, _ = converse(run, console, monkeypatch, ["hello", long, long, long, "/clear", "hello"])
    assert shown.count(line) == 1
    shown, _ = converse(run, console, monkeypatch, [long, long, long, "/clear", long, long])
    assert shown.count(line) == 2


def test_a_question_that_is_too_long_is_one_line_and_the_chat_goes_on(run, console, monkeypatch):
    console.width = 300
    shown, talk = converse(run, console, monkeypatch, ["/both", "hello " * 300, "hello"])
    assert shown.count("error: the question has ") == 1 and [turn["content"] for turn in talk.turns][:1] == ["hello"]


def test_a_line_that_is_no_text(run, console, monkeypatch):
    """Bytes of another encoding come as lone surrogates; those of UTF-8 are read as such."""
    shown, talk = converse(run, console, monkeypatch, ["a\udcff", "\udcc3\udca9"])
    assert shown.count("error: this line: it holds bytes that are no UTF-8 text") == 1
    assert [turn["content"] for turn in talk.turns][:1] == ["é"]


def test_ctrl_c_while_a_model_is_loaded_leaves_no_half_of_it(run, talk, monkeypatch):
    """Whoever speaks next is loaded anew."""

    def interrupt(weights: object) -> None:
        raise KeyboardInterrupt

    asked = talk.prompt("what is number 3?")
    before = talk.ask(asked, "tuned", str)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(talk.model, "load", interrupt)
        talk.ask(asked, "base", str)
    talk.model.load(talk.model.unadapted())  # as far as it had come
    assert talk.ask(asked, "tuned", str) == before


# -- the command ------------------------------------------------------------
def command(*words: object, given: str | bytes | None = None):
    return CliRunner().invoke(app, ["chat", *map(str, words)], input=given)


def test_one_prompt_prints_the_answer_alone(run):
    tuned, base = answer_of(run, True), answer_of(run, False)
    for extra, expected in (((), tuned), (("--base",), base)):
        done = command(run, "--prompt", "what is number 3?", "--max-tokens", 16, *extra)
        assert done.exit_code == 0 and done.stdout.strip() == expected.strip() and done.stdout.endswith("\n")
    done = command(run, "--prompt", "-", "--max-tokens", 16, given="what is number 3?\n")
    assert done.stdout.strip() == tuned.strip()
    done = command(run, "--prompt", "what is number 3?", "--max-tokens", 2)
    assert done.stdout.strip() == answer_of(run, True, 2)


def test_an_answer_that_is_cut_is_said(run, console, monkeypatch):
    """Of one prompt apart from the answer; an answer that ends by itself is no cut one."""
    line = "the answer is cut after {} tokens (--max-tokens)"
    done = command(run, "--prompt", "what is number 3?", "--max-tokens", 2)
    assert done.stderr == line.format(2) + "\n" and "cut" not in done.stdout
    talk = Chat(run, 16)
    assert talk.ask(talk.prompt("what is number 3?"), "base", str) and talk.cut == line.format(16)
    with monkeypatch.context() as patch:
        patch.setattr("fedara_flwr.tasks.generation.ends", lambda _: list(range(len(talk.model.learner.tokenizer))))
        talk.ask(talk.prompt("what is number 3?"), "base", str)
    assert talk.cut == ""
    shown, _ = converse(run, console, monkeypatch, ["/base", "what is number 3?"])
    assert line.format(16) in shown


def test_a_run_is_found_by_its_name(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    (run.parent / "runs").mkdir(exist_ok=True)
    (run.parent / "runs" / "talk").symlink_to(run)
    assert find_run("talk").name == "talk"
    assert command("talk", "--prompt", "hello", "--max-tokens", 1).exit_code == 0


def refused(*words: object, given: bytes | None = None) -> str:
    done = command(*words, given=given)
    assert done.exit_code == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


def test_nothing_to_ask(run):
    assert "--prompt: there is nothing in it" in refused(run, "--prompt", "  ")


def test_a_prompt_that_cannot_be_asked(run):
    wrong = "it holds bytes that are no UTF-8 text"
    assert refused(run, "--prompt", "a\udcff") == f"error: --prompt: {wrong}\n"
    assert refused(run, "--prompt", "-", given=b"a\xffb") == f"error: --prompt: {wrong}\n"
    assert refused(run, "--prompt", "hello", "--system", "\ud800") == f"error: --system: {wrong}\n"
    assert "error: the question has " in refused(run, "--prompt", "hello " * 300)


def test_what_is_no_run(tmp_path):
    assert str(tmp_path) in refused(tmp_path, "--prompt", "hello")


def test_a_run_of_another_task_has_nothing_to_say(root):
    rows = [{"text": f"{NUMBERS[i % 3]} thing {i}", "label": NUMBERS[i % 3]} for i in range(60)]
    model = save_model(root / "other", "llama", tokenizer(CHAT), tie_word_embeddings=True)
    run = make(root, "classes", model, rows, data__task="classification")
    assert refused(run, "--prompt", "hello") == (
        f"error: {run}: data.task = 'classification' has nothing to say, allowed are runs of causal-lm\n"
    )


def test_a_run_without_a_checkpoint(root, run):
    rows = [{"prompt": f"what is number {i}?", "completion": NUMBERS[i % 3]} for i in range(60)]
    more = {"data__task": "causal-lm", "data__options": "generate = 0", "run__checkpoint_every": 0, "model__dtype": "float32"}
    made = make(root, "bare", root / "llama", rows, data__max_length=48, **more)
    assert "no checkpoint that can be used (run.checkpoint-every = 0 writes none)" in refused(made, "--prompt", "hello")


def test_every_task_says_whether_it_talks():
    assert {name for name, task in TASKS.items() if task.talks} == {"causal-lm"}


# -- a tokenizer that changed -----------------------------------------------
def changed(run: Path, target: Path) -> Path:
    """A copy of the run whose model speaks in another template than it was taught in."""
    shutil.copytree(run, target)
    model = Path(json.loads((run / "config.json").read_text())["model.name"])
    shutil.copytree(model, target / "base")
    template = target / "base" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", "<|end|> "))
    flat = json.loads((target / "config.json").read_text()) | {"model.name": str(target / "base")}
    (target / "config.json").write_text(json.dumps(flat))
    return target


def test_a_template_that_changed_since_the_run_is_refused(run, tmp_path):
    """By all that opens a run; nothing is written."""
    other = changed(run, tmp_path / "talk")
    line = "its vocabulary, chat template or system text has changed since the run began"
    expected = f"error: {other}: model.name = {str(other / 'base')!r}: {line}\n"
    assert refused(other, "--prompt", "hello") == expected
    done = CliRunner().invoke(app, ["export", str(other), "--format", "lora"])
    assert done.exit_code == 1 and done.stderr == expected and not list(other.glob("exports/*"))
    with pytest.raises(ConfigError, match=line):
        engine.run(json.loads((other / "config.json").read_text()) | {"run.resume": str(other), "num-server-rounds": 2}, 4)


def test_of_a_run_that_keeps_no_digest_nothing_is_checked(run, tmp_path):
    other = changed(run, tmp_path / "talk")
    facts = json.loads((other / "federated.json").read_text())
    assert facts.pop("tokenizer") == open_run(run).model.learner.tokenizer_digest
    (other / "federated.json").write_text(json.dumps(facts))
    assert command(other, "--prompt", "hello", "--max-tokens", 1).exit_code == 0


# -- processes ------------------------------------------------------------
SLOW = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from fedara_flwr.cli import app
import fedara_flwr.cli.chat
chat = sys.modules["fedara_flwr.cli.chat"]
write, pauses = chat._write, [60] * int(os.environ.get("PAUSES", 0))
chat._write = lambda text: (write(text), text.strip() and pauses and time.sleep(pauses.pop()))
app()
"""


def start(*words: object, **options: object) -> subprocess.Popen:
    """`fedara chat`; with PAUSES = 1 in its environment of a model that takes a minute for its first word."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, "-c", SLOW, "chat", *map(str, words)], text=True, **pipes)


def read_until(process: subprocess.Popen, pattern: str) -> str:
    """What a process has written when the pattern matches it."""
    shown, deadline = b"", time.monotonic() + 120
    while not re.search(pattern, shown.decode(errors="replace"), re.DOTALL):
        assert select.select([process.stdout], [], [], deadline - time.monotonic())[0], shown
        piece = os.read(process.stdout.fileno(), 1000)
        assert piece, shown + process.stderr.read().encode()
        shown += piece
    return shown.decode(errors="replace")


def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_chat(run):
    process = start(run, "--max-tokens", 48, env=os.environ | {"PAUSES": "1"})
    process.stdin.write("what is number 3?\n")
    process.stdin.flush()
    read_until(process, r"tuned +\S")
    process.send_signal(signal.SIGINT)
    read_until(process, r" …\n\nyou ")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (out.strip(), err, process.returncode) == ("", "", 0)


def test_ctrl_c_ends_the_only_answer(run):
    process = start(run, "--prompt", "what is number 3?", "--max-tokens", 48, env=os.environ | {"PAUSES": "1"})
    read_until(process, r"\S")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out.endswith("\n") and (err, process.returncode) == ("", 130)


def test_a_terminal_that_shows_few_letters(run):
    """Everything that it cannot show is a question mark."""
    process = start(run, "--max-tokens", 2, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    out, err = process.communicate("what is ünder 3?\n", timeout=120)
    assert (err, process.returncode) == ("", 0) and "/tuned: with it ? /both" in out and "error" not in out


@pytest.mark.parametrize(
    "words, line",
    [
        ((), "the standard input is closed, nothing can be typed: --prompt asks one question"),
        (("--prompt", "-"), "--prompt -: the standard input is closed"),
    ],
)
def test_a_closed_input(run, words, line):
    command = f'exec "$0" -c "$1" chat "$2" {" ".join(words)} <&-'
    done = subprocess.run(["bash", "-c", command, sys.executable, SLOW, str(run)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {line}\n")
