"""Classification: encoding, padding, loss and metrics, and predictions in the order of the rows."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LABELS, MINILM, TASKS, backbone, mean_loss, metrics, random_arrays
from hypothesis import given, settings
from hypothesis import strategies as st

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.backbone import load_tokenizer
from fedara_flwr.adapters.learner import Learner
from fedara_flwr.data.examples import Examples
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.tasks import Encoded

TASK = TASKS["classification"]
NAMES = ("a", "b", "c", "d", "e")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MINILM)


def examples(texts: list[str], pairs: list[str] | None = None) -> Examples:
    return Examples(tuple(texts), np.zeros(len(texts), dtype=np.int64), None if pairs is None else tuple(pairs))


def both(tokenizer, texts: list[str], pairs: list[str] | None = None):
    """Our batch, and the tokenizer's own."""
    ids = TASK.encode(tokenizer, examples(texts, pairs), 64).ids
    ours = TASK.collate(tokenizer, ids, [0] * len(texts))
    return ours, tokenizer(texts, pairs, padding=True, truncation=True, max_length=64, return_tensors="pt")


# encoding


def test_encode_adds_special_tokens(tokenizer):
    ids = TASK.encode(tokenizer, examples(["hello world", "hello"]), 64).ids
    hello, world = tokenizer.convert_tokens_to_ids(["hello", "world"])
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert ids == [[start, hello, world, end], [start, hello, end]]


def test_encode_gives_each_row_its_label(tokenizer):
    rows = Examples(("hello", "world", "hello world"), np.array([2, 0, 1]))
    assert TASK.encode(tokenizer, rows, 64).labels == [2, 0, 1]


def test_encode_cuts(tokenizer):
    (ids,) = TASK.encode(tokenizer, examples(["hello " * 50]), 10).ids
    assert len(ids) == 10
    assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id


def test_encode_cuts_the_longer_of_a_pair(tokenizer):
    (ids,) = TASK.encode(tokenizer, examples(["hello " * 50], ["world"]), 10).ids
    hello, world = tokenizer.convert_tokens_to_ids(["hello", "world"])
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert ids == [start, *[hello] * 6, end, world, end]


def test_encode_nothing(tokenizer):
    assert len(TASK.encode(tokenizer, examples([]), 64)) == 0
    assert len(TASK.encode(tokenizer, examples([], []), 64)) == 0


# padding


def test_collate_pads_to_the_longest():
    plain = SimpleNamespace(pad_token_id=9, sep_token_id=None, model_input_names=["input_ids", "attention_mask"])
    batch = TASK.collate(plain, [[1, 2, 3], [4], [5, 6]], [2, 0, 1])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9], [5, 6, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["labels"].tolist() == [2, 0, 1]
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_collate_masks_by_length_not_by_token():
    """Decoders pad with their end token, which may also be a real one."""
    plain = SimpleNamespace(pad_token_id=2, sep_token_id=None, model_input_names=["input_ids", "attention_mask"])
    batch = TASK.collate(plain, [[5, 2], [5, 6, 2]], [0, 0])
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


SINGLES = ["the sky is blue", "a", "green grass grows all around"]
PAIRS = ["why?", "because it is so", "I don't know; ask."]


@pytest.mark.parametrize("pairs", [None, PAIRS, ["", "b", ""]], ids=["single", "pairs", "empty"])
def test_collate_equals_the_tokenizer(tokenizer, pairs):
    ours, theirs = both(tokenizer, SINGLES, pairs)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert ours[name].tolist() == theirs[name].tolist(), name


def test_token_types_by_hand(tokenizer):
    """[CLS] hello [SEP] world [SEP] and padding."""
    ours, _ = both(tokenizer, ["hello", "hello world hello"], ["world", "world world"])
    assert ours["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1]]


def test_token_types_of_a_cut_pair(tokenizer):
    texts, pairs = ["hello " * 100], ["world " * 100]
    ours, theirs = both(tokenizer, texts, pairs)
    assert ours["input_ids"].shape == (1, 64)
    assert ours["token_type_ids"].tolist() == theirs["token_type_ids"].tolist()


@pytest.mark.parametrize("pairs", [None, ["the [SEP] token"]], ids=["single", "pair"])
def test_token_types_of_text_with_a_separator(tokenizer, pairs):
    """Text that spells out [SEP] is still one segment: types are 1 from the pair's first token on, not before."""
    texts = ["what [SEP] means"]
    ids = TASK.encode(tokenizer, examples(texts, pairs), 64).ids
    types = TASK.collate(tokenizer, ids, [0])["token_type_ids"].tolist()
    second = 0
    if pairs:
        alone = TASK.encode(tokenizer, examples(texts), 64).ids
        second = len(ids[0]) - len(alone[0])
    assert second > 0 or pairs is None
    assert types == [[0] * (len(ids[0]) - second) + [1] * second]


# head


@pytest.mark.parametrize("name", ["classifier", "pre_classifier", "score", "pooler"])
def test_head_modules(name):
    assert TASK.is_head(name)
    assert not TASK.is_head(f"encoder.{name}")


# loss


def test_loss_is_the_mean_cross_entropy():
    """p = (1/2, 1/4, 1/4) and (1/8, 3/4, 1/8) with labels 0 and 2: (ln 2 + ln 8) / 2 = 2 ln 2."""
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]]).log() + torch.tensor([[3.0], [-1.0]])
    loss = mean_loss(TASK, SimpleNamespace(logits=logits), {"labels": torch.tensor([0, 2])})
    assert loss.shape == () and loss.item() == pytest.approx(2 * math.log(2), rel=1e-6)


