"""Mixed precision: whether training on a device computes in bfloat16, and a forward pass in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from paretoprune.surgery.program import as_call


def mixed_precision(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16: new GPUs do, and CPUs with instructions for it.

    On others bfloat16 is emulated, and slower than float32.

    Args:
        device: Where the network is.
    """
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def in_mixed_precision(network: nn.Module, inputs: Any, device: torch.device) -> Any:
    """Returns the outputs of a network, computed in bfloat16 where the device can.

    They are float32: some losses are undefined under autocast, and a sum in bfloat16 is coarse.

    Args:
        network: Called as it is.
        inputs: A tensor, tuple of arguments or dict of keyword arguments, on `device`.
        device: Where the network is.
    """
    args, kwargs = as_call(inputs)
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision(device)):
        outputs = network(*args, **kwargs)
    return tree_map_only(
        Tensor, lambda leaf: leaf.float() if leaf.dtype is torch.bfloat16 else leaf, outputs
    )
