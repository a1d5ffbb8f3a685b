"""ModelOpt's FastNAS at its best settings, for the figures of the search.

    pip install nvidia-modelopt torchprofile==0.0.4 requests huggingface_hub

Channels in multiples of 4 (its default of 32 leaves ResNet-56 nearly nothing to choose; smaller
ones cost twice the time), BatchNorm calibrated for each candidate on 500 images, and as score the
negative loss on 1,000 images of the search split, which tells more than an accuracy near 100 %.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

from torch import Tensor, nn

from paretoprune.experiments.benchmarks.rows import first_batches
from paretoprune.search import Problem, evaluate
from paretoprune.search.problem import Batch

DIVISOR = 4
SCORED = 1000
"""Images of the search split."""
CALIBRATED, BATCHES = 500, 50
"""Training images for BatchNorm; FastNAS asks for at least 50 batches."""


def fastnas(problem: Problem, flops: float, cache: Path) -> tuple[nn.Module, float]:
    """Returns the network that FastNAS finds for a FLOPs target, and the seconds it took.

    Its sensitivities are measured once, kept in a file and shared by all targets: the seconds of
    the first one have them, as those of our search have its saliencies.

    Args:
        problem: The dense network and its data.
        flops: A fraction of the dense FLOPs.
        cache: File of the sensitivities.
    """
    import modelopt.torch.prune as mtp

    cache.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    scored = first_batches(problem.validation, SCORED)
    calibration = _small(first_batches(problem.recalibration or problem.calibration, CALIBRATED))
    shares = tuple(0.05 * i for i in range(1, 21))
    conv = {"channels_ratio": shares, "kernel_size": (), "channel_divisor": DIVISOR}
    other = {"features_ratio": shares, "feature_divisor": DIVISOR}
    rules = {"nn.Conv2d": {"*": conv}, "nn.BatchNorm2d": {"*": other}, "nn.Linear": {"*": other}}
    found, _ = mtp.prune(
        copy.deepcopy(problem.model),
        mode=[("fastnas", rules)],
        constraints={"flops": f"{100 * flops:g}%"},
        dummy_input=problem.example_inputs[:1],
        config={
            "checkpoint": str(cache),
            "data_loader": calibration,
            "collect_func": lambda batch: batch[0],
            "max_iter_data_loader": BATCHES,
            "score_func": lambda model: -evaluate(model, scored, problem.loss)["loss"],
            "verbose": False,
        },
    )
    seconds = time.perf_counter() - start
    network: nn.Module = found
    return network.eval(), seconds


def _small(batches: list[Batch]) -> list[tuple[Tensor, Tensor]]:
    """Returns the same examples in `BATCHES` batches."""
    size = CALIBRATED // BATCHES
    return [
        pair
        for inputs, targets in batches
        for pair in zip(inputs.split(size), targets.split(size), strict=True)
    ]
