"""Number formats: encodings by hand, what every one of them keeps, and what none of them takes for a vector."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_wire import LOCAL, MASK, MOST, PARTS, PLAN, PLANS, SPEC, changed_plan, plan_reason, random_arrays, reason, update_for

from fedara_flwr.keys import ConfigError
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.tasks import read_settings
from fedara_flwr.wire.arrays import Rejected, read_arrays
from fedara_flwr.wire.codec import CODECS, Broadcast, nbytes
from fedara_flwr.wire.meter import payload
from fedara_flwr.wire.plan import Update
from fedara_flwr.wire.records import plan_to_content, update_from_content, update_to_content
from fedara_flwr.wire.upload import code_update

laws = settings(deadline=None, max_examples=200)
CODED = ("float16", "int8", "int4")
BITS = {"float32": 32, "float16": 16, "int8": 8, "int4": 4}


def encode(name, values, rows, seed=0):
    coded = CODECS[name].encode(np.array(values, dtype=np.float32), np.array(rows, dtype=np.int64), np.random.default_rng(seed))
    assert coded.dtype == CODECS[name].dtype and coded.shape == (CODECS[name].length(np.array(rows, dtype=np.int64)),)
    return coded


def decode(name, coded, rows):
    return CODECS[name].decode(np.frombuffer(coded, dtype=CODECS[name].dtype), np.array(rows, dtype=np.int64))


# -- by hand ------------------------------------------------------------
def test_int8_by_hand():
    """Largest 127: scale 1 (3f800000). Largest 63.5: scale 0.5 (3f000000). Code = multiple + 128."""
    coded = encode("int8", [127, -3, 0, 1, -63.5], [3, 2])
    assert coded.tobytes().hex(" ") == "00 00 80 3f 00 00 00 3f ff 7d 80 82 01"
    assert decode("int8", coded.tobytes(), [3, 2]).tolist() == [127, -3, 0, 1, -63.5]


def test_int4_by_hand():
    """Largest 7: scale 1. Largest 3.5: scale 0.5. Codes multiple + 8: f 1 8 | 9 1, two in a byte, zeros at the end."""
    coded = encode("int4", [7, -7, 0, 0.5, -3.5], [3, 2])
    assert coded.tobytes().hex(" ") == "00 00 80 3f 00 00 00 3f f1 89 10"
    assert decode("int4", coded.tobytes(), [3, 2]).tolist() == [7, -7, 0, 0.5, -3.5]


def test_a_row_of_zeros_and_no_row_at_all():
    assert encode("int4", [0, 0, 0, 0], [4]).tobytes().hex(" ") == "00 00 00 00 88 88"
    assert all(len(encode(name, [], [])) == 0 and len(decode(name, b"", [])) == 0 for name in CODECS)


def test_float16_by_hand():
    """11 bits of significand: 2049 lies between 2048 and 2050 and goes to the even one. Beyond 65504 is 65504."""
    assert decode("float16", encode("float16", [1.5, 2049, 1e9, -1e30], [4]), [4]).tolist() == [1.5, 2048, 65504, -65504]


def test_the_smallest_numbers_do_not_divide_by_zero():
    """2^-149 over 127 is 0 in float32; the scale stays 2^-149, and the number one multiple of it."""
    tiny = float(np.float32(2.0**-149))
    assert decode("int8", encode("int8", [tiny, 0], [2]), [2]).tolist() == [tiny, 0]


def test_rounding_is_right_on_average():
    """0.3 of a scale becomes 1 in 3 of 10 draws: standard error √(0.21/40,000) = 0.0023. Of -2.75, -3 in 3 of 4: 0.0022."""
    for name, top in (("int8", 127), ("int4", 7)):
        for value, low, high in ((0.3, 0, 1), (-2.75, -3, -2)):
            decoded = decode(name, encode(name, [top] + [value] * 40_000, [40_001]), [40_001])[1:]
            assert set(decoded.tolist()) == {low, high} and abs(decoded.mean() - value) < 0.01


def test_rows_by_hand():
    """Slots alive: 2 in m0 (3, 2), 1 in m1 (1, 4), 1 in m2 (2, 2). Head (2, 2) and (2,), backbone (3, 1) and (3, 2)."""
    rows = {part: SPEC.row_lengths(part, MASK).tolist() for part in PARTS}
    assert rows == {"B": [3, 3, 1, 2], "E": [2, 1, 1], "A": [2, 2, 4, 2], "head": [2, 2, 2], "backbone": [1, 1, 1, 2, 2, 2]}
    assert SPEC.row_lengths("backbone", MASK, 600).tolist() == [256, 256, 88]
    assert SPEC.row_lengths("backbone", MASK, 512).tolist() == [256, 256]
    assert SPEC.row_lengths("head", MASK, 600).tolist() == [2, 2, 2]


@laws
@given(st.lists(st.booleans(), min_size=6, max_size=6), st.integers(0, 2000))
def test_rows_make_up_the_part(bits, entries):
    mask = RankMask((2, 2, 2), np.array(bits))
    for part in PARTS:
        rows = SPEC.row_lengths(part, mask, entries)
        assert rows.sum() == SPEC.length(part, mask, entries) and (rows > 0).all()


# -- laws ------------------------------------------------------------
@st.composite
def vectors(draw):
    rows = draw(st.lists(st.integers(1, 9), max_size=6))
    floats = st.floats(-(2.0**39), 2.0**39, width=32)
    return draw(hnp.arrays(np.float32, sum(rows), elements=floats)), np.array(rows, dtype=np.int64)


@laws
@given(vectors(), st.sampled_from(("int8", "int4")), st.integers(0, 99))
def test_no_number_is_off_by_more_than_its_scale(drawn, name, seed):
    values, rows = drawn
    coded = encode(name, values, rows, seed)
    scales = np.repeat(coded[: 4 * len(rows)].view("<f4").astype(np.float64), rows)
    decoded = CODECS[name].decode(coded, rows)
    assert decoded.dtype == np.float32
    assert (np.abs(decoded.astype(np.float64) - values) <= scales * (1 + 1e-6)).all()
    assert (decoded[values == 0] == 0).all()


@laws
@given(vectors())
def test_sizes_are_known_beforehand(drawn):
    values, rows = drawn
    for name, bits in BITS.items():
        scales = 4 * len(rows) if name.startswith("int") else 0
        assert encode(name, values, rows).nbytes == nbytes(name, rows) == scales + -(-len(values) * bits // 8)


@laws
@given(vectors())
def test_float32_and_float16_come_back(drawn):
    values, rows = drawn
    assert np.array_equal(CODECS["float32"].decode(encode("float32", values, rows), rows), values)
    half = np.clip(values, -65504, 65504).astype(np.float16).astype(np.float32)
    assert np.array_equal(CODECS["float16"].decode(encode("float16", half, rows), rows), half)


@laws
@given(st.binary(max_size=60), st.lists(st.integers(1, 9), max_size=6), st.sampled_from(("int8", "int4")))
def test_any_bytes_are_refused_or_a_vector(data, rows, name):
    length = CODECS[name].length(np.array(rows, dtype=np.int64))
    try:
        values = CODECS[name].decode(
            np.frombuffer(data.ljust(length, b"\x11")[:length], np.uint8), np.array(rows, dtype=np.int64)
        )
    except ValueError:
        return
    assert values.shape == (sum(rows),) and not np.isnan(values).any()


# -- on the wire ------------------------------------------------------------
def coded_reply(plan, received=None):
    update = update_for(plan)
    coded, _ = code_update(update, plan, SPEC, received or random_arrays(plan.mask, seed=3), "k")
    return update_to_content(update, plan, coded)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("down", CODED)
def test_the_broadcast_is_one_for_all_and_comes_back_rounded(plan, down):
    plan = replace(plan, down=down, carries=frozenset({"B", "E", "A", "head"}), drawn=frozenset(), entries=0)
    exact = random_arrays(plan.mask, ("B", "E", "A", "head"))
    broadcast = Broadcast(SPEC)
    first, second = (plan_to_content(plan, broadcast.encode(plan, exact)) for _ in range(2))
    again = plan_to_content(plan, Broadcast(SPEC).encode(plan, exact))
    received = [read_arrays(content, SPEC, plan.mask, plan.carries, 0, down, down=True) for content in (first, second, again)]
    for part, values in exact.items():
        assert all(np.array_equal(received[0][part], other[part]) for other in received)
        steps = 127 if (part, down) == ("head", "int4") else 7  # four bits of a head would be none
        assert np.abs(received[0][part] - values).max(initial=0) <= np.abs(values).max(initial=0) / steps
    off = sum(float(np.square(received[0][p] - v).sum()) for p, v in exact.items())
    whole = sum(float(np.square(v).sum()) for v in exact.values())
    assert broadcast.report()["coding-error"] == pytest.approx((off / whole) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("up", ("float32", *CODED))
def test_what_training_did_not_change_stays_as_the_server_has_it(up):
    """Clients start from the rounded broadcast; the server's own values come out, bit by bit, where nothing was learnt."""
    plan = replace(PLAN, down="int4", up=up)
    exact = random_arrays(MASK)
    content = plan_to_content(plan, Broadcast(SPEC).encode(plan, exact))
    received = read_arrays(content, SPEC, MASK, frozenset(PARTS), 0, "int4", down=True)
    assert not np.array_equal(received["B"], exact["B"])
    update = Update(received, MASK, 5, {})
    coded, said = code_update(update, plan, SPEC, received, "k")
    read = update_from_content(update_to_content(update, plan, coded), SPEC, plan, MOST, lambda mask: exact)
    assert all(np.array_equal(read.arrays[part], exact[part]) for part in PARTS)
    assert said == {"coding-error": 0.0}


