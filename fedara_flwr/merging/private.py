"""Central differential privacy: updates clipped, their sum noised, divided by the number of clients that was planned.

What the server gives out after a round tells little about any one client's update: the sum of the differences from the sent
model, each cut to length `clip` over all its parts together, gets Gaussian noise of standard deviation noise-multiplier·clip
on every number (McMahan et al., arXiv 1710.06963). Who takes part is no secret. docs/privacy.md has the whole of it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from math import sqrt
from typing import Any

import numpy as np

from fedara_flwr.config import PrivacySettings
from fedara_flwr.keys import ConfigError
from fedara_flwr.model.difference import difference, share_within
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import Arrays, ModelSpec
from fedara_flwr.seeds import secure_normal
from fedara_flwr.wire.plan import Update

MECHANISM = "Gaussian noise on the sum of clipped updates, once a round"
ADJACENCY = "zero-out: all updates of one client, or zeros in their place; who takes part is not hidden"
Normal = Callable[[int], np.ndarray]
"""Draws so many independent numbers of N(0, 1), float64."""


class PrivateMean:
    """Mean of clipped differences with Gaussian noise. Every client weighs the same, whatever weight `add` is told.

    Slots that a client did not send count as unchanged. All numbers of `parts` get noise, sent or not. Needs the memory of
    one model.
    """

    memory = "one"

    def __init__(
        self,
        spec: ModelSpec,
        mask: RankMask,
        arrays: Arrays,
        parts: frozenset[str],
        clip: float,
        noise_multiplier: float,
        planned: int,
        normal: Normal = secure_normal,
    ) -> None:
        """`arrays` is the global model as it was sent, packed under `mask`.

        Args:
            parts: what this round trains, whoever replies.
            clip: length to which the difference of one update is cut, over all parts together.
            noise_multiplier: standard deviation of the noise on the sum, over `clip`.
            planned: clients that the round meant to ask; the divisor, however many answer.
        """
        self.spec, self.mask, self.arrays = spec, mask, arrays
        self.clip, self.noise_multiplier, self.planned, self._normal = clip, noise_multiplier, max(planned, 1), normal
        self.sums = {part: np.zeros(len(values)) for part, values in arrays.items() if part in parts}

    def add(self, client_key: str, update: Update, weight: int) -> None:
        """Add one client's difference, cut to `clip`; one that is not finite adds nothing."""
        sent = self.spec.slice(self.arrays, self.mask, update.mask)
        moved = difference({part: update.arrays[part] for part in self.sums if part in update.arrays}, sent)
        share = share_within(moved, self.clip)
        for part, change in moved.items() if share else ():
            self.sums[part][self.spec.places(part, self.mask, update.mask)] += share * change

    def result(self) -> Arrays:
        """The merged model, float32, packed under the same mask. To be called once: each call draws noise of its own."""
        spread = self.noise_multiplier * self.clip
        merged = dict(self.arrays)
        for part, total in self.sums.items():
            noised = total + spread * self._normal(len(total))
            merged[part] = (self.arrays[part] + noised / self.planned).astype(np.float32)
        return merged

    def report(self) -> dict[str, object]:
        """`planned`, and `noise`, the standard deviation of each number of the mean. How many were clipped is not told."""
        return {"planned": self.planned, "noise": self.noise_multiplier * self.clip / self.planned}


def epsilon(noise_multiplier: float, rounds: int, delta: float) -> float:
    """ε of `rounds` rounds at `delta`, adjacency as `ADJACENCY` says.

    No use is made of chance: the client may be in every round, since in a simulation clients know what samples follow from. All
    rounds together are then one Gaussian mechanism of noise-multiplier/√rounds, whose ε is known exactly (arXiv 1805.06530).

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    library = accounting()
    return float(library.get_epsilon_gaussian(noise_multiplier / sqrt(rounds), delta)) if rounds else 0.0


def ledger(settings: PrivacySettings, rounds: int, planned: int) -> dict[str, object]:
    """What a run says of its privacy after `rounds` rounds that may have been seen (federated.json)."""
    return {
        "mechanism": MECHANISM,
        "clip": settings.clip,
        "noise-multiplier": settings.noise_multiplier,
        "planned": planned,
        "rounds": rounds,
        "delta": settings.delta,
        "epsilon": epsilon(settings.noise_multiplier, rounds, settings.delta),
        "adjacency": ADJACENCY,
        "accounting": f"exact for composed Gaussians, dp-accounting {version('dp-accounting')}; no amplification by sampling",
    }


def in_words(settings: PrivacySettings, rounds: int) -> str:
    """The ε of `rounds` rounds as a line for the log."""
    value = epsilon(settings.noise_multiplier, rounds, settings.delta)
    return f"privacy: ε = {value:.3g} at δ = {settings.delta:g} after {rounds} rounds"


def accounting() -> Any:
    """The package dp-accounting, which computes ε.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import dp_accounting
    except ImportError:
        raise ConfigError(
            "privacy.clip: dp-accounting, which counts ε, is missing; pip install 'fedara-flwr[privacy]'"
        ) from None
    return dp_accounting
