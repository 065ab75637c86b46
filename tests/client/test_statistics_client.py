"""What a client tells: features that enter the last layer of any head, and sums of them that are its own alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CONFIGS, LABELS, TASKS, backbone, random_arrays, some_rows
from data_helper import statistics_of
from test_session import PadOnly

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.backbone import Backbone
from fedara_flwr.adapters.features import features
from fedara_flwr.adapters.learner import Learner
from fedara_flwr.client.statistics import gather
from fedara_flwr.keys import ConfigError
from fedara_flwr.model.deltas import Piece
from fedara_flwr.model.draws import drawn_head
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.tasks import Encoded

ROWS, SEED = 45, 3  # more than one batch
architectures = pytest.mark.parametrize("name", sorted(CONFIGS))


def learner(path, task="classification", dtype="float32", cache="off"):
    loaded = Backbone(str(path), TASKS[task], LABELS, dtype=dtype, pad_token_id=0)
    return Learner(AdaptedModel(loaded, cache, 8), TASKS[task], PadOnly())


def data(seed=0, rows=ROWS, task="classification"):
    """Rows of different lengths, so that batches are padded."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(5, 97, size=rng.integers(2, 13)).tolist() for _ in range(rows)]
    return some_rows(TASKS[task], ids, rng)


def found(model, rows, seed=SEED, **options):
    parts = list(features(model, rows, drawn_head(model.adapted.spec, seed), **options))
    return np.concatenate([one.features for one in parts]), np.concatenate([one.classes for one in parts])


def by_length(rows):
    return np.argsort([len(ids) for ids in rows.ids], kind="stable").tolist()


def logits_one_by_one(model, rows):
    """The model's own outputs of each labelled prediction, a row at a time without any padding, in the order of `features`."""
    values = []
    with torch.no_grad():
        for i in by_length(rows):
            out = model.adapted.outputs(model.batch(rows, [i])).logits[0]
            labels = rows.labels[i]
            values += [out] if np.ndim(labels) == 0 else [out[p] for p, label in enumerate(labels) if label >= 0]
    return torch.stack(values).double().numpy()


def last_layer(model):
    layer = model.adapted.model.get_submodule(model.adapted.backbone.last_linear)
    bias = 0.0 if layer.bias is None else layer.bias.double().numpy()
    return layer.weight.double().numpy(), bias


# -- features -------------------------------------------------------------------------------------------------------
@architectures
@pytest.mark.parametrize("batch_tokens", [0, 30])
def test_features_times_the_last_layer_are_the_models_logits(tiny_models, name, batch_tokens):
    """Decoders put every position through it, and mean the last token's; all rows of a batch are padded on the right."""
    model, rows = learner(tiny_models[name]), data()
    entered, classes = found(model, rows, batch_tokens=batch_tokens)
    weight, bias = last_layer(model)
    expected = logits_one_by_one(model, rows)
    assert entered.shape == (ROWS, weight.shape[1]) and entered.dtype == np.float64
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(entered @ weight.T + bias, expected, atol=1e-5)
    assert classes.tolist() == [rows.labels[i] for i in by_length(rows)]
    assert not any(one.many for one in features(model, rows, drawn_head(model.adapted.spec, SEED)))


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "llama"])
def test_of_tags_it_is_each_words_own(tiny_models, name):
    """Padding, special tokens and the rest of a word are in no sum."""
    model, rows = learner(tiny_models[name], "token-classification"), data(task="token-classification")
    entered, classes = found(model, rows)
    weight, bias = last_layer(model)
    np.testing.assert_allclose(entered @ weight.T + bias, logits_one_by_one(model, rows), atol=1e-5)
    assert classes.tolist() == [tag for i in by_length(rows) for tag in rows.labels[i] if tag >= 0]
    assert all(one.many for one in features(model, rows, drawn_head(model.adapted.spec, SEED)))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_bfloat16_backbone_has_features_too(tiny_models, name):
    exact, _ = found(learner(tiny_models[name]), data())
    rounded, _ = found(learner(tiny_models[name], dtype="bfloat16"), data())
    assert np.abs(rounded - exact).max() < 0.06 * np.abs(exact).max()


def test_decoders_have_no_bias_and_encoders_have_one(tiny_models):
    for name in CONFIGS:
        model = backbone(tiny_models[name])
        names = {parameter.name for parameter in model.spec.head}
        assert f"{model.last_linear}.weight" in names
        assert (f"{model.last_linear}.bias" in names) == (name not in ("llama", "qwen"))


