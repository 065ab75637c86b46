"""A seeded fuzzer for what crosses the wire: replies as the server gets them, plans as a client gets them.

A valid message is changed in one to three places, on one of two levels: its *records* (names, types, dtypes, shapes, npy
headers, numbers, reports, counts), or the *bytes* of the objects into which Flower deflates it, inflated again as Flower's Grid
would. Replies then take the server's whole way: Grid, server/messages, `RoundLoop._receive`, `Round.collect`, a merger that
checks what reaches it. Everything follows from the seed.
"""

from __future__ import annotations

import json
import logging
import math
import random
import struct
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    UnexpectedObjectContentError,
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects, validate_object_content
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_connection import http_request_response

from fedara_flwr.engine import InProcessGrid
from fedara_flwr.model.deltas import DeltaLog, Piece
from fedara_flwr.model.draws import draw
from fedara_flwr.model.parts import BUILT_IN
from fedara_flwr.model.ranks import RankMask, pack_order, rank_order
from fedara_flwr.model.spec import ModelSpec, ModuleSpec, ParameterSpec
from fedara_flwr.server.loop import RoundLoop
from fedara_flwr.server.roster import Expected, Node
from fedara_flwr.server.round import Round
from fedara_flwr.server.state import ServerState
from fedara_flwr.strategies.base import Client, Method
from fedara_flwr.strategies.fedara import FedARA
from fedara_flwr.tasks import read_settings
from fedara_flwr.training import LocalTraining
from fedara_flwr.wire.arrays import MAX_NAME, Rejected, read_arrays, to_record
from fedara_flwr.wire.codec import CODECS, Broadcast
from fedara_flwr.wire.meter import counted, payload
from fedara_flwr.wire.plan import KEPT_SLOTS, TrainPlan, Update
from fedara_flwr.wire.records import (
    LARGEST_VALUE,
    MAX_METRICS,
    MAX_VALUE,
    need_delta,
    plan_from_content,
    plan_to_content,
    read_pieces,
    update_to_content,
)
from fedara_flwr.wire.upload import code_update

PARTS = tuple(BUILT_IN)
SPEC = ModelSpec(
    "f" * 64,
    (ModuleSpec("m0", 3, 2, 0), ModuleSpec("m1", 1, 4, 0), ModuleSpec("m2", 2, 2, 1)),
    (ParameterSpec("weight", (2, 2)), ParameterSpec("bias", (2,))),
    (ParameterSpec("embedding", (3, 1)), ParameterSpec("m0.weight", (3, 2))),
)
MASK = RankMask((2, 2, 2), np.array([1, 1, 0, 1, 0, 1], dtype=bool))
ROUND, MOST, SECONDS = 7, 100, 1.0
REASONS = {
    *(
        "records",
        "parts",
        "shape",
        "format",
        "codes",
        "not-finite",
        "range",
        "metrics",
        "num-examples",
        "report",
        "protocol",
        "round",
    ),
    *("delta", "sender", "norm", "unreadable"),
}
"""Why a reply may be dropped; "unreadable" only where Flower itself could not inflate it."""
PLAN_REASONS = {"records", "protocol", "plan", "delta", "parts", "shape", "format", "codes", "not-finite"}


class Broken(BaseException):
    """A message did what none may do. No Exception: the code under test catches those."""


# -- valid messages ---------------------------------------------------------------------------------------------------------
PIECE = Piece(
    (1, 1, 1),
    {"B": np.arange(6, dtype=np.float32) / 8, "A": np.arange(8, dtype=np.float32) / 8},
)
PLAN = TrainPlan(
    server_round=ROUND,
    seed=42,
    mask=MASK,
    scales=(2.0, 2.0, 2.0),
    train=LocalTraining(steps=8, epochs=1, batch_size=16, learning_rate=2e-3, e_lr_factor=1.0, head_learning_rate=1e-2),
    sent=frozenset({"B", "E", "A", "head"}),
    carries=frozenset({"B", "E", "A", "head"}),
)
VOTE = "slot-vote"
VOTING = replace(PLAN, terms={VOTE: {"budget": 2.0, "importance": "magnitude"}}, report=frozenset({VOTE}))
PLANS = {
    "fedara": VOTING,
    "fedara-local": replace(VOTING, report=frozenset({VOTE, KEPT_SLOTS}), down="float16", up="int4"),
    "ffa-lora": replace(PLAN, sent=frozenset({"B", "head"}), drawn=frozenset({"A"}), draw_seed=9),
    "full": replace(PLAN, mask=MASK.keep(np.zeros(4, dtype=bool)), sent=frozenset({"head", "backbone"})),
    "slora": replace(
        PLAN, sent=frozenset({"head", "backbone"}), drawn=frozenset({"backbone"}), entries=9, draw_seed=3, up="int8"
    ),
    "hetlora": replace(
        PLAN,
        report=frozenset({KEPT_SLOTS}),
        terms={"tail-penalty": {"weight": 0.01, "gamma": 0.85}},
        down="int4",
        up="float16",
        feedback=PLAN.sent,
        run="5" * 32,
    ),
    "flora": replace(PLAN, terms={"prox": {"mu": 0.1}}, class_shares=(0.75, 0.25)),
    "fedsa-lora": replace(PLAN, sent=frozenset({"A", "head"}), kept=frozenset({"B"}), run="5" * 32),
}


