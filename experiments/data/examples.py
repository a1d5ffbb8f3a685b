"""The examples of a batch, in whatever a network takes: how many, and the first ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from paretoprune.surgery.inputs import has_rows


def count_examples(inputs: Any) -> int:
    """Returns the number of examples in a model's inputs, the first dim of its first tensor."""
    return next(len(leaf) for leaf in tree_leaves(inputs) if has_rows(leaf))


def first_examples(inputs: Any, number: int) -> Any:
    """Returns the first examples of a model's inputs; repeats them if there are too few."""
    rows = torch.arange(number) % count_examples(inputs)
    return tree_map_only(Tensor, lambda leaf: leaf[rows] if has_rows(leaf) else leaf, inputs)
