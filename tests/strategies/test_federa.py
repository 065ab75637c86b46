"""FeDeRA, and runs in which nodes hold a delta or values of the backbone travel: bytes, lost pieces, liars."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CONFIGS, backbone, random_batch
from runs_helper import InProcessGrid, TamperedGrid, config, prepare
from test_export import stock_logits

from fedara_flwr import strategies
from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.export import save_lora
from fedara_flwr.merging.factors import module_factors
from fedara_flwr.model.deltas import dense
from fedara_flwr.model.draws import lora_a, sparse_positions
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.server.messages import replies
from fedara_flwr.server.stopping import RunFailed
from fedara_flwr.tasks import read_settings
from fedara_flwr.wire.records import need_delta, plan_from_content

CLIENTS = 4
architectures = pytest.mark.parametrize("name", list(CONFIGS))


# -- the start ------------------------------------------------------------------------------------------------------
class Port:
    """What a method sees of a model, without data."""

    def __init__(self, adapted):
        self.adapted, self.spec = adapted, adapted.spec

    def weight(self, name):
        return self.adapted.resident_weight(name)


def federa(path, rank, alpha, dtype="float32"):
    adapted = AdaptedModel(backbone(path, dtype=dtype))
    settings = read_settings({"method": "federa", "adapter.rank": rank, "adapter.alpha": alpha})
    method = strategies.find("federa")(settings, Port(adapted))
    state = method.start()
    state.arrays["head"] = state.arrays["head"] * 50  # logits of about 1
    return adapted, method, state


@torch.no_grad()
def logits(adapted, weights, delta=True):
    adapted.set_delta(weights.delta if delta else None)
    adapted.load(weights.arrays, weights.mask, weights.scales)
    return adapted.outputs(random_batch()).logits.float()


@torch.no_grad()
def bare_logits(path, head, dtype="float32"):
    bare, batch, start = AdaptedModel(backbone(path, dtype=dtype)), random_batch(), 0
    for p in bare.head:
        p.data = torch.from_numpy(head[start : start + p.numel()]).view_as(p)
        start += p.numel()
    bare.load({"head": head}, RankMask.full([0] * len(bare.spec.modules)), (1.0,) * len(bare.spec.modules))
    return bare.outputs(batch).logits.float()


@pytest.mark.parametrize("rank, alpha", [(3, 12.0), (20, 1.0)])
@architectures
def test_the_start_is_the_backbones_function(tiny_models, name, rank, alpha):
    """Rank 20 is above that of most modules (16); neither start nor delta may change the function."""
    adapted, method, state = federa(tiny_models[name], rank, alpha)
    weights = method.weights(state)
    expected = bare_logits(tiny_models[name], weights.arrays["head"])
    torch.testing.assert_close(logits(adapted, weights), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits(adapted, weights, delta=False), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_start_is_the_backbones_function_in_bfloat16(tiny_models, name):
    """bfloat16 keeps 8 bits: the sum of two products differs from one in the third digit."""
    adapted, method, state = federa(tiny_models[name], 3, 12.0, "bfloat16")
    weights = method.weights(state)
    expected = bare_logits(tiny_models[name], weights.arrays["head"], "bfloat16")
    torch.testing.assert_close(logits(adapted, weights), expected, atol=0.03, rtol=0.03)


def test_start_and_delta_by_the_papers_formula(tiny_models):
    """s·B0·A0 is the best approximation of rank 3: what is left has the other singular values; the delta takes it out."""
    adapted, method, state = federa(tiny_models["bert"], 3, 12.0)
    spec, s = adapted.spec, 12.0 / 3
    taken = dense([state.delta.composed()], spec)
    for module, (b, a), out in zip(spec.modules, module_factors(spec, state.mask, state.arrays), taken, strict=True):
        weight = adapted.resident_weight(module.name).astype(np.float64)
        values = np.linalg.svd(weight, compute_uv=False)
        left = np.linalg.svd(weight - s * b @ a, compute_uv=False)
        np.testing.assert_allclose(left[: len(values) - 3], values[3:], atol=1e-6)
        np.testing.assert_allclose(left[len(values) - 3 :], 0, atol=1e-6)
        np.testing.assert_allclose(s * b.T @ b, np.diag(values[:3]), atol=1e-6)  # √S on either side
        np.testing.assert_allclose(s * a @ a.T, np.diag(values[:3]), atol=1e-6)
        np.testing.assert_allclose(out, -s * b @ a, atol=1e-6)
    assert state.delta.composed().ranks == (3,) * len(spec.modules)


def test_slots_above_a_modules_rank_are_zero(tiny_models):
    adapted, method, state = federa(tiny_models["bert"], 20, 1.0)
    for b, a in module_factors(adapted.spec, state.mask, state.arrays):
        assert b.shape[1] == a.shape[0] == 20
        assert not b[:, 16:].any() and not a[16:].any() and b[:, :16].any(axis=0).all()


def trained(state, seed=0):
    """The state after some training."""
    rng = np.random.default_rng(seed)
    for part in ("B", "A"):
        noise = rng.normal(0, 0.1, len(state.arrays[part])).astype(np.float32)
        state.arrays[part] = state.arrays[part] + noise
    return state


@pytest.mark.parametrize("rank", [3, 20])
@architectures
def test_what_is_exported_is_the_model_without_a_delta(tiny_models, name, rank):
    adapted, method, state = federa(tiny_models[name], rank, 12.0)
    exported = method.exported(trained(state))
    assert exported.delta is None and "E" not in exported.arrays
    # a start above a layer's own rank needs no more than that
    assert list(exported.mask.ranks) == [rank + min(rank, m.d_out, m.d_in) for m in adapted.spec.modules]
    expected = logits(adapted, method.weights(state))
    torch.testing.assert_close(logits(adapted, exported), expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(expected, bare_logits(tiny_models[name], exported.arrays["head"]), atol=1e-3)


def test_the_export_loads_in_stock_peft(tiny_models, tmp_path):
    adapted, method, state = federa(tiny_models["bert"], 3, 12.0)
    expected = logits(adapted, method.weights(trained(state))).numpy()
    save_lora(tmp_path, adapted.backbone, method.exported(state), "SEQ_CLS")
    import json

    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["r"], written["lora_alpha"]) == ("LORA", 6, 24.0)
    np.testing.assert_allclose(stock_logits("peft", tiny_models["bert"], tmp_path, random_batch()), expected, atol=1e-5)


# -- whole runs -----------------------------------------------------------------------------------------------------
@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where simulated nodes keep their pieces."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    return tmp_path / "fedara-store"


class WatchedGrid(InProcessGrid):
    """Remembers what went to and came from whom; `before(message, context)` may take things away."""

    def __init__(self, *args, before=lambda message, context: None, **options):
        super().__init__(*args, **options)
        self.before, self.seen = before, []

    def _call(self, message):
        kind = message.metadata.message_type
        node = message.metadata.dst_node_id
        if kind in ("train", "evaluate"):
            self.before(message, self.contexts[node])
        reply = super()._call(message)
        if kind in ("train", "evaluate"):
            self.seen.append((kind, node - 1000, message.content, reply.content if not reply.has_error() else reply.error))
        return reply


def short(model, **changes):
    """A run's configuration without rounds of warm-up."""
    return config(model, **{"fedara__warmup_rounds": 0, "fedara__final_rounds": 0, **changes})


