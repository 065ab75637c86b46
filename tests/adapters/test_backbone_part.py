"""What changes in the backbone: deltas, full fine-tuning, drawn positions; and that the resident tensors never change."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from conftest import CONFIGS, TASKS, backbone, random_arrays, random_batch
from test_session import PadOnly, client, plan
from transformers import AutoModelForSequenceClassification

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.export import save_model
from fedara_flwr.adapters.learner import Learner
from fedara_flwr.client.train import batches, load, train
from fedara_flwr.model.deltas import Piece, as_dense, dense, dense_size, factors, from_factors
from fedara_flwr.model.draws import sparse_positions
from fedara_flwr.model.ranks import RankMask

RANK = 4
architectures = pytest.mark.parametrize("name", list(CONFIGS))
ADAPTERS = frozenset({"B", "A", "head"})


def delta_of(spec, kind, seed=0):
    """Factors of rank 2, none on module 0, or the same as one dense piece."""
    rng = np.random.default_rng(seed)
    ranks = [0] + [2] * (len(spec.modules) - 1)
    piece = from_factors(
        [
            (rng.normal(0, 0.3, (m.d_out, rank)).astype(np.float32), rng.normal(0, 0.3, (rank, m.d_in)).astype(np.float32))
            for m, rank in zip(spec.modules, ranks, strict=True)
        ]
    )
    return piece if kind == "factors" else as_dense(dense([piece], spec))


def no_slots(spec):
    return RankMask.full([0] * len(spec.modules))


def some_mask(spec):
    """Every third module without a slot."""
    full = RankMask.full([RANK] * len(spec.modules))
    return RankMask(full.ranks, full.modules % 3 != 1)


def scales(spec):
    return (2.0,) * len(spec.modules)


def head_of(spec):
    return np.random.default_rng(5).normal(0, 0.3, spec.size("head")).astype(np.float32)


def adapters(spec, mask, seed=0):
    return {part: v for part, v in random_arrays(spec, mask, seed).items() if part != "E"}


@torch.no_grad()
def logits_of(adapted):
    return adapted.outputs(random_batch()).logits.float()


def resident(adapted):
    """Where the resident tensors are, and their bytes."""
    return [(data.data_ptr(), data.float().numpy().tobytes()) for data in adapted._resident]


def is_restored(adapted, before):
    return [(p.data_ptr(), p.detach().float().numpy().tobytes()) for p in adapted._frozen] == before


# -- deltas --------------------------------------------------------------------------------------------------------
@architectures
@pytest.mark.parametrize("kind", ["factors", "dense"])
def test_a_delta_is_added_to_the_weights_of_living_and_dead_modules(tiny_models, name, kind):
    """The reference is a plain model whose weights were changed: no adapter, and s·B·A on two thirds of the modules."""
    adapted, plain = AdaptedModel(backbone(tiny_models[name])), backbone(tiny_models[name])
    spec, before = adapted.spec, resident(adapted)
    mask = some_mask(spec)
    arrays = adapters(spec, mask)
    adapted.load(arrays, mask, scales(spec), ADAPTERS)
    without = logits_of(adapted)
    piece = delta_of(spec, kind)
    adapted.set_delta(piece)
    adapted.load(arrays, mask, scales(spec), ADAPTERS)
    trained = {id(p) for part in ("B", "A", "head") for p in adapted.parameters(part)}
    assert {id(p) for p in adapted.model.parameters() if p.requires_grad} == trained

    starts = {"B": 0, "A": 0}
    for m, (module, change) in enumerate(zip(spec.modules, dense([piece], spec), strict=True)):
        pair = {}
        for part, width in (("B", module.d_out), ("A", module.d_in)):
            size = int(mask.alive[m]) * width
            pair[part] = arrays[part][starts[part] : starts[part] + size].reshape(-1, width)
            starts[part] += size
        plain.model.get_submodule(module.name).weight.data += torch.from_numpy(change + 2.0 * pair["B"].T @ pair["A"])
    start, batch = 0, random_batch()
    for p in plain.head_parameters():
        p.data = torch.from_numpy(arrays["head"][start : start + p.numel()]).view_as(p)
        start += p.numel()
    with torch.no_grad():
        expected = plain.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    changed = logits_of(adapted)
    torch.testing.assert_close(changed, expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(changed, without, atol=1e-3)

    adapted.merge()
    torch.testing.assert_close(logits_of(adapted), expected, atol=2e-5, rtol=1e-4)
    adapted.load(arrays, mask, scales(spec))
    assert torch.equal(logits_of(adapted), changed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted.set_delta(None)
    adapted.load(arrays, mask, scales(spec))
    assert torch.equal(logits_of(adapted), without)
    assert is_restored(adapted, before)


def test_deltas_replace_one_another(tiny_models):
    adapted = AdaptedModel(backbone(tiny_models["bert"]))
    spec, before = adapted.spec, resident(adapted)
    seen = {}
    for kind, seed in [
        ("factors", 0),
        ("dense", 1),
        ("factors", 1),
        ("dense", 0),
        ("factors", 0),
        ("factors", 1),
        ("dense", 1),
    ]:
        piece = delta_of(spec, kind, seed)
        adapted.set_delta(piece)
        adapted.set_delta(Piece(piece.ranks, dict(piece.arrays)))
        adapted.load({"head": head_of(spec)}, no_slots(spec), scales(spec))
        now = logits_of(adapted)
        assert torch.allclose(now, seen.setdefault(seed, now), atol=1e-5)
        assert torch.equal(now, seen.setdefault((kind, seed), now))
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)
    assert resident(adapted) == before


def test_a_piece_that_does_not_fit_changes_nothing(tiny_models):
    adapted = AdaptedModel(backbone(tiny_models["bert"]))
    spec = adapted.spec
    good, bad = (
        delta_of(spec, "factors"),
        Piece((2,) * len(spec.modules), {"B": np.ones(5, np.float32), "A": np.ones(5, np.float32)}),
    )
    adapted.set_delta(good)
    adapted.load({"head": head_of(spec)}, no_slots(spec), scales(spec))
    before = logits_of(adapted)
    for _ in range(2):
        with pytest.raises(ValueError, match="reshape"):
            adapted.set_delta(bad)
    adapted.load({"head": head_of(spec)}, no_slots(spec), scales(spec))
    assert torch.equal(logits_of(adapted), before)


# -- training -------------------------------------------------------------------------------------------------------
def work(adapted, what, key="1", **changes):
    """One client's round: `full`, `slora` (drawn positions) or LoRA; without votes."""
    spec = adapted.spec
    changes = {"vote": None, "scales": scales(spec), **changes}
    learner = Learner(adapted, TASKS["classification"], PadOnly())
    if what == "lora":
        mask = some_mask(spec)
        return train(learner, client(1), plan(mask, sent=ADAPTERS, **changes), adapters(spec, mask), key)
    entries = {"full": 0, "slora": 200}[what]
    orders = plan(no_slots(spec), sent=frozenset({"backbone", "head"}), entries=entries, draw_seed=7, **changes)
    change = np.random.default_rng(4).normal(0, 0.02, entries or spec.size("backbone")).astype(np.float32)
    arrays = {"head": head_of(spec), "backbone": change}
    return train(learner, client(1), orders, arrays, key)