def test_loss_of_bfloat16_logits_is_float32():
    """Computed in bfloat16 it would be off in the third digit."""
    logits = torch.randn(32, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(32) % 12
    exact = logits.double().numpy()
    expected = np.mean(np.log(np.exp(exact).sum(axis=1)) - exact[np.arange(32), labels.numpy()])
    loss = mean_loss(TASK, SimpleNamespace(logits=logits), {"labels": labels})
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert abs(torch.nn.functional.cross_entropy(logits, labels).item() - expected) > 1e-4


# metrics


def test_metrics_by_hand():
    """Four labels, five rows; the true ones are 0 0 1 1 2, the predicted ones 0 1 1 1 0.

    accuracy: 3 of 5.
    F1 = 2·hits / (predicted + true): label 0 is 2·1/(2 + 2) = 0.5, label 1 is 2·2/(3 + 2) = 0.8, label 2 is 0/(0 + 1) = 0;
    label 3 occurs in neither and does not count. Macro: 1.3 / 3.
    Loss: the true labels have probabilities 1/2, 1/4, 1/2, 1/2, 1/4: (1 + 2 + 1 + 1 + 2)·ln 2 / 5 = 1.4 ln 2.
    A constant added to a row changes nothing.
    """
    p = np.array(
        [
            [1 / 2, 1 / 4, 1 / 8, 1 / 8],
            [1 / 4, 1 / 2, 1 / 8, 1 / 8],
            [1 / 8, 1 / 2, 1 / 4, 1 / 8],
            [1 / 4, 1 / 2, 1 / 8, 1 / 8],
            [1 / 2, 1 / 8, 1 / 4, 1 / 8],
        ]
    )
    logits = (np.log(p) + np.array([[0], [3], [-2], [10], [-10]])).astype(np.float32)
    found = metrics(TASK, logits, np.array([0, 0, 1, 1, 2]), NAMES)
    assert found["accuracy"] == pytest.approx(0.6)
    assert found["macro-f1"] == pytest.approx(1.3 / 3)
    assert found["loss"] == pytest.approx(1.4 * math.log(2), rel=1e-6)
    assert set(found) == {"accuracy", "macro-f1", "loss"}
    assert {type(value) for value in found.values()} == {float}


def test_metrics_of_a_perfect_and_a_wrong_model():
    labels = np.array([0, 1, 2, 1])
    right = metrics(TASK, 20 * np.eye(3, dtype=np.float32)[labels], labels, NAMES)
    wrong = metrics(TASK, 20 * np.eye(3, dtype=np.float32)[(labels + 1) % 3], labels, NAMES)
    assert right["accuracy"] == right["macro-f1"] == 1 and right["loss"] < 1e-6
    assert wrong["accuracy"] == wrong["macro-f1"] == 0 and wrong["loss"] == pytest.approx(20, rel=1e-6)


def test_loss_of_extreme_logits_is_finite():
    """Row 0 is certain and right, row 1 certain and wrong by 1000."""
    logits = np.array([[1000, 0], [1000, 0]], dtype=np.float32)
    assert metrics(TASK, logits, np.array([0, 1]), NAMES)["loss"] == pytest.approx(500)


def table_f1(truth: list[int], predicted: list[int]) -> float:
    """Macro-F1 from a confusion table: the harmonic mean of precision and recall, 0 where nothing was hit."""
    table = np.zeros((5, 5), dtype=int)  # [true, predicted]
    for t, p in zip(truth, predicted, strict=True):
        table[t, p] += 1
    scores = []
    for label in sorted(set(truth) | set(predicted)):
        hits, predictions, cases = table[label, label], table[:, label].sum(), table[label].sum()
        precision = hits / predictions if predictions else 0.0
        recall = hits / cases if cases else 0.0
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return sum(scores) / len(scores)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_metrics_agree_with_a_confusion_table(rows):
    truth, predicted = [t for t, _ in rows], [p for _, p in rows]
    found = metrics(TASK, np.eye(5, dtype=np.float32)[predicted], np.array(truth), NAMES)
    assert found["macro-f1"] == pytest.approx(table_f1(truth, predicted))
    hits = sum(t == p for t, p in rows)
    assert found["accuracy"] == pytest.approx(hits / len(rows))
    # the other four logits are 0: ln(e + 4), less 1 where the row is right
    assert found["loss"] == pytest.approx(math.log(math.e + 4) - hits / len(rows), rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 30))