@pytest.mark.parametrize(
    "name, last", [("roberta", "classifier.out_proj"), ("distilbert", "classifier"), ("deberta-v3", "classifier")]
)
def test_a_layer_before_the_last_is_the_drawn_one_of_the_seed(tiny_models, name, last):
    model = learner(tiny_models[name])
    spec = model.adapted.spec
    assert model.adapted.backbone.last_linear == last
    entered, _ = found(model, data())
    changed, _ = found(model, data(), seed=SEED + 1)
    assert np.abs(entered - changed).max() > 1e-3
    loaded = dict(zip([p.name for p in spec.head], model.adapted.head, strict=True))
    rng_head = drawn_head(spec, SEED + 1)
    start = 0
    for parameter in spec.head:
        values = rng_head[start : start + parameter.size].reshape(parameter.shape)
        assert np.array_equal(loaded[parameter.name].detach().numpy(), values)
        start += parameter.size


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_where_the_last_layer_is_all_the_seed_does_not_matter(tiny_models, name):
    model = learner(tiny_models[name])
    assert np.array_equal(found(model, data())[0], found(model, data(), seed=SEED + 1)[0])


# -- what is told ---------------------------------------------------------------------------------------------------
def told(model, rows, scatter=True, least=1, simulated=True, seed=SEED):
    return gather(model, rows, seed, scatter, least, 0, simulated)


def same(one, other):
    pairs = [(getattr(one.statistics, name), getattr(other.statistics, name)) for name in vars(one.statistics)]
    return one.left_out == other.left_out and all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
def test_the_sums_are_those_of_the_rows(tiny_models, name):
    model, rows = learner(tiny_models[name]), data()
    one = told(model, rows)
    entered, classes = found(model, rows)
    expected = statistics_of(entered, classes, len(LABELS))
    assert one.statistics.counts.tolist() == np.bincount(rows.labels, minlength=len(LABELS)).tolist() and one.left_out == 0
    assert one.statistics.freedom == ROWS - len(LABELS)
    np.testing.assert_allclose(one.statistics.means, expected.means, rtol=1e-12)
    np.testing.assert_allclose(one.statistics.scatter, expected.scatter, rtol=1e-12)
    assert told(model, rows, scatter=False).statistics.scatter is None


def test_tags_are_counted_by_the_word(tiny_models):
    model, rows = learner(tiny_models["bert"], "token-classification"), data(task="token-classification")
    tags = [tag for row in rows.labels for tag in row if tag >= 0]
    assert told(model, rows).statistics.counts.tolist() == np.bincount(tags, minlength=len(LABELS)).tolist()


def labelled(*labels):
    rng = np.random.default_rng(1)
    return Encoded([rng.integers(5, 97, size=6).tolist() for _ in labels], list(labels))


def test_classes_with_too_few_rows_are_left_out(tiny_models):
    model = learner(tiny_models["bert"])
    rows = labelled(0, 0, 0, 0, 1, 1, 1, 2, 2)
    one = told(model, rows, least=3)
    assert one.statistics.counts.tolist() == [4, 3, 0] and one.left_out == 2 and one.statistics.freedom == 5
    assert not one.statistics.means[2].any()
    alone = told(model, Encoded(rows.ids[:7], rows.labels[:7]), least=3)
    np.testing.assert_allclose(one.statistics.scatter, alone.statistics.scatter, rtol=1e-4)
    assert told(model, rows, least=4).left_out == 5
    nothing = told(model, rows, least=5)
    assert nothing.statistics.rows == 0 and nothing.left_out == 9 and nothing.statistics.freedom == 0
    assert not nothing.statistics.scatter.any()


def test_a_row_without_a_word_that_has_a_tag(tiny_models):
    model = learner(tiny_models["bert"], "token-classification")
    one = told(model, Encoded([[5, 6, 7], [8, 9]], [[-100, -100, -100], [-100, 2]]))
    assert one.statistics.counts.tolist() == [0, 0, 1] and one.statistics.freedom == 0
    assert told(model, Encoded([[5, 6, 7]], [[-100] * 3])).statistics.rows == 0


def test_what_the_pass_took(tiny_models):
    model, rows = learner(tiny_models["bert"]), data()
    longest = [max(map(len, ids)) * len(ids) for ids in _batches(rows)]
    simulated, real = told(model, rows).metrics, told(model, rows, simulated=False).metrics
    assert simulated["tokens"] == real["tokens"] == sum(longest) and real["seconds-all"] > 0
    assert simulated["flops-forward"] > 0 == simulated["flops-backward"]
    assert not any(name.startswith("flops") for name in real)


