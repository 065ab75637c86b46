"""What data a run or a device has, in a few lines before the first round: most that is wrong with data shows in them."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedara_flwr.data.examples import Examples
from fedara_flwr.data.labels import NUMBER, WHOLE
from fedara_flwr.tasks.base import Task

LOOKED_AT = 2000  # rows of each part whose tokens are counted
NAMED, LONGEST = 5, 40  # labels that a line names, and characters of each
_ENDLESS = 10**9  # tokens: nothing is cut
STRANGE = 0.02  # share of unknown tokens from which a warning is due
PARTS = {"train": "to train on", "validation": "to validate on", "test": "to test on"}


class Overview(NamedTuple):
    """Lines of what there is, and of what is likely to be wrong."""

    lines: tuple[str, ...]
    warnings: tuple[str, ...]

    def log(self, logger: logging.Logger, where: str = "") -> None:
        """Say all of it; `where` stands before each line."""
        for level, said in ((logging.INFO, self.lines), (logging.WARNING, self.warnings)):
            for line in said:
                logger.log(level, "%s%s", where, line)


def overview(
    task: Task,
    tokenizer: Any,
    parts: Mapping[str, Examples],
    names: tuple[str, ...],
    max_length: int,
    skipped: Sequence[str] = (),
) -> Overview:
    """Look at the rows that are used.

    Args:
        parts: rows by their use, a key of PARTS; "train" is among them.
        names: label names; () where the task has none.
        max_length: tokens after which a text is cut.
        skipped: lines about rows that are not used; the first of the warnings.
    """
    rows = ", ".join(f"{len(examples):,} {PARTS[part]}" for part, examples in parts.items() if part == "train" or len(examples))
    lines, warnings = [f"data: {rows}"], list(skipped)
    counts = {part: tally(examples, task.group_names(names)) for part, examples in parts.items()}
    if counts["train"]:
        lines.append(_labels(task, counts["train"]))
        warnings += _gaps(task, counts)
    warnings += _shared(parts)
    texts, share = _texts(task, tokenizer, parts, max_length)
    lines.append(texts)
    if share > STRANGE:
        warnings.append(f"{share:.1%} of the tokens are unknown to the tokenizer: is it one for this language?")
    return Overview(tuple(lines), tuple(warnings))


def dealt(counts: Mapping[str, Sequence[int]], grouped: bool) -> Overview:
    """How rows lie over the clients of a simulation.

    Args:
        counts: client → its rows by group, or their number alone where they have none (`grouped` is False).
    """
    rows = {client: sum(of) for client, of in counts.items()}
    there = [count for count in rows.values() if count]
    none, one = len(rows) - len(there), sum(np.count_nonzero(of) == 1 for of in counts.values()) if grouped else 0
    said = [f"{one} with one label alone"] * bool(one) + [f"{none} without any"] * bool(none)
    line = f"clients: {len(rows)} of {min(there, default=0):,} to {max(there, default=0):,} rows" + "".join(
        f", {w}" for w in said
    )
    return Overview((line,), ())


def tally(examples: Examples, names: tuple[str, ...]) -> dict[str, int]:
    """Rows by label, or by what else partitions go by; {} where rows have no such."""
    if (kinds := examples.kinds(names)) is None or not len(examples):
        return {}
    numbers, names = kinds
    return dict(zip(names, np.bincount(numbers, minlength=len(names)).tolist(), strict=True))


def _labels(task: Task, counts: Mapping[str, int]) -> str:
    there = {name: count for name, count in counts.items() if count}
    most, least = max(there, key=lambda name: there[name]), min(there, key=lambda name: there[name])
    word = task.label_word if task.labelled else "categories"
    names = list(counts)
    shown = ", ".join(map(_short, names if len(names) <= NAMED else [*names[: NAMED - 1], "…", names[-1]]))
    return f"{word}: {len(names)} ({shown}); most rows {_short(most)} {there[most]:,}, fewest {_short(least)} {there[least]:,}"


def _gaps(task: Task, counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    train, word = counts["train"], task.label_word
    found: list[str] = []
    if not task.labelled:
        return found
    if any(NUMBER.fullmatch(name) and not WHOLE.fullmatch(name) for name in train):
        found.append(f"the {word} are numbers with a fraction: should numbers be learnt (`fedara tasks`)?")
    if len([count for count in train.values() if count]) == 1:
        found.append(f"all rows to train on have one and the same of the {word}: there is nothing to learn")
    if missing := [name for name, count in train.items() if not count]:
        found.append(f"no row to train on has {_list(missing)}, of {len(train)} {word}")
    looks: dict[object, list[str]] = {}
    for name in train:
        looks.setdefault(_look(name), []).append(name)
    if alike := [name for names in looks.values() if len(names) > 1 for name in names]:
        found.append(f"of the {word} some look alike: {', '.join(map(ascii, alike[:NAMED]))}; what is one should be written so")
    for part in ("validation", "test"):
        held = counts.get(part) or {}
        if only := [name for name, count in held.items() if count and not train.get(name)]:
            found.append(f"only rows {PARTS[part]} have {_list(only)}")
        elif held and (lacking := [name for name, count in train.items() if count and not held.get(name)]):
            found.append(f"no row {PARTS[part]} has {_list(lacking)}")
    return found


def _shared(parts: Mapping[str, Examples]) -> list[str]:
    """What is seen in training is no test: rows that are the same in all that the task reads of them, labels apart."""
    known = set(parts["train"].keys(0))
    counts = {part: sum(key in known for key in parts[part].keys(0)) for part in parts if part != "train"}
    return [
        f"{count:,} of {len(parts[part]):,} rows {PARTS[part]} are among those to train on, too"
        for part, count in counts.items()
        if count
    ]


def _look(name: str) -> object:
    """What is the same for names that a reader would take for one: in case, forms of a letter, spaces, or as numbers."""
    seen = "".join(char for char in unicodedata.normalize("NFKC", name).casefold() if unicodedata.category(char)[0] != "C")
    seen = " ".join(seen.split())
    return float(seen) if seen.isascii() and seen.replace(".", "", 1).isdigit() else seen


def _texts(task: Task, tokenizer: Any, parts: Mapping[str, Examples], max_length: int) -> tuple[str, float]:
    """The line about the lengths of texts, and the share of tokens that are unknown."""
    lengths: list[int] = []
    unknown, unk = 0, tokenizer.unk_token_id
    for examples in parts.values():
        some = np.linspace(0, max(0, len(examples) - 1), min(len(examples), LOOKED_AT)).astype(int)
        for ids in task.encode(tokenizer, examples.take(some), _ENDLESS).ids:
            lengths.append(len(ids))
            unknown += ids.count(unk) if unk is not None and unk not in (tokenizer.eos_token_id, tokenizer.pad_token_id) else 0
    cut = sum(length > max_length for length in lengths)
    share = unknown / max(1, sum(lengths))
    rows = sum(map(len, parts.values()))
    seen = "" if len(lengths) >= rows else f" of {len(lengths):,} that were looked at"
    half = int(np.median(lengths or [0]))
    said = f"texts: at most {max(lengths, default=0):,} tokens, half have {half:,} or fewer"
    return f"{said}; {cut:,}{seen} have more than data.max-length = {max_length}; {share:.2%} unknown tokens", share


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(_short, names[:NAMED])) + more


def _short(name: str) -> str:
    return name if name == "…" else repr(name if len(name) <= LONGEST else f"{name[:LONGEST]}…")
