"""Bad clients, missing nodes, failed rounds: the round completes with the good replies alone."""

from __future__ import annotations

import errno
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord
from runs_helper import CLIENTS, TamperedGrid, config, prepare, start, turn_into_error

from fedara_flwr.client import train
from fedara_flwr.client.terms import TERMS
from fedara_flwr.engine import InProcessGrid
from fedara_flwr.keys import ConfigError
from fedara_flwr.node import store
from fedara_flwr.server.loop import RunFailed
from fedara_flwr.strategies.allocation import last_blocks
from fedara_flwr.strategies.base import Client

PATIENT = {"strategy__max_client_failures": 99}
ONE_ROUND = {"num_server_rounds": 1, "method": "fedara-static", "strategy__fraction_train": 1.0}


def replace_array(reply, values, part="B"):
    arrays = dict(reply.content.array_records["arrays"])
    arrays[part] = Array(np.asarray(values))
    reply.content["arrays"] = ArrayRecord(arrays)
    return reply


def set_metric(reply, **metrics):
    values = dict(reply.content.metric_records["metrics"])
    reply.content["metrics"] = MetricRecord(values | {k.replace("_", "-"): v for k, v in metrics.items()})
    return reply


def poison(value):
    def change(reply):
        size = len(reply.content.array_records["arrays"]["B"].numpy())
        return replace_array(reply, np.full(size, value, dtype=np.float32))

    return change


def as_error(reply):
    return turn_into_error(reply, "Traceback\n  ValueError: broken")


def test_a_second_reply_of_one_client_does_not_count(tiny_bert):
    flat = config(tiny_bert, **ONE_ROUND)
    strategy, grid = prepare(flat)
    messages = list(strategy.configure_train(1, strategy.initial_arrays(), ConfigRecord(), grid))
    replies = list(grid.send_and_receive(messages))
    strategy.aggregate_train(1, [replies[0], *replies])
    assert [(drop.client, drop.reason) for drop in strategy.work.drops] == [(strategy.work.asked[0].key, "duplicate")]
    plain = start(flat)
    assert all(np.array_equal(strategy.state.arrays[part], plain.state.arrays[part]) for part in plain.state.arrays)


def test_clients_with_more_to_do_are_asked_first(tiny_bert):
    """By epochs the work is the client's number of examples; by steps all have the same, and are asked as they were drawn."""
    for steps, sizes in ((0, True), (2, False)):
        flat = config(tiny_bert, **ONE_ROUND, train__steps=steps, train__batch_size=1)
        strategy, grid = prepare(flat)
        list(strategy.configure_train(1, strategy.initial_arrays(), ConfigRecord(), grid))
        work = strategy.work
        examples = [strategy.roster.examples[node.key] for node in work.asked]
        assert [message.metadata.dst_node_id for message in work.messages] == [node.node_id for node in work.asked]
        assert len(set(examples)) > 3 and (examples == sorted(examples, reverse=True)) is sizes


def test_work_is_rows_times_blocks_gone_through(tiny_bert):
    strategy, _ = prepare(config(tiny_bert))
    spec, plan = strategy.spec, strategy.method.plan(strategy.state, Client("0"))

    def training(plan, **values):
        return replace(plan, train=plan.train.model_copy(update=values))

    plan = training(plan, steps=5, batch_size=4)
    assert spec.blocks == 3
    assert plan.work(spec, 100) == 5 * 4 * 9 and plan.work(spec, 3) == 5 * 3 * 9
    shallow = replace(plan, mask=last_blocks(spec, plan.mask, 1))
    assert shallow.work(spec, 100) == 5 * 4 * (3 + 2)
    assert replace(shallow, sent=frozenset({"backbone"})).work(spec, 100) == 5 * 4 * 9
    assert replace(shallow, sent=frozenset({"head"}), kept=frozenset({"backbone"})).work(spec, 100) == 5 * 4 * 9
    assert training(shallow, steps=0, epochs=2).work(spec, 7) == 14 * 5


