"""The frozen prefix: the same loss and gradients as without it, and bits that depend on the example alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import CONFIGS, LABELS, TASKS, VOCABULARY, backbone, mean_loss, random_arrays
from hypothesis import given, settings
from hypothesis import strategies as st
from runs_helper import WALL_CLOCK, ShuffledGrid, config, prepare
from safetensors.torch import load_file, save_file
from test_capacity import LAYERS, LENGTH, RANK, ROWS, TOKENS, backward_flops, forward_flops
from test_session import PadOnly, plan
from transformers import AlbertConfig, AutoModel, T5Config, T5EncoderModel

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.backbone import Backbone
from fedara_flwr.adapters.learner import Learner
from fedara_flwr.adapters.prefix import Prefix
from fedara_flwr.client import session
from fedara_flwr.client.capacity import FlopCounter, backward_blocks
from fedara_flwr.client.train import ClientData, train
from fedara_flwr.engine import InProcessGrid
from fedara_flwr.model.deltas import Piece
from fedara_flwr.model.parts import LORA
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.strategies.legend import last_blocks
from fedara_flwr.tasks import Encoded, read_settings

TASK = TASKS["classification"]
PARTS = frozenset({"B", "E", "A", "head"})
architectures = pytest.mark.parametrize("name", list(CONFIGS))


def load(adapted, lowest, parts=PARTS, **changes):
    """Living modules in block `lowest` and above."""
    full = RankMask.full([RANK] * len(adapted.spec.modules))
    mask = last_blocks(adapted.spec, full, LAYERS - lowest)
    adapted.load(random_arrays(adapted.spec, mask) | changes, mask, (2.0,) * len(full.ranks), parts)
    return mask


def rows(seed=0, count=6, least=2, most=9):
    rng = np.random.default_rng(seed)
    return [rng.integers(5, VOCABULARY, rng.integers(least, most + 1)).tolist() for _ in range(count)]


def collate(ids):
    return TASK.collate(PadOnly(), ids, [i % len(LABELS) for i in range(len(ids))])


def states(adapted, ids):
    """What is kept of each row, without padding."""
    padded = adapted.below(collate(ids))
    return [row[: len(own)] for row, own in zip(padded, ids, strict=True)]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def bert(tiny_models):
    return AdaptedModel(backbone(tiny_models["bert"]), "exact", 64)


# -- with and without ------------------------------------------------------------
def loss_and_gradients(adapted, batch, below):
    loss = mean_loss(TASK, adapted.outputs(batch, below), batch)
    loss.backward()
    found = {f"{part}{i}": p.grad.clone() for part in sorted(PARTS) for i, p in enumerate(adapted.parameters(part))}
    for part in PARTS:
        for parameter in adapted.parameters(part):
            parameter.grad = None
    return loss.detach(), found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@architectures
def test_loss_and_gradients_at_every_boundary(tiny_models, name, dtype):
    adapted, batch = AdaptedModel(backbone(tiny_models[name], dtype=dtype), "exact", 64), collate(rows())
    bound = 1e-5 if dtype == "float32" else 5e-2
    for lowest in range(LAYERS + 1):
        load(adapted, lowest)
        below = adapted.below(batch)
        assert (below is None) == (lowest == 0)
        expected_loss, expected = loss_and_gradients(adapted, batch, None)
        loss, found = loss_and_gradients(adapted, batch, below)
        torch.testing.assert_close(loss, expected_loss, rtol=0, atol=bound * float(expected_loss))
        assert found.keys() == expected.keys() and found
        for part, gradient in expected.items():
            torch.testing.assert_close(found[part], gradient, rtol=0, atol=bound * max(float(gradient.abs().max()), 0.1))


@architectures
def test_every_token_of_a_token_classifier(tiny_models, name):
    task = TASKS["token-classification"]
    adapted = AdaptedModel(Backbone(str(tiny_models[name]), task, LABELS, pad_token_id=0), "exact", 64)
    ids = rows()
    batch = task.collate(PadOnly(), ids, [[0] * len(row) for row in ids])
    real = batch["attention_mask"].bool()
    for lowest in range(1, LAYERS + 1):
        load(adapted, lowest)
        with torch.no_grad():
            expected, found = (adapted.outputs(batch, below).logits.float()[real] for below in (None, adapted.below(batch)))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_method_without_adapters_cuts_at_the_top(bert):
    """The last block's output is kept; only pooler and classifier run: 2·rows·(H·H + H·labels)."""
    batch = collate(rows())
    bert.load({"head": np.ones(bert.spec.size("head"), np.float32)}, RankMask.full([0] * 18), (1.0,) * 18, frozenset({"head"}))
    assert bert.lowest == LAYERS
    below = bert.below(batch)
    assert below.shape == (*batch["input_ids"].shape, 16)
    with FlopCounter() as counter, torch.no_grad():
        bert.outputs(batch, below).logits.float()
    assert counter.total == 2 * 6 * (16 * 16 + 16 * len(LABELS))


