"""8- and 4-bit linear layers: bitsandbytes' in place of torch's, on which PEFT places adapters as on any other.

`int8` is LLM.int8() (arXiv 2208.07339): a scale for each output, inputs in 8 bits as well but for the outlying features.
`int4` is QLoRA's NF4 (arXiv 2305.14314): a scale for 64 numbers, which is itself quantised; inputs in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn

from fedara_flwr.keys import ConfigError

OUTLIER = 6.0  # of LLM.int8(): features that some input of the batch takes beyond it are multiplied in 16 bits


def library(dtype: str) -> ModuleType:
    """The package bitsandbytes.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import bitsandbytes
    except ImportError:
        line = "bitsandbytes, which quantises, is missing; pip install 'fedara-flwr[quantised]'"
        raise ConfigError(f"model.dtype = {dtype!r} (or node-config dtype): {line}") from None
    return bitsandbytes


def quantise(model: nn.Module, names: Iterable[str], dtype: str, device: str) -> None:
    """Put quantised layers in the places of the nn.Linear `names`; they are frozen, and on the device.

    One after the other, so the device never holds more than one layer as it was.
    """
    bnb: Any = library(dtype)
    for name in names:
        linear: Any = model.get_submodule(name)
        size: Any = {"input_features": linear.in_features, "output_features": linear.out_features, "device": "meta"}
        size["bias"] = linear.bias is not None
        if dtype == "int8":
            layer = bnb.nn.Linear8bitLt(**size, has_fp16_weights=False, threshold=OUTLIER)
            layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False)
        else:
            layer = bnb.nn.Linear4bit(**size, compute_dtype=torch.bfloat16, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
            # else eval() on such processors packs the weights for a product without gradients; we train in eval(), too
            layer.support_avx512bf16_for_cpu = False
        layer.bias = linear.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.to(device))


def dequantised(layer: Any) -> NDArray[np.float32]:
    """The weight that a quantised layer stands for, float32, shape (d_out, d_in)."""
    weight: torch.Tensor = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
    array: NDArray[np.float32] = weight.float().cpu().numpy()
    return array