def answer(plan: TrainPlan, lacks: bool = False) -> RecordDict:
    """A good reply to `plan`, or one that lacks its delta."""
    if lacks:
        return need_delta(plan.delta, plan.server_round)
    mask, ranks = plan.mask, rank_order(np.array([0.1, 4.0, 3.0, 0.2]))
    reports = {VOTE: pack_order(ranks)} if VOTE in plan.report else {}
    if KEPT_SLOTS in plan.report:
        mask = mask.keep(ranks < 2 if reports else np.array([True, False, True, True]))
    rng = np.random.default_rng(0)
    sizes = {part: SPEC.length(part, mask, plan.entries) for part in PARTS if part in plan.returns(mask)}
    arrays = {part: rng.normal(size=size).astype(np.float32) for part, size in sizes.items()}
    update = Update(arrays, mask, 37, {"loss": 0.5, "eval-examples": 4, "eval-loss": 0.4}, reports)
    received = {part: np.zeros(SPEC.length(part, plan.mask, plan.entries), dtype=np.float32) for part in PARTS}
    return update_to_content(update, plan, code_update(update, plan, SPEC, received, "0")[0])


# -- mutations of records ---------------------------------------------------------------------------------------------------
NAMES = [
    "arrays",
    "reply",
    "metrics",
    "plan",
    *PARTS,
    "report.slot-vote",
    "report.",
    "kept-slots",
    "kept",
    "sent",
    "run",
    "round",
    "protocol",
    "num-examples",
    "mask",
]
NAMES += [
    "",
    "\x00",
    "é" * 40,
    "x" * 5000,
    "A\nround 7: all is well",
    "\x1b[2J",
    "delta.",
    "delta-ranks.",
    "need-delta",
    "loss",
]
NAMES += [
    "eval-examples",
    "eval-accuracy",
    "\u202e",
    "term.",
    "term.prox.mu",
    "term..",
    "term.slot-vote.importance",
    "train.",
    "train.steps",
    "seconds-elapsed",
    "client",
    "type",
]
INTS = [0, 1, -1, 2, 7, 37, MOST, MOST + 1, 2**31, 2**53 + 1, 2**62, 2**63 - 1, -(2**63), 2**64 - 1, 10**12]
FLOATS = [0.0, -0.0, 0.5, 7.0, 37.0, math.nan, math.inf, -math.inf, 1e12, 1.1e12, 1e38, -1e38, 1e300, -1e300, 5e-324, 1e-40]
FLOAT32 = [struct.pack("<f", x) for x in (math.nan, math.inf, -math.inf, 1e38, -1e38, 1e12, 1.1e12, 1e-45, -0.0, 0.0)]
FLOAT32 += [b"\xff" * 4, b"\x01\x00\x80\x7f", b"\x7f\x80\x00\x00"]  # NaN, a signalling NaN, infinity the wrong way round
STRINGS = [
    "",
    "x",
    "7",
    "1",
    "\x00",
    "float32\nround 7: fine",
    "numpy.ndarray",
    "x" * 10_000,
    "é",
    "<f4",
    ",",
    "B,,A",
    "local",
    "int4",
    "float16",
    "NaN",
]
BYTES = [b"", b"\x00", b"\x60", b"\x00" * 8, b"\xff" * 8, b"\xff" * 1000, b"\x80\x04N."]
DTYPES = [
    "float64",
    "float16",
    "int32",
    "bool",
    "complex64",
    ">f4",
    "<f4",
    "object",
    "S4",
    "",
    "Float32",
    "float32 ",
    "\n",
    "x" * 9999,
]
SHAPES = [
    (),
    (0,),
    (1,),
    (4,),
    (1, 4),
    (4, 1),
    (-4,),
    (2**62,),
    (2**40, 2**40),
    (2**70,),
    (1,) * 1000,
    (2**62,) * 1000,
    (True,),
]
SHAPES += [(10**4299,) * 2000, (0, 2**62), (-1, -4)]
DESCRIPTIONS = [
    "<f4",
    ">f4",
    "<f8",
    "|O",
    "<c8",
    "|S4",
    "<U9",
    "|V999999999",
    "f4",
    "=f4",
    "<i4",
    "|b1",
    "M8[s]",
    "<m8",
    "garbage",
    "",
]
HEADERS = [
    b"{",
    b"[" * 200,
    b"(" * 90,
    b"-" * 200,
    b"{'descr': '<f4'}",
    b"__import__('os')",
    b"\xff" * 80,
    b"9" * 200,
    b"1e999",
    b"'\\x'",
]
HEADERS += [
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (4L,), }",
    b"{'descr': [('a', '<f4')], 'fortran_order': 0, 'shape': 4}",
]


