"""Plans and updates as Flower records: round trips, every reason to refuse a reply, and the byte meter."""

from __future__ import annotations

import io
import math
import pickle
import tracemalloc
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedara_flwr.model.parts import BUILT_IN
from fedara_flwr.model.ranks import RankMask, pack_order, rank_order
from fedara_flwr.model.spec import ModelSpec, ModuleSpec, ParameterSpec
from fedara_flwr.strategies.allocation import Vote
from fedara_flwr.strategies.fedara import FedARA
from fedara_flwr.training import LocalTraining
from fedara_flwr.wire import PROTOCOL
from fedara_flwr.wire.arrays import MAX_NAME, Rejected, read_vector, to_record
from fedara_flwr.wire.meter import ByteMeter, payload
from fedara_flwr.wire.meter import counted as names_counted
from fedara_flwr.wire.plan import KEPT_SLOTS, TrainPlan, Update
from fedara_flwr.wire.records import (
    MAX_METRICS,
    REPORT_BYTES,
    REPORT_BYTES_PER_SLOT,
    plan_from_content,
    plan_to_content,
    update_from_content,
    update_to_content,
)

laws = settings(deadline=None, max_examples=150)
PARTS = tuple(BUILT_IN)
SPEC = ModelSpec(
    "f" * 64,
    (ModuleSpec("m0", 3, 2, 0), ModuleSpec("m1", 1, 4, 0), ModuleSpec("m2", 2, 2, 1)),
    (ParameterSpec("weight", (2, 2)), ParameterSpec("bias", (2,))),
    (ParameterSpec("embedding", (3, 1)), ParameterSpec("m0.weight", (3, 2))),
)
MASK = RankMask((2, 2, 2), np.array([1, 1, 0, 1, 0, 1], dtype=bool))  # alive: 2 in m0, 1 in m1, 1 in m2
PLAN = TrainPlan(
    server_round=7,
    seed=42,
    mask=MASK,
    scales=(2.0, 2.0, 2.0),
    train=LocalTraining(steps=8, epochs=1, batch_size=16, learning_rate=2e-3, e_lr_factor=1.0, head_learning_rate=1e-2),
    sent=frozenset(PARTS),
    carries=frozenset(PARTS),
)
VOTE, REPORTED = "slot-vote", "report.slot-vote"
BUDGET = 2
VOTING = replace(PLAN, terms={VOTE: {"budget": float(BUDGET), "importance": "gradient-product"}}, report=frozenset({VOTE}))
LOCAL = replace(VOTING, report=frozenset({VOTE, KEPT_SLOTS}))
NUMBERS = {"B": 36, "E": 16, "A": 40, "head": 24, "backbone": 36}  # bytes under MASK
MOST = 100  # examples that the node declared


def random_arrays(mask, parts=PARTS, seed=0):
    rng = np.random.default_rng(seed)
    return {part: rng.normal(size=SPEC.length(part, mask)).astype(np.float32) for part in parts}


def update_for(plan):
    """A good answer to `plan`: four slots of scores 0.1, 4, 3, 0.2 where it asks for votes, or which slots to keep."""
    mask, reports = plan.mask, {}
    if plan.report:
        ranks = rank_order(np.array([0.1, 4.0, 3.0, 0.2]))
        reports = {VOTE: pack_order(ranks)} if VOTE in plan.report else {}
        mask = mask.keep(ranks < BUDGET) if KEPT_SLOTS in plan.report else mask
    parts = [part for part in PARTS if part in plan.returns(mask)]  # the values must not depend on a set's order
    return Update(random_arrays(mask, parts), mask, 37, {"loss": 0.5, "seconds": 2.0}, reports)


READ = partial(FedARA.read_report, None)
"""What the server reads in a vote; it needs nothing of the method."""


def reply_to(plan):
    return update_to_content(update_for(plan), plan)


def same_arrays(left, right):
    return list(left) == list(right) and all(
        left[part].dtype == np.float32 and np.array_equal(left[part], right[part]) for part in left
    )


def refusal(caught):
    """The text of what was raised: its reason and the figures, in one line."""
    assert str(caught.value).startswith(caught.value.reason + ": ")
    assert len(str(caught.value)) < 600 and len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def reason(content, plan=PLAN):
    """Why `content` is refused as an answer to `plan`."""
    with pytest.raises(Rejected) as caught:
        update_from_content(content, SPEC, plan, MOST, read=READ)
    refusal(caught)
    return caught.value.reason


def refused(array, length):
    """Why `array` is refused as a vector of `length` numbers."""
    with pytest.raises(Rejected) as caught:
        read_vector(array, length, "B")
    assert len(str(caught.value)) < 600 and len(str(caught.value).splitlines()) == 1
    return caught.value.reason


def npy(array, version=None):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asanyarray(array), version=version, allow_pickle=True)
    return stream.getvalue()


def declared(data, length, dtype="float32", stype="numpy.ndarray"):
    """An Array that says it is float32 (length,), whatever its data is."""
    return Array(dtype, length if isinstance(length, tuple) else (length,), stype, data)


