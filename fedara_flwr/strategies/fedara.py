"""FedARA (arXiv 2501.14406): truncated-SVD adapters, dynamic rank allocation, communication and module pruning.

Stated by the paper: ΔW = B·diag(E)·A; each round clients make local rank masks and the server arbitrates a global one; ranks
are pruned progressively; pruned ranks are not sent; inactive modules leave the model.
This project's reading, each an option: the slots' score (`importance`), the arbitration (`arbitration`, `threshold`), AdaLoRA's
cubic budget (`final-rank`, `warmup-rounds`, `final-rounds`) and who sends what (`upload-mask`); besides, the start (E = 0, A
and B of unit norm), FedAvg of each factor over the alive slots, and that all votes count alike and a quarter of the clients
settles nothing alone (allocation.py). `threshold` is there for the paper's arbitration by a share of votes, `magnitude` for the
ablation without gradients (and what is left behind noise): neither differs beyond noise in benchmarks/study. The clients'
half is the term `slot-vote` (client/vote.py).
Ours alone: `depth-slack`, by which whole blocks leave the model early, from the lowest; configs/paper.toml is without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, Field

from fedara_flwr.config import Settings
from fedara_flwr.keys import ConfigError, Group
from fedara_flwr.model.ranks import Ints, RankMask, select_top, unpack_order
from fedara_flwr.strategies.allocation import (
    Vote,
    arbitrate_budget,
    arbitrate_threshold,
    budget,
    depth_values,
    last_blocks,
    lowest_block,
    votes_within,
)
from fedara_flwr.strategies.base import Client, Method, Reply, State
from fedara_flwr.strategies.registry import register
from fedara_flwr.wire.plan import KEPT_SLOTS, TrainPlan

MAX_SLOTS = 2**16
VOTE = "slot-vote"


class FedARAOptions(Group):
    """Keys of `strategy.options` for fedara."""

    final_rank: float = Field(3.0, gt=0, description="rank slots per module, on average, when the budget has fallen")
    warmup_rounds: int = Field(-1, ge=-1, description="rounds before the budget falls; -1 = a tenth")
    final_rounds: int = Field(-1, ge=-1, description="rounds at the final budget; -1 = a tenth")
    importance: Literal["gradient-product", "magnitude"] = Field(
        "gradient-product", description="how a client scores its slots"
    )
    arbitration: Literal["budget", "threshold"] = Field("budget", description="how votes become the global mask")
    threshold: float = Field(0.5, gt=0, le=1, description="share of votes that a slot needs, by 'threshold'")
    depth_slack: float = Field(
        0.03,
        ge=0,
        lt=1,
        description="share of the slots' worth that may go with the lowest blocks after warm-up; 0 = none go, nor where the "
        "budget does not fall or the run is private",
    )
    upload_mask: Literal["global", "local"] = Field(
        "global", description="slots a client sends back: all it got, or those it voted for"
    )


@register
class FedARA(Method):
    """Votes, arbitration and a falling budget on top of `fedara-static`."""

    name = "fedara"
    title = "B·diag(E)·A adapters whose rank budget falls, slots chosen by the clients' votes"
    paper = "arXiv 2501.14406"
    Options = FedARAOptions
    options: FedARAOptions

    @classmethod
    def check(cls, settings: Settings) -> BaseModel:
        """The checked options; beside what every method checks, the budget must be able to fall within the run."""
        options = super().check(settings)
        assert isinstance(options, FedARAOptions)
        rank, rounds = settings.adapter.rank, settings.num_server_rounds
        if options.final_rank > rank:
            raise ConfigError(f"strategy.options.final-rank = {options.final_rank!r}: allowed is at most adapter.rank = {rank}")
        warmup, final = (_tenth(value, rounds) for value in (options.warmup_rounds, options.final_rounds))
        if warmup + final >= rounds > 1:
            raise ConfigError(
                f"strategy.options.warmup-rounds = {warmup}: with strategy.options.final-rounds = {final} allowed is a sum "
                f"below num-server-rounds = {rounds}"
            )
        if settings.privacy.on and (options.upload_mask, options.arbitration) != ("global", "budget"):
            raise ConfigError(
                f"privacy.clip = {settings.privacy.clip!r}: with strategy.options allowed are upload-mask = 'global' and "
                "arbitration = 'budget'"
            )
        return options

    def start_mask(self) -> RankMask:
        """All slots of every module; ConfigError where the slots' ranks would not fit the vote's 16 bits."""
        mask = super().start_mask()
        if mask.count > MAX_SLOTS:
            allowed = MAX_SLOTS // len(mask.ranks)
            raise ConfigError(f"adapter.rank = {self.settings.adapter.rank}: with this model allowed is up to {allowed}")
        return mask

    @property
    def final_budget(self) -> int:
        """b_T: final-rank slots per module on average, at least one in all."""
        return max(1, round(self.options.final_rank * len(self.spec.modules)))

    def budget(self, state: State, server_round: int) -> int:
        """b(t), the slots that may be alive after `server_round`."""
        rounds, options = self.settings.num_server_rounds, self.options
        warmup, final = (_tenth(value, rounds) for value in (options.warmup_rounds, options.final_rounds))
        return budget(server_round, rounds, sum(state.mask.ranks), self.final_budget, warmup, final)

    def all_terms(self) -> frozenset[str]:
        """Every method's terms and the vote; without the vote in a private run."""
        return super().all_terms() | (frozenset() if self.settings.privacy.on else {VOTE})

    def plan(self, state: State, client: Client) -> TrainPlan:
        """Ask for votes in rounds after which the budget is smaller than what is alive; in a private run never."""
        plan, options = super().plan(state, client), self.options
        allowed = self.budget(state, plan.server_round)
        if allowed >= state.mask.count or self.settings.privacy.on:
            return plan
        report = {VOTE} if options.upload_mask == "global" else {VOTE, KEPT_SLOTS}
        vote = {"budget": allowed, "importance": options.importance}
        return replace(plan, terms={**plan.terms, VOTE: vote}, report=frozenset(report))

    def read_report(self, plan: TrainPlan, term: str, report: bytes) -> Ints:
        """The client's rank of every slot, 0 = best; shape (plan.mask.count,)."""
        return unpack_order(report, plan.mask.count)

    def next_mask(self, state: State, replies: Sequence[Reply]) -> RankMask:
        """The mask that the votes decide; dead slots stay dead, and never fewer than the final budget live.

        In a private run the largest slots of the merged, noised arrays survive, which tells nothing beyond those.
        """
        mask, options, allowed = state.mask, self.options, self.budget(state, state.server_round)
        if self.settings.privacy.on:
            return mask.keep(select_top(self.spec.slot_sizes(state.arrays, mask), allowed))
        votes = [Vote(reply.reports[VOTE], allowed) for reply in replies if VOTE in reply.reports]
        if not votes:
            return mask
        if options.depth_slack and mask.count == sum(mask.ranks):  # warm-up is just over
            values = depth_values(self.spec, mask, votes, self.final_budget)
            lowest = lowest_block(values, options.depth_slack)
            while (upper := last_blocks(self.spec, mask, self.spec.blocks - lowest)).count < self.final_budget:
                lowest -= 1
            votes, mask = votes_within(votes, mask, upper), upper
        if options.arbitration == "budget":
            return arbitrate_budget(mask, votes, allowed)
        return arbitrate_threshold(mask, votes, options.threshold, self.final_budget)


def _tenth(value: int, rounds: int) -> int:
    """Rounds that a key means: -1 stands for a tenth of all."""
    return round(0.1 * rounds) if value < 0 else value
