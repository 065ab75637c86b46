"""What installed packages offer under an entry-point group, sound or broken; a stranger's code must not end a run of others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from fedara_flwr.log import error_line

T = TypeVar("T")


@dataclass(frozen=True)
class Plugin(Generic[T]):
    """What one entry point offers; a broken one has nothing but a reason, in one line."""

    name: str
    package: str
    offer: T | None
    reason: str = ""


def offered(
    group: str, kind: str, taken: Iterable[str], unfit: Callable[[object, EntryPoint], str], name: str | None = None
) -> list[Plugin]:
    """Everything under `group`, in the order of names; the first of two with one name keeps it.

    Args:
        kind: the word for what is offered, for example "task".
        taken: names that this package has itself: a plug-in never replaces them.
        unfit: why what an entry point names cannot be used; '' where it can.
        name: only what has that name; nothing else is loaded then.
    """
    owners = dict.fromkeys(taken, "this package")
    plugins: list[Plugin] = []
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        if name is not None and point.name != name:
            continue
        package = f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed package"
        if point.name in owners:
            plugins.append(Plugin(point.name, package, None, f"{owners[point.name]} has a {kind} of that name"))
            continue
        offer = None
        try:
            offer = point.load()
            reason = unfit(offer, point)
        except (Exception, SystemExit) as error:
            reason = error_line(error)
        plugins.append(Plugin(point.name, package, None if reason else offer, reason))
        if not reason:
            owners[point.name] = package
    return plugins