def equal(first, second):
    return first.metrics["loss"] == second.metrics["loss"] and all(
        np.array_equal(first.arrays[part], second.arrays[part]) for part in first.arrays
    )


@pytest.mark.parametrize("name, dtype", [(name, "float32") for name in CONFIGS] + [("bert", "bfloat16"), ("llama", "bfloat16")])
def test_no_client_writes_the_resident_backbone_or_leaves_anything_behind(tiny_models, name, dtype):
    """Every way to train, with and without either delta, in one process; each result is that of a fresh one."""
    used = AdaptedModel(backbone(tiny_models[name], dtype=dtype))
    spec, before = used.spec, resident(used)
    order = [("lora", None), ("full", None), ("slora", "dense"), ("lora", "factors"), ("slora", None), ("full", "dense")]
    results = {}
    for what, kind in [*order, *order[::-1]]:
        used.set_delta(delta_of(spec, kind) if kind else None)
        update = work(used, what)
        assert equal(update, results.setdefault((what, kind), update))
        assert resident(used) == before
    used.set_delta(None)
    used.load({"head": head_of(spec)}, no_slots(spec), scales(spec))
    assert is_restored(used, before)
    assert not any(p.grad is not None or p.requires_grad for p in used._frozen)
    fresh = AdaptedModel(backbone(tiny_models[name], dtype=dtype))
    assert equal(work(fresh, "lora"), results["lora", None])


