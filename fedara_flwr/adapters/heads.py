"""The head that a checkpoint brings: kept where its labels are the run's, else a line says why it is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from fedara_flwr.keys import ConfigError

SHOWN = 3  # label names in a line
Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]


def other_shapes(name: str, info: Mapping[str, Any], below: str) -> Shapes:
    """Parameters that the checkpoint has in another shape, (there, needed), all of them of the head.

    Args:
        name: as `model.name`.
        info: transformers' loading report.
        below: the top-level module with the blocks, beside which a head is; '' = there is no head.

    Raises:
        ConfigError: one is not of the head.
    """
    found = {key: (tuple(there), tuple(needed)) for key, there, needed in sorted(info["mismatched_keys"])}
    for key, (there, needed) in found.items():
        if below in ("", key.split(".")[0]):
            line = f"{key} has shape {there} in the checkpoint, by its config.json it needs {needed}"
            raise ConfigError(f"model.name = {name!r}: {line}")
    return found


def order(
    labels: Sequence[str], published: Sequence[str], head: Sequence[str], layer: Sequence[str], missing: Set[str], other: Shapes
) -> tuple[list[int] | None, str]:
    """Where the checkpoint's head has each of the run's labels; None where it cannot be kept, and why ('' = it has none).

    Args:
        labels: the run's; () where the task has none.
        published: the checkpoint's.
        head: names of the head's parameters.
        layer: of these, those that belong to the task layer.
        missing: parameters that the checkpoint lacks.
        other: as `other_shapes`.
    """
    if other:
        there, needed = list(other.values())[-1]
        return None, f"the checkpoint's has {there[0]} outputs, the run needs {needed[0]}"
    if not set(layer) - missing:
        return None, ""
    if lacking := sorted(set(head) & missing):
        return None, f"the checkpoint has a part of it alone, without {lacking[0]}"
    if labels and sorted(labels) != sorted(published):
        shown = ", ".join(map(repr, published[:SHOWN])) + (", …" if len(published) > SHOWN else "")
        return None, f"the checkpoint's is for other labels ({shown or 'its id2label has gaps'})"
    return [list(published).index(label) for label in labels], ""
