"""The fixture that makes runs of driver.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.runs import MakeRun, Run


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[MakeRun]:
    """Makes runs, and ends what a failed test leaves running."""
    made: list[Run] = []

    def make(trials: int, workers: int, seconds: float) -> Run:
        made.append(Run(tmp_path, trials, workers, seconds))
        return made[-1]

    yield make
    for driver in (driver for run in made for driver in run.drivers):
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
        driver.communicate(timeout=300)
