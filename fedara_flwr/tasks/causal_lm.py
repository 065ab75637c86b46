"""Causal language models: the answers to prompts, or whole texts, are learnt token by token.

Conversations are written as the tokenizer's own chat template has them, in training, evaluation, generation and export alike.
The loss is that of the answers' tokens alone, the one that ends the turn among them; logits are made of these positions only,
a piece at a time (arXiv 2411.09009 has the reason: at a large vocabulary they are most of a step's memory).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fedara_flwr.data.examples import Examples
from fedara_flwr.data.labels import NOTHING, Labels
from fedara_flwr.data.reading import Column, Example, text
from fedara_flwr.data.skipped import absent, spelled
from fedara_flwr.keys import ConfigError, Group
from fedara_flwr.tasks.base import UNLABELLED, Batch, Encoded, LearnerPort, Metric, Sample, Task, pad, pad_labels
from fedara_flwr.tasks.conversations import NO_COLUMN, messages_of, preset
from fedara_flwr.tasks.generation import all_ends, say
from fedara_flwr.tasks.ollama import modelfile
from fedara_flwr.tasks.overlap import exact, rouge_l
from fedara_flwr.tasks.spelled import read
from fedara_flwr.tasks.templates import ASSISTANT, SYSTEM, TEMPLATES, USER, Cut, Refused, Template, shorten

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PIECE = 256  # positions whose logits exist at a time
SHARE = 3  # one token in so many of a made-up row is of an answer
MOST = 700.0  # above it exp() has no number


class CausalLMOptions(Group):
    """Keys of `data.options` for causal-lm."""

    template: Literal["auto", "chat", "alpaca", "plain"] = Field(
        "auto", description="chat: the tokenizer's own; alpaca; plain: prompt, line end, answer; auto = chat where it has one"
    )
    system: str = Field("", description="system text before every conversation that has none; '' = none")
    answer_column: str = Field(
        "",
        description="column of the answer to data.text-column; '' = found by usual names, '-' = none: texts are learnt whole",
    )
    context_column: str = Field("", description="column of what a prompt refers to, put behind it; '' = none")
    messages_column: str = Field("", description="column of conversations: lists of role and content, or from and value")
    category_column: str = Field("", description="column by which dirichlet and pathological deal out rows; '' = none")
    generate: int = Field(
        8,
        ge=0,
        le=100,
        description="validation rows that the result and the unadapted model answer at the end, for the report",
    )
    max_new_tokens: int = Field(64, ge=1, le=4096, description="most tokens of such an answer")


class CausalLM(Task):
    """Cross-entropy of every token of an answer; perplexity is its exponential. A row's target is its conversation."""

    name = "causal-lm"
    title = "answers to prompts, conversations or plain text, by a language model"
    Options = CausalLMOptions
    auto_class = "AutoModelForCausalLM"
    head = "none"
    peft_task_type = "CAUSAL_LM"
    word_places = True
    labelled = False
    group_key = "category-column"
    docstrings = "its rows have no answers ('functions' has)"
    metric = Metric("perplexity", higher=False, low=1.0, high=math.inf)
    metrics = ("perplexity", "accuracy", "loss")
    defaults = {  # noqa: RUF012
        "model.name": "SmolLM2-135M-Instruct-Q4_1",
        "data.name": "functions",
        "data.max-length": 256,
        "data.validation-rows": 32,
        "data.test-rows": 64,
        "train.batch-size": 4,
        "train.batch-tokens": 2048,
    }
    talks = True
    pipeline = "text-generation"
    load_options = ""

    # -- reading rows
    @property
    def grouped(self) -> bool:  # type: ignore[override]
        """Whether a category is known before there is a table."""
        return bool(self.options.category_column) or (not self.settings.path and self.settings.name in ("", "functions"))

    def table(self, table: Any) -> Any:
        """The table as it is.

        Raises:
            ConfigError: a key names a column of which nothing would be read, or one that is another of the prompt and answer.
        """
        roles = self._roles(tuple(table.column_names))
        alone = "conversations" if "messages" in roles else "texts to be learnt whole"
        named, used = {"answer": self.options.answer_column, "context": self.options.context_column}, dict[str, str]()
        for role in ("text", "answer", "context"):
            key, name = f"{role}-column", roles.get(role) or named.get(role, "")
            if name in ("", NO_COLUMN):
                continue
            line = f"allowed is '' where rows are {alone}" if role in named and "answer" not in roles else ""
            line = line or (f"it is the {used[name]} too, allowed is another column" if name in used else "")
            if line:
                raise ConfigError(f"data.options {key} = {name!r}: {line}", f"options {key}: {line}")
            used[name] = key
        return table

    def columns(self, there: Sequence[str]) -> Sequence[Column]:
        """Prompt and answer, a conversation, or a text: as the keys say, else as the columns' names tell."""
        roles = self._roles(tuple(there))
        keys = {"text": "text-column", "messages": "options messages-column"}
        return [
            Column(role, keys.get(role, f"options {role}-column"), name, nested=role == "messages")
            for role, name in roles.items()
        ]

    def _roles(self, there: tuple[str, ...]) -> dict[str, str]:
        options, text_column = self.options, self.settings.text_column
        category = options.category_column or ("area" if self.grouped else "")
        if options.messages_column:
            roles = {"messages": options.messages_column}
        elif options.answer_column == NO_COLUMN:
            roles = {"text": text_column}
        else:
            # the columns that the keys name, else by the names that published sets have
            prompt = "" if text_column == "text" else text_column
            roles = dict(preset(there, prompt, options.answer_column, options.context_column))
            if "messages" not in roles:
                roles = {"text": text_column, **roles}
            roles |= {"answer": options.answer_column} if options.answer_column else {}
        roles |= {"context": options.context_column} if options.context_column else {}
        return {role: name for role, name in {**roles, "category": category}.items() if name}

    def read(self, row: Mapping[str, Any], labels: Labels) -> Example:
        """A conversation that ends with an answer, or a text."""
        category = None if "category" not in row else "" if absent(row["category"]) else spelled(row["category"])
        if "messages" in row:
            messages = messages_of(row["messages"])
        elif "answer" in row:
            prompt, answer = text(row["text"], "prompt"), text(row["answer"], "answer")
            context = "" if absent(row.get("context")) else spelled(row["context"])
            if context.strip() and context.strip() not in NOTHING:
                prompt = f"{prompt}\n\n{context}"
            messages = [[USER, prompt], [ASSISTANT, answer]]
        else:
            return Example(text(row["text"]), category=category)
        if self.options.system and messages[0][0] != SYSTEM:
            messages = [[SYSTEM, self.options.system], *messages]
        return Example(messages[-1][1], target=messages, identity=json.dumps(messages, ensure_ascii=False), category=category)

    # -- the tokenizer
    def check_tokenizer(self, tokenizer: Any, model: str) -> None:
        """A fast tokenizer with an end of text; it gets the template that is asked for."""
        super().check_tokenizer(tokenizer, model)
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"model.name = {model!r}: its tokenizer has no end-of-text token, as data.task needs")
        wanted = self.options.template
        if wanted == "chat" and not tokenizer.chat_template:
            raise ConfigError(
                f"model.name = {model!r}: its tokenizer has no chat template; in data.options allowed are template = 'alpaca' "
                "and 'plain'"
            )
        if wanted in TEMPLATES or not tokenizer.chat_template:
            tokenizer.chat_template = TEMPLATES[wanted if wanted in TEMPLATES else "plain"]

    def tokenizer_state(self, tokenizer: Any) -> str:
        """The template, and the system text."""
        return f"{tokenizer.chat_template}\x1f{self.options.system}"

    # -- learning
    def encode(self, tokenizer: Any, examples: Examples, max_length: int) -> Encoded:
        """Ids of every row that has a token to learn; its label is the token itself where that is learnt, else UNLABELLED."""
        template, cut = Template(tokenizer), Cut(len(examples))
        rows: list[tuple[list[int], list[int]]] = []
        kept: list[int] = []
        why: Refused | None = None
        for number, content in enumerate(examples.texts):
            if examples.targets is None:
                ids, labels = _whole(tokenizer, content)
            else:
                messages = [{"role": role, "content": words} for role, words in examples.targets[number]]
                messages, found = template.plain(messages)
                cut.neutralised += found
                try:
                    ids, labels = template.answers(messages)
                except Refused as error:
                    cut.refused, why = cut.refused + 1, error
                    continue
            short = shorten(ids, labels, max_length)
            cut.cut += len(ids) > max_length
            if all(label == UNLABELLED for label in short[1]):
                cut.left_out += 1
                continue
            rows.append(short)
            kept.append(number)
        if why is not None and cut.refused == len(examples):
            raise why
        cut.passed_over, cut.changed = template.passed_over, template.changed
        cut.dated = len(rows) if examples.targets is not None and template.dated else 0
        ids_of, labels_of = ([row[i] for row in rows] for i in (0, 1))
        return Encoded(ids_of, labels_of, examples.take(kept), cut.words(max_length))

    def collate(self, tokenizer: Any, ids: Sequence[list[int]], labels: Sequence[list[int]]) -> Batch:
        """As `pad`, and labels of shape (batch, longest)."""
        batch = pad(tokenizer, ids)
        return batch | {"labels": pad_labels(batch, labels)}

    def made_up(self, length: int) -> list[int]:
        """A row whose last third is an answer."""
        prompt = length - max(1, length // SHARE)
        return [UNLABELLED if place < max(1, prompt) else 0 for place in range(length)]

    def outputs(self, learner: LearnerPort, batch: Batch, below: torch.Tensor | None = None) -> Answers:
        """What the blocks give at the positions before an answer's tokens, and the way from there to logits."""
        row, place = (batch["labels"][:, 1:] != UNLABELLED).nonzero(as_tuple=True)
        states = learner.adapted.hidden(batch, below)[row, place]
        return Answers(states, row, batch["labels"][row, place + 1], learner.adapted.output_layer)

    def counts(self, batch: Batch) -> torch.Tensor:
        """Tokens of each row that are learnt; shape (rows,)."""
        return (batch["labels"][:, 1:] != UNLABELLED).sum(1)

    def losses(self, outputs: Answers, batch: Batch) -> torch.Tensor:
        """Sum of each row's cross-entropies in nats, shape (rows,); logits exist for PIECE positions at a time."""
        import torch
        from torch.utils.checkpoint import checkpoint

        pieces = [checkpoint(outputs.cross_entropies, piece, use_reentrant=False) for piece in outputs.pieces()]
        each = torch.cat(pieces) if pieces else outputs.states.sum(1).float()
        return each.new_zeros(len(batch["labels"])).index_add(0, outputs.row, each)

    def evaluation(self, data: Encoded, names: tuple[str, ...]) -> Perplexity:
        """Three sums."""
        return Perplexity()

    def samples(self, learner: LearnerPort, data: Encoded) -> list[Sample]:
        """Greedy answers where the first rows' last ones stand, with exact match and ROUGE-L."""
        rows = range(len(data) if data.more.targets is not None else 0)[: self.options.generate]
        prompts = [data.ids[row][: _last_answer(data.labels[row])] for row in rows]
        if not prompts:
            return []
        samples = []
        for row, said in zip(rows, say(learner, prompts, self.options.max_new_tokens), strict=True):
            *before, (_, expected) = data.more.targets[row]
            prompt = before[-1][1] if before else ""
            scores = {"exact-match": exact(said.text, expected), "rouge-l": rouge_l(said.text, expected)}
            samples.append(Sample(prompt, said.text, expected, said.stopped, scores))
        return samples

    # -- words
    def files(self, learner: LearnerPort, kind: str, base: str) -> dict[str, str]:
        """What ends an answer, for transformers; a Modelfile for Ollama, which does not read AdaLoRA's adapters."""
        from transformers import GenerationConfig

        pad = learner.tokenizer.pad_token_id
        config = GenerationConfig(do_sample=False, eos_token_id=all_ends(learner), pad_token_id=pad)
        files = {"generation_config.json": config.to_json_string()}
        if kind != "peft":
            try:
                files["Modelfile"] = modelfile(learner.tokenizer, "" if kind == "merged" else base, self.options.system)
            except Refused as error:
                logger.warning("no Modelfile for Ollama: %s", error)
        return files

    def snippet(self) -> list[str]:
        """Python lines that print an answer."""
        system = '{"role": "system", "content": system}, ' if self.options.system else ""
        return [
            "from transformers import GenerationConfig",
            "",
            *([f"system = {self.options.system!r}  # as it was taught"] if self.options.system else []),
            f'messages = [{system}{{"role": "user", "content": "What is a tuple?"}}]',
            "batch = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
            "config = GenerationConfig.from_pretrained(folder, max_new_tokens=64)  # knows what ends an answer",
            "answer = model.generate(**batch, generation_config=config)",
            'print(tokenizer.decode(answer[0, batch["input_ids"].shape[1]:], skip_special_tokens=True))',
        ]


@dataclass(frozen=True)
class Answers:
    """What a model makes of the tokens that are to be said.

    Attributes:
        states: shape (n, hidden), of the positions before them.
        row: the row of each, shape (n,).
        tokens: the tokens, shape (n,).
        logits: from states of shape (k, hidden) to logits of shape (k, vocabulary).
    """

    states: torch.Tensor
    row: torch.Tensor
    tokens: torch.Tensor
    logits: Callable[[torch.Tensor], torch.Tensor]

    def pieces(self) -> list[slice]:
        """Stretches of at most PIECE positions."""
        return [slice(start, start + PIECE) for start in range(0, len(self.tokens), PIECE)]

    def cross_entropies(self, piece: slice) -> torch.Tensor:
        """Cross-entropy of each token of a piece in nats, float32, shape (k,)."""
        import torch

        logits = self.logits(self.states[piece]).float()
        return torch.nn.functional.cross_entropy(logits, self.tokens[piece], reduction="none")


class Perplexity:
    """perplexity, the exponential of the mean loss of a token; accuracy, the share of tokens put first; loss."""

    def __init__(self) -> None:
        self.loss, self.hits, self.count = 0.0, 0, 0

    def add(self, outputs: Answers, batch: Batch) -> None:
        """Add a batch's sums, a piece at a time."""
        import torch

        for piece in outputs.pieces():
            logits, tokens = outputs.logits(outputs.states[piece]).float(), outputs.tokens[piece]
            self.loss += float(torch.nn.functional.cross_entropy(logits, tokens, reduction="none").double().sum())
            self.hits += int((logits.argmax(-1) == tokens).sum())
            self.count += len(tokens)

    def result(self) -> dict[str, float]:
        """The metrics by name; of no token at all those of a model that knows everything."""
        loss = self.loss / max(1, self.count)
        return {"perplexity": math.exp(min(loss, MOST)), "accuracy": self.hits / max(1, self.count), "loss": loss}


def _last_answer(labels: Sequence[int]) -> int:
    """The place where a row's last answer begins."""
    start = len(labels)
    while start and labels[start - 1] != UNLABELLED:
        start -= 1
    return start


def _whole(tokenizer: Any, content: str) -> tuple[list[int], list[int]]:
    """Ids of a text with its end, all of which are learnt but the first."""
    ids = list(read(tokenizer, content)["input_ids"])
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return ids, [UNLABELLED, *ids[1:]]
