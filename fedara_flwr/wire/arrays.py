"""Vectors in Flower's records: written as they travel, and checked on arrival before anything is allocated for them."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

from fedara_flwr.log import printable
from fedara_flwr.model import parts
from fedara_flwr.model.deltas import dense_size
from fedara_flwr.model.ranks import Ints, RankMask
from fedara_flwr.model.spec import Arrays, ModelSpec, Vector
from fedara_flwr.wire.codec import CODECS, Coded, Numbers, format_of_values

MAX_NAME = 64  # characters of a name that comes from outside
MAX_DETAIL = 300  # characters of what is said about a message; its own words are among them
FLOAT32 = np.dtype("<f4")


class Rejected(Exception):
    """A message that fails a check: `reason` is a short fixed word for counting, the text has the figures."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {printable(detail[:MAX_DETAIL])}")
        self.reason = reason


def to_record(arrays: Coded | Arrays) -> ArrayRecord:
    """Arrays as an ArrayRecord, in the order of the parts' declarations.

    Raises:
        ValueError: a part is not declared (model/parts.py): it would travel without being counted or checked.
    """
    return ArrayRecord({name: Array(arrays[name]) for name in parts.in_order(arrays)})


def read_vector(array: Array, length: int, name: str, dtype: np.dtype[Any] = FLOAT32) -> Numbers:
    """The vector of `length` numbers in a Flower Array; nothing is allocated before its header agrees.

    Raises:
        Rejected: dtype, shape, header or size differ, or a number is not finite.
    """
    if array.stype != "numpy.ndarray":
        raise Rejected("format", f"{name} is serialised as {array.stype[:MAX_NAME]!r}, allowed is 'numpy.ndarray'")
    expected = f"{dtype.name} ({length},)"
    if array.dtype != dtype.name or tuple(array.shape) != (length,):
        claimed = [n if abs(n) < 2**63 else "huge" for n in array.shape[:4]]  # Python refuses to print very long integers
        raise Rejected("shape", f"{name} is {array.dtype[:MAX_NAME]!r} {claimed}, expected {expected}")
    stream = io.BytesIO(array.data[:256])
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise Rejected("format", f"{name} has npy version {version}, allowed is (1, 0)")
        shape, fortran, stored = np.lib.format.read_array_header_1_0(stream)
    except Rejected:
        raise
    except Exception as error:  # numpy parses the header as Python literals: whatever goes wrong there is one reason
        raise Rejected("format", f"{name} has no readable npy header ({str(error)[:80]})") from None
    if shape != (length,) or fortran or stored != dtype:
        raise Rejected("shape", f"{name}'s header says {stored} {shape[:4]}, expected {expected}")
    start = stream.tell()
    size = dtype.itemsize * length
    if len(array.data) - start != size:
        raise Rejected("format", f"{name} has {len(array.data) - start} bytes of data, expected {size}")
    vector = np.frombuffer(array.data, dtype=dtype, offset=start)
    if not np.isfinite(vector).all():
        raise Rejected("not-finite", f"{name} has {int((~np.isfinite(vector)).sum())} numbers that are not finite")
    return vector


def read_arrays(
    content: RecordDict,
    spec: ModelSpec,
    mask: RankMask,
    names: frozenset[str],
    entries: int = 0,
    form: str = "float32",
    down: bool = False,
) -> Arrays:
    """Exactly the parts `names`, packed under `mask` and sent in the run's format `form`, decoded; Rejected otherwise.

    Args:
        down: whether they are values that the server sent, which not every part has in every format.
    """
    records = content.array_records
    if "arrays" not in records:
        raise Rejected("records", f"array records {short(records)}, expected 'arrays'")
    record = records["arrays"]
    if set(record) != names:
        raise Rejected("parts", f"parts {short(record)}, expected {sorted(names)}")
    if entries > (most := dense_size(spec)):
        raise Rejected("plan", f"{entries} entries of the backbone, it has {most}")
    order = parts.in_order(names)
    forms = {name: format_of_values(name, form) if down else form for name in order}
    return {name: decode(record[name], spec.row_lengths(name, mask, entries), name, forms[name]) for name in order}


def decode(array: Array, rows: Ints, name: str, form: str) -> Vector:
    """A vector with these rows in the format `form`, decoded; Rejected where it cannot be that, or is not finite."""
    codec = CODECS[form]
    coded = read_vector(array, codec.length(rows), name, codec.dtype)
    try:
        vector = codec.decode(coded, rows)
    except ValueError as error:
        raise Rejected("codes", f"{name}: {error}") from None
    if not np.isfinite(vector).all():
        raise Rejected("not-finite", f"{name} is decoded to numbers that are not finite")
    return vector


def short(names: Iterable[Any]) -> list[str]:
    """Names from outside as a line may hold them: sorted, each cut, at most eight."""
    return sorted(str(name)[:MAX_NAME] for name in names)[:8]
