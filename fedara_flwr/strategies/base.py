"""What a method is: a plain class that answers who trains what, how updates merge, and what comes next. No Flower, no torch.

The defaults are factor-wise FedAvg of B·diag(E)·A adapters and head without any allocation; a method overrides the hooks in
which it differs. A method has no state of its own: all that changes from round to round is in the State that `start` makes and
every hook is given, so a method can be called, and tested, without a server. The rounds themselves are in server/loop.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from fedara_flwr import seeds
from fedara_flwr.config import QUANTISED, Settings
from fedara_flwr.keys import ConfigError, Group, Scalar, check_options
from fedara_flwr.merging.merger import Merger
from fedara_flwr.model.deltas import DeltaLog, Piece, Weights
from fedara_flwr.model.draws import drawn_head
from fedara_flwr.model.parts import SVD, in_order, is_slot_part, of_backbone
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import Arrays, ModelSpec
from fedara_flwr.tasks import find as find_task
from fedara_flwr.wire.plan import TrainPlan

logger = logging.getLogger(__name__)
Terms = Mapping[str, Mapping[str, Scalar]]


@dataclass(frozen=True)
class Places:
    """Where the head's last layer is, and the server's own rows for the scale of its outputs.

    Attributes:
        labels: label names, one for each output.
        weight: where its weight, shape (labels, d), lies in the packed head.
        bias: where its bias lies; None where it has none.
        features: what enters it, of the predictions of the server's validation rows, shape (n, d).
        classes: their labels' numbers, shape (n,).
        per_row: most predictions that one row can have.
    """

    labels: tuple[str, ...]
    weight: slice
    bias: slice | None
    features: NDArray[np.float64]
    classes: NDArray[np.int64]
    per_row: int


class ModelPort(Protocol):
    """What a method sees of the model."""

    spec: ModelSpec

    def weight(self, name: str) -> NDArray[np.float32]:
        """The frozen weight of one module, shape (d_out, d_in)."""
        ...

    def evaluate(self, weights: Weights, split: Literal["validation", "test"] = ...) -> dict[str, float]:
        """The task's metrics of a global model on data that the server holds."""
        ...

    def places(self) -> Places:
        """What is needed to solve the head's last layer; ConfigError where it cannot be solved."""
        ...


class Device(Protocol):
    """What a method may know of the device that a simulated client stands for (server/fleet.py has the units)."""

    @property
    def flops(self) -> float: ...
    @property
    def up(self) -> float: ...
    @property
    def memory(self) -> int: ...


@dataclass(frozen=True)
class Client:
    """What a method sees of a client.

    Attributes:
        key: its name, from which its random streams derive.
        examples: how many it declared; 0 where it has not been asked yet.
        device: what it stands for in a simulation; None for a real device.
        speed: (place of its device among the fleet's distinct speeds, the slowest at 0; how many speeds there are); None for a
            real device.
    """

    key: str
    examples: int = 0
    device: Device | None = None
    speed: tuple[int, int] | None = None


@dataclass(frozen=True)
class Reply:
    """What is left of a good update once it is merged.

    Attributes:
        client: whose it is.
        weight: its weight in the mean.
        mask: slots that came.
        metrics: what the client said of its work (client/train.py), and `seconds-elapsed`, by the server's clock.
        reports: what its terms told, as `Method.read_report` read it.
    """

    client: Client
    weight: int
    mask: RankMask
    metrics: Mapping[str, float] = field(default_factory=dict)
    reports: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class State:
    """All that a method changes, after `server_round` rounds.

    Attributes:
        arrays: the global model, packed under `mask`.
        mask: the global rank mask.
        delta: what has been added to the backbone.
        clients: what the method remembers of each client, by its key: numbers and lists of numbers by name.
        solved: what the head was solved from before round 1 (server/statistics.py); {} where it was drawn.
    """

    arrays: Arrays
    mask: RankMask
    delta: DeltaLog
    clients: dict[str, dict[str, Any]] = field(default_factory=dict)
    server_round: int = 0
    solved: dict[str, Any] = field(default_factory=dict)


class NoOptions(Group):
    """`strategy.options` of a method that has none."""


