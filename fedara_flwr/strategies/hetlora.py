"""`hetlora` (HetLoRA, arXiv 2401.06432): a rank per client, self-pruning, sparsity-weighted aggregation.

Stated by the paper: global factors of rank max r_k, truncated to r_k for client k; its loss has λ·‖B[:, γ·r_k:]‖·‖A[γ·r_k:,
:]‖ added, and where that product fell during local training the client's rank falls to γ·r_k; updates are padded with zeros
and weighted by ‖B_k·A_k‖_F. This project's reading: the norm is taken over all modules together, and weighs at most so many
times the round's median as `strategy.weight-cap` says; a client's present rank is kept by the server, so nothing stays on the
client; head averaged as in FedAvg.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field

from fedara_flwr.merging.factors import delta_norm
from fedara_flwr.merging.mean import PaddedMean
from fedara_flwr.merging.merger import Merger
from fedara_flwr.model.spec import Arrays
from fedara_flwr.strategies.base import Client, Reply, State, Terms
from fedara_flwr.strategies.client_ranks import ClientRanks, RankOptions
from fedara_flwr.strategies.registry import register
from fedara_flwr.wire.plan import KEPT_SLOTS, TrainPlan


class HetLoRAOptions(RankOptions):
    """Keys of `strategy.options` for hetlora."""

    penalty: float = Field(5e-3, ge=0, description="λ, weight of the tail's norm in the loss; 0 = no self-pruning")
    gamma: float = Field(0.85, gt=0, lt=1, description="γ, share of its slots that a client keeps when its tail shrank")


@register
class HetLoRA(ClientRanks):
    """Zero-padded, norm-weighted averaging of factors of different ranks."""

    name = "hetlora"
    title = "LoRA with a rank per client, self-pruning and norm-weighted, zero-padded averaging"
    paper = "arXiv 2401.06432"
    own_merger = True
    Options = HetLoRAOptions
    options: HetLoRAOptions

    def terms(self) -> Terms:
        """Every method's terms and the tail's penalty."""
        options = self.options
        if not options.penalty:
            return super().terms()
        return {**super().terms(), "tail-penalty": {"weight": options.penalty, "gamma": options.gamma}}

    def client_rank(self, state: State, client: Client) -> int:
        """The client's rank r_k, or what self-pruning has left of it."""
        left = state.clients.get(client.key, {}).get("rank", self.settings.adapter.rank)
        return min(super().client_rank(state, client), left)

    def plan(self, state: State, client: Client) -> TrainPlan:
        """Ask which slots the client keeps."""
        plan = super().plan(state, client)
        return replace(plan, report=frozenset({KEPT_SLOTS})) if "tail-penalty" in plan.terms else plan

    def merger(self, state: State) -> PaddedMean:
        """A zero-padded mean in which a client weighs ‖B_k·A_k‖_F, at most `strategy.weight-cap` times the median."""
        cap = self.settings.strategy.weight_cap
        return PaddedMean(self.spec, state.mask, state.arrays, lambda update: delta_norm(self.spec, update), cap)

    def next(self, state: State, merged: Arrays, replies: Sequence[Reply], merger: Merger) -> None:
        """Remember the rank that each client kept."""
        super().next(state, merged, replies, merger)
        state.clients |= {reply.client.key: {"rank": max(1, int(reply.mask.alive.max()))} for reply in replies}
