"""`fedara-static`: FedARA's first part alone, B·diag(E)·A with FedAvg and no allocation (a baseline of this project)."""

from fedara_flwr.strategies.base import Method
from fedara_flwr.strategies.registry import register


@register
class FedARAStatic(Method):
    """What every method does that overrides nothing."""

    name = "fedara-static"
    title = "B·diag(E)·A adapters, FedAvg of each factor, no allocation"
    paper = "arXiv 2501.14406, first part"
