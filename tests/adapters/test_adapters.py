"""Adapters on every architecture: what shrinking, removing and loading do to logits, gradients and memory."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CONFIGS, LABELS, TASKS, backbone, mean_loss, pairs, random_arrays, random_batch
from peft.tuners.adalora.layer import SVDLinear
from transformers import AutoModel

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.backbone import Backbone
from fedara_flwr.keys import ConfigError
from fedara_flwr.model.deltas import Piece
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import SLOT_PARTS

RANK = 4
ALL = frozenset({"B", "E", "A", "head"})
architectures = pytest.mark.parametrize("name", list(CONFIGS))


def some_mask(spec, seed=0, share=0.5):
    """About half of the slots, and module 1 without any."""
    full = RankMask.full([RANK] * len(spec.modules))
    bits = np.random.default_rng(seed).random(full.count) < share
    bits[RANK : 2 * RANK] = False
    return RankMask(full.ranks, bits)


def scales(spec, alpha=8.0):
    return tuple(alpha / RANK for _ in spec.modules)


@architectures
def test_adapts_only_linear_layers_inside_blocks(tiny_models, name):
    loaded = backbone(tiny_models[name])
    per_block = {"bert": 6, "distilbert": 6, "roberta": 6, "deberta-v3": 6, "llama": 7, "qwen": 7}[name]
    assert len(loaded.spec.modules) == 3 * per_block
    assert [m.block for m in loaded.spec.modules] == sorted(m.block for m in loaded.spec.modules)
    assert loaded.spec.blocks == 3


@architectures
def test_head_is_the_task_layer(tiny_models, name):
    expected = {
        "bert": {"classifier"},
        "distilbert": {"pre_classifier", "classifier"},
        "roberta": {"classifier"},
        "deberta-v3": {"pooler", "classifier"},
        "llama": {"score"},
        "qwen": {"score"},
    }[name]
    loaded = backbone(tiny_models[name])
    assert set(loaded.head_modules) == expected
    assert {p.name.split(".")[0] for p in loaded.spec.head} == expected


@architectures
def test_zero_start_is_the_backbones_function(tiny_models, name):
    bare = backbone(tiny_models[name])
    adapted = AdaptedModel(backbone(tiny_models[name]))
    mask = RankMask.full([RANK] * len(adapted.spec.modules))
    arrays = random_arrays(adapted.spec, mask)
    arrays["E"] = np.zeros_like(arrays["E"])
    adapted.load(arrays, mask, scales(adapted.spec))
    batch = random_batch()
    for own, other in zip(bare.head_parameters(), adapted.head, strict=True):
        own.data = other.data.clone()
    with torch.no_grad():
        expected = bare.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        assert torch.equal(adapted.outputs(batch).logits.float(), expected)


@architectures
def test_shrinking_equals_zeroing_dead_slots(tiny_models, name):
    adapted = AdaptedModel(backbone(tiny_models[name]))
    spec = adapted.spec
    full = RankMask.full([RANK] * len(spec.modules))
    mask, arrays, batch = some_mask(spec), random_arrays(spec, full), random_batch()
    zeroed = dict(arrays, E=np.where(mask.bits, arrays["E"], 0).astype(np.float32))
    with torch.no_grad():
        adapted.load(zeroed, full, scales(spec))
        expected = adapted.outputs(batch).logits.float()
        adapted.load(spec.slice(arrays, full, mask), mask, scales(spec))
        assert torch.allclose(adapted.outputs(batch).logits.float(), expected, atol=1e-5)
        adapted.load(arrays, full, scales(spec))
        assert not torch.allclose(adapted.outputs(batch).logits.float(), expected, atol=1e-3)


@architectures
def test_gradients_of_alive_slots_equal_those_of_the_unshrunk_model(tiny_models, name):
    adapted, task = AdaptedModel(backbone(tiny_models[name])), TASKS["classification"]
    spec = adapted.spec
    full = RankMask.full([RANK] * len(spec.modules))
    mask, arrays, batch = some_mask(spec), random_arrays(spec, full), random_batch()

    def gradients(values, alive):
        adapted.load(values, alive, scales(spec), ALL)
        mean_loss(task, adapted.outputs(batch), batch).backward()
        rows = {part: [] for part in SLOT_PARTS}
        for _, triplet in adapted.alive():
            for part, parameter in triplet.items():
                grad = parameter.grad.T if part == "B" else parameter.grad
                rows[part].append(grad.reshape(-1))
        return {part: torch.cat(r).numpy() for part, r in rows.items()} | {
            "head": torch.cat([p.grad.reshape(-1) for p in adapted.head]).numpy()
        }

    unshrunk = gradients(dict(arrays, E=np.where(mask.bits, arrays["E"], 0).astype(np.float32)), full)
    shrunk = gradients(spec.slice(arrays, full, mask), mask)
    expected = spec.slice(unshrunk, full, mask)
    for part in ALL:
        largest = np.abs(expected[part]).max()
        assert largest > 0
        # matrix products of other shapes round otherwise, by how much depends on the processor
        np.testing.assert_allclose(shrunk[part], expected[part], rtol=0, atol=1e-5 * largest)


@architectures
def test_load_then_collect_returns_the_values(tiny_models, name):
    adapted = AdaptedModel(backbone(tiny_models[name]))
    mask = some_mask(adapted.spec)
    arrays = random_arrays(adapted.spec, mask)
    adapted.load(arrays, mask, scales(adapted.spec))
    collected = adapted.collect(ALL)
    assert all(np.array_equal(collected[part], arrays[part]) for part in ALL)


def test_scale_is_alpha_over_the_first_rank_after_pruning(tiny_models):
    """ΔW = s·B·diag(E)·A with s = 8/4 = 2 also where one slot of four is alive."""
    adapted = AdaptedModel(backbone(tiny_models["bert"]))
    spec = adapted.spec
    bits = np.zeros(RANK * len(spec.modules), dtype=bool)
    bits[2] = True
    mask = RankMask((RANK,) * len(spec.modules), bits)
    arrays = random_arrays(spec, mask)
    adapted.load(arrays, mask, scales(spec))
    delta = adapted.layers[0].get_delta_weight("default").detach().numpy()
    np.testing.assert_allclose(delta, 2.0 * arrays["E"][0] * np.outer(arrays["B"], arrays["A"]), rtol=1e-5)


def test_dead_modules_leave_the_model_and_come_back(tiny_models):
    adapted = AdaptedModel(backbone(tiny_models["bert"]))
    spec = adapted.spec
    place = adapted.model.get_submodule(spec.modules[1].name.rpartition(".")[0])
    child = spec.modules[1].name.rpartition(".")[2]
    mask = some_mask(spec)
    adapted.load(random_arrays(spec, mask), mask, scales(spec), ALL)
    assert type(getattr(place, child)) is torch.nn.Linear
    assert sum(p.numel() for p in adapted.model.parameters() if p.requires_grad) == sum(spec.length(p, mask) for p in ALL)
    full = RankMask.full(mask.ranks)
    adapted.load(random_arrays(spec, full), full, scales(spec), ALL)
    assert getattr(place, child) is adapted.layers[1]


@architectures
def test_no_activation_is_kept_below_the_lowest_living_block(tiny_models, name):
    """With adapters in the last block only, backward keeps what a one-block model keeps; block by block it grows."""
    adapted, task = AdaptedModel(backbone(tiny_models[name])), TASKS["classification"]
    spec, batch = adapted.spec, random_batch()

    def saved(lowest: int) -> int:
        bits = np.repeat([m.block >= lowest for m in spec.modules], RANK)
        mask = RankMask((RANK,) * len(spec.modules), bits)
        adapted.load(random_arrays(spec, mask), mask, scales(spec), ALL)
        kept: dict[int, int] = {}
        parameters = {p.data_ptr() for p in adapted.model.parameters()}

        def pack(tensor):
            if tensor.data_ptr() not in parameters:
                kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = mean_loss(task, adapted.outputs(batch), batch)
        total = sum(kept.values())
        del loss
        return total

    none, one, two, three = saved(3), saved(2), saved(1), saved(0)
    assert none < one < two < three
    assert two - one == pytest.approx(three - two, rel=0.25)


def test_no_gradient_flows_when_only_the_head_is_trained(tiny_models):
    adapted, task, batch = AdaptedModel(backbone(tiny_models["bert"])), TASKS["classification"], random_batch()
    mask = RankMask.full([0] * len(adapted.spec.modules))
    adapted.load({"head": np.ones(adapted.spec.size("head"), np.float32)}, mask, scales(adapted.spec), frozenset({"head"}))
    mean_loss(task, adapted.outputs(batch), batch).backward()
    assert [p for p in adapted.model.parameters() if p.grad is not None] == list(adapted.head)


def test_lora_is_the_same_layer_with_e_one(tiny_models):
    adapted = AdaptedModel(backbone(tiny_models["bert"]))
    spec = adapted.spec
    mask = RankMask.full([RANK] * len(spec.modules))
    arrays = random_arrays(spec, mask)
    del arrays["E"]
    adapted.load(arrays, mask, scales(spec), frozenset({"A", "B", "head"}))
    module = spec.modules[0]
    b = arrays["B"][: RANK * module.d_out].reshape(RANK, module.d_out).T
    a = arrays["A"][: RANK * module.d_in].reshape(RANK, module.d_in)
    np.testing.assert_allclose(adapted.layers[0].get_delta_weight("default").detach().numpy(), 2.0 * b @ a, atol=1e-6)
    assert not any(p.requires_grad for p in adapted.parameters("E"))


@pytest.mark.parametrize("delta", [False, True])
def test_layer_is_the_function_of_pefts_own_with_its_gradients(tiny_models, delta):
    adapted = AdaptedModel(backbone(tiny_models["bert"]))
    spec = adapted.spec
    mask = RankMask.full([RANK] * len(spec.modules))
    if delta:
        rng = np.random.default_rng(1)
        shapes = {"B": sum(m.d_out for m in spec.modules), "A": sum(m.d_in for m in spec.modules)}
        values = {part: rng.normal(size=size).astype(np.float32) for part, size in shapes.items()}
        adapted.set_delta(Piece((1,) * len(spec.modules), values))
    adapted.load(random_arrays(spec, mask), mask, scales(spec), ALL)
    layer = adapted.layers[3]
    inputs = torch.randn(2, 5, spec.modules[3].d_in, generator=torch.Generator().manual_seed(0))
    found = []
    for forward in (layer.forward, lambda x: SVDLinear.forward(layer, x)):
        x = inputs.clone().requires_grad_()
        y = forward(x)
        wanted = [x, *(held["default"] for held in (layer.lora_B, layer.lora_E, layer.lora_A))]
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), wanted)])
    for own, pefts in zip(*found, strict=True):
        torch.testing.assert_close(own, pefts, rtol=1e-5, atol=1e-5 * float(pefts.abs().max()))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_bfloat16_backbone_keeps_trainable_parts_in_float32(tiny_models, name):
    adapted, task, batch = AdaptedModel(backbone(tiny_models[name], dtype="bfloat16")), TASKS["classification"], random_batch()
    mask = RankMask.full([RANK] * len(adapted.spec.modules))
    adapted.load(random_arrays(adapted.spec, mask), mask, scales(adapted.spec), ALL)
    losses = task.losses(adapted.outputs(batch), batch)
    losses.sum().backward()
    trainable = [p for p in adapted.model.parameters() if p.requires_grad]
    assert losses.dtype == torch.float32
    assert {p.dtype for p in trainable} == {p.grad.dtype for p in trainable} == {torch.float32}
    assert adapted.layers[0].base_layer.weight.dtype == torch.bfloat16


def test_fingerprint_leaves_out_the_head_and_the_dtype(tiny_models):
    first = backbone(tiny_models["bert"])
    second = Backbone(str(tiny_models["bert"]), TASKS["classification"], (*LABELS, "more"), dtype="bfloat16")
    assert first.spec.fingerprint == second.spec.fingerprint
    assert first.spec.fingerprint != backbone(tiny_models["roberta"]).spec.fingerprint


def test_target_modules_choose_by_ending(tiny_models):
    loaded = backbone(tiny_models["bert"], target_modules="query, attention.output.dense")
    assert {m.name.split("layer.")[1][2:] for m in loaded.spec.modules} == {"attention.self.query", "attention.output.dense"}
    with pytest.raises(ConfigError, match="adapter.target-modules = 'q_proj'.*query"):
        backbone(tiny_models["bert"], target_modules="q_proj")


def test_identity_pooler_only_where_one_is_pretrained(tiny_models):
    bert = backbone(tiny_models["bert"], pooling="identity")
    assert bert.identity_pooler == "bert.pooler"
    assert torch.equal(bert.model.bert.pooler.dense.weight, torch.eye(16))
    assert backbone(tiny_models["deberta-v3"], pooling="identity").identity_pooler == ""
    assert backbone(tiny_models["llama"], pooling="identity").identity_pooler == ""


def test_missing_model_is_one_clear_line():
    with pytest.raises(ConfigError, match=r"model.name = '/nowhere/model': there is no such directory"):
        Backbone("/nowhere/model", TASKS["classification"], LABELS)


def test_checkpoint_with_a_hole_in_a_block_is_refused(tiny_models, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in tiny_models["bert"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks .*layer\.1\.output\.dense\.weight"):
        backbone(tmp_path)


@pytest.mark.parametrize("config, slot, megabytes", [("DistilBertConfig", 82_980, 3.98), ("BertConfig", 165_960, 7.97)])
def test_sizes_of_the_published_models(config, slot, megabytes):
    """By hand: one slot of B·E·A on every linear layer, and twelve of them in float32."""
    import transformers

    from fedara_flwr.adapters.blocks import block_lists, linear_modules
    from fedara_flwr.model.spec import ModelSpec

    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(getattr(transformers, config)())
    ran = {name for name, _ in model.named_modules()}
    modules = linear_modules("", model, block_lists("", model, ran), ran, (), "")
    spec = ModelSpec("", modules, ())
    assert sum(spec.length(part, RankMask.full([1] * len(modules))) for part in SLOT_PARTS) == slot
    twelve = RankMask.full([12] * len(modules))
    assert round(4 * sum(spec.length(part, twelve) for part in SLOT_PARTS) / 1e6, 2) == megabytes


def test_blocks_without_linear_layers_are_refused(tmp_path):
    """SqueezeBERT's blocks are made of nn.Conv1d."""
    from transformers import SqueezeBertConfig

    groups = {f"{kind}_groups": 1 for kind in ("q", "k", "v", "post_attention", "intermediate", "output")}
    sizes = {"hidden_size": 8, "embedding_size": 8, "intermediate_size": 8}
    config = SqueezeBertConfig(vocab_size=50, num_hidden_layers=2, num_attention_heads=2, **sizes, **groups)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"SqueezeBert.* no nn.Linear to adapt"):
        backbone(tmp_path)


