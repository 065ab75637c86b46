"""docs/config.md, which `fedara config` prints: every key of the run configuration and of the methods' own options."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from fedara_flwr.config import describe
from fedara_flwr.strategies import built_in

TABLE_HEAD = ["| key | default | allowed | meaning |", "|---|---|---|---|"]


def reference() -> str:
    """All keys as Markdown tables: one per group, then one per method that has options."""
    lines = ["# Configuration", "", "Made by `fedara config` from `fedara_flwr/config.py`. `''` means unset.", ""]
    group = None
    for key, field in describe().items():
        if group != key.rpartition(".")[0]:
            group = key.rpartition(".")[0]
            lines += [*([""] if lines[-1] else []), f"## {group or 'the run'}", "", *TABLE_HEAD]
        lines.append(_row(key, field))
    for name, method in built_in().items():
        if fields := method.Options.model_fields:
            lines += ["", f"## strategy.options of `{name}`", "", *TABLE_HEAD]
            lines += [_row(field.alias or key, field) for key, field in fields.items()]
    return "\n".join(lines) + "\n"


def _row(key: str, field: Any) -> str:
    text = str(field.description).replace("|", "\\|")
    return f"| `{key}` | `{default(field)}` | {allowed(field)} | {text} |"


def default(field: Any) -> str:
    """The value that a key has where nobody gives one, in TOML."""
    return "required" if field.is_required() else toml(field.get_default(call_default_factory=True))


def toml(value: object) -> str:
    """A value as one writes it in TOML."""
    return str(value).lower() if isinstance(value, bool) else f"'{value}'" if isinstance(value, str) else str(value)


def allowed(field: Any) -> str:
    """Type and limits of a pydantic field, as Markdown."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`'{choice}'`" for choice in get_args(field.annotation))
    signs = {"Ge": ("≥", "ge"), "Gt": (">", "gt"), "Le": ("≤", "le"), "Lt": ("<", "lt")}
    limits = [
        f"{sign} {getattr(rule, name):g}"
        for rule in field.metadata
        for kind, (sign, name) in signs.items()
        if type(rule).__name__ == kind
    ]
    kinds = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`"}
    other = field.annotation.__name__ if isinstance(field.annotation, type) else str(field.annotation)
    kind = kinds.get(field.annotation, other)
    return " ".join([kind, ", ".join(limits)]).strip()
