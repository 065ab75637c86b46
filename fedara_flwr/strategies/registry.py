"""Which methods there are: the built-in ones, and those of packages with the entry-point group `fedara_flwr.strategies`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel

from fedara_flwr.config import ConfigError, nearest

if TYPE_CHECKING:
    from fedara_flwr.strategies.base import Method

GROUP = "fedara_flwr.strategies"
PACKAGE = f"{__name__.rpartition('.')[0]}."
_REGISTERED: dict[str, type[Method]] = {}
S = TypeVar("S", bound="type[Method]")


def register(cls: S) -> S:
    """Decorator: make a method known by its `name`.

    Raises:
        ValueError: another class has that name already.
    """
    known = _REGISTERED.get(cls.name)
    if not cls.name or (known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__)):
        raise ValueError(f"{cls.__qualname__}: the method name {cls.name!r} is empty or taken")
    _REGISTERED[cls.name] = cls
    return cls


@dataclass(frozen=True)
class Plugin:
    """A method that an installed package offers; a broken one has no class but a reason, in one line."""

    name: str
    package: str
    method: type[Method] | None
    reason: str = ""


def built_in() -> dict[str, type[Method]]:
    """The methods of this package by name."""
    from fedara_flwr.strategies import (  # noqa: F401
        fedara,
        fedara_static,
        federa,
        fedex_lora,
        fedlora,
        fedsa_lora,
        ffa_lora,
        flexlora,
        flora,
        full,
        head,
        hetlora,
        legend,
        rolora,
        slora,
    )

    return {name: cls for name, cls in sorted(_REGISTERED.items()) if cls.__module__.startswith(PACKAGE)}


def plugins(name: str | None = None) -> list[Plugin]:
    """What installed packages offer, sound or broken; with a `name`, only what has that name (nothing else is loaded)."""
    taken = dict.fromkeys(built_in(), "this package")
    found = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        if name is not None and point.name != name:
            continue
        package = f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed package"
        if point.name in taken:
            found.append(Plugin(point.name, package, None, f"{taken[point.name]} has a method of that name"))
            continue
        try:
            cls = point.load()
            reason = _unfit(cls, point)
        except (Exception, SystemExit) as error:  # a stranger's code: whatever it does must not end this run
            cls, reason = None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        found.append(Plugin(point.name, package, None if reason else cls, reason))
        if not reason:
            taken[point.name] = package
    return found


def _unfit(cls: object, point: EntryPoint) -> str:
    """Why what an entry point names is no method that can be listed and run; '' where it is one."""
    from fedara_flwr.strategies.base import Method

    if not (isinstance(cls, type) and issubclass(cls, Method)):
        return f"{point.value} is no subclass of Method"
    if cls.name != point.name:
        return f"{point.value} has the name {cls.name!r}, its entry point {point.name!r}"
    if not (isinstance(cls.Options, type) and issubclass(cls.Options, BaseModel)):
        return f"{point.value}.Options is no pydantic model"
    if not all(isinstance(text, str) for text in (cls.title, cls.paper)):
        return f"{point.value}: title and paper must be texts"
    return ""


def methods() -> dict[str, type[Method]]:
    """All sound methods by name: built in, decorated with `register`, and those of installed packages."""
    offered = {plugin.name: plugin.method for plugin in plugins() if plugin.method is not None}
    return dict(sorted((built_in() | _REGISTERED | offered).items()))


def find(name: str) -> type[Method]:
    """The method `name`; ConfigError where there is none, with the nearest name, or where its plug-in is broken."""
    registered = (built_in() | _REGISTERED).get(name)
    if registered is not None:
        return registered
    offered = plugins(name)
    for plugin in offered:
        if plugin.method is not None:
            return plugin.method
    if offered:
        raise ConfigError(f"method = {name!r}: the plug-in of {offered[0].package} is broken: {offered[0].reason}")
    known = methods()
    raise ConfigError(f"method = {name!r}: allowed are {', '.join(known)}{nearest(name, known)}")
