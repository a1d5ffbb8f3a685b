"""Columns that `--report` adds to a row: robustness, latency and energy, dense and pruned.

Accuracies are percent, over the first `robust_images` of the test images (`--report-images`):
under FGSM in pixel space (`fgsm_2`: epsilon = 2/255), and the mean over 15 corruptions of 5
severities (`corrupted`).
`latency_ms` is one forward pass of a batch of 128 images, both networks in turns;
`joules_per_1000` is the energy of 1,000 images' forward passes; `work_kwh` and `work_co2_grams`
are what the row itself took, its search and its training together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from paretoprune.experiments.data.splits import Batches
from paretoprune.experiments.measuring.energy import inference_energy, metered
from paretoprune.experiments.measuring.reports import ENERGY_SECONDS
from paretoprune.experiments.measuring.robustness import EPSILONS, robustness
from paretoprune.search.evaluation import on_device
from paretoprune.search.latency import measure_latency

ROBUST = (*(f"fgsm_{epsilon}" for epsilon in EPSILONS), "corrupted")
ENERGY = ("latency_ms", "joules_per_1000")
WORK = ("work_kwh", "work_co2_grams")
COLUMNS = (
    "robust_images",
    *(f"{prefix}{name}" for name in ROBUST for prefix in ("dense_", "")),
    *(f"{prefix}{name}" for name in ENERGY for prefix in ("dense_", "")),
)
_BATCH = 128
Row = dict[str, Any]


def robust(names: tuple[str, ...], network: nn.Module, test: Batches) -> Row:
    """Returns the columns of `robustness`, empty where that is not asked for.

    Args:
        names: Reports that are asked for.
        network: A classifier.
        test: The images.
    """
    if "robustness" not in names:
        return dict.fromkeys(ROBUST, "")
    found = robustness(on_device(network), test)
    return {name: round(100 * found[name], 2) for name in ROBUST}


def energy(names: tuple[str, ...], dense: nn.Module, small: nn.Module, test: Batches) -> Row:
    """Returns the columns of `energy` of both networks, empty where that is not asked for."""
    columns = [f"{prefix}{name}" for name in ENERGY for prefix in ("dense_", "")]
    if "energy" not in names:
        return dict.fromkeys(columns, "")
    inputs, _ = next(iter(Batches(test.source, test.indices, _BATCH)))
    networks = [on_device(dense), on_device(small)]
    passes = [round(one.milliseconds, 3) for one in measure_latency(networks, inputs)]
    joules = [
        round(3.6e6 * inference_energy(one, inputs, len(inputs), ENERGY_SECONDS).kwh, 3)
        for one in networks
    ]
    return dict(zip(columns, [*passes, *joules], strict=True))


def worked(names: tuple[str, ...], measured: Callable[[], Row]) -> Row:
    """Returns the columns that `measured` returns, and what measuring them took."""
    if "energy" not in names:
        return {**measured(), **dict.fromkeys(WORK, "")}
    with metered() as meter:
        row = measured()
    return {**row, "work_kwh": round(meter.kwh, 6), "work_co2_grams": round(1e3 * meter.kg, 3)}
