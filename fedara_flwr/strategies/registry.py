"""Which methods there are: the built-in ones, and those of packages with the entry-point group `fedara_flwr.strategies`."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel

from fedara_flwr import plugins as packages
from fedara_flwr.keys import ConfigError, nearest

if TYPE_CHECKING:
    from fedara_flwr.strategies.base import Method

GROUP = "fedara_flwr.strategies"
BUILT_IN_PREFIX = f"{__name__.rpartition('.')[0]}."
_REGISTERED: dict[str, type[Method]] = {}
S = TypeVar("S", bound="type[Method]")
Plugin = packages.Plugin["type[Method]"]


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

    return {name: cls for name, cls in sorted(_REGISTERED.items()) if cls.__module__.startswith(BUILT_IN_PREFIX)}


def plugins(name: str | None = None) -> list[Plugin]:
    """What installed packages offer, sound or broken; with a `name`, only what has that name (nothing else is loaded)."""
    return packages.offered(GROUP, "method", built_in(), _unfit, name)


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
    offered = {plugin.name: plugin.offer for plugin in plugins() if plugin.offer is not None}
    return dict(sorted((built_in() | _REGISTERED | offered).items()))


def find(name: str) -> type[Method]:
    """The method `name`; ConfigError where there is none, with the nearest name, or where its plug-in is broken."""
    registered = (built_in() | _REGISTERED).get(name)
    if registered is not None:
        return registered
    offered = plugins(name)
    for plugin in offered:
        if plugin.offer is not None:
            return plugin.offer
    if offered:
        raise ConfigError(f"method = {name!r}: the plug-in of {offered[0].package} is broken: {offered[0].reason}")
    known = methods()
    raise ConfigError(f"method = {name!r}: allowed are {', '.join(known)}{nearest(name, known)}")