def play(flat, grid_class=WatchedGrid, **options):
    """(loop, grid) after a run."""
    loop, grid = prepare(flat, grid_class, CLIENTS, **options)
    loop.start(grid, loop.initial_arrays(), loop.settings.num_server_rounds)
    return loop, grid


def rounds(loop):
    return [line for line in loop.lines if line["type"] == "round"]


def delta_bytes(content):
    return sum(4 * a.shape[0] for name, r in content.array_records.items() if name.startswith("delta.") for a in r.values())


FEDERA = {"method": "federa", "num_server_rounds": 3, "seed": 1}


@pytest.fixture(scope="module")
def whole_federa(tiny_bert, tmp_path_factory):
    """The run in which nothing is lost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HOME", str(tmp_path_factory.mktemp("home")))
        return play(short(tiny_bert, **FEDERA))


def test_the_delta_is_sent_once_to_each_node(whole_federa):
    loop, grid = whole_federa
    spec, mask = loop.spec, loop.state.mask
    size = 4 * (spec.length("B", mask) + spec.length("A", mask))
    first, sent = set(), Counter()
    for _, node, content, _ in grid.seen:
        assert plan_from_content(content, len(spec.modules)).delta == loop.state.holdings["0"].digests
        assert delta_bytes(content) == (0 if node in first else size)
        first.add(node)
        sent["delta"] += delta_bytes(content)
        sent["B"] += 4 * content.array_records["arrays"]["B"].shape[0]
    assert len(grid.seen) == 6 and first == set(range(CLIENTS))
    total = loop.state.bytes_total
    assert total["down.delta"] == sent["delta"] == CLIENTS * size == sum(r["bytes"]["down.delta"] for r in rounds(loop))
    assert total["down.B"] == total["up.B"] == sent["B"] == 6 * 4 * spec.length("B", mask)
    assert "up.delta" not in total
    clients = [line for line in loop.lines if line["type"] == "client"]
    assert sum(line["bytes-down"].get("delta", 0) for line in clients) == sent["delta"]


def test_a_node_that_comes_late_trains_on_the_same_residual(whole_federa):
    """Round 1's two nodes and the others have one piece with one digest, whenever it came."""
    loop, grid = whole_federa
    late = [node for _, node, content, _ in grid.seen[2:] if delta_bytes(content)]
    assert late, "all nodes were drawn in round 1: choose another seed"
    assert {h.digests for h in loop.state.holdings.values()} == {loop.state.holdings[str(late[0])].digests}
    assert not any(line["dropped"] for line in rounds(loop))