def header(descr="<f4", shape=(4,), fortran=False):
    """A version 1.0 npy header that claims what it is told to."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": fortran, "shape": shape})
    return stream.getvalue()


# -- the plan ------------------------------------------------------------
UNIFORM = PLAN
RAGGED = replace(PLAN, mask=RankMask((1, 3, 2), np.array([1, 0, 1, 1, 1, 0], dtype=bool)), scales=(24.0, 8.0, 12.0))
RAGGED = replace(RAGGED, train=RAGGED.train.model_copy(update={"steps": 0, "epochs": 3}))
WITH_TERMS = replace(
    PLAN,
    train=LocalTraining(
        steps=3,
        epochs=2,
        batch_size=5,
        batch_tokens=512,
        learning_rate=0.125,
        e_lr_factor=2.0,
        head_learning_rate=0.5,
        warmup_steps=2,
        clip_norm=1.5,
        dropout=True,
    ),
    terms={
        "prox": {"mu": 0.25, "power": 2.0},
        "sparse-mask": {},
        VOTE: {"budget": 3.0, "importance": "magnitude"},
    },
    report=frozenset({VOTE, KEPT_SLOTS}),
    evaluate=True,
    delta=("0" * 64, "ab" * 32),
    carries=frozenset({"B", "head"}),
    drawn=frozenset({"A"}),
    draw_seed=2**62,
    entries=4,
    sent=frozenset({"B", "head"}),
)
ALL_DEAD = replace(PLAN, mask=PLAN.mask.keep(np.zeros(4, dtype=bool)))
NO_SLOTS = replace(PLAN, mask=RankMask.full([0, 0, 0]), sent=frozenset({"head"}))
NOTHING_TRAINED = replace(PLAN, sent=frozenset(), evaluate=True)
PLANS = {
    "uniform": UNIFORM,
    "ragged": RAGGED,
    "terms": WITH_TERMS,
    "kept-slots-only": replace(PLAN, report=frozenset({KEPT_SLOTS})),
    "all-dead": ALL_DEAD,
    "no-slots": NO_SLOTS,
    "nothing-trained": NOTHING_TRAINED,
    "feedback": replace(PLAN, up="int4", feedback=frozenset({"B", "head"}), run="5" * 32),
    "kept": replace(PLAN, sent=frozenset({"A", "head"}), kept=frozenset({"B", "head"}), run="5" * 32),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_plan_round_trip(plan):
    content = plan_to_content(plan, random_arrays(plan.mask, plan.carries))
    assert plan_from_content(content, 3) == plan
    assert content.config_records["plan"].count_bytes() > 0


@st.composite
def plans(draw):
    ranks = draw(st.integers(0, 5).map(lambda r: (r,) * 3) | st.tuples(*[st.integers(0, 5)] * 3))
    bits = draw(st.lists(st.booleans(), min_size=sum(ranks), max_size=sum(ranks)))
    scale = st.floats(1e-3, 1e3)
    names = st.from_regex(r"[a-z]{1,8}(-[a-z]{1,4})?", fullmatch=True)
    texts = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=MAX_NAME)
    values = st.floats(allow_nan=False, allow_infinity=False) | texts
    training = {"learning_rate": draw(st.floats(1e-9, 10)), "dropout": draw(st.booleans()), "steps": draw(st.integers(0, 50))}
    return replace(
        PLAN,
        server_round=draw(st.integers(1, 10**6)),
        seed=draw(st.integers(0, 2**62 - 1)),
        mask=RankMask(ranks, np.array(bits, dtype=bool)),
        scales=draw(scale.map(lambda s: (s,) * 3) | st.tuples(scale, scale, scale)),
        train=PLAN.train.model_copy(update=training),
        sent=draw(st.frozensets(st.sampled_from(PARTS))),
        report=draw(st.frozensets(st.sampled_from([VOTE, KEPT_SLOTS]))),
        terms=draw(st.dictionaries(names, st.dictionaries(names, values, max_size=3), max_size=3)),
    )


@laws
@given(plans())
def test_any_plan_comes_back_and_is_counted(plan):
    content = plan_to_content(plan, random_arrays(plan.mask, plan.carries))
    assert plan_from_content(content, 3) == plan
    assert sum(payload(content).values()) == sum(record.count_bytes() for record in content.values())


def changed_plan(plan=RAGGED, drop=(), **values):
    """The records of `plan` with keys of its ConfigRecord replaced (underscores for hyphens) or dropped."""
    content = plan_to_content(plan, random_arrays(plan.mask))
    config = content.config_records["plan"]
    for key, value in values.items():
        config[key.replace("_", "-")] = value
    for key in drop:
        del config[key]
    return content


def plan_refusal(content, modules=3):
    """The line that says why a node refuses a plan."""
    with pytest.raises(Rejected) as caught:
        plan_from_content(content, modules)
    return refusal(caught)


def plan_reason(content, modules=3):
    return plan_refusal(content, modules).partition(":")[0]


def test_plan_without_its_record():
    content = changed_plan()
    del content["plan"]
    assert plan_reason(content) == "records"


@pytest.mark.parametrize("protocol", [PROTOCOL + 1, 0, str(PROTOCOL), [PROTOCOL]])
def test_plan_of_another_protocol(protocol):
    assert plan_reason(changed_plan(protocol=protocol)) == "protocol"


def test_plan_without_protocol():
    assert plan_reason(changed_plan(drop=["protocol"])) == "protocol"


@pytest.mark.parametrize("key", ["round", "seed", "evaluate", "entries", "draw-seed", "down", "ranks", "scales", "mask"])
def test_plan_that_lacks_a_key(key):
    assert plan_reason(changed_plan(drop=[key])) == "plan"


@pytest.mark.parametrize(
    "values",
    [
        {"mask": b""},
        {"mask": RAGGED.mask.to_bytes() + b"\x00"},
        {"mask": bytes([RAGGED.mask.to_bytes()[0] | 1])},
        {"mask": "x"},
        {"mask": 1},
        {"ranks": [1, 3, -2]},
        {"ranks": 6},
        {"ranks": ["a", "b", "c"]},
        {"scales": 1.0},
        {"scales": ["a", "b", "c"]},
        {"round": -1},
        {"round": 7.0},
        {"seed": True},
        {"evaluate": 1},
        {"entries": 2**64},
        {"run": "5"},
        {"feedback": "B"},
        {"feedback": "B", "run": ""},
        {"feedback": "B", "run": 5},
        {"feedback": "B", "run": "5" * 65},
        {"feedback": "B,X", "run": "5"},
        {"kept": "B"},
        {"kept": "B", "run": ""},
        {"kept": "B", "run": "5" * 65},
    ],
    ids=str,
)
def test_plan_with_a_wrong_value(values):
    assert plan_reason(changed_plan(**values)) == "plan"


def test_plan_for_fewer_modules_of_equal_ranks():
    """12 bits are 2 bytes, 8 bits are 1."""
    plan = replace(PLAN, mask=RankMask.full([4, 4, 4]))
    assert plan_reason(plan_to_content(plan, random_arrays(plan.mask)), modules=2) == "plan"


@pytest.mark.parametrize("modules", [2, 4])
def test_plan_for_another_number_of_modules(modules):
    """Ranks 1, 3, 2 are those of three modules."""
    assert plan_reason(changed_plan(), modules) == "plan"


@pytest.mark.parametrize("scales", [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
def test_plan_with_another_number_of_scales(scales):
    assert plan_reason(changed_plan(scales=scales)) == "plan"


def test_parts_that_travel():
    assert PLAN.returns(MASK) == {"B", "E", "A", "head", "backbone"}
    assert replace(PLAN, sent=frozenset({"B", "head"})).returns(MASK) == {"B", "head"}
    assert ALL_DEAD.returns(ALL_DEAD.mask) == PLAN.returns(ALL_DEAD.mask) == {"head", "backbone"}
    assert NOTHING_TRAINED.returns(MASK) == set()
    kept = PLANS["kept"]
    assert kept.returns(MASK) == {"A", "head"} and kept.trained == {"A", "B", "head"}


# -- the plan's parts, training settings and terms ------------------------------------------------------------
def test_an_undeclared_part_does_not_leave():
    with pytest.raises(ValueError, match="^part 'spine' is not declared, declared are B, E, A, head, backbone$"):
        to_record({"B": GOOD, "spine": GOOD})
    assert list(to_record({"head": GOOD, "A": GOOD, "B": GOOD})) == ["B", "A", "head"]
    with pytest.raises(ValueError, match="part 'spine' is not declared"):
        plan_to_content(PLAN, {"B": GOOD, "spine": GOOD})


@pytest.mark.parametrize("key", ["sent", "kept", "carries", "drawn", "feedback"])
@pytest.mark.parametrize(
    "names, unknown",
    [
        ("spine", "'spine'"),
        ("B,spine", "'spine'"),
        ("B,,A", "''"),
        ("", "''"),
        ("b", "'b'"),
        ("B ", "'B '"),
        ("B\nround 7: all is well", "'B\\\\nround 7: all is well'"),
        ("x" * 10_000, "'" + "x" * MAX_NAME + "'"),
    ],
    ids=lambda value: value[:24],
)
def test_plan_with_an_undeclared_part(key, names, unknown):
    said = plan_refusal(changed_plan(**{key: names, "run": "5"}))
    assert said.startswith("plan: ") and f"part {unknown} is not declared, declared are B, E, A, head, backbone" in said


TRAINING = {f"train.{name.replace('_', '-')}" for name in LocalTraining.model_fields}


def test_the_training_settings_are_the_plans_own_keys():
    config = plan_to_content(WITH_TERMS, random_arrays(WITH_TERMS.mask)).config_records["plan"]
    assert {key for key in config if key.startswith("train.")} == TRAINING
    assert (config["train.steps"], config["train.clip-norm"], config["train.dropout"]) == (3, 1.5, True)


@pytest.mark.parametrize("key", sorted(TRAINING))
def test_plan_that_lacks_a_training_setting(key):
    said = plan_refusal(changed_plan(drop=[key]))
    assert said.startswith("plan: ") and f"{key} is missing" in said


@pytest.mark.parametrize(
    "key, value",
    [
        ("steps", -1),
        ("steps", 1.5),
        ("steps", "6"),
        ("steps", True),
        ("steps", [6]),
        ("epochs", 0),
        ("batch-size", 0),
        ("batch-size", b"16"),
        ("batch-tokens", -1),
        ("learning-rate", -1e-3),
        ("learning-rate", math.nan),
        ("learning-rate", math.inf),
        ("learning-rate", "fast"),
        ("learning-rate", "x\nround 7: all is well"),
        ("learning-rate", "x" * 10_000),
        ("e-lr-factor", 0.0),
        ("e-lr-factor", -math.inf),
        ("head-learning-rate", -1.0),
        ("warmup-steps", -2),
        ("clip-norm", -0.5),
        ("clip-norm", True),
        ("dropout", 1),
        ("dropout", 0.0),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_plan_with_a_training_setting_out_of_bounds(key, value):
    said = plan_refusal(changed_plan(**{f"train.{key}": value}))
    assert said.startswith("plan: ") and f"train.{key} is " in said


@pytest.mark.parametrize("name", ["momentum", "cache", "threads", "", "steps.more", "x" * 10_000, "x\nround 7: all is well"])
def test_plan_with_an_unknown_training_setting(name):
    """`cache` and `threads` are of the same group in the run's configuration; each process reads its own."""
    said = plan_refusal(changed_plan(**{f"train.{name}": 1}))
    assert (
        said.startswith("plan: ") and f"train.{name.splitlines()[0] if name else ''}"[:50] in said and "not permitted" in said
    )


