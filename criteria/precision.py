"""mixed_precision: whether training on a device computes in bfloat16."""

from __future__ import annotations

import torch


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