def test_a_reply_nobody_asked_for_does_not_count(tiny_bert):
    flat = config(tiny_bert, **ONE_ROUND)
    strategy, grid = prepare(flat)
    messages = list(strategy.configure_train(1, strategy.initial_arrays(), ConfigRecord(), grid))
    replies = list(grid.send_and_receive(messages))
    stranger = Message(replies[0].content, 1, "train")
    strategy.aggregate_train(1, [stranger, *replies])
    assert [drop.reason for drop in strategy.work.drops] == ["not-asked"]
    assert strategy.work.good == 6


def test_what_flower_cannot_read_is_that_clients_failure(tiny_bert):
    class Garbage(InProcessGrid):
        def _call(self, message):
            if message.metadata.message_type == "train" and message.metadata.dst_node_id == 1001:
                raise ValueError("cannot inflate")
            return super()._call(message)

    strategy = start(config(tiny_bert, **ONE_ROUND), Garbage)
    line = next(line for line in strategy.lines if line["type"] == "round")
    assert [(d["client"], d["reason"]) for d in line["dropped"]] == [("1", "unreadable")]
    assert line["good"] == 5


def test_silence_ends_at_the_deadline(tiny_bert):
    class Silent(InProcessGrid):
        def pull_messages(self, message_ids):
            ids = [i for i in message_ids if self._quiet(i)]
            return super().pull_messages(ids)

        def _quiet(self, message_id):
            message = self._waiting.get(message_id)
            return message is None or (message.metadata.message_type, message.metadata.dst_node_id) != ("train", 1003)

    strategy = start(config(tiny_bert, **ONE_ROUND, strategy__round_timeout=8.0), Silent)
    line = next(line for line in strategy.lines if line["type"] == "round")
    assert [(d["client"], d["reason"]) for d in line["dropped"]] == [("3", "timeout")]
    assert line["good"] == 5


def test_too_few_replies_leave_the_model_and_end_the_run_after_three_rounds(tiny_bert):
    flat = config(tiny_bert, num_server_rounds=6, method="fedara")
    strategy, grid = prepare(flat, TamperedGrid, tamper=lambda number, node, reply: poison(np.nan)(reply))
    before = {part: vector.copy() for part, vector in strategy.state.arrays.items()}
    with pytest.raises(RunFailed, match="3 rounds in a row.*strategy.min-replies = 1"):
        strategy.start(grid, strategy.initial_arrays(), 6)
    assert all(np.array_equal(strategy.state.arrays[part], before[part]) for part in before)
    assert len([line for line in strategy.lines if line["type"] == "round"]) == 3


def test_a_run_of_which_no_round_counted_has_failed(tiny_bert):
    """It has fewer rounds than would end it, and must not be told as completed."""
    flat = config(tiny_bert, num_server_rounds=2, method="fedlora")
    strategy, grid = prepare(flat, TamperedGrid, tamper=lambda number, node, reply: poison(np.nan)(reply))
    with pytest.raises(RunFailed, match="none of 2 rounds had strategy.min-replies = 1 good replies: they taught nothing"):
        strategy.start(grid, strategy.initial_arrays(), 2)


def test_one_failed_round_is_forgiven(tiny_bert):
    def tamper(number, node, reply):
        return poison(np.nan)(reply) if number == 2 else reply

    strategy = start(config(tiny_bert), TamperedGrid, tamper=tamper)
    good = [line["good"] for line in strategy.lines if line["type"] == "round"]
    assert good == [3, 0, 3, 3] and strategy.state.failed_rounds == 0


def test_no_nodes_is_a_clear_error(tiny_bert):
    strategy, grid = prepare(config(tiny_bert, strategy__node_timeout=0.5), clients=0)
    with pytest.raises(TimeoutError, match="0 nodes after strategy.node-timeout = 0.5 s"):
        strategy.start(grid, strategy.initial_arrays(), 1)