def same_arrays(first, second):
    return all(np.array_equal(first.state.arrays[part], second.state.arrays[part]) for part in first.state.arrays)


def test_a_node_that_lost_its_pieces_gets_them_within_the_round(tiny_bert, home, whole_federa):
    """One loses what it remembers, one its disk and its process; the run ends bit-equal, a few bytes dearer."""
    from fedara_flwr.client import session

    lost = []

    def lose(message, context):
        if message.content.config_records["plan"]["round"] < 2 or delta_bytes(message.content) or len(lost) > 1:
            return
        if not lost:
            del context.state["delta"]
        else:
            shutil.rmtree(home)
            session._resident.clear()
        lost.append(context.node_id - 1000)

    loop, grid = play(short(tiny_bert, **FEDERA), before=lose)
    whole, _ = whole_federa
    size = delta_bytes(grid.seen[0][2])
    assert len(lost) == 2 and same_arrays(loop, whole)
    assert [line["good"] for line in rounds(loop)] == [2, 2, 2] and not any(r["dropped"] for r in rounds(loop))
    assert loop.state.holdings == whole.state.holdings
    assert len(grid.seen) == 6 + 2
    answers = [answer for *_, answer in grid.seen if "need-delta" in answer.config_records["reply"]]
    assert len(answers) == 2
    more = Counter(loop.state.bytes_total)
    more.subtract(whole.state.bytes_total)
    # what a client says of its own time is as long as its digits: other bytes may differ, values may not
    assert more["down.delta"] == 2 * size
    assert more["down.B"] == 2 * 4 * loop.spec.length("B", loop.state.mask) == more["down.A"]
    assert more["up.B"] == more["up.A"] == more["up.head"] == 0
    assert more["up.other"] == sum(record.count_bytes() for a in answers for record in a.values())
    lines = [line for line in loop.lines if line["type"] == "client" and line["bytes-down"].get("delta", 0)]
    assert sum(line["bytes-down"]["delta"] for line in lines) == loop.state.bytes_total["down.delta"]


class Greedy(TamperedGrid):
    """Node 1 always says that it lacks everything."""

    def __init__(self, *args, **options):
        self.asked = Counter()
        super().__init__(*args, tamper=lambda number, node, reply: reply, **options)

    def _call(self, message):
        reply = super()._call(message)
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 1001:
            plan = message.content.config_records["plan"]
            self.asked[plan["round"]] += 1
            content = need_delta(plan["delta"], plan["round"])
            for name in list(reply.content):
                del reply.content[name]
            reply.content["reply"] = content["reply"]
        return reply


def test_a_node_that_always_lacks_everything_is_dropped_after_one_repeat(tiny_bert, home):
    """The others' round goes on; the node is sent the pieces again when it is next drawn, in case it recovered."""
    flat = short(tiny_bert, method="federa", num_server_rounds=2, strategy__fraction_train=1.0)
    loop, grid = play(flat, Greedy)
    assert grid.asked == {1: 2, 2: 2}
    for line in rounds(loop):
        assert line["good"] == CLIENTS - 1
        assert [(d["client"], d["reason"]) for d in line["dropped"]] == [("1", "delta")]
    assert set(loop.state.holdings) == {"0", "2", "3"}
    size = 4 * (loop.spec.length("B", loop.state.mask) + loop.spec.length("A", loop.state.mask))
    assert [line["bytes"]["down.delta"] for line in rounds(loop)] == [5 * size, 2 * size]


