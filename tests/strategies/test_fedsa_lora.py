"""FedSA-LoRA: B stays with each client, whatever happens to the node in between; the server has it at the end alone."""

from __future__ import annotations

import shutil
from collections import defaultdict

import numpy as np
import pytest
from runs_helper import Callback, InProcessGrid, config, prepare, stopped_in_round

from fedara_flwr import engine
from fedara_flwr.client import session
from fedara_flwr.client import train as training
from fedara_flwr.model.draws import lora_a
from fedara_flwr.node.kept import KeptStore
from fedara_flwr.node.settings import NodeSettings
from fedara_flwr.runs.keeper import open_run
from fedara_flwr.strategies import find
from fedara_flwr.wire.records import plan_from_content

CLIENTS, ROUNDS = 4, 4


class WatchedGrid(InProcessGrid):
    """Remembers what went to and came from whom, and B as it was when a node began; `before(number, node)` may do harm."""

    def __init__(self, *args, before=lambda number, node: None, **options):
        super().__init__(*args, **options)
        self.before, self.seen, self.began = before, [], []

    def _call(self, message):
        kind, node = message.metadata.message_type, message.metadata.dst_node_id - 1000
        if kind not in ("train", "evaluate"):
            return super()._call(message)
        number = message.content.config_records["plan"]["round"]
        self.before(number, node)
        self.began.append((kind, number, node))
        reply = super()._call(message)
        assert not reply.has_error(), reply.error.reason
        self.seen.append((kind, number, node, message.content, reply.content))
        return reply


class Rounds(Callback):
    """The server's values after each round."""

    def __init__(self):
        self.arrays = []

    def after_round(self, loop):
        self.arrays.append({part: values.copy() for part, values in loop.state.arrays.items()})


class Finished:
    """A run: the loop, the grid, B as each client began with it, and what nodes have kept."""

    def __init__(self, flat, home, before=lambda number, node: None):
        self.before_each, began = Rounds(), []
        load = training.load

        def spied(adapted, plan, arrays, stayed=None):
            received = load(adapted, plan, arrays, stayed)
            began.append(adapted.collect(frozenset({"B"}))["B"])
            return received

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FLWR_HOME", str(home))
            patch.setattr(training, "load", spied)
            self.loop, self.grid = prepare(flat, WatchedGrid, CLIENTS, before=before)
            self.loop.callbacks.append(self.before_each)
            self.loop.start(self.grid, self.loop.initial_arrays(), ROUNDS)
            root = NodeSettings.read({}).store / "parts"
            stores = {node: KeptStore(root, self.loop.run_id, str(node)) for node in range(CLIENTS)}
            self.kept = {node: found for node, store in stores.items() if (found := store.take(ROUNDS + 1)) is not None}
        self.began = dict(zip(self.grid.began, began, strict=True))
        self.trained = defaultdict(list)
        for kind, number, node, *_ in self.grid.seen:
            if kind == "train":
                self.trained[node].append(number)

    def messages(self, kind="train"):
        return [(number, node, *contents) for found, number, node, *contents in self.grid.seen if found == kind]


def flat(tiny_bert, **changes):
    return config(tiny_bert, method="fedsa-lora", num_server_rounds=ROUNDS, **changes)


def parts_of(content):
    return set(content.array_records["arrays"])


def vector(content, part):
    return content.array_records["arrays"][part].numpy()


def same_arrays(one, other):
    return set(one) == set(other) and all(np.array_equal(one[part], other[part]) for part in one)


@pytest.fixture(scope="module")
def whole(tiny_bert, tmp_path_factory):
    """Four rounds of two of four clients, and an evaluation by all at the end."""
    return Finished(flat(tiny_bert, data__client_validation=0.3), tmp_path_factory.mktemp("home"))


