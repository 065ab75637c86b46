"""Methods: one file each, registered by name; another package adds one with the entry-point group `fedara_flwr.strategies`."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeVar

from fedara_flwr.config import ConfigError, nearest

if TYPE_CHECKING:
    from fedara_flwr.strategies.base import BaseStrategy

GROUP = "fedara_flwr.strategies"
_REGISTERED: dict[str, type[BaseStrategy]] = {}
S = TypeVar("S", bound="type[BaseStrategy]")


def register(cls: S) -> S:
    """Decorator: make a method known by its `name`.

    Raises:
        ValueError: another class has that name already.
    """
    known = _REGISTERED.get(cls.name)
    if not cls.name or (known is not None and known.__qualname__ != cls.__qualname__):
        raise ValueError(f"{cls.__qualname__}: the method name {cls.name!r} is empty or taken")
    _REGISTERED[cls.name] = cls
    return cls


def methods() -> dict[str, type[BaseStrategy]]:
    """All methods by name: built in, and those of installed packages (which never replace a built-in one)."""
    from fedara_flwr.strategies import fedara, fedara_static, fedlora, head  # noqa: F401

    found = dict(_REGISTERED)
    for point in entry_points(group=GROUP):
        if point.name not in found:
            found[point.name] = point.load()
    return dict(sorted(found.items()))


def find(name: str) -> type[BaseStrategy]:
    """The method `name`; ConfigError with the nearest name where there is none."""
    known = methods()
    if name not in known:
        raise ConfigError(f"method = {name!r}: allowed are {', '.join(known)}{nearest(name, known)}")
    return known[name]
