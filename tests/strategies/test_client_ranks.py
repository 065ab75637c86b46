"""Ranks that differ by client: who gets which, HetLoRA's pruning, FlexLoRA's splitting, FLoRA's and FedEx-LoRA's exact sums."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import backbone, random_arrays
from flwr.app import Array, ArrayRecord, ConfigRecord
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from runs_helper import ShuffledGrid, TamperedGrid, config, prepare, start
from test_session import client, plan
from test_session import run as train_client

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.client.terms import TailPenalty
from fedara_flwr.keys import ConfigError
from fedara_flwr.merging.factors import delta_norm, module_factors, split_svd
from fedara_flwr.model.deltas import dense
from fedara_flwr.model.parts import LORA
from fedara_flwr.model.ranks import RankMask, pack_bits
from fedara_flwr.model.spec import ModelSpec, ModuleSpec, ParameterSpec
from fedara_flwr.server.fleet import PROFILES
from fedara_flwr.server.roster import Node
from fedara_flwr.strategies import find
from fedara_flwr.strategies.allocation import first_slots
from fedara_flwr.strategies.base import Client, Reply
from fedara_flwr.tasks import read_settings
from fedara_flwr.wire.arrays import Rejected
from fedara_flwr.wire.plan import KEPT_SLOTS, Update
from fedara_flwr.wire.records import update_from_content, update_to_content

laws = hypothesis_settings(deadline=None, max_examples=50)
RANKED = ("hetlora", "flexlora", "flora", "fedex-lora")
EACH = pytest.mark.parametrize("method", RANKED)
SPEC = ModelSpec(
    "f" * 64,
    (ModuleSpec("layer.0.query", 6, 5, 0), ModuleSpec("layer.1.query", 30, 28, 1)),
    (ParameterSpec("weight", (1, 2)),),
)
RANK = 4


class Port:
    """A model port without a model."""

    spec = SPEC


def make(method, text="", **flat):
    values = {"method": method, "adapter.rank": RANK, "strategy.options": text}
    settings = read_settings(values | {name.replace("__", "."): value for name, value in flat.items()})
    return find(method)(settings, Port())


def started(method, text="", **flat):
    """(method, its state before round 1)."""
    made = make(method, text, **flat)
    return made, made.start()


# -- who gets which rank ------------------------------------------------------------
FLEET = "agx-orin,orin-nano,raspberry-pi-5,phone"  # fastest first


@EACH
def test_a_rank_above_the_global_one_is_refused(method):
    with pytest.raises(ConfigError, match="strategy.options.ranks = 99: allowed is up to adapter.rank = 4"):
        make(method, "ranks = [2, 99]")


def on(name, fleet):
    """A client that stands for a device of a fleet."""
    speeds = sorted({PROFILES[other].flops for other in fleet.split(",")})
    return Client("0", 1, PROFILES[name], (speeds.index(PROFILES[name].flops), len(speeds)))


@pytest.mark.parametrize(
    ("fleet", "ranks", "expected"),
    [
        (FLEET, [1, 2, 3, 4], [4, 3, 2, 1]),
        (FLEET, [2, 4], [4, 4, 2, 2]),
        (FLEET, [4, 2], [4, 4, 2, 2]),
        (FLEET, [3], [3, 3, 3, 3]),
        (FLEET, [], [4, 4, 4, 4]),
        (FLEET, [1, 2, 4], [4, 2, 2, 1]),  # thirds of the way up: 0, 2/3, 4/3, 2, rounded
        ("phone,agx-orin", [1, 2, 3], [1, 3]),  # both ends are reached where there are fewer devices than ranks
        ("phone,agx-orin,phone", [1, 4], [1, 4, 1]),
    ],
)
@EACH
def test_ranks_by_profile(method, fleet, ranks, expected):
    made, state = started(method, f"ranks = {ranks}")
    assert [made.client_rank(state, on(name, fleet)) for name in fleet.split(",")] == expected


@pytest.mark.parametrize("fleet", [FLEET, "phone,agx-orin,phone", "phone,phone"])
def test_the_loop_tells_a_methods_clients_their_devices_speed(tiny_bert, fleet):
    """Of 40 simulated nodes each has a device of the fleet and its place among the speeds there are; a real one has neither."""
    loop, _ = prepare(config(tiny_bert, method="flexlora", fleet__profiles=fleet))
    clients = [loop.client(Node(str(i), 1000 + i, 40, simulated=True)) for i in range(40)]
    assert {client.device.name for client in clients} == set(fleet.split(","))
    assert all(client.speed == on(client.device.name, fleet).speed for client in clients)
    assert loop.client(Node("0", 1000, 40)) == Client("0", 0, None, None)


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("ranks = [1, 2, 4]\nassign = 'seed'", on("phone", FLEET)),
        ("ranks = [1, 2, 4]", Client("0", 1)),  # a real device: its speed is not known
        ("ranks = [1, 2, 4]", on("phone", "phone,phone")),  # all are equal
    ],
    ids=["by seed", "real", "equals"],
)
@EACH
def test_ranks_by_seed(method, text, device):
    """900 draws of three ranks lie within four standard deviations (57) of 300; another seed gives another draw."""

    def draw(seed):
        made, state = started(method, text, seed=seed)
        return [made.client_rank(state, replace(device, key=str(i))) for i in range(900)]

    drawn = draw(1)
    assert all(abs(drawn.count(rank) - 300) < 57 for rank in (1, 2, 4))
    assert draw(1) == drawn != draw(2)


@EACH
def test_a_client_holds_the_first_slots_of_every_module(method):
    made, state = started(method, "ranks = [3]")
    client = Client("0")
    assert made.client_mask(state, client) == RankMask((4, 4), np.array([1, 1, 1, 0, 1, 1, 1, 0], dtype=bool))
    assert made.plan(state, client).mask.alive.tolist() == [3, 3]
    assert made.scales(state.mask) == (24.0 / 4,) * 2, "one scale for all ranks"


def test_first_slots_of_a_pruned_mask():
    mask = RankMask((3, 0, 2), np.array([0, 1, 1, 1, 0], dtype=bool))
    assert first_slots(mask, 2) == RankMask((3, 0, 2), np.array([0, 1, 0, 1, 0], dtype=bool))


@pytest.mark.parametrize("text", ["ranks = [0, 2]", "ranks = [-1]", "ranks = 2", "assign = 'speed'", "rank = [1]"])
@EACH
def test_impossible_options(method, text):
    with pytest.raises(ConfigError, match="strategy.options"):
        make(method, text)


# -- hetlora: the tail ------------------------------------------------------------
@pytest.fixture(scope="module")
def adapted(tiny_models):
    return AdaptedModel(backbone(tiny_models["bert"]))


def load(adapted, mask, arrays):
    adapted.load(arrays, mask, (1.0,) * len(mask.ranks), frozenset({"B", "A", "head"}))
    return adapted


def without_e(spec, mask, zero=()):
    arrays = random_arrays(spec, mask)
    return {part: np.zeros_like(v) if part in zero else v for part, v in arrays.items() if part != "E"}


def test_tail_penalty_by_formula(adapted):
    """γ = 0.5 of 4 slots: Σ over modules of ‖B[:, 2:]‖·‖A[2:]‖, by numpy."""
    mask = RankMask.full([4] * len(adapted.spec.modules))
    arrays = without_e(adapted.spec, mask)
    term = TailPenalty(load(adapted, mask, arrays), weight=3.0, gamma=0.5)
    pairs = module_factors(adapted.spec, mask, arrays)
    tail = sum(np.linalg.norm(left[:, 2:]) * np.linalg.norm(right[2:]) for left, right in pairs)
    assert term.penalty().item() == pytest.approx(3.0 * tail, rel=1e-5)


@pytest.mark.parametrize("zero", [("B",), ("A",), ("A", "B")])
def test_tail_penalty_where_a_factor_is_zero(adapted, zero):
    """At the start B = 0: the penalty is 0 and its gradient is finite: of A it is ‖B‖·… = 0, of B 0 by convention."""
    mask = RankMask.full([4] * len(adapted.spec.modules))
    term = TailPenalty(load(adapted, mask, without_e(adapted.spec, mask, zero)), weight=3.0, gamma=0.5)
    loss = term.penalty()
    assert loss.item() == 0
    adapted.model.zero_grad()
    loss.backward()
    for part in ("B", "A"):
        for parameter in adapted.parameters(part):
            assert parameter.grad is None or torch.equal(parameter.grad, torch.zeros_like(parameter))
    assert term.kept() is None


@pytest.mark.parametrize(
    ("rank", "gamma", "cut"), [(4, 0.85, 3), (1, 0.85, 1), (7, 0.85, 5), (4, 0.5, 2), (3, 0.5, 1), (4, 0.01, 1)]
)
def test_what_a_client_keeps_when_its_tail_shrank(adapted, rank, gamma, cut):
    """floor(γ·k) slots of each module, at least 1; nothing is cut where the tail is empty, has grown or is as it was."""
    mask = RankMask.full([rank] * len(adapted.spec.modules))
    term = TailPenalty(load(adapted, mask, without_e(adapted.spec, mask)), weight=1.0, gamma=gamma)
    term.finish()
    assert term.kept() is None
    for factor in (2.0, 0.25):  # twice, then half of the start
        with torch.no_grad():
            for parameter in adapted.parameters("B"):
                parameter.mul_(factor)
        term.finish()
        if factor > 1 or cut == rank:
            assert term.kept() is None
        else:
            assert np.array_equal(term.kept(), np.tile(np.arange(rank) < cut, len(mask.ranks)))


def penalised(weight):
    terms = {"tail-penalty": {"weight": weight, "gamma": 0.5}}
    return {"terms": terms, "report": frozenset({KEPT_SLOTS}), "vote": None, "sent": LORA, "dropout": False}


def test_a_heavy_penalty_prunes_and_fewer_slots_are_sent(adapted):
    mask = RankMask.full([4] * len(adapted.spec.modules))
    arrays = without_e(adapted.spec, mask)
    update = train_client(adapted, "1", mask, arrays, **penalised(1e3))
    assert update.mask == first_slots(mask, 2)
    assert {part: len(values) for part, values in update.arrays.items() if part != "head"} == {
        part: len(arrays[part]) // 2 for part in ("B", "A")
    }
    orders = plan(mask, **penalised(1e3))
    content = update_to_content(update, orders)
    read = update_from_content(content, adapted.spec, orders, len(client(1).train))
    assert read.mask == update.mask and all(np.array_equal(read.arrays[p], update.arrays[p]) for p in read.arrays)


def test_at_the_start_training_with_the_penalty_is_finite_and_prunes_nothing(adapted):
    """B = 0: the tail can only grow."""
    mask = RankMask.full([4] * len(adapted.spec.modules))
    update = train_client(adapted, "1", mask, without_e(adapted.spec, mask, ("B",)), **penalised(5e-3))
    assert update.mask == mask
    assert all(np.isfinite(values).all() for values in update.arrays.values()) and np.abs(update.arrays["B"]).max() > 0


# -- hetlora: the wire ------------------------------------------------------------
FULL = RankMask.full([RANK, RANK])


def kept_reply(kept, mask=FULL, **config_changes):
    """A reply under `mask` that says it kept `kept` (bytes; None = says nothing)."""
    orders = plan(FULL, vote=None, report=frozenset({KEPT_SLOTS}), sent=LORA)
    parts = ("B", "A", "head") if mask.count else ("head",)
    arrays = {part: np.ones(SPEC.length(part, mask), dtype=np.float32) for part in parts}
    content = update_to_content(Update(arrays, mask, 3, {}), orders)
    reply = dict(content.config_records["reply"]) | config_changes
    reply.pop(KEPT_SLOTS)
    content["reply"] = ConfigRecord(reply if kept is None else reply | {KEPT_SLOTS: kept})
    return update_from_content(content, SPEC, orders, 10)


@pytest.mark.parametrize(
    ("kept", "mask", "reason"),
    [
        (None, FULL, "report"),
        ("\xff", FULL, "report"),
        (b"", FULL, "report"),
        (b"\xff\xff", FULL, "report"),  # more slots than were granted
        (b"\x00", RankMask((4, 4), np.zeros(8, dtype=bool)), "report"),
        (b"\xcc", FULL, "shape"),  # says two of four, sends four
        (b"\xff", first_slots(FULL, 2), "shape"),  # says four, sends two
        (b"\xcc", first_slots(FULL, 3), "shape"),
    ],
)
def test_kept_bits_are_checked(kept, mask, reason):
    with pytest.raises(Rejected) as caught:
        kept_reply(kept, mask)
    assert caught.value.reason == reason


def test_kept_padding_is_checked():
    """Of three slots a module, six in all, two bits are padding."""
    granted = first_slots(FULL, 3)
    orders = plan(granted, vote=None, report=frozenset({KEPT_SLOTS}), sent=frozenset({"head"}))
    content = update_to_content(Update({"head": np.ones(2, dtype=np.float32)}, granted, 3, {}), orders)
    assert update_from_content(content, SPEC, orders, 10).mask == granted
    content["reply"] = ConfigRecord(dict(content.config_records["reply"]) | {KEPT_SLOTS: b"\xfd"})
    with pytest.raises(Rejected, match="padding"):
        update_from_content(content, SPEC, orders, 10)


def test_sound_kept_bits():
    assert kept_reply(b"\xcc", first_slots(FULL, 2)).mask.alive.tolist() == [2, 2]
    assert kept_reply(b"\xff").mask == FULL


# -- hetlora: the server ------------------------------------------------------------
def an_update(mask, seed=0, metrics=None):
    rng = np.random.default_rng(seed)
    sent = ("B", "A", "head") if mask.count else ("head",)
    return Update({p: rng.normal(0, 1, SPEC.length(p, mask)).astype(np.float32) for p in sent}, mask, 1, metrics or {})


def test_a_rank_that_fell_stays_low_and_never_falls_below_one():
    method, state = started("hetlora", "ranks = [4]")
    first, second = Client("0"), Client("1")
    for sent, expected in ((4, 4), (3, 3), (2, 2), (1, 1), (0, 1)):
        method.next(state, state.arrays, [Reply(first, 1, first_slots(FULL, sent))], method.merger(state))
        assert method.client_rank(state, first) == expected
        assert method.plan(state, first).mask == first_slots(FULL, expected)
    assert method.client_rank(state, second) == 4


def test_hetlora_weighs_by_the_norm():
    """Two clients with ranks 2 and 4, examples 1 and 100: slots by ‖BA‖, over all modules together, head by examples."""
    method, state = started("hetlora")
    small, large = an_update(first_slots(FULL, 2), 1), an_update(FULL, 2)
    merger = method.merger(state)
    merger.add("0", small, 1)
    merger.add("1", large, 100)
    merged = merger.result()
    one, two = delta_norm(SPEC, small), delta_norm(SPEC, large)
    for part in ("B", "A"):
        wide = SPEC.scatter(part, small.arrays[part], FULL, small.mask, np.zeros_like(large.arrays[part]))
        assert np.allclose(merged[part], (one * wide + two * large.arrays[part]) / (one + two), rtol=1e-5, atol=1e-6)
    assert np.allclose(merged["head"], (small.arrays["head"] + 100 * large.arrays["head"]) / 101, rtol=1e-5)


def test_no_penalty_no_pruning():
    method, state = started("hetlora", "penalty = 0.0")
    assert method.plan(state, Client("0")).report == frozenset() and "tail-penalty" not in method.terms()
    method, state = started("hetlora", "penalty = 0.5\ngamma = 0.25")
    plan = method.plan(state, Client("0"))
    assert plan.terms["tail-penalty"] == {"weight": 0.5, "gamma": 0.25} and plan.report == {KEPT_SLOTS}


# -- flexlora ------------------------------------------------------------
@laws
@given(st.lists(st.tuples(st.integers(0, 2**32), st.integers(1, RANK), st.integers(1, 1000)), min_size=1, max_size=4))
def test_flexlora_is_the_best_approximation_of_the_weighted_sum(drawn):
    """Of Σ w·s·B·A, at the global rank; its first slots are the best one of each lower rank. Module 1 may go by QR."""
    method, state = started("flexlora")
    merger, total = method.merger(state), sum(weight for *_, weight in drawn)
    updates = [(an_update(first_slots(FULL, rank), seed), weight) for seed, rank, weight in drawn]
    for number, (update, weight) in enumerate(updates):
        merger.add(str(number), update, weight)
    merged, scale = merger.result(), method.scales(state.mask)[0]
    factors = [(module_factors(SPEC, update.mask, update.arrays), weight) for update, weight in updates]
    for m, (b, a) in enumerate(module_factors(SPEC, FULL, merged)):
        exact = sum(scale * weight / total * pairs[m][0] @ pairs[m][1] for pairs, weight in factors)
        for rank in range(1, RANK + 1):
            best_b, best_a = split_svd(exact, rank, scale)
            assert np.allclose(b[:, :rank] @ a[:rank], best_b @ best_a, atol=2e-4 * np.linalg.norm(exact, 2) / scale)


def test_flexlora_restarts_slots_without_a_singular_value():
    """All send one slot, the same A: rank 1 of 4. Three slots start from random A of Kaiming's size and B = 0, in both ways."""
    method, state = started("flexlora")
    merger = method.merger(state)
    first = an_update(first_slots(FULL, 1), 0)
    for number in range(12):
        update = an_update(first_slots(FULL, 1), number)
        merger.add(str(number), Update(update.arrays | {"A": first.arrays["A"]}, update.mask, 1, {}), 1)
    for module, (b, a) in zip(SPEC.modules, module_factors(SPEC, FULL, merger.result()), strict=True):
        assert np.linalg.norm(b[:, 0]) > 0.1 and not b[:, 1:].any()
        assert np.abs(a[1:]).max() <= module.d_in**-0.5 and (np.linalg.norm(a[1:], axis=1) > 0.2).all()


