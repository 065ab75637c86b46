"""`fedara chat`: talk to what a run made of a language model, offline, in the template that it was taught in."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import typer

from fedara_flwr.keys import ConfigError
from fedara_flwr.log import first_line

HELP = "/base: without what was trained · /tuned: with it · /both: one after the other · /clear: forget · /quit"
Voice = Literal["tuned", "base"]
MOST_TOKENS = 256


class Chat:
    """One conversation with a run's model.

    Attributes:
        name: the run's.
        said: which round's model it is, and why.
        voices: who answers, in this order: "tuned", "base" or both.
        turns: what was asked and answered.
        left_out: how many of the oldest turns did not fit into the last prompt.
        told: whether the user knows that turns are left out.
        cut: what is to be said of the last answer, which had no end; '' where it had one.
    """

    def __init__(self, run: Path, most: int = MOST_TOKENS, system: str = "") -> None:
        """Open the model that the run leaves on its base.

        Args:
            most: tokens of an answer.
            system: system text; "" = the run's.

        Raises:
            ConfigError: it is no run, has no checkpoint, or its model does not talk.
        """
        from fedara_flwr.runs.keeper import open_run
        from fedara_flwr.tasks import tasks
        from fedara_flwr.tasks.templates import Template

        saved = open_run(run)
        self.model, self.name, self.said = saved.model, run.name, str(saved.export["said"])
        if not self.model.task.talks:
            talking = ", ".join(name for name, task in tasks().items() if task.talks)
            line = f"data.task = {self.model.task.name!r} has nothing to say, allowed are runs of {talking}"
            raise ConfigError(f"{run}: {line}")
        self._weights = {"tuned": saved.method.weights(saved.state), "base": self.model.unadapted()}
        self._loaded: Voice | None = None
        self.template = Template(self.model.learner.tokenizer)
        self._most = min(most, self._places() // 2)
        text = system or getattr(self.model.task.options, "system", "")
        self._first = [{"role": "system", "content": text}] if text else []
        self.voices: tuple[Voice, ...] = ("tuned",)
        self.turns: list[dict[str, str]] = []
        self.left_out, self.told, self.cut = 0, False, ""

    def ask(self, prompt: list[int], voice: Voice, write: Callable[[str], None]) -> str:
        """One answer to what `prompt` made; `write` gets its pieces as they come."""
        from fedara_flwr.tasks.generation import say

        if self._loaded != voice:
            self._loaded = None  # Ctrl-C may come halfway
            self.model.load(self._weights[voice])
            self._loaded = voice
        streamer = _streamer(self.model.learner.tokenizer, write)
        self.cut = ""
        said = say(self.model.learner, [prompt], self._most, streamer)[0]
        self.cut = "" if said.stopped else f"the answer is cut after {self._most} tokens (--max-tokens)"
        return said.text

    def prompt(self, text: str) -> list[int]:
        """Token ids of the conversation and the question `text`, up to where the answer begins.

        The oldest turns are left out where all would be longer than the model's places less an answer.

        Raises:
            ConfigError: the question is longer by itself, with the system text and what the template adds.
        """
        places = self._places()
        limit, count = places - self._most, 0
        for left_out in range(0, len(self.turns) + 1, 2):
            turns = self.turns[left_out:]
            messages, _ = self.template.plain([*self._first, *turns, {"role": "user", "content": text}])
            rendered = self.template.render(messages, answering=True)
            ids: list[int] = self.template.tokenizer(rendered, add_special_tokens=False)["input_ids"]
            if (count := len(ids)) <= limit:
                self.left_out = left_out
                return ids
        with_what = "the system text and the template" if self._first else "the template"
        line = f"the model has {places} places, and {self._most} are kept for the answer"
        raise ConfigError(f"the question has {count} tokens with {with_what}, allowed are {limit}: {line}")

    def _places(self) -> int:
        config = self.model.adapted.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 2048)

    def keep(self, text: str, answer: str) -> None:
        """Remember a turn."""
        self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def clear(self) -> None:
        """Forget all turns."""
        self.turns.clear()
        self.told = False


def _streamer(tokenizer: Any, write: Callable[[str], None]) -> Any:
    """What transformers calls for every token of an answer; whole words go on, but not what the template opens answers with."""
    from transformers import TextStreamer

    from fedara_flwr.tasks.generation import opening

    opens, held = opening(tokenizer), ""

    def go_on(text: str, stream_end: bool = False) -> None:
        nonlocal opens, held
        held += text
        begun = held.lstrip()
        if opens and not stream_end and opens.startswith(begun.rstrip()):
            return  # it may be the opening yet
        write(begun.removeprefix(opens).lstrip() if opens and begun.startswith(opens) else held)
        opens, held = "", ""

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = go_on  # type: ignore[method-assign]
    return streamer


def chat(run: Path, prompt: str | None, most: int, system: str, base: bool, console: Any) -> None:
    """Answer one prompt, or talk until the input ends.

    Args:
        prompt: what is asked once; "-" = the standard input.
        base: whether the model answers as it was published.
        console: of rich.

    Raises:
        ConfigError: as `Chat`; or the prompt is empty, no text or too long, or there is no input to read from.
        typer.Exit: Ctrl-C ended the only answer.
    """
    _forgive()
    if prompt is None and sys.stdin is None:
        raise ConfigError("the standard input is closed, nothing can be typed: --prompt asks one question")
    question = None if prompt is None else _question(prompt)
    talk = Chat(run, most, _text(system, "--system"))
    talk.voices = ("base",) if base else ("tuned",)
    if question is not None:
        try:
            talk.ask(talk.prompt(question), talk.voices[0], _write)
            _write("\n")
            if talk.cut:
                typer.echo(talk.cut, err=True)
        except KeyboardInterrupt:
            _write("\n")
            raise typer.Exit(130) from None
        return
    console.print(f"{talk.name}  {talk.model.settings.model.name}", style="bold", highlight=False, markup=False)
    console.print(talk.said, style="dim", highlight=False, markup=False)
    console.print(HELP, style="dim", highlight=False)
    going_on = True
    while going_on:
        try:
            line = console.input("\n[bold cyan]you[/bold cyan]   ")
        except (EOFError, KeyboardInterrupt):
            _write("\n")  # the console would write an interrupted prompt again
            return
        except OSError as error:
            raise ConfigError(f"the standard input cannot be read ({error.strerror or error})") from None
        try:
            going_on = _answer(talk, line, console)
        except KeyboardInterrupt:
            _write("\n")


def _answer(talk: Chat, line: str, console: Any) -> bool:
    """Do what a line says, or answer it; False = the end."""
    try:
        text = _text(line, "this line").strip()
    except ConfigError as error:
        _show_error(error, console)
        return True
    if text.startswith("/"):
        return _command(talk, text, console)
    if text:
        _turn(talk, text, console)
    return True


def _question(prompt: str) -> str:
    """What is asked once, without the space around it.

    Raises:
        ConfigError: it is empty, no text, or to be read from an input that cannot be read.
    """
    if prompt == "-":
        if sys.stdin is None:
            raise ConfigError("--prompt -: the standard input is closed")
        try:
            prompt = sys.stdin.read()
        except OSError as error:
            raise ConfigError(f"--prompt -: the standard input cannot be read ({error.strerror or error})") from None
    text = _text(prompt, "--prompt").strip()
    if not text:
        raise ConfigError("--prompt: there is nothing in it")
    return text


def _text(given: str, what: str) -> str:
    """A text whose bytes Python may have taken for another encoding.

    Raises:
        ConfigError: they are no UTF-8.
    """
    try:
        return given.encode(errors="surrogateescape").decode()
    except UnicodeError:
        raise ConfigError(f"{what}: it holds bytes that are no UTF-8 text") from None


def _forgive() -> None:
    """Let the terminal show "?" for what it cannot show, and keep bytes that are no text until `_text` sees them."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stdin, "surrogateescape")):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(io.UnsupportedOperation):  # something was read already
                stream.reconfigure(errors=errors)