def test_full_training_is_that_of_the_plain_model(tiny_models):
    """The same batches and AdamW on a model without this package's layers; differences from the pre-trained values."""
    adapted, plain = AdaptedModel(backbone(tiny_models["bert"])), backbone(tiny_models["bert"])
    spec, data = adapted.spec, client(1)
    update = work(adapted, "full", dropout=False)
    change = np.random.default_rng(4).normal(0, 0.02, spec.size("backbone")).astype(np.float32)
    from fedara_flwr import seeds

    body = [plain.model.get_parameter(p.name) for p in spec.backbone]
    start = 0
    for p, value in zip(body, spec.backbone, strict=True):
        p.data = p.data + torch.from_numpy(change[start : start + value.size]).view_as(p)
        start += value.size
    start = 0
    for p in plain.head_parameters():
        p.data = torch.from_numpy(head_of(spec)[start : start + p.numel()]).view_as(p)
        start += p.numel()
    pretrained = [p.detach() for p in backbone(tiny_models["bert"]).frozen_parameters()]
    plain.model.requires_grad_(True)
    optimizer = torch.optim.AdamW([*body, *plain.head_parameters()], lr=1e-2, weight_decay=0.0)
    rng = np.random.default_rng(seeds.derive(3, "train", 1, "1"))
    for rows in batches([len(row) for row in data.train.ids], plan(no_slots(spec)).train, rng):
        batch = TASKS["classification"].collate(
            PadOnly(), [data.train.ids[i] for i in rows], [data.train.labels[i] for i in rows]
        )
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(plain.model(**inputs).logits, batch["labels"]).backward()
        optimizer.step()
    expected = torch.cat([(p.detach() - w).reshape(-1) for p, w in zip(body, pretrained, strict=True)]).numpy()
    assert np.abs(expected - change).max() > 0.02
    close = np.isclose(update.arrays["backbone"], expected, atol=1e-4)
    # Adam's first step is the sign of the gradient: where that is nothing but rounding, it may go either way
    assert close.mean() > 0.99


@pytest.mark.parametrize("extra", [{}, {"clip_norm": 0.5, "terms": {"prox": {"mu": 0.5}}}])
@architectures
def test_only_the_drawn_positions_of_the_backbone_are_trained(tiny_models, name, extra):
    adapted = AdaptedModel(backbone(tiny_models[name]))
    spec = adapted.spec
    update = work(adapted, "slora", **extra)
    positions = sparse_positions(spec, 200, 7)
    weights = {m.name: torch.tensor(adapted.resident_weight(m.name)).reshape(-1) for m in spec.modules}
    pretrained = torch.cat([weights[m.name] for m in spec.modules])
    now = torch.cat([layer.base_layer.weight.detach().reshape(-1) for layer in adapted.layers])
    untouched = np.ones(len(pretrained), bool)
    untouched[positions] = False
    assert torch.equal(now[untouched], pretrained[untouched])
    assert np.array_equal((now - pretrained).numpy()[positions], update.arrays["backbone"])
    received = np.random.default_rng(4).normal(0, 0.02, 200).astype(np.float32)
    assert (np.abs(update.arrays["backbone"] - received) > 1e-4).mean() > 0.9
    others = set(adapted._frozen) - {layer.base_layer.weight for layer in adapted.layers}
    kept = dict(zip(adapted._frozen, adapted._resident, strict=True))
    assert all(p.data_ptr() == kept[p].data_ptr() for p in others)


@pytest.mark.parametrize("what", ["full", "slora"])
def test_what_a_client_sends_back_of_the_backbone_leaves_the_delta_out(tiny_models, what):
    """Not trained at all, the difference that comes back is the one received, under either delta."""
    adapted = AdaptedModel(backbone(tiny_models["bert"]))
    spec = adapted.spec
    entries = {"full": 0, "slora": 200}[what]
    change = np.random.default_rng(4).normal(0, 0.02, entries or spec.size("backbone")).astype(np.float32)
    orders = plan(no_slots(spec), scales=scales(spec), sent=frozenset({"backbone", "head"}), entries=entries, draw_seed=7)
    for kind in (None, "dense", "factors"):
        adapted.set_delta(delta_of(spec, kind) if kind else None)
        load(adapted, orders, {"head": head_of(spec), "backbone": change})
        np.testing.assert_allclose(adapted.collect(frozenset({"backbone"}))["backbone"], change, atol=1e-6)


