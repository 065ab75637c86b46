"""Malformed replies in whole runs: each is dropped and recorded with client, reason and figures, and the good ones alone give
the model, bit for bit. docs/faults.md lists them beside the tests of the single checks.
"""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from dataclasses import dataclass

import fuzz
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from runs_helper import CLIENTS, TamperedGrid, config, prepare, turn_into_error

from fedara_flwr.client_app import app as client_app
from fedara_flwr.engine import InProcessGrid
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.wire import PROTOCOL

VOTE = "report.slot-vote"
BAD, LAST = 2, 2  # the client whose reply is bad, and the round
FLAT = {
    "method": "fedara",
    "num_server_rounds": LAST + 1,
    "strategy__fraction_train": 1.0,
    "fedara__warmup_rounds": 0,
    "fedara__final_rounds": 1,
}


@dataclass
class Ground:
    """What all faults share: each client's answers, and the model that the good ones of the last round give."""

    flat: dict
    answers: dict
    arrays: dict
    mask: RankMask
    before: dict
    sent: RankMask

    def app(self, message, context):
        """The ClientApp, which is asked each question once: the same question has the same answer (test_runs.py)."""
        plan = message.content.config_records.get("plan", {})
        key = (message.metadata.message_type, message.metadata.dst_node_id, plan.get("round"))
        if key not in self.answers:
            self.answers[key] = client_app(message, context).content
        return Message(fuzz.copy_of(self.answers[key]), reply_to=message)

    def prepare(self, grid_class=InProcessGrid, **options):
        strategy, grid = prepare(self.flat, grid_class, app=self.app, **options)
        strategy._validate = lambda number, arrays: None  # not what is tested here
        return strategy, grid


@pytest.fixture(scope="module")
def ground(tiny_bert):
    """The rounds by hand, on Flower's own hooks; in the last one, the bad client's reply is not among the replies."""
    ground = Ground(config(tiny_bert, **FLAT), {}, {}, RankMask.full([]), {}, RankMask.full([]))
    strategy, grid = ground.prepare()
    for number in range(1, LAST + 1):
        arrays = strategy.initial_arrays()
        messages = list(strategy.configure_train(number, arrays, ConfigRecord(), grid))
        ground.before, ground.sent = dict(strategy.state.arrays), strategy.state.mask
        replies = list(grid.send_and_receive(messages))
        if number == LAST:
            replies = [reply for reply in replies if reply.metadata.src_node_id != 1000 + BAD]
        strategy.aggregate_train(number, replies)
    ground.arrays, ground.mask = strategy.state.arrays, strategy.state.mask
    assert ground.sent.count < len(ground.sent.bits), "the last round must have dead slots"
    return ground


# -- what a client may do to its reply -------------------------------------------------------------------------------------
def record(reply, name):
    return reply.content[name]


def part(change, name="B"):
    """A fault of one array: `change` gets its values."""

    def fault(reply, ground):
        arrays = record(reply, "arrays")
        changed = change(np.frombuffer(arrays[name].data[128:], dtype="<f4").copy())
        arrays[name] = changed if isinstance(changed, Array) else Array(np.asarray(changed))

    return fault


def filled(value):
    return part(lambda values: np.full_like(values, value))


def raw(data):
    """A fault of one array's bytes; dtype and shape are declared as they should be."""
    return part(lambda values: Array("float32", values.shape, "numpy.ndarray", data(values)))


def npy(values, **claims):
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": values.shape} | claims
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + values.tobytes()


def npz(values):
    stream = io.BytesIO()
    np.savez(stream, values)
    return stream.getvalue()


def objects(values):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.array([{}] * len(values), dtype=object), allow_pickle=True)
    return stream.getvalue()


def setting(name, **values):
    """A fault of one record's values; None takes a key away, _ in a name is a hyphen."""

    def fault(reply, ground):
        found = record(reply, name)
        for key, value in values.items():
            key = key.replace("_", "-")
            if value is None:
                del found[key]
            else:
                found[key] = value

    return fault


