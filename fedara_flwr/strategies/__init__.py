"""Methods, one file each: which client trains what, how updates merge, and what comes next."""

from fedara_flwr.strategies.registry import Plugin, built_in, find, methods, plugins, register

__all__ = ["Plugin", "built_in", "find", "methods", "plugins", "register"]
