"""Methods called by hand: no server, no Flower, no model, numbers derived on paper; and a method that says what is not so."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
from runs_helper import config, options, prepare

from fedara_flwr import strategies
from fedara_flwr.keys import ConfigError
from fedara_flwr.merging.mean import SlotMean
from fedara_flwr.model.ranks import RankMask, pack_order
from fedara_flwr.model.spec import ModelSpec, ModuleSpec, ParameterSpec
from fedara_flwr.strategies.base import Client, Reply
from fedara_flwr.strategies.fedlora import FedLoRA
from fedara_flwr.tasks import read_settings
from fedara_flwr.wire.plan import Update


class Names:
    """Two layers of 2 by 1 and 1 by 2 in two blocks, and a head of one number."""

    spec = ModelSpec(
        "f" * 64,
        (ModuleSpec("layer.0.query", 2, 1, 0), ModuleSpec("layer.1.query", 1, 2, 1)),
        (ParameterSpec("classifier.weight", (1, 1)),),
    )


class Square(Names):
    """Two layers of 4 by 4, with frozen weights."""

    spec = ModelSpec("f" * 64, (ModuleSpec("q", 4, 4, 0), ModuleSpec("v", 4, 4, 1)), Names.spec.head)

    def weight(self, name):
        return np.diag([4.0, 3.0, 2.0, 1.0]).astype(np.float32)


def f32(*values):
    return np.array(values, dtype=np.float32)


def made(name, rounds=2, model=Names, **own):
    flat = {"method": name, "adapter.rank": 2, "num-server-rounds": rounds, "strategy.options": options(**own)}
    return strategies.find(name)(read_settings(flat), model())


def a_round(method, state, *updates):
    """Merge (client, arrays, weight, reports) and go on, as the loop does."""
    merger = method.merger(state) or SlotMean(method.spec, state.mask, state.arrays)
    replies = []
    for client, arrays, weight, reports in updates:
        mask = method.plan(state, client).mask
        merger.add(client.key, Update(arrays, mask, weight, {}), weight)
        replies.append(Reply(client, weight, mask, reports=reports))
    merged = merger.result()
    state.server_round += 1
    method.next(state, merged, replies, merger)


A, B, C = Client("a", 3), Client("b", 2), Client("c", 2)


def test_fedara_by_hand():
    """Four slots, final-rank 1 of two modules: b(1) = 2 + (4 - 2)·(1/2)³ = 2.25, so 2; both have rounds without vote after it.

    Weights 3, 2, 2. a ranks slots 0 2 first, b and c 1 3: shares 3, 4, 3, 4 of 7, so 1 and 3 live.
    E: (3·0 + 2·7 + 2·0)/7 = 2 in slot 1 and (3·7 + 2·0 + 2·14)/7 = 7 in slot 3. B: of slot 1 its two numbers, of 3 its one.
    """
    method = made("fedara", final_rank=1.0, warmup_rounds=0, final_rounds=0)
    state = method.start()
    assert state.mask == RankMask.full([2, 2]) and state.server_round == 0
    assert {part: len(values) for part, values in state.arrays.items()} == {"head": 1, "B": 6, "A": 6, "E": 4}
    plan = method.plan(state, A)
    assert (plan.server_round, plan.mask, plan.sent) == (1, state.mask, {"B", "E", "A", "head"})
    assert plan.terms == {"slot-vote": {"budget": 2, "importance": "gradient-product"}} and plan.report == {"slot-vote"}
    state.arrays |= {"B": f32(1, 2, 3, 4, 5, 6), "A": f32(1, 2, 3, 4, 5, 6)}
    votes = {"a": [0, 2, 1, 3], "b": [2, 0, 3, 1], "c": [3, 1, 2, 0]}
    reports = {
        key: {"slot-vote": method.read_report(plan, "slot-vote", pack_order(np.array(vote)))} for key, vote in votes.items()
    }
    a_round(
        method,
        state,
        (A, {"E": f32(1, 0, 1, 7)}, 3, reports["a"]),
        (B, {"E": f32(1, 7, 1, 0)}, 2, reports["b"]),
        (C, {"E": f32(1, 0, 1, 14)}, 2, reports["c"]),
    )
    assert state.mask.bits.tolist() == [False, True, False, True] and state.server_round == 1
    assert state.arrays["E"].tolist() == [2, 7]
    assert state.arrays["B"].tolist() == [3, 4, 6] and state.arrays["A"].tolist() == [2, 5, 6]
    plan = method.plan(state, A)  # the budget is reached: nothing is to be voted on
    assert (plan.server_round, plan.mask, plan.terms, plan.report) == (2, state.mask, {}, frozenset())


@pytest.mark.parametrize("report", [b"", b"\0\0\1\0\2\0", b"\0\0\1\0\2\0\2\0", b"\0\0\1\0\2\0\4\0"])
def test_a_vote_that_is_no_order_of_the_slots_is_refused(report):
    """None at all, three of four, one twice, one of a slot that there is not."""
    method = made("fedara", final_rank=1.0, warmup_rounds=0, final_rounds=0)
    with pytest.raises(ValueError, match="slot ranks"):
        method.read_report(method.plan(method.start(), A), "slot-vote", report)


def test_rolora_by_hand():
    """Weights 3 and 2. Round 1: B's first number (3·5 + 2·0)/5 = 3, A as it was. Round 2: A's (0 + 2·10)/5 = 4, B as it was."""
    method = made("rolora")
    state = method.start()
    first_a = state.arrays["A"].copy()
    assert not state.arrays["B"].any()
    assert method.plan(state, A).sent == {"B", "head"}
    a_round(method, state, (A, {"B": f32(5, 0, 0, 0, 0, 0)}, 3, {}), (B, {"B": f32(0, 10, 0, 0, 0, 5)}, 2, {}))
    assert state.arrays["B"].tolist() == [3, 4, 0, 0, 0, 2] and np.array_equal(state.arrays["A"], first_a)
    assert method.plan(state, A).sent == {"A", "head"} and method.plan(state, A).server_round == 2
    a_round(method, state, (A, {"A": f32(0, 0, 0, 0, 0, 5)}, 3, {}), (B, {"A": f32(10, 0, 0, 0, 0, 0)}, 2, {}))
    assert state.arrays["A"].tolist() == [4, 0, 0, 0, 0, 3] and state.arrays["B"].tolist() == [3, 4, 0, 0, 0, 2]
    assert method.plan(state, A).sent == {"B", "head"} and state.mask == RankMask.full([2, 2])


def test_fedsa_lora_by_hand():
    """B is trained and kept in each round, and sent in the last one of two: then the mean is the server's."""
    method = made("fedsa-lora")
    state = method.start()
    plan = method.plan(state, A)
    assert (plan.sent, plan.kept, plan.drawn, plan.trained) == ({"A", "head"}, {"B"}, {"B"}, {"A", "B", "head"})
    a_round(method, state, (A, {"A": f32(5, 0, 0, 0, 0, 0)}, 3, {}), (B, {"A": f32(0, 10, 0, 0, 0, 5)}, 2, {}))
    assert state.arrays["A"].tolist() == [3, 4, 0, 0, 0, 2] and not state.arrays["B"].any()
    plan = method.plan(state, A)
    assert (plan.sent, plan.kept) == ({"A", "B", "head"}, {"B"})
    a_round(method, state, (A, {"B": f32(5, 0, 0, 0, 0, 0)}, 3, {}), (B, {"B": f32(0, 10, 0, 0, 0, 5)}, 2, {}))
    assert state.arrays["B"].tolist() == [3, 4, 0, 0, 0, 2]
    assert method.exported(state).arrays["B"].tolist() == [3, 4, 0, 0, 0, 2]