def records(change):
    """A fault of the records as such; `change` gets the content."""

    def fault(reply, ground):
        change(reply.content)

    return fault


def renamed(content, old, new):
    content[new] = content[old]
    del content[old]


def metadata(**values):
    def fault(reply, ground):
        reply.metadata.__dict__.update({f"_{key}": value for key, value in values.items()})

    return fault


def as_error(reply, ground):
    turn_into_error(reply, "Traceback\n  ValueError: broken")


def unreadable(reply, ground):
    raise ValueError("cannot inflate")


def stale_reply(reply, ground):
    reply.content = fuzz.copy_of(ground.answers["train", 1000 + BAD, LAST - 1])


def stale_mask(reply, ground):
    """This round's number on what was trained under the last round's mask."""
    stale_reply(reply, ground)
    record(reply, "reply")["round"] = LAST


def dead_slots(reply, ground):
    """All slots, the dead ones too: packed as if the mask were full."""
    full, spec = RankMask.full(ground.sent.ranks), ground.spec
    arrays = record(reply, "arrays")
    for name in ("B", "E", "A"):
        arrays[name] = Array(np.zeros(spec.length(name, full), dtype=np.float32))


def vote(change):
    """A fault of the vote; `change` gets the rank of every slot that was sent."""

    def fault(reply, ground):
        found = record(reply, "reply")
        ranks = np.frombuffer(found[VOTE], dtype="<u2").astype(np.int64)
        assert sorted(ranks.tolist()) == list(range(ground.sent.count))
        found[VOTE] = np.asarray(change(ranks)).astype("<u2").tobytes()

    return fault