def _command(talk: Chat, text: str, console: Any) -> bool:
    """Do what a line that begins with a slash says; False = the end."""
    voices: dict[str, tuple[Voice, ...]] = {"/base": ("base",), "/tuned": ("tuned",), "/both": ("base", "tuned")}
    if text in ("/quit", "/exit", "/q"):
        return False
    if text in voices:
        talk.voices = voices[text]
        console.print(f"{' and '.join(talk.voices)} answers from here on", style="dim")
    elif text == "/clear":
        talk.clear()
        console.print("forgotten", style="dim")
    else:
        console.print(HELP, style="dim", highlight=False)
    return True


def _turn(talk: Chat, text: str, console: Any) -> None:
    answer = ""
    try:
        prompt = talk.prompt(text)
    except Exception as error:  # too long, or such as the template refuses: the next one may not be
        _show_error(error, console)
        return
    if talk.left_out and not talk.told:
        talk.told = True
        console.print("the conversation is longer than the model reads: its oldest turns are left out", style="dim")
    for voice in talk.voices:
        console.print(f"[bold {'green' if voice == 'tuned' else 'yellow'}]{voice:5}[/]", end=" ")
        try:
            answer = talk.ask(prompt, voice, _write)
        except KeyboardInterrupt:
            _write(" …")
            answer = ""
        except Exception as error:  # a model that fails at one question may answer the next
            _show_error(error, console)
            answer = ""
        _write("\n")
        if answer and talk.cut:
            console.print(talk.cut, style="dim", highlight=False)
    if answer:
        talk.keep(text, answer)


def _show_error(error: Exception, console: Any) -> None:
    console.print(f"error: {first_line(error)}", style="red", highlight=False, markup=False)


def _write(text: str) -> None:
    if sys.stdout is not None:  # somebody may have closed it
        sys.stdout.write(text)
        sys.stdout.flush()
