"""MACs counted by thop: an independent check of the closed-form cost of surgery.

thop leaves buffers and hooks behind, so it only ever sees a copy without weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from paretoprune.search.metrics import to_device
from paretoprune.surgery.inputs import count_rows
from paretoprune.surgery.program import as_call


class _Positional(nn.Module):
    """Calls a model with keyword arguments, which thop cannot pass."""

    def __init__(self, model: nn.Module, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.kwargs = kwargs

    def forward(self, *args: Any) -> Any:
        return self.model(*args, **self.kwargs)


def thop_macs(model: nn.Module, example_inputs: Any) -> int | None:
    """Returns the MACs of convolutions and linear layers as thop counts them, per example.

    thop knows layers by their exact type, so attention and functional calls are missing from
    its count; it is equal to the closed form exactly where a network has neither.

    Args:
        model: Left untouched: the count runs on a copy on the meta device.
        example_inputs: A tensor, tuple of arguments or dict of keyword arguments; batch first.

    Returns:
        The count, or None if thop fails on the model, as where it needs values.
    """
    from thop import profile
    from thop.vision.basic_hooks import zero_ops

    zero = (nn.BatchNorm2d, nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.LayerNorm, nn.Softmax)
    args, kwargs = as_call(to_device(example_inputs, torch.device("meta")))
    clone = _Positional(_meta_clone(model), kwargs)
    try:
        counted, _ = profile(
            clone, inputs=args, custom_ops=dict.fromkeys(zero, zero_ops), verbose=False
        )
    except Exception:  # an operator needs values and not shapes, or thop other inputs
        return None
    return round(float(counted) / count_rows(example_inputs))


def _meta_clone(model: nn.Module) -> nn.Module:
    """Returns a copy in eval mode whose parameters and buffers have shapes but no values."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo).eval()
