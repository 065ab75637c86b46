"""A checkpoint's own head: kept where its labels are the run's, and never lost without a word."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from conftest import CONFIGS, LABELS, TASKS, random_batch
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, T5Config

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.backbone import Backbone
from fedara_flwr.keys import ConfigError
from fedara_flwr.model.draws import drawn_head
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.tasks import read_settings

LABEL = dict(enumerate(LABELS))


def save(folder, name, auto=AutoModelForSequenceClassification, **changes):
    config = copy.deepcopy(CONFIGS[name])
    for key, value in {"pad_token_id": 0, "id2label": LABEL, "dtype": torch.float32, **changes}.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    model.save_pretrained(folder)
    return model


def opened(folder, labels=LABELS, task="classification", **options):
    return Backbone(str(folder), TASKS[task], labels, pad_token_id=0, pooling="identity", **options)


@torch.no_grad()
@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_head_of_the_runs_labels_is_kept(tmp_path, name):
    """The whole of it, and a pooler that was trained with it: the run begins with the checkpoint's own logits."""
    published = save(tmp_path, name)
    batch = {key: value for key, value in random_batch().items() if key != "labels"}
    expected = published(**batch).logits
    for labels in (LABELS, LABELS[::-1]):
        found = opened(tmp_path, labels)
        adapted, modules = AdaptedModel(found), len(found.spec.modules)
        adapted.load({"head": drawn_head(found.spec, 7)}, RankMask.full([0] * modules), (1.0,) * modules)
        by_name = [LABELS.index(label) for label in labels]
        torch.testing.assert_close(adapted.outputs(batch).logits, expected[:, by_name], atol=1e-5, rtol=1e-5)
        assert not found.head_refused and not found.identity_pooler
    assert found.spec.kept is not None and found.spec.fingerprint == opened(tmp_path).spec.fingerprint


@torch.no_grad()
@pytest.mark.parametrize("labels", [LABELS, ("x", "y", "z"), ("x", "y")])
def test_a_head_of_a_name_that_no_task_knows(tmp_path, labels):
    """T5's and BART's is called classification_head, and what lies beside the model below is the head."""
    sizes = {"vocab_size": 97, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = T5Config(**sizes, decoder_start_token_id=0, id2label=LABEL)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    found = opened(tmp_path, labels)
    assert found.head_modules == ("classification_head",) and len(found.labels) == found.spec.head[-1].size
    assert (found.spec.kept is not None) == (labels == LABELS) == (not found.head_refused)


def test_server_and_device_must_hold_the_same_head(tmp_path):
    """Where it is kept it belongs to what their fingerprint is of."""
    save(tmp_path / "one", "bert")
    model = save(tmp_path / "two", "bert")
    model.classifier.bias.data += 1
    model.save_pretrained(tmp_path / "two")
    kept, drawn = ([opened(tmp_path / way, labels).spec for way in ("one", "two")] for labels in (LABELS, ("x", "y", "z")))
    assert kept[0].fingerprint != kept[1].fingerprint and drawn[0].fingerprint == drawn[1].fingerprint
    assert np.array_equal(drawn_head(drawn[0], 1), drawn_head(drawn[1], 1))


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (("x", "y", "z"), "the checkpoint's is for other labels ('red', 'green', 'blue')"),
        (("red", "green"), "the checkpoint's has 3 outputs, the run needs 2"),
        ((*LABELS, "grey"), "the checkpoint's has 3 outputs, the run needs 4"),
    ],
)
@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
def test_another_head_is_drawn_and_the_line_says_why(tmp_path, name, labels, why):
    save(tmp_path, name)
    found = opened(tmp_path, labels)
    assert found.spec.kept is None and found.head_refused == why and found.other_head is (len(labels) != 3)
    assert len(found.labels) == found.model.config.num_labels == len(labels)


def test_a_base_model_without_a_head_has_no_line(tiny_models):
    for name, path in tiny_models.items():
        found = opened(path)
        assert (found.spec.kept, found.head_refused, found.other_head) == (None, "", False), name


def test_labels_that_nobody_named(tmp_path):
    """'LABEL_0' says nothing of what it stands for."""
    save(tmp_path, "bert", id2label={i: f"LABEL_{i}" for i in range(3)})
    assert opened(tmp_path).head_refused == "the checkpoint's is for other labels ('LABEL_0', 'LABEL_1', 'LABEL_2')"


def test_labels_by_ids_with_gaps(tmp_path):
    """{0: a, 2: b, 5: c} does not say which of three outputs is b."""
    save(tmp_path, "bert", id2label=dict(enumerate(LABELS)))
    facts = json.loads((tmp_path / "config.json").read_text())
    gaps = {str(2 * i): label for i, label in enumerate(LABELS)}
    (tmp_path / "config.json").write_text(json.dumps(facts | {"id2label": gaps}))
    assert opened(tmp_path).head_refused == "the checkpoint's is for other labels (its id2label has gaps)"


def test_tasks_without_label_names(tmp_path):
    """A regression's or a question answerer's own head fits by its shape."""
    save(tmp_path / "one", "bert", id2label={0: "LABEL_0"})
    assert opened(tmp_path / "one", (), "regression").spec.kept is not None
    save(tmp_path / "three", "bert")
    assert opened(tmp_path / "three", (), "regression").head_refused == "the checkpoint's has 3 outputs, the run needs 1"
    save(tmp_path / "answers", "bert", AutoModelForQuestionAnswering, id2label={0: "LABEL_0", 1: "LABEL_1"})
    assert opened(tmp_path / "answers", (), "question-answering").spec.kept is not None


def test_weights_that_are_not_those_of_the_configuration(tmp_path):
    save(tmp_path, "bert")
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts | {"vocab_size": 50}))
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path)
    line = "bert.embeddings.word_embeddings.weight has shape (97, 16) in the checkpoint, by its config.json it needs (50, 16)"
    assert str(caught.value) == f"model.name = {str(tmp_path)!r}: {line}"


def test_a_kept_head_learns_slowly():
    """It has learnt already, as a solved one has."""
    train = read_settings({}).train
    rates = [
        train.local(1e-2, diversity, kept=kept).head_learning_rate
        for diversity, kept in ((None, False), (None, True), (1.0, False))
    ]
    assert rates == [1e-2, 1e-3, 1e-3]
