"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import torch


def described(*, on_cpu: bool = False) -> dict[str, str]:
    """Returns device and library versions, for the columns of a CSV.

    Args:
        on_cpu: Whether all was measured on the CPU, even where there is a GPU.
    """
    if torch.cuda.is_available() and not on_cpu:
        device = torch.cuda.get_device_name()
    else:
        cores = len(os.sched_getaffinity(0))
        device = f"CPU {platform.machine()}, {cores} {'core' if cores == 1 else 'cores'}"
    return {
        "device": device,
        "torch": version("torch"),
        "optuna": version("optuna"),
        "ray": version("ray"),
        "paretoprune": version("paretoprune"),
    }
