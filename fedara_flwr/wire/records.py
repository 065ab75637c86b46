"""TrainPlan and Update ⇄ Flower records. Reading an Update checks everything that can be checked without the model.

A message holds `arrays` (ArrayRecord: one vector per part, in the plan's format) and `plan` or `reply` (ConfigRecord); a plan
also the pieces of the delta that the client lacks, always float32, since their digests name them; an update `metrics`
(MetricRecord). Empty strings and lists never enter a ConfigRecord: Flower cannot count their bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedara_flwr.config import Format, StrategySettings
from fedara_flwr.log import printable
from fedara_flwr.model.deltas import Piece, dense_size, piece_lengths
from fedara_flwr.model.ranks import Bools, Ints, RankMask, pack_bits, unpack_bits
from fedara_flwr.model.spec import PARTS, SLOT_PARTS, Arrays, ModelSpec, Vector
from fedara_flwr.wire import PROTOCOL
from fedara_flwr.wire.codec import CODECS, Coded, Numbers
from fedara_flwr.wire.plan import REPORTS, TrainPlan, Update, Vote

_SCALARS = {
    "round": "server_round",
    "seed": "seed",
    "steps": "steps",
    "epochs": "epochs",
    "batch-size": "batch_size",
    "batch-tokens": "batch_tokens",
    "learning-rate": "learning_rate",
    "e-lr-factor": "e_lr_factor",
    "head-learning-rate": "head_learning_rate",
    "warmup-steps": "warmup_steps",
    "clip-norm": "clip_norm",
    "dropout": "dropout",
    "budget": "budget",
    "importance": "importance",
    "importance-time": "importance_time",
    "upload-mask": "upload_mask",
    "evaluate": "evaluate",
    "draw-seed": "draw_seed",
    "entries": "entries",
    "down": "down",
    "up": "up",
}
_SETS = {"trainable": PARTS, "carries": PARTS, "drawn": PARTS, "report": REPORTS, "feedback": PARTS}
_KINDS = {key: TrainPlan.__annotations__[name] for key, name in _SCALARS.items()}
_CHOICES = {
    key: get_args(StrategySettings.model_fields[_SCALARS[key]].annotation)
    for key in ("importance", "importance-time", "upload-mask")
} | dict.fromkeys(("down", "up"), get_args(Format))
MAX_EXAMPLES = 2**31  # per node; sums of weighted votes stay exact in 64 bits
PIECE, PIECE_RANKS = "delta.", "delta-ranks."  # names of a piece's records, its digest behind
LARGEST = 1e12  # of an update's numbers: their products must stay finite in float32
MAX_METRICS = 64
MAX_VALUE = 1e100  # of a metric; sums over clients, weighted by examples, stay finite
MAX_NAME = 64
FLOAT32 = np.dtype("<f4")
MAX_DETAIL = 300  # characters of what is said about a message; its own words are among them


class Rejected(Exception):
    """A message that fails a check: `reason` is a short fixed word for counting, the text has the figures."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail[:MAX_DETAIL]}")
        self.reason = reason


# -- arrays ---------------------------------------------------------------------------------------------------------
def to_record(arrays: Coded | Arrays) -> ArrayRecord:
    """Arrays as an ArrayRecord, parts in the fixed order of PARTS."""
    return ArrayRecord({part: Array(arrays[part]) for part in PARTS if part in arrays})


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
        shape, fortran, found = np.lib.format.read_array_header_1_0(stream)
    except Rejected:
        raise
    except Exception as error:  # numpy parses the header as Python literals: whatever goes wrong there is one reason
        raise Rejected("format", f"{name} has no readable npy header ({str(error)[:80]})") from None
    if shape != (length,) or fortran or found != dtype:
        raise Rejected("shape", f"{name}'s header says {found} {shape[:4]}, expected {expected}")
    start = stream.tell()
    size = dtype.itemsize * length
    if len(array.data) - start != size:
        raise Rejected("format", f"{name} has {len(array.data) - start} bytes of data, expected {size}")
    vector = np.frombuffer(array.data, dtype=dtype, offset=start)
    if not np.isfinite(vector).all():
        raise Rejected("not-finite", f"{name} has {int((~np.isfinite(vector)).sum())} numbers that are not finite")
    return vector


def read_arrays(
    content: RecordDict, spec: ModelSpec, mask: RankMask, parts: frozenset[str], entries: int = 0, form: str = "float32"
) -> Arrays:
    """Exactly `parts`, packed under `mask` and sent in the format `form`, decoded; Rejected otherwise."""
    records = content.array_records
    if "arrays" not in records:
        raise Rejected("records", f"array records {_names(records)}, expected 'arrays'")
    record = records["arrays"]
    if set(record) != parts:
        raise Rejected("parts", f"parts {_names(record)}, expected {sorted(parts)}")
    if entries > (most := dense_size(spec)):
        raise Rejected("plan", f"{entries} entries of the backbone, it has {most}")
    return {part: _decode(record[part], spec.row_lengths(part, mask, entries), part, form) for part in PARTS if part in parts}


