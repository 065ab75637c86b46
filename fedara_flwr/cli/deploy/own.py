"""What a node's own settings come to on this machine, for `fedara deploy check`: where it computes, whether it may now."""

from __future__ import annotations

from fedara_flwr.cli.findings import Finding
from fedara_flwr.keys import ConfigError
from fedara_flwr.node.settings import NodeSettings


def device(node: NodeSettings) -> Finding:
    """On which device the node computes, and whether it is there."""
    from fedara_flwr.client.session import pick_device

    try:
        return Finding("ok", pick_device(node))
    except ConfigError as error:
        return Finding("problem", str(error), "see node.toml, and whether torch was installed for this GPU")


def busy_when(node: NodeSettings) -> Finding:
    """What the node's busy-when answers now; one that fails keeps the node out for good."""
    if not node.busy_when:
        return Finding("ok", "none: the node trains whenever it is asked")
    why = node.busy()
    if not why:
        return Finding("ok", f"free, by {node.busy_when}")
    if why.startswith("busy-when ") or "cannot be checked" in why:
        return Finding("problem", why, "the node takes part in no round until this can be told: docs/phone.md")
    return Finding("warning", f"busy: {why}", "the node takes part in no round while this is so")
