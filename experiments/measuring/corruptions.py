"""The 15 common corruptions of images at 5 severities, drawn from a seed and computed in batches.

After Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019, arXiv:1903.12261, with the severities of CIFAR-10-C as recalled from the
authors' code, not read again. Written anew in tensor operations and with randomness of its own, so
accuracies compare networks here, and not with those on the CIFAR-10-C files; frost is a texture of
drawn crystals in place of photographs.

Legend: images are float, in [0, 1], shape (n, c, h, w); severities are 0 to 4.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

SEVERITIES = 5
Corruption = Callable[[Tensor, int, Generator], Tensor]
"""(images, severity, generator) -> corrupted images, in [0, 1] after clamping."""


def corrupt(images: Tensor, name: str, severity: int, seed: int) -> Tensor:
    """Returns corrupted images, in [0, 1]; the same arguments give the same images.

    Args:
        images: In [0, 1], shape (n, c, h, w), on the CPU.
        name: A key of `CORRUPTIONS`.
        severity: 0 to 4.
        seed: Of all that is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    return CORRUPTIONS[name](images, severity, generator).clamp(0, 1)


def _normal(images: Tensor, generator: Generator) -> Tensor:
    return torch.randn(images.shape, generator=generator)


def _gaussian_noise(x: Tensor, severity: int, g: Generator) -> Tensor:
    return x + (0.04, 0.06, 0.08, 0.09, 0.10)[severity] * _normal(x, g)


def _shot_noise(x: Tensor, severity: int, g: Generator) -> Tensor:
    photons = (500, 250, 100, 75, 50)[severity]
    return torch.poisson(x * photons, generator=g) / photons


def _impulse_noise(x: Tensor, severity: int, g: Generator) -> Tensor:
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[severity]
    drawn = torch.rand(x.shape, generator=g)
    return torch.where(drawn < share / 2, 0.0, torch.where(drawn < share, 1.0, x))


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Returns images filtered with a kernel, shape (k, k); edges mirror."""
    n, channels, height, width = x.shape
    size = len(kernel)
    low, high = (size - 1) // 2, size // 2
    padded = F.pad(x, (low, high, low, high), mode="reflect")
    flat = padded.reshape(n * channels, 1, *padded.shape[2:])
    return F.conv2d(flat, kernel[None, None].to(x)).reshape(n, channels, height, width)


def _blurred(x: Tensor, sigma: float) -> Tensor:
    size = 2 * max(1, math.ceil(3 * sigma)) + 1
    blurred: Tensor = gaussian_blur(x, [size, size], [sigma, sigma])
    return blurred


def _defocus_blur(x: Tensor, severity: int, _g: Generator) -> Tensor:
    radius, alias = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[severity]
    reach = 3
    steps = torch.arange(-reach, reach + 1)
    disk = (steps[:, None].square() + steps.square() <= radius**2).float()
    return _blurred(_filtered(x, disk / disk.sum()), alias)


def _moved(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Returns what lies `down` and `right` of every pixel, bilinearly; edges mirror.

    Args:
        x: Images.
        down: Offsets in pixels, shape (n, h, w).
        right: Likewise.
    """
    _, _, height, width = x.shape
    rows = torch.arange(height)[:, None] + down
    columns = torch.arange(width) + right
    grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], -1)
    return F.grid_sample(x, grid.to(x), padding_mode="reflection", align_corners=False)


def _glass_blur(x: Tensor, severity: int, g: Generator) -> Tensor:
    choices = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))
    sigma, rounds = choices[severity]
    x = _blurred(x, sigma)
    for _ in range(rounds):
        down, right = torch.randint(-1, 2, (2, len(x), *x.shape[2:]), generator=g).float()
        x = _moved(x, down, right)
    return _blurred(x, sigma)


def _motion_blur(x: Tensor, severity: int, g: Generator) -> Tensor:
    radius, sigma = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))[severity]
    angle = torch.deg2rad(torch.rand(len(x), generator=g) * 90 - 45)
    return _streaked(x, angle, radius, sigma)


def _streaked(x: Tensor, angle: Tensor, radius: int, sigma: float) -> Tensor:
    """Returns images blurred along one direction each, with weights that fall to one side."""
    steps = torch.arange(radius + 1).float()
    weights = torch.exp(-steps.square() / (2 * sigma**2))
    weights = weights / weights.sum()
    total = torch.zeros_like(x)
    shape = (len(x), *x.shape[2:])
    for step, weight in zip(steps.tolist(), weights.tolist(), strict=True):
        down = (step * angle.sin())[:, None, None].expand(shape)
        right = (step * angle.cos())[:, None, None].expand(shape)
        total += weight * _moved(x, down, right)
    return total


def _zoom_blur(x: Tensor, severity: int, _g: Generator) -> Tensor:
    most = (1.06, 1.11, 1.16, 1.21, 1.26)[severity]
    factors = torch.arange(1.0, most, 0.01).tolist()
    zoomed = [_zoomed(x, factor) for factor in factors]
    return (x + torch.stack(zoomed).sum(0)) / (len(factors) + 1)


def _zoomed(x: Tensor, factor: float) -> Tensor:
    turn = torch.tensor([[1 / factor, 0.0, 0.0], [0.0, 1 / factor, 0.0]]).expand(len(x), 2, 3)
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid.to(x), padding_mode="reflection", align_corners=False)


