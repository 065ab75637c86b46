"""What a run knows of nodes by name: who one is, what all must agree on, and words on those that are missing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Expected:
    """What every node must agree on; `data` is compared with nodes that hold a share of the run's own data."""

    fingerprint: str
    tokenizer: str
    data: str
    labels: tuple[str, ...]
    terms: frozenset[str]
    parts: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Node:
    """A node that answered `whoami`; a simulated one, which the server knows, has a profile in place of a clock of its own."""

    key: str
    node_id: int
    partitions: int
    simulated: bool = False


def node_name(node_id: int) -> str:
    """A name for a node that is no client's key, which has no blanks."""
    return f"node {node_id}"


def missing(there: int, wanted: int, key: str, silent: int, simulated: bool) -> str:
    """Which nodes are not there, by which key they are wanted, and what to look at.

    Args:
        silent: nodes that are online and do not say who they are.
    """
    more = f", {silent} more online and silent" if silent else ""
    return f"{there} of {wanted} nodes are there ({key}){more}; {advice(simulated)}"


def advice(simulated: bool) -> str:
    """What to look at where nodes are missing."""
    if simulated:
        return "are there free cores and memory for federation.toml's clients? `fedara run -v` shows Ray's lines"
    return "`sh flwr.sh supernode list` shows who is online, `fedara deploy check` on a device what it lacks"
