"""`head`: only the task layer is trained, the backbone is as it was. The row that every adapter must beat."""

from fedara_flwr.config import ConfigError
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.strategies import register
from fedara_flwr.strategies.base import BaseStrategy


@register
class Head(BaseStrategy):
    """No module has a slot."""

    name = "head"
    title = "the task layer alone, FedAvg"
    trainable = frozenset({"head"})

    def start_mask(self) -> RankMask:
        """Masks of length 0: nothing to send, nothing in the model."""
        if not self.spec.head:
            raise ConfigError(f"method = 'head': data.task = {self.settings.data.task!r} has no head that could be trained")
        return RankMask.full([0] * len(self.spec.modules))