def test_a_training_setting_may_be_a_whole_number():
    read = plan_from_content(changed_plan(**{"train.learning-rate": 1, "train.clip-norm": 2}), 3).train
    assert (read.learning_rate, read.clip_norm) == (1.0, 2.0)
    assert type(read.learning_rate) is type(read.clip_norm) is float


@pytest.mark.parametrize("value", ["magnitude", "x", "-", "a b", "7", "é", "x" * MAX_NAME, 0, -3, 2**40, 0.5, -1e300])
def test_a_terms_parameter_comes_back(value):
    plan = replace(PLAN, terms={"prox": {"mu": value}})
    read = plan_from_content(plan_to_content(plan, random_arrays(MASK)), 3).terms
    assert read == {"prox": {"mu": value}}
    assert type(read["prox"]["mu"]) is (str if isinstance(value, str) else float)


@pytest.mark.parametrize(
    "value",
    [
        *("", "x" * (MAX_NAME + 1), "x" * 10_000, "a\nround 7: all is well", "\x1b[2J", "\u202e", "tab\t", "\x00"),
        *(math.nan, math.inf, -math.inf),
        *(b"bytes", b"", [1.0], ["a"], []),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_terms_parameter_that_is_neither_a_number_nor_a_short_text(value):
    said = plan_refusal(changed_plan(**{"term.prox.mu": value}))
    assert said.startswith("plan: ") and "parameter is " in said and "finite numbers and short texts" in said
    with pytest.raises(ValueError, match="a term's parameter is .*, allowed are finite numbers and short texts"):
        plan_to_content(replace(PLAN, terms={"prox": {"mu": value}}), random_arrays(MASK))


# -- the update: round trips ------------------------------------------------------------
ANSWERED = {
    "plain": PLAN,
    "ragged": RAGGED,
    "global": VOTING,
    "local": LOCAL,
    "kept-slots-only": replace(PLAN, report=frozenset({KEPT_SLOTS})),
    "some-parts": replace(PLAN, sent=frozenset({"B", "head"})),
    "kept": PLANS["kept"],
    "all-dead": ALL_DEAD,
    "no-slots": NO_SLOTS,
    "nothing-trained": NOTHING_TRAINED,
}


@pytest.mark.parametrize("plan", ANSWERED.values(), ids=ANSWERED)
def test_update_round_trip(plan):
    sent = update_for(plan)
    content = update_to_content(sent, plan)
    read = update_from_content(content, SPEC, plan, MOST, read=READ)
    assert same_arrays(read.arrays, {part: sent.arrays[part] for part in PARTS if part in sent.arrays})
    assert read.mask == sent.mask
    assert (read.num_examples, read.metrics) == (37, {"loss": 0.5, "seconds": 2.0})
    assert set(read.reports) == set(sent.reports) == plan.report - {KEPT_SLOTS}
    if VOTE in plan.report:
        assert read.reports[VOTE].tolist() == [3, 0, 1, 2]
        assert update_from_content(content, SPEC, plan, MOST).reports == sent.reports  # as they travel


def test_what_stays_with_the_node_does_not_travel():
    plan = PLANS["kept"]
    sent = replace(update_for(plan), stays=random_arrays(plan.mask, ("B", "head"), seed=5))
    content = update_to_content(sent, plan)
    assert set(content.array_records["arrays"]) == {"A", "head"}
    assert content == reply_to(plan)
    assert update_from_content(content, SPEC, plan, MOST).stays == {}
    content.array_records["arrays"]["B"] = Array(sent.stays["B"])
    assert reason(content, plan) == "parts"


def test_local_upload_holds_the_votes_alone():
    """Scores 0.1, 4, 3, 0.2 and budget 2: slots (0,1) and (1,1) stay, B has 3 + 1 numbers instead of 3 + 3 + 1 + 2."""
    read = update_from_content(reply_to(LOCAL), SPEC, LOCAL, MOST)
    assert read.mask.bits.tolist() == [False, True, False, True, False, False]
    assert {part: len(vector) for part, vector in read.arrays.items()} == {"B": 4, "E": 2, "A": 6, "head": 6, "backbone": 9}
    full = update_from_content(reply_to(VOTING), SPEC, VOTING, MOST)
    assert {part: len(vector) for part, vector in full.arrays.items()} == {"B": 9, "E": 4, "A": 10, "head": 6, "backbone": 9}


def test_vote_that_was_not_asked_for_is_ignored():
    content = reply_to(PLAN)
    content.config_records["reply"][REPORTED] = b"garbage"
    content.config_records["reply"][KEPT_SLOTS] = b"\x60"
    read = update_from_content(content, SPEC, PLAN, MOST, read=READ)
    assert read.reports == {} and read.mask == MASK


@pytest.mark.parametrize("examples", [1, MOST])
def test_num_examples_at_the_limits(examples):
    content = reply_to(PLAN)
    content.metric_records["metrics"]["num-examples"] = examples
    assert update_from_content(content, SPEC, PLAN, MOST).num_examples == examples


def test_as_many_and_as_long_metrics_as_allowed():
    content = reply_to(PLAN)
    metrics = content.metric_records["metrics"]
    for number in range(MAX_METRICS - len(metrics)):
        metrics[f"{number:02d}".ljust(MAX_NAME, "x")] = 1.0
    assert len(update_from_content(content, SPEC, PLAN, MOST).metrics) == MAX_METRICS - 1


# -- the update: every reason to refuse it ------------------------------------------------------------
@pytest.mark.parametrize("name", ["arrays", "reply", "metrics"])
def test_missing_record(name):
    content = reply_to(PLAN)
    del content[name]
    assert reason(content) == "records"


@pytest.mark.parametrize("name", ["arrays", "reply", "metrics"])
def test_renamed_record(name):
    content = reply_to(PLAN)
    content["other"] = content[name]
    del content[name]
    assert reason(content) == "records"


@pytest.mark.parametrize(
    "record", [ArrayRecord(), ConfigRecord({"a": 1}), MetricRecord({"a": 1})], ids=lambda r: type(r).__name__
)
def test_extra_record(record):
    content = reply_to(PLAN)
    content["extra"] = record
    assert reason(content) == "records"


def test_empty_reply():
    assert reason(RecordDict()) == "records"


@pytest.mark.parametrize("part", PARTS)
def test_missing_part(part):
    content = reply_to(PLAN)
    del content.array_records["arrays"][part]
    assert reason(content) == "parts"


@pytest.mark.parametrize("name", ["spine", "b", "B "])
def test_extra_part(name):
    content = reply_to(PLAN)
    content.array_records["arrays"][name] = Array(np.zeros(3, dtype=np.float32))
    assert reason(content) == "parts"


def test_part_that_was_not_to_be_trained():
    assert reason(reply_to(PLAN), replace(PLAN, sent=frozenset({"B", "head"}))) == "parts"


def test_slot_parts_although_no_slot_lives():
    content = reply_to(ALL_DEAD)
    content.array_records["arrays"]["E"] = Array(np.zeros(0, dtype=np.float32))
    assert reason(content, ALL_DEAD) == "parts"


def test_dead_slots_are_sent():
    """Six slots where the plan has four: packed under the full mask."""
    everything = replace(PLAN, mask=RankMask.full([2, 2, 2]))
    assert reason(reply_to(everything)) == "shape"


def test_other_slots_of_the_same_number_are_sent():
    """Four slots like the plan's, but (2,0) instead of (0,0): B has 3 + 1 + 2 + 2 = 8 numbers, not 9."""
    other = replace(PLAN, mask=RankMask((2, 2, 2), np.array([0, 1, 0, 1, 1, 1], dtype=bool)))
    assert reason(reply_to(other)) == "shape"


def test_slots_are_sent_that_are_not_said_to_be_kept():
    content = reply_to(VOTING)
    content.config_records["reply"][KEPT_SLOTS] = reply_to(LOCAL).config_records["reply"][KEPT_SLOTS]
    assert reason(content, LOCAL) == "shape"


def test_slots_are_left_out_although_all_were_asked_for():
    assert reason(reply_to(LOCAL), VOTING) == "shape"


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_checked(part):
    content = reply_to(PLAN)
    wrong = np.zeros(SPEC.length(part, MASK) + 1, dtype=np.float32)
    content.array_records["arrays"][part] = Array(wrong)
    assert reason(content) == "shape"


@pytest.mark.parametrize("examples", [0, -1, -MOST, 37.0, 0.5, MOST + 1, 2**62, math.nan, [37], None, True])
def test_num_examples(examples):
    """A list is refused as a metric; Flower lets no bool into a MetricRecord, so it is put there behind its back."""
    content = reply_to(PLAN)
    metrics = content.metric_records["metrics"]
    if examples is None:
        del metrics["num-examples"]
    elif examples is True:
        metrics.__dict__["_data"]["num-examples"] = True
    else:
        metrics["num-examples"] = examples
    assert reason(content) == ("metrics" if examples == [37] else "num-examples")


@pytest.mark.parametrize("value", [[0.5], [], [1, 2]])
def test_list_metric(value):
    content = reply_to(PLAN)
    content.metric_records["metrics"]["loss"] = value
    assert reason(content) == "metrics"


def test_too_many_metrics():
    content = reply_to(PLAN)
    content.metric_records["metrics"].update({f"m{number}": 1.0 for number in range(MAX_METRICS)})
    assert reason(content) == "metrics"


def test_too_long_metric_name():
    content = reply_to(PLAN)
    content.metric_records["metrics"]["x" * (MAX_NAME + 1)] = 1.0
    assert reason(content) == "metrics"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_metric_that_is_not_finite(value):
    content = reply_to(PLAN)
    content.metric_records["metrics"]["loss"] = value
    assert reason(content) == "not-finite"


@pytest.mark.parametrize("number", [6, 8, 0, -7, 7.5, "7", [7], "x" * 1000])
def test_answer_to_another_round(number):
    content = reply_to(PLAN)
    content.config_records["reply"]["round"] = number
    assert reason(content) == "round"


def test_round_cannot_forge_a_log_line():
    content = reply_to(PLAN)
    content.config_records["reply"]["round"] = "6\nround 7: all is well"
    assert reason(content) == "round"


def test_answer_without_round():
    content = reply_to(PLAN)
    del content.config_records["reply"]["round"]
    assert reason(content) == "round"


@pytest.mark.parametrize("protocol", [PROTOCOL + 1, 0, "1", [1], "x" * 1000, None])
def test_answer_in_another_protocol(protocol):
    content = reply_to(PLAN)
    if protocol is None:
        del content.config_records["reply"]["protocol"]
    else:
        content.config_records["reply"]["protocol"] = protocol
    assert reason(content) == "protocol"


# -- votes: four alive slots, two of them kept; the good answer is ranks 3 0 1 2 and 0110 ---------------------------------
def spoilt_reply(key, value):
    """The good answer to LOCAL with one of its reports replaced; None takes it away, a tuple are ranks."""
    content = reply_to(LOCAL)
    config = content.config_records["reply"]
    assert (config[KEPT_SLOTS], config[REPORTED]) == (b"\x60", np.array([3, 0, 1, 2], dtype="<u2").tobytes())
    if value is None:
        del config[key]
    else:
        config[key] = np.array(value, dtype="<u2").tobytes() if isinstance(value, tuple) else value
    return content


@pytest.mark.parametrize("plan", [LOCAL, ANSWERED["kept-slots-only"]], ids=["with-vote", "alone"])
@pytest.mark.parametrize(
    "bits, why",
    [
        (None, "report"),
        ("0110", "report"),
        (6, "report"),
        ([b"\x60"], "report"),
        (b"", "report"),
        (b"\x60\x00", "report"),
        (b"\x61", "report"),
        (b"\x68", "report"),
        (b"\x00", "report"),
        (b"\x40", "shape"),
        (b"\x70", "shape"),
        (b"\xf0", "shape"),
    ],
    ids=["missing", "str", "int", "list", "empty", "long", "padding", "padding-2", "none", "one", "three", "all"],
)
def test_bad_kept_slots(bits, why, plan):
    """No bits of four slots, or none of them set; or others than the arrays hold."""
    assert reason(spoilt_reply(KEPT_SLOTS, bits), plan) == why


@pytest.mark.parametrize("plan", [VOTING, LOCAL], ids=["global", "local"])
@pytest.mark.parametrize(
    "ranks",
    [
        None,
        "3012",
        3012,
        True,
        [b"\x03\x00\x00\x00\x01\x00\x02\x00"],
        b"",
        (3, 0, 1),
        (3, 0, 1, 2, 4),
        b"\x03\x00\x00\x00\x01\x00\x02",
        b"\x03\x00\x00\x00\x01\x00\x02\x00\x00",
        (3, 0, 1, 1),
        (4, 0, 1, 2),
        (4, 3, 2, 1),
        (3, 0, 1, 65535),
        (0, 0, 0, 0),
        bytes(10**6),
    ],
    ids=lambda ranks: str(ranks)[:40],
)
def test_bad_slot_ranks(ranks, plan):
    """No bytes, another size, no permutation."""
    content = spoilt_reply(REPORTED, ranks)
    if plan is VOTING:
        content["arrays"] = reply_to(VOTING)["arrays"]
    assert reason(content, plan) == "report"


def test_swapped_byte_order_is_no_permutation():
    assert reason(spoilt_reply(REPORTED, np.array([3, 0, 1, 2], dtype=">u2").tobytes()), LOCAL) == "report"


@pytest.mark.parametrize("ranks", [(3, 0, 1, 2), (0, 1, 2, 3), (1, 3, 0, 2)])
def test_any_permutation_is_a_vote(ranks):
    """Whatever slots the client keeps: what it votes for are the first of its ranks, and nothing beside them."""
    read = update_from_content(spoilt_reply(REPORTED, ranks), SPEC, LOCAL, MOST, read=READ)
    assert read.reports[VOTE].tolist() == list(ranks) and read.mask.bits.tolist() == [0, 1, 0, 1, 0, 0]
    assert Vote(read.reports[VOTE], BUDGET).keep.tolist() == [rank < BUDGET for rank in ranks]


def test_budget_above_the_alive_slots_means_all_of_them():
    read = update_from_content(reply_to(VOTING), SPEC, VOTING, MOST, read=READ)
    assert Vote(read.reports[VOTE], 9).keep.tolist() == [True] * 4


@pytest.mark.parametrize("more", [0, 1])
def test_a_report_has_a_bound_that_grows_with_the_slots(more):
    """What a term may say is its method's to judge, but not without end: nothing reads what is longer."""
    content, asked = reply_to(VOTING), []
    report = bytes(REPORT_BYTES + REPORT_BYTES_PER_SLOT * 4 + more)
    content.config_records["reply"][REPORTED] = report
    if more:
        with pytest.raises(Rejected) as caught:
            update_from_content(content, SPEC, VOTING, MOST, read=lambda *args: asked.append(args))
        assert refusal(caught).startswith("report: of term 'slot-vote'") and not asked
    else:
        assert update_from_content(content, SPEC, VOTING, MOST).reports == {VOTE: report}


def test_every_report_is_read_with_its_plan_and_its_name():
    plan = replace(PLAN, report=frozenset({"b", "a", KEPT_SLOTS}))
    update = replace(update_for(plan), reports={"b": b"of b", "a": b"of a"})
    content, seen = update_to_content(update, plan), []
    read = update_from_content(content, SPEC, plan, MOST, read=lambda *args: seen.append(args) or len(seen))
    assert seen == [(plan, "a", b"of a"), (plan, "b", b"of b")] and read.reports == {"a": 1, "b": 2}
    for name in ("a", "b"):
        less = update_to_content(update, plan)
        del less.config_records["reply"]["report." + name]
        assert reason(less, plan) == "report"


# -- vectors ------------------------------------------------------------
GOOD = np.array([1.5, -2.0, 0.0, 3.25], dtype=np.float32)


def test_vector_round_trip():
    assert np.array_equal(read_vector(Array(GOOD), 4, "B"), GOOD)
    assert read_vector(Array(np.zeros(0, dtype=np.float32)), 0, "B").shape == (0,)


def test_extreme_numbers_are_fine():
    edge = np.array([np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal, -0.0], dtype=np.float32)
    assert read_vector(Array(edge), 3, "B").tobytes() == edge.tobytes()


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "uint32", "int8", "bool", "complex64", "S4", ">f4"])
def test_wrong_dtype(dtype):
    array = GOOD.astype(dtype)
    assert refused(Array(array), 4) == "shape"
    assert refused(declared(npy(array), 4), 4) == "shape"


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (5,), (1, 4), (4, 1), (2, 2), (1, 1, 4), (0, 4)])
def test_wrong_shape(shape):
    """Neither what numpy would broadcast to (4,), nor what it would reshape."""
    array = np.resize(GOOD, shape)
    assert refused(Array(array), 4) == "shape"
    assert refused(declared(npy(array), 4), 4) == "shape"
    assert refused(declared(npy(GOOD), shape), 4) == "shape"