def _grey(x: Tensor) -> Tensor:
    return x.mean(1, keepdim=True)


def _snow(x: Tensor, severity: int, g: Generator) -> Tensor:
    mean, spread, zoom, least, radius, sigma, kept = (
        (0.1, 0.2, 1.0, 0.6, 8, 3.0, 0.95),
        (0.1, 0.2, 1.0, 0.5, 10, 4.0, 0.90),
        (0.15, 0.3, 1.75, 0.55, 10, 4.0, 0.90),
        (0.25, 0.3, 2.25, 0.6, 12, 6.0, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12.0, 0.80),
    )[severity]
    n, _, height, width = x.shape
    flakes = mean + spread * torch.randn(n, 1, height, width, generator=g)
    flakes = _zoomed(flakes, zoom)
    flakes = torch.where(flakes < least, 0.0, flakes).clamp(0, 1)
    angle = torch.deg2rad(torch.rand(n, generator=g) * 90 - 135)
    flakes = _streaked(flakes, angle, radius, sigma)
    whiter = torch.maximum(x, _grey(x) * 1.5 + 0.5)
    return kept * x + (1 - kept) * whiter + flakes + flakes.flip(2, 3)


def _plasma(x: Tensor, roughness: float, g: Generator) -> Tensor:
    """Returns smooth random clouds in [0, 1], shape (n, 1, h, w): octaves that decay."""
    n, _, height, width = x.shape
    total = torch.zeros(n, 1, height, width)
    size, weight = 2, 1.0
    while size <= max(height, width):
        drawn = torch.rand(n, 1, size, size, generator=g)
        total += weight * F.interpolate(
            drawn, (height, width), mode="bilinear", align_corners=False
        )
        size, weight = 2 * size, weight / roughness
    low = total.amin((1, 2, 3), keepdim=True)
    return (total - low) / (total.amax((1, 2, 3), keepdim=True) - low)


def _fog(x: Tensor, severity: int, g: Generator) -> Tensor:
    amount, roughness = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))[severity]
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * _plasma(x, roughness, g)) * brightest / (brightest + amount)


def _frost(x: Tensor, severity: int, g: Generator) -> Tensor:
    kept, amount = ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity]
    clouds = _plasma(x, 1.3, g)
    crystals = 1 - (2 * clouds - 1).abs()  # ridges where clouds cross their middle
    tint = torch.tensor([0.85, 0.95, 1.0])[: x.shape[1]].view(1, -1, 1, 1)
    return kept * x + amount * crystals.square() * tint


def _brightness(x: Tensor, severity: int, _g: Generator) -> Tensor:
    """Raises the value of HSV, the largest channel, and keeps hue and saturation."""
    value = x.amax(1, keepdim=True)
    brighter = (value + (0.05, 0.1, 0.15, 0.2, 0.3)[severity]).clamp(max=1)
    return torch.where(value > 0, x / value.clamp_min(1e-8) * brighter, brighter)


def _contrast(x: Tensor, severity: int, _g: Generator) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[severity] + mean


def _elastic(x: Tensor, severity: int, g: Generator) -> Tensor:
    n, _, height, width = x.shape
    choices = ((0.0, 1.0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05),
               (0.1, 0.03, 0.03))  # fmt: skip
    strength, smoothness, affine = (height * value for value in choices[severity])
    drawn = torch.rand(2, n, height, width, generator=g) * 2 - 1
    reach = (height - 1) // 2
    down, right = strength * _blurred(drawn, min(smoothness, reach / 3))
    corners = (torch.rand(n, 2, 2, generator=g) * 2 - 1) * affine / height
    rows = torch.linspace(-height / 2, height / 2, height)[:, None].expand(height, width)
    columns = torch.linspace(-width / 2, width / 2, width).expand(height, width)
    turn = corners[..., None, None]
    down = down + turn[:, 0, 0] * rows + turn[:, 0, 1] * columns
    right = right + turn[:, 1, 0] * rows + turn[:, 1, 1] * columns
    return _moved(x, down, right)


def _pixelate(x: Tensor, severity: int, _g: Generator) -> Tensor:
    height, width = x.shape[2:]
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[severity]
    few = F.interpolate(x, (int(height * share), int(width * share)), mode="area")
    return F.interpolate(few, (height, width), mode="nearest")


def _jpeg(x: Tensor, severity: int, _g: Generator) -> Tensor:
    quality = (80, 65, 58, 50, 40)[severity]
    pixels = (x * 255).round().byte().permute(0, 2, 3, 1).numpy()
    done = [_through_jpeg(image.squeeze(), quality) for image in pixels]
    whole = torch.from_numpy(np.stack(done)).float() / 255
    return whole.reshape(len(x), *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)


def _through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream))


CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {
        "gaussian_noise": _gaussian_noise,
        "shot_noise": _shot_noise,
        "impulse_noise": _impulse_noise,
        "defocus_blur": _defocus_blur,
        "glass_blur": _glass_blur,
        "motion_blur": _motion_blur,
        "zoom_blur": _zoom_blur,
        "snow": _snow,
        "frost": _frost,
        "fog": _fog,
        "brightness": _brightness,
        "contrast": _contrast,
        "elastic_transform": _elastic,
        "pixelate": _pixelate,
        "jpeg_compression": _jpeg,
    }
)
"""Corruptions by name."""
