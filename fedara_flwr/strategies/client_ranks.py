"""Ranks that differ by client: shared by hetlora, flexlora, flora and fedex-lora."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, field_validator

from fedara_flwr import seeds
from fedara_flwr.config import Settings
from fedara_flwr.keys import ConfigError, Group
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.strategies.allocation import first_slots
from fedara_flwr.strategies.base import Client, State
from fedara_flwr.strategies.fedlora import FedLoRA


class RankOptions(Group):
    """Keys of every method whose clients have ranks of their own: which ranks, and who gets which."""

    ranks: list[int] = Field(
        default_factory=list, description="ranks that clients get, each up to adapter.rank; [] = adapter.rank for all"
    )
    assign: Literal["profile", "seed"] = Field(
        "profile", description="by the speed of the client's device among the fleet's, or drawn by seed"
    )

    @field_validator("ranks")
    @classmethod
    def _positive(cls, ranks: list[int]) -> list[int]:
        if any(rank < 1 for rank in ranks):
            raise ValueError("allowed are ranks from 1")
        return ranks


class ClientRanks(FedLoRA):
    """FedLoRA in which client k holds the first r_k slots of every module."""

    Options = RankOptions
    options: RankOptions

    @classmethod
    def check(cls, settings: Settings) -> BaseModel:
        """The checked options; beside what every method checks, no client's rank may be above the global one."""
        options = super().check(settings)
        assert isinstance(options, RankOptions)
        rank = settings.adapter.rank
        if too_high := [r for r in options.ranks if r > rank]:
            raise ConfigError(f"strategy.options.ranks = {too_high[0]}: allowed is up to adapter.rank = {rank}")
        return options

    def client_rank(self, state: State, client: Client) -> int:
        """r_k: the fleet's slowest device gets the lowest rank, the fastest the highest, those between in proportion.

        A real device, of unknown speed, is drawn by seed, and so is one of a fleet of equals.
        """
        options = self.options
        ranks = sorted(options.ranks) or [self.settings.adapter.rank]
        place, speeds = client.speed or (0, 0)
        if options.assign == "seed" or speeds < 2:
            return ranks[int(seeds.generator(self.settings.seed, "rank", client.key).integers(len(ranks)))]
        most = speeds - 1
        return ranks[(2 * place * (len(ranks) - 1) + most) // (2 * most)]  # rounded, halves up

    def client_mask(self, state: State, client: Client) -> RankMask:
        """The first r_k slots of every module."""
        return first_slots(state.mask, self.client_rank(state, client))
