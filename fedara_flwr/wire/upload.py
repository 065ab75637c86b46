"""What a client sends back as the plan wants it: differences, coded, with error feedback where the plan asks for it.

Error feedback (Seide et al., Interspeech 2014; Karimireddy et al., arXiv 1901.09847): a node keeps what rounding took from its
uploads, exact - decoded, and adds it to its next differences before they are coded. So all that it sent comes to all that it
learnt but for the last rounding, however many rounds there were. A client that is not drawn in every round adds a residue that
is as many rounds old; one whose reply was lost keeps the residue of what it sent. The residue cannot grow without end: int8
and int4 put no number off by more than its row's largest over 127 or 7, so the residue of a row is at most a 126th or a sixth
of the largest difference it ever had.
"""

from __future__ import annotations

import numpy as np

from fedara_flwr import seeds
from fedara_flwr.model.kept import Kept
from fedara_flwr.model.spec import Arrays, ModelSpec
from fedara_flwr.wire.codec import CODECS, Coded, CodingError
from fedara_flwr.wire.plan import TrainPlan, Update


def residue_of(kept: Kept | None, plan: TrainPlan, spec: ModelSpec) -> Kept:
    """The residue of `plan.feedback` under the plan's mask: zero for what is new, or means something else by now.

    What was kept of parts that this round does not send waits for their turn. Where the plan draws other values than the kept
    residue's did, what was learnt beside them differs, and so only the head's counts.
    """
    names = plan.feedback & plan.sent
    same_draw = kept is not None and (kept.draw_seed, kept.entries) == (plan.draw_seed, plan.entries)
    if kept is not None and same_draw:
        names |= kept.arrays.keys() - plan.sent
    arrays = {name: np.zeros(spec.length(name, plan.mask, plan.entries), np.float32) for name in names}
    if kept is not None:
        arrays = kept.only(names if same_draw else {"head"}).over(arrays, plan.mask, spec)
    return Kept(arrays, plan.mask, plan.draw_seed, plan.entries)


def code_update(
    update: Update, plan: TrainPlan, spec: ModelSpec, received: Arrays, client_key: str, residue: Kept | None = None
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
            residue.arrays[part] = spec.scatter(part, exact - decoded, plan.mask, update.mask, residue.arrays[part])
    said = {"coding-error": error.value}
    return coded, said if residue is None else said | {"feedback-norm": added.value}