@pytest.mark.parametrize("shape", [(-4,), (2**62,), (4, 2**62), (2**70,), (4,) * 1000])
def test_impossible_declared_shape(shape):
    assert refused(declared(npy(GOOD), shape), 4) == "shape"


@pytest.mark.parametrize(
    "claim",
    [{"shape": (5,)}, {"shape": (4, 1)}, {"shape": ()}, {"descr": "<f8"}, {"descr": "<i4"}, {"fortran": True}, {"descr": "|O"}],
    ids=str,
)
def test_header_disagrees_with_the_declared_shape(claim):
    assert refused(declared(header(**claim) + GOOD.tobytes(), 4), 4) == "shape"


@pytest.mark.parametrize("length", [2**31, 2**40, 2**62, 10**30])
@pytest.mark.parametrize("declares_it_too", [False, True])
def test_huge_claim_is_refused_before_allocation(length, declares_it_too):
    array = declared(header(shape=(length,)) + GOOD.tobytes(), length if declares_it_too else 4)
    refused(array, 4)  # imports and caches are not what is measured
    tracemalloc.start()
    try:
        why = refused(array, 4)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert why == "shape"
    assert peak < 2**20


def test_nothing_is_allocated_for_numbers_that_did_not_come():
    """Even where the header says what the server expects: 2^31 numbers, with the data of four."""
    array = declared(header(shape=(2**31,)) + GOOD.tobytes(), 2**31)
    tracemalloc.start()
    try:
        why = refused(array, 2**31)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert why == "format"
    assert peak < 2**20


