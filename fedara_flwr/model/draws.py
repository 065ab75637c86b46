"""Values that server and clients draw alike from a seed, so that they need not travel. numpy only."""

from __future__ import annotations

import numpy as np

from fedara_flwr.model.deltas import dense_size
from fedara_flwr.model.ranks import Ints, RankMask
from fedara_flwr.model.spec import Arrays, ModelSpec, Vector
from fedara_flwr.seeds import generator

MOST_DRAWN = 16  # times the numbers of the whole model


def lora_a(spec: ModelSpec, mask: RankMask, seed: int) -> Vector:
    """LoRA's A, packed under `mask`: U(-1/√d_in, 1/√d_in), which is Kaiming's with a = √5, as PEFT has it.

    A slot's values do not depend on which others are alive: the whole A is drawn, then cut.
    """
    full = RankMask.full(mask.ranks)
    widths = np.array(spec.widths("A"), dtype=np.int64)[full.modules]
    bound = np.repeat(1.0 / np.sqrt(widths), widths)
    noise = generator(seed, "start", "A").uniform(-1.0, 1.0, spec.length("A", full))
    return full.slice((noise * bound).astype(np.float32), spec.widths("A"), mask)


def drawn_head(spec: ModelSpec, seed: int) -> Vector:
    """The head before it is solved or trained; empty where there is none.

    The checkpoint's where that is kept, else weights N(0, 0.02²) as in BERT, biases 0, norms 1.
    """
    if spec.kept is not None:
        return spec.kept.copy()
    rng = generator(seed, "start", "head")
    pieces = []
    for parameter in spec.head:
        if len(parameter.shape) > 1:
            pieces.append(rng.normal(0.0, 0.02, parameter.size))
        else:
            pieces.append(np.full(parameter.size, 0.0 if parameter.name.endswith("bias") else 1.0))
    return np.concatenate(pieces).astype(np.float32) if pieces else np.empty(0, dtype=np.float32)


def sparse_positions(spec: ModelSpec, count: int, seed: int) -> Ints:
    """`count` positions, ascending, among the weights of all adapted modules laid one after another, row by row."""
    total = dense_size(spec)
    if not 0 < count <= total:
        raise ValueError(f"{count} positions among {total} weights")
    return np.sort(generator(seed, "sparse").choice(total, count, replace=False, shuffle=False))


def draw(spec: ModelSpec, mask: RankMask, parts: frozenset[str], seed: int, entries: int) -> Arrays:
    """The parts that a TRAIN message leaves out on purpose: A as `lora_a`, every other one zero.

    Raises:
        ValueError: they would be many times larger than the model.
    """
    full, most = RankMask.full(mask.ranks), MOST_DRAWN * (dense_size(spec) + spec.size("head") + spec.size("backbone"))
    for part in parts:  # sizes come from the server
        if (size := spec.length(part, full, entries)) > most:
            raise ValueError(f"{part} would be {size} numbers, allowed are {most} with this model")
    return {
        part: lora_a(spec, mask, seed) if part == "A" else np.zeros(spec.length(part, mask, entries), dtype=np.float32)
        for part in parts
    }
