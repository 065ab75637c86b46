"""Groups of keys: how they are named and checked, and what a user reads when one is wrong, one line."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

Scalar = str | int | float | bool
OptionsModel = type[BaseModel]


class ConfigError(ValueError):
    """A setting that the user must change; one line that names key, value and what is allowed.

    Attributes:
        told: what a device tells its server in place of a line about its own data: a kind, a place, nothing that stands there.
    """

    def __init__(self, line: str, told: str = "") -> None:
        super().__init__(line)
        self.told = told


class Group(BaseModel):
    """Base of every group of keys: kebab-case names, unknown keys and wrong types refused."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        populate_by_name=True,
        allow_inf_nan=False,
        alias_generator=lambda name: name.replace("_", "-"),
    )


def read_options(key: str, text: str) -> dict[str, Any]:
    """The text of a key such as `strategy.options` as a dictionary: lines of TOML, or one inline table.

    Raises:
        ConfigError: it is no TOML.
    """
    text = text.strip()
    try:
        parsed = tomllib.loads(f"options = {text}" if text.startswith("{") else text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{key} = {text!r}: not TOML ({error})") from None
    if not text.startswith("{"):
        return parsed
    if set(parsed) != {"options"}:
        raise ConfigError(f"{key} = {text!r}: nothing may follow the inline table")
    return parsed["options"]


def check_options(
    model: OptionsModel, options: dict[str, Any], owner: str, key: str = "strategy.options", kind: str = "method"
) -> BaseModel:
    """The keys of `strategy.options` or `data.options`, checked by the model of the method or task that owns them.

    Raises:
        ConfigError: for a key or value that the owner does not allow.
    """
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    try:
        return model.model_validate(options)
    except ValidationError as error:
        known = {f"{key}.{name}": field for name, field in fields.items()}
        line = one_line(error, known, prefix=f"{key}.")
        raise ConfigError(f"{line} ({kind} {owner!r})") from None


def nearest(word: str, words: Any) -> str:
    """'; did you mean …?' for the closest of `words`, else ''. Of keys with dots the last parts must be alike, too."""
    words, last = [str(w) for w in words], word.rpartition(".")[2]

    def like(other: str) -> bool:
        within = f"{other}.".startswith(f"{word}.") or f"{word}.".startswith(f"{other}.")
        return "." not in word or within or difflib.SequenceMatcher(None, last, other.rpartition(".")[2]).ratio() >= 0.7

    alike = [w for w in difflib.get_close_matches(word, words, n=3, cutoff=0.6) if like(w)]
    if not alike:  # the last part may be right in the wrong group
        alike = [w for w in words if w.rpartition(".")[2] == last][:1]
    return f"; did you mean {alike[0]!r}?" if alike else ""


def one_line(error: ValidationError, known: Mapping[str, Any], prefix: str = "") -> str:
    """The first problem of a ValidationError as 'key = value: what is allowed; nearest name'."""
    problems = error.errors(include_url=False)
    first = problems[0]
    key = prefix + ".".join(str(part) for part in first["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{key} = {first['input']!r}: there is no such key{nearest(key, known)}{more}"
    hint = ""
    if key in known and get_origin(known[key].annotation) is Literal:
        hint = nearest(str(first["input"]), get_args(known[key].annotation))
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{key} = {first['input']!r}: {message}{hint}{more}"


def walk(group: Group, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Every key of a group and of those in it, dotted, with its value and its pydantic field."""
    keys: dict[str, tuple[Any, Any]] = {}
    for name, field in type(group).model_fields.items():
        value, key = getattr(group, name), prefix + (field.alias or name)
        keys |= walk(value, key + ".") if isinstance(value, Group) else {key: (value, field)}
    return keys