def test_a_model_that_is_nowhere_is_one_line():
    from fedara_flwr.adapters.backbone import load_tokenizer

    for load in (load_tokenizer, lambda name: Backbone(name, TASKS["classification"], LABELS)):
        with pytest.raises(ConfigError, match=r"^model.name = 'nobody/no-such-model': cannot be loaded") as error:
            load("nobody/no-such-model")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [None, "7"])
def test_onednn_keeps_few_shapes_unless_told_otherwise(given):
    code = "import os; import fedara_flwr.adapters.backbone; print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    env = {key: value for key, value in os.environ.items() if key != name} | ({name: given} if given else {})
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip() == (
        given or "64"
    )


@pairs()
def test_the_heads_last_linear_layer(tiny_models, name, task):
    """Its rows are the outputs, one for each label; there is none where there are no labels."""
    names = LABELS if task.labelled else ()
    found = Backbone(str(tiny_models[name]), task, names, pad_token_id=0)
    if task.labelled:
        layer = found.model.get_submodule(found.last_linear)
        assert isinstance(layer, torch.nn.Linear) and layer.out_features == len(LABELS)
    else:
        assert found.last_linear == ""


def test_a_pooler_as_wide_as_there_are_labels_is_not_the_last_layer(tmp_path):
    """The checkpoint has none, so it is of the head and comes after the classifier: 16 outputs, as many as labels."""
    AutoModel.from_config(CONFIGS["bert"], add_pooling_layer=False).save_pretrained(tmp_path)
    found = Backbone(str(tmp_path), TASKS["classification"], tuple("abcdefghijklmnop"), pad_token_id=0)
    assert any("pooler" in parameter.name for parameter in found.spec.head) and found.last_linear == "classifier"


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_merged_model_has_the_checkpoints_own_type(tmp_path, stored):
    """Whatever it was trained in; sums are float32 and rounded once."""
    torch.manual_seed(0)
    AutoModel.from_config(CONFIGS["bert"]).to(stored).save_pretrained(tmp_path)
    adapted = AdaptedModel(backbone(tmp_path))
    spec, mask = adapted.spec, RankMask.full([RANK] * len(adapted.spec.modules))
    assert adapted.backbone.stored == stored and adapted.layers[0].base_layer.weight.dtype == torch.float32
    adapted.load(random_arrays(spec, mask), mask, scales(spec))
    layer = adapted.layers[0]
    expected = (layer.base_layer.weight + layer.get_delta_weight("default")).to(stored)
    adapted.merge()
    assert {parameter.dtype for parameter in adapted.model.parameters()} == {stored}
    assert torch.equal(adapted.model.get_submodule(spec.modules[0].name).weight, expected)