@pytest.mark.parametrize("size", [0, 1, 5, 6, 8, 9, 10, 50, 127, 128, 129, 132, 140, 143])
def test_truncated_data(size):
    """128 bytes of header and 16 of data."""
    data = npy(GOOD)
    assert len(data) == 144
    assert refused(declared(data[:size], 4), 4) == "format"


@pytest.mark.parametrize("more", [b"\x00", b"\x00" * 4, b"\x00" * 16])
def test_data_after_the_last_number(more):
    assert refused(declared(npy(GOOD) + more, 4), 4) == "format"


def test_data_without_header():
    assert refused(declared(GOOD.tobytes(), 4), 4) == "format"
    assert refused(declared(b"\x00" * 144, 4), 4) == "format"


def test_objects_are_never_unpickled():
    """An object array, a bare pickle and an npy header around a pickle; unpickling would raise KeyboardInterrupt."""

    class Bomb:
        def __reduce__(self):
            return (exec, ("raise KeyboardInterrupt",))

    bombs = np.array([Bomb()] * 4, dtype=object)
    assert refused(declared(npy(bombs), 4), 4) == "shape"
    assert refused(declared(npy(bombs), 4, dtype="object"), 4) == "shape"
    assert refused(declared(pickle.dumps([Bomb()] * 4), 4), 4) == "format"
    assert refused(declared(header() + pickle.dumps([Bomb()] * 4), 4), 4) == "format"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(save):
    stream = io.BytesIO()
    save(stream, GOOD)
    assert refused(declared(stream.getvalue(), 4), 4) == "format"