def test_hetlora_by_hand():
    """Client a keeps one slot of each module and is planned one from there on, b two; what is remembered is in the state."""
    method = made("hetlora", rounds=3)
    state = method.start()
    one = RankMask((2, 2), np.array([True, False, True, False]))
    replies = [Reply(A, 3, one), Reply(B, 2, state.mask)]
    method.next(state, state.arrays, replies, method.merger(state))
    assert state.clients == {"a": {"rank": 1}, "b": {"rank": 2}}
    assert [method.plan(state, client).mask for client in (A, B, C)] == [one, state.mask, state.mask]


def test_a_plan_asks_for_the_round_after_the_state():
    method = made("fedlora", rounds=9)
    state = method.start()
    for number in (0, 3, 8):
        state.server_round = number
        assert method.plan(state, A).server_round == number + 1


@pytest.mark.parametrize("name", sorted(strategies.built_in()))
def test_asking_for_a_plan_changes_nothing(name):
    """As often as one likes, for any client, of any state: what changes is what `prepare` and `next` change."""
    method = made(name, model=Square, **({"final_rank": 1.0} if name == "fedara" else {}))
    state = method.start()
    before, own = deepcopy(vars(state)), dict(vars(method))
    plans = [method.plan(state, client) for client in (A, B, A, C, A)]
    method.weights(state), method.exported(state), method.merger(state), method.terms(), method.all_terms()
    assert plans[0] == plans[2] == plans[4]
    assert vars(method) == own
    now = vars(state)
    assert now["mask"] == before["mask"] and now["clients"] == before["clients"] and now["server_round"] == 0
    assert now["delta"].version == before["delta"].version
    assert all(np.array_equal(now["arrays"][part], values) for part, values in before["arrays"].items())


