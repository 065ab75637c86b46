"""Tiny random-weight backbones of every architecture, as directories that `Backbone` loads like any user's model."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    LlamaConfig,
    Qwen2Config,
    RobertaConfig,
)

from fedara_flwr.adapters import precision
from fedara_flwr.adapters.backbone import Backbone, load_tokenizer, silence_libraries
from fedara_flwr.adapters.packaged import PACKAGED
from fedara_flwr.config import DataSettings
from fedara_flwr.data.examples import Examples
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import Arrays, ModelSpec
from fedara_flwr.tasks import Encoded, Task, built_in, open_task
from fedara_flwr.tasks.base import UNLABELLED
from fedara_flwr.tasks.question_answering import Window

silence_libraries()
MINILM = next(iter(PACKAGED))
VOCABULARY = 97
LABELS = ("red", "green", "blue")
TASKS: dict[str, Task] = {name: open_task(DataSettings(task=name)) for name in built_in()}
ENCODER = {"vocab_size": VOCABULARY, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 64}
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,  # so that a checkpoint without a head is a whole language model
}
CONFIGS = {
    "bert": BertConfig(hidden_size=16, intermediate_size=24, **ENCODER),
    "distilbert": DistilBertConfig(vocab_size=VOCABULARY, dim=16, hidden_dim=24, n_layers=3, n_heads=2),
    "roberta": RobertaConfig(hidden_size=16, intermediate_size=24, **ENCODER),
    "deberta-v3": DebertaV2Config(
        hidden_size=16,
        intermediate_size=24,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
        **ENCODER,
    ),
    "llama": LlamaConfig(**DECODER),
    "qwen": Qwen2Config(**DECODER),
}


DECODERS = ("llama", "qwen")


def usual(task: Task) -> str:
    """The architecture on which a test that needs only one does the task."""
    return "bert" if task.head == "new" else "llama"


def pairs(names: Sequence[str] = tuple(CONFIGS), tasks: Sequence[Task] = tuple(TASKS.values())) -> Any:
    """Parameters `name` and `task`: architectures with the tasks that they can do; without a head only decoders are whole."""
    found = [(name, task) for task in tasks for name in names if task.head == "new" or name in DECODERS]
    return pytest.mark.parametrize("name, task", found, ids=[f"{name}-{task.name}" for name, task in found])


def some_fast(names: Sequence[str], fast: set[str]) -> list[Any]:
    """Parameters of which only `fast` ones run in `make test`: the others differ in what other tests look at."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps its Arrow files in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session", autouse=True)
def flower_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs and stores of the tests do not meet the user's; `model.dtype = 'auto'` is the same on every machine."""
    os.environ["FLWR_HOME"] = str(tmp_path_factory.mktemp("flower"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "fastest_type", lambda device: "float32")
        yield


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One directory per architecture: random weights, no head."""
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with MiniLM's tokenizer, for whole runs in seconds."""
    path = tmp_path_factory.mktemp("tiny") / "bert"
    tokenizer = load_tokenizer(MINILM)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    AutoModel.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def backbone(path: Path, **options: str) -> Backbone:
    return Backbone(str(path), TASKS["classification"], LABELS, pad_token_id=0, **options)


def mean_loss(task: Task, outputs: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A batch's loss as a step has it."""
    return task.losses(outputs, batch).sum() / task.counts(batch).sum()


def metrics(task: Task, logits: Any, labels: Sequence[Any], names: Sequence[str]) -> dict[str, float]:
    """What the task's evaluation makes of these rows' logits and of labels as `collate` takes them, the last half first."""
    plain = SimpleNamespace(pad_token_id=0, sep_token_id=None, model_input_names=["input_ids"])
    values = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(np.asarray(row)) for row in logits], batch_first=True)
    ids = [[1] * (values.shape[1] if values.dim() > 2 else 1)] * len(values)
    evaluation = task.evaluation(Encoded(ids, labels), tuple(names))
    cut = (len(ids) + 1) // 2
    for rows in (slice(cut, None), slice(cut)):
        if len(ids[rows]):
            evaluation.add(SimpleNamespace(logits=values[rows]), task.collate(plain, ids[rows], labels[rows]))
    return evaluation.result()


def some_rows(task: Task, ids: list[list[int]], rng: np.random.Generator) -> Encoded:
    """Rows of tokens with labels, of any built-in task; a tag on two of three tokens, an answer in the last half."""
    count = len(LABELS)
    one_of = {
        "classification": lambda row: int(rng.integers(0, count)),
        "regression": lambda row: float(rng.normal()),
        "multi-label": lambda row: np.flatnonzero(rng.random(count) < 0.5).tolist(),
        "token-classification": lambda row: [
            UNLABELLED if i % 3 == 2 else int(rng.integers(0, count)) for i in range(len(row))
        ],
        "causal-lm": lambda row: [UNLABELLED if 2 * i < len(row) else token for i, token in enumerate(row)],
        "question-answering": lambda row: [*sorted(rng.integers(1, len(row), 2).tolist()), 1, len(row) - 1],
    }[task.name]
    labels = [one_of(row) for row in ids]
    if task.name != "question-answering":
        return Encoded(ids, labels)
    return some_windows(ids, labels)


def some_windows(ids: list[list[int]], spans: list[list[int]]) -> Encoded:
    """Questions of one token about contexts in which token i is a word of two characters that begins at 3·i."""
    contexts = [" ".join(f"w{chr(ord('a') + i)}" for i in range(len(row))) for row in ids]
    targets = [[[text[3 * first : 3 * last + 2], 3 * first]] for text, (first, last, *_) in zip(contexts, spans, strict=True)]
    begins = [3 * np.arange(len(row), dtype=np.int32) for row in ids]
    windows = [Window(i, np.stack([begin, begin + 2], axis=1)) for i, begin in enumerate(begins)]
    examples = Examples(("?",) * len(ids), pairs=tuple(contexts), targets=tuple(targets))
    return Encoded(ids, [[*span, i] for i, span in enumerate(spans)], (windows, examples))


def enlarge(model: torch.nn.Module, times: float) -> None:
    """Larger numbers than a fresh model's, of which nothing would be seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(times)


def random_arrays(spec: ModelSpec, mask: RankMask, seed: int = 0, spread: float = 0.3) -> Arrays:
    rng = np.random.default_rng(seed)
    return {part: rng.normal(0, spread, spec.length(part, mask)).astype(np.float32) for part in ("B", "E", "A", "head")}


def random_batch(seed: int = 0, rows: int = 4, length: int = 7) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=rng)
    labels = torch.randint(0, len(LABELS), (rows,), generator=rng)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
