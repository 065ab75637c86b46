"""What a device can do: floating-point operations counted as they run, and one calibration batch (LEGEND's reports)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fedara_flwr.adapters.attach import AdaptedModel
from fedara_flwr.adapters.learner import Learner, cut
from fedara_flwr.config import MAX_RANK
from fedara_flwr.keys import ConfigError
from fedara_flwr.model.parts import of_backbone
from fedara_flwr.model.ranks import RankMask
from fedara_flwr.tasks.base import Encoded


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


_CPU = {  # torch counts attention on GPUs alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


_FORMULAS = FlopCounterMode(display=False, custom_mapping=_CPU).flop_registry
_QUANTISED = ("gemm_4bit", "int8_scaled_mm", "int8_mixed_scaled_mm")  # bitsandbytes' products with quantised weights


def _quantised(x: torch.Tensor, *args: Any, out_val: Any, **kwargs: Any) -> int:
    """Operations of a product with a quantised weight, inputs (..., d_in): as many as with the weight dequantised."""
    y = out_val[0] if isinstance(out_val, tuple) else out_val
    return int(2 * x.numel() * y.shape[-1])


class FlopCounter(TorchDispatchMode):
    """Counts the floating-point operations of matrix products and attention as they run, by torch's own formulas.

    torch's FlopCounterMode, which also tells modules and composite operations apart, takes three times as long.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        quantised = (getattr(torch.ops.bitsandbytes, name, None) for name in _QUANTISED)  # there once it is imported
        self._formulas = _FORMULAS | {op: _quantised for op in quantised if op is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and add what it costs."""
        out = func(*args, **(kwargs or {}))
        if formula := self._formulas.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def free_memory(device: torch.device) -> int:
    """Bytes that are free where the model computes: of the GPU, else of the machine."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def clock(device: torch.device) -> float:
    """Seconds, read once the device has done all that it was given: a GPU runs behind the program."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def backward_blocks(adapted: AdaptedModel, trained: frozenset[str]) -> int:
    """Blocks that the backward pass goes through: from the lowest one with a living module to the top."""
    if of_backbone(trained):  # it may be of any block
        return adapted.spec.blocks
    return adapted.spec.blocks - adapted.lowest


@contextmanager
def saved_bytes(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Bytes that autograd keeps for the backward pass, by storage; the model's own parameters are not among them."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def measure(learner: Learner, data: Encoded, batch_size: int, batch_tokens: int, rank: int) -> dict[str, int | float]:
    """Run the passes of one step with adapters of `rank` on every module; what they took, as metrics.

    Args:
        batch_tokens: most tokens that pass through the model at once, as in a TrainPlan.

    Returns:
        `seconds-forward`, `seconds-backward`, `flops-forward`, `flops-backward` (per step), `blocks` of the backward pass,
        `bytes-block` (kept for a backward pass by one block, with gradients and AdamW's moments of its adapters) and
        `bytes-free` (`free_memory`).

    Raises:
        ConfigError: a rank that no run can have.
    """
    if not 0 < rank <= MAX_RANK:
        raise ConfigError(f"the server asks to measure adapters of rank {rank}, allowed are 1 to {MAX_RANK}")
    adapted, task = learner.adapted, learner.task
    mask = RankMask.full([rank] * len(adapted.spec.modules))
    arrays = {part: np.zeros(adapted.spec.length(part, mask), dtype=np.float32) for part in ("B", "A", "head")}
    adapted.load(arrays, mask, (1.0,) * len(mask.ranks), frozenset(arrays))
    adapted.model.train(False)
    lengths = [len(row) for row in data.ids]
    rows = sorted(range(min(batch_size, len(data))), key=lengths.__getitem__)
    batches = [learner.batch(data, part) for part in cut(rows, lengths, batch_tokens)]
    flops, seconds, most = np.zeros(2, dtype=int), np.zeros(2), 0
    for batch in batches:
        with saved_bytes(adapted.model) as kept:
            with FlopCounter() as forward:
                loss = task.losses(task.outputs(learner, batch), batch).sum()
            with FlopCounter() as backward:
                loss.backward()
        flops += forward.total, backward.total
        most = max(most, sum(kept.values()))
    for batch in batches:  # once more: the first passes paid for warming up and for the counters
        began = clock(adapted.device)
        loss = task.losses(task.outputs(learner, batch), batch).sum()
        between = clock(adapted.device)
        loss.backward()
        seconds += between - began, clock(adapted.device) - between
    trained = 12 * sum(parameter.numel() for part in ("B", "A") for parameter in adapted.parameters(part))
    blocks = adapted.spec.blocks
    return {
        "seconds-forward": float(seconds[0]),
        "seconds-backward": float(seconds[1]),
        "flops-forward": int(flops[0]),
        "flops-backward": int(flops[1]),
        "blocks": blocks,
        "bytes-block": math.ceil((most + trained) / blocks),
        "bytes-free": free_memory(adapted.device),
    }
