"""TrainPlan and Update ⇄ Flower records. Reading an Update checks everything that can be checked without the model.

A message holds `arrays` (ArrayRecord: one vector per part, in the plan's format) and `plan` or `reply` (ConfigRecord); a plan
also the pieces of the delta that the client lacks, always float32, since their digests name them; an update `metrics`
(MetricRecord). Empty strings and lists never enter a ConfigRecord: Flower cannot count their bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from pydantic import ValidationError

from fedara_flwr.config import Format
from fedara_flwr.keys import Scalar
from fedara_flwr.log import printable
from fedara_flwr.model import parts
from fedara_flwr.model.deltas import Piece, piece_lengths
from fedara_flwr.model.ranks import Bools, RankMask, pack_bits, unpack_bits
from fedara_flwr.model.spec import Arrays, ModelSpec
from fedara_flwr.training import LocalTraining
from fedara_flwr.wire import PROTOCOL
from fedara_flwr.wire.arrays import MAX_DETAIL, MAX_NAME, Rejected, read_arrays, read_vector, short, to_record
from fedara_flwr.wire.codec import Coded
from fedara_flwr.wire.plan import KEPT_SLOTS, TrainPlan, Update

# what a plan holds beside sets of names and its training settings: key -> field of TrainPlan
_SCALARS = {
    "round": "server_round",
    "seed": "seed",
    "evaluate": "evaluate",
    "draw-seed": "draw_seed",
    "entries": "entries",
    "down": "down",
    "up": "up",
}
_KINDS = {key: TrainPlan.__annotations__[name] for key, name in _SCALARS.items()}
_CHOICES = dict.fromkeys(("down", "up"), get_args(Format))
_PART_SETS = ("sent", "kept", "carries", "drawn", "feedback")
_TRAINING = {f"train.{field.alias}": name for name, field in LocalTraining.model_fields.items()}
MAX_EXAMPLES = 2**31  # per node; sums of weighted votes stay exact in 64 bits
PIECE, PIECE_RANKS = "delta.", "delta-ranks."  # names of a piece's records, its digest behind
REPORT = "report."  # names of terms' reports, the term behind
LARGEST_VALUE = 1e12  # of an update's numbers: their products must stay finite in float32
MAX_METRICS = 64
MAX_VALUE = 1e100  # of a metric; sums over clients, weighted by examples, stay finite
REPORT_BYTES_PER_SLOT, REPORT_BYTES = 16, 1 << 16  # a report may have so many for each slot of the plan, and as many more


# -- the plan ---------------------------------------------------------------------------------------------------------
def plan_to_content(plan: TrainPlan, arrays: Coded | Arrays, pieces: Sequence[Piece] = ()) -> RecordDict:
    """A TRAIN message: the plan, the arrays as they travel, and pieces of the delta that the client lacks."""
    config: dict[str, Any] = {key: getattr(plan, name) for key, name in _SCALARS.items()}
    config |= {key: getattr(plan.train, name) for key, name in _TRAINING.items()}
    config |= {
        "protocol": PROTOCOL,
        "ranks": list(_shorten(plan.mask.ranks)),
        "scales": list(_shorten(plan.scales)),
    }
    config |= {key: ",".join(sorted(getattr(plan, key))) for key in (*_PART_SETS, "report") if getattr(plan, key)}
    if len(plan.mask.bits):
        config["mask"] = plan.mask.to_bytes()
    if plan.class_shares:
        config["class-shares"] = list(plan.class_shares)
    if plan.delta:
        config["delta"] = list(plan.delta)
    if plan.run:
        config["run"] = plan.run
    for term, parameters in plan.terms.items():
        config[f"term.{term}"] = True
        config |= {f"term.{term}.{name}": _term_value(value) for name, value in parameters.items()}
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
    pieces = []
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
            raise Rejected("parts", f"a delta has {short(record)}, expected {sorted(lengths)}")
        piece = Piece(ranks, {part: read_vector(record[part], length, part) for part, length in lengths.items()})
        if piece.digest != digest:
            raise Rejected("delta", f"a piece has sha256 {piece.digest[:16]}, announced was {digest[:16]!r}")
        pieces.append(piece)
    return pieces


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
        ranks = _lengthen([_read_scalar("ranks", r, "int") for r in config["ranks"]], modules)
        known: dict[str, Any] = {name: _read_scalar(key, config[key], _KINDS[key]) for key, name in _SCALARS.items()}
        known |= {key: frozenset(parts.in_order(_names(config, key))) for key in _PART_SETS}
        return TrainPlan(
            **known,
            mask=RankMask.from_bytes(ranks, config.get("mask", b"")),
            scales=tuple(_lengthen([_read_scalar("scales", s, "float") for s in config["scales"]], modules)),
            train=_read_training(config),
            report=_names(config, "report"),
            class_shares=tuple(_read_scalar("class-shares", share, "float") for share in _list(config, "class-shares")),
            delta=tuple(str(digest) for digest in config.get("delta", ())),
            run=_read_run(config),
            terms=_read_terms(config),
        )
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise Rejected("plan", f"the plan does not fit this model ({error!r})") from None


def _list(config: Mapping[str, Any], key: str) -> list[Any]:
    """A list of the plan, [] where it is absent; ValueError for anything else."""
    value = config.get(key, [])
    if not isinstance(value, list):
        raise ValueError(f"{key} is {str(value)[:MAX_NAME]!r}, allowed is a list")
    return value


def _read_scalar(key: str, value: Any, kind: str) -> Any:
    """A setting of the plan's own type, numbers finite and not negative; ValueError for any other."""
    if kind == "float" and type(value) in (int, float) and 0 <= value < math.inf:
        return float(value)
    if kind == "int" and type(value) is int and 0 <= value < 2**64:
        return value
    if (kind == "bool" and type(value) is bool) or (kind == "str" and value in _CHOICES[key]):
        return value
    raise ValueError(f"{key} is {str(value)[:MAX_NAME]!r}, allowed is {_CHOICES.get(key, kind)}")