ALONE = """
import sys
import numpy as np
from fedara_flwr import strategies
from fedara_flwr.model.spec import ModelSpec, ModuleSpec, ParameterSpec
from fedara_flwr.strategies.base import Client
from fedara_flwr.tasks import read_settings

class Names:
    spec = ModelSpec("f" * 64, (ModuleSpec("q", 4, 4, 0), ModuleSpec("v", 4, 4, 1)), (ParameterSpec("w", (2, 4)),))
    def weight(self, name):
        return np.diag([4.0, 3.0, 2.0, 1.0]).astype(np.float32)

for name, cls in strategies.built_in().items():
    flat = {"method": name, "adapter.rank": 2, "num-server-rounds": 2, "strategy.options": ""}
    flat |= {"strategy.options": "final-rank = 1.0"} if name == "fedara" else {}
    method = cls(read_settings(flat), Names())
    state, client = method.start(), Client("0", 5)
    method.ready(state, client, {})
    method.prepare(state, [client])
    plan = method.plan(state, client)
    assert plan.server_round == 1 and plan.sent, name
    method.weights(state)
print(len(strategies.built_in()), *sorted({"flwr", "torch", "transformers", "peft"} & set(sys.modules)))
"""


def test_all_methods_start_and_plan_without_flower_and_torch():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(len(strategies.built_in()))]


# -- a method that lies ------------------------------------------------------------
class Undeclared(FedLoRA):
    """Has a merger, and does not say so: the run could have been private, or robust."""

    name = "undeclared"

    def merger(self, state):
        return SlotMean(self.spec, state.mask, state.arrays)


class Empty(FedLoRA):
    """Says that it has a merger, and has none."""

    name, own_merger = "empty", True


@pytest.mark.parametrize(("cls", "said"), [(Undeclared, "False"), (Empty, "True")])
def test_a_method_that_lies_about_its_merger_ends_the_run(tiny_bert, cls, said):
    """In its first round, before any reply is merged."""
    loop, grid = prepare(config(tiny_bert, method="fedlora"))
    loop.method = cls(loop.settings, loop.method.model)
    before = {part: values.copy() for part, values in loop.state.arrays.items()}
    with pytest.raises(TypeError, match=f"method '{cls.name}': own_merger is {said}, its merger says otherwise"):
        loop.start(grid, loop.initial_arrays(), 2)
    assert all(np.array_equal(loop.state.arrays[part], values) for part, values in before.items())
    assert not [line for line in loop.lines if line["type"] == "round"]


def test_a_method_that_says_that_it_merges_by_itself_can_have_no_other_rule():
    for changes in ({"strategy.robust": "median"}, {"privacy.clip": 1.0, "privacy.noise-multiplier": 1.0}):
        own = {"strategy.weighting": "uniform", "strategy.options": "", "head.start": "random"}
        settings = read_settings(changes | own)
        FedLoRA.check(settings)
        with pytest.raises(ConfigError, match="method 'empty' merges in its own way"):
            Empty.check(settings)
