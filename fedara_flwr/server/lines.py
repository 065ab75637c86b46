"""What a round leaves in metrics.jsonl, from what came back and what has become of the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedara_flwr.server.fleet import Profile, device_cost, round_cost
from fedara_flwr.server.round import Line, Round, weight_cap
from fedara_flwr.server.state import ServerState

FLOPS = ("flops-forward", "flops-backward", "flops-below")
"""What a simulated client counts of its passes (client/step.count_flops)."""


def round_line(
    work: Round, state: ServerState, evaluated: Mapping[str, Any], profiles: Mapping[str, Profile | None], cap: float = 0.0
) -> Line:
    """The round's line but for bytes and seconds; each simulated client's line gets its modelled cost.

    Args:
        evaluated: the server's metrics of the model after the round.
        profiles: the device that each asked client stands for, None for a real one.
        cap: `strategy.weight-cap`.
    """
    return {
        "type": "round",
        "round": work.number,
        **evaluated,
        **client_means(work.records, cap),
        **work.merging,
        **work.coding,
        **modelled(work.records, profiles),
        **slots(state),
        "alive-sent": sum(plan.mask.count for plan in work.plans) / max(len(work.plans), 1),
        "bytes-kept": max((state.delta.nbytes(plan.delta) for plan in work.plans), default=0),
        "sampled": [node.key for node in work.asked],
        "good": work.good,
        **({"cut": work.cut} if work.cut else {}),
        "dropped": [vars(drop) for drop in work.drops],
        "sitting-out": work.sitting,
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
    size = f"head of {head:,} numbers" if head else "no head"
    line = f"{name}: {len(state.mask.ranks)} modules, {state.mask.count:,} slots, {size}"
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


def client_means(lines: Sequence[Line], cap: float = 0.0) -> dict[str, float]:
    """Means over good clients of what they report, such as training loss, and metrics of what they received.

    Each weighs by the examples that it says they are of, at most `cap` times the median of what all say; 0 = no cap.
    """
    means: dict[str, float] = {}
    evaluated = sorted({name for line in lines for name in line if name.startswith("eval-")} - {"eval-examples"})
    for name, count in [
        ("loss", "num-examples"),
        ("coding-error", "num-examples"),
        ("feedback-norm", "num-examples"),
        *((name, "eval-examples") for name in evaluated),
    ]:
        pairs = [(int(line[count]), float(line[name])) for line in lines if name in line and count in line]  # type: ignore[call-overload, arg-type]
        if pairs:
            most = weight_cap(cap, [n for n, _ in pairs])
            # fsum: the last bits must not depend on the order of the replies
            total = math.fsum(min(n, most) for n, _ in pairs)
            means[f"client-{name}"] = math.fsum(min(n, most) * value for n, value in pairs) / total
    return means


def modelled(lines: Sequence[Line], profiles: Mapping[str, Profile | None]) -> Line:
    """Seconds and joules of the round on the fleet's devices, by the modelled clock; {} unless all nodes are simulated.

    Each client's line gets its own. A client whose reply did not count is left out: what it did is not known.
    """
    costs = []
    for line in lines:
        profile = profiles[str(line["client"])]
        if profile is None or not line.keys() >= set(FLOPS):
            return {}
        flops = max(0.0, sum(float(line[name]) for name in FLOPS))  # type: ignore[arg-type,misc]
        down, up = (sum(line[name].values()) for name in ("bytes-down", "bytes-up"))  # type: ignore[attr-defined]
        cost = device_cost(profile, flops, down, up)
        costs.append(cost)
        line |= {"modelled-device": profile.name, "modelled-seconds": cost.seconds, "modelled-joules": cost.joules}
    return {f"modelled-{name}": value for name, value in vars(round_cost(costs)).items()}
