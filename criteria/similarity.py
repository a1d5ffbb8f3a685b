"""Similarities of two networks' responses to the same examples.

Legend: m examples, X and Y features of shape (m, p) and (m, q), centred where it says so.

- CKA: Kornblith et al., ICML 2019, arXiv:1905.00414, linear: |X'Y|^2 / (|X'X| |Y'Y|) of centred
  features, Frobenius norms. It is biased upwards where m is not much larger than p and q; debiased
  with the unbiased estimator of Song et al., JMLR 2012.
- Shape distances: Williams et al., NeurIPS 2021, arXiv:2110.14739: the angle that is left between
  centred features after the best rotation; with alpha = 0 of whitened features (canonical
  correlations), with alpha = 1 of features as they are (Procrustes). The permutation distance is
  the angle after the best reordering of the neurons instead.
- Gaussian-stochastic shape distances: Duong et al., ICLR 2023, arXiv:2211.11665: every class is a
  Gaussian, and the distances between the Gaussians of a class are minimised over one rotation for
  all; alpha = 0 compares covariances, alpha = 2 means, alpha = 1 both (2-Wasserstein).
- KL divergence of the classes: Luo & Wu, CVPR 2020, arXiv:2004.02164.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from paretoprune.surgery.inputs import count_rows

_NOISE = 1e-5  # of the largest singular value: below are the rounding errors of float32
_ROUNDING = 1e-14  # of float32 features, in their squares
_ROUNDS = 5
_WIDEST = 4096  # features that are reordered: the products of all pairs then take 128 MiB
_GAIN = 1e-4  # of the squared distance: rounds that win less are not worth their time


@dataclass(frozen=True, slots=True)
class Response:
    """What a network computes for m examples.

    Attributes:
        features: What its last layer reads, float64, shape (m, p).
        outputs: What it returns, float64, shape (m, classes, ...).
    """

    features: Tensor
    outputs: Tensor


def cka(x: Tensor, y: Tensor, *, debiased: bool = False) -> Tensor:
    """Returns the linear CKA of two sets of features, 1 for equal ones; constant ones give 0.

    Features wider than examples are many are compared by their Gram matrices, |X'Y|^2 being the
    inner product of XX' and YY': the flattened maps of dense prediction have millions of columns.

    Args:
        x: Shape (m, p).
        y: Shape (m, q).
        debiased: Takes the unbiased estimator, which may be negative and needs m > 3.
    """
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    if debiased or max(x.shape[1], y.shape[1]) > len(x):
        k, l = x @ x.T, y @ y.T  # noqa: E741  (the letters of the paper)
        cross, scale = _unbiased(k, l) if debiased else ((k * l).sum(), k.norm() * l.norm())
    else:
        cross = (x.T @ y).square().sum()
        scale = (x.T @ x).norm() * (y.T @ y).norm()
    return torch.where(scale > 0, cross / torch.where(scale > 0, scale, 1.0), 0.0)


def _unbiased(k: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
    """Returns the numerator and the denominator of the debiased CKA of two Gram matrices."""
    own = _unbiased_hsic(k, k) * _unbiased_hsic(l, l)
    return _unbiased_hsic(k, l), own.clamp_min(0).sqrt()


def _unbiased_hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """Returns the unbiased HSIC estimate of two Gram matrices, shape (m, m)."""
    m = len(k)
    if m < 4:
        raise ValueError(f"debiased CKA needs at least 4 examples, but got {m}.")
    k, l = k - torch.diag(k.diagonal()), l - torch.diag(l.diagonal())  # noqa: E741
    total: Tensor = (k * l).sum() + k.sum() * l.sum() / ((m - 1) * (m - 2))
    total = total - 2 * (k.sum(0) * l.sum(0)).sum() / (m - 2)
    return total / (m * (m - 3))


def shape_angle(x: Tensor, y: Tensor, *, whitened: bool) -> Tensor:
    """Returns the angle between two sets of features after the best rotation, in [0, pi/2].

    Args:
        x: Shape (m, p).
        y: Shape (m, q).
        whitened: Whether features are whitened first (alpha = 0).
    """
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    if whitened:
        x, y = _whitened(x), _whitened(y)
    x, y = _narrowed(x)[0], _narrowed(y)[0]
    return _angle(torch.linalg.svdvals(x.T @ y).sum(), x, y)


def permutation_angle(x: Tensor, y: Tensor) -> Tensor:
    """Returns the angle between two sets of features after the best permutation, in [0, pi].

    Args:
        x: Shape (m, p).
        y: Shape (m, p).
    """
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    products = x.T @ y
    rows, columns = linear_sum_assignment(products.cpu().numpy(), maximize=True)
    return _angle(products[torch.as_tensor(rows), torch.as_tensor(columns)].sum(), x, y)


def _narrowed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns features of no more columns than rows, and the basis that they are coordinates in.

    Rotations do not see what features wider than examples are many add to the cost.
    """
    if x.shape[1] <= len(x):
        return x, torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    basis, root = torch.linalg.qr(x.T)
    return root.T, basis