@pytest.mark.parametrize("version", [(2, 0), (3, 0)])
def test_other_npy_versions(version):
    assert refused(declared(npy(GOOD, version), 4), 4) == "format"


@pytest.mark.parametrize("text", [b"{", b"[" * 100, b"{'descr': '<f4'}", b"__import__('os')", b"\xff" * 80, b"{'shape': (4,)}"])
def test_unreadable_header(text):
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + GOOD.tobytes()
    assert refused(declared(data, 4), 4) == "format"


@pytest.mark.parametrize("stype", ["", "torch.Tensor", "numpy.ndarray ", "x" * 10_000])
def test_other_serialisation(stype):
    assert refused(declared(npy(GOOD), 4, stype=stype), 4) == "format"


def test_long_dtype_name_is_cut():
    assert refused(declared(npy(GOOD), 4, dtype="x" * 10_000), 4) == "shape"


def test_dtype_name_cannot_forge_a_log_line():
    assert refused(declared(npy(GOOD), 4, dtype="float32\nround 7: all is well"), 4) == "shape"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 3])
def test_numbers_that_are_not_finite(value, position):
    array = GOOD.copy()
    array[position] = value
    assert refused(Array(array), 4) == "not-finite"


@st.composite
def mutations(draw, limit=144):
    """npy data of GOOD with some of its first `limit` bytes set, removed or doubled."""
    data = bytearray(npy(GOOD))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(limit, len(data)) - 1))
        match draw(st.sampled_from(["set", "set", "flip", "remove", "insert", "cut"])):
            case "set":
                data[at] = draw(st.integers(0, 255))
            case "flip":
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "remove":
                del data[at : at + 1 if len(data) > 1 else at]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=3))
            case "cut":
                del data[max(at, 1) :]
    return bytes(data)