def weird(rng: random.Random):
    """A value that a ConfigRecord or MetricRecord may hold, often a bad one."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice(INTS)
    if kind == 1:
        return rng.choice(FLOATS)
    if kind == 2:
        return rng.choice(STRINGS)
    if kind == 3:
        return rng.choice(BYTES)
    if kind == 4:
        return rng.random() < 0.5
    if kind == 5:
        return rng.randbytes(rng.randrange(12))
    pool = rng.choice([INTS, FLOATS, STRINGS, BYTES, [True, False]])
    return [rng.choice(pool) for _ in range(rng.choice([0, 1, 2, 3, 3, 40]))]


def change_bytes(rng: random.Random, data: bytes, tokens: Sequence[bytes] = BYTES) -> bytes:
    """`data` with one thing flipped, set, cut, inserted, doubled or moved."""
    out = bytearray(data)
    at = rng.randrange(len(out) + 1)
    kind = rng.randrange(9)
    if kind <= 2 and out:
        out[at - 1] ^= 1 << rng.randrange(8)
    elif kind == 3 and out:
        out[at - 1] = rng.randrange(256)
    elif kind == 4:
        del out[at:]
    elif kind == 5:
        del out[at : at + rng.choice([1, 2, 4, 16])]
    elif kind == 6:
        out[at:at] = rng.choice(tokens)
    elif kind == 7:
        token = rng.choice(tokens)
        out[at : at + len(token)] = token
    else:
        end = min(len(out), at + rng.randrange(1, 20))
        out[at:at] = out[at:end]
    return bytes(out)


def npy_header(rng: random.Random, length: int) -> bytes:
    """A header of 128 bytes that claims what it likes."""
    shape = rng.choice([(length,), (length + 1,), (2**31,), (2**62,), (10**30,), (), (length, 1), (-length,)])
    claim = {"descr": rng.choice(DESCRIPTIONS), "fortran_order": rng.random() < 0.3, "shape": shape}
    text = repr(claim).encode() if rng.random() < 0.7 else rng.choice(HEADERS)
    text = text.ljust(117)[: rng.choice([117, 117, 117, 20])] + b"\n"
    version = rng.choice([b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"])
    size = len(text) if rng.random() < 0.8 else rng.choice([0, 1, 2**16 - 1])
    return b"\x93NUMPY" + version + struct.pack("<H" if version == b"\x01\x00" else "<I", size) + text


def change_array(rng: random.Random, array: Array) -> Array:
    dtype, shape, stype, data = array.dtype, array.shape, array.stype, array.data
    kind = rng.randrange(10)
    if kind == 0:
        dtype = rng.choice(DTYPES)
    elif kind == 1:
        shape = rng.choice(SHAPES)
    elif kind == 2:
        stype = rng.choice(STRINGS)
    elif kind in (3, 4):
        data = change_bytes(rng, data)
    elif kind in (5, 6) and len(data) >= 132:
        at = 128 + 4 * rng.randrange((len(data) - 128) // 4)
        data = data[:at] + rng.choice(FLOAT32) + data[at + 4 :]
    elif kind == 7:
        length = len(data[128:]) // 4
        data = npy_header(rng, length) + data[128:]
        shape = rng.choice([shape, (2**31,), (length,)])
    elif kind == 8:
        size = rng.choice([0, 1, 4, 4096])
        values = np.zeros(size, dtype=rng.choice(["<f4", "<f8", ">f4", "<i4", "c8", "?"]))
        return Array(values.reshape(rng.choice([(size,), (size, 1), (1, size)])))
    else:
        data = rng.choice([b"", data[:128], data[128:], data * 2, b"PK\x03\x04" + data, b"\x80\x04\x95" + data])
    return Array(dtype, shape, stype, data)


def put(record, key, value) -> None:
    """Past the type checks of Flower's setter, which hold only on the sender's side."""
    record.__dict__["_data"][key] = value


def change_record(rng: random.Random, content: RecordDict) -> None:
    """Something about the records as such."""
    names = list(content)
    kind = rng.randrange(7)
    if not names or kind == 0:
        pool = [ArrayRecord(), ConfigRecord(), MetricRecord(), ConfigRecord({"a": 1}), MetricRecord({"a": 1})]
        put(content, rng.choice(NAMES), rng.choice(pool))
        return
    name = rng.choice(names)
    if kind == 1:
        del content[name]
    elif kind == 2:
        record = content[name]
        del content[name]
        put(content, rng.choice(NAMES), record)
    elif kind == 3:
        put(content, rng.choice(NAMES), content[name])
    elif kind == 4:
        other = rng.choice(names)
        first, second = content[name], content[other]
        put(content, name, second)
        put(content, other, first)
    elif kind == 5:
        put(content, name, rng.choice([ArrayRecord(), ConfigRecord(), MetricRecord()]))
    else:
        for number in range(rng.choice([2, 300])):
            put(content, f"more-{number}", MetricRecord())


def change_content(rng: random.Random, content: RecordDict) -> None:
    """Change `content` (a copy that shares its arrays) in one place."""
    names = list(content)
    if not names or rng.random() < 0.12:
        change_record(rng, content)
        return
    name = rng.choice(names)
    record = content[name].copy()
    put(content, name, record)
    keys = list(record)
    key = rng.choice(keys) if keys else rng.choice(NAMES)
    kind = rng.randrange(10)
    if kind == 0 and keys:
        del record[key]
    elif kind == 1 and keys:
        value = record[key]
        del record[key]
        put(record, rng.choice(NAMES), value)
    elif kind == 2 and keys:
        put(record, rng.choice(NAMES), record[key])
    elif isinstance(record, ArrayRecord):
        if not keys:
            put(record, key, Array(np.zeros(rng.choice([0, 1, 4]), dtype=np.float32)))
        elif kind == 3:
            put(record, rng.choice(keys), record[key])
        else:
            put(record, key, change_array(rng, record[key]))
    elif kind == 3 and rng.random() < 0.3:
        for number in range(rng.choice([MAX_METRICS, 1000])):
            put(record, f"more-{number}", 1.0)
    elif kind <= 5 and keys and isinstance(record[key], bytes):
        put(record, key, change_bytes(rng, record[key]))
    elif isinstance(record, MetricRecord):
        value = weird(rng)
        numbers = value if isinstance(value, list) else [value]
        good = all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
        put(record, key if rng.random() < 0.8 else rng.choice(NAMES), value if good else rng.choice(INTS + FLOATS))
    else:
        put(record, key if rng.random() < 0.7 else rng.choice(NAMES), weird(rng))


def copy_of(content: RecordDict) -> RecordDict:
    """New records, the same Arrays: those are replaced, never changed."""
    copy = content.copy()
    for name, record in content.items():
        put(copy, name, record.copy())
    return copy


# -- mutations of deflated objects ------------------------------------------------------------------------------------------
TOKENS = [
    b"-1",
    b"NaN",
    b"1e999",
    b"null",
    b"true",
    b"{",
    b"[",
    b'"',
    b"\x00",
    b" ",
    b",",
    b"\xff" * 9,
    b"9" * 40,
    b"9" * 5000,
    b"[" * 2000,
]
TOKENS += [
    b"Message",
    b"RecordDict",
    b"ArrayRecord",
    b"Array",
    b"ArrayChunk",
    b"ConfigRecord",
    b"MetricRecord",
    b"Context",
    b"InflatableObject",
]
TOKENS += [
    b"shape",
    b"dtype",
    b"arraychunk_ids",
    b"float32",
    b"object",
    b"numpy.ndarray",
    b"[4611686018427387904]",
    b"[0, 0, 0, 0]",
    b"[-1]",
]
TOKENS += [b"X\nround 7: all is well", b"\x1b[2J", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800"]
Objects = dict[str, bytes]


def deflated(message: Message) -> tuple[str, Objects]:
    """(id of the message, content of all its objects by id, children first)."""
    objects = get_all_nested_objects(message)
    return message.object_id, {object_id: obj.deflate() for object_id, obj in objects.items()}


def change_objects(rng: random.Random, objects: Objects, root: str) -> None:
    """Change the bytes of one object, under its old id: an attacker's tree would be consistent (`rehashed`)."""
    ids = list(objects)
    leaves = [i for i in ids if b"  " in objects[i][:64]]  # no children in the head: numbers, reports, counts
    object_id = rng.choice(leaves if leaves and rng.random() < 0.5 else ids)
    kind = rng.randrange(16)
    if kind == 0 and object_id != root:
        del objects[object_id]
    elif kind == 1:
        other = rng.choice(ids)
        objects[object_id], objects[other] = objects[other], objects[object_id]
    elif kind == 2:
        other = rng.choice(ids)
        objects[object_id] = objects[object_id].replace(object_id.encode(), other.encode())
    elif kind == 3:
        head, _, body = objects[object_id].partition(b"\x00")
        objects[object_id] = rng.choice(TOKENS) + b" " + head.split(b" ", 1)[-1] + b"\x00" + body
    elif kind == 4 and b"arraychunk_ids" in objects[object_id]:
        change = rng.choice(
            [b"[0, 0, 0]", b"[]", b"[1]", b"[-1]", b"[0.5]", b"[null]", b"{}", b'"0"', json.dumps([0] * 1000).encode()]
        )
        head, _, body = objects[object_id].partition(b'"arraychunk_ids": ')
        objects[object_id] = head + b'"arraychunk_ids": ' + change + b"}"
    elif kind == 5 and b'"shape"' in objects[object_id]:
        change = rng.choice(
            [
                b"[-4]",
                b"[9999999999999999999999]",
                b"[" + b"9" * 4299 + b"]",
                b"[[4]]",
                b'["4"]',
                b"4",
                b"null",
                b"[4.0]",
                b"[]",
            ]
        )
        head, _, body = objects[object_id].partition(b'"shape": ')
        objects[object_id] = head + b'"shape": ' + change + body.partition(b"]")[2]
    elif kind <= 14:
        head, end, body = objects[object_id].partition(b"\x00")
        objects[object_id] = head + end + change_bytes(rng, body, TOKENS)
    else:
        objects[object_id] = change_bytes(rng, objects[object_id], TOKENS)