def test_pairs_of_texts_are_kept_by_their_token_types(bert):
    load(bert, 2)
    batch = collate([[5, 6, 7, 8]])
    first, second = (bert.below(batch | {"token_type_ids": torch.tensor([types])}) for types in ([0, 0, 1, 1], [0, 0, 0, 1]))
    assert not torch.allclose(first, second)


def test_kept_bytes_for_the_backward_pass_are_no_more_than_without(bert):
    batch = collate(rows())

    def saved(below):
        kept, own = {}, {p.data_ptr() for p in bert.model.parameters()}

        def pack(tensor):
            if tensor.data_ptr() not in own:
                kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = mean_loss(TASK, bert.outputs(batch, below), batch)
        total = sum(kept.values())
        del loss
        return total

    found = []
    for lowest in range(LAYERS + 1):
        load(bert, lowest)
        below = bert.below(batch)
        assert saved(below) <= saved(None)
        found.append(saved(below))
    assert found == sorted(set(found), reverse=True)


def test_evaluation_equals_that_without(bert):
    load(bert, 2)
    ids = rows(count=40)
    data = Encoded(ids, [i % 3 for i in range(40)])
    with_it, again = (Learner(bert, TASK, PadOnly()).evaluate(data) for _ in range(2))
    kept, bert._prefix = bert._prefix, None
    without = Learner(bert, TASK, PadOnly()).evaluate(data)
    bert._prefix = kept
    assert with_it == again
    assert with_it == pytest.approx(without, rel=1e-5)


# -- what the bits depend on ------------------------------------------------------------
@given(order=st.permutations(range(6)), sizes=st.lists(st.integers(1, 4), min_size=6), lowest=st.integers(1, LAYERS))
@settings(max_examples=25, deadline=None)
def test_bits_depend_on_the_row_alone(bert, order, sizes, lowest):
    """Not on batch, padding, order, nor on whether it was kept."""
    ids = rows()
    bert._prefix.clear()
    load(bert, lowest)
    expected = [states(bert, [row])[0] for row in ids]
    bert._prefix.clear()
    left = list(order)
    for size in sizes:
        taken, left = left[:size], left[size:]
        if taken:
            assert equal(states(bert, [ids[i] for i in taken]), [expected[i] for i in taken])
    assert equal(states(bert, ids), expected)


@pytest.mark.parametrize("cache", ["exact", "half"])
@architectures
def test_a_rising_boundary_and_a_lost_row_change_no_bit(tiny_models, name, cache):
    """Run on from the outputs of a lower block, or from the start: the same; rounded outputs are no start."""
    kept, lost = (AdaptedModel(backbone(tiny_models[name]), cache, size) for size in (64, 0))
    ids = rows()
    for lowest in (1, 2, 3, 1):
        for adapted in (kept, lost):
            load(adapted, lowest)
        assert equal(states(kept, ids), states(lost, ids))
        assert equal(states(kept, ids), states(lost, ids))
        assert lost._prefix.nbytes == 0


