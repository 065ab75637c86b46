"""A learner: model, task and tokenizer of one process, and what can be done with the three of them alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.backbone import Backbone, load_tokenizer, locate, silence_libraries
from fedara_flwr.adapters.fit import check_fit, check_tokens
from fedara_flwr.adapters.folders import check_class
from fedara_flwr.config import Settings
from fedara_flwr.data.examples import Examples
from fedara_flwr.keys import ConfigError
from fedara_flwr.log import first_line
from fedara_flwr.tasks import open_task
from fedara_flwr.tasks.base import Batch, Encoded, Task

BATCH = 32


def cut(rows: Sequence[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Cut a batch into as few pieces of neighbouring rows as have at most `tokens` tokens each, padding counted.

    Args:
        rows: row numbers, by length, so that little of a part is padding.
        lengths: tokens of every row there is.
        tokens: the bound, which a row alone may exceed; 0 = one part.
    """
    row_lists: list[list[int]] = []
    longest = 0
    for row in rows:
        longest = max(longest, lengths[row])
        if not row_lists or (tokens and (len(row_lists[-1]) + 1) * longest > tokens):
            row_lists.append([])
            longest = lengths[row]
        row_lists[-1].append(row)
    return row_lists


@dataclass(frozen=True)
class Learner:
    """The model, task and tokenizer of one process.

    Attributes:
        adapted: the model, with adapters.
        task: what is learnt.
        tokenizer: the backbone's tokenizer, of transformers.
    """

    adapted: AdaptedModel
    task: Task
    tokenizer: Any

    @cached_property
    def tokenizer_digest(self) -> str:
        """sha256 of the vocabulary with its ids, and of what else the task wants in common.

        Kept, since making it takes longer than a step of a small client.
        """
        digest = hashlib.sha256(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        digest.update(self.task.tokenizer_state(self.tokenizer).encode())
        return digest.hexdigest()

    def encode(self, examples: Examples, max_length: int) -> Encoded:
        """The examples tokenised as the task wants them, each cut at `max_length` tokens."""
        return self.task.encode(self.tokenizer, examples, max_length)

    def batch(self, data: Encoded, rows: Iterable[int]) -> Batch:
        """These rows of `data` as one padded batch, on the device where the model is."""
        rows = list(rows)
        batch = self.task.collate(self.tokenizer, [data.ids[i] for i in rows], [data.labels[i] for i in rows])
        return {name: values.to(self.adapted.device) for name, values in batch.items()}

    def batches(self, data: Encoded, batch_tokens: int = 0) -> Iterator[Batch]:
        """All of `data` once, BATCH rows at a time, rows of similar length together.

        Args:
            batch_tokens: most tokens of a batch, as in `cut`.
        """
        lengths = [len(row) for row in data.ids]
        order = np.argsort(lengths, kind="stable").tolist()
        for start in range(0, len(order), BATCH):
            for rows in cut(order[start : start + BATCH], lengths, batch_tokens):
                yield self.batch(data, rows)

    def count(self, data: Encoded) -> int:
        """Predictions of all of `data` that are learnt, by whose number losses are averaged."""
        return sum(int(self.task.counts(batch).sum()) for batch in self.batches(data))

    @torch.no_grad()
    def evaluate(self, data: Encoded, batch_tokens: int = 0) -> dict[str, float]:
        """The task's metrics of the loaded model on all of `data`, in `batches`; no outputs are kept."""
        adapted, task = self.adapted, self.task
        adapted.model.eval()
        evaluation = task.evaluation(data, adapted.backbone.labels)
        for batch in self.batches(data, batch_tokens):
            evaluation.add(task.outputs(self, batch, adapted.below(batch)), batch)
        values: dict[str, float] = evaluation.result()
        if values.keys() != set(self.task.metrics):
            given, announced = (", ".join(sorted(names)) for names in (values, self.task.metrics))
            line = f"its evaluation gives {given}; announced are {announced}"
            raise ConfigError(f"data.task = {self.task.name!r}: {line}")
        return values


def look(settings: Settings, labels: tuple[str, ...]) -> None:
    """What `open_learner` refuses of a model, as far as it shows without the weights.

    Raises:
        ConfigError: tokenizer, architecture or lengths do not fit.
    """
    silence_libraries()
    name, task = settings.model.name, open_task(settings.data)
    source, tokenizer = locate(name), load_tokenizer(name, task)
    check_tokens(name, source, tokenizer)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **task.model_config(labels))
    except Exception as error:
        raise ConfigError(f"model.name = {name!r}: cannot be loaded ({first_line(error)})") from error
    check_class(name, config, task.auto_class)
    with torch.device("meta"):
        model = getattr(transformers, task.auto_class).from_config(config)
    check_fit(name, model, tokenizer, settings.data.max_length)


def open_learner(settings: Settings, labels: tuple[str, ...], device: str = "cpu") -> Learner:
    """The model, task and tokenizer that the settings name, adapters attached and empty: what server and clients start from.

    The model goes to the device here, and what comes to it by `AdaptedModel.load`, `set_delta` and `Learner.batch` follows it.

    Raises:
        ConfigError: the model cannot be loaded, or does not fit.
    """
    silence_libraries()
    task = open_task(settings.data)
    tokenizer = load_tokenizer(settings.model.name, task)
    check_tokens(settings.model.name, locate(settings.model.name), tokenizer)
    backbone = Backbone(
        settings.model.name,
        task,
        labels,
        dtype=settings.model.dtype,
        pooling=settings.model.pooling,
        target_modules=settings.adapter.target_modules,
        pad_token_id=tokenizer.pad_token_id,
        device=device,
    )
    check_fit(settings.model.name, backbone.model, tokenizer, settings.data.max_length)
    train = settings.train
    adapted = AdaptedModel(backbone, train.cache, train.cache_mb, train.cache_disk_mb, train.checkpointing)
    return Learner(adapted, task, tokenizer)
