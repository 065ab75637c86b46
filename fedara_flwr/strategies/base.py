"""The base of every method: hooks only. A method overrides the ones in which it differs.

The defaults are factor-wise FedAvg of B·diag(E)·A adapters and head without any allocation. The rounds themselves, and
Flower's side of a Strategy, are in server/loop.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from fedara_flwr import seeds
from fedara_flwr.config import QUANTISED, ConfigError, Group, Settings, check_options
from fedara_flwr.merging.merger import Merger
from fedara_flwr.merging.private import PrivateMean
from fedara_flwr.merging.robust import RULES
from fedara_flwr.model.deltas import DeltaLog, Piece, Weights
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import Arrays, ModelSpec
from fedara_flwr.server.loop import RoundLoop
from fedara_flwr.server.roster import Expected, Node
from fedara_flwr.server.round import Record
from fedara_flwr.server.state import ServerState
from fedara_flwr.tasks import find as find_task
from fedara_flwr.wire.plan import TrainPlan, Update


class ModelPort(Protocol):
    """What a strategy sees of the model; free of torch (contracts.md §3)."""

    spec: ModelSpec

    def weight(self, name: str) -> NDArray[np.float32]: ...

    def evaluate(self, weights: Weights, split: Literal["validation", "test"] = ...) -> dict[str, float]: ...

    def expected(self, terms: frozenset[str]) -> Expected: ...


class NoOptions(Group):
    """`strategy.options` of a method that has none."""


class BaseStrategy(RoundLoop):
    """What a method overrides, in the order in which it is called.

    Once: `trainable`, `start_mask`, `start_arrays`, `start_delta`, `scales`, `terms`. Each round: `ready` for nodes that were
    asked whether they can train (when first drawn, after an error or a return), `prepare`, `client_mask` and `plan` for each
    node, `merger`, `take` for each good update, `leave_out`, `next_mask`, `finish_round`, `weights`. At the end: `exported`.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    """One line for `fedara methods`."""
    paper: ClassVar[str] = ""
    keys: ClassVar[tuple[str, ...]] = ()
    """Configuration keys that only this method reads."""
    learning_rate: ClassVar[float] = 1e-2
    """Of A and B where `train.learning-rate` is 0: measured for fedara, fedara-static and fedlora (benchmarks/defaults)."""
    Options: ClassVar[type[BaseModel]] = NoOptions
    trainable: ClassVar[frozenset[str]] = frozenset({"B", "E", "A", "head"})

    def __init__(self, settings: Settings, model: ModelPort, write: Callable[[Record], None] = lambda record: None) -> None:
        self.settings, self.model = settings, model  # terms() reads them
        self.options = check_options(self.Options, settings.options, self.name)
        if settings.strategy.robust != "mean" and type(self).merger is not BaseStrategy.merger:
            raise ConfigError(
                f"strategy.robust = {settings.strategy.robust!r}: method {self.name!r} merges in its own way, allowed is 'mean'"
            )
        if self.changes_backbone and settings.model.dtype in QUANTISED:
            raise ConfigError(
                f"model.dtype = {settings.model.dtype!r}: method {self.name!r} changes the backbone, "
                "allowed are 'float32' and 'bfloat16'"
            )
        if settings.privacy.on:
            self._check_private()
        super().__init__(settings, model.spec, model.expected(frozenset(self.terms())), write)
        mask = self.start_mask()
        self.state = ServerState(self.start_arrays(mask), mask, DeltaLog(self.spec))
        if (piece := self.start_delta()) is not None:
            self.state.delta.add(piece)

    def _check_private(self) -> None:
        ways = {"merger": "merges in its own way", "ready": "goes by what devices report of themselves"}
        for hook, way in ways.items():
            if getattr(type(self), hook) is not getattr(BaseStrategy, hook):
                raise ConfigError(
                    f"privacy.clip = {self.settings.privacy.clip!r}: method {self.name!r} {way}, allowed is 0.0, or a method "
                    "such as fedara, fedara-static, fedlora, ffa-lora, head"
                )

    # -- hooks: the model -------------------------------------------------------------------------------------------
    def start_mask(self) -> RankMask:
        """Slots alive before round 1, which also sets every module's mask length r_m."""
        return RankMask.full([self.settings.adapter.rank] * len(self.spec.modules))

    def start_arrays(self, mask: RankMask) -> Arrays:
        """Values before round 1: A and B random, E = 0, so that ΔW = 0 (this project's reading of FedARA's start).

        `adapter.init = "unit"` draws N(0, init-scale²/d), columns of B and rows of A of norm init-scale, as singular vectors
        have; "gaussian" draws N(0, init-scale²), PEFT's AdaLoRA at 0.02.
        """
        arrays = {"head": self.start_head()}
        if mask.count:
            for part in ("B", "A"):
                arrays[part] = self.draw(part, mask)
            arrays["E"] = np.zeros(mask.count, dtype=np.float32)
        return arrays

    def start_delta(self) -> Piece | None:
        """What is added to the backbone before round 1; called after `start_arrays`."""
        return None

    def draw(self, part: str, mask: RankMask) -> NDArray[np.float32]:
        """Random values of B or A by `adapter.init`, packed under `mask`, from the run's seed."""
        adapter, widths = self.settings.adapter, np.array(self.spec.widths(part))
        noise = seeds.generator(self.settings.seed, "start", part).standard_normal(self.spec.length(part, mask))
        per_slot = widths[mask.modules[mask.bits]]
        scale = np.repeat(1.0 / np.sqrt(per_slot), per_slot) if adapter.init == "unit" else 1.0
        return (noise * adapter.init_scale * scale).astype(np.float32)

    def start_head(self) -> NDArray[np.float32]:
        """The task layer: weights N(0, 0.02²) as in BERT, biases 0, norms 1; from the run's seed. Empty where there is none."""
        rng = seeds.generator(self.settings.seed, "start", "head")
        pieces = []
        for parameter in self.spec.head:
            if len(parameter.shape) > 1:
                pieces.append(rng.normal(0.0, 0.02, parameter.size))
            else:
                pieces.append(np.full(parameter.size, 0.0 if parameter.name.endswith("bias") else 1.0))
        return np.concatenate(pieces or [np.zeros(0)]).astype(np.float32)

    def scales(self) -> tuple[float, ...]:
        """S of each module: alpha / r_m for the whole run, pruning or not."""
        return tuple(self.settings.adapter.alpha / max(r, 1) for r in self.state.mask.ranks)

    # -- hooks: the round -------------------------------------------------------------------------------------------
    def terms(self) -> Mapping[str, Mapping[str, float]]:
        """Client-side terms by name, with parameters."""
        train = self.settings.train
        terms: dict[str, dict[str, float]] = {}
        if train.prox_mu:
            terms["prox"] = {"mu": train.prox_mu}
        if train.orthogonality and {"A", "B"} <= self.trainable:
            terms["orthogonality"] = {"weight": train.orthogonality}
        return terms

    def ready(self, node: Node, metrics: Mapping[str, float]) -> None:
        """See what a node reports of itself when it is first drawn (with `calibration`, see client/capacity)."""

    def prepare(self, server_round: int, nodes: Sequence[Node]) -> None:
        """See all nodes of a round, in sampling order, before the first plan is made."""

    def client_mask(self, client_key: str) -> RankMask:
        """Slots that one client gets; the global mask covers them."""
        return self.state.mask

    def plan(self, server_round: int, client_key: str) -> TrainPlan:
        """One client's orders."""
        train = self.settings.train
        return TrainPlan(
            server_round=server_round,
            seed=self.settings.seed,
            mask=self.client_mask(client_key),
            scales=self.scales(),
            trainable=self.trainable,
            steps=train.steps,
            epochs=train.epochs,
            batch_size=train.batch_size,
            batch_tokens=train.batch_tokens,
            learning_rate=train.learning_rate or find_task(self.settings.data.task).learning_rate or self.learning_rate,
            e_lr_factor=train.e_lr_factor,
            head_learning_rate=train.head_learning_rate,
            warmup_steps=train.warmup_steps,
            clip_norm=train.clip_norm,
            dropout=train.dropout,
            terms=self.terms(),
            evaluate=self.settings.data.client_validation > 0,
            down=self.settings.wire.down,
            up=self.settings.wire.up,
        )

    def merger(self) -> Merger:
        """What merges this round's updates into `state.arrays`: `strategy.robust`, or PrivateMean with `privacy.clip`.

        A method that overrides this merges in its own way, obeys no other rule than "mean" and cannot be private.
        """
        strategy, privacy = self.settings.strategy, self.settings.privacy
        if privacy.on:
            assert self._round is not None, "merger before configure_train"
            parts = frozenset[str]().union(*(plan.trainable for plan in self._round.plans))
            state = self.state
            return PrivateMean(self.spec, state.mask, state.arrays, parts, privacy.clip, privacy.noise_multiplier, self.planned)
        return RULES[strategy.robust](self.spec, self.state.mask, self.state.arrays, strategy.attackers)

    def take(self, client_key: str, update: Update, weight: int) -> None:
        """See one good update, in sampling order, beside the merger (votes, capacities)."""

    def leave_out(self, client_key: str) -> None:
        """Forget what `take` saw of a client whose update the merger left out (multi-krum)."""

    def next_mask(self, server_round: int) -> RankMask:
        """The global mask after this round; must be covered by the present one."""
        return self.state.mask

    def finish_round(self, server_round: int) -> None:
        """Change the state once the round is merged: fresh values, what joins `state.delta`."""

    # -- hooks: the result ------------------------------------------------------------------------------------------
    def weights(self) -> Weights:
        """The global model."""
        return Weights(self.state.arrays, self.state.mask, self.scales(), self.state.delta.composed())

    def exported(self) -> Weights:
        """What the run leaves: adapters where nothing but them and the head changed, else a merged model."""
        return self.weights()

    def evaluate(self) -> dict[str, float]:
        """The global model on the server's validation data."""
        return self.model.evaluate(self.weights())