def rehashed(objects: Objects, root: str) -> tuple[str, Objects, dict[str, str]]:
    """The same tree under ids that are the hashes of what the objects now hold; and new ids by old ones."""
    new: dict[str, str] = {}
    out: Objects = {}
    for object_id, content in objects.items():
        for old, fresh in new.items():
            content = content.replace(old.encode(), fresh.encode())
        new[object_id] = get_object_id(content)
        out[new[object_id]] = content
    return new[root], out, new


# -- the server ---------------------------------------------------------------------------------------------------------
@dataclass
class Model:
    """As much of one as a method takes over before its start."""

    spec: ModelSpec


class Given(Method):
    """Its clients get PLANS in turn; their votes are read as FedARA reads them."""

    name = "fuzz"
    read_report = FedARA.read_report

    def plan(self, state, client):
        return list(PLANS.values())[int(client.key) % len(PLANS)]


class Loop(RoundLoop):
    """The server's rounds over PLANS, each of them given to several clients."""

    def __init__(self, ids: Sequence[int], timeout: float = 3600.0) -> None:
        """One client per node id; a node may be several clients."""
        settings = read_settings({"strategy.fraction-train": 1.0, "strategy.round-timeout": timeout})
        log, rng = DeltaLog(SPEC), np.random.default_rng(1)
        log.add(PIECE)
        arrays = {part: rng.normal(size=SPEC.length(part, MASK)).astype(np.float32) for part in PARTS}
        state = ServerState(arrays, MASK, log, server_round=ROUND - 1)
        expected = Expected("f" * 64, "t", "d", ("a", "b"), frozenset())
        super().__init__(settings, Given(settings, Model(SPEC)), state, expected, run_id="5" * 32)
        self.roster.nodes = {str(i): Node(str(i), node_id, len(ids)) for i, node_id in enumerate(ids)}
        self.roster.examples = self.roster.weights = dict.fromkeys(self.roster.nodes, MOST)
        self.roster._asked = set(ids)