@pytest.mark.parametrize("plan", [PLAN, LOCAL], ids=["whole", "local"])
@pytest.mark.parametrize("up", CODED)
def test_differences_are_added_to_the_servers_values(plan, up):
    plan = replace(plan, up=up)
    update, received = update_for(plan), random_arrays(plan.mask, seed=3)
    start = SPEC.slice(received, plan.mask, update.mask)
    coded, said = code_update(update, plan, SPEC, received, "k")
    content = update_to_content(update, plan, coded)
    read = update_from_content(content, SPEC, plan, MOST, lambda mask: SPEC.slice(received, plan.mask, mask))
    change = {part: update.arrays[part] - start[part] for part in update.arrays}
    parts = payload(content)
    for part, values in update.arrays.items():
        assert np.abs(read.arrays[part] - values).max() <= np.abs(change[part]).max() / 7 + 1e-6
        assert parts[part] == nbytes(up, SPEC.row_lengths(part, update.mask))
    assert 0 < said["coding-error"] < 0.3
    assert coded_reply(plan, received).array_records["arrays"] == content.array_records["arrays"]
    other, _ = code_update(update, plan, SPEC, received, "another")
    assert (up == "float16") == all(np.array_equal(other[part], coded[part]) for part in coded)


def test_differences_from_what_both_sides_draw():
    """flora: A and B never came, the client drew them."""
    plan = replace(PLAN, up="int8", sent=frozenset({"A", "B"}), carries=frozenset(), drawn=frozenset({"A", "B"}))
    start = plan.start(SPEC, {}, MASK, MASK)
    assert set(start) == {"A", "B"} and not start["B"].any() and start["A"].any()
    coded, _ = code_update(Update(start, MASK, 5, {}), plan, SPEC, {}, "k")
    assert all((coded[part][4 * len(SPEC.row_lengths(part, MASK)) :] == 128).all() for part in ("A", "B"))