def test_flowers_own_loop_recovers_a_lost_delta_in_the_next_round(tiny_bert, home):
    """`Strategy.start` of Flower sends nothing twice: the node is dropped, and sent the pieces with its next plan."""
    flat = short(tiny_bert, method="federa", num_server_rounds=3, strategy__fraction_train=1.0)
    loop, grid = prepare(flat, WatchedGrid, CLIENTS)
    arrays = loop.initial_arrays()
    good = []
    for server_round in (1, 2, 3):
        if server_round == 2:
            del grid.contexts[1002].state["delta"]
        replies = grid.send_and_receive(loop.configure_train(server_round, arrays, {}, grid))
        arrays, _ = loop.aggregate_train(server_round, replies)
        good.append((loop.work.good, [(d.client, d.reason) for d in loop.work.drops]))
    assert good == [(4, []), (3, [("2", "delta")]), (4, [])]
    assert [bool(delta_bytes(content)) for _, node, content, _ in grid.seen if node == 2] == [True, False, True]


def test_pieces_that_came_are_not_sent_again_after_a_failed_round(tiny_bert, home):
    flat = short(tiny_bert, method="federa", num_server_rounds=2, strategy__fraction_train=1.0)
    flat["strategy.min-replies"], flat["strategy.max-failed-rounds"] = CLIENTS + 1, 3
    loop, grid = prepare(flat, WatchedGrid, CLIENTS)
    with pytest.raises(RunFailed, match="none of 2 rounds"):
        loop.start(grid, loop.initial_arrays(), 2)
    assert [bool(delta_bytes(content)) for _, _, content, _ in grid.seen] == [True] * CLIENTS + [False] * CLIENTS


def test_a_start_that_is_not_the_announced_one_is_refused(tiny_bert, home):
    """One bit of the piece is flipped on the way to node 1: the node says so, and keeps nothing."""

    def spoil(message, context):
        if context.node_id != 1001:
            return
        for name, record in message.content.array_records.items():
            if name.startswith("delta."):
                data = bytearray(record["A"].data)
                data[-4] ^= 1
                record["A"].data = bytes(data)

    flat = short(tiny_bert, method="federa", num_server_rounds=1, strategy__fraction_train=1.0)
    loop, grid = play(flat, before=spoil)
    (line,) = rounds(loop)
    assert line["good"] == CLIENTS - 1 and [d["client"] for d in line["dropped"]] == ["1"]
    assert "sha256" in line["dropped"][0]["detail"]
    assert "delta" not in grid.contexts[1001].state and "1" not in loop.state.holdings


@pytest.mark.parametrize("fails", [False, True])
def test_a_message_is_repeated_once_and_a_reply_that_breaks_the_check_is_that_nodes_failure(fails):
    """Two messages; the second one's replies always ask for another message, or cannot be looked at."""
    sent = []

    class Grid:
        def push_messages(self, messages):
            sent.extend(messages)
            return [f"id-{len(sent) - len(messages) + i}" for i in range(len(messages))]

        def pull_messages(self, ids):
            return [("reply to", sent[int(i.removeprefix("id-"))]) for i in ids]

    def again(index, reply):
        if index and fails:
            raise IndexError("garbage")
        return f"{reply[1]}+" if index else None

    found = dict(replies(Grid(), ["a", "b"], 5, again))
    assert found[0] == ("reply to", "a")
    assert sent == ["a", "b"] if fails else sent == ["a", "b", "b+"]
    assert isinstance(found[1], IndexError) if fails else found[1] == ("reply to", "b+")


# -- FFA-LoRA -------------------------------------------------------------------------------------------------------
def test_ffa_lora_never_sends_a_and_never_changes_it(tiny_bert):
    flat = short(tiny_bert, method="ffa-lora", num_server_rounds=2, data__client_validation=0.3)
    loop, grid = play(flat)
    assert {kind for kind, *_ in grid.seen} == {"train", "evaluate"}
    for kind, _, content, answer in grid.seen:
        assert set(content.array_records["arrays"]) == {"B", "head"}
        if kind == "train":
            assert set(answer.array_records["arrays"]) == {"B", "head"}
        else:
            assert answer.metric_records["metrics"]["eval-examples"] > 0
    assert not {"down.A", "up.A"} & {key for key, size in loop.state.bytes_total.items() if size}
    assert np.array_equal(loop.state.arrays["A"], lora_a(loop.spec, loop.state.mask, loop.settings.seed))
    assert loop.state.arrays["B"].any()


# -- full and SLoRA -------------------------------------------------------------------------------------------------
def updates(grid, server_round):
    """(num-examples, arrays) of each reply of one round."""
    found = []
    for _, _, content, answer in grid.seen:
        if content.config_records["plan"]["round"] == server_round:
            arrays = {part: array.numpy() for part, array in answer.array_records["arrays"].items()}
            found.append((answer.metric_records["metrics"]["num-examples"], arrays))
    return found


def mean(found, part):
    total = sum(n for n, _ in found)
    return sum(n / total * arrays[part].astype(np.float64) for n, arrays in found)


