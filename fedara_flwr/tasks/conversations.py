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
BESIDE = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")  # what a message may say beside its text
CONTEXTS = ("input", "context")
PRESETS: tuple[dict[str, tuple[str, ...]], ...] = (
    {"text": ("instruction",), "answer": ("output", "response"), "context": CONTEXTS},
    {"text": ("prompt",), "answer": ("completion", "response", "answer"), "context": CONTEXTS},
    {"text": ("question",), "answer": ("answer", "response"), "context": CONTEXTS},
    {"messages": ("messages", "conversations")},
)
"""Columns as published sets have them, in any case; the context may be missing."""
ANSWERS = ("output", "response", "completion", "answer")
NO_COLUMN = "-"  # no column, whatever there is
SHOWN = 8  # columns of no use that a line names


@cache
def preset(there: tuple[str, ...], prompt: str = "", answer: str = "", context: str = "") -> dict[str, str]:
    """Roles of columns that are called as published sets call them; {} where none fit. Said once for a table.

    Args:
        prompt: the prompt's column, where a key names it: then the others are looked for; '' = all are.
        answer: the answer's column likewise.
        context: that of what the prompt refers to, likewise.
    """
    lower = {name.lower(): name for name in reversed(there)}
    keys = {"text": prompt, "answer": answer, "context": context}
    named = {role: (name.lower(),) for role, name in keys.items() if name}
    for columns in (*PRESETS, {"text": ("text",), "answer": ANSWERS}):
        if (prompt or answer) and "text" not in columns:
            continue
        found: dict[str, str] = {}
        for role, names in (columns | named if "text" in columns else columns).items():
            found[role] = next((lower[name] for name in names if name in lower and lower[name] not in found.values()), "")
        if all(name for role, name in found.items() if role != "context"):
            said = ", ".join(f"{role} from {name!r}" for role, name in found.items() if name)
            rest = [name for name in there if name not in found.values()]
            more = f" and {len(rest) - SHOWN} more" if len(rest) > SHOWN else ""
            unread = f"; no part of a conversation: {', '.join(map(repr, rest[:SHOWN]))}{more}" if rest else ""
            logger.info("columns by their names: %s%s (data.options says otherwise)", said, unread)
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
    for name in BESIDE:
        if value.get(name):
            raise LeftOut(f"with messages that have {name}")
    if role == ASSISTANT and value.get("weight") == 0:
        raise LeftOut("with answers of weight 0")
    if not isinstance(content, str) or not content.strip():
        raise LeftOut("with messages that are empty")
    return role, spelled(content)
