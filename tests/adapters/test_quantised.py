"""Backbones in 8 and 4 bits: what is quantised, what stays as it was, what is computed, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TASKS, backbone, mean_loss, random_arrays, random_batch
from export_helper import stock_logits
from peft.tuners.adalora.layer import SVDLinear
from runs_helper import CLIENTS, config, prepare
from torch import nn

from fedara_flwr import engine, strategies
from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.quantise import dequantised, quantise
from fedara_flwr.cli import doctor
from fedara_flwr.cli.exporting import export
from fedara_flwr.client.capacity import FlopCounter
from fedara_flwr.config import QUANTISED
from fedara_flwr.keys import ConfigError
from fedara_flwr.model.deltas import Piece, dense_size, from_factors
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.node.settings import NodeSettings
from fedara_flwr.runs.directory import read_facts
from fedara_flwr.runs.keeper import open_run
from fedara_flwr.strategies.federa import FeDeRA
from fedara_flwr.tasks import read_settings

bnb = pytest.importorskip("bitsandbytes")

RANK = 4
TASK = TASKS["classification"]
ALL = frozenset({"B", "E", "A", "head"})
CHANGING = {"full", "slora", "flora", "fedex-lora"}
BFLOAT16 = 2.0**-9  # largest relative error of rounding to 8 significant bits
each = pytest.mark.parametrize("dtype", QUANTISED)
architectures = pytest.mark.parametrize("name", ["bert", "llama"])


def loaded(path, dtype, trainable=ALL, e=None, cache="off", device="cpu"):
    adapted = AdaptedModel(backbone(path, dtype=dtype, device=device), cache, 64)
    mask = RankMask.full([RANK] * len(adapted.spec.modules))
    arrays = random_arrays(adapted.spec, mask)
    if e is not None:
        arrays["E"][:] = e
    adapted.load(arrays, mask, (2.0,) * len(mask.ranks), trainable)
    return adapted


def bits(adapted):
    """All numbers of the blocks' linear layers, as they lie in memory and as they stand for."""
    layers = [layer.base_layer for layer in adapted.layers]
    stored = b"".join(p.detach().cpu().view(torch.uint8).numpy().tobytes() for x in layers for p in x.parameters())
    return stored, b"".join(dequantised(x).tobytes() for x in layers)


def train(adapted, steps=2):
    """As client/train.py without dropout: in eval(), with evaluations before and between."""
    optimizer = torch.optim.AdamW([p for part in sorted(ALL) for p in adapted.parameters(part)], lr=1e-2)
    batch = {name: value.to(adapted.device) for name, value in random_batch().items()}
    adapted.model.train(False)
    losses = []
    for _ in range(steps):
        with torch.no_grad():
            adapted.outputs(batch).logits.float()
        loss = mean_loss(TASK, adapted.outputs(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for part in ALL for p in adapted.parameters(part))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, optimizer


# -- the numbers ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [0.02, 1.0])
@each
def test_no_weight_is_further_off_than_its_format_allows(dtype, scale):
    """int8: half a step of 1/127 of the row's largest. NF4: half its widest gap, from -1 to -0.6962, of the largest of 64.

    bfloat16 comes before both. The scales themselves are float16 in int8's way (2^-11), and 8-bit in int4's: within 2 % here.
    """
    model = nn.Sequential(nn.Linear(128, 48, dtype=torch.bfloat16))
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0)) * scale
    model[0].weight.data = weight.bfloat16()
    quantise(model.requires_grad_(False), ["0"], dtype, "cpu")
    error = np.abs(dequantised(model[0]) - weight.numpy())
    if dtype == "int8":
        allowed = np.abs(weight.numpy()).max(1, keepdims=True) * (0.5 / 127 + BFLOAT16 + 2.0**-11)
    else:
        allowed = np.abs(weight.numpy()).reshape(48, 2, 64).max(2).repeat(64, axis=1) * ((1 - 0.6962) / 2 + BFLOAT16 + 0.02)
    assert (error <= allowed).all()
    assert error.max() > allowed.max() / 4  # it is quantised


@each
def test_bytes_of_a_layer(dtype):
    """512 × 256: int8 has a byte a weight and 4 a row; int4 half a byte a weight, 1 for 64, and 4 for 256 of those."""
    model = nn.Sequential(nn.Linear(256, 512, bias=False)).requires_grad_(False)
    plain = model[0].weight.nbytes
    quantise(model, ["0"], dtype, "cpu")
    weight = model[0].weight
    if dtype == "int8":
        assert weight.nbytes == 131_072 == plain / 4 and weight.SCB.nbytes == 2048
    else:
        state = weight.quant_state
        assert weight.nbytes == 65_536 == plain / 8
        assert state.absmax.nbytes == 2048 and state.state2.absmax.nbytes == 32


