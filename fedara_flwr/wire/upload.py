"""What a client sends back as the plan wants it: differences, coded, with error feedback where the plan asks for it.

Error feedback (Seide et al., Interspeech 2014; Karimireddy et al., arXiv 1901.09847): a node keeps what rounding took from its
uploads, exact - decoded, and adds it to its next differences before they are coded. So all that it sent comes to all that it
learnt but for the last rounding, however many rounds there were. A client that is not drawn in every round adds a residue that
is as many rounds old; one whose reply was lost keeps the residue of what it sent. The residue cannot grow without end: int8
and int4 put no number off by more than its row's largest over 127 or 7, so the residue of a row is at most a 126th or a sixth
of the largest difference it ever had.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedara_flwr import seeds
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import SLOT_PARTS, Arrays, ModelSpec
from fedara_flwr.wire.codec import CODECS, Coded, CodingError
from fedara_flwr.wire.plan import TrainPlan, Update


@dataclass
class Residue:
    """What coding has taken from one node's uploads and not given back yet.

    Attributes:
        arrays: exact - decoded by part, packed under `mask`.
        mask: slots of the plan under which it was kept.
        draw_seed: the plan's; with another one drawn values differ, and so does what was learnt beside them.
        entries: likewise.
    """

    arrays: Arrays
    mask: RankMask
    draw_seed: int = 0
    entries: int = 0

    def fit(self, plan: TrainPlan, spec: ModelSpec) -> Residue:
        """The residue of `plan.feedback` under the plan's mask: zero for what is new, or means something else by now."""
        parts = plan.feedback & plan.trainable
        fitted = {part: np.zeros(spec.length(part, plan.mask, plan.entries), dtype=np.float32) for part in parts}
        same_draw = (self.draw_seed, self.entries) == (plan.draw_seed, plan.entries)
        if self.mask.ranks == plan.mask.ranks:
            both = self.mask.intersect(plan.mask)
            for part in parts & self.arrays.keys():
                kept = self.arrays[part]
                if kept.shape != (spec.length(part, self.mask, self.entries),) or not (same_draw or part == "head"):
                    continue
                if part in SLOT_PARTS:
                    widths = spec.widths(part)
                    kept = plan.mask.scatter(self.mask.slice(kept, widths, both), widths, both, fitted[part])
                fitted[part] = kept
        return Residue(fitted, plan.mask, plan.draw_seed, plan.entries)


def code_update(
    update: Update, plan: TrainPlan, spec: ModelSpec, received: Arrays, client_key: str, residue: Residue | None = None
) -> tuple[Coded | Arrays, dict[str, float]]:
    """An update's arrays as the plan wants them sent.

    Args:
        received: the arrays that came with the plan, decoded.
        residue: what coding took before, fitted to the plan; it is changed to what it has taken by now. Slots that are not
            sent keep theirs.

    Returns:
        The arrays, and where they are coded `coding-error`, ‖decoded - exact‖ / ‖exact‖ of what was coded; with a residue
        `feedback-norm`, ‖residue‖ / ‖differences‖, what was added to the differences over them.

    Raises:
        FloatingPointError: a difference is not finite.
    """
    if not plan.differences:
        return update.arrays, {}
    start, codec = plan.start(spec, received, plan.mask, update.mask), CODECS[plan.up]
    coded, error, added = {}, CodingError(), CodingError()
    for part, values in sorted(update.arrays.items()):
        exact, rows = values - start[part], spec.row_lengths(part, update.mask, plan.entries)
        if not np.isfinite(exact).all():
            raise FloatingPointError(f"{part} is not finite after training: lower the learning rates")
        if residue is not None and part in residue.arrays:
            change = exact
            exact = change + spec.slice({part: residue.arrays[part]}, plan.mask, update.mask)[part]
            added.add(change, exact)
        rng = seeds.generator(plan.seed, "wire-up", plan.server_round, client_key, part)
        coded[part] = codec.encode(exact, rows, rng)
        decoded = codec.decode(coded[part], rows)
        error.add(exact, decoded)
        if residue is not None and part in residue.arrays:
            left = exact - decoded
            if part in SLOT_PARTS:
                left = plan.mask.scatter(left, spec.widths(part), update.mask, residue.arrays[part])
            residue.arrays[part] = left
    said = {"coding-error": error.value}
    return coded, said if residue is None else said | {"feedback-norm": added.value}
