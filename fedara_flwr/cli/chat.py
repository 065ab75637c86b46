"""`fedara chat`: talk to what a run made of a language model, offline, in the template that it was taught in."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fedara_flwr.keys import ConfigError
from fedara_flwr.log import first_line

HELP = "/base: without what was trained · /tuned: with it · /both: one after the other · /clear: forget · /quit"
Voice = Literal["tuned", "base"]
MOST_TOKENS = 256


class Chat:
    """One conversation with a run's model.

    Attributes:
        name: the run's.
        voices: who answers, in this order: "tuned", "base" or both.
    """

    def __init__(self, run: Path, most: int = MOST_TOKENS, system: str = "") -> None:
        """Open the run's newest checkpoint on its base.

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
        self.model, self.name = saved.model, run.name
        if not self.model.task.talks:
            talking = ", ".join(name for name, task in tasks().items() if task.talks)
            line = f"data.task = {self.model.task.name!r} has nothing to say, allowed are runs of {talking}"
            raise ConfigError(f"{run}: {line}")
        self._weights = {"tuned": saved.method.weights(saved.state.shown()), "base": self.model.unadapted()}
        self._loaded: Voice | None = None
        self.template = Template(self.model.learner.tokenizer)
        self._most = min(most, self._places() // 2)
        text = system or getattr(self.model.task.options, "system", "")
        self._first = [{"role": "system", "content": text}] if text else []
        self.voices: tuple[Voice, ...] = ("tuned",)
        self.turns: list[dict[str, str]] = []

    def ask(self, text: str, voice: Voice, write: Callable[[str], None]) -> str:
        """One answer to what was said so far and `text`; `write` gets its pieces as they come."""
        from fedara_flwr.tasks.generation import say

        if self._loaded != voice:
            self.model.load(self._weights[voice])
            self._loaded = voice
        streamer = _streamer(self.model.learner.tokenizer, write)
        return say(self.model.learner, [self.prompt(text)], self._most, streamer)[0].text

    def prompt(self, text: str) -> list[int]:
        """Token ids of the conversation up to where the answer begins.

        The oldest turns are left out where all would be longer than the model's places less an answer.
        """
        limit = self._places() - self._most
        turns = list(self.turns)
        while True:
            messages, _ = self.template.plain([*self._first, *turns, {"role": "user", "content": text}])
            rendered = self.template.render(messages, answering=True)
            ids: list[int] = self.template.tokenizer(rendered, add_special_tokens=False)["input_ids"]
            if len(ids) <= limit or not turns:
                return ids[-limit:]
            turns = turns[2:]

    def _places(self) -> int:
        config = self.model.adapted.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 2048)

    def keep(self, text: str, answer: str) -> None:
        """Remember a turn."""
        self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def _streamer(tokenizer: Any, write: Callable[[str], None]) -> Any:
    """What transformers calls for every token of an answer; whole words go on."""
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: write(text)  # type: ignore[method-assign]
    return streamer


def chat(run: Path, prompt: str | None, most: int, system: str, base: bool, console: Any) -> None:
    """Answer one prompt, or talk until the input ends.

    Args:
        prompt: what is asked once; "-" = the standard input.
        base: whether the model answers as it was published.
        console: of rich.

    Raises:
        ConfigError: as `Chat`.
    """
    talk = Chat(run, most, system)
    if prompt is not None:
        text = (sys.stdin.read() if prompt == "-" else prompt).strip()
        if not text:
            raise ConfigError("--prompt: there is nothing in it")
        talk.ask(text, "base" if base else "tuned", _write)
        _write("\n")
        return
    talk.voices = ("base",) if base else ("tuned",)
    console.print(f"{talk.name}  {talk.model.settings.model.name}", style="bold", highlight=False, markup=False)
    console.print(HELP, style="dim", highlight=False)
    while True:
        try:
            text = console.input("\n[bold cyan]you[/bold cyan]   ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text.startswith("/"):
            if not _command(talk, text, console):
                return
        elif text:
            _turn(talk, text, console)


def _command(talk: Chat, text: str, console: Any) -> bool:
    """Do what a line that begins with a slash says; False = the end."""
    voices: dict[str, tuple[Voice, ...]] = {"/base": ("base",), "/tuned": ("tuned",), "/both": ("base", "tuned")}
    if text in ("/quit", "/exit", "/q"):
        return False
    if text in voices:
        talk.voices = voices[text]
        console.print(f"{' and '.join(talk.voices)} answers from here on", style="dim")
    elif text == "/clear":
        talk.turns.clear()
        console.print("forgotten", style="dim")
    else:
        console.print(HELP, style="dim", highlight=False)
    return True


def _turn(talk: Chat, text: str, console: Any) -> None:
    answer = ""
    for voice in talk.voices:
        console.print(f"[bold {'green' if voice == 'tuned' else 'yellow'}]{voice:5}[/]", end=" ")
        try:
            answer = talk.ask(text, voice, _write)
        except KeyboardInterrupt:
            _write(" …")
            answer = ""
        except Exception as error:  # a model that fails at one question may answer the next
            console.print(f"error: {first_line(error)}", style="red", highlight=False, markup=False)
            answer = ""
        _write("\n")
    if answer:
        talk.keep(text, answer)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