@pytest.mark.parametrize("asked", CODECS)
@pytest.mark.parametrize("given", CODECS)
def test_a_reply_in_another_format(asked, given):
    asked, given = (replace(PLAN, down="int8", up=up) for up in (asked, given))
    content = coded_reply(given)
    if asked == given:
        update_from_content(content, SPEC, asked, MOST, lambda mask: random_arrays(mask))
    else:
        assert reason(content, asked) == "shape"


@pytest.mark.parametrize(
    "change, why",
    [
        ((0, b"\x00\x00\xc0\x7f"), "codes"),
        ((0, b"\x00\x00\x80\x7f"), "codes"),
        ((0, b"\x00\x00\x80\xbf"), "codes"),
        ((0, b"\xff\xff\x7f\x7f"), "not-finite"),
        ((16, b"\x00"), "codes"),
        ((20, b"\x00"), "codes"),
        ((20, b"\xff"), "codes"),
    ],
    ids=["NaN", "Inf", "negative", "overflow", "two codes 0", "code 0", "padding"],
)
def test_codes_that_nobody_encodes(change, why):
    """B under MASK: four scales, 16 bytes, then nine codes in five bytes, the last half of which is padding."""
    plan = replace(PLAN, up="int4")
    content = coded_reply(plan)
    array = content.array_records["arrays"]["B"]
    at, bad = 128 + change[0], change[1]
    content.array_records["arrays"]["B"] = type(array)(
        "uint8", array.shape, array.stype, array.data[:at] + bad + array.data[at + len(bad) :]
    )
    assert array.shape == (21,) and reason(content, plan) == why


def test_decoded_values_are_bounded():
    """A scale of 1e12 and a code of 7: decoded 7e12, allowed 1e12."""
    plan = replace(PLAN, up="int4")
    update = update_for(plan)
    update.arrays["A"][0] = 7e12
    coded, _ = code_update(update, plan, SPEC, random_arrays(MASK, seed=3), "k")
    with pytest.raises(Rejected) as caught:
        update_from_content(update_to_content(update, plan, coded), SPEC, plan, MOST, lambda mask: random_arrays(mask))
    assert caught.value.reason == "range"


@pytest.mark.parametrize("key", ["down", "up"])
@pytest.mark.parametrize("value", ["int3", "", 4, ["int4"]])
def test_a_format_that_the_client_does_not_know(key, value):
    assert plan_reason(changed_plan(**{key: value})) == "plan"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_client_that_diverged_says_so(value):
    plan, update = replace(PLAN, up="int4"), update_for(PLAN)
    update.arrays["head"][0] = value
    with pytest.raises(FloatingPointError, match="head is not finite"):
        code_update(update, plan, SPEC, random_arrays(MASK), "k")


def test_more_entries_than_weights_allocate_nothing():
    """SPEC has 14 weights; 2^60 entries would be 2^52 rows."""
    plan = replace(PLAN, carries=frozenset({"backbone"}), down="int4", entries=2**60)
    content = plan_to_content(plan, {"backbone": np.zeros(4, dtype=np.uint8)})
    with pytest.raises(Rejected) as caught:
        read_arrays(content, SPEC, MASK, plan.carries, plan.entries, plan.down)
    assert caught.value.reason == "plan"


def test_settings():
    with pytest.raises(ConfigError, match="wire.up = 'int3'.*'int4'"):
        read_settings({"wire.up": "int3"})
    assert PLAN.returns(MASK) == set(PARTS) and not PLAN.differences
    assert all(replace(PLAN, **{way: form}).differences for way in ("down", "up") for form in CODED)