def _angle(overlap: Tensor, x: Tensor, y: Tensor) -> Tensor:
    scale = x.norm() * y.norm()
    cosine = torch.where(scale > 0, overlap / torch.where(scale > 0, scale, 1.0), 0.0)
    return cosine.clamp(-1, 1).arccos()


def _whitened(x: Tensor) -> Tensor:
    """Returns an orthonormal basis of the columns; directions that carry nothing are left out."""
    u, values, _ = torch.linalg.svd(x, full_matrices=False)
    basis: Tensor = u[:, values > _NOISE * values.max().clamp_min(torch.finfo(x.dtype).tiny)]
    return basis


def kl_divergence(outputs: Tensor, changed: Tensor) -> Tensor:
    """Returns the mean of KL(q || p), p the softmax of `outputs` and q that of `changed`.

    Args:
        outputs: Logits of the dense network, shape (m, classes, ...).
        changed: Logits of the changed network, likewise.

    Raises:
        ValueError: If the outputs are not those of at least two classes.
    """
    if outputs.ndim < 2 or outputs.shape[1] < 2:
        raise ValueError(
            "kl compares the probabilities of at least two classes, but the network returns "
            f"{tuple(outputs.shape[1:])} for each example; rank by cka or taylor instead."
        )
    p, q = F.log_softmax(outputs, 1), F.log_softmax(changed, 1)
    return (q.exp() * (q - p)).sum(1).mean().clamp_min(0)


def gaussian_shape(
    x: Tensor, y: Tensor, targets: Any, *, alpha: int, rounds: int = _ROUNDS
) -> Tensor:
    """Returns the Gaussian-stochastic shape distance of two sets of features, 0 for equal ones.

    The root of the least mean over the classes of alpha |m - n|^2 + (2 - alpha) B^2, where m and n
    are the means, and B is the Bures distance of the covariances, n and y's covariance rotated by
    one orthogonal matrix Q for all classes. As B is the least |R - U S Q| over orthogonal U, with
    R and S the centred features over the root of their number, U and Q are improved in turn, from
    Q = 1 on, which never enlarges the distance. What is found need not be the least of all.

    Args:
        x: Shape (m, p).
        y: Shape (m, p).
        targets: Classes, integers, shape (m,). Where they are no class labels, as in regression
            and dense prediction, every example is a class of its own: then there are no
            covariances, so that alpha = 0 is always 0, and alpha = 1 tells what alpha = 2 does.
        alpha: 0, 1 or 2.
        rounds: Q is improved at most so often.
    """
    labels = _labels(targets, x.device)
    (x, basis_x), (y, basis_y) = _narrowed(x.double()), _narrowed(y.double())
    means_x, rows_x = _gaussians(x, labels, alpha)
    means_y, rows_y = _gaussians(y, labels, alpha)
    size = torch.stack([e.square().sum() for e in (means_x, rows_x, means_y, rows_y)]).sum()
    overlap = torch.full_like(size, -torch.inf)
    better = _overlaps(means_x, rows_x, means_y, rows_y, basis_y.T @ basis_x)
    for each in islice(better, rounds + 1):
        gain, overlap = each - overlap, each
        if gain <= _GAIN * (size - 2 * overlap) + _ROUNDING * size:
            break
    return (size - 2 * overlap).clamp_min(0).sqrt()