class Checker:
    """A merger that checks what reaches it."""

    memory = "one"

    def __init__(self, plans: dict[str, TrainPlan]) -> None:
        self.plans, self.keys = plans, []

    def add(self, client_key: str, update: Update, weight: int) -> None:
        check_update(update, self.plans[client_key])
        if not 1 <= weight <= MOST or client_key in self.keys:
            raise Broken(f"client {client_key} weighs {weight}")
        self.keys.append(client_key)


def check_update(update: Update, plan: TrainPlan) -> None:
    """All that the strategies may rely on."""
    if not plan.mask.covers(update.mask):
        raise Broken("slots that were not granted")
    if KEPT_SLOTS not in plan.report and update.mask != plan.mask:
        raise Broken("slots are missing")
    if not update.mask.count and plan.mask.count:
        raise Broken("no slot at all")
    if set(update.arrays) != plan.returns(update.mask) or update.stays:
        raise Broken(f"parts {sorted(update.arrays)}, {sorted(update.stays)}")
    for part, vector in update.arrays.items():
        if vector.dtype != np.float32 or vector.shape != (SPEC.length(part, update.mask, plan.entries),):
            raise Broken(f"{part} is {vector.dtype} {vector.shape}")
        if not (np.abs(vector) <= LARGEST_VALUE).all():
            raise Broken(f"{part} holds {vector}")
    if type(update.num_examples) is not int or not 1 <= update.num_examples <= MOST:
        raise Broken(f"{update.num_examples!r} examples")
    if len(update.metrics) > MAX_METRICS:
        raise Broken(f"{len(update.metrics)} metrics")
    for name, value in update.metrics.items():
        if type(value) is not float or not abs(value) <= MAX_VALUE or len(name) > MAX_NAME:
            raise Broken(f"metric {name!r} = {value!r}")
    if set(update.reports) != plan.report - {KEPT_SLOTS}:
        raise Broken(f"reports {sorted(update.reports)}")
    if VOTE in plan.report and sorted(update.reports[VOTE].tolist()) != list(range(plan.mask.count)):
        raise Broken(f"ranks {update.reports[VOTE]}")


