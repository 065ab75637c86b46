"""Hostile answers of one node to every kind of message but TRAIN, and errors to all of them: what the good nodes answer is what
counts, bit for bit. Malformed replies to TRAIN: test_faults.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time

import fuzz
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result
from runs_helper import CLIENTS, config, prepare, turn_into_error

from fedara_flwr.client_app import app as client_app
from fedara_flwr.engine import InProcessGrid
from fedara_flwr.server.told import last_line, most_held_out
from fedara_flwr.wire import PROTOCOL

BAD = 2
HUGE = "x" * 20_000_000
FUZZED = 150
RESULT = Result()
RAY = "The actor died unexpectedly.\nThe actor is dead because its worker process has died."
KINDS = {"whoami": "query.whoami", "ready": "query.ready", "statistics": "query.statistics", "train": "train"}
KINDS["evaluate"] = "evaluate"
ANSWERS: dict[tuple, tuple[RecordDict, dict]] = {}


def app(message, context):
    """The ClientApp, asked the same thing once."""
    content, kind = message.content, message.metadata.message_type
    parts = [array.data for record in content.array_records.values() for array in record.values()]
    key = (kind, message.metadata.dst_node_id, hashlib.sha256(b"".join(parts)).hexdigest())
    if key not in ANSWERS:
        ANSWERS[key] = client_app(message, context).content, dict(context.state)
    content, kept = ANSWERS[key]
    context.state.update(kept)
    return Message(fuzz.copy_of(content), reply_to=message)


class Real(InProcessGrid):
    """Nodes as of a deployment, of which one has its answers of one kind changed, or is not there."""

    simulation = False

    def __init__(self, *args, kind="", fault=None, absent=False, **options):
        super().__init__(*args, app=app, **options)
        self.kind, self.fault, self.absent = KINDS.get(kind, ""), fault, absent

    def get_node_ids(self):
        return [node for node in super().get_node_ids() if not (self.absent and node == 1000 + BAD)]

    def _call(self, message):
        reply = super()._call(message)
        if (message.metadata.message_type, message.metadata.dst_node_id) == (self.kind, 1000 + BAD):
            self.fault(reply)
        return reply


FLAT = {
    "num_server_rounds": 1,
    "method": "fedara-static",
    "strategy__fraction_train": 1.0,
    "strategy__node_timeout": 5.0,
    "data__client_validation": 0.2,
    "head__start": "means",
}


def run(model, **options):
    """(what the good nodes give, the loop)"""
    loop, grid = prepare(config(model, **FLAT), Real, **options)
    loop._validate = lambda number, arrays: None  # not what is tested here
    loop.start(grid, loop.initial_arrays(), 1)
    arrays = {part: vector.tobytes() for part, vector in loop.state.arrays.items()}
    lines = json.loads(json.dumps(loop.lines, allow_nan=False))
    means = [
        {name: value for name, value in line.items() if name.startswith("client-") or name == "clients"}
        for line in lines
        if line["type"] in ("round", "client-evaluation")
    ]
    return (arrays, means), loop


def error(code, reason):
    """The reply is an error; Flower's `Error` says so."""

    def fault(reply):
        turn_into_error(reply, reason, code)

    return fault


def value(record, key, new):
    """One value of a record is another; None takes it away."""

    def fault(reply):
        found = reply.content[record]
        if new is None:
            del found[key]
        else:
            fuzz.put(found, key, new)

    return fault


def content(new):
    """Other records in place of the answer's."""

    def fault(reply):
        reply.content.clear()
        for name, record in new.items():
            fuzz.put(reply.content, name, record)

    return fault


def invented(prefix):
    def fault(reply):
        reply.content["metrics"].update({f"{prefix}{i}": 0.5 for i in range(40)})

    return fault


def as_another(reply):
    reply.metadata.__dict__["_src_node_id"] = 4242


