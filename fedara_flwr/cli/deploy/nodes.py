"""`fedara deploy nodes`: who is registered, who is there, and what became of them in the newest run.

Node ids and states are what `flwr supernode list` says; which name and key an id is of, register.sh has written down
(`home/registered`, a line of id, name and key for each node); rounds and failures are the newest run's, under `home/runs`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedara_flwr.keys import ConfigError, nearest
from fedara_flwr.log import printable

if TYPE_CHECKING:
    from fedara_flwr.report.read import Run

REGISTERED, BUSY = "registered", "busy"
SECONDS = 300.0  # for one flwr command
GONE = ("unregistered", "deleted")
COLUMNS = ("name", "id", "state", "last seen", "rounds", "strikes")
Json = dict[str, Any]


@dataclass(frozen=True)
class Node:
    """A node that is registered with the SuperLink.

    Attributes:
        id: Flower's.
        name: of its key's file in nodes/; "" where register.sh did not register it.
        state: online, offline, or registered: it was never there.
        seen: when it last was, "now" for one that is.
    """

    id: str
    name: str
    state: str
    seen: str


def listed(folder: Path) -> list[Node]:
    """The nodes of a server's folder, as its SuperLink has them; those that were unregistered are left out.

    Raises:
        ConfigError: the folder is no server's, or the SuperLink does not answer.
    """
    answer, found = _flwr(folder, "supernode", "list", "--format", "json"), []
    names = {node_id: name for node_id, name, _ in recorded(folder)}
    for row in answer.get("nodes", []):
        state, node_id = str(row.get("status")), str(row.get("node-id"))
        if state not in GONE:
            seen = {"online": "now", "offline": str(row.get("offline-at"))}.get(state, "never")
            found.append(Node(node_id, names.get(node_id, ""), state, seen))
    return sorted(found, key=lambda node: (not node.name, node.name, node.id))


def recorded(folder: Path) -> list[tuple[str, str, str]]:
    """(id, name, key) of each registration that register.sh made."""
    file = folder / "home" / REGISTERED
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    words = [line.split(" ") for line in lines]
    return [(line[0], " ".join(line[1:-1]), line[-1]) for line in words if len(line) >= 3]  # a key's file may be named anyhow


def newest_run(folder: Path) -> Run | None:
    """The run of a server's folder that wrote last; None where there is none."""
    files = (folder / "home" / "runs").glob("*/metrics.jsonl")
    newest = max(files, key=lambda file: file.stat().st_mtime, default=None)
    if newest is None:
        return None
    from fedara_flwr.report.read import read_run  # which loads what draws pages

    return read_run(newest.parent)


def strikes(run: Run, client: str) -> str:
    """How often in a row the client last failed, why, and whether it sits out; "0" for none. Being busy is no failure."""
    replied = {line["round"] for line in run.clients if line.get("client") == client}
    count, why = 0, ""
    for line in run.rounds:
        if line["round"] in replied:
            count, why = 0, ""
        for drop in line.get("dropped") or []:
            if drop.get("client") == client and drop.get("reason") != BUSY:
                count, why = count + 1, str(drop.get("reason"))
    out = bool(run.rounds) and client in (run.rounds[-1].get("sitting-out") or [])
    return ", ".join([f"{count} ({why})" if count else "0", *(["sits out"] if out else [])])


def table(nodes: Iterable[Node], run: Run | None, waiting: Iterable[str] = ()) -> list[str]:
    """Lines to print, a line for each node.

    Args:
        run: whose rounds and strikes are told; a node's are those of the client key that is its name.
        waiting: names whose keys are in nodes/, and not registered.
    """
    rows: list[tuple[str, ...]] = [COLUMNS]
    for node in nodes:
        rounds, failed = "-", "-"
        if run and node.name:
            done = [line for line in run.clients if line.get("client") == node.name and line["round"] > 0]
            rounds, failed = f"{len(done)} of {len(run.rounds)}", strikes(run, node.name)
        rows.append((node.name or "?", node.id, node.state, node.seen, rounds, failed))
    rows += [(name, "-", "not registered: sh register.sh", "-", "-", "-") for name in waiting]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if any(row[0] == "?" for row in rows):
        lines.append("?: not registered by this folder's register.sh, so its name is not known here")
    return [*lines, f"rounds and strikes: run {run.name}, {run.outcome}" if run else "no run has been yet"]


def show(folder: Path) -> list[str]:
    """What `fedara deploy nodes` prints.

    Raises:
        ConfigError: as `listed`; or the newest run's folder cannot be read.
    """
    nodes = listed(folder)
    known = {node.name for node in nodes} | {name for _, name, _ in recorded(folder)}
    waiting = sorted(path.stem for path in (folder / "nodes").glob("*.pub") if path.stem not in known)
    return table(nodes, newest_run(folder), waiting)


def unregister(folder: Path, who: str) -> str:
    """Take a node's registration back, for good: its key is never accepted again. A line that says so.

    Args:
        who: its name or its id.

    Raises:
        ConfigError: as `listed`; there is no such node, or the SuperLink refuses.
    """
    nodes = listed(folder)
    found = [node for node in nodes if who and who in (node.name, node.id)]
    if len(found) != 1:
        names = [node.name for node in nodes if node.name]
        which = "no such node is" if not found else f"{len(found)} nodes are"
        ids = f", or an id: {', '.join(node.id for node in found)}" if found else ""
        allowed = ", ".join(names) or "the ids"
        raise ConfigError(f"{who}: {which} registered, allowed is one of {allowed}{ids}{nearest(who, names)}")
    (node,) = found
    _flwr(folder, "supernode", "unregister", node.id, "site", "--format", "json")
    said = f"{node.name or node.id}: unregistered ({node.id}); its key is never accepted again"
    key = folder / "nodes" / f"{node.name}.pub"
    if node.name and key.exists():
        try:
            key.rename(key.with_suffix(".unregistered"))  # else register.sh would try it again
        except OSError as error:
            said += f"; {key} could not be renamed ({error.strerror}): remove it"
    return said


def _flwr(folder: Path, *words: str) -> Mapping[str, Any]:
    """The answer of a flwr command with this site's settings."""
    script = folder / "flwr.sh"
    if not script.is_file():
        raise ConfigError(f"{folder}: allowed is the folder server of what `fedara deploy init` wrote")
    try:
        done = subprocess.run(["sh", str(script), *words], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"the SuperLink does not answer within {SECONDS:g} s") from None
    start = done.stdout.find("{")
    try:
        answer: Json = json.loads(done.stdout[start:]) if start >= 0 else {}
    except ValueError:
        answer = {}
    if answer.get("success"):
        return answer
    told = str(answer.get("error-message") or done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
    said = printable(" ".join(told.split()))
    if "SuperLink is unavailable" in said:
        raise ConfigError("the SuperLink does not answer: is `sh start.sh` running on this server?")
    raise ConfigError(f"flwr {' '.join(words[:2])}: {said}")
