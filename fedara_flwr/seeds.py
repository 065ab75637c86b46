"""Random streams: every one derives from the run's seed and the names of what it is for.

There is no generator state to save or to shift: a stream depends only on its own key, never on how many numbers
another one drew before it.
"""

import hashlib

import numpy as np


def derive(seed: int, *key: object) -> int:
    """A 63-bit seed for the stream named by `key`, the same on every machine."""
    text = "\x1f".join(str(part) for part in (seed, *key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *key: object) -> np.random.Generator:
    """A numpy generator for the stream named by `key`."""
    return np.random.default_rng(derive(seed, *key))