def test_a_rising_boundary_runs_the_new_blocks_alone(bert):
    bert._prefix.clear()
    ran = []
    hooks = [block.register_forward_pre_hook(lambda block, _: ran.append(block)) for block in bert.backbone.blocks]
    load(bert, 1)
    states(bert, [[5, 6, 7]])
    assert ran == bert.backbone.blocks[:1]
    ran.clear()
    load(bert, 3)
    forwards = [type(block).forward for block in bert.backbone.blocks]
    calls = []
    for i, block in enumerate(bert.backbone.blocks):
        block.attention.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    states(bert, [[5, 6, 7]])
    states(bert, [[5, 6, 7]])
    for hook in hooks:
        hook.remove()
    assert calls == [1, 2], "block 0 is not run again, and a row that is kept not at all"
    assert [type(block).forward for block in bert.backbone.blocks] == forwards
    assert not any("forward" in vars(block) for block in bert.backbone.blocks)


def test_half_precision_rounds_a_miss_too(tiny_models):
    exact, half = (AdaptedModel(backbone(tiny_models["bert"]), cache, 64) for cache in ("exact", "half"))
    ids = rows()
    for adapted in (exact, half):
        load(adapted, 2)
    first, second = states(half, ids), states(half, ids)
    assert equal(first, second)
    assert equal(first, [row.half().float() for row in states(exact, ids)])
    assert 2 * half._prefix.nbytes == exact._prefix.nbytes == 4 * 16 * sum(map(len, ids))


def test_what_float16_cannot_hold_stays_as_it_is(tiny_models):
    half = AdaptedModel(backbone(tiny_models["bert"]), "half", 64)
    load(half, 1)
    with torch.no_grad():
        half.backbone.blocks[0].output.LayerNorm.weight.fill_(1e6)
    (found,) = states(half, [[5, 6, 7]])
    assert found.isfinite().all() and found.abs().max() > 65504
    assert half._prefix.nbytes == 4 * found.numel()


@pytest.mark.parametrize("dropout", [True, False])
def test_no_dropout_below_and_no_random_number_drawn(bert, dropout):
    load(bert, 2)
    bert._prefix.clear()
    bert.model.train(dropout)
    before = torch.get_rng_state()
    first = states(bert, rows())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training == dropout for module in bert.model.modules())
    bert._prefix.clear()
    bert.model.eval()
    assert equal(first, states(bert, rows()))


def test_training_is_the_same_in_a_process_that_knows_the_rows(tiny_models):
    """With the backbone's dropout on, above the boundary."""
    full = RankMask.full([4] * 18)
    fresh, used = (AdaptedModel(backbone(tiny_models["bert"]), "exact", 64) for _ in range(2))
    mask = last_blocks(fresh.spec, full, 2)
    arrays = random_arrays(fresh.spec, mask)
    ids = rows(count=12)
    data = ClientData(Encoded(ids, [i % 3 for i in range(12)]), Encoded(ids[:4], [0, 1, 2, 0]))
    orders = plan(mask, dropout=True, evaluate=True)
    train(Learner(used, TASK, PadOnly()), data, plan(mask, server_round=7), arrays, "8")
    first, second = (train(Learner(model, TASK, PadOnly()), data, orders, arrays, "1") for model in (fresh, used))
    assert all(np.array_equal(first.arrays[part], second.arrays[part]) for part in first.arrays)
    assert first.metrics["loss"] == second.metrics["loss"]
    assert first.metrics["eval-loss"] == second.metrics["eval-loss"]


# -- when it must not serve ------------------------------------------------------------
def test_another_delta_forgets_everything(bert):
    def piece(seed):
        rng = np.random.default_rng(seed)
        left = rng.normal(0, 0.1, sum(m.d_out for m in bert.spec.modules)).astype(np.float32)
        right = rng.normal(0, 0.1, sum(m.d_in for m in bert.spec.modules)).astype(np.float32)
        return Piece((1,) * 18, {"B": left, "A": right})

    batch, found = collate(rows()), []
    for delta in (None, piece(1), piece(2), None):
        bert.set_delta(delta)
        load(bert, 2)
        below = bert.below(batch)
        with torch.no_grad():
            expected, logits = bert.outputs(batch).logits.float(), bert.outputs(batch, below).logits.float()
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        found.append(below)
    assert torch.equal(found[0], found[3])
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[2])