def test_flexlora_keeps_small_singular_values():
    """A slot of a thousandth of the first one's size is no zero."""
    method, state = started("flexlora")
    merger, mask = method.merger(state), first_slots(FULL, 2)
    arrays = dict(an_update(mask).arrays)
    widths = SPEC.widths("B")
    second = ~mask.elements(widths, first_slots(FULL, 1))
    arrays["B"] = np.where(second, np.float32(1e-3), np.float32(1)) * arrays["B"]
    merger.add("0", Update(arrays, mask, 1, {}), 1)
    for b, _ in module_factors(SPEC, FULL, merger.result()):
        assert (np.abs(b).max(axis=0) > 0).tolist() == [True, True, False, False]


def test_flexlora_of_updates_that_are_zero_starts_afresh():
    method, state = started("flexlora")
    merger = method.merger(state)
    merger.add("0", Update({p: np.zeros(SPEC.length(p, FULL), dtype=np.float32) for p in ("B", "A", "head")}, FULL, 1, {}), 1)
    merged = merger.result()
    assert not merged["B"].any() and all(np.linalg.norm(a, axis=1).min() > 0.2 for _, a in module_factors(SPEC, FULL, merged))


def test_a_restarted_slot_learns(adapted):
    """One step moves B of a slot with B = 0 and a random A, and none with both zero."""
    mask = RankMask.full([2] * len(adapted.spec.modules))
    arrays = without_e(adapted.spec, mask, ("B",))
    first = mask.elements(adapted.spec.widths("A"), first_slots(mask, 1))
    arrays["A"] = np.where(first, arrays["A"], np.float32(0))
    update = train_client(adapted, "1", mask, arrays, sent=LORA, vote=None, steps=1)
    learnt = mask.elements(adapted.spec.widths("B"), first_slots(mask, 1))
    assert np.abs(update.arrays["B"][learnt]).min() > 0 and not update.arrays["B"][~learnt].any()