ERRORS = {
    "an error": error(2, "Traceback\n  ValueError: broken"),
    "an error in Ray's words": error(0, RAY),
    "an error in Ray's words, long": error(0, "actor " * 3_000_000),
    "an error without words": error(6, ""),
}
EMPTY = {"no records": content({}), "other records": content({"metrics": ConfigRecord({"a": HUGE})})}
LEFT_OUT = {
    "whoami": ERRORS
    | EMPTY
    | {
        "another protocol": value("whoami", "protocol", PROTOCOL + 1),
        "a protocol of 20 MB": value("whoami", "protocol", HUGE),
        "no parts": value("whoami", "parts", None),
        "parts of 20 MB": value("whoami", "parts", HUGE),
        "parts as bytes": value("whoami", "parts", HUGE.encode()),
        "another's key": value("whoami", "client-key", "1"),
    },
    "ready": ERRORS
    | EMPTY
    | {
        "a reason of 20 MB": value("ready", "error", HUGE),
        "busy for a list of reasons": value("ready", "busy", [HUGE] * 2),
        "a fingerprint of 20 MB": value("ready", "fingerprint", HUGE),
        "a tokenizer that is none": value("ready", "tokenizer", [1, 2]),
        "other data": value("ready", "data", "0" * 64),
        "no examples": value("metrics", "num-examples", 0),
        "2**31 + 1 examples": value("metrics", "num-examples", 2**31 + 1),
        "half an example": value("metrics", "num-examples", 30.5),
        "a list of examples": value("metrics", "num-examples", [30] * 1_000_000),
    },
    "statistics": ERRORS | EMPTY | {"a refusal of 20 MB": content({"statistics": ConfigRecord({"refused": HUGE})})},
    "train": ERRORS,
    "evaluate": ERRORS
    | EMPTY
    | {
        "no examples": value("metrics", "eval-examples", 0),
        "examples as a fraction": value("metrics", "eval-examples", 7.5),
        "a list": value("metrics", "eval-loss", [0.5] * 1_000_000),
        "NaN": value("metrics", "eval-accuracy", float("nan")),
        "1e200": value("metrics", "eval-loss", 1e200),
        "a thousand names": lambda reply: reply.content["metrics"].update({f"eval-{i}": 0.5 for i in range(1000)}),
        "another's name": as_another,
    },
}
HARMLESS = {
    "whoami": {
        "one partition": value("whoami", "num-partitions", 1),
        "a billion partitions": value("whoami", "num-partitions", 10**9),
        "partitions of 20 MB": value("whoami", "num-partitions", HUGE),
        "says it is simulated": value("whoami", "simulated", True),
        "more records": lambda reply: reply.content.update({f"more-{i}": MetricRecord() for i in range(300)}),
    },
    "ready": {"40 invented names": invented("eval-more-"), "NaN": value("metrics", "bytes-free", float("nan"))},
    "statistics": {"40 invented names": invented("more-")},
    "train": {"40 invented names": invented("eval-more-")},
    "evaluate": {"40 invented names": invented("eval-more-")},
}
REFERENCE = {
    "whoami": {"absent": True},
    "ready": {"fault": content({"ready": ConfigRecord({"error": "no"}), "metrics": MetricRecord({"num-examples": 0})})},
    "statistics": {"fault": content({"statistics": ConfigRecord({"refused": "no"})})},
    "train": {"fault": error(2, "no")},
    "evaluate": {"fault": error(2, "no")},
}
"""An honest node of which nothing counts."""
_given: dict[str, tuple] = {}


def given(model, kind):
    """What the good replies give; with '' all are good."""
    if kind not in _given:
        _given[kind] = run(model, kind=kind, **REFERENCE.get(kind, {}))[0]
    return _given[kind]


def cases(faults):
    return pytest.mark.parametrize("kind, name", [(kind, name) for kind, named in faults.items() for name in named])


def check_log(caplog):
    texts = [record.getMessage() for record in caplog.records if record.name.startswith("fedara_flwr")]
    assert all(len(text) < 500 and text.isprintable() for text in texts), max(texts, key=len)[:600]
    return texts


@cases(LEFT_OUT)
def test_an_answer_that_cannot_be_is_left_out(tiny_bert, kind, name, caplog):
    with caplog.at_level(logging.WARNING, "fedara_flwr"):
        expected = given(tiny_bert, kind)
        began = time.process_time()
        found, loop = run(tiny_bert, kind=kind, fault=LEFT_OUT[kind][name])
        assert time.process_time() - began < 5
    assert found == expected
    assert [text for text in check_log(caplog) if str(BAD) in text]
    if kind == "train":
        (drop,) = next(line for line in loop.lines if line["type"] == "round")["dropped"]
        assert drop["client"] == str(BAD) and drop["reason"].startswith("error-")
    elif kind in ("whoami", "ready") and "busy" not in name:
        assert all(str(BAD) in key and len(why) < 400 for key, why in loop.roster.left_out().items())


@cases(HARMLESS)
def test_a_claim_that_means_nothing_changes_nothing(tiny_bert, kind, name, caplog):
    with caplog.at_level(logging.WARNING, "fedara_flwr"):
        expected = given(tiny_bert, "")
        found, loop = run(tiny_bert, kind=kind, fault=HARMLESS[kind][name])
    assert found == expected
    check_log(caplog)
    assert not any("more-" in name for line in loop.lines for name in line)
    assert not any(node.simulated for node in loop.roster.nodes.values())


def test_a_name_of_20_mb_is_cut(tiny_bert, caplog):
    with caplog.at_level(logging.WARNING, "fedara_flwr"):
        _, loop = run(tiny_bert, kind="whoami", fault=value("whoami", "client-key", HUGE))
    assert sorted(map(len, loop.roster.nodes)) == [1] * (CLIENTS - 1) + [64]
    check_log(caplog)


