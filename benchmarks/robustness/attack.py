"""Attackers for the in-process engine: they train like the others, then their replies of the round are replaced.

Those that are omniscient see every honest reply of the round before they answer; all of them know what the server sent. What
they send is well formed, so that only its values speak against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
from flwr.app import ConfigRecord, Message

from fedara_flwr import client_app, seeds
from fedara_flwr.client.train import ClientData
from fedara_flwr.engine import InProcessGrid
from fedara_flwr.model.spec import Arrays
from fedara_flwr.tasks import Encoded
from fedara_flwr.wire.arrays import to_record
from fedara_flwr.wire.records import LARGEST_VALUE

Z = 1.5  # standard deviations of little-is-enough, as in its paper's experiments; its formula gives 0 to 0.4 for ten clients
WITHIN = 18.0  # times the honest length, just below the default norm bound of 20
NOISE = 10.0  # times an honest change, the length of the Gaussian one: below the default norm bound


@dataclass(frozen=True)
class Scene:
    """What an attacker of one round sees.

    Attributes:
        sent: the model as the server sent it.
        own: what honest training on the attacker's data gave.
        honest: the other clients' replies of the round.
        rng: of (seed, round, attacker).
    """

    sent: Arrays
    own: Arrays
    honest: Sequence[Arrays]
    rng: np.random.Generator


def scaled(factor: float) -> Callable[[Scene], Arrays]:
    """The own change, this many times as long."""
    return lambda scene: {
        part: np.clip(
            scene.sent[part] + factor * (values.astype(np.float64) - scene.sent[part]), -LARGEST_VALUE / 2, LARGEST_VALUE / 2
        )
        for part, values in scene.own.items()
    }


def gaussian(scene: Scene) -> Arrays:
    """Noise, `NOISE` times as long as the own change, part by part."""
    found = {}
    for part, values in scene.own.items():
        spread = NOISE * float(np.sqrt(np.square(values.astype(np.float64) - scene.sent[part]).mean()))
        found[part] = scene.sent[part] + scene.rng.normal(0.0, spread, len(values))
    return found


def little_is_enough(scene: Scene) -> Arrays:
    """The honest mean, moved by Z standard deviations, number by number (Baruch et al., arXiv 1902.06156)."""
    mean, deviation = _moments(scene)
    return {part: mean[part] - Z * deviation[part] for part in mean}


def min_max(scene: Scene) -> Arrays:
    """The honest mean, moved against the standard deviation as far as leaves it no further from any honest reply than the two
    that are furthest apart (Shejwalkar and Houmansadr, NDSS 2021).
    """
    mean, deviation = _moments(scene)
    parts = sorted(mean)

    def flat(arrays: Arrays) -> np.ndarray:
        return np.concatenate([arrays[part].astype(np.float64) for part in parts])

    rows, middle, step = np.stack([flat(arrays) for arrays in scene.honest]), flat(mean), flat(deviation)
    limit = max(float(np.square(rows - row).sum(axis=1).max()) for row in rows)
    low, high = 0.0, 100.0
    for _ in range(40):
        share = (low + high) / 2
        inside = float(np.square(rows - (middle - share * step)).sum(axis=1).max()) <= limit
        low, high = (share, high) if inside else (low, share)
    return {part: mean[part] - low * deviation[part] for part in mean}


def _moments(scene: Scene) -> tuple[Arrays, Arrays]:
    stacks = {part: np.stack([arrays[part] for arrays in scene.honest]).astype(np.float64) for part in scene.own}
    return {part: rows.mean(axis=0) for part, rows in stacks.items()}, {part: rows.std(axis=0) for part, rows in stacks.items()}


def one_number(scene: Scene) -> Arrays:
    """The own change, and all the length that the norm bound lets the head have in the last class's bias."""
    head = {name: values.astype(np.float64) for name, values in scene.own.items()}
    moved = [float(np.sqrt(np.square(arrays["head"] - scene.sent["head"]).mean())) for arrays in scene.honest]
    head["head"][-1] += WITHIN * float(np.median(moved)) * len(head["head"]) ** 0.5
    return head


