"""The socket of tasks: everything that is particular to a kind of problem, asked of one object.

A task is a class in one file, of this package or another (entry point `fedara_flwr.tasks`); nothing else knows its name. Its
file imports torch, transformers and large metric libraries inside the methods that need them: configurations are checked and
reports are written without them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from fedara_flwr.config import DataSettings
from fedara_flwr.data.examples import Examples
from fedara_flwr.data.labels import Labels
from fedara_flwr.data.reading import Column, Example
from fedara_flwr.keys import ConfigError, Group, Scalar, check_options, read_options
from fedara_flwr.tasks.spelled import read

if TYPE_CHECKING:
    import torch

Batch = dict[str, "torch.Tensor"]
"""Tensors of some rows, padded on the right. The model gets all of them but those whose names begin with "labels"."""

# what the run configuration leaves open, and what is meant then unless the task says otherwise (`Task.defaults`)
USUAL: Mapping[str, Scalar] = {
    "model.name": "sentence-transformers/all-MiniLM-L6-v2",
    "model.dtype": "auto",
    "data.name": "docstrings",
    "data.partition": "dirichlet",
    "data.validation-rows": 0,
    "data.test-rows": 0,
    "data.max-length": 64,
    "train.batch-size": 16,
    "train.batch-tokens": 0,
}
UNLABELLED = -100  # torch's own mark of a place that has no label


@dataclass(frozen=True)
class Metric:
    """A task's main metric: which one it is, which direction is better, and between which values it lies."""

    name: str
    higher: bool = True
    low: float = 0.0
    high: float = 1.0

    def better(self, value: float, other: float) -> bool:
        """Whether `value` is at least as good as `other`; False for NaN."""
        return value >= other if self.higher else value <= other

    def facts(self) -> dict[str, Any]:
        """As federated.json says it; an open end is None there."""
        low, high = (bound if math.isfinite(bound) else None for bound in (self.low, self.high))
        return {"name": self.name, "higher": self.higher, "low": low, "high": high}

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> Metric:
        """A metric read back from what `facts` gave."""
        low, high = facts.get("low"), facts.get("high")
        ends = (-math.inf if low is None else float(low), math.inf if high is None else float(high))
        return cls(str(facts["name"]), facts.get("higher") is not False, *ends)


@dataclass(frozen=True)
class Encoded:
    """Tokenised rows.

    Attributes:
        ids: token ids of each row.
        labels: what is to be predicted of each row, as the task's own `collate` wants it: a number, a list, ...
        more: what the task's `evaluation` needs of all rows beside that, such as the texts that answers are cut from.
        notes: how many rows were cut or left out and why, in words, for example "3 cut at 256 tokens"; '' = none.
    """

    ids: list[list[int]]
    labels: Sequence[Any]
    more: Any = None
    notes: str = ""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Sample:
    """A question, what a model said to it, and the answer that the data has.

    Attributes:
        stopped: whether the model came to an end by itself.
        scores: figures of likeness by name, from 0 to 1.
    """

    prompt: str
    said: str
    expected: str
    stopped: bool
    scores: Mapping[str, float]


class LearnerPort(Protocol):
    """What a task sees of adapters/learner.Learner."""

    @property
    def adapted(self) -> Any:
        """The model with its adapters, an adapters/attach.AdaptedModel."""

    @property
    def tokenizer(self) -> Any:
        """The backbone's tokenizer, of transformers."""


class Evaluation(Protocol):
    """Metrics of one pass over a split; holds a few numbers for each row at most, never the model's outputs."""

    def add(self, outputs: Any, batch: Batch) -> None:
        """Take what the task's `outputs` gave for a batch. Batches come in any order."""
        ...

    def result(self) -> dict[str, float]:
        """The values of all of the task's `metrics`, after the last batch; none of them is NaN."""
        ...


class NoOptions(Group):
    """`data.options` of a task that has none."""


