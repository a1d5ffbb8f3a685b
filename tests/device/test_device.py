"""What touches tensors runs where the network is, and finds there what it finds on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from paretoprune.criteria import CRITERIA

CHECKS = ("trace", *CRITERIA, "prune", "reconstruct", "recalibrate", "robustness", "train", "loss")


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """Tracebacks of the checks that failed on the emulated device, in a process of its own."""
    script = Path(__file__).with_name("on_device.py")
    command = [sys.executable, str(script), *CHECKS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("check", CHECKS)
def test_on_another_device(check: str, failures: dict[str, str]) -> None:
    assert check not in failures, failures[check]