class FuzzGrid(InProcessGrid):
    """Answers each TRAIN message with a mutated reply."""

    def __init__(self, rng: random.Random, loop: Loop) -> None:
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1  # else Flower lets nobody make a Message
        self.rng, self.loop = rng, loop
        self._waiting, self._good = {}, {}
        self.raised: Counter[str] = Counter()
        self.slowest, self._since = 0.0, None
        self.pulled = 0

    def get_node_ids(self):
        return [node.node_id for node in self.loop.roster.nodes.values()]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            message_id = f"{node}" if f"{node}" not in self._waiting and node not in self._seen else f"{node}-again"
            self._seen.add(node)
            message.metadata.__dict__["_message_id"] = message_id
            self._waiting[message_id] = message
            ids.append(message_id)
        return ids

    def begin(self) -> None:
        """A new round: nothing is on its way."""
        self._waiting, self._seen = {}, set()
        self._since = None

    def pull_messages(self, message_ids):
        self.lap()
        (message_id,) = message_ids
        message, rng = self._waiting.pop(message_id), self.rng
        self.pulled += 1
        reply, root, objects = self._reply_to(message_id, message)
        self._since = time.thread_time()
        if rng.random() < 0.5:
            content = copy_of(reply.content)
            for _ in range(rng.choice([1, 1, 2, 3])):
                change_content(rng, content)
            made = Message(content, reply_to=message)
            if rng.random() < 0.02:
                made.metadata.__dict__[rng.choice(["_src_node_id", "_reply_to_message_id"])] = rng.choice([0, 1001, "1001", ""])
            return [made]
        changed = dict(objects)
        for _ in range(rng.choice([1, 1, 2, 3])):
            change_objects(rng, changed, root)
        try:
            made = inflate_object_from_contents(root, changed)
            made.metadata.__dict__["_message_id"] = root  # as HttpGrid does
        except Exception as error:
            self.raised[type(error).__name__] += 1
            raise
        return [made]

    def lap(self) -> None:
        """The seconds of this thread since the last pull: inflating, checking, counting."""
        if self._since is not None:
            self.slowest = max(self.slowest, time.thread_time() - self._since)

    def _reply_to(self, message_id: str, message: Message) -> tuple[Message, str, Objects]:
        if message_id not in self._good:
            plan = self.loop.method.plan(self.loop.state, Client(str(message.metadata.dst_node_id - 1000)))
            work = self.loop.work
            index = next(i for i, node in enumerate(work.asked) if node.node_id == message.metadata.dst_node_id)
            lacks = plan is PLANS["flora"] and not message_id.endswith("again")
            reply = Message(answer(work.plans[index], lacks), reply_to=message)
            reply.metadata.__dict__.update(_created_at=1.7e9, _ttl=3600.0)  # the same bytes in every campaign
            self._good[message_id] = (reply, *deflated(reply))
        return self._good[message_id]


class Lines(logging.Handler):
    """Formats every line as a log would, and looks at it."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if len(text) > 2000:
            raise Broken(f"a log line of {len(text)} characters")


@dataclass
class Outcome:
    """What became of the messages: by reason, Flower's own exceptions by type, the slowest one's seconds of CPU."""

    reasons: Counter[str] = field(default_factory=Counter)
    raised: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.reasons.values())


def fuzz_replies(
    count: int, seed: int, progress: Callable[[Outcome], None] = lambda outcome: None, clients: int = 70
) -> Outcome:
    """At least `count` mutated replies through the server's rounds.

    Raises:
        Broken: a message got past a check, raised what it must not, or took too long.
    """
    rng, loop, outcome = random.Random(seed), Loop(range(1000, 1000 + clients)), Outcome()
    grid = FuzzGrid(rng, loop)
    grid.begin()
    loop.configure_train(ROUND, to_record(loop.state.arrays), ConfigRecord(), grid)
    first = loop.work
    logger, handler = logging.getLogger("fedara_flwr.server"), Lines()
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, of headers in the style of Python 2
            while outcome.count < count:
                loop.work = again(first)
                grid.begin()
                before = grid.pulled
                play(loop, grid, outcome)
                grid.lap()
                if grid.slowest > SECONDS:
                    raise Broken(f"one message took {grid.slowest:.2f} s")
                outcome.reasons["asked-again"] += grid.pulled - before - clients
                progress(outcome)
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
    outcome.raised, outcome.slowest = grid.raised, grid.slowest
    return outcome


def again(work: Round) -> Round:
    """The same round before its replies."""
    fresh = [f for f in fields(Round) if f.default_factory is not MISSING and f.name not in ("down", "began")]
    values = {f.name: f.default_factory() for f in fresh}
    return replace(work, **values, **{name: list(getattr(work, name)) for name in ("down", "plans", "messages")})


def play(loop: Loop, grid: Grid, outcome: Outcome) -> None:
    """One round of mutated replies, and what must hold after it; `grid.raised` counts what Flower could not inflate."""
    work, unreadable = loop.work, grid.raised.total()
    merger = Checker({node.key: plan for node, plan in zip(work.asked, work.plans, strict=True)})
    state = {part: vector.copy() for part, vector in loop.state.arrays.items()}
    work.collect(loop._receive(grid, 3600.0), merger)
    for drop in work.drops:
        if drop.reason not in REASONS | {"timeout"} and not drop.reason.startswith("error-"):
            raise Broken(f"unknown reason {drop.reason!r}: {drop.detail}")
        if len(drop.detail) > 1000:
            raise Broken(f"{len(drop.detail)} characters of detail")
    raised = [drop.detail for drop in work.drops if drop.reason == "unreadable"]
    if len(raised) != grid.raised.total() - unreadable:
        raise Broken(f"a check raised, one of {raised}")
    keys, dropped = {node.key for node in work.asked}, [drop.client for drop in work.drops]
    if sorted([*merger.keys, *dropped]) != sorted(keys) or merger.keys != work.answered:
        raise Broken("a client's reply counts twice, or not at all")
    sent = loop.meter.take_round()
    if sent["up"] != sum(sent[f"up.{part}"] for part in counted()) or any(size < 0 for size in sent.values()):
        raise Broken(f"bytes {sent}")
    json.dumps([vars(drop) for drop in work.drops])
    json.dumps(work.records, allow_nan=False)
    if any(not np.array_equal(vector, loop.state.arrays[part]) for part, vector in state.items()):
        raise Broken("the global model changed")
    outcome.reasons.update(drop.reason for drop in work.drops)
    outcome.reasons["good"] += len(merger.keys)


# -- through a SuperLink ----------------------------------------------------------------------------------------------------
class Watched:
    """Flower's own Grid; counts what it raises at a pull."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.raised = grid, Counter()

    def __getattr__(self, name):
        return getattr(self.grid, name)

    def pull_messages(self, message_ids):
        try:
            return self.grid.pull_messages(message_ids)
        except Exception as error:
            self.raised[type(error).__name__] += 1
            raise