@architectures
@each
def test_logits_are_those_of_the_dequantised_weights(tiny_models, name, dtype):
    """bfloat16 rounds, and int8's inputs keep 1/254: some 30 such errors in a row, each 2^-8 at most, are 12 %; half of it."""
    adapted, plain = loaded(tiny_models[name], dtype), loaded(tiny_models[name], "float32")
    for layer, own in zip(adapted.layers, plain.layers, strict=True):
        own.base_layer.weight.data = torch.from_numpy(dequantised(layer.base_layer))
    with torch.no_grad():
        found, expected = adapted.outputs(random_batch()).logits.float(), plain.outputs(random_batch()).logits.float()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.06 * float(expected.abs().max()))


@architectures
@each
def test_logits_are_near_those_of_float32(tiny_models, name, dtype):
    """Root mean squares of a weight's error over the weight's own, for normal weights: NF4 9 %, int8 2.5/127/√12 = 0.6 %.

    12 products in a row (3 blocks, 4 each) add up as √12: 32 % and 2 %; with int8's inputs and bfloat16 twice that, 4 %.
    """
    adapted, plain = loaded(tiny_models[name], dtype, e=0.0), loaded(tiny_models[name], "float32", e=0.0)
    with torch.no_grad():
        found, expected = adapted.outputs(random_batch()).logits.float(), plain.outputs(random_batch()).logits.float()
    assert float((found - expected).norm() / expected.norm()) < {"int8": 0.04, "int4": 0.32}[dtype]


@architectures
@each
def test_layer_is_the_function_of_pefts_own_with_its_gradients(tiny_models, name, dtype):
    """PEFT has a class for each format, which it places where the whole model says that it is quantised."""
    from peft.tuners.adalora.bnb import SVDLinear4bit, SVDLinear8bitLt

    adapted = loaded(tiny_models[name], dtype)
    layer, own = adapted.layers[3], {"int8": SVDLinear8bitLt, "int4": SVDLinear4bit}[dtype]
    assert isinstance(layer, SVDLinear) and isinstance(
        layer.base_layer, {"int8": bnb.nn.Linear8bitLt, "int4": bnb.nn.Linear4bit}[dtype]
    )
    inputs = torch.randn(2, 5, adapted.spec.modules[3].d_in, generator=torch.Generator().manual_seed(0))
    found = []
    for forward in (layer.forward, lambda x: own.forward(layer, x)):
        x = inputs.clone().requires_grad_()
        y = forward(x)
        wanted = [x, *(held["default"] for held in (layer.lora_B, layer.lora_E, layer.lora_A))]
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), wanted)])
    for mine, pefts in zip(*found, strict=True):
        torch.testing.assert_close(mine, pefts, rtol=1e-5, atol=1e-5 * float(pefts.abs().max()))


# -- training ---------------------------------------------------------------------------------------------------------
@architectures
@each
def test_what_is_trained_is_float32_and_the_backbone_never_changes(tiny_models, name, dtype):
    adapted = loaded(tiny_models[name], dtype, cache="exact")
    before = bits(adapted)
    losses, optimizer = train(adapted, 8)
    assert losses[-1] < losses[0]
    trained = [p for part in ALL for p in adapted.parameters(part)]
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert {t.dtype for t in [*trained, *(p.grad for p in trained), *moments]} == {torch.float32}
    assert {p for p in adapted.model.parameters() if p.requires_grad} == set(trained)
    adapted.set_delta(delta(adapted.spec))
    adapted.load(random_arrays(adapted.spec, adapted.mask), adapted.mask, (1.0,) * len(adapted.mask.ranks), ALL)
    train(adapted)
    adapted.set_delta(None)
    assert bits(adapted) == before


@architectures
@each
def test_a_step_from_kept_states_is_that_of_all_blocks(tiny_models, name, dtype):
    """One block dead: its output is kept. Rows have one length, so alone or together they differ by roundings alone."""
    adapted = loaded(tiny_models[name], dtype, cache="exact")
    mask = RankMask.full([RANK * (m.block > 0) for m in adapted.spec.modules])
    adapted.load(random_arrays(adapted.spec, mask), mask, (2.0,) * len(mask.ranks), ALL)
    batch = random_batch()
    with torch.no_grad():
        below = adapted.below(batch)
        assert below is not None and adapted.boundary == 1
        found, expected = adapted.outputs(batch, below).logits.float(), adapted.outputs(batch).logits.float()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def delta(spec):
    rng = np.random.default_rng(1)
    return from_factors([(rng.normal(0, 0.3, (m.d_out, 2)), rng.normal(0, 0.3, (2, m.d_in))) for m in spec.modules])


