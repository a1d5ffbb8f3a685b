"""Batches: which tensors have examples, and how they are gathered and sampled."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Batches = Iterable[tuple[Any, Tensor]]
"""A re-iterable of (inputs, targets) batches."""


def has_rows(leaf: object) -> bool:
    """Tells whether a part of a network's inputs is a tensor with a dim for the examples."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def gather_inputs(calibration: Batches, images: int) -> Any:
    """Returns the inputs of the first `images` examples as one batch.

    Raises:
        ValueError: If there is no batch.
    """
    parts: list[Any] = []
    count = 0
    for inputs, _ in calibration:
        parts.append(inputs)
        count += len(next(leaf for leaf in tree_leaves(inputs) if has_rows(leaf)))
        if count >= images:
            break
    if not parts:
        raise ValueError("reconstruction needs calibration data, but got no batch.")

    def join(*leaves: Any) -> Any:
        return torch.cat(leaves)[:images] if has_rows(leaves[0]) else leaves[0]

    return tree_map(join, *parts)


def sample_positions(total: int, samples: int, device: torch.device) -> Tensor:
    """Returns at most `samples` of `total` flat positions, sorted, the same at every call."""
    generator = torch.Generator().manual_seed(total)
    return torch.randperm(total, generator=generator)[:samples].sort().values.to(device)