@pytest.mark.parametrize("kind, count", [("train", "eval-examples"), ("evaluate", "eval-examples"), ("ready", "num-examples")])
def test_nobody_outweighs_the_others_in_the_mean_of_what_clients_say(tiny_bert, kind, count):
    """It says 2**31 examples, of which it can have had a few, and another figure than the others."""

    def fault(reply):
        reply.content["metrics"][count] = 2**31
        if kind != "ready":
            reply.content["metrics"]["eval-accuracy"] = 1e6

    (_, means), loop = run(tiny_bert, kind=kind, fault=fault)
    if kind == "ready":
        honest = given(tiny_bert, "")[1]
        assert means[1]["client-eval-loss"] == pytest.approx(honest[1]["client-eval-loss"], abs=0.1)
        return
    line = means[0 if kind == "train" else 1]
    examples = loop.roster.examples
    median = sorted(most_held_out(number, 0.2) for number in examples.values())[(CLIENTS - 1) // 2]
    assert line["client-eval-accuracy"] / 1e6 < 3 * median / (3 * median + CLIENTS - 1)
    assert line["client-eval-accuracy"] / 1e6 < 0.9
    (own,) = [one for one in loop.lines if one["type"] == "client" and one["client"] == str(BAD) and one["round"] == 1]
    assert own["eval-examples"] <= most_held_out(examples[str(BAD)], 0.2)


def test_reasons_are_cut_before_they_are_looked_at():
    """Of each reply's megabytes some thousand characters are looked at, whatever stands in them."""
    began = time.process_time()
    for reason in ("actor " * 3_000_000, "\n" * 20_000_000, "actor is " * 2_000_000 + "\nlast"):
        assert len(last_line(reason)) <= 300
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize("kind", ["whoami", "ready", "statistics", "evaluate"])
def test_mutated_answers_are_left_out_or_count(tiny_bert, kind, caplog):
    """What is changed in one to three places, as records or to an error, ends no run, and changes nothing of the others."""
    rng, loop, grid = random.Random(kind), *prepare(config(tiny_bert, **FLAT), Real)
    loop.roster.wait(grid)
    loop.roster.sample(grid, 1, CLIENTS)
    good, outcomes = dict(loop.roster.examples), set()

    def fault(reply):
        if rng.random() < 0.1:
            error(rng.choice([0, 2, 9, -1]), rng.choice(["", RAY, HUGE[:100_000], "\x1b[31m\u202e\n" * 9]))(reply)
            return
        for _ in range(rng.randrange(1, 4)):
            fuzz.change_content(rng, reply.content)

    grid.kind, grid.fault = KINDS[kind], fault
    with caplog.at_level(logging.WARNING, "fedara_flwr"):
        for _ in range(FUZZED):
            caplog.clear()
            outcomes.add(ASK[kind](loop, grid, good))
            check_log(caplog)
    assert outcomes == {True, False}, "some count, some do not"


def ask_whoami(loop, grid, good):
    roster = loop.roster
    for name in ("nodes", "unfit", "turned_away"):
        getattr(roster, name).clear()
    roster._asked.clear()
    roster._unknown.settle((), [f"node {1000 + BAD}"])
    roster.refresh(grid)
    others = {node.key: node.node_id for node in roster.nodes.values() if node.node_id != 1000 + BAD}
    assert others == {str(i): 1000 + i for i in range(CLIENTS) if i != BAD}
    assert all(len(key) <= 64 and key.isprintable() for key in roster.nodes)
    return len(roster.nodes) == CLIENTS


def ask_ready(loop, grid, good):
    roster = loop.roster
    roster.examples.pop(str(BAD), None)
    roster.unfit.clear()
    roster.strikes.settle((), [str(BAD)])
    drawn = roster.sample(grid, 1, CLIENTS)
    assert {key: number for key, number in roster.examples.items() if key != str(BAD)} == {
        key: number for key, number in good.items() if key != str(BAD)
    }
    assert len(drawn) >= CLIENTS - 1 and 1 <= roster.examples.get(str(BAD), 1) <= 2**31
    return len(drawn) == CLIENTS


def ask_statistics(loop, grid, good):
    from fedara_flwr.server.statistics import HeadStart

    start = HeadStart(loop.settings, loop.method.model.places(), loop.meter)
    told = start.ask(grid, list(loop.roster.nodes.values()), good)
    assert set(told) >= set(good) - {str(BAD)} and [line["client"] for line in start.lines] == sorted(told)
    json.dumps(start.lines, allow_nan=False)
    return str(BAD) in told


def ask_evaluate(loop, grid, good):
    loop.state.server_round = 1
    loop._evaluate_on_clients(grid, loop.initial_arrays(), ConfigRecord(), RESULT)
    line = loop.lines.pop()
    assert line["clients"] >= CLIENTS - 1 and {name for name in line if name.startswith("client-")} == {
        "client-eval-accuracy",
        "client-eval-loss",
        "client-eval-macro-f1",
    }
    json.dumps(line, allow_nan=False)
    return line["clients"] == CLIENTS


ASK = {"whoami": ask_whoami, "ready": ask_ready, "statistics": ask_statistics, "evaluate": ask_evaluate}