def test_a_term_that_every_node_lacks_ends_the_run_before_round_one(tiny_bert, monkeypatch):
    """At once: to a simulation no others come."""
    strategy, grid = prepare(config(tiny_bert, train__prox_mu=0.1))
    monkeypatch.delitem(TERMS, "prox")
    why = "^0 nodes can take part, strategy.min-train-nodes = 2 are needed: client '0' does not know the term 'prox' that this"
    with pytest.raises(ConfigError, match=why):
        strategy.start(grid, strategy.initial_arrays(), 1)
    assert not [line for line in strategy.lines if line["type"] == "round"]


class Lacking(InProcessGrid):
    """Node 1005 says of itself that it knows other things; it is there when `there()` says so."""

    def __init__(self, *args, says, there=lambda: True, **options):
        super().__init__(*args, **options)
        self.says, self.there = says, there

    def get_node_ids(self):
        return [node for node in super().get_node_ids() if node != 1005 or self.there()]

    def _call(self, message):
        reply = super()._call(message)
        if message.metadata.message_type == "query.whoami" and message.metadata.dst_node_id == 1005:
            who = reply.content.config_records["whoami"]
            for key, value in self.says.items():
                if value is None:
                    del who[key]
                else:
                    who[key] = value
        return reply


@pytest.mark.parametrize(
    "says, lacks",
    [
        ({"parts": "B,A,head,backbone"}, "part 'E'"),
        ({"parts": "B,E,A"}, "part 'head'"),
        ({"parts": None}, "part 'A'"),
        ({"parts": 7}, "part 'A'"),
        ({"parts": ["B", "E", "A", "head"]}, "part 'A'"),
        ({"terms": "prox"}, "term 'slot-vote'"),
        ({"parts": "B", "terms": "prox"}, "term 'slot-vote'"),
    ],
    ids=str,
)
def test_a_node_without_a_declared_part_is_left_out_as_one_without_a_term(tiny_bert, says, lacks):
    strategy, grid = prepare(config(tiny_bert), Lacking, says=says)
    strategy.roster.wait(grid)
    assert sorted(strategy.roster.nodes) == ["0", "1", "2", "3", "4"]
    assert strategy.roster.left_out() == {"node 1005": f"client '5' does not know the {lacks} that this run needs"}


def test_parts_that_a_run_does_not_train_may_be_unknown_to_a_node(tiny_bert):
    strategy = start(config(tiny_bert, **ONE_ROUND | {"method": "fedlora"}), Lacking, says={"parts": "A,B,head,own"})
    assert [line["good"] for line in strategy.lines if line["type"] == "round"] == [6]


@pytest.mark.parametrize("says, lacks", [({"parts": "B,A,head"}, "part 'E'"), ({"terms": "prox"}, "term 'slot-vote'")], ids=str)
def test_a_late_node_without_a_part_is_left_out_and_named(tiny_bert, says, lacks, caplog):
    def trained():
        return any(line["type"] == "round" for line in strategy.lines)

    flat = config(tiny_bert, **ONE_ROUND | {"num_server_rounds": 2, "method": "fedara"}, strategy__node_timeout=5.0)
    strategy, grid = prepare(flat | {"strategy.options": ""}, Lacking, says=says, there=trained)
    strategy.start(grid, strategy.initial_arrays(), 2)
    assert [line["good"] for line in strategy.lines if line["type"] == "round"] == [5, 5]
    assert f"node 1005 dropped: client '5' does not know the {lacks} that this run needs" in caplog.text


