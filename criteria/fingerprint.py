"""fingerprint: a short text that tells networks, data and settings apart by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def of_model(model: nn.Module) -> str:
    """Returns the fingerprint of all parameters and buffers, by name and content."""
    return _digest(
        (name, tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())
    )


def of_batches(batches: Iterable[tuple[Any, Tensor]]) -> str:
    """Returns the fingerprint of the examples and targets of all batches."""
    return _digest(
        (f"{number}.{place}", leaf)
        for number, batch in enumerate(batches)
        for place, leaf in enumerate(torch.utils._pytree.tree_leaves(batch))
    )


def _digest(items: Iterable[tuple[str, Any]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in items:
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()
