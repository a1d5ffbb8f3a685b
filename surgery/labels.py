"""Channel labels: what flows through the network instead of numbers.

A label names the channel that an element of an activation belongs to; 0 means that the element
belongs to none and always stays. Elements with the same label live and die together.

Legend of shapes: an activation of shape (N, C, H, W) whose elements differ in their channel only
has `ids` of shape (1, C, 1, 1): a dim along which labels do not vary has size 1 there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paretoprune.surgery.program import Shape


@dataclass(frozen=True)
class Labels:
    """Labels of one activation.

    Attributes:
        ids: Integer labels; every dim has the activation's size, or 1 where they do not vary.
        shape: Shape of the activation.
    """

    ids: Tensor
    shape: Shape

    @staticmethod
    def none(shape: Shape) -> Labels:
        """Returns labels of an activation whose elements all stay."""
        return Labels(torch.zeros([1] * len(shape), dtype=torch.int64), shape)

    @staticmethod
    def along(dim: int, ids: Tensor, shape: Shape) -> Labels:
        """Returns labels that vary along one dim only; `ids` has shape (shape[dim],)."""
        sizes = [1] * len(shape)
        sizes[dim] = ids.numel()
        return Labels(ids.reshape(sizes), shape)

    @property
    def varying(self) -> tuple[int, ...]:
        """The dims along which labels vary."""
        return tuple(dim for dim, size in enumerate(self.ids.shape) if size > 1)

    @property
    def present(self) -> bool:
        """Whether any element has a label."""
        return bool(self.ids.any())

    def line(self, dim: int) -> Tensor | None:
        """Returns the labels along `dim`, shape (shape[dim],); None if they vary elsewhere."""
        if any(other != dim % len(self.shape) for other in self.varying):
            return None
        return self.ids.reshape(-1).expand(self.shape[dim])

    def with_full(self, dim: int) -> Tensor:
        """Returns `ids` with `dim` at the activation's size."""
        sizes = list(self.ids.shape)
        sizes[dim] = self.shape[dim]
        return self.ids.expand(sizes)


def compressed(ids: Tensor, shape: Sequence[int]) -> Labels:
    """Returns labels with every dim along which `ids` is constant shrunk to size 1."""
    for dim, size in enumerate(ids.shape):
        if size > 1 and bool((ids == ids.narrow(dim, 0, 1)).all()):
            ids = ids.narrow(dim, 0, 1)
    return Labels(ids, tuple(shape))


def reshape(labels: Labels, shape: Shape) -> Labels:
    """Returns the labels after a view or reshape; untouched dims are never expanded."""
    sizes: list[int] = []
    result: list[int] = []
    for before, after in _segments(labels.shape, shape):
        varies = any(labels.ids.shape[dim] > 1 for dim in before)
        sizes += [labels.shape[dim] if varies else 1 for dim in before]
        result += [shape[dim] if varies else 1 for dim in after]
    return compressed(labels.ids.expand(sizes).reshape(result), shape)


def _segments(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Splits two shapes of equal size into the shortest runs of dims of equal size."""
    segments: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [], []
        if i < len(before):
            left.append(i)
            i += 1
        if j < len(after):
            right.append(j)
            j += 1
        while (a := math.prod(before[d] for d in left)) != (
            b := math.prod(after[d] for d in right)
        ):
            if a < b:
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        segments.append((left, right))
    return segments


class Unions:
    """Which labels are equal, and which must stay; resolved once at the end."""

    def __init__(self) -> None:
        self.count = 1  # label 0: always stays
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._frozen: list[tuple[Tensor, str]] = []

    def fresh(self, count: int) -> Tensor:
        """Returns new labels, shape (count,); a single channel can never go and gets 0."""
        if count == 1:
            return torch.zeros(1, dtype=torch.int64)
        self.count += count
        return torch.arange(self.count - count, self.count)

    def freeze(self, ids: Tensor, reason: str) -> None:
        """Declares that the channels of these labels stay."""
        ids = ids.unique()
        ids = ids[ids > 0]
        if ids.numel():
            self._frozen.append((ids, reason))

    def unify(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Declares labels equal element by element; who meets a 0 stays, for `reason`."""
        a, b = torch.broadcast_tensors(a, b)
        a, b = a.reshape(-1), b.reshape(-1)
        differ = a != b
        a, b = a[differ], b[differ]
        self.freeze(torch.cat([a[b == 0], b[a == 0]]), reason)
        both = (a > 0) & (b > 0)
        if bool(both.any()):
            self._pairs.append((a[both], b[both]))

    def solve(self) -> tuple[Tensor, dict[int, str]]:
        """Returns the class of every label (its smallest label), and reasons by frozen class."""
        parent = torch.arange(self.count)
        if self._pairs:
            a = torch.cat([pair[0] for pair in self._pairs])
            b = torch.cat([pair[1] for pair in self._pairs])
            while True:
                roots_a, roots_b = parent[a], parent[b]
                if torch.equal(roots_a, roots_b):
                    break
                low = torch.minimum(roots_a, roots_b)
                parent.scatter_reduce_(0, roots_a, low, "amin")
                parent.scatter_reduce_(0, roots_b, low, "amin")
                while not torch.equal(parent[parent], parent):
                    parent = parent[parent]
        frozen: dict[int, str] = {}
        for ids, reason in self._frozen:
            for root in parent[ids].unique().tolist():
                frozen.setdefault(root, reason)
        return parent, frozen