FAULTS = {
    "array missing": (records(lambda c: c["arrays"].pop("A")), "parts"),
    "array extra": (records(lambda c: c["arrays"].update(spine=Array(np.zeros(3, np.float32)))), "parts"),
    "array renamed": (records(lambda c: renamed(c["arrays"], "B", "b")), "parts"),
    "array of a frozen part": (records(lambda c: c["arrays"].update(backbone=Array(np.zeros(3, np.float32)))), "parts"),
    "shape wrong": (part(lambda v: v[:-1]), "shape"),
    "shape broadcastable": (part(lambda v: v[:1]), "shape"),
    "shape broadcastable, 2-d": (part(lambda v: v.reshape(-1, 1)), "shape"),
    "shape 0-d": (part(lambda v: v[0]), "shape"),
    "shape empty": (part(lambda v: v[:0]), "shape"),
    "shape huge": (part(lambda v: Array("float32", (2**62,), "numpy.ndarray", npy(v))), "shape"),
    "dtype float64": (part(lambda v: v.astype("f8")), "shape"),
    "dtype int32": (part(lambda v: v.astype("i4")), "shape"),
    "dtype complex": (part(lambda v: v.astype("c8")), "shape"),
    "dtype object": (raw(objects), "shape"),
    "byte order": (raw(lambda v: npy(v.astype(">f4"), descr=">f4")), "shape"),
    "npz": (raw(npz), "format"),
    "header of another shape": (raw(lambda v: npy(v, shape=(len(v) + 1,))), "shape"),
    "header of another dtype": (raw(lambda v: npy(v, descr="<f8")), "shape"),
    "header bomb": (raw(lambda v: npy(v, shape=(10**12,))), "shape"),
    "header bomb that is declared": (
        part(lambda v: Array("float32", (10**12,), "numpy.ndarray", npy(v, shape=(10**12,)))),
        "shape",
    ),
    "header of Python code": (raw(lambda v: b"\x93NUMPY\x01\x00\x18\x00__import__('os').abort()" + v.tobytes()), "format"),
    "data cut": (raw(lambda v: npy(v)[:-4]), "format"),
    "data without header": (raw(lambda v: v.tobytes()), "format"),
    "data oversized": (raw(lambda v: npy(v) + bytes(2**24)), "format"),
    "serialised as something else": (part(lambda v: Array("float32", v.shape, "torch.Tensor", npy(v))), "format"),
    "NaN": (filled(np.nan), "not-finite"),
    "one NaN": (part(lambda v: np.concatenate([v[:-1], np.float32([np.nan])])), "not-finite"),
    "Inf": (filled(np.inf), "not-finite"),
    "-Inf": (filled(-np.inf), "not-finite"),
    "1e38": (filled(1e38), "range"),
    "no records": (records(lambda c: c.clear()), "records"),
    "records missing": (records(lambda c: c.pop("metrics")), "records"),
    "records extra": (records(lambda c: c.update(more=ArrayRecord())), "records"),
    "records, a thousand": (records(lambda c: c.update({f"more-{i}": MetricRecord() for i in range(1000)})), "records"),
    "record of another type": (records(lambda c: fuzz.put(c, "arrays", ConfigRecord({"a": 1}))), "records"),
    "record empty": (records(lambda c: c["arrays"].clear()), "parts"),
    "metrics empty": (records(lambda c: c["metrics"].clear()), "num-examples"),
    "list for a number of examples": (setting("metrics", num_examples=[37]), "metrics"),
    "list for a loss": (setting("metrics", loss=[0.5, 0.5]), "metrics"),
    "loss NaN": (setting("metrics", loss=float("nan")), "not-finite"),
    "metrics, a thousand": (records(lambda c: c["metrics"].update({f"m{i}": 1.0 for i in range(1000)})), "metrics"),
    "name of a megabyte": (records(lambda c: c["metrics"].update({"x" * 2**20: 1.0})), "metrics"),
    "examples none": (setting("metrics", num_examples=0), "num-examples"),
    "examples negative": (setting("metrics", num_examples=-9), "num-examples"),
    "examples NaN": (setting("metrics", num_examples=float("nan")), "num-examples"),
    "examples 1e12": (setting("metrics", num_examples=10**12), "num-examples"),
    "examples as a fraction": (setting("metrics", num_examples=37.0), "num-examples"),
    "evaluated on no examples": (setting("metrics", eval_examples=0), "num-examples"),
    "round stale": (stale_reply, "round"),
    "round as text": (setting("reply", round=str(LAST)), "round"),
    "mask stale": (stale_mask, "report"),
    "slots dead": (dead_slots, "shape"),
    "slots more than granted": (vote(lambda ranks: np.append(ranks, len(ranks))), "report"),
    "vote missing": (setting("reply", **{VOTE: None}), "report"),
    "vote empty": (setting("reply", **{VOTE: b""}), "report"),
    "vote of another type": (setting("reply", **{VOTE: "3012"}), "report"),
    "vote of a megabyte": (setting("reply", **{VOTE: bytes(2**20)}), "report"),
    "ranks of the vote twice the same": (vote(lambda ranks: np.where(ranks == 1, 0, ranks)), "report"),
    "ranks of the vote from 1 on": (vote(lambda ranks: ranks + 1), "report"),
    "protocol unknown": (setting("reply", protocol=PROTOCOL + 1), "protocol"),
    "protocol missing": (setting("reply", protocol=None), "protocol"),
    "needs pieces that there are not": (setting("reply", need_delta=["ab" * 32], protocol=9), "protocol"),
    "raises": (as_error, "error-2"),
    "unreadable": (unreadable, "unreadable"),
    "another's name": (metadata(src_node_id=4242), "sender"),
    "another's message": (metadata(reply_to_message_id="x"), "sender"),
}


def run(ground, fault):
    """(strategy, last round's line) of a run in which the bad client's last reply passes through `fault`."""

    def tamper(number, node, reply):
        if (number, node) == (LAST, BAD):
            fault(reply, ground)
        return reply

    strategy, grid = ground.prepare(TamperedGrid, tamper=tamper)
    ground.spec = strategy.spec
    strategy.start(grid, strategy.initial_arrays(), LAST)
    lines = [json.loads(json.dumps(line, allow_nan=False)) for line in strategy.lines]
    return strategy, [line for line in lines if line["type"] == "round"][-1]