def serve(grid: Grid, folder: Path, rounds: int, clients: int = 56, timeout: float = 240.0) -> None:
    """A ServerApp's part: so many rounds of `clients` messages to the one node that is there; outcome.json has what came."""
    while not (ids := list(grid.get_node_ids())):
        time.sleep(0.1)
    watched, outcome, said = Watched(grid), Outcome(), ""
    try:
        for _ in range(rounds):
            loop = Loop(ids[:1] * clients, timeout)
            loop.configure_train(ROUND, to_record(loop.state.arrays), ConfigRecord(), watched)
            play(loop, watched, outcome)
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
        raise
    finally:
        outcome.raised = watched.raised
        (folder / "outcome.json").write_text(json.dumps(vars(outcome) | {"said": said}))


def attack(address: str, seed: int, ended: Callable[[], bool]) -> Counter[str]:
    """A SuperNode's part, over Flower's own connection: each message is answered with mutated bytes, until `ended`.

    Returns:
        how many replies were pushed whole ("pushed"), refused when pushed ("refused"), and held back because the SuperLink's
        own check of an object would refuse it ("withheld": one refused object keeps its whole message from being pulled).
    """
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    rng, count = random.Random(seed), Counter()
    with http_request_response(address, insecure=True, max_retries=1, max_wait_time=5.0) as connection:
        _, receive, send, _, _, pull, push, confirm = connection
        while not ended():
            found = receive()
            if found is None:
                time.sleep(0.05)
                continue
            message, tree = found
            run_id, message_id = message.metadata.run_id, message.metadata.message_id
            ids = [node.object_id for node in iterate_object_tree(tree)]
            contents = pull_objects(ids, partial(pull, run_id), initial_backoff=0.05)
            message = inflate_object_from_contents(message_id, contents)
            message.metadata.__dict__["_message_id"] = message_id
            confirm(run_id, message_id)
            plan = plan_from_content(message.content, len(SPEC.modules))
            lacks = bool(plan.delta) and rng.random() < 0.1
            while True:
                reply = Message(answer(plan, lacks), reply_to=message)
                root, objects, shape = mutated(rng, reply)
                try:
                    for content in objects.values():
                        validate_object_content(content)
                    break
                except UnexpectedObjectContentError:
                    count["withheld"] += 1
            reply.metadata.__dict__["_message_id"] = root
            try:
                wanted, session = send(reply, shape, 0.0)
                for object_id in objects:
                    if object_id in wanted:
                        push(run_id, session, object_id, objects[object_id])
                count["pushed"] += 1
            except Exception as error:
                count["refused"] += 1
                count[f"refused: {type(error).__name__}"] += 1
    return count


def mutated(rng: random.Random, reply: Message) -> tuple[str, Objects, ObjectTree]:
    """A reply's objects with changed bytes, under their new hashes: id of the message, contents, and the tree of ids."""
    tree = get_object_tree(reply)
    root, objects = deflated(reply)
    changed = dict(objects)
    for _ in range(rng.choice([0, 1, 1, 1, 2])):
        change_objects(rng, changed, root)
    for object_id, content in changed.items():  # as long as the head says: else the SuperLink refuses it
        head, end, body = content.partition(b"\x00")
        fields = head.split(b" ")
        if end and len(fields) == 3:
            changed[object_id] = b" ".join([*fields[:2], str(len(body)).encode()]) + end + body
    if root not in changed:
        changed[root] = objects[root]
    new_root, contents, new = rehashed({i: changed[i] for i in objects if i in changed}, root)

    def renamed(node: ObjectTree) -> ObjectTree:
        return ObjectTree(object_id=new[node.object_id], children=[renamed(c) for c in node.children if c.object_id in new])

    return new_root, contents, renamed(tree)


# -- the client -------------------------------------------------------------------------------------------------------------
LARGEST_DRAW = 10_000  # numbers of SPEC's largest part, generously


