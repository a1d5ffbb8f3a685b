"""Ridge regression towards given weights, and the patches that a convolution reads.

Legend of shapes: P sampled positions, G convolution groups, F features that one output of a group
reads, O outputs of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

RIDGE = 1e-3
"""Ridge, relative to the mean diagonal of the Gram matrix."""


@dataclass(frozen=True)
class Fit:
    """A fitted affine map: weight of shape (G, O, F) and bias of shape (G, O)."""

    weight: Tensor
    bias: Tensor


def ridge_fit(
    features: Tensor, targets: Tensor, prior: Tensor, *, intercept: bool, ridge: float = RIDGE
) -> Fit:
    """Returns the weights that map features to targets, drawn a little towards a prior.

    Minimises |U W' - Y|^2 + lambda |W - W0|^2 with lambda = ridge * mean diagonal of U'U,
    solved in float64 by Cholesky decomposition.

    Args:
        features: U, shape (G, P, F).
        targets: Y, shape (G, P, O).
        prior: W0, shape (G, O, F).
        intercept: Whether a bias is fitted too.
        ridge: Relative ridge.
    """
    mean_u = features.mean(1, keepdim=True) if intercept else features.new_zeros(1)
    mean_y = targets.mean(1, keepdim=True) if intercept else targets.new_zeros(1)
    u, y = features - mean_u, targets - mean_y
    gram = (u.mT @ u).double()
    cross = (u.mT @ y).double()
    weight = solve_ridge(gram, cross, prior, ridge)
    bias = prior.new_zeros(weight.shape[:2])
    if intercept:
        bias = (mean_y - mean_u @ weight.mT).squeeze(1)
    return Fit(weight, bias)


def solve_ridge(gram: Tensor, cross: Tensor, prior: Tensor, ridge: float = RIDGE) -> Tensor:
    """Returns (gram + lambda I)^-1 (cross + lambda W0'), transposed: shape (G, O, F), W0's dtype.

    Args:
        gram: U'U, float64, shape (G, F, F).
        cross: U'Y, float64, shape (G, F, O).
        prior: W0, shape (G, O, F).
        ridge: lambda relative to the mean diagonal of `gram`.
    """
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
    strength = (ridge * scale)[:, None, None]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(gram + strength * eye)
    solution = torch.cholesky_solve(cross + strength * prior.double().mT, factor)
    return solution.mT.to(prior.dtype)


@dataclass(frozen=True)
class Geometry:
    """How a convolution reads its input; a linear layer has no spatial dims.

    Attributes:
        kernel: Size of the kernel per spatial dim.
        stride: Stride per spatial dim.
        padding: Zero padding per spatial dim.
        dilation: Dilation per spatial dim.
        groups: Convolution groups.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def patches(inputs: Tensor, geometry: Geometry, positions: Tensor) -> Tensor:
    """Returns what the convolution reads at some output positions, shape (G, P, F).

    Args:
        inputs: Shape (N, C, *spatial), or (..., C) for a linear layer.
        geometry: Of the convolution.
        positions: Flat indices over (N, *output spatial), shape (P,).
    """
    if not geometry.kernel:
        return inputs.reshape(-1, inputs.shape[-1])[positions][None]
    widths = [width for pad in reversed(geometry.padding) for width in (pad, pad)]
    padded = F.pad(inputs, widths) if any(widths) else inputs
    spatial = output_sizes(inputs.shape[2:], geometry)
    image, *corner = torch.unravel_index(positions, (inputs.shape[0], *spatial))
    rank = len(spatial)
    index = []
    for dim in range(rank):
        taps = torch.arange(geometry.kernel[dim], device=positions.device) * geometry.dilation[dim]
        start = corner[dim] * geometry.stride[dim]
        shape = [1] * (rank + 1)
        shape[0], shape[dim + 1] = -1, geometry.kernel[dim]
        index.append((start[:, None] + taps).reshape(shape))
    taken = _channels(padded, image.reshape([-1] + [1] * rank), index)  # P, *kernel, C
    grouped = taken.movedim(-1, 1).reshape(len(positions), geometry.groups, -1)
    return grouped.transpose(0, 1)


def output_sizes(sizes: tuple[int, ...] | torch.Size, geometry: Geometry) -> tuple[int, ...]:
    """Returns the spatial sizes that the convolution makes of spatial `sizes`."""
    return tuple(
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, pad, dilation in zip(
            sizes,
            geometry.kernel,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            strict=True,
        )
    )


def output_positions(inputs: Tensor, geometry: Geometry) -> int:
    """Returns the number of output positions, over the batch and all spatial dims."""
    if not geometry.kernel:
        return inputs.numel() // inputs.shape[-1]
    return len(inputs) * math.prod(output_sizes(inputs.shape[2:], geometry))


def rows(outputs: Tensor, geometry: Geometry, positions: Tensor) -> Tensor:
    """Returns output values at flat positions over (N, *spatial), shape (P, C)."""
    if not geometry.kernel:
        return outputs.reshape(-1, outputs.shape[-1])[positions]
    image, *corner = torch.unravel_index(positions, (outputs.shape[0], *outputs.shape[2:]))
    return _channels(outputs, image, corner)


def _channels(values: Tensor, image: Tensor, spatial: Sequence[Tensor]) -> Tensor:
    """Returns the channels at some places, as the last dim, without copying the others."""
    index: tuple[Any, ...] = (image, slice(None), *spatial)
    return values[index]
