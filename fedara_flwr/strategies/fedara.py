"""FedARA (arXiv 2501.14406): truncated-SVD adapters, dynamic rank allocation, communication and module pruning.

Stated by the paper: ΔW = B·diag(E)·A; each round clients make local rank masks and the server arbitrates a global one; ranks
are pruned progressively; pruned ranks are not sent; inactive modules leave the model.
This project's reading, each a key: the start (`adapter.init`), the slots' score (`strategy.importance`,
`strategy.importance-time`), the arbitration (`strategy.arbitration`, `strategy.threshold`), AdaLoRA's cubic budget
(`adapter.final-rank`, `strategy.warmup-rounds`, `strategy.final-rounds`), who sends what (`strategy.upload-mask`) and
FedAvg of each factor over the alive slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedara_flwr.config import ConfigError
from fedara_flwr.model.ranks import RankMask, select_top
from fedara_flwr.server.roster import Node
from fedara_flwr.strategies import register
from fedara_flwr.strategies.allocation import WeightedVote, arbitrate_budget, arbitrate_threshold, budget
from fedara_flwr.strategies.base import BaseStrategy
from fedara_flwr.wire.plan import TrainPlan, Update

MAX_SLOTS = 2**16


@register
class FedARA(BaseStrategy):
    """Votes, arbitration and a falling budget on top of `fedara-static`."""

    name = "fedara"
    title = "B·diag(E)·A adapters whose rank budget falls, slots chosen by the clients' votes"
    paper = "arXiv 2501.14406"
    keys = (
        "adapter.final-rank",
        "strategy.arbitration",
        "strategy.threshold",
        "strategy.warmup-rounds",
        "strategy.final-rounds",
        "strategy.importance",
        "strategy.importance-time",
        "strategy.upload-mask",
    )

    def start_mask(self) -> RankMask:
        """As the base; refused where the slots' ranks would not fit the vote's 16 bits."""
        mask = super().start_mask()
        if mask.count > MAX_SLOTS:
            allowed = MAX_SLOTS // len(mask.ranks)
            raise ConfigError(f"adapter.rank = {self.settings.adapter.rank}: with this model allowed is up to {allowed}")
        return mask

    @property
    def final_budget(self) -> int:
        """b_T: final-rank slots per module on average, at least one in all."""
        return max(1, round(self.settings.adapter.final_rank * len(self.spec.modules)))

    def budget(self, server_round: int) -> int:
        """b(t), the slots that may be alive after `server_round`."""
        return budget(
            server_round,
            self.settings.num_server_rounds,
            sum(self.state.mask.ranks),
            self.final_budget,
            self.settings.warmup_rounds,
            self.settings.final_rounds,
        )

    def prepare(self, server_round: int, nodes: Sequence[Node]) -> None:
        """No vote yet."""
        self._votes: dict[str, WeightedVote] = {}

    def plan(self, server_round: int, client_key: str) -> TrainPlan:
        """Ask for votes in rounds after which the budget is smaller than what is alive; in a private run never."""
        plan, strategy = super().plan(server_round, client_key), self.settings.strategy
        allowed = self.budget(server_round)
        if allowed >= self.state.mask.count or self.settings.privacy.on:
            return plan
        return replace(
            plan,
            report=frozenset({"votes", "scores"}),
            budget=allowed,
            importance=strategy.importance,
            importance_time=strategy.importance_time,
            upload_mask=strategy.upload_mask,
        )

    def take(self, client_key: str, update: Update, weight: int) -> None:
        """Keep the vote."""
        if update.vote is not None:
            self._votes[client_key] = WeightedVote(weight, update.vote)

    def leave_out(self, client_key: str) -> None:
        """Without its vote."""
        self._votes.pop(client_key, None)

    def next_mask(self, server_round: int) -> RankMask:
        """Arbitrate; dead slots stay dead, and never fewer than the final budget live.

        In a private run the largest slots of the merged, noised arrays survive, which tells nothing beyond those.
        """
        mask, strategy = self.state.mask, self.settings.strategy
        if self.settings.privacy.on:
            sizes = self.spec.slot_sizes(self.state.arrays, mask)
            return mask.keep(select_top(sizes, self.budget(server_round)))
        if not self._votes:
            return mask
        votes = list(self._votes.values())
        if strategy.arbitration == "budget":
            return arbitrate_budget(mask, votes, self.budget(server_round))
        return arbitrate_threshold(mask, votes, strategy.threshold, self.final_budget)