def fuzz_plans(count: int, seed: int) -> Outcome:
    """`count` mutated TRAIN messages, read as a client reads them.

    Raises:
        Broken: as `fuzz_replies`.
    """
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    rng, outcome, arrays = random.Random(seed), Outcome(), np.random.default_rng(2)
    good = []
    for plan in PLANS.values():
        plan = replace(plan, delta=(PIECE.digest,))
        values = {p: arrays.normal(size=SPEC.length(p, plan.mask)).astype(np.float32) for p in plan.carries - plan.drawn}
        plan = replace(plan, carries=frozenset(p for p in values if plan.mask.count or p == "head"))
        arrays_sent = Broadcast(SPEC).encode(plan, {p: values[p] for p in plan.carries})
        message = Message(plan_to_content(plan, arrays_sent, [PIECE]), 1, "train")
        message.metadata.__dict__.update(_created_at=1.7e9)
        good.append((message, *deflated(message)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(count):
            message, root, objects = rng.choice(good)
            began = time.thread_time()
            try:
                if rng.random() < 0.6:
                    content = copy_of(message.content)
                    for _ in range(rng.choice([1, 1, 2, 3])):
                        change_content(rng, content)
                else:
                    changed = dict(objects)
                    change_objects(rng, changed, root)
                    content = inflate_object_from_contents(root, changed).content
            except Exception as error:
                outcome.raised[type(error).__name__] += 1
                outcome.reasons["unreadable"] += 1
                continue
            outcome.reasons[_read_plan(content)] += 1
            outcome.slowest = max(outcome.slowest, time.thread_time() - began)
    if outcome.slowest > SECONDS:
        raise Broken(f"one message took {outcome.slowest:.2f} s")
    return outcome


def _read_plan(content: RecordDict) -> str:
    try:
        if sum(payload(content).values()) < 0:
            raise Broken("payload")
        plan = plan_from_content(content, len(SPEC.modules))
        check_plan(plan)
        read_pieces(content, SPEC)
        values = read_arrays(content, SPEC, plan.mask, plan.carries, plan.entries, plan.down, down=True)
        values |= draw(SPEC, plan.mask, plan.drawn, plan.draw_seed, plan.entries)
        if any(len(vector) > LARGEST_DRAW for vector in values.values()):
            raise Broken("the client drew more numbers than the model has")
    except Rejected as error:
        if error.reason not in PLAN_REASONS or len(str(error)) > 1000 or len(str(error).splitlines()) != 1:
            raise Broken(f"{error.reason}: {len(str(error))} characters") from None
        return error.reason
    except ValueError:  # a setting that only its user can judge, in words
        return "value"
    except Broken:
        raise
    except Exception as error:
        raise Broken(f"{type(error).__name__}: {error}") from error
    return "good"


def check_plan(plan: TrainPlan) -> None:
    """Types and ranges on which the client's code relies."""
    for name in ("server_round", "seed", "draw_seed", "entries"):
        value = getattr(plan, name)
        if type(value) is not int or not 0 <= value < 2**64:
            raise Broken(f"{name} = {value!r}")
    least = {"epochs": 1, "batch_size": 1, "steps": 0, "warmup_steps": 0, "batch_tokens": 0}
    for name in LocalTraining.model_fields:
        value = getattr(plan.train, name)
        if name in least:
            good = type(value) is int and value >= least[name]
        elif name == "dropout":
            good = type(value) is bool
        elif name == "loss":
            good = value in ("plain", "logit-adjusted")
        else:
            good = type(value) is float and 0 <= value < math.inf and (value > 0 or name != "e_lr_factor")
        if not good:
            raise Broken(f"{name} = {value!r}")
    if type(plan.train) is not LocalTraining or vars(plan.train).keys() != LocalTraining.model_fields.keys():
        raise Broken(f"training settings {sorted(vars(plan.train))}")
    if not {plan.down, plan.up} <= set(CODECS):
        raise Broken(f"formats {plan.down!r}, {plan.up!r}")
    if not all(type(share) is float and 0 <= share < math.inf for share in plan.class_shares):
        raise Broken(f"class shares {plan.class_shares}")
    if type(plan.evaluate) is not bool:
        raise Broken("evaluate")
    if not (plan.sent | plan.kept | plan.carries | plan.drawn | plan.feedback) <= set(PARTS):
        raise Broken("parts")
    if type(plan.run) is not str or len(plan.run) > MAX_NAME or bool(plan.run) != bool(plan.feedback | plan.kept):
        raise Broken(f"run {plan.run!r}")
    if not all(type(name) is str and len(name) <= MAX_NAME for name in plan.report):
        raise Broken(f"report {plan.report}")
    if len(plan.mask.ranks) != len(SPEC.modules) or not all(math.isfinite(scale) for scale in plan.scales):
        raise Broken("mask or scales")
    for value in (value for parameters in plan.terms.values() for value in parameters.values()):
        text = type(value) is str and 0 < len(value) <= MAX_NAME and value.isprintable()
        if not text and not (type(value) is float and math.isfinite(value)):
            raise Broken(f"a term's parameter {value!r}")