VALUES: dict[str, Callable[[Scene], Arrays]] = {
    "one number": one_number,
    "scale ×1000": scaled(1000.0),
    "scale ×10": scaled(10.0),
    "sign flip": scaled(-1.0),
    "gaussian": gaussian,
    "little is enough": little_is_enough,
    "min-max": min_max,
}
LABELS, VOTES = "label flip", "votes"
VOTE = "report.slot-vote"  # what a client says of its slots, in its reply
ATTACKS = (*VALUES, LABELS, VOTES)


class AttackGrid(InProcessGrid):
    """A grid in which some nodes attack.

    Args:
        attack: one of ATTACKS.
        attackers: numbers of the nodes that do.
        seed: of the noise.
    """

    def __init__(self, *args: Any, attack: str, attackers: frozenset[int], seed: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.attack, self.attackers, self.seed = attack, attackers, seed
        self._ready: dict[str, Message] = {}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the engine's, but a round's training is done as a whole, so that attackers can see the others."""
        ids = list(message_ids)
        if any(i in self._waiting and self._waiting[i].metadata.message_type == "train" for i in ids):
            batch = [message for message in self._waiting.values() if message.metadata.message_type == "train"]
            for message in batch:
                del self._waiting[message.metadata.message_id]
            for message, reply in zip(batch, self._round(batch), strict=True):
                self._ready[message.metadata.message_id] = reply
        return [self._ready.pop(i) for i in ids if i in self._ready] + list(super().pull_messages(ids))

    def _round(self, messages: list[Message]) -> list[Message]:
        bad = [self._number(message) in self.attackers for message in messages]
        replies = []
        for message, attacks in zip(messages, bad, strict=True):
            if attacks and self.attack == LABELS:
                with mock.patch.object(client_app, "_open", _flipped(client_app._open)):
                    replies.append(self._call(message))
            else:
                replies.append(self._call(message))
        whole = [reply for reply, attacks in zip(replies, bad, strict=True) if not attacks and not reply.has_error()]
        honest = [_arrays(reply) for reply in whole] if self.attack in VALUES else []
        for message, reply, attacks in zip(messages, replies, bad, strict=True):
            if not attacks or reply.has_error() or not whole:
                continue
            if self.attack == VOTES:
                _poison_votes(reply, whole)
            elif self.attack in VALUES:
                number = int(message.content.config_records["plan"]["round"])  # type: ignore[arg-type]
                rng = seeds.generator(self.seed, "attack", number, self._number(message))
                changed = VALUES[self.attack](Scene(_arrays(message), _arrays(reply), honest, rng))
                reply.content["arrays"] = to_record({part: values.astype(np.float32) for part, values in changed.items()})
        return replies

    def _number(self, message: Message) -> int:
        return int(self.contexts[message.metadata.dst_node_id].node_config["partition-id"])


def _arrays(message: Message) -> Arrays:
    return {part: array.numpy() for part, array in message.content.array_records["arrays"].items()}


def _flipped(real: Callable[..., Any]) -> Callable[..., Any]:
    """The client's way to its data, with label l read as L - 1 - l."""

    def opened(*args: Any, **options: Any) -> tuple[Any, ClientData]:
        resident, data = real(*args, **options)
        turned = Encoded(data.train.ids, [len(resident.labels) - 1 - label for label in data.train.labels])
        return resident, ClientData(turned, data.held_out)

    return opened


def _poison_votes(reply: Message, honest: Sequence[Message]) -> None:
    """Vote for what the honest clients value least, in exactly the reverse of their mean order."""
    record = reply.content.config_records["reply"]
    if VOTE not in record:
        return
    ranks = [np.frombuffer(other.content.config_records["reply"][VOTE], dtype="<u2") for other in honest]  # type: ignore[arg-type]
    worst = np.argsort(-np.sum(ranks, axis=0, dtype=np.int64), kind="stable")
    own = np.empty(len(worst), dtype="<u2")
    own[worst] = np.arange(len(worst))
    reply.content["reply"] = ConfigRecord({**record, VOTE: own.tobytes()})
