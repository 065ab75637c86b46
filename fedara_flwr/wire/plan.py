"""TrainPlan and Update: what the server asks of a client in one round, and what it gets back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedara_flwr.keys import Scalar
from fedara_flwr.model.draws import draw
from fedara_flwr.model.parts import is_slot_part, of_backbone
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import Arrays, ModelSpec
from fedara_flwr.training import LocalTraining

KEPT_SLOTS = "kept-slots"
"""A report that is no term's: which of the plan's slots the client's terms want sent back; the others are not."""


@dataclass(frozen=True)
class TrainPlan:
    """One client's orders for one round.

    Of each part the plan says whether it is `sent` (trained and returned), `kept` (trained, and its values stay with the node
    until its next round), both, or neither: then it is frozen. What a part starts from either travels with the plan
    (`carries`) or is drawn by both sides (`drawn`); a kept part starts from what the node kept, and so only without that.

    Attributes:
        server_round: counted from 1.
        seed: the run's seed; the client's streams derive from (seed, round, client key).
        mask: slots that travel and live in the client's model.
        scales: s of y = W0·x + s·B·diag(E)·A·x, one per module.
        train: steps, batches and learning rates.
        sent: parts that are trained and sent back.
        kept: parts that are trained and stay with the node.
        carries: parts that travel with the plan.
        drawn: parts that both sides draw from `draw_seed` (model/draws.py). A slot part that is neither drawn nor carried
            counts as its declaration says: E as 1.
        entries: numbers of the backbone that are trained, at positions drawn from `draw_seed`; 0 = all.
        terms: client-side terms by name, each with its parameters: numbers, or short texts.
        report: names of the terms whose report is to be sent back, and KEPT_SLOTS.
        class_shares: each class's share of all clients' rows, for a logit-adjusted loss; () = not known.
        evaluate: whether to evaluate the received model on the client's own held-out share.
        delta: digests of the pieces whose sum the client must add to its backbone (model/deltas.py).
        down: format of the arrays that travel with the plan (wire/codec.py).
        up: format of those that are sent back.
        feedback: parts to which the node adds what rounding took before, keeping what it takes now (wire/upload.py).
        run: a name for the run, under which the node keeps things; '' without `feedback` and `kept`.
    """

    server_round: int
    seed: int
    mask: RankMask
    scales: tuple[float, ...]
    train: LocalTraining
    sent: frozenset[str]
    kept: frozenset[str] = frozenset()
    carries: frozenset[str] = frozenset()
    drawn: frozenset[str] = frozenset()
    draw_seed: int = 0
    entries: int = 0
    terms: Mapping[str, Mapping[str, Scalar]] = field(default_factory=dict)
    report: frozenset[str] = frozenset()
    class_shares: tuple[float, ...] = ()
    evaluate: bool = False
    delta: tuple[str, ...] = ()
    down: str = "float32"
    up: str = "float32"
    feedback: frozenset[str] = frozenset()
    run: str = ""

    @property
    def trained(self) -> frozenset[str]:
        """Parts that are trained, whether they are sent back or kept."""
        return self.sent | self.kept

    @property
    def differences(self) -> bool:
        """Whether what is sent back are differences from what travelled or was drawn, and not values."""
        return (self.down, self.up) != ("float32", "float32")

    def returns(self, mask: RankMask) -> frozenset[str]:
        """Parts that an update under `mask` carries: the sent ones, without slot parts where no slot is alive."""
        return frozenset(name for name in self.sent if mask.count or not is_slot_part(name))

    def work(self, spec: ModelSpec, examples: int) -> int:
        """What a client with so many examples has to do, to compare clients of a round: rows times blocks gone through.

        One for the forward pass through a block, two for the backward pass, which ends at the lowest living module.
        """
        lowest = 0 if of_backbone(self.trained) else spec.lowest(self.mask)
        return self.train.rows(examples) * (3 * spec.blocks - 2 * lowest)

    def start(self, spec: ModelSpec, arrays: Arrays, mask: RankMask, sub: RankMask) -> Arrays:
        """What the server knows that training starts from, packed under `sub`.

        That is `arrays` (packed under `mask`) with what both sides draw of the sent parts in place of their values there.
        """
        drawn = draw(spec, sub, self.drawn & self.sent, self.draw_seed, self.entries)
        return spec.slice(arrays, mask, sub) | drawn


@dataclass(frozen=True)
class Update:
    """What one client sends back in one round.

    Attributes:
        arrays: the trained parts, packed under `mask`.
        mask: slots that came: the plan's, or those of them that the client's terms wanted sent.
        num_examples: examples the client trains on.
        metrics: losses, seconds, bytes of memory; names as in docs.
        reports: what terms report, by the term's name: bytes as they travel; on the server what the method reads in them.
        stays: trained parts that stay with the node, packed under the plan's mask; they never travel.
    """

    arrays: Arrays
    mask: RankMask
    num_examples: int
    metrics: Mapping[str, int | float]
    reports: Mapping[str, Any] = field(default_factory=dict)
    stays: Arrays = field(default_factory=dict)