@pytest.mark.parametrize("name", FAULTS)
def test_a_malformed_reply_is_dropped_and_the_good_ones_give_the_model(ground, name, caplog):
    fault, reason = FAULTS[name]
    with caplog.at_level(logging.WARNING, "fedara_flwr"):
        strategy, line = run(ground, fault)
    (drop,) = line["dropped"]
    assert (drop["client"], drop["reason"]) == (str(BAD), reason)
    assert 8 < len(drop["detail"]) < 500 and drop["detail"].isprintable()
    assert f"reply of client {BAD} dropped: {reason} ({drop['detail']})" in caplog.text
    assert line["good"] == CLIENTS - 1 and line["round"] == LAST
    assert strategy.state.mask == ground.mask
    for name, vector in ground.arrays.items():
        assert strategy.state.arrays[name].tobytes() == vector.tobytes()


def test_denormal_numbers_count(ground):
    """They are finite, and small as they are they move a mean."""
    strategy, line = run(ground, part(lambda v: np.concatenate([v[:-1], np.float32([1e-40])])))
    assert line["dropped"] == [] and line["good"] == CLIENTS
    assert all(np.isfinite(vector).all() for vector in strategy.state.arrays.values())
    assert strategy.state.arrays["B"].tobytes() != ground.arrays["B"].tobytes()


def test_many_faults_at_once(ground):
    """All but one client at fault, each in its own way: the one that is left gives the model."""
    kinds = ["NaN", "array missing", "header bomb", "examples 1e12", "unreadable"]

    def tamper(number, node, reply):
        if number == LAST and node < len(kinds):
            FAULTS[kinds[node]][0](reply, ground)
        return reply

    strategy, grid = ground.prepare(TamperedGrid, tamper=tamper)
    strategy.start(grid, strategy.initial_arrays(), LAST)
    line = [line for line in strategy.lines if line["type"] == "round"][-1]
    assert sorted((drop["client"], drop["reason"]) for drop in line["dropped"]) == [
        (str(node), FAULTS[kind][1]) for node, kind in enumerate(kinds)
    ]
    assert line["good"] == 1


def test_copies_share_no_record():
    """The faults above change copies of what the clients answered."""
    content = RecordDict({"reply": ConfigRecord({"round": 1})})
    copy = fuzz.copy_of(content)
    copy["reply"]["round"] = 2
    assert content["reply"]["round"] == 1


@pytest.mark.slow
def test_a_thousand_clients_of_which_a_fifth_are_bad(tiny_bert):
    """One round; every fifth reply is bad, in five kinds by turns. Each is counted under its own reason, all others count."""
    kinds = ["NaN", "array missing", "header bomb", "examples 1e12", "unreadable"]
    flat = config(
        tiny_bert,
        num_server_rounds=1,
        strategy__fraction_train=1.0,
        fedara__warmup_rounds=0,
        fedara__final_rounds=0,
        train__steps=1,
        data__test=0.1,
        data__partition="iid",
    )

    def tamper(number, node, reply):
        if node % 5 == 0:
            FAULTS[kinds[node // 5 % 5]][0](reply, None)
        return reply

    strategy, grid = prepare(flat, TamperedGrid, clients=1000, tamper=tamper)
    strategy.start(grid, strategy.initial_arrays(), 1)
    (line,) = [line for line in strategy.lines if line["type"] == "round"]
    assert line["good"] == 800 and len(line["sampled"]) == 1000
    assert Counter(drop["reason"] for drop in line["dropped"]) == {FAULTS[kind][1]: 40 for kind in kinds}
    assert all(int(drop["client"]) % 5 == 0 for drop in line["dropped"])