def _read_training(config: ConfigRecord) -> LocalTraining:
    """The training settings, checked by their own bounds; ValueError where one is missing, unknown or not allowed."""
    if missing := _TRAINING.keys() - config.keys():
        raise ValueError(f"{min(missing)} is missing")
    given = {key.removeprefix("train."): value for key, value in config.items() if key.startswith("train.")}
    try:
        return LocalTraining.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0])[:MAX_NAME] if first["loc"] else ""
        raise ValueError(f"train.{key} is {str(first['input'])[:MAX_NAME]!r}: {first['msg']}") from None


def _read_terms(config: ConfigRecord) -> dict[str, dict[str, Scalar]]:
    terms: dict[str, dict[str, Scalar]] = {}
    for key, value in config.items():
        head, _, rest = key.partition(".")
        if head == "term":
            term, _, name = rest.partition(".")
            parameters = terms.setdefault(term, {})
            if name:
                parameters[name] = _term_value(value)
    return terms


def _term_value(value: Any) -> Scalar:
    """A term's parameter: a number, which becomes a float, or a text that can be shown; ValueError for anything else."""
    if isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable():
        return value
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    raise ValueError(f"a term's parameter is {str(value)[:MAX_NAME]!r}, allowed are finite numbers and short texts")


def _names(config: ConfigRecord, key: str) -> frozenset[str]:
    """The names under `key`, which are joined by commas; none where it is not there."""
    return frozenset(name[:MAX_NAME] for name in str(config[key]).split(",")) if key in config else frozenset()


def _read_run(config: ConfigRecord) -> str:
    run = config.get("run", "")
    if not isinstance(run, str) or len(run) > MAX_NAME or bool(run) != ("feedback" in config or "kept" in config):
        raise ValueError(
            f"run is {str(run)[:MAX_NAME]!r}, allowed with feedback or kept, and only there, is a name up to {MAX_NAME}"
        )
    return run


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
    config |= {REPORT + term: report for term, report in update.reports.items()}
    if KEPT_SLOTS in plan.report and plan.mask.count:
        config[KEPT_SLOTS] = pack_bits(update.mask.within(plan.mask))
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
    read: Callable[[TrainPlan, str, bytes], Any] = lambda plan, term, report: report,
) -> Update:
    """Check a reply against the plan it answers, before any array is materialised, and read it.

    Args:
        max_examples: what the node declared first; more than that is refused.
        start: values to which differences are added, under a mask; called only where the plan asks for differences.
        read: what a term's report says; it raises ValueError where that cannot be what the plan asked for.

    Raises:
        Rejected: the reply is not what was asked for; the reason is counted and logged.
    """
    if set(content) != {"arrays", "metrics", "reply"} or "reply" not in content.config_records:
        raise Rejected("records", f"records {short(content)}, expected ['arrays', 'metrics', 'reply']")
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
    reports = _read_reports(config, plan, read)
    mask = plan.mask
    if KEPT_SLOTS in plan.report and mask.count:
        mask = mask.keep(_read_bits(config, KEPT_SLOTS, mask.count))
        if not mask.count:
            raise Rejected("report", f"{KEPT_SLOTS}: no slot at all")
    arrays = read_arrays(content, spec, mask, plan.returns(mask), plan.entries, plan.up)
    if plan.differences:
        before = start(mask)
        with np.errstate(over="ignore"):  # LARGEST_VALUE is below infinity
            arrays = {part: before[part] + change for part, change in arrays.items()}
    for part, vector in arrays.items():
        largest = float(np.abs(vector).max(initial=0.0))
        if largest > LARGEST_VALUE:
            raise Rejected("range", f"{part} holds {largest:.3g}, allowed is up to {LARGEST_VALUE:g}")
    values = {name: float(value) for name, value in metrics.items() if name != "num-examples"}  # type: ignore[arg-type]
    return Update(arrays, mask, num_examples, values, reports)


def _read_reports(config: ConfigRecord, plan: TrainPlan, read: Callable[[TrainPlan, str, bytes], Any]) -> Mapping[str, Any]:
    """What the plan's terms report, in the order of their names."""
    reports, most = {}, REPORT_BYTES + REPORT_BYTES_PER_SLOT * plan.mask.count
    for term in sorted(plan.report - {KEPT_SLOTS}):
        report = config.get(REPORT + term)
        if not isinstance(report, bytes) or len(report) > most:
            raise Rejected("report", f"of term {term!r} there is none, or more than {most} bytes")
        try:
            reports[term] = read(plan, term, report)
        except ValueError as error:
            raise Rejected("report", f"of term {term!r}: {error}") from None
    return reports


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
        raise Rejected("report", f"the record {key!r} is missing")
    try:
        return unpack_bits(value, count)
    except ValueError as error:
        raise Rejected("report", f"{key}: {error}") from None