def test_a_node_with_another_model_is_left_out_with_the_reason(tiny_bert, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(tiny_bert, other)
    tensors = load_file(other / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][7] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    strategy, grid = prepare(config(tiny_bert, num_server_rounds=1, strategy__fraction_train=1.0))
    grid.contexts[1001].run_config = grid.contexts[1001].run_config | {"model.name": str(other)}
    strategy.start(grid, strategy.initial_arrays(), 1)
    assert list(strategy.roster.unfit) == ["1"]
    assert "fingerprint differs" in strategy.roster.unfit["1"]
    assert next(line for line in strategy.lines if line["type"] == "round")["good"] == 5


def test_two_nodes_with_one_client_key(tiny_bert):
    strategy, grid = prepare(config(tiny_bert, **ONE_ROUND, strategy__node_timeout=5.0))
    grid.contexts[1004].node_config["client-key"] = "3"
    strategy.start(grid, strategy.initial_arrays(), 1)
    assert strategy.roster.nodes["3"].node_id == 1003
    assert len(strategy.roster.nodes) == 5


class DeafGrid(InProcessGrid):
    """Node 1002 fails at the questions of one kind, the first `times` times."""

    def __init__(self, *args, kind, times, **options):
        super().__init__(*args, **options)
        self.kind, self.times, self.asked = kind, times, 0

    def _call(self, message):
        if message.metadata.message_type == self.kind and message.metadata.dst_node_id == 1002:
            self.asked += 1
            if self.asked <= self.times:
                return as_error(super()._call(message))
        return super()._call(message)


@pytest.mark.parametrize("kind", ["query.whoami", "query.ready"])
def test_a_node_that_fails_to_answer_once_takes_part_later(tiny_bert, kind):
    flat = config(tiny_bert, **ONE_ROUND | {"num_server_rounds": 3}, strategy__node_timeout=60.0)
    strategy = start(flat, DeafGrid, kind=kind, times=1)
    good = [line["good"] for line in strategy.lines if line["type"] == "round"]
    assert good[-1] == 6 and strategy.roster.unfit == {}


def test_a_node_that_never_answers_is_asked_less_and_less(tiny_bert):
    """In rounds 1, 2 and 4; then it sits out two."""
    flat = config(tiny_bert, **ONE_ROUND | {"num_server_rounds": 6}, strategy__node_timeout=60.0)
    strategy, grid = prepare(flat, DeafGrid, kind="query.ready", times=99)
    strategy.start(grid, strategy.initial_arrays(), 6)
    lines = [line for line in strategy.lines if line["type"] == "round"]
    assert grid.asked == 3 and [line["good"] for line in lines] == [5] * 6
    assert [line["sitting-out"] for line in lines] == [[], [], ["2"], [], ["2"], ["2"]]
    assert not strategy.roster.unfit


def test_a_late_node_without_a_term_does_not_end_the_run(tiny_bert):
    class Late(InProcessGrid):
        def get_node_ids(self):
            trained = any(line["type"] == "round" for line in strategy.lines)
            return [node for node in super().get_node_ids() if node != 1005 or trained]

        def _call(self, message):
            reply = super()._call(message)
            if message.metadata.message_type == "query.whoami" and message.metadata.dst_node_id == 1005:
                reply.content.config_records["whoami"]["terms"] = "none"
            return reply

    flat = config(tiny_bert, **ONE_ROUND | {"num_server_rounds": 3}, train__prox_mu=0.1, strategy__node_timeout=5.0)
    strategy, grid = prepare(flat, Late)
    strategy.start(grid, strategy.initial_arrays(), 3)
    assert [line["good"] for line in strategy.lines if line["type"] == "round"] == [5, 5, 5]


def test_metrics_of_a_training_reply_cannot_end_the_run(tiny_bert):
    def tamper(number, node, reply):
        return set_metric(reply, eval_examples=0, eval_accuracy=0.5) if node == 2 else reply

    strategy = start(config(tiny_bert, **ONE_ROUND), TamperedGrid, tamper=tamper)
    line = next(line for line in strategy.lines if line["type"] == "round")
    assert [(drop["client"], drop["reason"]) for drop in line["dropped"]] == [("2", "num-examples")]


def test_a_client_cannot_answer_for_another(tiny_bert):
    """Client 0's reply claims to be client 5's; Flower knows by the pulled id whose it is."""

    class Forging(InProcessGrid):
        def _call(self, message):
            reply = super()._call(message)
            if message.metadata.message_type == "train":
                self.ids = getattr(self, "ids", {}) | {message.metadata.dst_node_id: message.metadata.message_id}
                if message.metadata.dst_node_id == 1000:
                    poison(7.0)(reply)
                    victim = next(m for m in self._waiting.values() if m.metadata.dst_node_id == 1005)
                    reply.metadata.__dict__["_src_node_id"] = 1005
                    reply.metadata.__dict__["_reply_to_message_id"] = victim.metadata.message_id
                    return reply
            return reply

        def pull_messages(self, message_ids):
            order = sorted(message_ids, key=lambda i: self._waiting[i].metadata.dst_node_id if i in self._waiting else 0)
            return super().pull_messages(order)

    flat = config(tiny_bert, **ONE_ROUND)
    strategy, grid = prepare(flat, Forging)
    sampled = [node.key for node in (strategy.roster.wait(grid), strategy.roster.sample(grid, 1, 6))[1]]
    if sampled.index("0") > sampled.index("5"):
        pytest.fail("choose a seed under which client 0 is asked before client 5")
    strategy.start(grid, strategy.initial_arrays(), 1)
    line = next(line for line in strategy.lines if line["type"] == "round")
    assert [(drop["client"], drop["reason"]) for drop in line["dropped"]] == [("0", "sender")]
    assert line["good"] == 5 and strategy.state.arrays["B"].max() < 1


class ComingAndGoing(InProcessGrid):
    """`present(rounds done)` says which nodes are there."""

    def __init__(self, *args, present, **options):
        super().__init__(*args, **options)
        self.present, self.lines = present, []

    def get_node_ids(self):
        return self.present(sum(line["type"] == "round" for line in self.lines), super().get_node_ids())


def run_with(flat, present):
    strategy, grid = prepare(flat, ComingAndGoing, present=present)
    grid.lines = strategy.lines
    strategy.start(grid, strategy.initial_arrays(), strategy.settings.num_server_rounds)
    return [line["good"] for line in strategy.lines if line["type"] == "round"], strategy


def test_a_node_that_leaves_and_returns_takes_part_again(tiny_bert):
    flat = config(tiny_bert, **ONE_ROUND | {"num_server_rounds": 3})
    good, _ = run_with(flat, lambda done, ids: [i for i in ids if i != 1002 or done != 1])
    assert good == [6, 5, 6]


def test_a_restarted_node_gets_its_key_back_when_the_old_one_is_gone(tiny_bert):
    """Node 1005 is a restart of 1002 under the same client key; both are listed until round 2 is done."""
    flat = config(tiny_bert, **ONE_ROUND | {"num_server_rounds": 4}, strategy__node_timeout=5.0)
    strategy, grid = prepare(flat, ComingAndGoing, present=lambda done, ids: [i for i in ids if i != 1002 or done < 2])
    grid.lines = strategy.lines
    grid.contexts[1005].node_config["client-key"] = "2"
    strategy.start(grid, strategy.initial_arrays(), 4)
    assert strategy.roster.nodes["2"].node_id == 1005
    assert [line["good"] for line in strategy.lines if line["type"] == "round"] == [5, 5, 5, 5]


def test_a_node_that_lost_its_state_is_asked_again(tiny_bert):
    """A SuperNode restarted with its key has no labels any more: one round fails, the next does not."""

    class Forgetful(InProcessGrid):
        def _call(self, message):
            if message.metadata.message_type == "train" and message.content.config_records["plan"]["round"] == 2:
                self.contexts[1001].state.clear()
            return super()._call(message)

    flat = config(tiny_bert, **ONE_ROUND | {"num_server_rounds": 3})
    strategy = start(flat, Forgetful)
    assert [line["good"] for line in strategy.lines if line["type"] == "round"][2] == 6


def test_a_client_out_of_memory_costs_its_reply(tiny_bert, monkeypatch):
    real = train.train

    def hungry(learner, data, plan, arrays, key, *rest):
        if key == "3":
            raise MemoryError("DefaultCPUAllocator: can't allocate memory")
        return real(learner, data, plan, arrays, key, *rest)

    monkeypatch.setattr(train, "train", hungry)
    strategy = start(config(tiny_bert, **ONE_ROUND))
    (line,) = [line for line in strategy.lines if line["type"] == "round"]
    assert line["good"] == 5
    assert [(d["client"], d["reason"], "allocate memory" in d["detail"]) for d in line["dropped"]] == [("3", "error-2", True)]


def test_a_client_whose_disk_is_full_costs_its_reply(tiny_bert, monkeypatch, tmp_path):
    """FeDeRA's nodes keep the start that they are sent."""
    real = store.NodeStore.put

    def full(self, piece):
        if self.folder.name == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, piece)

    monkeypatch.setattr(store.NodeStore, "put", full)
    strategy, grid = prepare(config(tiny_bert, **ONE_ROUND | {"num_server_rounds": 3, "method": "federa"}, **PATIENT))
    grid.contexts[1003].node_config["store-dir"] = str(tmp_path / "full")
    strategy.start(grid, strategy.initial_arrays(), 3)
    lines = [line for line in strategy.lines if line["type"] == "round"]
    for line in lines:
        assert line["good"] == 5 and [(d["client"], d["reason"]) for d in line["dropped"]] == [("3", "error-2")]
        assert "No space left on device" in line["dropped"][0]["detail"]


