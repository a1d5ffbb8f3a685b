"""Drivers and their searches are killed at random, and nothing is lost or done twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from paretoprune.search import Completed
from paretoprune.search.study import read_study

DRIVER = Path(__file__).with_name("driver.py")


@dataclass
class Run:
    """A run folder and the drivers that were started on it."""

    folder: Path
    trials: int
    workers: int
    seconds: float
    drivers: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self) -> subprocess.Popen[str]:
        """Starts a driver in a process group of its own, as a terminal would."""
        numbers = (self.trials, self.workers, self.seconds)
        driver = subprocess.Popen(
            [sys.executable, "-W", "error", str(DRIVER), str(self.folder), *map(str, numbers)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.drivers.append(driver)
        return driver

    def started(self) -> list[str]:
        """The plans whose evaluations were started, in order."""
        log = self.folder / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        assert not any(line.startswith("again") for line in lines)
        return [line.split()[1] for line in lines]

    def wait_for(self, evaluations: int, driver: subprocess.Popen[str]) -> None:
        """Waits until so many evaluations were started in all, or the driver has ended."""
        limit = time.monotonic() + 90
        while len(self.started()) < evaluations and driver.poll() is None:
            assert time.monotonic() < limit, "nothing happens"
            time.sleep(0.01)

    def check(self, kills: int) -> None:
        """Verifies that every trial is there, and no evaluation was made twice."""
        records, _ = read_study(self.folder / "journal.log")
        assert [record.number for record in records] == list(range(self.trials))
        assert all(isinstance(record.outcome, Completed) for record in records)
        assert [record.origin for record in records[:3]] == ["seed", "seed", "sampler"]
        started = Counter(self.started())
        assert len(started) == len({record.plan for record in records})
        in_flight = started.total() - len(
            started
        )  # at a kill: started again, never finished twice
        assert in_flight <= kills * max(1, self.workers)


MakeRun = Callable[[int, int, float], Run]


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
        driver.communicate(timeout=60)


def ended(driver: subprocess.Popen[str]) -> int:
    """Waits for a driver that says nothing; returns its exit status."""
    output, _ = driver.communicate(timeout=120)
    assert output == ""
    return driver.returncode


def kill_at_random(run: Run, kills: int, chance: random.Random) -> None:
    """Starts drivers and kills each after a few evaluations, somewhere in the next."""
    for number in range(kills):
        driver = run.start()
        if number == 1:
            time.sleep(chance.uniform(0.5, 2.0))  # while it starts
        else:
            run.wait_for(len(run.started()) + chance.randint(1, run.trials // kills), driver)
            time.sleep(chance.uniform(0, run.seconds))
        driver.kill()
        driver.communicate(timeout=60)


def test_killed_drivers_lose_nothing(runs: MakeRun) -> None:
    run = runs(40, 0, 0.03)
    kill_at_random(run, 4, random.Random(0))
    assert ended(run.start()) == 0
    run.check(kills=4)
    assert ended(run.start()) == 0  # nothing is left to do
    run.check(kills=4)


def test_ray_survives_a_kill_and_ctrl_c(runs: MakeRun) -> None:
    run = runs(20, 2, 0.1)
    driver = run.start()
    run.wait_for(8, driver)
    driver.kill()  # its workers end by themselves
    driver.communicate(timeout=60)

    run.seconds = 600.0
    driver = run.start()
    run.wait_for(len(run.started()) + 2, driver)
    start = time.monotonic()
    os.killpg(driver.pid, signal.SIGINT)
    assert ended(driver) == 130
    assert time.monotonic() - start < 30  # it does not wait for the evaluations

    run.seconds = 0.1
    assert ended(run.start()) == 0
    run.check(kills=2)


def test_a_second_driver_is_refused(runs: MakeRun) -> None:
    run = runs(4, 0, 600.0)
    first = run.start()
    run.wait_for(1, first)
    second = run.start()
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 3
    assert output.splitlines() == [
        f"another search is running in {run.folder}; wait until it ends or stop it first."
    ]
    os.killpg(first.pid, signal.SIGINT)
    assert ended(first) == 130


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills", "seed"), [(0, 12, 1), (0, 12, 2), (2, 6, 3)])
def test_campaign(runs: MakeRun, workers: int, kills: int, seed: int) -> None:
    run = runs(200, workers, 0.05)
    kill_at_random(run, kills, random.Random(seed))
    assert ended(run.start()) == 0
    run.check(kills)