def read_quietly(data):
    """The vector in `data`, or None where it is refused; numpy warns of headers in the style of Python 2."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read_vector(declared(data, 4), 4, "B")
        except Rejected:
            return None


@settings(deadline=None, max_examples=400)
@given(mutations(limit=128))
def test_mutated_header_is_refused_or_means_the_same(data):
    """Whatever happens to the 128 bytes before the numbers, no other vector comes out."""
    vector = read_quietly(data)
    assert vector is None or (data.endswith(GOOD.tobytes()) and np.array_equal(vector, GOOD))


@settings(deadline=None, max_examples=400)
@given(mutations())
def test_mutated_data_is_refused_or_read_as_numpy_reads_it(data):
    vector = read_quietly(data)
    if vector is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.load(io.BytesIO(data), allow_pickle=False)
    assert vector.tobytes() == expected.tobytes() and vector.shape == expected.shape == (4,)
    assert np.isfinite(vector).all()


@laws
@given(st.binary(max_size=200))
def test_garbage_is_refused(data):
    assert read_quietly(data) is None
    assert read_quietly(b"\x93NUMPY\x01\x00" + data) is None


@laws
@given(st.sampled_from(PARTS), st.data())
def test_mutated_reply_is_refused_or_read(part, data):
    """One byte of one part: the reply is dropped, or its other parts are as they were sent and all is finite."""
    content = reply_to(VOTING)
    record = content.array_records["arrays"]
    raw = bytearray(record[part].data)
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    record[part] = Array("float32", record[part].shape, "numpy.ndarray", bytes(raw))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read = update_from_content(content, SPEC, VOTING, MOST, read=READ)
        except Rejected as error:
            assert error.reason in {"format", "shape", "not-finite", "range"}
            return
    sent = update_for(VOTING).arrays
    assert read.arrays[part].tobytes() == bytes(raw)[-4 * len(sent[part]) :]
    assert all(np.array_equal(read.arrays[other], sent[other]) for other in PARTS if other != part)
    assert all(np.isfinite(vector).all() for vector in read.arrays.values())


@pytest.mark.parametrize("value, refused", [(1e12, False), (1.1e12, True), (-3e38, True)])
def test_numbers_whose_products_would_overflow(value, refused):
    update = update_for(PLAN)
    update.arrays["A"][0] = value
    content = update_to_content(update, PLAN)
    if refused:
        assert reason(content) == "range"
    else:
        assert update_from_content(content, SPEC, PLAN, MOST).arrays["A"][0] == np.float32(value)


# -- the meter ------------------------------------------------------------
def counted(content):
    return sum(record.count_bytes() for record in content.values())


def test_payload_of_a_plan_by_hand():
    """Alive: 2, 1, 1 slots. B 4·(2·3 + 1·1 + 1·2) = 36, E 4·4 = 16, A 4·(2·2 + 1·4 + 1·2) = 40, head 4·6 = 24; mask 6 bits."""
    content = plan_to_content(PLAN, random_arrays(MASK))
    parts = payload(content)
    assert {part: parts[part] for part in (*PARTS, "mask")} == {**NUMBERS, "mask": 1}
    assert sum(parts.values()) == counted(content)


def test_payload_of_an_update_by_hand():
    """As above, and 4 ranks of 2 bytes; of two slots half as much, and which they are in 4 bits."""
    content = reply_to(VOTING)
    parts = payload(content)
    assert {part: parts[part] for part in (*PARTS, "mask")} == {**NUMBERS, "mask": 8}
    assert sum(parts.values()) == counted(content)
    content = reply_to(LOCAL)
    parts = payload(content)
    few = {"B": 4 * (3 + 1), "E": 4 * 2, "A": 4 * (2 + 4), "mask": 8 + 1}
    assert {part: parts[part] for part in (*PARTS, "mask")} == NUMBERS | few
    assert sum(parts.values()) == counted(content)


@laws
@given(st.lists(st.booleans(), min_size=15, max_size=15))
def test_payload_by_the_formula(bits):
    """4 bytes a number: Σ alive·d_out, Σ alive, Σ alive·d_in and the head; 15 slots are 2 bytes of mask."""
    plan = replace(PLAN, mask=RankMask((5, 5, 5), np.array(bits, dtype=bool)))
    content = plan_to_content(plan, random_arrays(plan.mask))
    alive = [sum(bits[:5]), sum(bits[5:10]), sum(bits[10:])]
    parts = payload(content)
    assert parts["B"] == 4 * (3 * alive[0] + 1 * alive[1] + 2 * alive[2])
    assert parts["E"] == 4 * sum(alive)
    assert parts["A"] == 4 * (2 * alive[0] + 4 * alive[1] + 2 * alive[2])
    assert (parts["head"], parts["mask"]) == (4 * 6, 2)
    assert sum(parts.values()) == counted(content)
    assert all(size >= 0 for size in parts.values())


@pytest.mark.parametrize("name, blocks, per_slot", [("DistilBERT", 6, 82_980), ("BERT-base", 12, 165_960)])
def test_sizes_of_real_models(name, blocks, per_slot):
    """By hand: one slot on all six layers of a block, 4·(768 + 768 + 1) + 2·(768 + 3072 + 1) = 13,830; 12 slots, fp32."""
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    modules = tuple(ModuleSpec(f"{b}.{i}", *shape, b) for b in range(blocks) for i, shape in enumerate(shapes))
    spec = ModelSpec("f" * 64, modules, ())
    mask = RankMask.full([12] * len(modules))
    arrays = {part: np.zeros(spec.length(part, mask), dtype=np.float32) for part in ("B", "E", "A")}
    parts = payload(plan_to_content(replace(PLAN, mask=mask, scales=(2.0,) * len(modules)), arrays))
    assert parts["B"] + parts["E"] + parts["A"] == 12 * 4 * per_slot
    assert parts["mask"] == 12 * len(modules) // 8


def test_payload_does_not_believe_a_header():
    """A reply that claims 2^62 numbers is charged for the bytes that came, and never less than nothing."""
    for shape in ((2**62,), (-5,), (2**40, 2**40), ()):
        array = Array("float32", shape, "numpy.ndarray", b"12345")
        parts = payload(RecordDict({"arrays": ArrayRecord({"B": array})}))
        assert 0 <= parts["B"] <= 5
        assert sum(parts.values()) == 5 + len("B")


def test_unknown_parts_are_other_bytes():
    """128 bytes of header, 16 of data, and the name."""
    parts = payload(RecordDict({"arrays": ArrayRecord({"spine": Array(GOOD)})}))
    assert {part: size for part, size in parts.items() if size} == {"other": 128 + 16 + len("spine")}


@pytest.mark.parametrize("value", ["", b"", [], [""], [b""]], ids=repr)
def test_empty_values_in_a_reply_are_counted(value):
    """Flower's `count_bytes()` raises on some of them, and a client may send what it likes: one reply must not end the run."""
    content = reply_to(PLAN)
    before = payload(content)
    content.config_records["reply"]["junk"] = value
    after = payload(content)
    assert all(after[part] == before[part] for part in (*PARTS, "mask"))
    assert after["other"] >= before["other"]


def test_meter_adds_up_rounds_and_directions():
    meter, down, up = ByteMeter(), plan_to_content(VOTING, random_arrays(MASK)), reply_to(VOTING)
    for _ in range(3):
        assert meter.count("down", down) == payload(down)
    meter.count("up", up)
    first = meter.take_round()
    assert set(first) == {f"{d}.{part}" for d in ("down", "up") for part in names_counted()} | {"down", "up"}
    assert (first["down"], first["up"]) == (3 * counted(down), counted(up))
    assert (first["down.B"], first["up.B"], first["down.mask"], first["up.mask"]) == (108, 36, 3, 8)
    meter.count("up", up)
    second = meter.take_round()
    assert (second["down"], second["up"]) == (0, counted(up))
    assert sum(meter.total.values()) == 3 * counted(down) + 2 * counted(up)


def test_meter_goes_on_from_a_saved_total():
    meter = ByteMeter(ByteMeter().total)
    meter.count("up", reply_to(PLAN))
    saved = dict(meter.total)
    again = ByteMeter(meter.total)
    again.count("up", reply_to(PLAN))
    assert meter.total == saved
    assert again.total == {key: 2 * size for key, size in saved.items()}
    assert again.take_round()["up"] == counted(reply_to(PLAN))
