"""Parts: the named arrays that travel between server and clients, or stay where they are. Each is declared here, once.

A *slot part* has so many numbers for each rank slot of a module: B, E and A of ΔW = s·B·diag(E)·A. The adapted layer computes
with these three and no other, so no package can add one. A *parameter part* is a set of the model's own parameters: the head,
the whole backbone, or what another package declares with the entry-point group `fedara_flwr.parts` (an entry's name is the
part's name), for example all biases (BitFit, arXiv 2106.10199). Of the head its values travel, of every other parameter part
the differences from the pre-trained values.

Code asks a part what it is; a name that nobody declared is refused, never left out.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING

from fedara_flwr.plugins import offered

if TYPE_CHECKING:
    from fedara_flwr.model.spec import ModuleSpec
    from fedara_flwr.training import LocalTraining

logger = logging.getLogger(__name__)
GROUP = "fedara_flwr.parts"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
RESERVED = frozenset({"delta", "mask", "statistics", "other"})  # what the byte meter calls something else


@dataclass(frozen=True)
class Part:
    """The declaration of one part.

    Attributes:
        name: how plans, messages, byte counts and checkpoints call it.
        rate: its AdamW learning rate, of the round's training settings.
        width: numbers per slot of a module; None for a parameter part.
        holds: whether the backbone's parameter of this name belongs to it; None for slot parts and the head.
        absent: what each number counts as where arrays do not have the part: 1 for E, which makes LoRA of B·diag(E)·A; None
            where the part must be there.
        coarse: whether its values may go down in four bits. Four bits of a head's are no head; differences may always.
    """

    name: str
    rate: Callable[[LocalTraining], float]
    width: Callable[[ModuleSpec], int] | None = None
    holds: Callable[[str], bool] | None = None
    absent: float | None = None
    coarse: bool = True

    @property
    def slots(self) -> bool:
        """Whether it has numbers for each rank slot."""
        return self.width is not None


B = Part("B", lambda train: train.learning_rate, width=lambda module: module.d_out)
E = Part("E", lambda train: train.learning_rate * train.e_lr_factor, width=lambda module: 1, absent=1.0)
A = Part("A", lambda train: train.learning_rate, width=lambda module: module.d_in)
HEAD = Part("head", lambda train: train.head_learning_rate, coarse=False)
BACKBONE = Part("backbone", lambda train: train.learning_rate, holds=lambda name: True)
BUILT_IN = {part.name: part for part in (B, E, A, HEAD, BACKBONE)}
SLOT_PARTS = tuple(part.name for part in BUILT_IN.values() if part.slots)
LORA = frozenset({"B", "A", "head"})
SVD = frozenset({"B", "E", "A", "head"})


@lru_cache
def declared() -> dict[str, Part]:
    """All parts by name: the built-in ones in a fixed order, then those of installed packages by name.

    A declaration that cannot be used is left out with a warning; whoever needs it is told that it is not declared.
    """
    offers = offered(GROUP, "part", {*BUILT_IN, *RESERVED}, _unfit)
    for plugin in offers:
        if plugin.offer is None:
            logger.warning("part %r of %s cannot be used: %s", plugin.name, plugin.package, plugin.reason)
    return BUILT_IN | {plugin.name: plugin.offer for plugin in offers if plugin.offer is not None}


def _unfit(part: object, point: EntryPoint) -> str:
    """Why what an entry point names is no part that can be added; '' where it is one."""
    if not isinstance(part, Part) or part.holds is None or part.slots:
        return f"{point.value} is no Part of the backbone's parameters (with `holds`, without `width`)"
    if not NAME.fullmatch(part.name):  # names travel in lists, joined by commas
        return f"{point.value} has the name {part.name!r}, allowed are letters, digits, '.', '_' and '-'"
    return "" if part.name == point.name else f"{point.value} has the name {part.name!r}, its entry point {point.name!r}"


def part(name: str) -> Part:
    """The part of this name.

    Raises:
        ValueError: nobody declared it.
    """
    if name in BUILT_IN:  # without loading what packages offer
        return BUILT_IN[name]
    try:
        return declared()[name]
    except KeyError:
        raise ValueError(f"part {name!r:.80} is not declared, declared are {', '.join(declared())}") from None


def is_slot_part(name: str) -> bool:
    """Whether a part has numbers for each rank slot; ValueError where it is not declared."""
    return part(name).slots


def of_backbone(names: Iterable[str]) -> bool:
    """Whether any of these parts consists of the backbone's own parameters; ValueError where one is not declared."""
    return any(part(name).holds is not None for name in names)


def in_order(names: Iterable[str]) -> list[str]:
    """These parts in the order in which all code goes through parts; ValueError where one is not declared."""
    names = set(names)
    for name in sorted(names):
        part(name)
    return [name for name in declared() if name in names]