def _batches(rows):
    ordered = [rows.ids[i] for i in by_length(rows)]
    return ordered[:32], ordered[32:]


# -- one client after another ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
def test_nothing_is_left_of_a_client_before(tiny_models, name):
    alone = told(learner(tiny_models[name]), data(1))
    model = learner(tiny_models[name], cache="exact")
    told(model, data(2, rows=70), least=9)
    told(model, data(3), seed=SEED + 1)
    assert same(told(model, data(1)), alone)
    assert same(told(model, data(1)), alone)


def test_what_was_trained_before_is_in_no_sum(tiny_models):
    """Adapters, head, delta and changes of the backbone: the features are the pre-trained model's."""
    alone = told(learner(tiny_models["bert"]), data(1))
    model = learner(tiny_models["bert"], cache="exact")
    spec = model.adapted.spec
    mask = RankMask.full([4] * len(spec.modules))
    changes = {"backbone": np.full(spec.size("backbone"), 0.1, dtype=np.float32)}
    factors = random_arrays(spec, mask)
    model.adapted.set_delta(Piece(mask.ranks, {part: factors[part] for part in ("B", "A")}))
    model.adapted.load(factors | changes, mask, (2.0,) * len(mask.ranks), frozenset({"B", "A", "head", "backbone"}))
    rows = data(1)
    with torch.no_grad():
        model.adapted.outputs(model.batch(rows, range(4)))
    assert same(told(model, rows), alone)


def test_nothing_hooks_on_after_the_pass(tiny_models):
    model = learner(tiny_models["bert"])
    layer = model.adapted.model.get_submodule(model.adapted.backbone.last_linear)
    told(model, data())
    assert not layer._forward_pre_hooks
    next(features(model, data(), drawn_head(model.adapted.spec, 0))).features.any()
    assert not layer._forward_pre_hooks  # a generator that is left early is closed
    assert not any(parameter.requires_grad for parameter in model.adapted.model.parameters())


# -- models of which nothing can be solved --------------------------------------------------------------------------
def line(model, rows=None):
    with pytest.raises(ConfigError) as caught:
        told(model, rows or data())
    said = str(caught.value)
    assert said.startswith("head.start: ") and said.isprintable() and "allowed is 'random'" in said
    return said


@pytest.mark.parametrize(
    "change", [lambda logits: 1.1 * logits, lambda logits: logits.tanh() + 0.01, lambda logits: logits.flip(0)]
)
def test_logits_that_are_not_the_layers_are_noticed(tiny_models, monkeypatch, change):
    model = learner(tiny_models["bert"])
    outputs = model.adapted.outputs

    def other(*args, **more):
        given = outputs(*args, **more)
        given.logits = change(given.logits)
        return given

    monkeypatch.setattr(model.adapted, "outputs", other)
    assert "what leaves the layer are not the logits" in line(model)


def test_a_layer_that_does_not_run_is_noticed(tiny_models, monkeypatch):
    model = learner(tiny_models["bert"])
    model.adapted.model.unused = torch.nn.Linear(16, len(LABELS))
    monkeypatch.setattr(type(model.adapted.backbone), "last_linear", "unused")
    assert "the layer is not run once" in line(model)


def test_a_layer_that_runs_twice_is_noticed(tiny_models, monkeypatch):
    model = learner(tiny_models["bert"])
    layer, forward = model.adapted.model.classifier, model.adapted.model.forward

    def other(**inputs):
        layer(torch.zeros(4, 16))
        return forward(**inputs)

    monkeypatch.setattr(model.adapted.model, "forward", other)
    assert "the layer is not run once" in line(model)


def test_a_head_without_a_linear_layer_is_noticed(tiny_models, monkeypatch):
    model = learner(tiny_models["bert"])
    monkeypatch.setattr(type(model.adapted.backbone), "last_linear", "")
    assert "has no linear layer" in line(model)


def test_after_a_refusal_the_next_client_is_served(tiny_models, monkeypatch):
    model = learner(tiny_models["bert"])
    expected = told(model, data())
    with monkeypatch.context() as patch:
        patch.setattr(model.adapted, "outputs", lambda *args: SimpleNamespace(logits=torch.ones(1)))
        line(model)
    assert same(told(model, data()), expected)
