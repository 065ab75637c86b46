"""Chat templates, and which tokens of a conversation a language model is to say. transformers' own rendering, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fedara_flwr.keys import ConfigError
from fedara_flwr.log import first_line
from fedara_flwr.tasks.base import UNLABELLED
from fedara_flwr.tasks.spelled import control_tokens

Message = Mapping[str, str]
MARK = "\ue000"  # stands for a text; of Unicode's private use, so no template has it
SYSTEM, USER, ASSISTANT = ROLES = ("system", "user", "assistant")

# as tokenizers carry them, so that whatever loads an export speaks as the model was taught
ALPACA = (  # Alpaca's prompt without input, as FlowerTune has it; the space is the answer's, since tokenizers join it to a word
    "{{ bos_token if bos_token is defined and bos_token else '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'user' %}"
    "{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request.' }}"
    "{{ '\n\n### Instruction:\n' + message['content'] + '\n\n### Response:' }}"
    "{% else %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}"
)
PLAIN = (
    "{{ bos_token if bos_token is defined and bos_token else '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ ('\n' if not loop.first else '') + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
)
TEMPLATES = {"alpaca": ALPACA, "plain": PLAIN}


class Refused(ConfigError):
    """A conversation that a chat template does not take."""


@dataclass
class Cut:
    """What became of the rows of one `encode`.

    Attributes:
        cut: rows of which something was cut away.
        left_out: rows of which no token of an answer was left.
        refused: rows that the template does not take.
        neutralised: rows in which somebody had written a control token.
        passed_over: rows of which earlier answers are not learnt.
        changed: rows of which a text is not in what the template makes of them, as it was written.
        dated: rows that have the day's date in them.
    """

    rows: int = 0
    cut: int = 0
    left_out: int = 0
    refused: int = 0
    neutralised: int = 0
    passed_over: int = 0
    changed: int = 0
    dated: int = 0

    def words(self, most: int) -> str:
        """In words; '' where nothing was done."""
        said = [
            f"{count} {what}"
            for count, what in (
                (self.cut, f"cut at {most} tokens (data.max-length)"),
                (self.left_out, "left out, no token of an answer is left"),
                (self.refused, "left out, the template does not take them"),
                (
                    self.passed_over,
                    "learnt without their earlier answers, which the template changes when more follows",
                ),
                (self.changed, "of which the template leaves out or changes a text, such as a system text or a thought"),
                (self.neutralised, "hold control tokens, taken as text"),
                (self.dated, "in a template that may write the day's date (strftime_now): on another day they are others"),
            )
            if count
        ]
        return f"of {self.rows} rows {', '.join(said)}" if said else ""


class Template:
    """A tokenizer's chat template: conversations to token ids, and which of these are answers.

    Attributes:
        passed_over: conversations so far of which earlier answers are not learnt.
        changed: conversations so far of which a text is not in what the template makes of them.
        dated: whether it may write the day's date.
    """

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a fast one, with a chat template."""
        self.tokenizer, self.passed_over, self.changed = tokenizer, 0, 0
        self.dated = "strftime_now" in str(tokenizer.chat_template)
        self._controls = sorted(control_tokens(tokenizer), key=len, reverse=True)

    def render(self, messages: Sequence[Message], answering: bool = False) -> str:
        """A conversation as text; `answering`: up to where the next answer begins.

        Raises:
            Refused: the template does not take it, such as one without a place for a system text.
        """
        try:
            text: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answering)
        except Exception as error:  # templates raise what they like
            raise Refused(f"data.options: the tokenizer's chat template refuses a conversation ({first_line(error)})") from None
        return text

    def plain(self, messages: Sequence[Message]) -> tuple[list[dict[str, str]], bool]:
        """The messages with every control token that somebody wrote broken up by a space, and whether there was one."""
        found, out = False, []
        for message in messages:
            text = message["content"]
            for token in self._controls:
                if token in text:
                    found, text = True, text.replace(token, f"{token[0]} {token[1:]}" if len(token) > 1 else " ")
            out.append({"role": message["role"], "content": text})
        return out, found

    def answers(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Token ids of a conversation, and for each the same id where an assistant says it, else UNLABELLED.

        An answer is what its conversation has beyond the prompt for it (the prefix rule), up to the first control token behind
        its text; where the template ends none, the tokenizer's end of text is put behind the last answer. An earlier answer
        that the template writes otherwise once more follows it, as those do that drop thoughts, is not learnt.

        Raises:
            Refused: as `render`; the last prompt is not the beginning of the conversation that goes on from it; or answers are
                not in it.
        """
        whole = self.render(messages)
        spans = self._spans(messages, whole)
        passed_over = len(spans) < sum(message["role"] == ASSISTANT for message in messages)
        self.passed_over += passed_over
        earlier = [each for each in messages[:-1] if not passed_over or each["role"] != ASSISTANT]
        kept = [each["content"] for each in (*earlier, *messages[-1:])]
        self.changed += not _holds(whole, kept)
        ids, labels = self._tokens(whole, spans)
        last = next((i for i in range(len(ids) - 1, -1, -1) if labels[i] != UNLABELLED), len(ids) - 1)
        ids, labels = ids[: last + 1], labels[: last + 1]  # nothing is learnt from what follows the last answer
        ended = str(self.tokenizer.convert_ids_to_tokens(ids[-1])) in self._controls and ids[-1] != self.tokenizer.unk_token_id
        if labels and not ended:
            ids, labels = [*ids, self.tokenizer.eos_token_id], [*labels, self.tokenizer.eos_token_id]
        return ids, labels

    def opening(self) -> str:
        """What the template itself writes between the prompt for an answer and the answer's text: '' in most."""
        asked = [{"role": USER, "content": "a"}]
        prompt, said = self.render(asked, answering=True), self.render([*asked, {"role": ASSISTANT, "content": MARK}])
        begin, found, _ = said.partition(MARK)
        return begin[len(prompt) :] if found and begin.startswith(prompt) else ""

    def _tokens(self, whole: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Ids and labels of a text of which stretches are learnt.

        Where one token would hold the end of a prompt and the beginning of its answer, the text is parted there: whoever
        generates has the tokens of the prompt alone.
        """
        encoded = self._encode(whole)
        cuts = [begin for begin, _ in spans if any(first < begin < last for _, first, last in encoded)]
        if cuts:
            edges = [0, *cuts, len(whole)]
            encoded = [token for begin, end in pairwise(edges) for token in self._encode(whole[begin:end], begin)]
        ids = [token for token, _, _ in encoded]
        labels = [UNLABELLED] * len(ids)
        for begin, end in spans:
            # from the first token that has a letter of the answer to the last: some have no width
            inside = [i for i, (_, first, last) in enumerate(encoded) if last > begin and first < end and last > first]
            if inside:
                labels[inside[0] : inside[-1] + 1] = ids[inside[0] : inside[-1] + 1]
        return ids, labels

    def _encode(self, text: str, at: int = 0) -> list[tuple[int, int, int]]:
        """(id, first, behind the last character) of the tokens of a stretch that begins `at` so many characters."""
        mark = str(self.tokenizer.eos_token) if at else ""  # some tokenizers put a space before a text, but not behind a token
        found = self.tokenizer(mark + text, add_special_tokens=False, return_offsets_mapping=True)
        tokens, behind, shift = list[tuple[int, int, int]](), 0, at - len(mark)
        for token, (first, last) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            if (mark + text)[behind:first].isspace():  # GPT-NeoX's leaves a token's spaces out of its place
                first = behind
            behind = max(behind, last)
            if last > len(mark) or not mark:
                tokens.append((token, first + shift, last + shift))
        return tokens

    def _spans(self, messages: Sequence[Message], whole: str) -> list[tuple[int, int]]:
        """Where the answers that can be learnt stand in `whole`, each with the token that ends it."""
        spans, last = [], max((turn for turn, message in enumerate(messages) if message["role"] == ASSISTANT), default=-1)
        for turn, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            prompt = self.render(messages[:turn], answering=True)
            said = self.render(messages[: turn + 1])
            end = self._end(messages[:turn], said)
            for begin, text in ((prompt, said), (said[:end], whole)):
                if text.startswith(begin):
                    continue
                if turn < last:
                    break
                place = next(i for i, (one, two) in enumerate(zip(begin + "\0", text + "\0", strict=False)) if one != two)
                found, wanted = text[place : place + 20], begin[place : place + 20]
                line = f"after {place} characters it has {found!r} where its own prompt has {wanted!r}"
                raise Refused(f"data.options: the chat template does not go on from its prompt: {line}")
            else:
                spans.append((len(prompt), end))
        return spans

    def _end(self, before: Sequence[Message], said: str) -> int:
        """Where in `said` the answer ends: behind the first control token after its text, else behind the last letter."""
        _, found, rest = self.render([*before, {"role": ASSISTANT, "content": MARK}]).rpartition(MARK)
        if not found:
            raise Refused("data.options: the tokenizer's chat template does not write what an assistant says")
        if not said.endswith(rest):
            return len(said.rstrip())
        places = [(place, -len(token)) for token in self._controls if (place := rest.find(token)) >= 0]
        if not places:
            return len(said.rstrip())
        place, length = min(places)
        return len(said) - len(rest) + place - length


def _holds(whole: str, texts: Sequence[str]) -> bool:
    """Whether all of the texts are in `whole`, whatever the spaces in them: many templates take these off the ends."""
    squeezed = "".join(whole.split())
    return all("".join(text.split()) in squeezed for text in texts)


def shorten(ids: list[int], labels: list[int], most: int) -> tuple[list[int], list[int]]:
    """At most `most` tokens: the beginning goes first, but half of `most` is left before the last answer; then its end."""
    over = len(ids) - most
    if over <= 0:
        return ids, labels
    answer = len(labels)
    while answer and labels[answer - 1] != UNLABELLED:
        answer -= 1
    gone = min(over, max(0, answer - most // 2))
    return ids[gone : gone + most], [UNLABELLED, *labels[gone + 1 : gone + most]]