@architectures
@each
def test_an_delta_of_factors_is_added(tiny_models, name, dtype):
    """As adapters whose values are the delta's: the same products in the same types."""
    adapted = loaded(tiny_models[name], dtype, e=0.0)
    piece = delta(adapted.spec)
    adapted.set_delta(piece)
    nothing = RankMask.full([0] * len(adapted.spec.modules))
    head = random_arrays(adapted.spec, nothing)["head"]
    adapted.load({"head": head}, nothing, (1.0,) * len(nothing.ranks))
    with torch.no_grad():
        found = adapted.outputs(random_batch()).logits.float()
    adapted.set_delta(None)
    mask = RankMask.full(piece.ranks)
    with torch.no_grad():
        adapted.load({"head": head}, nothing, (1.0,) * len(nothing.ranks))
        bare = adapted.outputs(random_batch()).logits.float()
        ranked = {part: np.concatenate([rows.reshape(-1) for rows in rows_of(piece, adapted.spec, part)]) for part in "BA"}
        adapted.load({"head": head, **ranked}, mask, (1.0,) * len(mask.ranks))
        expected = adapted.outputs(random_batch()).logits.float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found, bare, atol=0.02)


def rows_of(piece, spec, part):
    """Each module's slots of one part, a slot a row, as `load` takes them."""
    from fedara_flwr.model.deltas import factors

    for left, right in factors(piece, spec):
        yield np.ascontiguousarray(left.T if part == "B" else right).astype(np.float32)


class Port:
    """What a strategy sees of a model, without data."""

    def __init__(self, adapted):
        self.adapted, self.spec, self.weight = adapted, adapted.spec, adapted.resident_weight


def started(method):
    """The model before round 1."""
    return method.weights(method.start())


@architectures
@pytest.mark.parametrize("server", ["float32", "int4"])
def test_federas_start_is_a_quantised_nodes_function(tiny_models, name, server):
    """Start and delta cancel whatever weights the server took them from; bfloat16 rounds both, of size 4 here."""
    settings = read_settings({"method": "federa", "adapter.rank": 3, "adapter.alpha": 12.0, "model.dtype": server})
    weights = started(FeDeRA(settings, Port(loaded(tiny_models[name], server))))
    weights.arrays["head"] = weights.arrays["head"] * 50  # logits of about 1
    adapted = loaded(tiny_models[name], "int4")
    nothing = RankMask.full([0] * len(weights.mask.ranks))
    with torch.no_grad():
        adapted.load({"head": weights.arrays["head"]}, nothing, weights.scales)
        expected = adapted.outputs(random_batch()).logits.float()
        adapted.set_delta(weights.delta)
        adapted.load(weights.arrays, weights.mask, weights.scales)
        found = adapted.outputs(random_batch()).logits.float()
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03)


@each
def test_nodes_of_every_number_type_agree_with_the_server(tiny_models, dtype):
    for name in ("bert", "llama"):
        assert backbone(tiny_models[name], dtype=dtype).spec == backbone(tiny_models[name]).spec


