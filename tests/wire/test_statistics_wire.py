"""Sums of features as Flower records: round trips in every format, every reason to refuse a reply, bytes."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest
from data_helper import statistics_of
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedara_flwr.model.statistics import Statistics, upper
from fedara_flwr.wire.arrays import MAX_DETAIL, Rejected
from fedara_flwr.wire.codec import CODECS
from fedara_flwr.wire.meter import ByteMeter, payload
from fedara_flwr.wire.records import MAX_EXAMPLES
from fedara_flwr.wire.statistics import LARGEST, format_of_sums, from_content, question, refusal, to_content

laws = settings(deadline=None, max_examples=60)
FORMS = sorted(CODECS)
COUNT, WIDTH, ROWS = 4, 5, 30
TRIANGLE = WIDTH * (WIDTH + 1) // 2
SECONDS = 0.5


def statistics(seed=0, rows=ROWS, scatter=True, width=WIDTH, scale=1.0):
    """Class 1 has no row."""
    rng = np.random.default_rng(seed)
    classes = np.array([0, 2, 3])[np.arange(rows) % 3]
    return statistics_of(scale * (rng.normal(size=(rows, width)) + classes[:, None]), classes, COUNT, scatter)


TOLD = statistics()


def written(one=TOLD, form="float32", seed=0):
    return to_content(one, form, np.random.default_rng(seed), {"num-examples": int(one.rows)})


def read(content, form="float32", scatter=True, most=ROWS, classes=COUNT, width=WIDTH):
    began = time.perf_counter()
    try:
        return from_content(content, classes, width, form, scatter, most)
    finally:
        assert time.perf_counter() - began < SECONDS


def refused(content, **options):
    """Why `content` is refused; all that is said is one short line that can be shown."""
    with pytest.raises(Rejected) as caught:
        read(content, **options)
    said = str(caught.value)
    assert said.startswith(caught.value.reason + ": ") and said.isprintable() and len(said) <= MAX_DETAIL + 40
    return caught.value.reason


def changed(form="float32", drop=(), one=TOLD, **arrays):
    """A good reply with arrays of its record replaced, added or dropped."""
    content = written(one, form)
    record = content.array_records["sums"]
    for name, array in arrays.items():
        record[name] = array if isinstance(array, Array) else Array(np.ascontiguousarray(array))
    for name in drop:
        del record[name]
    return content


def means():
    return TOLD.means[TOLD.counts > 0].ravel().astype("<f4")


def triangle():
    return upper(TOLD.scatter).astype("<f4")


def at(values, place, value):
    values = values.copy()
    values[place] = value
    return values


# -- there and back -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scatter", [True, False])
def test_float32_comes_back_bit_for_bit(scatter):
    one = statistics(scatter=scatter)
    found = read(written(one), scatter=scatter)
    assert np.array_equal(found.counts, one.counts) and found.counts.dtype == np.float64
    assert np.array_equal(found.means, one.means.astype(np.float32)) and not found.means[1].any()
    assert found.freedom == one.freedom
    if scatter:
        assert np.array_equal(found.scatter, one.scatter.astype(np.float32)) and found.scatter.dtype == np.float64
        assert np.array_equal(found.scatter, found.scatter.T)
    else:
        assert found.scatter is None


STEP = {"float32": 2.0**-24, "float16": 2.0**-11, "int8": 1 / 127, "int4": 1 / 7}
"""Largest error of a number, over the number itself in a float, over the largest of its row in the others."""


@pytest.mark.parametrize("form", FORMS)
def test_every_format_comes_back_within_its_rounding(form):
    one = statistics(rows=300)
    found = read(written(one, form), form, most=300)
    assert np.array_equal(found.counts, one.counts)
    assert (np.abs(found.means - one.means) <= STEP[form] * np.abs(one.means).max(axis=1, keepdims=True)).all()
    rows = [np.abs(one.scatter[i, i:]).max() for i in range(WIDTH)]
    for i in range(WIDTH):
        assert (np.abs(found.scatter[i, i:] - one.scatter[i, i:]) <= STEP[form] * rows[i] * 1.001).all()
    assert np.array_equal(found.scatter, found.scatter.T)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_rounding_at_random_is_right_on_average_and_repeatable(form):
    found = np.mean([read(written(form=form, seed=seed), form).means for seed in range(300)], axis=0)
    size = np.abs(TOLD.means).max(axis=1, keepdims=True)
    assert (np.abs(found - TOLD.means) <= 5 * STEP[form] * size / 2 / 300**0.5).all()
    assert written(form=form, seed=3) == written(form=form, seed=3) != written(form=form, seed=4)


def assert_sums_of_many_rows_come_back(form, scale):
    one = statistics(rows=3000, scale=scale)
    found = read(written(one, form), form, most=3000)
    assert np.abs(found.scatter - one.scatter).max() <= STEP[form] * np.abs(one.scatter).max() * 1.001
    assert np.abs(found.means - one.means).max() <= STEP[form] * np.abs(one.means).max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_sums_of_many_rows_come_back(form, scale):
    assert_sums_of_many_rows_come_back(form, scale)


@pytest.mark.parametrize("form", FORMS)
def test_a_scatter_beyond_the_largest_float16_comes_back(form):
    """It grows with the rows: 3000 of features around 100 have sums of squares of 3e7, the largest float16 is 65504."""
    assert_sums_of_many_rows_come_back(form, 100.0)


@laws
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 6), st.integers(1, 30), st.sampled_from(FORMS))
def test_whatever_rows_a_client_has_its_reply_is_taken(seed, width, classes, rows, form):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, width)) * 10.0 ** rng.integers(-3, 2)
    one = statistics_of(features, rng.integers(0, classes, rows), classes)
    found = read(written(one, form), form, most=rows, classes=classes, width=width)
    assert np.array_equal(found.counts, one.counts) and found.freedom == one.freedom
    assert np.isfinite(found.means).all() and np.isfinite(found.scatter).all() and (np.diag(found.scatter) >= 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_one_row_a_class_has_a_scatter_of_zeros(form):
    one = statistics_of(np.random.default_rng(0).normal(size=(4, WIDTH)), np.arange(4), 4)
    found = read(written(one, form), form)
    assert found.freedom == 0 and not found.scatter.any()


@pytest.mark.parametrize("form", FORMS)
def test_no_row_at_all(form):
    content = written(TOLD, form)
    content.array_records["sums"]["counts"] = Array(np.zeros(COUNT, "<i8"))
    assert refused(content, form=form) == "counts"


def test_products_beyond_what_their_squares_allow_are_cut():
    """|Σ xy| ≤ √(Σ x²·Σ y²): rounding to few bits can break that, and so can a liar."""
    lie = at(triangle(), 1, 1e30)
    found = read(changed(scatter=lie)).scatter
    assert found[0, 1] == found[1, 0] == pytest.approx(np.sqrt(found[0, 0] * found[1, 1]))


# -- the question ---------------------------------------------------------------------------------------------------
def test_the_question_says_what_is_wanted():
    config = question(True, "int8", 2**62 - 1, 256).config_records["statistics"]
    assert dict(config) == {"scatter": True, "up": "int8", "seed": 2**62 - 1, "rows": 256}
    assert question(False, "float32", 0).config_records["statistics"]["scatter"] is False


def test_sums_never_travel_in_four_bits():
    assert [format_of_sums(form) for form in FORMS] == ["float16", "float32", "int8", "int8"]


# -- refusals -------------------------------------------------------------------------------------------------------
def test_a_node_may_refuse_and_says_why():
    with pytest.raises(Rejected, match="^refused: node-config statistics = False$"):
        read(refusal("node-config statistics = False"))


WORDS = {
    "long": "x" * 10**6,
    "colours": "\x1b[31mred\x1b[0m",
    "lines": "line\nhead solved from 9 rows",
    "direction": "\u202egnirts\x00",
    "bytes": b"\xff" * 10**6,
    "number": 3.0,
    "list": [1] * 10**6,
    "bool": True,
}


@pytest.mark.parametrize("why", WORDS.values(), ids=WORDS)
def test_whatever_a_node_says_is_one_short_line(why):
    content = RecordDict({"statistics": ConfigRecord({"refused": why})})
    assert refused(content) == "refused"


def test_a_refusal_beside_sums_is_a_refusal():
    content = written()
    content["statistics"] = ConfigRecord({"refused": "no"})
    assert refused(content) == "refused"


def test_a_record_of_that_name_that_refuses_nothing():
    content = written()
    content["statistics"] = ConfigRecord({"other": "x", "refused": ""})
    assert np.array_equal(read(content).counts, TOLD.counts)


# -- contents that are refused --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "content",
    [
        RecordDict({}),
        RecordDict({"metrics": MetricRecord({"num-examples": 3})}),
        RecordDict({"sums": ConfigRecord({"counts": [1]})}),
        RecordDict({"sums": MetricRecord({"counts": [1]})}),
        RecordDict({"arrays": written().array_records["sums"]}),
        RecordDict({"x" * 10**6 + "\x1b\n": ArrayRecord({})}),
    ],
    ids=["empty", "metrics", "config", "metric", "other-name", "long-name"],
)
def test_without_the_record(content):
    assert refused(content) == "records"


COUNTS = TOLD.counts.astype("<i8")
BAD_COUNTS = {
    "float": (COUNTS.astype("<f8"), "shape"),
    "int32": (COUNTS.astype("<i4"), "shape"),
    "big-endian": (Array("int64", (COUNT,), "numpy.ndarray", Array(COUNTS.astype(">i8")).data), "shape"),
    "short": (COUNTS[:-1], "shape"),
    "long": (np.append(COUNTS, 0), "shape"),
    "square": (COUNTS.reshape(2, 2), "shape"),
    "pickled": (Array("int64", (COUNT,), "pickle", b"cos\nsystem\n(S'true'\ntR."), "format"),
    "no header": (Array("int64", (COUNT,), "numpy.ndarray", b""), "format"),
    "huge shape": (Array("int64", (2**62, 2**62), "numpy.ndarray", Array(COUNTS).data), "shape"),
    "long shape": (Array("int64", (1,) * 10**5, "numpy.ndarray", Array(COUNTS).data), "shape"),
    "cut off": (Array("int64", (COUNT,), "numpy.ndarray", Array(COUNTS).data[:-1]), "format"),
    "negative": (at(COUNTS, 0, -1), "counts"),
    "negative beside many": (at(at(COUNTS, 0, -(2**62)), 2, 2**62), "counts"),
    "least": (at(COUNTS, 0, -(2**63)), "counts"),
    "one too many": (at(COUNTS, 0, COUNTS[0] + 1), "counts"),
    "most": (at(COUNTS, 0, 2**63 - 1), "counts"),
    "overflow to the right sum": (np.array([2**62, 2**62, 2**62, 2**62 + ROWS]), "counts"),
}


@pytest.mark.parametrize("name", BAD_COUNTS)
@pytest.mark.parametrize("form", ["float32", "int4"])
def test_counts_that_cannot_be(name, form):
    counts, reason = BAD_COUNTS[name]
    assert refused(changed(form, counts=counts), form=form) == reason


def test_counts_that_are_allowed_one_by_one_and_not_together():
    most = MAX_EXAMPLES * 8192
    one = Statistics(np.full(100, float(most)), np.ones((100, 1)), np.ones((1, 1)), 1.0)
    assert refused(written(one), classes=100, width=1, most=most) == "counts"


@pytest.mark.parametrize("most", [ROWS - 1, 1])
def test_more_rows_than_were_declared(most):
    assert refused(written(), most=most) == "counts"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "content, scatter, reason",
    [
        (lambda form: changed(form, drop=["counts"]), True, "parts"),
        (lambda form: changed(form, drop=["means"]), True, "parts"),
        (lambda form: changed(form, drop=["scatter"]), True, "parts"),
        (lambda form: changed(form, drop=["means", "scatter"]), True, "parts"),
        (lambda form: changed(form), False, "parts"),
        (lambda form: changed(form, more=means()), True, "parts"),
        (lambda form: changed(form, **{"\x1b" * 10**5: means()}), True, "parts"),
        (lambda form: changed(form, counts=np.zeros(COUNT, "<i8")), True, "counts"),  # means of nobody
        (lambda form: changed(form, counts=at(COUNTS, 1, 1) - at(np.zeros(COUNT, "<i8"), 0, 1)), True, "shape"),
    ],
    ids=["counts", "means", "scatter", "both", "unasked", "more", "long name", "no count", "means of fewer classes"],
)
def test_arrays_that_are_not_those_expected(form, content, scatter, reason):
    assert refused(content(form), form=form, scatter=scatter) == reason


BAD_NUMBERS = {
    "means": {
        "nan": (lambda: at(means(), 0, np.nan), "not-finite"),
        "inf": (lambda: at(means(), 0, np.inf), "not-finite"),
        "far": (lambda: at(means(), 0, 1.01 * LARGEST), "means"),
        "far below": (lambda: at(means(), 0, -1.01 * LARGEST), "means"),
        "largest": (lambda: at(means(), 0, np.finfo(np.float32).max), "means"),
        "short": (lambda: means()[:-1], "shape"),
        "long": (lambda: np.append(means(), means()[:1]), "shape"),
        "of every class": (lambda: TOLD.means.ravel().astype("<f4"), "shape"),
        "as a table": (lambda: means().reshape(3, WIDTH), "shape"),
        "float64": (lambda: means().astype("<f8"), "shape"),
        "float16": (lambda: means().astype("<f2"), "shape"),
    },
    "scatter": {
        "nan": (lambda: at(triangle(), 1, np.nan), "not-finite"),
        "inf": (lambda: at(triangle(), 1, -np.inf), "not-finite"),
        "negative square": (lambda: at(triangle(), 0, -1e-3), "scatter"),
        "last square negative": (lambda: at(triangle(), TRIANGLE - 1, -1.0), "scatter"),
        "huge square": (lambda: at(triangle(), 0, 1.01 * LARGEST**2 * TOLD.freedom), "scatter"),
        "largest": (lambda: np.full(TRIANGLE, np.finfo(np.float32).max), "scatter"),
        "short": (lambda: triangle()[:-1], "shape"),
        "long": (lambda: np.append(triangle(), triangle()[:1]), "shape"),
        "whole matrix": (lambda: TOLD.scatter.ravel().astype("<f4"), "shape"),
        "empty": (lambda: np.zeros(0, "<f4"), "shape"),
        "float64": (lambda: triangle().astype("<f8"), "shape"),
    },
}


@pytest.mark.parametrize("array, name", [(array, name) for array, cases in BAD_NUMBERS.items() for name in cases])
def test_numbers_that_cannot_be(array, name):
    make, reason = BAD_NUMBERS[array][name]
    assert refused(changed(**{array: make()})) == reason


def test_a_scatter_of_single_rows_cannot_be_other_than_zero():
    one = statistics_of(np.eye(WIDTH)[:COUNT], np.arange(COUNT), COUNT)
    assert refused(changed(one=one, scatter=at(np.zeros(TRIANGLE, "<f4"), 0, 1e-6))) == "scatter"


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("array", ["means", "scatter"])
def test_codes_that_cannot_be(form, array):
    good = np.frombuffer(written(form=form).array_records["sums"][array].data[128:], np.uint8)
    scale = 4 * (3 if array == "means" else WIDTH)

    def scaled(value):
        return np.concatenate([np.full(scale // 4, value, "<f4").view(np.uint8), good[scale:]])

    refusals = {
        "zero code": (at(good, scale, 0), "codes"),
        "nan": (scaled(np.nan), "codes"),
        "inf": (scaled(np.inf), "codes"),
        "negative": (scaled(-1.0), "codes"),
        "overflow": (scaled(3e38), "not-finite"),
        "short": (good[:-1], "shape"),
        "long": (np.append(good, good[:1]), "shape"),
    }
    for name, (codes, reason) in refusals.items():
        assert refused(changed(form, **{array: codes}), form=form) == reason, name
    if array == "means":
        assert refused(changed(form, means=scaled(1e6)), form=form) == "means"
    assert refused(changed("float32"), form=form) == "shape"


@pytest.mark.parametrize("width, classes", [(384, 200), (1024, 12)])
def test_a_large_reply_is_judged_quickly(width, classes):
    rng = np.random.default_rng(0)
    one = statistics_of(rng.normal(size=(2 * classes, width)), np.arange(2 * classes) % classes, classes)
    assert read(written(one, "int8"), "int8", most=2 * classes, classes=classes, width=width).freedom == classes
    lie = written(one)
    lie.array_records["sums"]["scatter"] = Array(np.full(width * (width + 1) // 2, 3e38, "<f4"))
    assert refused(lie, most=2 * classes, classes=classes, width=width) == "scatter"


def test_many_arrays_and_records_are_judged_quickly(caplog):
    caplog.set_level(logging.INFO)
    content = changed(**{f"{i}": np.zeros(1, "<f4") for i in range(3000)})
    assert refused(content) == "parts"
    assert refused(RecordDict({f"{i}": ArrayRecord({}) for i in range(3000)})) == "records"
    assert not caplog.records


# -- bytes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scatter", [True, False])
def test_bytes_are_counted_as_statistics(form, scatter):
    one, codec = statistics(scatter=scatter), CODECS[form]
    content = written(one, form)
    lengths = [np.full(3, WIDTH)] + ([np.arange(WIDTH, 0, -1)] if scatter else [])
    expected = 8 * (COUNT + 2) + sum(codec.length(rows) * codec.dtype.itemsize for rows in lengths)
    parts = payload(content)
    assert parts["statistics"] == expected
    assert sum(parts.values()) == sum(record.count_bytes() for record in content.values())
    meter = ByteMeter()
    meter.count("up", content)
    meter.count("down", question(scatter, form, 0))
    taken = meter.take_round()
    assert taken["up.statistics"] == meter.total["up.statistics"] == expected
    assert taken["down.statistics"] == 0 < taken["down.other"] == taken["down"]
    assert taken["up"] == taken["up.statistics"] + taken["up.other"]


def test_a_refusal_is_counted_too():
    parts = payload(refusal("no"))
    assert parts["statistics"] == 0 < parts["other"]


def test_a_lie_about_a_shape_makes_no_bytes():
    content = changed(scatter=Array("float32", (2**60,), "numpy.ndarray", b"123"))
    assert payload(content)["statistics"] == 8 * (COUNT + 2) + 4 * 3 * WIDTH + 3


@pytest.mark.parametrize("exponents", [[0], [0, 257], [-257, 0]])
def test_exponents_that_no_sum_has_are_refused(exponents):
    assert refused(changed(exponents=Array(np.array(exponents, dtype="<i8")))) in ("exponents", "shape")
