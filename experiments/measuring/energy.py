"""Energy of inference and of longer work, by codecarbon, offline: nothing is sent anywhere.

Lacoste et al., 2019, arXiv:1910.09700, for why. On a machine that counts no energy (RAPL, NVML)
codecarbon takes the processor's rated power times its use, so compare only what was measured on
one machine in one go. The only file that imports codecarbon.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paretoprune.experiments.runs import write_json
from paretoprune.search.evaluation import on_device
from paretoprune.search.metrics import device_of, evaluating, forward, to_device

COUNTRY = "PARETOPRUNE_COUNTRY"
"""Environment variable: ISO code of the country whose electricity is used, such as DEU."""


@dataclass(slots=True)
class Meter:
    """What was used while it was measured.

    Attributes:
        kwh: Energy of processor, memory and GPU.
        kg: Emissions in CO2 equivalents, with the mean electricity of the country.
        seconds: Wall time.
    """

    kwh: float = 0.0
    kg: float = 0.0
    seconds: float = 0.0


def check_energy() -> None:
    """Verifies that codecarbon is there.

    Raises:
        ValueError: If it is not.
    """
    try:
        import codecarbon  # noqa: F401
    except ImportError:
        raise ValueError(
            "energy is measured by codecarbon; pip install paretoprune[energy]."
        ) from None


@contextmanager
def metered() -> Iterator[Meter]:
    """Yields a meter that is filled in when the work is done; zeros where nothing is counted."""
    from codecarbon import OfflineEmissionsTracker

    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # `log_level` comes too late
    meter = Meter()
    with _unwarned():
        tracker = OfflineEmissionsTracker(
            country_iso_code=os.environ.get(COUNTRY, "DEU"),
            measure_power_secs=1,
            save_to_file=False,
            log_level="critical",
            allow_multiple_runs=True,
        )
        start = time.perf_counter()
        tracker.start()
    try:
        yield meter
    finally:
        with _unwarned():
            meter.kg = float(tracker.stop() or 0.0)
        done = getattr(tracker, "final_emissions_data", None)  # not there after a fault of its own
        meter.kwh = float(done.energy_consumed) if done is not None else 0.0
        meter.seconds = time.perf_counter() - start


@contextmanager
def _unwarned() -> Iterator[None]:
    """Keeps warnings away from codecarbon, which gives up silently where they are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def energy_of_run(folder: Path, meter: Meter) -> str:
    """Adds what was measured to a run's energy.json; returns all of it in a line.

    The part of a driver that was killed is not in it.
    """
    file = folder / "energy.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    total = {name: before.get(name, 0.0) + value for name, value in asdict(meter).items()}
    write_json(file, total)
    return (
        f"the run so far: {1000 * total['kwh']:.3g} Wh, {1000 * total['kg']:.3g} g CO2 in "
        f"{total['seconds']:.0f} s on this machine ({file})"
    )


def inference_energy(model: nn.Module, inputs: Any, examples: int, seconds: float) -> Meter:
    """Returns the energy of 1,000 examples' forward passes.

    Args:
        model: Left untouched.
        inputs: One batch.
        examples: In it.
        seconds: How long to measure.
    """
    model, passes = on_device(copy.deepcopy(model)), 0
    inputs = to_device(inputs, device_of(model))  # once: the way there is no part of a pass
    with evaluating(model), torch.no_grad():
        forward(model, inputs)
        with metered() as meter:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                forward(model, inputs)
                passes += 1
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    scale = 1000 / (passes * examples)
    return Meter(meter.kwh * scale, meter.kg * scale, meter.seconds * scale)
