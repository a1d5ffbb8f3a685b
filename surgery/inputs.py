"""Batches: which tensors have examples, and how they are gathered and sampled."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Batches = Iterable[tuple[Any, Any]]
"""A re-iterable of (inputs, targets): each a tensor, or tuples, lists and dicts of tensors."""


def has_rows(leaf: object) -> bool:
    """Tells whether a part of a batch is a tensor with a dim for the examples."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def count_rows(part: Any) -> int:
    """Returns the number of examples in inputs or targets, the first dim of the first tensor."""
    return next(len(leaf) for leaf in tree_leaves(part) if has_rows(leaf))


def agree_in_rows(part: Any) -> bool:
    """Tells whether inputs or targets are tensors alone, all of as many examples."""
    leaves = tree_leaves(part)
    return all(map(has_rows, leaves)) and len({len(leaf) for leaf in leaves}) == 1


def some_rows(batch: Any, start: int, stop: int) -> Any:
    """Returns the examples of a batch from one position to another; what has no rows stays."""
    return tree_map(lambda leaf: leaf[start:stop] if has_rows(leaf) else leaf, batch)


def join_rows(*batches: Any) -> Any:
    """Returns the examples of batches as one; what has no rows is that of the first."""
    return tree_map(lambda *parts: torch.cat(parts) if has_rows(parts[0]) else parts[0], *batches)


def gather_inputs(calibration: Batches, images: int) -> Any:
    """Returns the inputs of the first `images` examples as one batch.

    Raises:
        ValueError: If there is no batch.
    """
    parts: list[Any] = []
    count = 0
    for inputs, _ in calibration:
        parts.append(inputs)
        count += count_rows(inputs)
        if count >= images:
            break
    if not parts:
        raise ValueError("reconstruction needs calibration data, but got no batch.")
    return some_rows(join_rows(*parts), 0, images)


def sample_positions(total: int, samples: int, device: torch.device) -> Tensor:
    """Returns at most `samples` of `total` flat positions, sorted, the same at every call."""
    generator = torch.Generator().manual_seed(total)
    return torch.randperm(total, generator=generator)[:samples].sort().values.to(device)
