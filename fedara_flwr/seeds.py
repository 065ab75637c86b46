"""Random streams: every one derives from the run's seed and the names of what it is for, but the noise of privacy.

There is no generator state to save or to shift: a stream depends only on its own key, never on how many numbers
another one drew before it.
"""

import hashlib
import os

import numpy as np


def derive(seed: int, *key: object) -> int:
    """A 63-bit seed for the stream named by `key`, the same on every machine."""
    text = "\x1f".join(str(part) for part in (seed, *key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *key: object) -> np.random.Generator:
    """A numpy generator for the stream named by `key`."""
    return np.random.default_rng(derive(seed, *key))


def secure_normal(count: int) -> np.ndarray:
    """N(0, 1) from the operating system's random bytes, for privacy: who knows the run's seed knows nothing of them.

    Box and Muller's method; each number is the sum of four draws, halved, which keeps the float's last bits from telling
    what was drawn (Holohan and Braghin, arXiv 2107.10138). Shape (count,), float64.
    """
    total = np.zeros(count)
    for _ in range(4):
        uniform = np.frombuffer(os.urandom(16 * count), dtype=np.uint64).reshape(2, count)
        radius = np.sqrt(-2.0 * np.log((uniform[0] + 0.5) * 2.0**-64))
        total += radius * np.cos(2.0 * np.pi * 2.0**-64 * uniform[1])
    return total / 2.0
