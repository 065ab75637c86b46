"""Products of factors without forming them, and matrices split into factors. numpy only, float64."""

from __future__ import annotations

import numpy as np

from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import Arrays, ModelSpec
from fedara_flwr.wire.plan import Update


def module_factors(spec: ModelSpec, mask: RankMask, arrays: Arrays) -> list[tuple[np.ndarray, np.ndarray]]:
    """(B·diag(E) of shape (d_out, k), A of shape (k, d_in)) of every module under `mask`, float64; without E it is 1."""
    modules = spec.rows(spec.complete(arrays, mask), mask)
    return [(rows["B"].T.astype(np.float64) * rows["E"][:, 0], rows["A"].astype(np.float64)) for rows in modules]


def delta_norm(spec: ModelSpec, update: Update) -> float:
    """‖ΔW‖_F of one client's adapters over all modules together, without forming a product: ‖BA‖² = Σ (BᵀB)∘(AAᵀ)."""
    total = 0.0
    for left, right in module_factors(spec, update.mask, update.arrays):
        total += float(((left.T @ left) * (right @ right.T)).sum())
    return max(total, 0.0) ** 0.5


def split_svd(matrix: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """The best approximation of `matrix` as scale·B·A of `rank`: B = U√S/√scale, A = √S·Vᵀ/√scale."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(s[:rank] / scale)
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def split_product(left: np.ndarray, right: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """`split_svd` of left·right, by QR of the factors while that is cheaper, else of the dense product.

    With MiniLM's shapes QR is faster up to about 0.8 of the smaller side (benchmarks/speed).
    """
    if 4 * left.shape[1] >= 3 * min(left.shape[0], right.shape[1]):
        return split_svd(left @ right, rank, scale)
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    b, a = split_svd(r_left @ r_right.T, rank, scale)
    return q_left @ b, a @ q_right.T