def _labels(targets: Any, device: torch.device) -> Tensor:
    """Returns the classes as 0, 1, ... without gaps, shape (m,)."""
    one = isinstance(targets, Tensor) and targets.ndim == 1
    if not one or targets.is_floating_point():
        return torch.arange(count_rows(targets), device=device)
    labels: Tensor = targets.unique(return_inverse=True)[1]
    return labels


def _gaussians(x: Tensor, labels: Tensor, alpha: int) -> tuple[Tensor, Tensor]:
    """Returns the means and the roots of the covariances, with their weights in the distance.

    Returns:
        Shapes (classes, p) and (classes, r, p): R'R is a class's covariance.
    """
    counts = labels.bincount()
    classes = len(counts)
    means = x.new_zeros(classes, x.shape[1]).index_add(0, labels, x) / counts[:, None]
    order = labels.argsort(stable=True)
    first = counts.cumsum(0) - counts
    places = torch.arange(len(x), device=x.device) - first[labels[order]]
    rows = x.new_zeros(classes, int(counts.max()), x.shape[1])  # classes of less end in zeros
    rows[labels[order], places] = ((x - means[labels]) / counts[labels, None].sqrt())[order]
    if rows.shape[1] > rows.shape[2]:  # a smaller root of the same covariance
        rows = torch.linalg.qr(rows, mode="r").R
    return means * (alpha / classes) ** 0.5, rows * ((2 - alpha) / classes) ** 0.5


def _overlaps(
    means_x: Tensor, rows_x: Tensor, means_y: Tensor, rows_y: Tensor, turn: Tensor
) -> Iterator[Tensor]:
    """Yields the inner product of x and the aligned y: for Q = `turn`, then for better ones."""
    u, values, v = torch.linalg.svd(rows_x @ (rows_y @ turn).mT)
    yield (means_x * (means_y @ turn)).sum() + values.sum()
    while True:
        products = means_y.T @ means_x + ((u @ (v @ rows_y)).mT @ rows_x).sum(0)
        left, values, right = torch.linalg.svd(products)
        yield values.sum()
        u, _, v = torch.linalg.svd(rows_x @ (rows_y @ (left @ right)).mT)


def _gaussian_shape(alpha: int, dense: Response, other: Response, targets: Any) -> Tensor:
    return gaussian_shape(dense.features, other.features, targets, alpha=alpha)


def _permutation(dense: Response, other: Response, _targets: Any) -> Tensor:
    """The permutation distance; 0 for all features wider than `_WIDEST`.

    It compares every column of one network with every column of the other. For the flattened maps
    of dense prediction these pairs fit into no memory, and the time grows with the cube of the
    width. A 0 for every structure is a tie in every ranking, which has no say in it.
    """
    if dense.features.shape[1] > _WIDEST:
        return dense.features.new_zeros(())
    return permutation_angle(dense.features, other.features)


def _transport(dense: Response, other: Response, _targets: Any) -> Tensor:
    """1-Wasserstein distance of all feature values, as one-dimensional samples of equal size."""
    x, y = (each.features.flatten().sort().values for each in (dense, other))
    return (x - y).abs().mean()


Change = Callable[[Response, Response, Any], Tensor]
CHANGES: Mapping[str, Change] = MappingProxyType(
    {
        "kl": lambda dense, other, _: kl_divergence(dense.outputs, other.outputs),
        "cka": lambda dense, other, _: 1 - cka(dense.features, other.features),
        "shape_0": lambda d, o, _: shape_angle(d.features, o.features, whitened=True),
        "shape_1": lambda d, o, _: shape_angle(d.features, o.features, whitened=False),
        "permutation": _permutation,
        "gaussian_0": partial(_gaussian_shape, 0),
        "gaussian_1": partial(_gaussian_shape, 1),
        "gaussian_2": partial(_gaussian_shape, 2),
        "transport": _transport,
    }
)
"""Measures of change by name: (dense response, other response, targets) -> 0 for no change."""
SIMILARITIES = tuple(name for name in CHANGES if name != "kl")
"""The measures of features, which vote in the consensus."""
