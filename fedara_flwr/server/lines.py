"""What a round leaves in metrics.jsonl, from what came back and what has become of the model."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Message, MetricRecord

from fedara_flwr.server.fleet import Profile, device_cost, round_cost
from fedara_flwr.server.round import Line, Round
from fedara_flwr.server.state import ServerState
from fedara_flwr.wire.arrays import Rejected
from fedara_flwr.wire.meter import ByteMeter
from fedara_flwr.wire.records import MAX_EXAMPLES, check_metrics

logger = logging.getLogger(__name__)


def round_line(work: Round, state: ServerState, evaluated: Mapping[str, Any], profiles: Mapping[str, Profile | None]) -> Line:
    """The round's line but for bytes and seconds; each simulated client's line gets its modelled cost.

    Args:
        evaluated: the server's metrics of the model after the round.
        profiles: the device that each asked client stands for, None for a real one.
    """
    return {
        "type": "round",
        "round": work.number,
        **evaluated,
        **client_means(work.records),
        **work.merging,
        **work.coding,
        **modelled(work.records, profiles),
        **slots(state),
        "alive-sent": sum(plan.mask.count for plan in work.plans) / max(len(work.plans), 1),
        "bytes-kept": max((state.delta.nbytes(plan.delta) for plan in work.plans), default=0),
        "sampled": [node.key for node in work.asked],
        "good": work.good,
        "dropped": [vars(drop) for drop in work.drops],
    }


def start_line(
    state: ServerState,
    evaluated: Mapping[str, Any],
    clients: Sequence[Line],
    asked: Sequence[str],
    profiles: Mapping[str, Profile | None],
) -> Line:
    """The line of what was before round 1, but for bytes and seconds: metrics, and what the head was solved from.

    Args:
        clients: lines of those that told sums, which get their modelled cost.
        asked: keys of those that were asked for them.
    """
    costs = modelled(clients, profiles) if clients else {}
    line = {"type": "start", **evaluated, **costs, **slots(state), "sampled": list(asked), "good": len(clients)}
    return {**line, "head": state.solved} if state.solved else line


def summary(name: str, state: ServerState, head: int, kept: Iterable[str]) -> str:
    """A run's first line: the method's name, and how many modules, slots and numbers of the head it starts with."""
    line = f"{name}: {len(state.mask.ranks)} modules, {state.mask.count} slots, head of {head}"
    if stays := ", ".join(sorted(kept)):
        line += f"; each client keeps its own {stays}: the server's figures and export are of what was last sent of it"
    return line


def slots(state: ServerState) -> Line:
    """How many rank slots there are, live, and live in each module."""
    mask = state.mask
    return {
        "slots": sum(mask.ranks),
        "alive": mask.count,
        "alive-per-module": mask.alive.tolist(),
        "dead-modules": mask.dead_modules,
    }


def client_means(lines: Sequence[Line]) -> dict[str, float]:
    """Means over the round's good clients of what they report: training loss, and metrics of what they received."""
    means: dict[str, float] = {}
    evaluated = shared_metrics([line for line in lines if "eval-examples" in line])
    for name, count in [
        ("loss", "num-examples"),
        ("coding-error", "num-examples"),
        ("feedback-norm", "num-examples"),
        *((name, "eval-examples") for name in evaluated),
    ]:
        pairs = [(float(line[count]), float(line[name])) for line in lines if name in line and count in line]  # type: ignore[arg-type]
        if pairs:
            means[f"client-{name}"] = math.fsum(n * value for n, value in pairs) / math.fsum(n for n, _ in pairs)
    return means


def client_evaluation(replies: Iterable[Message], meter: ByteMeter) -> MetricRecord | None:
    """Means of the replies to EVALUATE, weighted by held-out examples, as `client-eval-…`; a bad reply is left out."""
    good: list[tuple[int, dict[str, float]]] = []
    for reply in replies:
        try:
            if reply.has_error():
                raise Rejected(f"error-{reply.error.code}", str(reply.error.reason)[-300:])
            meter.count("up", reply.content)
            metrics = reply.content.metric_records.get("metrics", MetricRecord())
            examples = check_metrics(metrics, "eval-examples", MAX_EXAMPLES)
            good.append((examples, {name: float(value) for name, value in metrics.items()}))  # type: ignore[arg-type]
        except Rejected as error:
            logger.warning("evaluation of node %d left out: %s", reply.metadata.src_node_id, error)
    if not good:
        return None
    total = sum(examples for examples, _ in good)
    # fsum: the last bits must not depend on the order of the replies
    names = shared_metrics([values for _, values in good])
    means = {name: math.fsum(k * values[name] for k, values in good) / total for name in names}
    return MetricRecord({**{f"client-{name}": value for name, value in means.items()}, "clients": len(good)})


def shared_metrics(reports: Sequence[Mapping[str, object]]) -> list[str]:
    """Metrics of an evaluation that every client reports."""
    names = set.intersection(*(set(report) for report in reports)) if reports else set()
    return sorted(name for name in names if name.startswith("eval-") and name != "eval-examples")


def modelled(lines: Sequence[Line], profiles: Mapping[str, Profile | None]) -> Line:
    """Seconds and joules of the round on the fleet's devices, by the modelled clock; {} unless all nodes are simulated.

    Each client's line gets its own. A client whose reply did not count is left out: what it did is not known.
    """
    costs = []
    for line in lines:
        profile = profiles[str(line["client"])]
        if profile is None or "flops-forward" not in line or "flops-backward" not in line:
            return {}
        flops = max(0.0, float(line["flops-forward"]) + float(line["flops-backward"]))  # type: ignore[arg-type]
        down, up = (sum(line[name].values()) for name in ("bytes-down", "bytes-up"))  # type: ignore[attr-defined]
        cost = device_cost(profile, flops, down, up)
        costs.append(cost)
        line |= {"modelled-device": profile.name, "modelled-seconds": cost.seconds, "modelled-joules": cost.joules}
    return {f"modelled-{name}": value for name, value in vars(round_cost(costs)).items()}
