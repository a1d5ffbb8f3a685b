"""How fast training is: images per second, and the share of what the device can compute.

    python -m paretoprune.experiments.benchmarks.training --networks resnet20,resnet56

Random images, so that nothing is read from disk; the augmentation runs as in training. The peak
is measured beside it, with one large matrix product of the same precision: a training step counts
three times the MACs of a forward pass. `data_share` is the share of the time that drawing and
augmenting the batches takes when nothing else is done.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from paretoprune.criteria.precision import mixed_precision
from paretoprune.experiments import models
from paretoprune.experiments.benchmarks.device import described
from paretoprune.experiments.benchmarks.rows import RESULTS, append
from paretoprune.experiments.data.datasets import IMAGENET_MEAN, IMAGENET_STD
from paretoprune.experiments.data.sources import ImageArray
from paretoprune.experiments.data.splits import TrainingBatches
from paretoprune.experiments.training import Training, train
from paretoprune.search.evaluation import on_device
from paretoprune.search.latency import seconds_of
from paretoprune.search.metrics import device_of
from paretoprune.surgery import trace

_PER_MAC = 3 * 2
"""Floating-point operations of a training step per MAC of a forward pass."""


def main() -> None:
    """Runs the benchmark with the arguments of this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default="resnet20,resnet56")
    parser.add_argument("--images", type=int, default=46_000)
    parser.add_argument("--batch-sizes", default="128,512")
    parser.add_argument("--out", type=Path, default=RESULTS / "training.csv")
    options = parser.parse_args()
    peak = peak_flops()
    options.out.unlink(missing_ok=True)
    for network in options.networks.split(","):
        for size in map(int, options.batch_sizes.split(",")):
            row = {**measure(network, options.images, size, peak), **described()}
            print(row, flush=True)
            append(options.out, [row])


def measure(network: str, images: int, batch_size: int, peak: float) -> dict[str, Any]:
    """Returns a row: the second of two epochs, after one that warms up."""
    torch.manual_seed(0)
    model = on_device(getattr(models, network)()).to(memory_format=torch.channels_last)
    pixels = torch.randint(0, 256, (images, 32, 32, 3), dtype=torch.uint8)
    source = ImageArray(pixels, torch.randint(10, (images,)), IMAGENET_MEAN, IMAGENET_STD)
    batches = TrainingBatches(source, torch.arange(images), batch_size, seed=0)
    batches = batches.on(device_of(model))
    ends: list[float] = []
    train(
        model,
        batches,
        Training(epochs=2, learning_rate=0.01),
        progress=lambda line: ends.append(time.perf_counter()),
    )
    seconds = ends[1] - ends[0]
    rate = len(batches) * min(batch_size, images) / seconds
    macs = trace(getattr(models, network)(), torch.randn(2, 3, 32, 32)).cost().macs
    return {
        "network": network,
        "images": images,
        "batch_size": batch_size,
        "images_per_second": round(rate),
        "epoch_seconds": round(seconds, 2),
        "tflops": round(rate * macs * _PER_MAC / 1e12, 4),
        "peak_tflops": round(peak / 1e12, 4),
        "share_of_peak": round(rate * macs * _PER_MAC / peak, 4),
        "data_share": round(seconds_of(lambda: [None for _ in batches.epoch(0)]) / seconds, 4),
        "precision": "bfloat16" if mixed_precision(device_of(model)) else "float32",
    }


def peak_flops() -> float:
    """Returns the floating-point operations per second of a large matrix product."""
    cuda = torch.cuda.is_available()
    size = 8192 if cuda else 1024
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if mixed_precision(device) else torch.float32
    matrix = torch.randn(size, size, dtype=dtype, device=device)
    best = min(seconds_of(lambda: [matrix @ matrix for _ in range(5)]) for _ in range(8))
    return 2 * size**3 * 5 / best


if __name__ == "__main__":
    main()