def test_what_travels(whole):
    """A and the head both ways in each round; B up in the last one alone, and down to those that evaluate the result."""
    modules = len(whole.loop.spec.modules)
    assert [number for number, *_ in whole.messages()] == [1, 1, 2, 2, 3, 3, 4, 4]
    for number, _, down, up in whole.messages():
        plan = plan_from_content(down, modules)
        last = {"B"} if number == ROUNDS else set()
        assert (plan.kept, plan.drawn, plan.trained) == ({"B"}, {"B"}, {"A", "B", "head"})
        assert plan.sent == {"A", "head"} | last and plan.run == whole.loop.run_id
        assert parts_of(down) == {"A", "head"} and parts_of(up) == {"A", "head"} | last
    assert len(whole.messages("evaluate")) == len(whole.loop.state.examples)
    assert all(parts_of(down) == {"A", "B", "head"} for _, _, down, _ in whole.messages("evaluate"))


def test_bytes_are_counted(whole):
    spec, mask, lines = whole.loop.spec, whole.loop.state.mask, whole.loop.lines
    size = {part: 4 * spec.length(part, mask) for part in ("A", "B", "head")}
    for line in (line for line in lines if line["type"] == "round"):
        sent = {part: (line["bytes"][f"down.{part}"], line["bytes"][f"up.{part}"]) for part in size}
        b_up = 2 * size["B"] if line["round"] == ROUNDS else 0
        assert sent == {"A": (2 * size["A"],) * 2, "head": (2 * size["head"],) * 2, "B": (0, b_up)}
    (end,) = (line for line in lines if line["type"] == "client-evaluation")
    assert end["bytes"]["down.B"] == len(whole.messages("evaluate")) * size["B"] and end["bytes"]["up.B"] == 0
    total = whole.loop.state.bytes_total
    assert total["up.A"] == 8 * size["A"] and total["up.B"] == 2 * size["B"]


def test_b_differs_by_client_and_stays(whole):
    """Each began its first round at 0 and every other one where its last one ended; no two have the same B."""
    assert any(len(numbers) > 1 for numbers in whole.trained.values()), "no client was drawn twice: choose another seed"
    assert set(whole.kept) == set(whole.trained)
    for node, numbers in whole.trained.items():
        starts = [whole.began["train", number, node] for number in numbers]
        assert not starts[0].any() and all(start.any() for start in starts[1:])
    values = [kept.arrays["B"] for kept in whole.kept.values()]
    assert all(set(kept.arrays) == {"B"} and kept.mask == whole.loop.state.mask for kept in whole.kept.values())
    assert all(not np.allclose(one, other, atol=1e-4) for i, one in enumerate(values) for other in values[:i])


def test_the_servers_b_is_the_weighted_mean_of_the_last_round(whole):
    """Until then it is 0; what a client sends is what it keeps."""
    assert all(not arrays["B"].any() for arrays in whole.before_each.arrays[:-1])
    sent = {node: up for number, node, _, up in whole.messages() if number == ROUNDS}
    weights = [up.metric_records["metrics"]["num-examples"] for up in sent.values()]
    for part in ("A", "B", "head"):
        mean = np.average([vector(up, part).astype(np.float64) for up in sent.values()], axis=0, weights=weights)
        np.testing.assert_allclose(whole.loop.state.arrays[part], mean, rtol=1e-6, atol=1e-9)
    assert all(np.array_equal(vector(up, "B"), whole.kept[node].arrays["B"]) for node, up in sent.items())
    assert whole.loop.method.exported(whole.loop.state).arrays["B"].any()


def test_clients_evaluate_with_their_own_b(whole):
    """At the end each with what it kept, one that never trained with the mean; on the way with what its rounds left."""
    for number, node, _, reply in whole.messages("evaluate"):
        own = whole.kept[node].arrays["B"] if node in whole.kept else whole.loop.state.arrays["B"]
        assert np.array_equal(whole.began["evaluate", number, node], own)
        assert reply.metric_records["metrics"]["eval-examples"] > 0
    assert all(up.metric_records["metrics"]["eval-examples"] > 0 for *_, up in whole.messages())
    mean = whole.loop.state.arrays["B"]
    assert all(not np.array_equal(kept.arrays["B"], mean) for kept in whole.kept.values())


def test_a_restarted_node_goes_on_from_what_it_kept(tiny_bert, tmp_path, whole):
    """Model, session and all that is in memory are made anew before every message: the same bits, in every round."""
    found = Finished(
        flat(tiny_bert, data__client_validation=0.3), tmp_path, before=lambda number, node: session._resident.clear()
    )
    assert same_arrays(found.loop.state.arrays, whole.loop.state.arrays)
    assert all(np.array_equal(found.began[key], start) for key, start in whole.began.items())
    assert all(same_arrays(found.kept[node].arrays, kept.arrays) for node, kept in whole.kept.items())