def _decode(array: Array, rows: Ints, name: str, form: str) -> Vector:
    codec = CODECS[form]
    coded = read_vector(array, codec.length(rows), name, codec.dtype)
    try:
        vector = codec.decode(coded, rows)
    except ValueError as error:
        raise Rejected("codes", f"{name}: {error}") from None
    if not np.isfinite(vector).all():
        raise Rejected("not-finite", f"{name} is decoded to numbers that are not finite")
    return vector


def _names(record: Any) -> list[str]:
    return sorted(str(name)[:MAX_NAME] for name in record)[:8]


# -- the plan ---------------------------------------------------------------------------------------------------------
def plan_to_content(plan: TrainPlan, arrays: Coded | Arrays, pieces: Sequence[Piece] = ()) -> RecordDict:
    """A TRAIN message: the plan, the arrays as they travel, and pieces of the delta that the client lacks."""
    config: dict[str, Any] = {key: getattr(plan, name) for key, name in _SCALARS.items()}
    config |= {
        "protocol": PROTOCOL,
        "ranks": list(_shorten(plan.mask.ranks)),
        "scales": list(_shorten(plan.scales)),
    }
    config |= {key: ",".join(sorted(getattr(plan, key))) for key in _SETS if getattr(plan, key)}
    if len(plan.mask.bits):
        config["mask"] = plan.mask.to_bytes()
    if plan.delta:
        config["delta"] = list(plan.delta)
    if plan.feedback:
        config["run"] = plan.run
    for term, parameters in plan.terms.items():
        config[f"term.{term}"] = True
        config |= {f"term.{term}.{name}": float(value) for name, value in parameters.items()}
    content = RecordDict({"arrays": to_record(arrays), "plan": ConfigRecord(config)})
    for piece in pieces:
        content[PIECE + piece.digest] = ArrayRecord({name: Array(vector) for name, vector in sorted(piece.arrays.items())})
        if piece.ranks:
            content[PIECE_RANKS + piece.digest] = ConfigRecord({"ranks": list(_shorten(piece.ranks))})
    return content


def read_pieces(content: RecordDict, spec: ModelSpec) -> list[Piece]:
    """Pieces of the delta that came with a plan, on the client.

    Raises:
        Rejected: a piece does not fit the model, or is not what its digest says.
    """
    found = []
    for name, record in content.array_records.items():
        if not name.startswith(PIECE):
            continue
        digest = name.removeprefix(PIECE)
        config: Any = content.config_records.get(PIECE_RANKS + digest, {})
        try:
            given = [_read_scalar("ranks", rank, "int") for rank in config["ranks"]] if "ranks" in config else []
            ranks = tuple(_lengthen(given, len(spec.modules))) if "ranks" in config else ()
        except (ValueError, TypeError) as error:
            raise Rejected("delta", f"a piece does not fit this model ({str(error)[:80]})") from None
        lengths = piece_lengths(spec, ranks)
        if set(record) != set(lengths):
            raise Rejected("parts", f"a delta has {_names(record)}, expected {sorted(lengths)}")
        piece = Piece(ranks, {part: read_vector(record[part], length, part) for part, length in lengths.items()})
        if piece.digest != digest:
            raise Rejected("delta", f"a piece has sha256 {piece.digest[:16]}, announced was {digest[:16]!r}")
        found.append(piece)
    return found


def plan_from_content(content: RecordDict, modules: int) -> TrainPlan:
    """The inverse of `plan_to_content`, on the client.

    Raises:
        Rejected: another protocol version, or a plan that does not fit a model of `modules` modules.
    """
    config: Any = content.config_records.get("plan")
    if config is None:
        raise Rejected("records", "no record 'plan'")
    if config.get("protocol") != PROTOCOL:
        raise Rejected("protocol", f"the server speaks version {config.get('protocol')!r}, this node {PROTOCOL}")
    try:
        terms: dict[str, dict[str, float]] = {}
        for key in config:
            head, _, rest = key.partition(".")
            if head == "term":
                term, _, name = rest.partition(".")
                parameters = terms.setdefault(term, {})
                if name:
                    parameters[name] = float(config[key])
        ranks = _lengthen([_read_scalar("ranks", r, "int") for r in config["ranks"]], modules)
        known: dict[str, Any] = {name: _read_scalar(key, config[key], _KINDS[key]) for key, name in _SCALARS.items()}
        known |= {key: _read_set(config, key, allowed) for key, allowed in _SETS.items()}
        return TrainPlan(
            **known,
            mask=RankMask.from_bytes(ranks, config.get("mask", b"")),
            scales=tuple(_lengthen([_read_scalar("scales", s, "float") for s in config["scales"]], modules)),
            delta=tuple(str(digest) for digest in config.get("delta", ())),
            run=_read_run(config),
            terms=terms,
        )
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise Rejected("plan", f"the plan does not fit this model ({error!r})") from None


