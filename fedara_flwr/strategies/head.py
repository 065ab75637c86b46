"""`head`: only the task layer is trained, the backbone is as it was. The row that every adapter must beat."""

from fedara_flwr.model.ranks import RankMask
from fedara_flwr.strategies.base import Method
from fedara_flwr.strategies.registry import register


@register
class Head(Method):
    """No module has a slot; a task without a head is refused."""

    name = "head"
    title = "the task layer alone, FedAvg"
    trained = frozenset({"head"})

    def start_mask(self) -> RankMask:
        """No slot in any module: masks of length 0."""
        return RankMask.full([0] * len(self.spec.modules))