# -- flora and fedex-lora ------------------------------------------------------------
def matrices(method, state):
    """ΔW of every module: the delta and what the adapters add."""
    pairs = module_factors(SPEC, state.mask, state.arrays)
    delta = dense([state.delta.composed()], SPEC) if state.delta.version else [0.0] * len(pairs)
    return [o + s * b @ a for o, s, (b, a) in zip(delta, method.scales(state.mask), pairs, strict=True)]


def merge_round(method, state, updates):
    """A whole round of a method, without a server."""
    merger = method.merger(state)
    for key, (update, weight) in enumerate(updates):
        merger.add(str(key), update, weight)
    replies = [Reply(Client(str(key)), weight, update.mask) for key, (update, weight) in enumerate(updates)]
    state.server_round += 1
    method.next(state, merger.result(), replies, merger)


rounds = st.lists(
    st.lists(st.tuples(st.integers(0, 2**32), st.integers(1, RANK), st.integers(1, 1000)), min_size=1, max_size=4),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
@laws
@given(rounds)
def test_delta_and_adapters_are_the_exact_weighted_sum(method, drawn):
    """Whatever the ranks: what was in the delta, and the mean of s·B·A. flora's adapters end at ΔW = 0."""
    made, state = started(method)
    for clients in drawn:
        total = sum(weight for *_, weight in clients)
        before = dense([state.delta.composed()], SPEC) if state.delta.version else [0.0, 0.0]
        updates = [(an_update(first_slots(FULL, rank), seed), weight) for seed, rank, weight in clients]
        held = module_factors(SPEC, FULL, state.arrays)
        merge_round(made, state, updates)
        scale = made.scales(state.mask)[0]
        for m, found in enumerate(matrices(made, state)):
            products = [(weight, module_factors(SPEC, update.mask, update.arrays)[m]) for update, weight in updates]
            exact = before[m] + sum(scale * weight / total * b @ a for weight, (b, a) in products)
            if method == "fedex-lora":  # slot by slot over the clients that hold it; one that nobody holds is as it was
                exact = before[m].copy() if isinstance(before[m], np.ndarray) else np.zeros_like(found)
                for slot, (left, right) in enumerate(zip(held[m][0].T, held[m][1], strict=True)):
                    owners = [(weight, b[:, slot], a[slot]) for weight, (b, a) in products if slot < len(a)]
                    mean = sum(weight * np.outer(b, a) for weight, b, a in owners) / max(sum(w for w, *_ in owners), 1)
                    exact += scale * (mean if owners else np.outer(left, right))
            assert np.allclose(found, exact, rtol=1e-4, atol=1e-4)
        assert method == "fedex-lora" or not state.arrays["B"].any()


def test_fedex_averages_over_the_clients_that_hold_a_slot():
    method, state = started("fedex-lora")
    small, large = an_update(first_slots(FULL, 2), 1), an_update(FULL, 2)
    merge_round(method, state, [(small, 1), (large, 3)])
    for part in ("B", "A"):
        shared = FULL.elements(SPEC.widths(part), small.mask)
        found = state.arrays[part]
        assert np.allclose(found[shared], (small.arrays[part] + 3 * large.arrays[part][shared]) / 4, rtol=1e-5, atol=1e-6)
        assert np.array_equal(found[~shared], large.arrays[part][~shared])


def test_flora_draws_the_rounds_adapters_afresh():
    """A and B do not travel; each round has a seed of its own, the same for all clients, whatever their rank."""
    method, state = started("flora", "ranks = [2, 4]\nassign = 'seed'")
    plans = {}
    for number in (1, 2):
        state.server_round = number - 1
        plans |= {(number, key): method.plan(state, Client(key)) for key in "0123"}
    assert {p.drawn for p in plans.values()} == {frozenset({"A", "B"})}
    assert [len({p.draw_seed for (n, _), p in plans.items() if n == number}) for number in (1, 2)] == [1, 1]
    assert plans[1, "0"].draw_seed != plans[2, "0"].draw_seed
    assert {int(p.mask.alive.max()) for p in plans.values()} == {2, 4}


# -- whole runs ------------------------------------------------------------
ALL = {"strategy__fraction_train": 1.0, "fedara__warmup_rounds": 0, "fedara__final_rounds": 0}


def lines(loop, kind):
    return [line for line in loop.lines if line["type"] == kind]


@pytest.mark.parametrize(
    ("method", "assign", "rounds"),
    [("hetlora", "profile", 1), ("flexlora", "profile", 1), ("flora", "profile", 2), ("fedex-lora", "seed", 2)],
)
def test_runs_with_ranks_of_each_client(tiny_bert, method, assign, rounds):
    """Bytes go by the client's rank, and the order of the replies changes nothing, the delta's pieces included."""
    text = f"ranks = [1, 2, 4]\nassign = '{assign}'" + ("\npenalty = 0.0" if method == "hetlora" else "")
    flat = config(tiny_bert, method=method, num_server_rounds=rounds, strategy__options=text, **ALL)
    plain, shuffled = start(flat, clients=4), start(flat, ShuffledGrid, clients=4, seed=3)
    assert all(np.array_equal(plain.state.arrays[part], shuffled.state.arrays[part]) for part in plain.state.arrays)
    composed = [loop.state.delta.composed() for loop in (plain, shuffled)]
    assert composed[0] is None or composed[0].digest == composed[1].digest
    assert plain.meter.total == shuffled.meter.total
    ranks = {key: plain.method.client_rank(plain.state, plain.client(node)) for key, node in plain.roster.nodes.items()}
    assert len(set(ranks.values())) > 1
    for line in lines(plain, "client"):
        slots = first_slots(plain.state.mask, ranks[line["client"]])
        assert line["bytes-up"]["B"] == 4 * plain.spec.length("B", slots)
    assert all(line["good"] == 4 and line["dropped"] == [] for line in lines(plain, "round"))


def test_hetlora_prunes_itself_and_bytes_fall(tiny_bert):
    """From round 2 on the heavy penalty shrinks every tail: ranks 4, then 2, then 1, and 1 it stays."""
    text = "penalty = 1000.0\ngamma = 0.5"
    loop = start(config(tiny_bert, method="hetlora", num_server_rounds=5, strategy__options=text, **ALL), clients=3)
    ranks = {n: {line["bytes-up"]["B"] for line in lines(loop, "client") if line["round"] == n} for n in range(1, 6)}
    one = 4 * loop.spec.length("B", first_slots(loop.state.mask, 1))
    assert ranks[1] == {4 * one}
    sent = [max(ranks[n]) for n in range(1, 6)]
    assert sent == sorted(sent, reverse=True) and ranks[5] == {one}
    assert {loop.method.client_rank(loop.state, loop.client(node)) for node in loop.roster.nodes.values()} == {1}
    down = [line["bytes"]["down.B"] for line in lines(loop, "round")]
    assert down == sorted(down, reverse=True) and down[0] == 4 * down[-1]
    assert all(np.isfinite(vector).all() for vector in loop.state.arrays.values())


def nothing_kept(reply):
    head = reply.content.array_records["arrays"]["head"].numpy()
    reply.content["arrays"] = ArrayRecord({"head": Array(head)})
    bits = np.zeros(18 * 4, dtype=bool)
    reply.content["reply"] = ConfigRecord(dict(reply.content.config_records["reply"]) | {KEPT_SLOTS: pack_bits(bits)})
    return reply


def test_a_client_that_keeps_nothing_does_not_end_the_run(tiny_bert):
    flat = config(tiny_bert, method="hetlora", num_server_rounds=2, **ALL)
    loop = start(flat, TamperedGrid, tamper=lambda n, node, reply: nothing_kept(reply) if node == 1 else reply, clients=3)
    for line in lines(loop, "round"):
        assert [(drop["client"], drop["reason"]) for drop in line["dropped"]] == [("1", "report")]
        assert line["good"] == 2
    assert loop.method.client_rank(loop.state, loop.client(loop.roster.nodes["1"])) == 4


def test_a_loss_beyond_reason_does_not_end_the_run(tiny_bert):
    """Two clients with losses near float's limit: their weighted sum would overflow."""

    def tamper(number, node, reply):
        reply.content.metric_records["metrics"]["loss"] = 1.7e308 if node < 2 else 1.0
        return reply

    loop = start(config(tiny_bert, method="fedlora", num_server_rounds=1, **ALL), TamperedGrid, tamper=tamper, clients=3)
    (line,) = lines(loop, "round")
    assert sorted(drop["client"] for drop in line["dropped"]) == ["0", "1"] and line["client-loss"] == 1.0


def test_what_prepare_gives_is_what_start_gives(tiny_bert):
    """A run may be driven step by step: the masks that are planned are those that travel."""
    loop, grid = prepare(config(tiny_bert, method="flexlora", strategy__options="ranks = [1, 4]", **ALL))
    loop.configure_train(1, loop.initial_arrays(), ConfigRecord(), grid)
    for node, orders in zip(loop.work.asked, loop.work.plans, strict=True):
        assert orders.mask == first_slots(loop.state.mask, loop.method.client_rank(loop.state, loop.client(node)))