def test_metrics_loss_is_the_training_loss(seed, count):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 5, (count, 4)).astype(np.float32)
    labels = rng.integers(0, 4, count)
    loss = mean_loss(TASK, SimpleNamespace(logits=torch.from_numpy(logits)), {"labels": torch.from_numpy(labels)}).item()
    assert metrics(TASK, logits, labels, NAMES)["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)


# predictions


class Reader:
    """Stands in for a model: the logits of a row are one-hot in its second token."""

    def __init__(self) -> None:
        self.model, self.device = torch.nn.Linear(1, 1), torch.device("cpu")
        self.backbone = SimpleNamespace(labels=NAMES)
        self.shapes: list[tuple[int, int]] = []

    def below(self, batch: dict[str, torch.Tensor]) -> None:
        """Nothing is frozen."""

    def outputs(self, batch: dict[str, torch.Tensor], below: None) -> SimpleNamespace:
        self.shapes.append(tuple(batch["input_ids"].shape))
        return SimpleNamespace(logits=torch.nn.functional.one_hot(batch["input_ids"][:, 1], 5).float())


def rows_of_many_lengths(count: int) -> tuple[list[list[int]], np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, count)
    return [[7, int(label), *[8] * int(rng.integers(0, 30))] for label in labels], labels


def test_predict_keeps_logits_with_their_rows():
    """A model that reads the label from the row is right in every row, and wrong in as many as we spoil."""
    plain = SimpleNamespace(pad_token_id=0, sep_token_id=None, model_input_names=["input_ids"])
    ids, labels = rows_of_many_lengths(75)
    assert Learner(Reader(), TASK, plain).evaluate(Encoded(ids, labels))["accuracy"] == 1
    spoiled = labels.copy()
    spoiled[[3, 40, 74]] = (labels[[3, 40, 74]] + 1) % 5
    assert Learner(Reader(), TASK, plain).evaluate(Encoded(ids, spoiled))["accuracy"] == pytest.approx(72 / 75)


def test_predict_groups_by_length_and_turns_dropout_off():
    plain = SimpleNamespace(pad_token_id=0, sep_token_id=None, model_input_names=["input_ids"])
    ids, labels = rows_of_many_lengths(75)
    reader = Reader()
    reader.model.train()
    Learner(reader, TASK, plain).evaluate(Encoded(ids, labels))
    assert not reader.model.training
    ordered = sorted(len(row) for row in ids)
    assert reader.shapes == [(32, ordered[31]), (32, ordered[63]), (11, ordered[74])]


@pytest.fixture(scope="module")
def adapted(tiny_bert):
    model = AdaptedModel(backbone(tiny_bert))
    mask = RankMask.full([2] * len(model.spec.modules))
    model.load(random_arrays(model.spec, mask), mask, (2.0,) * len(model.spec.modules))
    return model


def test_predict_whatever_the_order(adapted, tokenizer):
    rng = np.random.default_rng(0)
    words = "the a sky grass cherry is was blue green red very".split()
    texts = [" ".join(rng.choice(words, rng.integers(1, 30))) for _ in range(70)]
    ids = TASK.encode(tokenizer, examples(texts), 32).ids
    labels = rng.integers(0, len(LABELS), 70)
    expected = Learner(adapted, TASK, tokenizer).evaluate(Encoded(ids, labels))
    assert 0 < expected["accuracy"] < 1
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(70)
        found = Learner(adapted, TASK, tokenizer).evaluate(Encoded([ids[i] for i in order], labels[order]))
        assert found == pytest.approx(expected, rel=1e-5)


def test_predict_in_batches_equals_row_by_row(adapted, tokenizer):
    """Padding and neighbours do not change a row's logits."""
    texts, pairs = SINGLES * 12, PAIRS * 12
    ids = TASK.encode(tokenizer, examples(texts, pairs), 32).ids
    labels = np.arange(36) % len(LABELS)
    together = Learner(adapted, TASK, tokenizer).evaluate(Encoded(ids, labels))
    alone = [Learner(adapted, TASK, tokenizer).evaluate(Encoded([row], labels[i : i + 1])) for i, row in enumerate(ids)]
    for name in ("accuracy", "loss"):
        assert together[name] == pytest.approx(np.mean([one[name] for one in alone]), rel=1e-5)
