"""What merging costs on the server, as ratios measured side by side: the probe of the factors' error, and FlexLoRA's two ways.

    python benchmarks/speed/merge_cost.py

MiniLM's 36 modules, five clients of rank 12; medians of interleaved repetitions in one process, one thread.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import time
from collections.abc import Callable

import numpy as np

from fedara_flwr.merging.factors import split_product, split_svd
from fedara_flwr.merging.mean import FactorError, SlotMean
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import ModelSpec, ModuleSpec
from fedara_flwr.wire.plan import Update

WIDTH, INNER, BLOCKS = 384, 1536, 6


def spec() -> ModelSpec:
    """MiniLM's adapted layers."""
    shapes = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH), (WIDTH, INNER)]
    modules = [ModuleSpec(f"{b}.{i}", d_out, d_in, b) for b in range(BLOCKS) for i, (d_out, d_in) in enumerate(shapes)]
    return ModelSpec("0" * 64, tuple(modules), ())


def interleaved(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each case, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def probe() -> None:
    """The merge with the probe, without it, and the probe alone."""
    model, rng = spec(), np.random.default_rng(0)
    mask = RankMask.full([12] * len(model.modules))
    arrays = [{p: rng.normal(size=model.length(p, mask)).astype(np.float32) for p in ("B", "E", "A")} for _ in range(5)]
    updates = [Update(values, mask, 10, {}) for values in arrays]

    def plain() -> SlotMean:
        merger = SlotMean(model, mask, arrays[0])
        for update in updates:
            merger.add_weighted(update, 10.0)
        merger.result()
        return merger

    def alone() -> None:
        error = FactorError(model, mask)
        for update in updates:
            error.add(update, 10)
        error.compare(arrays[0])

    found = interleaved({"merge": plain, "probe": alone}, 60)
    print(
        f"merge {found['merge'] * 1e3:.1f} ms, probe {found['probe'] * 1e3:.2f} ms: {found['probe'] / found['merge']:.1%} of it"
    )


def svd() -> None:
    """QR of the stacked factors against one dense SVD, for growing numbers of clients of rank 12."""
    rng = np.random.default_rng(0)
    print("\n| d_out × d_in | stacked rank | QR ms | dense ms | dense / QR | chosen |\n|---|---|---|---|---|---|")
    for d_out, d_in in ((384, 384), (1536, 384)):
        for stacked in (36, 60, 120, 192, 240, 360):
            left, right = rng.normal(size=(d_out, stacked)), rng.normal(size=(stacked, d_in))

            def by_qr(left: np.ndarray = left, right: np.ndarray = right) -> None:
                q_left, r_left = np.linalg.qr(left)
                q_right, r_right = np.linalg.qr(right.T)
                b, a = split_svd(r_left @ r_right.T, 12, 2.0)
                q_left @ b, a @ q_right.T

            found = interleaved({"qr": by_qr, "dense": lambda l=left, r=right: split_svd(l @ r, 12, 2.0)}, 5)  # noqa: E741
            chosen = "dense" if 4 * stacked >= 3 * min(d_out, d_in) else "QR"
            cells = (f"{found['qr'] * 1e3:.1f}", f"{found['dense'] * 1e3:.1f}", f"{found['dense'] / found['qr']:.1f}", chosen)
            print(f"| {d_out} × {d_in} | {stacked} | " + " | ".join(cells) + " |")
            b, a = split_product(left, right, 12, 2.0)
            u, s, vt = np.linalg.svd(left @ right)
            assert np.allclose(2.0 * b @ a, (u[:, :12] * s[:12]) @ vt[:12], atol=1e-6 * s[0])


if __name__ == "__main__":
    probe()
    svd()