def test_only_linear_layers_of_the_blocks_are_quantised(tiny_models):
    loaded = backbone(tiny_models["bert"], dtype="int4", pooling="identity", target_modules="query")
    quantised = {name for name, module in loaded.model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert len(quantised) == 18 and all(name.startswith("bert.encoder.layer.") for name in quantised)
    assert torch.equal(loaded.model.bert.pooler.dense.weight, torch.eye(16, dtype=torch.bfloat16))
    assert {p.dtype for p in loaded.head_parameters()} == {torch.float32}
    assert loaded.model.bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16


@each
def test_quantised_products_count_as_plain_ones(tiny_models, dtype):
    """A batch of 4 rows of 7 tokens: the products of the weights are as many, whatever their type."""
    totals = []
    for kind in ("bfloat16", dtype):
        adapted = loaded(tiny_models["bert"], kind)
        with FlopCounter() as forward:
            loss = mean_loss(TASK, adapted.outputs(random_batch()), random_batch())
        with FlopCounter() as backward:
            loss.backward()
        totals.append((forward.total, backward.total))
    assert totals[0] == totals[1]


# -- runs -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def run(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setattr("fedara_flwr.runs.keeper.write_report", lambda path: path / "report.html")  # pictures take seconds

    def make(**changes):
        flat = config(tiny_bert, num_server_rounds=2, fedara__warmup_rounds=0, run__dir=str(tmp_path), **changes)
        return engine.run(flat, CLIENTS).path

    return make


def batch():
    ids = torch.randint(1000, 20000, (4, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@each
def test_a_run_of_two_rounds_and_what_it_leaves(run, tiny_bert, dtype):
    """Its adapter, and the merged model, go with the weights as published: both have the same logits."""
    path = run(method="fedara", model__dtype=dtype, run__name=dtype)
    facts = read_facts(path)
    assert facts["outcome"] == "completed" and facts["rounds"] == 2 and not facts["left-out"]
    run = open_run(path)
    model, weights = run.model, run.method.weights(run.state)
    merged = export(path, "merged", say=lambda line: None)
    with torch.no_grad():
        own = model.adapted
        own.load(weights.arrays, weights.mask, weights.scales)
        trained = own.outputs(batch()).logits.float().numpy()
    found = stock_logits("merged", tiny_bert, merged, batch())
    np.testing.assert_allclose(found, stock_logits("peft", tiny_bert, path / "adapter", batch(), len(model.labels)), atol=5e-6)
    assert np.linalg.norm(found - trained) / np.linalg.norm(trained) < {"int8": 0.04, "int4": 0.32}[dtype]


def test_a_run_without_adapters_leaves_the_whole_model(run, tiny_bert):
    path = run(method="head", model__dtype="int4", run__name="head")
    assert np.isfinite(stock_logits("merged", tiny_bert, path / "model", batch())).all()


# -- what cannot be ---------------------------------------------------------------------------------------------------
def test_which_methods_change_the_backbone():
    assert {name for name, method in strategies.built_in().items() if method.changes_backbone} == CHANGING


@pytest.mark.parametrize("method", sorted(CHANGING))
def test_a_server_with_quantised_weights_refuses_them(tiny_models, method):
    settings = read_settings({"method": method, "model.dtype": "int8", "num-server-rounds": 2})
    with pytest.raises(
        ConfigError, match=f"model.dtype = 'int8': method '{method}' changes the backbone, allowed are 'float32'"
    ):
        strategies.find(method)(settings, Port(loaded(tiny_models["bert"], "int8")))


def test_a_node_with_quantised_weights_is_left_out_of_them(tiny_bert):
    for method, unfit in (("fedlora", {}), ("flora", {"2": "node-config dtype = 'int4': method 'flora' changes the backbone"})):
        strategy, grid = prepare(config(tiny_bert, method=method, num_server_rounds=1, strategy__fraction_train=1.0))
        list(grid.contexts.values())[2].node_config["dtype"] = "int4"
        strategy.start(grid, strategy.initial_arrays(), 1)
        assert {key: why.partition(", ")[0] for key, why in strategy.roster.unfit.items()} == unfit


def test_what_would_change_the_weights_is_refused_at_the_model(tiny_models):
    """Also where a method does not say that it will; nothing is changed before."""
    adapted = loaded(tiny_models["bert"], "int4")
    before, spec = bits(adapted), adapted.spec
    arrays = random_arrays(spec, adapted.mask) | {"backbone": np.zeros(spec.size("backbone"), dtype=np.float32)}
    tries = (
        lambda: adapted.set_delta(Piece((), {"dense": np.ones(dense_size(spec), dtype=np.float32)})),
        lambda: adapted.load(arrays, adapted.mask, (2.0,) * len(spec.modules)),
        adapted.merge,
    )
    for attempt in tries:
        with pytest.raises(
            ConfigError, match=r"model.dtype = 'int4' \(or node-config dtype\): quantised weights cannot change"
        ):
            attempt()
    assert bits(adapted) == before
    train(adapted)


def test_without_bitsandbytes(tiny_models, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # import finds nothing
    line = r"model.dtype = 'int8' \(or node-config dtype\): bitsandbytes.*is missing; pip install 'fedara-flwr\[quantised\]'"
    with pytest.raises(ConfigError, match=line):
        backbone(tiny_models["bert"], dtype="int8")
    flat = {"model.name": str(tiny_models["bert"]), "model.dtype": "int8"}
    finding = doctor.model(read_settings(flat))
    assert finding.level == "problem" and "pip install" in finding.found
    backbone(tiny_models["bert"], dtype="bfloat16")


def test_keys():
    assert NodeSettings.read({"dtype": "int4"}).dtype == "int4"
    with pytest.raises(ConfigError, match="model.dtype = 'int5'.*did you mean 'int8'"):
        read_settings({"model.dtype": "int5"})


# -- on a GPU ---------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@architectures
@each
def test_a_gpu_trains_as_a_processor_does(tiny_models, name, dtype):
    found = loaded(tiny_models[name], dtype, device="cuda")
    losses, _ = train(found, 4)
    expected, _ = train(loaded(tiny_models[name], dtype), 4)
    np.testing.assert_allclose(losses, expected, rtol=0.05)
    assert found.layers[0].base_layer.weight.device.type == "cuda"


@pytest.mark.slow
def test_what_it_brings_at_import_warns_of_nothing():
    """In a fresh process that shows deprecations, as Flower's and Ray's do."""
    show = [sys.executable, "-W", "default::DeprecationWarning", "-c"]
    quiet = subprocess.run([*show, "import fedara_flwr.adapters.learner"], capture_output=True, text=True, check=True)
    loud = subprocess.run([*show, "import peft"], capture_output=True, text=True, check=True)
    assert "script_method" in loud.stderr and "script_method" not in quiet.stderr
