"""Robustness: accuracy under attack and on corrupted images, in pixel space.

FGSM: Goodfellow, Shlens & Szegedy, ICLR 2015, arXiv:1412.6572, white-box: every network is
attacked by its own gradient. The step is taken on pixels in [0, 1] and clipped there, before the
normalisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretoprune.experiments.data.sources import ImageArray
from paretoprune.experiments.data.splits import Batches
from paretoprune.experiments.measuring.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from paretoprune.search.metrics import device_of, evaluate, evaluating
from paretoprune.search.problem import Batch
from paretoprune.surgery.progress import Progress, silent

EPSILONS = (2, 4, 8)
"""Steps of FGSM, in 1/255 of the range of pixels."""


def robustness(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    progress: Progress = silent,
) -> dict[str, float]:
    """Returns `fgsm_2`, `fgsm_4`, `fgsm_8`, one accuracy per corruption, and their mean.

    Accuracies are fractions; that of a corruption is the mean over its severities, `corrupted`
    the mean over all corruptions.

    Args:
        model: A classifier.
        batches: Test images: `Batches` of an `ImageArray`, whose normalisation is known.
        progress: Told how many attacks and corruptions are done.

    Raises:
        ValueError: If the normalisation is not known.
    """
    source, indices, size = images_of(batches)
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (source.mean, source.std))

    def pixels() -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, targets in Batches(source, indices, size):
            yield (inputs * std + mean).clamp(0, 1), targets

    found: dict[str, float] = {}
    total = len(EPSILONS) + len(CORRUPTIONS)
    for epsilon in EPSILONS:
        progress("robustness", len(found), total)
        attacked = (
            (fgsm(model, images, targets, epsilon / 255, mean, std), targets)
            for images, targets in pixels()
        )
        found[f"fgsm_{epsilon}"] = evaluate(model, attacked)["accuracy"]
    for name in CORRUPTIONS:
        progress("robustness", len(found), total)
        found[name] = (
            sum(
                evaluate(model, _corrupted(pixels(), name, severity, mean, std))["accuracy"]
                for severity in range(SEVERITIES)
            )
            / SEVERITIES
        )
    found["corrupted"] = sum(found[name] for name in CORRUPTIONS) / len(CORRUPTIONS)
    return found


def images_of(batches: Iterable[Batch]) -> tuple[ImageArray, Tensor, int]:
    """Returns the source of images with known normalisation, their positions, and a batch's size.

    Raises:
        ValueError: If the normalisation is not known.
    """
    if isinstance(batches, Batches) and isinstance(batches.source, ImageArray):
        return batches.source, batches.indices, batches.batch_size
    raise ValueError(
        "robustness is measured on pixels, and needs a test split whose normalisation is known: "
        "cifar10:DIR or digits."
    )


def _corrupted(
    batches: Iterable[tuple[Tensor, Tensor]],
    name: str,
    severity: int,
    mean: Tensor,
    std: Tensor,
) -> Iterator[Batch]:
    for number, (images, targets) in enumerate(batches):  # seeds, the same for every network
        yield (corrupt(images, name, severity, number) - mean) / std, targets


def fgsm(
    model: nn.Module, images: Tensor, targets: Tensor, epsilon: float, mean: Tensor, std: Tensor
) -> Tensor:
    """Returns normalised images after one step of the sign of the loss's gradient.

    Args:
        model: What is attacked; left as it was.
        images: Pixels in [0, 1], shape (n, c, h, w).
        targets: Classes, shape (n,).
        epsilon: The step, in units of the range of pixels.
        mean: Of the normalisation, shape (1, c, 1, 1).
        std: Likewise.
    """
    device = device_of(model)
    leaf = images.clone().requires_grad_()
    with evaluating(model), torch.enable_grad():
        outputs: Any = model(((leaf - mean) / std).to(device))
        (gradient,) = torch.autograd.grad(F.cross_entropy(outputs, targets.to(device)), leaf)
    return ((images + epsilon * gradient.sign()).clamp(0, 1) - mean) / std


def summary(dense: Mapping[str, float], small: Mapping[str, float]) -> list[str]:
    """Returns rows of a Markdown table: what, dense, pruned, change in points."""
    names = {
        **{f"fgsm_{epsilon}": f"FGSM, ε = {epsilon}/255" for epsilon in EPSILONS},
        "corrupted": f"corrupted, mean of {len(CORRUPTIONS)} x {SEVERITIES}",
        **{name: name.replace("_", " ") for name in CORRUPTIONS},
    }
    rows = ["| test accuracy | dense | pruned | change |", "|---|---:|---:|---:|"]
    for key, label in names.items():
        before, after = 100 * dense[key], 100 * small[key]
        rows.append(f"| {label} | {before:.2f} % | {after:.2f} % | {after - before:+.2f} points |")
    return rows