def test_an_absent_file_starts_at_zero(tiny_bert, tmp_path, whole):
    """All files are lost before round 3: the round is trained from B = 0, which is kept from there on."""

    def lose(number, node):
        if number == 3 and (tmp_path / "fedara-store" / "parts").exists():
            shutil.rmtree(tmp_path / "fedara-store" / "parts")

    lost = Finished(flat(tiny_bert, data__client_validation=0.3), tmp_path, before=lose)
    again = [node for number, node, *_ in lost.messages() if number == 3 and lost.trained[node][0] < 3]
    assert again, "nobody is drawn in round 3 who was before: choose another seed"
    for number, node, *_ in lost.messages():
        start, before = lost.began["train", number, node], whole.began["train", number, node]
        if number < 3:
            assert np.array_equal(start, before)
        if number == 3:
            assert not start.any() and before.any() == (node in again)
    assert [line["good"] for line in lost.loop.lines if line["type"] == "round"] == [2] * ROUNDS
    assert not np.array_equal(lost.loop.state.arrays["B"], whole.loop.state.arrays["B"])


def test_two_runs_do_not_meet(tiny_bert, tmp_path, whole):
    """One after the other on the same nodes: the second one's first rounds begin at 0, and both end alike."""
    first, second = (Finished(flat(tiny_bert, data__client_validation=0.3), tmp_path) for _ in range(2))
    assert first.loop.run_id != second.loop.run_id
    assert all(not second.began["train", numbers[0], node].any() for node, numbers in second.trained.items())
    assert same_arrays(first.loop.state.arrays, second.loop.state.arrays)


def test_a_run_that_goes_on_gives_the_same_bits(tiny_bert, tmp_path, monkeypatch):
    """Stopped when clients had trained round 3 and kept what they made of it: that counts for nothing, it is done again."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    run = flat(tiny_bert, run__dir=str(tmp_path), run__checkpoint_every=1)
    engine.run(run | {"run.name": "whole"}, CLIENTS)
    with stopped_in_round(monkeypatch, 3):
        engine.run(run | {"run.name": "cut"}, CLIENTS)
    session._resident.clear()
    engine.run(run | {"run.resume": "cut"}, CLIENTS)
    states = [open_run(tmp_path / name).state for name in ("whole", "cut")]
    assert states[0].server_round == states[1].server_round == ROUNDS and states[0].arrays["B"].any()
    assert same_arrays(states[0].arrays, states[1].arrays)


@pytest.mark.parametrize(
    "changes", [{"run__together": 3}, {"wire__down": "int8", "wire__up": "int4"}], ids=["together", "wire"]
)
def test_other_ways_to_train_and_send(tiny_bert, tmp_path, whole, changes):
    """What stays is never trained together with other clients' (the same bits), and never rounded."""
    found = Finished(flat(tiny_bert, data__client_validation=0.3, **changes), tmp_path)
    assert [line["good"] for line in found.loop.lines if line["type"] == "round"] == [2] * ROUNDS
    if "run__together" in changes:
        assert same_arrays(found.loop.state.arrays, whole.loop.state.arrays)
        return
    for node, numbers in found.trained.items():
        assert not found.began["train", numbers[0], node].any()
        assert all(found.began["train", number, node].any() for number in numbers[1:])
    last = [node for number, node, *_ in found.messages() if number == ROUNDS]
    mean = np.mean([found.kept[node].arrays["B"] for node in last], axis=0)
    error = np.linalg.norm(found.loop.state.arrays["B"] - mean) / np.linalg.norm(mean)
    assert error < 0.5  # weights differ, and four bits a number


def test_the_start_is_loras(tiny_bert):
    loop, _ = prepare(flat(tiny_bert))
    assert find("fedsa-lora").kept == {"B"} and not loop.state.arrays["B"].any()
    assert np.array_equal(loop.state.arrays["A"], lora_a(loop.spec, loop.state.mask, loop.settings.seed))
