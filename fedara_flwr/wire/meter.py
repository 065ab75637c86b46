"""The byte meter: counts the records that are sent, by direction and part."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedara_flwr.model.parts import declared
from fedara_flwr.wire.codec import CODECS
from fedara_flwr.wire.records import KEPT_SLOTS, PIECE, REPORT
from fedara_flwr.wire.statistics import STATISTICS, SUMS

Direction = Literal["down", "up"]
_ITEM = {codec.dtype.name: codec.dtype.itemsize for codec in CODECS.values()} | {"int64": 8}
_MASKS = ("mask", KEPT_SLOTS)


def counted() -> tuple[str, ...]:
    """What bytes are counted apart: every declared part, pieces of the delta, masks with what terms report, and the rest."""
    return (*declared(), "delta", "mask", STATISTICS, "other")


def payload(content: RecordDict) -> Counter[str]:
    """Bytes of one message by part; the sum is what Flower's own `count_bytes()` says of its records.

    Parts and delta count what their numbers take on the wire (wire/codec.py); mask the packed bits and terms' reports;
    statistics the sums that a head is solved from; other
    is what remains: npy headers, names and the settings in the plan.
    """
    parts: Counter[str] = Counter()
    total = sum(_size(record) for record in content.values())
    for record_name, arrays in content.array_records.items():
        for name, array in arrays.items():
            part = _part(record_name, name)
            # what a header claims is not believed beyond the bytes that are there, nor multiplied: all parts are vectors, and
            # the product of a long shape takes minutes
            claimed = _ITEM.get(array.dtype, 4) * array.shape[0] if len(array.shape) == 1 else 0
            parts[part] += max(0, min(claimed, len(array.data)))
    for config in content.config_records.values():
        for key, value in config.items():
            if isinstance(value, bytes) and (key in _MASKS or key.startswith(REPORT)):
                parts["mask"] += len(value)
    parts["other"] += total - sum(parts.values())
    return parts


def _part(record: str, name: str) -> str:
    """As what the numbers of an array are counted."""
    if record == SUMS:
        return STATISTICS
    return "delta" if record.startswith(PIECE) else name if name in declared() else "other"


def _size(record: ArrayRecord | ConfigRecord | MetricRecord) -> int:
    """Flower's `count_bytes`, which raises on the empty strings and lists that a ConfigRecord from outside may hold."""
    if not isinstance(record, ConfigRecord):
        return record.count_bytes()
    empty = [key for key, value in record.items() if isinstance(value, str | bytes | list) and not value]
    return ConfigRecord({k: v for k, v in record.items() if k not in empty}).count_bytes() + sum(map(len, empty))


class ByteMeter:
    """Running totals of one round and of the run, in bytes by (direction, part)."""

    def __init__(self, total: Counter[str] | None = None) -> None:
        self.total: Counter[str] = Counter(total or {})
        self._round: Counter[str] = Counter()

    def count(self, direction: Direction, content: RecordDict) -> Counter[str]:
        """Add one message; returns its bytes by part."""
        parts = payload(content)
        for part, size in parts.items():
            self.total[f"{direction}.{part}"] += size
            self._round[f"{direction}.{part}"] += size
        return parts

    def take_round(self) -> dict[str, int]:
        """Bytes since the last call, every (direction, part) present, and `down` and `up` in all."""
        taken = {f"{d}.{p}": self._round[f"{d}.{p}"] for d in ("down", "up") for p in counted()}
        taken |= {d: sum(taken[f"{d}.{p}"] for p in counted()) for d in ("down", "up")}
        self._round.clear()
        return taken