def test_a_backbone_that_clients_change_is_not_cut(bert):
    change = np.full(bert.spec.size("backbone"), 0.01, np.float32)
    for parts in (frozenset({"backbone", "head"}), frozenset()):  # training, and the server's evaluation
        load(bert, LAYERS, parts, backbone=change)
        assert bert.below(collate(rows())) is None
    assert backward_blocks(bert, frozenset({"backbone", "head"})) == LAYERS
    load(bert, LAYERS)
    assert bert.below(collate(rows())) is not None


def test_off_keeps_nothing(tiny_models):
    adapted = AdaptedModel(backbone(tiny_models["bert"]))
    load(adapted, LAYERS)
    assert adapted.below(collate(rows())) is None


def refused(path, task="token-classification"):
    found = Backbone(str(path), TASKS[task], LABELS, pad_token_id=0)
    adapted = AdaptedModel(found, "exact", 64)
    full = RankMask.full([0] * len(adapted.spec.modules))
    adapted.load({"head": np.zeros(adapted.spec.size("head"), np.float32)}, full, (1.0,) * len(full.ranks))
    assert adapted.below(collate(rows())) is None
    return adapted


@pytest.mark.parametrize("rounded", [False, True])
def test_what_may_differ_by_roundings_under_autocast(tiny_models, rounded):
    """One row alone is 1 % off what it is in a batch: as bfloat16 products on a GPU may be, and float32 ones never are."""
    loaded = backbone(tiny_models["bert"])

    def off(block, args, states):
        return states + 0.01 * states.flip(-1) if len(states) == 1 else states

    loaded.blocks[0].register_forward_hook(off)
    with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
        assert Prefix(loaded.model, loaded.blocks, loaded.head_parameters(), 64, False).fits == rounded


def test_one_block_that_runs_again_and_again_is_not_cut(tmp_path, caplog):
    """ALBERT."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "embedding_size": 8}
    AutoModel.from_config(AlbertConfig(num_hidden_layers=3, num_attention_heads=2, **sizes)).save_pretrained(tmp_path)
    caplog.set_level("INFO")
    refused(tmp_path, "classification")
    assert "Albert" in caplog.text and "do not run once each, one after the other" in caplog.text


def test_a_block_that_hands_on_more_than_its_output_is_not_cut(tmp_path, caplog):
    """T5's first block makes the positions of all."""
    T5EncoderModel(T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2)).save_pretrained(
        tmp_path
    )
    caplog.set_level("INFO")
    refused(tmp_path)
    assert "a block returns more than hidden states" in caplog.text


def test_embeddings_that_are_trained_as_head_are_not_kept(tiny_models, tmp_path, caplog):
    """What the checkpoint lacks outside the blocks belongs to the head."""
    for file in tiny_models["bert"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["embeddings.position_embeddings.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    caplog.set_level("INFO")
    refused(tmp_path, "classification")
    assert "what is trained as head reaches below the blocks" in caplog.text


def test_a_block_that_looks_further_down_is_not_cut(tiny_models):
    found = backbone(tiny_models["bert"])
    seen = {}
    found.blocks[0].register_forward_hook(lambda _, args, output: seen.update(state=output))
    found.blocks[2].register_forward_pre_hook(lambda _, args: (args[0] + seen["state"], *args[1:]))
    assert not Prefix(found.model, found.blocks, [], 64, False).fits


# -- bounds ------------------------------------------------------------
def test_memory_is_bounded_and_the_least_recently_used_row_goes(tiny_models):
    """1 MiB holds 16 rows of 64 KiB: 1024 tokens of 16 float32."""
    found = backbone(tiny_models["llama"])
    prefix = Prefix(found.model, found.blocks, [], 1, False)
    ids = [[5 + i % 90] * 1024 for i in range(20)]
    batches = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, 1024, dtype=torch.long)} for row in ids]
    for batch in batches[:16]:
        prefix.states(batch, 1)
    assert prefix.nbytes == 1 << 20
    prefix.states(batches[0], 1)  # now the second is the oldest
    ran = []
    found.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    prefix.states(batches[16], 1)
    prefix.states(batches[0], 1)
    assert prefix.nbytes == 1 << 20 and len(ran) == 1
    prefix.states(batches[1], 1)
    assert prefix.nbytes == 1 << 20 and len(ran) == 2