def test_full_averages_all_parameters_and_its_bytes_are_four_per_number(tiny_bert):
    loop, grid = play(short(tiny_bert, method="full", num_server_rounds=2))
    spec, state = loop.spec, loop.state
    for part in ("backbone", "head"):
        np.testing.assert_allclose(state.arrays[part], mean(updates(grid, 2), part), atol=1e-7)
        np.testing.assert_allclose(
            grid.seen[-1][2].array_records["arrays"][part].numpy(), mean(updates(grid, 1), part), atol=1e-7
        )
    assert state.arrays["backbone"].shape == (spec.size("backbone"),) and np.abs(state.arrays["backbone"]).max() > 1e-4
    total, size = state.bytes_total, 4 * spec.size("backbone")
    assert (total["up.backbone"], total["down.backbone"]) == (4 * size, 2 * size)  # none down in round 1
    assert total["up.head"] == total["down.head"] == 4 * 4 * spec.size("head")
    assert "backbone" not in grid.seen[0][2].array_records["arrays"]
    # words that no client has seen get no gradient: their embeddings are the pre-trained ones
    start = 0
    for parameter in spec.backbone:
        if parameter.name.endswith("word_embeddings.weight"):
            rows = state.arrays["backbone"][start : start + parameter.size].reshape(parameter.shape)
            assert (~rows.any(axis=1)).mean() > 0.5 and rows.any(axis=1).sum() > 10
        start += parameter.size


def test_slora_trains_drawn_positions_then_starts_lora_from_their_svd(tiny_bert):
    """Three rounds, one of them sparse."""
    flat = short(tiny_bert, method="slora", num_server_rounds=3, **{"strategy__options": "sparse-rounds = 0.3"})
    loop, grid = prepare(flat, WatchedGrid, CLIENTS)
    spec, settings, finish = loop.spec, loop.settings, []

    def copied(arrays):
        return {part: vector.copy() for part, vector in arrays.items()}

    def spied(state, merged, replies, merger, original=loop.method.next):
        finish.append(copied(merged))
        original(state, merged, replies, merger)
        finish.append(copied(state.arrays))

    loop.method.next = spied
    loop.start(grid, loop.initial_arrays(), 3)
    mask = loop.state.mask
    entries = spec.length("B", mask) + spec.length("A", mask)
    plans = [plan_from_content(content, len(spec.modules)) for _, _, content, _ in grid.seen]
    assert [(p.entries, p.mask.count, "backbone" in p.sent) for p in plans] == [(entries, 0, True)] * 2 + [
        (0, mask.count, False)
    ] * 4
    np.testing.assert_allclose(finish[0]["backbone"], mean(updates(grid, 1), "backbone"), atol=1e-7)
    total = loop.state.bytes_total
    assert total["up.backbone"] == 2 * 4 * entries and total.get("down.backbone", 0) == 0
    assert total["down.B"] + total["down.A"] == total["up.B"] + total["up.A"] == 4 * 4 * entries

    # the switch: scale·B·A is the best approximation of each module's change, the rest of it is gone
    update = np.zeros(sum(m.d_out * m.d_in for m in spec.modules))
    update[sparse_positions(spec, entries, settings.seed)] = finish[0]["backbone"]
    start, scale = 0, settings.adapter.alpha / settings.adapter.rank
    for module, (b, a) in zip(spec.modules, module_factors(spec, mask, finish[1]), strict=True):
        change = update[start : start + module.d_out * module.d_in].reshape(module.d_out, module.d_in)
        values = np.linalg.svd(change, compute_uv=False)
        left = np.linalg.norm(change - scale * b @ a)
        assert left == pytest.approx(np.sqrt(np.square(values[settings.adapter.rank :]).sum()), rel=1e-3, abs=1e-6)
        start += change.size
    assert "backbone" not in finish[1] and loop.method.weights(loop.state).positions is None
    assert loop.method.exported(loop.state).delta is None
    adapted = loop.method.model.adapted
    kept = dict(zip(adapted._frozen, adapted._resident, strict=True))
    assert all(p.data_ptr() == kept[p].data_ptr() for p in adapted._frozen)  # the server's own model, after the last round


def test_a_plan_names_no_delta_where_there_is_none(tiny_bert):
    loop, grid = prepare(short(tiny_bert, method="fedlora"), InProcessGrid, CLIENTS)
    assert loop.state.delta.composed() is None
    messages = list(loop.configure_train(1, loop.initial_arrays(), {}, grid))
    assert len(messages) == 2
    assert {plan_from_content(message.content, len(loop.spec.modules)).delta for message in messages} == {()}
