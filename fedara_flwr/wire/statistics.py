"""Statistics of a client's features ⇄ Flower records (model/statistics.py). What comes is checked before it is believed.

A reply holds `sums`, an ArrayRecord: `counts` (int64, one for each class); `means`, of the classes that have a count only, and
`scatter`, the upper triangle row by row, both in the run's upload format; and `exponents` (int64): both are divided by two to
that power, so that no format cuts them off. What a node does not tell it says why.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedara_flwr.log import printable
from fedara_flwr.model.ranks import Ints
from fedara_flwr.model.spec import Vector
from fedara_flwr.model.statistics import Floats, Statistics, from_upper, upper
from fedara_flwr.wire.arrays import MAX_DETAIL, Rejected, decode, read_vector, short
from fedara_flwr.wire.codec import CODECS

STATISTICS, SUMS = "statistics", "sums"
COUNTS, MEANS, SCATTER, EXPONENTS = "counts", "means", "scatter", "exponents"
LARGEST_EXPONENT = 256
LARGEST = 1e6  # of a feature: squares and their sums stay finite
_INT64 = np.dtype("<i8")


def format_of_sums(form: str) -> str:
    """The format of the reply where the run's for uploads is `form`: from sums in four bits no head can be solved."""
    return "int8" if form == "int4" else form


def question(scatter: bool, form: str, seed: int, rows: int = 0) -> RecordDict:
    """The query: whether the scatter is asked for, the format of the reply, the seed of the head and of rounding, most rows."""
    return RecordDict({STATISTICS: ConfigRecord({SCATTER: scatter, "up": form, "seed": seed, "rows": rows})})


def refusal(why: str) -> RecordDict:
    """The reply of a node that does not tell its sums."""
    return RecordDict({STATISTICS: ConfigRecord({"refused": why})})


def to_content(told: Statistics, form: str, rng: np.random.Generator, metrics: dict[str, Any]) -> RecordDict:
    """The reply of a node that has rows; `rng` rounds where the format does so at random, `metrics` are what the pass took."""
    has, width, codec = told.counts > 0, told.means.shape[1], CODECS[form]
    means, triangle = told.means[has].ravel(), None if told.scatter is None else upper(told.scatter)
    sizes = [float(np.abs(values).max(initial=0.0)) for values in (means, () if triangle is None else triangle)]
    exponents = np.frexp(sizes)[1].astype(_INT64)
    arrays: dict[str, Any] = {COUNTS: told.counts.astype(_INT64), EXPONENTS: exponents}
    arrays[MEANS] = codec.encode(_scaled(means, -exponents[0]), _rows(int(has.sum()), width), rng)
    if triangle is not None:
        arrays[SCATTER] = codec.encode(_scaled(triangle, -exponents[1]), _triangle(width), rng)
    record = ArrayRecord({name: Array(np.ascontiguousarray(values)) for name, values in arrays.items()})
    return RecordDict({SUMS: record, "metrics": MetricRecord(metrics)})


def _scaled(values: Floats, exponent: int) -> Vector:
    return np.ldexp(values, exponent).astype(np.float32)


def from_content(content: RecordDict, classes: int, width: int, form: str, scatter: bool, most: int) -> Statistics:
    """A client's statistics.

    Args:
        classes: C, the run's labels.
        width: d, what enters the head's last layer.
        scatter: whether it was asked for.
        most: rows that the client can have, by what it declared.

    Raises:
        Rejected: the node refused, or this cannot be what was asked for.
    """
    if why := _refused(content):
        raise Rejected("refused", why)
    record = content.array_records.get(SUMS)
    if record is None:
        raise Rejected("records", f"array records {short(content.array_records)}, expected {SUMS!r}")
    if missing := {COUNTS, EXPONENTS} - set(record):
        raise Rejected("parts", f"arrays {short(record)}, {min(missing)!r} is missing")
    counts = read_vector(record[COUNTS], classes, COUNTS, _INT64)
    if (counts < 0).any() or (counts > most).any() or int(counts.sum()) > most:
        raise Rejected("counts", f"counts from {counts.min()} to {counts.max()}, the client declared {most} rows")
    exponents = read_vector(record[EXPONENTS], 2, EXPONENTS, _INT64)
    if (exponents < -LARGEST_EXPONENT).any() or (exponents > LARGEST_EXPONENT).any():
        raise Rejected("exponents", f"{exponents.tolist()}, allowed is up to {LARGEST_EXPONENT}")
    has = counts > 0
    if not has.any():
        raise Rejected("counts", "no rows")
    expected = {COUNTS, EXPONENTS, MEANS} | ({SCATTER} if scatter else set())
    if set(record) != expected:
        raise Rejected("parts", f"arrays {short(record)}, expected {sorted(expected)}")
    means, spread = np.zeros((classes, width)), None
    values = _decode(record[MEANS], _rows(int(has.sum()), width), MEANS, form, exponents[0])
    if np.abs(values).max() > LARGEST:
        raise Rejected("means", f"a feature of {np.abs(values).max():g}, allowed is up to {LARGEST:g}")
    means[has] = values.reshape(-1, width)
    freedom = float(counts.sum() - has.sum())
    if scatter:
        triangle = _decode(record[SCATTER], _triangle(width), SCATTER, form, exponents[1])
        spread = _bounded(from_upper(triangle, width), freedom)
    return Statistics(counts.astype(np.float64), means, spread, freedom)


def _decode(array: Array, rows: Ints, name: str, form: str, exponent: int) -> Floats:
    return np.ldexp(decode(array, rows, name, form).astype(np.float64), exponent)


def _refused(content: RecordDict) -> str:
    """Why the node tells nothing; '' where it does."""
    why = content.config_records.get(STATISTICS, ConfigRecord()).get("refused", "")
    return printable(str(why)[:MAX_DETAIL])


def _bounded(scatter: Floats, freedom: float) -> Floats:
    """What sums of squares can be: no negative diagonal, no product larger than its squares allow.

    Rounding to few bits can break the second, so such numbers are cut and not refused.
    """
    squares = np.diag(scatter)
    if (squares < 0).any() or squares.max(initial=0.0) > LARGEST**2 * max(freedom, 0.0):
        raise Rejected("scatter", f"squares from {squares.min():g} to {squares.max():g} of {freedom:g} rows")
    most = np.sqrt(np.outer(squares, squares))
    return np.clip(scatter, -most, most)


def _rows(count: int, width: int) -> Ints:
    """Lengths of the rows of the means, each with a scale of its own."""
    return np.full(count, width, dtype=np.int64)


def _triangle(width: int) -> Ints:
    """Lengths of the rows of an upper triangle."""
    return np.arange(width, 0, -1, dtype=np.int64)
