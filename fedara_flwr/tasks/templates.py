"""Chat templates, and which tokens of a conversation a language model is to say. transformers' own rendering, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedara_flwr.keys import ConfigError
from fedara_flwr.log import first_line
from fedara_flwr.tasks.base import UNLABELLED

Message = Mapping[str, str]
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
    """

    rows: int = 0
    cut: int = 0
    left_out: int = 0
    refused: int = 0
    neutralised: int = 0

    def words(self, most: int) -> str:
        """In words; '' where nothing was done."""
        said = [
            f"{count} {what}"
            for count, what in (
                (self.cut, f"cut at {most} tokens (data.max-length)"),
                (self.left_out, "left out, no token of an answer is left"),
                (self.refused, "left out, the template does not take them"),
                (self.neutralised, "hold control tokens, taken as text"),
            )
            if count
        ]
        return f"of {self.rows} rows {', '.join(said)}" if said else ""


class Template:
    """A tokenizer's chat template: conversations to token ids, and which of these are answers."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a fast one, with a chat template."""
        self.tokenizer = tokenizer
        added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._controls = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)

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
                    found, text = True, text.replace(token, f"{token[0]} {token[1:]}")
            out.append({"role": message["role"], "content": text})
        return out, found

    def answers(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Token ids of a conversation, and for each the same id where an assistant says it, else UNLABELLED.

        An answer is what its conversation has beyond the prompt for it (the prefix rule), up to the token that ends the turn;
        where the template ends none, the tokenizer's end of text is put behind the last answer.

        Raises:
            Refused: as `render`, or a prompt is not the beginning of the conversation that goes on from it.
        """
        whole = self.render(messages)
        spans = list(self._spans(messages, whole))
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        labels = [UNLABELLED] * len(ids)
        for begin, end in spans:
            # from the first token that has a letter of the answer to the last: some have spaces alone, and no width
            inside = [i for i, (first, last) in enumerate(offsets) if last > begin and first < end and last > first]
            if inside:
                labels[inside[0] : inside[-1] + 1] = ids[inside[0] : inside[-1] + 1]
        last = next((i for i in range(len(ids) - 1, -1, -1) if labels[i] != UNLABELLED), len(ids) - 1)
        ids, labels = ids[: last + 1], labels[: last + 1]  # nothing is learnt from what follows the last answer
        if labels and str(self.tokenizer.convert_ids_to_tokens(ids[-1])) not in self._controls:
            ids, labels = [*ids, self.tokenizer.eos_token_id], [*labels, self.tokenizer.eos_token_id]
        return ids, labels

    def _spans(self, messages: Sequence[Message], whole: str) -> Iterator[tuple[int, int]]:
        for turn, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            prompt = self.render(messages[:turn], answering=True)
            said = self.render(messages[: turn + 1])
            for begin, text in ((prompt, said), (said, whole)):
                if not text.startswith(begin):
                    place = next(i for i, (one, two) in enumerate(zip(begin + "\0", text + "\0", strict=False)) if one != two)
                    found, wanted = text[place : place + 20], begin[place : place + 20]
                    line = f"after {place} characters it has {found!r} where its own prompt has {wanted!r}"
                    raise Refused(f"data.options: the chat template does not go on from its prompt: {line}")
            yield len(prompt), len(said.rstrip())


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
