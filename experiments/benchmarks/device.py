"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import torch


def described() -> dict[str, str]:
    """Returns device and library versions, for the columns of a CSV."""
    if torch.cuda.is_available():
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
