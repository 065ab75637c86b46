"""Nothing passes from one client to the next in a process that serves many."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import LABELS, TASKS, backbone, random_arrays

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.learner import Learner
from fedara_flwr.client.session import own_settings, resident
from fedara_flwr.client.train import ClientData, Encoded, train
from fedara_flwr.keys import ConfigError
from fedara_flwr.model.parts import SVD
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.node.settings import NodeSettings
from fedara_flwr.tasks import read_settings
from fedara_flwr.training import LocalTraining
from fedara_flwr.wire.plan import TrainPlan

VOTE = {"budget": 5.0}


class PadOnly:
    pad_token_id = 0
    sep_token_id = None
    model_input_names = ("input_ids",)


def plan(mask, vote=VOTE, **changes):
    """Training settings among `changes` go where they belong; `vote` are the parameters of the votes' term, None = no votes."""
    training = {"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "head_learning_rate": 1e-2}
    training |= {"dropout": True, "loss": "plain"}
    training |= {name: changes.pop(name) for name in list(changes) if name in LocalTraining.model_fields}
    values = {
        "server_round": 1,
        "seed": 3,
        "mask": mask,
        "scales": (2.0,) * len(mask.ranks),
        "train": LocalTraining(**training),
        "sent": SVD,
        "report": frozenset() if vote is None else frozenset({"slot-vote"}),
    }
    values |= changes
    if vote is not None:
        values["terms"] = {**values.get("terms", {}), "slot-vote": vote}
    return TrainPlan(**values)


def client(seed, rows=12):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(5, 97, size=rng.integers(4, 9)).tolist() for _ in range(rows)]
    return ClientData(Encoded(ids, rng.integers(0, len(LABELS), rows)), Encoded([], np.zeros(0, np.int64)))


def run(adapted, key, mask, arrays, **changes):
    return train(Learner(adapted, TASKS["classification"], PadOnly()), client(int(key)), plan(mask, **changes), arrays, key)


def same(first, second):
    return (
        all(np.array_equal(first.arrays[p], second.arrays[p]) for p in first.arrays)
        and first.reports == second.reports != {}
        and first.metrics["loss"] == second.metrics["loss"]
    )


def test_a_client_trains_the_same_whoever_was_before_it(tiny_models):
    fresh, used = (AdaptedModel(backbone(tiny_models["bert"])) for _ in range(2))
    full = RankMask.full([4] * len(fresh.spec.modules))
    small = full.keep(np.arange(full.count) % 3 == 0)
    arrays = random_arrays(fresh.spec, full)
    expected = run(fresh, "2", small, fresh.spec.slice(arrays, full, small))
    run(used, "1", full, arrays)
    run(used, "7", full, random_arrays(used.spec, full, seed=9), terms={"prox": {"mu": 0.1}}, clip_norm=0.1)
    assert same(run(used, "2", small, used.spec.slice(arrays, full, small)), expected)


def test_a_failed_client_leaves_nothing_behind(tiny_models):
    fresh, used = (AdaptedModel(backbone(tiny_models["bert"])) for _ in range(2))
    full = RankMask.full([4] * len(fresh.spec.modules))
    arrays = random_arrays(fresh.spec, full)
    expected = run(fresh, "2", full, arrays)
    try:
        run(used, "1", full, {part: vector * np.float32(1e30) for part, vector in arrays.items()})
    except FloatingPointError as error:
        assert "not finite after 3 steps" in str(error)
    else:
        raise AssertionError("an infinite loss was not noticed")
    assert same(run(used, "2", full, arrays), expected)


def test_training_does_not_write_what_it_received(tiny_models):
    adapted = AdaptedModel(backbone(tiny_models["bert"]))
    full = RankMask.full([4] * len(adapted.spec.modules))
    arrays = random_arrays(adapted.spec, full)
    before = {part: vector.copy() for part, vector in arrays.items()}
    weights = {name: p.clone() for name, p in adapted.model.named_parameters() if "base_layer" in name}
    update = run(adapted, "1", full, arrays)
    assert all(np.array_equal(arrays[part], before[part]) for part in arrays)
    assert all(torch.equal(adapted.model.get_parameter(name), value) for name, value in weights.items())
    assert all(not np.array_equal(update.arrays[part], arrays[part]) for part in arrays)


def test_no_gradient_and_no_optimiser_state_for_frozen_parts(tiny_models):
    adapted = AdaptedModel(backbone(tiny_models["bert"]))
    full = RankMask.full([4] * len(adapted.spec.modules))
    arrays = random_arrays(adapted.spec, full)
    update = run(adapted, "1", full, arrays, sent=frozenset({"B", "head"}))
    assert set(update.arrays) == {"B", "head"}
    kept = adapted.collect(frozenset({"A", "E"}))
    assert np.array_equal(kept["A"], arrays["A"]) and np.array_equal(kept["E"], arrays["E"])


def test_random_streams_depend_on_round_and_client(tiny_models):
    adapted = AdaptedModel(backbone(tiny_models["bert"]))
    full = RankMask.full([4] * len(adapted.spec.modules))
    arrays = random_arrays(adapted.spec, full)
    data = client(1)
    learner = Learner(adapted, TASKS["classification"], PadOnly())
    losses = [
        train(learner, data, plan(full, server_round=t), arrays, key).metrics["loss"]
        for t, key in ((1, "1"), (1, "1"), (2, "1"), (1, "2"))
    ]
    assert losses[0] == losses[1] and len(set(losses)) == 3


def test_one_session_per_process_and_model(tiny_bert):
    settings = read_settings({"model.name": str(tiny_bert)})
    first = resident(settings, LABELS)
    assert resident(settings.model_copy(update={"num_server_rounds": 3}), LABELS) is first
    assert resident(settings, ("a", "b")) is not first


def test_a_device_uses_its_own_model_and_data_not_the_servers():
    run = {"data.path": "/etc/passwd", "model.name": "/somewhere", "data.name": "a/b"}
    settings = read_settings(run | {"data.subset": "sst2", "data.train-split": "part", "data.format": "encoding = 'cp1252'"})
    node = NodeSettings.read({"data-path": "/data/mine.parquet", "data-subset": "mine", "models": "/somewhere=/data/model"})
    own, path = own_settings(settings, node, trusted=False)
    assert (own.data.subset, own.data.train_split, own.data.format) == ("mine", "", "")
    assert (own.data.path, path, own.model.name) == ("/data/mine.parquet", "/data/mine.parquet", "/data/model")
    own, path = own_settings(settings, NodeSettings.read({"models": "other, /somewhere"}), trusted=False)
    assert (own.data.path, own.data.name, path, own.model.name) == ("", "docstrings", "", "/somewhere")
    with pytest.raises(ConfigError, match="model.name = '/somewhere' is not among them"):
        own_settings(settings, NodeSettings(), trusted=False)
    assert own_settings(settings, NodeSettings(), trusted=True) == (settings, "")