class Task:
    """Base of every task; what raises NotImplementedError here a task must say."""

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    """One line for `fedara tasks`."""
    Options: ClassVar[type[BaseModel]] = NoOptions
    """Keys of `data.options`; their checked values are in `self.options`."""

    # -- the model
    auto_class: ClassVar[str] = ""
    """Name of transformers' Auto class, for example "AutoModelForSequenceClassification"."""
    head: ClassVar[Literal["new", "none"]] = "new"
    """new: a task layer is drawn, trained and sent. none: the checkpoint is whole, nothing but adapters is trained."""
    peft_task_type: ClassVar[str | None] = None
    """PEFT's name of the task, written into exported adapters; None where PEFT has none."""
    word_places: ClassVar[bool] = False
    """Whether the tokenizer must tell which word a token is of, as only fast ones do."""

    # -- the data
    labelled: ClassVar[bool] = True
    """Whether rows have labels out of a list of names, which server and nodes then share."""
    label_word: ClassVar[str] = "labels"
    """What an error's line calls them."""
    bare_ids: ClassVar[bool] = True
    """Whether a column of whole numbers without names will do: the numbers are the names then."""
    classes: ClassVar[bool] = False
    """Whether every prediction is one of the label names, chosen by the head's last layer; "labels" in a batch are their
    numbers, UNLABELLED where there is nothing to predict."""
    grouped: bool = True
    """Whether `read` gives every row a group or a category, which partitions by label go by."""
    group_key: ClassVar[str] = ""
    """Key of `Options` that names a column of these, where `grouped` depends on it."""
    docstrings: ClassVar[str] = "its rows are a text and the name of an area"
    """Why the built-in data set (columns text and label) cannot be learnt from; '' where it can."""

    # -- the result
    metric: ClassVar[Metric] = Metric("loss", higher=False, high=math.inf)
    """The main metric: shown by round, compared, aimed at."""
    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    """Names of all metrics; clients may send them as eval-NAME."""
    defaults: ClassVar[Mapping[str, Scalar]] = {}
    """Values of keys that the run configuration leaves open, where they differ from those in USUAL."""
    rate_factor: ClassVar[float] = 1.0
    """Times the method's own learning rate of A and B, where `train.learning-rate` is 0."""
    talks: ClassVar[bool] = False
    """Whether the model generates text from a chat template, so that one can talk to it."""
    pipeline: ClassVar[str] = ""
    """The Hub's name of the task, for the model card; '' = none."""
    load_options: ClassVar[str] = "id2label=dict(enumerate(labels))"
    """Python source: what `from_pretrained` needs besides the base's name to build the model that adapters are laid on."""

    def __init__(self, settings: DataSettings) -> None:
        """Check `data.options`.

        Raises:
            ConfigError: a key or value that the task does not allow.
        """
        self.settings = settings
        options = read_options("data.options", settings.options)
        self.options: Any = check_options(self.Options, options, self.name, "data.options", "task")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, Task) and other.settings == self.settings

    def __hash__(self) -> int:
        return hash((type(self), self.settings))

    # -- reading rows
    def table(self, table: Any) -> Any:
        """A table of `datasets` as rows that `read` can take: other forms of the same data unfolded; as it is where it fits."""
        return table

    def columns(self, there: Sequence[str]) -> Sequence[Column]:
        """What `read` needs of a table: here the text, its pair where one is named, and the label.

        Args:
            there: names of the table's columns.
        """
        settings = self.settings
        pair = [Column("pair", "pair-column", settings.pair_column)] if settings.pair_column else []
        label = Column("label", "label-column", settings.label_column)
        return [Column("text", "text-column", settings.text_column), *pair, label]

    def read(self, row: Mapping[str, Any], labels: Labels) -> Example:
        """What a row becomes.

        Args:
            row: values by the roles of `columns`, as the table has them.
            labels: the run's label names.

        Raises:
            LeftOut: it cannot be used, and is counted with this reason.
        """
        raise NotImplementedError

    def check_labels(self, names: tuple[str, ...]) -> None:
        """Refuse label names that cannot be meant so, by a ConfigError."""

    def group_names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """What the groups 0, 1, ... are called, for reports; () where rows have none."""
        return names if self.grouped else ()

    # -- the model
    def is_head(self, module: str) -> bool:
        """Whether a top-level module of the model belongs to the task layer; parameters that the checkpoint lacks always do."""
        return False

    def peft_type(self, tokenizer: Any) -> str | None:
        """PEFT's name of the task for one model, where it depends on that."""
        return self.peft_task_type

    def model_config(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Entries of the model's configuration: here as many outputs as there are labels, and their names."""
        if not self.labelled:
            return {}
        places = {name: place for place, name in enumerate(names)}
        return {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": places}

    def check_tokenizer(self, tokenizer: Any, model: str) -> None:
        """Refuse a tokenizer that lacks what the task needs, or give it what it lacks.

        Raises:
            ConfigError: it does not tell which word a token is of, and the task wants to know.
        """
        if self.word_places and not tokenizer.is_fast:
            raise ConfigError(
                f"model.name = {model!r}: its tokenizer does not tell which word a token is of, as data.task needs"
            )

    def tokenizer_state(self, tokenizer: Any) -> str:
        """What server and nodes must have in common besides the vocabulary, such as a template."""
        return ""

    # -- learning
    def encode(self, tokenizer: Any, examples: Examples, max_length: int) -> Encoded:
        """Token ids and labels of every row, cut at `max_length` tokens; no rows are legal."""
        raise NotImplementedError

    def collate(self, tokenizer: Any, ids: Sequence[list[int]], labels: Sequence[Any]) -> Batch:
        """One padded batch; what the model must not see has a name that begins with "labels"."""
        raise NotImplementedError

    def made_up(self, length: int) -> Any:
        """A label, as `collate` takes it, of a made-up row of so many tokens; floating-point operations are counted on it."""
        return 0

    def outputs(self, learner: LearnerPort, batch: Batch, below: torch.Tensor | None = None) -> Any:
        """What `losses` and `evaluation` see of the model: here its own output object, of all positions.

        A task that needs few positions of a large output asks for those alone.

        Args:
            below: what `AdaptedModel.below` gave for this batch.
        """
        return learner.adapted.outputs(batch, below)

    def losses(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Loss of each row, summed over its predictions; float32 whatever the backbone's type, shape (rows,)."""
        raise NotImplementedError

    def counts(self, batch: Batch) -> torch.Tensor:
        """Predictions of each row, by whose number the losses of a batch are averaged; shape (rows,).

        Here one where "labels" have shape (rows,), else as many as its places that are not UNLABELLED.
        """
        labels = batch["labels"]
        return labels.new_ones(len(labels)) if labels.dim() == 1 else (labels != UNLABELLED).sum(1)

    def evaluation(self, data: Encoded, names: tuple[str, ...]) -> Evaluation:
        """Begin to evaluate `data`, whose batches then come; `names` are the labels'."""
        raise NotImplementedError

    def samples(self, learner: LearnerPort, data: Encoded) -> list[Sample]:
        """What the loaded model says by itself to some of the rows, always the same ones; [] where a task has no such."""
        return []

    # -- words
    def files(self, learner: LearnerPort, kind: str, base: str) -> dict[str, str]:
        """Further files of an export, by name: what other tools need to load it.

        Args:
            kind: "peft", "lora" or "merged".
            base: where the base model is: a folder or a Hub id.
        """
        return {}

    def snippet(self) -> list[str]:
        """Python lines for card and report that use what was exported.

        `model`, `tokenizer` and, where the task is `labelled`, `labels` (a list of names) are there.
        """
        raise NotImplementedError


def text_examples(tokenizer: Any, examples: Examples, max_length: int) -> list[list[int]]:
    """Token ids with special tokens of texts or pairs; the longer text of a pair is cut first."""
    if not len(examples):
        return []
    encoded = read(
        tokenizer,
        list(examples.texts),
        list(examples.pairs) if examples.pairs is not None else None,
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
    )
    return encoded["input_ids"]


def pad(tokenizer: Any, ids: Sequence[list[int]]) -> Batch:
    """input_ids, attention_mask and, where the model takes them, token_type_ids; shape (batch, longest), padded on the right.

    Pairs get their token types from the tokenizer's own separator, as BERT's `create_token_type_ids` does.
    """
    import torch

    longest = max(len(row) for row in ids)
    tokens = torch.full((len(ids), longest), tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(ids), longest), dtype=torch.long)
    for i, row in enumerate(ids):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    batch = {"input_ids": tokens, "attention_mask": mask}
    if "token_type_ids" in tokenizer.model_input_names and tokenizer.sep_token_id is not None:
        separators = (tokens == tokenizer.sep_token_id).long()
        batch["token_type_ids"] = ((separators.cumsum(1) - separators) == 1).long() * mask
    return batch


def pad_labels(batch: Batch, labels: Sequence[list[int]]) -> torch.Tensor:
    """A label for every token of a batch from `pad`, UNLABELLED at the padding; shape (batch, longest)."""
    import torch

    longest = batch["input_ids"].shape[1]
    return torch.tensor([[*row, *[UNLABELLED] * (longest - len(row))] for row in labels], dtype=torch.long)


def cross_entropies(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Cross-entropy of each of n predictions in nats, shape (n,); `logits` have shape (n, labels)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_total = np.log(np.exp(shifted.astype(np.float64)).sum(axis=1))
    return log_total - shifted[np.arange(len(labels)), labels]


def f1(hits: Any, predicted: Any, true: Any) -> Any:
    """2·hits / (predicted + true), 0 where neither occurs; numbers or arrays of counts."""
    total = np.asarray(predicted + true, dtype=np.float64)
    return np.divide(2.0 * hits, total, out=np.zeros_like(total), where=total > 0)
