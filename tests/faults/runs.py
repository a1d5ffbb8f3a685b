"""Runs of driver.py: processes that search, and what must hold of their run when they are done."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

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
    url: str | None = None
    drivers: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self) -> subprocess.Popen[str]:
        """Starts a driver in a process group of its own, as a terminal would."""
        values = (self.folder, self.trials, self.workers, self.seconds)
        url = [] if self.url is None else [self.url]
        driver = subprocess.Popen(
            [sys.executable, "-W", "error", str(DRIVER), *map(str, values), *url],
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
        limit = time.monotonic() + 300
        while len(self.started()) < evaluations and driver.poll() is None:
            assert time.monotonic() < limit, "nothing happens"
            time.sleep(0.01)

    def check(self, kills: int) -> None:
        """Verifies that every trial is there, and no evaluation was made twice."""
        records, _ = read_study(self.url or self.folder / "journal.log")
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


@dataclass
class Refusal:
    """What a driver says and how it ends when the study cannot be written."""

    status: int
    lines: list[str]

    @staticmethod
    def of(driver: subprocess.Popen[str]) -> Refusal:
        output, _ = driver.communicate(timeout=300)
        return Refusal(driver.returncode, output.splitlines())


def ended(driver: subprocess.Popen[str]) -> int:
    """Waits for a driver that says nothing; returns its exit status."""
    output, _ = driver.communicate(timeout=300)
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
        driver.communicate(timeout=300)
