"""Ways to write the tags of entities, and all of them as one: 'O', 'B-PER', 'I-PER' (IOB2).

Read are IOB1 and IOB2; IOBES and BILOU, whose S, U, E and L say where an entity ends; other forms of a tag: 'B_PER', 'PER-B',
'b-PER'; other words for no entity: 'o', 'OTHER'. Types without a prefix stay what they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

OUTSIDE = "O"
NO_ENTITY = ("o", "other", "outside", "none", "out", "_", "-")
BEGINS, GOES_ON = "BSU", "IELM"  # S and U: an entity of one word; E and L: the last word of one; M: one within
FORMS = tuple(
    re.compile(form, re.S) for form in (r"(?P<prefix>[A-Za-z])[-_](?P<type>.+)", r"(?P<type>.+)[-_](?P<prefix>[A-Za-z])")
)


def conversion(tags: Iterable[str]) -> dict[str, str]:
    """Every tag that occurs → the same in IOB2; {} where they are written so already, or in no way that is known here.

    A way of writing is taken only where all tags but one fit it, some of them begin an entity, and that one says 'no entity'.
    """
    found = sorted(set(tags))
    for form in FORMS:
        parts = {tag: match for tag in found if (match := form.fullmatch(tag)) is not None}
        bare = [tag for tag in found if tag not in parts]
        prefixes = {match["prefix"].upper() for match in parts.values()}
        if not parts or not prefixes <= set(BEGINS + GOES_ON) or not prefixes & set(BEGINS + "I"):
            continue
        if len(bare) > 1 or (bare and bare[0].lower() not in NO_ENTITY):
            continue
        new = {tag: f"{'B' if match['prefix'].upper() in BEGINS else 'I'}-{match['type']}" for tag, match in parts.items()}
        new |= dict.fromkeys(bare, OUTSIDE)
        return {} if all(tag == other for tag, other in new.items()) else new
    if [tag for tag in found if tag.lower() in NO_ENTITY] == ["o"]:
        return {tag: OUTSIDE if tag == "o" else tag for tag in found}
    return {}
