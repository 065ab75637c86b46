"""`fedlora`: LoRA with FedAvg of A and B (FedIT, arXiv 2305.05644). E ≡ 1 is neither trained nor sent."""

import numpy as np

from fedara_flwr.model.draws import lora_a
from fedara_flwr.model.parts import LORA
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.model.spec import Arrays
from fedara_flwr.strategies.base import Method
from fedara_flwr.strategies.registry import register


@register
class FedLoRA(Method):
    """A ~ U(-1/√d_in, 1/√d_in) (Kaiming with a = √5, as PEFT has it), B = 0."""

    name = "fedlora"
    title = "LoRA, FedAvg of A and B (FedIT)"
    paper = "arXiv 2305.05644"
    learning_rate = 2e-3
    trained = LORA

    def start_arrays(self, mask: RankMask) -> Arrays:
        """The head, a random A, and B = 0, so that ΔW = 0."""
        return self.start_head() | {
            "A": lora_a(self.spec, mask, self.settings.seed),
            "B": np.zeros(self.spec.length("B", mask), dtype=np.float32),
        }
