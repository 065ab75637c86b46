"""Prompts, answers and conversations as published sets have them: what their columns and roles are called."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

from fedara_flwr.data.skipped import LeftOut, spelled
from fedara_flwr.tasks.templates import ASSISTANT, ROLES, SYSTEM, USER

logger = logging.getLogger(__name__)
NAMES = {"human": USER, "gpt": ASSISTANT, "bot": ASSISTANT, "model": ASSISTANT, "prompter": USER}
KEYS = (("role", "from"), ("content", "value"))  # of a message, in both usual ways to write one
PRESETS: tuple[dict[str, tuple[str, ...]], ...] = (
    {"text": ("instruction",), "answer": ("output", "response"), "context": ("input", "context")},
    {"text": ("prompt",), "answer": ("completion", "response", "answer")},
    {"text": ("question",), "answer": ("answer", "response")},
    {"messages": ("messages", "conversations")},
)
"""Columns as published sets have them, in any case; the context may be missing."""
ANSWERS = ("output", "response", "completion", "answer")
NO_COLUMN = "-"  # no column, whatever there is


@cache
def preset(there: tuple[str, ...], prompt: str) -> dict[str, str]:
    """Roles of columns that are called as published sets call them; {} where none fit. Said once for a table.

    Args:
        prompt: the prompt's column, where a key names it: then its answer is looked for; '' = both are.
    """
    lower = {name.lower(): name for name in reversed(there)}
    for columns in (*PRESETS, {"text": ("text",), "answer": ANSWERS}):
        names = {**columns, "text": (prompt.lower(),)} if prompt and "text" in columns else columns
        found = {role: next((lower[name] for name in of if name in lower), "") for role, of in names.items()}
        if (prompt and "text" not in columns) or found.get("answer", "") == found.get("text"):
            continue
        if all(name for role, name in found.items() if role != "context"):
            said = ", ".join(f"{role} from {name!r}" for role, name in found.items() if name)
            logger.info("columns by their names: %s (data.options says otherwise)", said)
            return found
    return {}


def messages_of(value: Any) -> list[list[str]]:
    """A conversation as [role, content] of each message, up to its last answer; several of one role in a row as one.

    Raises:
        LeftOut: it cannot be read, or has no answer.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise LeftOut("with messages that are no JSON") from None
    messages: list[list[str]] = []
    for role, content in [_message(message) for message in value] if isinstance(value, list | tuple) else []:
        if messages and messages[-1][0] == role:  # most templates want turns
            messages[-1][1] += f"\n\n{content}"
        else:
            messages.append([role, content])
    if any(role == SYSTEM for role, _ in messages[1:]):
        raise LeftOut("with a system text that is not first")
    while messages and messages[-1][0] != ASSISTANT:
        messages.pop()
    if not any(role == USER for role, _ in messages):
        raise LeftOut("without answer")
    if next(role for role, _ in messages if role != SYSTEM) != USER:
        raise LeftOut("with messages that begin with an answer")
    return messages


def _message(value: Any) -> tuple[str, str]:
    """Role and content of one message; of content in parts their texts."""
    if not isinstance(value, Mapping):
        raise LeftOut("with messages that are no objects")
    role, content = (value.get(name) if value.get(name) is not None else value.get(other) for name, other in KEYS)
    role = str(role).lower()
    role = NAMES.get(role, role)
    if isinstance(content, list | tuple) and content and all(isinstance(part, Mapping) for part in content):
        if any(part.get("type") not in (None, "text") or not isinstance(part.get("text"), str) for part in content):
            raise LeftOut("with messages that are not text alone")
        content = "\n".join(part["text"] for part in content)
    if role not in ROLES:
        raise LeftOut("with messages of others than system, user and assistant")
    if not isinstance(content, str) or not content.strip():
        raise LeftOut("with messages that are empty")
    return role, spelled(content)