# -- FLOPs ------------------------------------------------------------
@pytest.mark.parametrize("blocks", range(1, LAYERS))
def test_training_counts_the_blocks_that_run_at_every_step(tiny_models, blocks):
    """And the same number in a process that has the rows already; the blocks below count once for each row that trains."""
    adapted = AdaptedModel(backbone(tiny_models["bert"]), "exact", 64)
    mask = last_blocks(adapted.spec, RankMask.full([RANK] * 18), blocks)
    data = ClientData(Encoded(rows(count=12, least=LENGTH, most=LENGTH), [0, 1, 2] * 4), Encoded([], []))
    orders = plan(mask, batch_size=ROWS, dropout=False, vote=None, sent=LORA)
    arrays = random_arrays(adapted.spec, mask)
    block = (forward_flops(0) - 2 * ROWS * (16 * 16 + 16 * len(LABELS))) // LAYERS
    for _ in range(2):
        metrics = train(Learner(adapted, TASK, PadOnly()), data, orders, arrays, "1", simulated=True).metrics
        assert metrics["flops-forward"] == pytest.approx(3 * (forward_flops(blocks) - (LAYERS - blocks) * block))
        assert metrics["flops-backward"] == pytest.approx(3 * backward_flops(blocks))
        assert metrics["flops-below"] == pytest.approx(3 * (LAYERS - blocks) * block)
        assert metrics["blocks"] == blocks and metrics["tokens"] == 3 * TOKENS
    again = plan(mask, batch_size=ROWS, dropout=False, vote=None, sent=LORA, steps=6)
    metrics = train(Learner(adapted, TASK, PadOnly()), data, again, arrays, "1", simulated=True).metrics
    assert metrics["flops-below"] == pytest.approx(3 * (LAYERS - blocks) * block), "12 rows, each of them twice"


# -- whole runs ------------------------------------------------------------
class ForgetfulGrid(InProcessGrid):
    """Every message meets a process that has kept nothing, as on a device without a worker."""

    def _call(self, message):
        for resident in session._resident.values():
            resident.adapted._prefix.clear()
        return super()._call(message)


@pytest.mark.parametrize("method, cache", [("fedara", "exact"), ("legend", "half"), ("head", "exact")])
def test_a_run_does_not_depend_on_what_processes_keep(tiny_bert, method, cache):
    changes = {"method": method, "train__cache": cache, "adapter__rank": 2, "fedara__final_rank": 0.05}
    changes |= {"train__dropout": True, "data__client_validation": 0.2, "seed": 1}
    changes |= {"num_server_rounds": 4, "fedara__warmup_rounds": 0, "fedara__final_rounds": 2}
    found = []
    for grid_class, keeps in ((InProcessGrid, 64), (ShuffledGrid, 1), (ForgetfulGrid, 64)):
        strategy, grid = prepare(config(tiny_bert, **changes | {"train__cache_mb": keeps}), grid_class)
        strategy.start(grid, strategy.initial_arrays(), 4)
        lines = [{name: value for name, value in line.items() if name not in WALL_CLOCK} for line in strategy.lines]
        found.append((strategy.state.arrays, lines))
    for arrays, lines in found[1:]:
        assert all(np.array_equal(arrays[part], found[0][0][part]) for part in arrays)
        assert lines == found[0][1]
    blocks = [line["blocks"] for line in found[0][1] if line["type"] == "client"]
    assert min(blocks) < LAYERS, "some client had a prefix"


def test_a_session_is_for_one_kind_of_cache(tiny_bert):
    exact, off = (
        session.resident(read_settings({"model.name": str(tiny_bert), "train.cache": c}), LABELS) for c in ("exact", "off")
    )
    assert exact is not off and exact.adapted._prefix is not None and off.adapted._prefix is None