class Method:
    """What a method overrides, in the order in which the loop calls it.

    Once: `terms`, `start`, which calls `start_mask`, `start_arrays` and `start_delta`. Each round: `ready` for clients that
    were asked whether they can train (when first drawn, after an error or a return), `prepare`, `plan` for each client, which
    calls `client_mask`, `merger`, `read_report` for what each reply's terms report, `next`, `weights`. At the end: `exported`.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    """One line for `fedara methods`."""
    paper: ClassVar[str] = ""
    learning_rate: ClassVar[float] = 1e-2
    """Of A and B where `train.learning-rate` is 0: measured for fedara, fedara-static and fedlora (benchmarks/study/before)."""
    Options: ClassVar[type[BaseModel]] = NoOptions
    trained: ClassVar[frozenset[str]] = SVD
    """Parts that are trained (model/parts.py); a task without a head has none to train."""
    kept: ClassVar[frozenset[str]] = frozenset()
    """Of these, parts whose trained values stay with each client."""
    remade: ClassVar[frozenset[str]] = frozenset()
    """Parts whose numbers mean something else after each round (fresh or split anew): nodes keep no rounding error of them."""
    own_merger: ClassVar[bool] = False
    """Whether `merger` gives a merger of the method's own: then no other rule can merge, and the run cannot be private."""
    by_reports: ClassVar[bool] = False
    """Whether what devices report of themselves decides something: then the run cannot be private."""
    changes_backbone: ClassVar[bool] = False
    """Whether the frozen weights change during the run, as quantised ones cannot: nodes that have such are left out."""

    def __init__(self, settings: Settings, model: ModelPort) -> None:
        """Take over settings and model; nothing is computed yet.

        Raises:
            ConfigError: a setting that this method cannot do, or a model of which it would train nothing.
        """
        self.settings, self.model, self.spec, self.options = settings, model, model.spec, self.check(settings)
        fixed = {"head"} if settings.train.head_learning_rate == 0 else set()
        self.parts = frozenset(part for part in self.trained - fixed if is_slot_part(part) or self.spec.size(part))
        for part in sorted(self.trained - self.parts - {"head"}):
            logger.warning("method %s: part %r holds nothing of this model and is left out", self.name, part)
        self._check_overlap()
        if not settings.num_server_rounds and not model.spec.head:
            task = settings.data.task
            raise ConfigError(f"num-server-rounds = 0: data.task = {task!r} has no head to be solved, allowed is 1 or more")
        if not self.parts and fixed and settings.num_server_rounds:
            raise ConfigError(f"train.head-learning-rate = 0.0: method {self.name!r} trains nothing else, allowed is above 0")
        if not self.parts and not fixed:
            task = settings.data.task
            raise ConfigError(f"method = {self.name!r}: data.task = {task!r} has no head, and nothing else would be trained")

    def _check_overlap(self) -> None:
        owners: dict[str, str] = {}
        for part in (part for part in in_order(self.parts) if not is_slot_part(part)):
            for parameter in self.spec.parameters(part):
                if (other := owners.setdefault(parameter.name, part)) != part:
                    line = f"parts {other!r} and {part!r} both hold {parameter.name!r}, allowed are parts that share nothing"
                    raise ConfigError(f"method = {self.name!r}: {line}")

    @classmethod
    def touches_backbone(cls) -> bool:
        """Whether the frozen weights change on the nodes: by a delta, or because parts of them are trained."""
        return cls.changes_backbone or of_backbone(cls.trained)

    @classmethod
    def check(cls, settings: Settings) -> BaseModel:
        """The checked options of `strategy.options`; called before there is a model, too.

        Raises:
            ConfigError: an option or a setting that this method cannot do, or a part that nobody declared.
        """
        strategy, privacy, dtype = settings.strategy, settings.privacy, settings.model.dtype
        try:
            in_order(cls.trained | cls.kept | cls.remade)
        except ValueError as error:
            raise ConfigError(f"method = {cls.name!r}: {error}") from None
        if not cls.kept <= cls.trained:
            raise ConfigError(f"method = {cls.name!r}: it keeps {min(cls.kept - cls.trained)!r}, which it does not train")
        if cls.kept and settings.run.checkpoint_every > 1:  # nodes have what they kept in the last rounds alone
            every = settings.run.checkpoint_every
            raise ConfigError(
                f"run.checkpoint-every = {every!r}: method {cls.name!r} keeps trained parts on the clients, allowed are 1 and 0"
            )
        if strategy.robust != "mean" and cls.own_merger:
            raise ConfigError(
                f"strategy.robust = {strategy.robust!r}: method {cls.name!r} merges in its own way, allowed is 'mean'"
            )
        if dtype in QUANTISED and cls.touches_backbone():
            line = f"method {cls.name!r} changes the backbone, allowed are 'float32' and 'bfloat16'"
            raise ConfigError(f"model.dtype = {dtype!r}: {line}")
        ways = {
            "merges in its own way": cls.own_merger,
            "goes by what devices report of themselves": cls.by_reports,
            "keeps trained parts on the clients": bool(cls.kept),
        }
        for way in (way for way, true in ways.items() if true and privacy.on):
            raise ConfigError(
                f"privacy.clip = {privacy.clip!r}: method {cls.name!r} {way}, allowed is 0.0, or a method "
                "such as fedara, fedara-static, fedlora, ffa-lora, head"
            )
        return check_options(cls.Options, settings.options, cls.name)

    @property
    def calibration(self) -> Mapping[str, int]:
        """Numbers to ask a node with whether it is ready; `calibrate-batch` and `calibrate-rank` ask for one timed batch."""
        return {}

    # -- the model --------------------------------------------------------------------------------------------------
    def start(self) -> State:
        """The state before round 1."""
        mask = self.start_mask()
        state = State(self.start_arrays(mask), mask, DeltaLog(self.spec))
        if (piece := self.start_delta(state)) is not None:
            state.delta.add(piece)
        return state

    def start_mask(self) -> RankMask:
        """Slots alive before round 1, which also sets every module's mask length r_m."""
        return RankMask.full([self.settings.adapter.rank] * len(self.spec.modules))

    def start_arrays(self, mask: RankMask) -> Arrays:
        """Values before round 1: A and B random, E = 0, so that ΔW = 0 (this project's reading of FedARA's start).

        A and B are drawn from N(0, 1/d), d numbers to a slot: unit-norm columns and rows, as singular vectors have.
        """
        arrays = self.start_head()
        if mask.count:
            arrays |= {part: self.draw(part, mask) for part in ("B", "A")}
            arrays["E"] = np.zeros(mask.count, dtype=np.float32)
        return arrays

    def start_delta(self, state: State) -> Piece | None:
        """What is added to the backbone before round 1; None = nothing."""
        return None

    def draw(self, part: str, mask: RankMask) -> NDArray[np.float32]:
        """B or A from N(0, 1/d), packed under `mask`, from the run's seed."""
        per_slot = np.array(self.spec.widths(part))[mask.modules[mask.bits]]
        noise = seeds.generator(self.settings.seed, "start", part).standard_normal(self.spec.length(part, mask))
        return (noise * np.repeat(1.0 / np.sqrt(per_slot), per_slot)).astype(np.float32)

    def start_head(self) -> Arrays:
        """The head as it is drawn from the run's seed, or the checkpoint's where that is kept; {} where the task has none."""
        return {"head": drawn_head(self.spec, self.settings.seed)} if self.spec.head else {}

    def scales(self, mask: RankMask) -> tuple[float, ...]:
        """The scale s of each module: alpha / r_m for the whole run, pruning or not."""
        return tuple(self.settings.adapter.alpha / max(r, 1) for r in mask.ranks)

    # -- the round --------------------------------------------------------------------------------------------------
    def terms(self) -> Terms:
        """Client-side terms of every round by name, with parameters: numbers, or short texts."""
        train = self.settings.train
        terms: dict[str, dict[str, Scalar]] = {}
        if train.prox_mu:
            terms["prox"] = {"mu": train.prox_mu}
        if train.orthogonality and {"A", "B"} <= self.parts:
            terms["orthogonality"] = {"weight": train.orthogonality}
        return terms

    def all_terms(self) -> frozenset[str]:
        """Names of the terms that any round may need: a node that lacks one cannot take part."""
        return frozenset(self.terms())

    def ready(self, state: State, client: Client, metrics: Mapping[str, float]) -> None:
        """See what a client reports of itself when it is first drawn (with `calibration`, see client/capacity.py)."""

    def prepare(self, state: State, clients: Sequence[Client]) -> None:
        """See all clients of a round, in the round's order, before the first plan is made."""

    def client_mask(self, state: State, client: Client) -> RankMask:
        """Slots that one client gets; the global mask covers them."""
        return state.mask

    def plan(self, state: State, client: Client) -> TrainPlan:
        """One client's orders for the round after `state.server_round`."""
        settings = self.settings
        return TrainPlan(
            server_round=state.server_round + 1,
            seed=settings.seed,
            mask=self.client_mask(state, client),
            scales=self.scales(state.mask),
            train=settings.train.local(
                self.learning_rate * find_task(settings.data.task).rate_factor,
                state.solved.get("diversity"),
                state.server_round / max(settings.num_server_rounds - 1, 1),
                self.spec.kept is not None,
            ),
            sent=self.parts - self.kept,
            kept=self.parts & self.kept,
            terms=self.terms(),
            class_shares=tuple(state.solved.get("shares", ())) if settings.train.loss == "logit-adjusted" else (),
            evaluate=settings.data.client_validation > 0,
            down=settings.wire.down,
            up=settings.wire.up,
        )

    def read_report(self, plan: TrainPlan, term: str, report: bytes) -> Any:
        """What a client's term reports, as `next` wants it.

        Raises:
            ValueError: it cannot be what the plan asked for; the reply is then dropped.
        """
        return report

    def merger(self, state: State) -> Merger | None:
        """What merges this round's updates into `state.arrays`; None = the run's rule, `strategy.robust` or private.

        A method that gives one sets `own_merger`.
        """
        return None

    def next(self, state: State, merged: Arrays, replies: Sequence[Reply], merger: Merger) -> None:
        """Change the state to what it is after a round that had enough good replies.

        Args:
            merged: what `merger.result()` gave, packed under `state.mask`.
            replies: the good ones in the round's order, without those that a robust rule left out; none in a private run.
        """
        state.arrays = merged
        mask = self.next_mask(state, replies)
        state.arrays, state.mask = self.spec.slice(state.arrays, state.mask, mask), mask

    def next_mask(self, state: State, replies: Sequence[Reply]) -> RankMask:
        """The global mask after this round; the present one must cover it. `state.arrays` are merged already."""
        return state.mask

    # -- the result -------------------------------------------------------------------------------------------------
    def weights(self, state: State) -> Weights:
        """The global model as numbers, which the server evaluates."""
        return Weights(state.arrays, state.mask, self.scales(state.mask), state.delta.composed())

    def exported(self, state: State) -> Weights:
        """What the run leaves: adapters where nothing but them and the head changed, else a merged model."""
        return self.weights(state)