def test_drawn_values_are_those_of_the_server(tiny_models):
    """LoRA's A from eight bytes, B = 0: ΔW = 0, and A is the cut of the whole."""
    from fedara_flwr.model.draws import lora_a

    adapted = AdaptedModel(backbone(tiny_models["bert"]))
    spec, mask = adapted.spec, some_mask(adapted.spec)
    orders = plan(mask, scales=scales(spec), drawn=frozenset({"A", "B"}), draw_seed=11, sent=ADAPTERS)
    load(adapted, orders, {"head": head_of(spec)})
    collected = adapted.collect(frozenset({"A", "B"}))
    full = RankMask.full(mask.ranks)
    assert np.array_equal(collected["A"], full.slice(lora_a(spec, full, 11), spec.widths("A"), mask))
    assert not collected["B"].any()


# -- the server's view ------------------------------------------------------------------------------------------------
def test_the_frozen_weight_stays_the_frozen_one(tiny_models):
    """Also while a dense delta or a trained backbone is loaded; and nobody can write it."""
    adapted, plain = AdaptedModel(backbone(tiny_models["bert"])), backbone(tiny_models["bert"])
    spec = adapted.spec
    adapted.set_delta(delta_of(spec, "dense"))
    adapted.load({"head": head_of(spec), "backbone": np.ones(spec.size("backbone"), np.float32)}, no_slots(spec), scales(spec))
    for module in spec.modules:
        weight = adapted.resident_weight(module.name)
        assert np.array_equal(weight, plain.model.get_parameter(module.name + ".weight").detach().numpy())
        with pytest.raises(ValueError, match="read-only"):
            weight += 1


@pytest.mark.parametrize("kind", ["head", "full", "factors", "dense"])
def test_a_bfloat16_backbone_is_saved_without_rounding_what_was_trained(tiny_models, tmp_path, kind):
    """Stock transformers loads a model in one type: it must be float32, though the resident weights stay as they are."""
    adapted = AdaptedModel(backbone(tiny_models["bert"], dtype="bfloat16"))
    spec, arrays, mask, before = adapted.spec, {"head": head_of(adapted.spec)}, no_slots(adapted.spec), resident(adapted)
    change = np.zeros(spec.size("backbone"), np.float32)
    if kind == "full":
        arrays["backbone"] = change = np.random.default_rng(0).normal(0, 1e-4, spec.size("backbone")).astype(np.float32)
    elif kind != "head":
        adapted.set_delta(delta_of(spec, kind))
    adapted.load(arrays, mask, scales(spec))
    expected, batch = logits_of(adapted), random_batch()
    save_model(tmp_path, adapted)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert {p.dtype for p in stock.parameters()} == {torch.float32}
    with torch.no_grad():
        found = stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03)
    head = torch.cat([stock.get_parameter(p.name).reshape(-1) for p in spec.head])
    assert np.array_equal(head.detach().numpy(), arrays["head"])
    delta = dict(zip([m.name for m in spec.modules], dense([adapted._delta] if adapted._delta else [], spec), strict=True))
    start = 0
    for parameter, data in zip(spec.backbone, adapted._resident, strict=True):
        wanted = data.float().numpy() + change[start : start + parameter.size].reshape(parameter.shape)
        wanted = wanted + delta.get(parameter.name.removesuffix(".weight"), np.float32(0))
        np.testing.assert_allclose(stock.get_parameter(parameter.name).detach().numpy(), wanted, atol=1e-6)
        start += parameter.size
    adapted.set_delta(None)
    adapted.load({"head": arrays["head"]}, mask, scales(spec))
    assert is_restored(adapted, before) and {p.dtype for p in adapted._frozen} == {torch.bfloat16}


def test_full_is_exported_for_stock_transformers(tiny_models, tmp_path):
    adapted = AdaptedModel(backbone(tiny_models["bert"]))
    spec = adapted.spec
    change = np.random.default_rng(0).normal(0, 0.02, spec.size("backbone")).astype(np.float32)
    adapted.load({"head": head_of(spec), "backbone": change}, no_slots(spec), scales(spec))
    expected = logits_of(adapted).numpy()
    save_model(tmp_path, adapted)
    stock, batch = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval(), random_batch()
    with torch.no_grad():
        found = stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_sizes(tiny_models):
    """BERT of width 16 and 24: four 16 x 16, one 24 x 16 and one 16 x 24 per block."""
    spec = backbone(tiny_models["bert"]).spec
    assert dense_size(spec) == 3 * (4 * 256 + 2 * 384)
    assert [f[0].shape for f in factors(delta_of(spec, "factors"), spec)][:2] == [(16, 0), (16, 2)]
    assert spec.length("backbone", no_slots(spec)) == spec.size("backbone") == sum(p.size for p in spec.backbone)
    assert spec.length("backbone", no_slots(spec), entries=5) == 5
