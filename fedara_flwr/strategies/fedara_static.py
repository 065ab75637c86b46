"""`fedara-static`: FedARA's first part alone, B·diag(E)·A with FedAvg and no allocation (a baseline of this project)."""

from fedara_flwr.strategies import register
from fedara_flwr.strategies.base import BaseStrategy


@register
class FedARAStatic(BaseStrategy):
    """What BaseStrategy does."""

    name = "fedara-static"
    title = "B·diag(E)·A adapters, FedAvg of each factor, no allocation"
    paper = "arXiv 2501.14406, first part"
