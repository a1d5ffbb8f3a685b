"""Similarities of two networks' responses to the same examples.

Legend: m examples, X and Y features of shape (m, p) and (m, q), centred where it says so.

- CKA: Kornblith et al., ICML 2019, arXiv:1905.00414, linear: |X'Y|^2 / (|X'X| |Y'Y|) of centred
  features, Frobenius norms. It is biased upwards where m is not much larger than p and q; debiased
  with the unbiased estimator of Song et al., JMLR 2012.
- Shape distances: Williams et al., NeurIPS 2021, arXiv:2110.14739: the angle that is left between
  centred features after the best rotation; with alpha = 0 of whitened features (canonical
  correlations), with alpha = 1 of features as they are (Procrustes).
- KL divergence of the classes: Luo & Wu, CVPR 2020, arXiv:2004.02164.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

_NOISE = 1e-5  # of the largest singular value: below are the rounding errors of float32


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

    Args:
        x: Shape (m, p).
        y: Shape (m, q).
        debiased: Takes the unbiased estimator, which may be negative and needs m > 3.
    """
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    if debiased:
        k, l = x @ x.T, y @ y.T  # noqa: E741  (the letters of the paper)
        cross, own_x, own_y = _unbiased_hsic(k, l), _unbiased_hsic(k, k), _unbiased_hsic(l, l)
        scale = (own_x * own_y).clamp_min(0).sqrt()
    else:
        cross = (x.T @ y).square().sum()
        scale = (x.T @ x).norm() * (y.T @ y).norm()
    return torch.where(scale > 0, cross / torch.where(scale > 0, scale, 1.0), 0.0)


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
    scale = x.norm() * y.norm()
    overlap = torch.linalg.svdvals(x.T @ y).sum()
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
    """
    p, q = F.log_softmax(outputs, 1), F.log_softmax(changed, 1)
    return (q.exp() * (q - p)).sum(1).mean().clamp_min(0)


def _class_means(features: Tensor, targets: Tensor) -> Tensor:
    if targets.ndim != 1 or targets.is_floating_point():
        return features
    return torch.stack([features[targets == label].mean(0) for label in targets.unique()])


def _class_shape(dense: Response, other: Response, targets: Tensor) -> Tensor:
    """Procrustes distance of the class means: the Gaussian shape metric with alpha = 2."""
    x, y = (_class_means(each.features, targets) for each in (dense, other))
    return shape_angle(x, y, whitened=False)


def _transport(dense: Response, other: Response, _targets: Tensor) -> Tensor:
    """1-Wasserstein distance of all feature values, as one-dimensional samples of equal size."""
    x, y = (each.features.flatten().sort().values for each in (dense, other))
    return (x - y).abs().mean()


Change = Callable[[Response, Response, Tensor], Tensor]
CHANGES: Mapping[str, Change] = MappingProxyType(
    {
        "kl": lambda dense, other, _: kl_divergence(dense.outputs, other.outputs),
        "cka": lambda dense, other, _: 1 - cka(dense.features, other.features),
        "shape_0": lambda d, o, _: shape_angle(d.features, o.features, whitened=True),
        "shape_1": lambda d, o, _: shape_angle(d.features, o.features, whitened=False),
        "class_shape": _class_shape,
        "transport": _transport,
    }
)
"""Measures of change by name: (dense response, other response, targets) -> 0 for no change."""
SIMILARITIES = ("cka", "shape_0", "shape_1", "class_shape", "transport")
"""The measures of features, which vote in the consensus."""