def _read_scalar(key: str, value: Any, kind: str) -> Any:
    """A setting of the plan's own type, numbers finite and not negative; ValueError for any other."""
    if kind == "float" and type(value) in (int, float) and 0 <= value < math.inf:
        return float(value)
    if kind == "int" and type(value) is int and 0 <= value < 2**64:
        return value
    if (kind == "bool" and type(value) is bool) or (kind == "str" and value in _CHOICES[key]):
        return value
    raise ValueError(f"{key} is {str(value)[:MAX_NAME]!r}, allowed is {_CHOICES.get(key, kind)}")


def _read_set(config: ConfigRecord, key: str, allowed: Sequence[str]) -> frozenset[str]:
    names = frozenset(str(config[key]).split(",")) if key in config else frozenset()
    if not names <= set(allowed):
        raise ValueError(f"{key} is {_names(names)}, allowed are {list(allowed)}")
    return names


def _read_run(config: ConfigRecord) -> str:
    run = config.get("run", "")
    if not isinstance(run, str) or len(run) > MAX_NAME or bool(run) != ("feedback" in config):
        raise ValueError(f"run is {str(run)[:MAX_NAME]!r}, allowed with feedback, and only there, is a name up to {MAX_NAME}")
    return run


def sent_parts(plan: TrainPlan) -> frozenset[str]:
    """Parts that an update must carry: the trainable ones, without slot parts where no slot is alive."""
    return frozenset(p for p in plan.trainable if p not in SLOT_PARTS or plan.mask.count)