def test_the_first_reason_is_told_when_no_node_can_train(tiny_bert):
    strategy, grid = prepare(config(tiny_bert, **ONE_ROUND))
    strategy.roster.expected = replace(strategy.roster.expected, fingerprint="other")
    with pytest.raises(RunFailed, match=r"no node can train; client \d: its fingerprint differs"):
        strategy.start(grid, strategy.initial_arrays(), 1)


def test_a_run_that_never_began_leaves_nothing(tiny_bert, tmp_path):
    from fedara_flwr import engine

    flat = config(tiny_bert, run__dir=str(tmp_path), run__name="x", strategy__node_timeout=0.2)
    with pytest.raises(TimeoutError):
        engine.run(flat, 0)
    assert list(tmp_path.iterdir()) == []


def test_more_training_nodes_than_there_are_is_a_clear_error(tiny_bert):
    strategy, grid = prepare(config(tiny_bert, strategy__min_train_nodes=9, strategy__node_timeout=2.0))
    with pytest.raises(TimeoutError, match=r"6 nodes after .*strategy.min-train-nodes = 9 are needed"):
        strategy.start(grid, strategy.initial_arrays(), 1)


def test_a_dead_process_of_the_simulation_ends_the_run_and_is_named(tiny_bert):
    """Flower would go on giving it messages (Ray's words, as they came from a killed actor)."""

    class Dead(InProcessGrid):
        def _call(self, message):
            reply = super()._call(message)
            if message.metadata.message_type == "train" and message.metadata.dst_node_id == 1000:
                words = "The actor died unexpectedly.", "The actor is dead because its worker process has died."
                reply = Message(Error(0, "\n".join(words)), reply_to=message)
                reply.metadata.__dict__["_src_node_id"] = 1000
            return reply

    strategy, grid = prepare(config(tiny_bert, strategy__fraction_train=1.0), Dead)
    with pytest.raises(RunFailed, match="client process of the simulation died"):
        strategy.start(grid, strategy.initial_arrays(), 4)
    (line,) = [line for line in strategy.lines if line["type"] == "round"]
    assert [(drop["client"], drop["reason"]) for drop in line["dropped"]] == [("0", "actor-died")] and line[
        "good"
    ] == CLIENTS - 1