def _shorten(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return values[:1] if len(set(values)) == 1 else values


def _lengthen(values: list[Any], length: int) -> list[Any]:
    values = values * length if len(values) == 1 else values
    if len(values) != length:
        raise ValueError(f"{len(values)} values for {length} modules")
    return values


# -- the update -------------------------------------------------------------------------------------------------------
def update_to_content(update: Update, plan: TrainPlan, coded: Coded | Arrays | None = None) -> RecordDict:
    """The reply to TRAIN; `coded` is what travels in place of the update's arrays."""
    config: dict[str, Any] = {"protocol": PROTOCOL, "round": plan.server_round}
    if update.vote is not None:
        config["votes"] = pack_bits(update.vote.keep)
        if update.vote.ranks is not None:
            config["slot-ranks"] = update.vote.ranks.astype("<u2").tobytes()
    if "kept" in plan.report and plan.mask.count:
        config["kept"] = pack_bits(update.mask.within(plan.mask))
    metrics: dict[str, Any] = {"num-examples": int(update.num_examples)}
    metrics |= update.metrics
    arrays = to_record(update.arrays if coded is None else coded)
    return RecordDict({"arrays": arrays, "reply": ConfigRecord(config), "metrics": MetricRecord(metrics)})


def need_delta(missing: Sequence[str], server_round: int) -> RecordDict:
    """The reply of a node that lost pieces of the delta: it is sent them within the round."""
    return RecordDict({"reply": ConfigRecord({"protocol": PROTOCOL, "round": server_round, "need-delta": list(missing)})})


def busy(why: str) -> RecordDict:
    """The reply of a node that does not want to train now."""
    return RecordDict({"reply": ConfigRecord({"protocol": PROTOCOL, "busy": why})})


def says_busy(content: RecordDict) -> str:
    """Why the node that sent this does not want to train now, in a line; '' where it says no such thing."""
    why = content.config_records.get("reply", ConfigRecord()).get("busy", "")
    return printable(why[:MAX_DETAIL]) if isinstance(why, str) else ""


def lacks_delta(content: RecordDict, plan: TrainPlan) -> bool:
    """Whether a reply says that pieces of the plan's delta are missing."""
    missing = content.config_records.get("reply", ConfigRecord()).get("need-delta")
    return isinstance(missing, list) and 0 < len(missing) and set(missing) <= set(plan.delta)


def update_from_content(
    content: RecordDict,
    spec: ModelSpec,
    plan: TrainPlan,
    max_examples: int,
    start: Callable[[RankMask], Arrays] = lambda mask: {},
) -> Update:
    """Check a reply against the plan it answers, before any array is materialised, and read it.

    Args:
        max_examples: what the node declared first; more than that is refused.
        start: values to which differences are added, under a mask; called only where the plan asks for differences.

    Raises:
        Rejected: the reply is not what was asked for; the reason is counted and logged.
    """
    if set(content) != {"arrays", "metrics", "reply"} or "reply" not in content.config_records:
        raise Rejected("records", f"records {_names(content)}, expected ['arrays', 'metrics', 'reply']")
    if "metrics" not in content.metric_records:
        raise Rejected("records", "'metrics' is no MetricRecord")
    config, metrics = content.config_records["reply"], content.metric_records["metrics"]
    if config.get("protocol") != PROTOCOL:
        raise Rejected("protocol", f"version {str(config.get('protocol'))[:MAX_NAME]!r}, expected {PROTOCOL}")
    if config.get("round") != plan.server_round:
        raise Rejected("round", f"answers round {str(config.get('round'))[:MAX_NAME]!r}, asked was {plan.server_round}")
    num_examples = check_metrics(metrics, "num-examples", max_examples)
    if "eval-examples" in metrics:
        check_metrics(metrics, "eval-examples", MAX_EXAMPLES)
    vote = _read_vote(config, plan)
    mask = plan.mask
    if plan.upload_mask == "local" and vote is not None:
        mask = mask.keep(vote.keep)
    if "kept" in plan.report and plan.mask.count:
        mask = mask.keep(_read_bits(config, "kept", plan.mask.count))
        if not mask.count:
            raise Rejected("votes", "kept: no slot at all")
    arrays = read_arrays(content, spec, mask, sent_parts(replace(plan, mask=mask)), plan.entries, plan.up)
    if plan.differences:
        before = start(mask)
        with np.errstate(over="ignore"):  # LARGEST is below infinity
            arrays = {part: before[part] + change for part, change in arrays.items()}
    for part, vector in arrays.items():
        largest = float(np.abs(vector).max(initial=0.0))
        if largest > LARGEST:
            raise Rejected("range", f"{part} holds {largest:.3g}, allowed is up to {LARGEST:g}")
    values = {name: float(value) for name, value in metrics.items() if name != "num-examples"}  # type: ignore[arg-type]
    return Update(arrays, mask, num_examples, values, vote)


def check_metrics(metrics: MetricRecord, count: str, limit: int) -> int:
    """The number of examples under `count`; Rejected unless it is whole, from 1 to `limit`, and all metrics up to MAX_VALUE."""
    if len(metrics) > MAX_METRICS or any(len(name) > MAX_NAME for name in metrics):
        raise Rejected("metrics", f"{len(metrics)} metrics, allowed are {MAX_METRICS} with names up to {MAX_NAME}")
    if any(isinstance(value, list) for value in metrics.values()):
        raise Rejected("metrics", "a metric is a list, allowed are numbers")
    value = metrics.get(count)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
        raise Rejected("num-examples", f"{count} is {value!r}, allowed is an integer from 1 to {limit}")
    for name, metric in metrics.items():
        if not abs(float(metric)) <= MAX_VALUE:  # type: ignore[arg-type]
            raise Rejected("not-finite", f"metric {name!r} is {metric!r}")
    return value


def _read_bits(config: ConfigRecord, key: str, count: int) -> Bools:
    value = config.get(key)
    if not isinstance(value, bytes):
        raise Rejected("votes", f"the record {key!r} is missing")
    try:
        return unpack_bits(value, count)
    except ValueError as error:
        raise Rejected("votes", f"{key}: {error}") from None


def _read_vote(config: ConfigRecord, plan: TrainPlan) -> Vote | None:
    if "votes" not in plan.report:
        return None
    count, ranks = plan.mask.count, None
    keep = _read_bits(config, "votes", count)
    if int(keep.sum()) != min(plan.budget, count):
        raise Rejected("votes", f"votes for {int(keep.sum())} slots, allowed are {min(plan.budget, count)}")
    if "scores" in plan.report:
        raw = config.get("slot-ranks")
        if not isinstance(raw, bytes) or len(raw) != 2 * count:
            raise Rejected("votes", f"slot ranks have the wrong size, expected {2 * count} bytes")
        ranks = np.frombuffer(raw, dtype="<u2")
        if not np.array_equal(np.sort(ranks), np.arange(count)):
            raise Rejected("votes", f"slot ranks are no permutation of 0..{count - 1}")
        if not np.array_equal(ranks < plan.budget, keep):
            raise Rejected("votes", "slot ranks and vote contradict each other")
    return Vote(keep, ranks)
