"""Drivers and their searches are killed at random, and nothing is lost or done twice."""

from __future__ import annotations

import os
import random
import resource
import signal
import time

import pytest

from paretoprune.search.study import read_study
from tests.faults.runs import MakeRun, Refusal, ended, kill_at_random


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
    driver.communicate(timeout=300)

    run.seconds = 600.0
    driver = run.start()
    run.wait_for(len(run.started()) + 2, driver)
    start = time.monotonic()
    os.killpg(driver.pid, signal.SIGINT)
    assert ended(driver) == 130
    assert time.monotonic() - start < 300  # it does not wait for the evaluations

    run.seconds = 0.1
    assert ended(run.start()) == 0
    run.check(kills=2)


@pytest.mark.parametrize("database", [False, True])
def test_a_second_driver_is_refused(runs: MakeRun, database: bool) -> None:
    run = runs(4, 0, 600.0)
    run.url = f"sqlite:///{run.folder / 'study.db'}" if database else None
    first = run.start()
    run.wait_for(1, first)
    second = run.start()
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 3
    assert output.splitlines() == [
        f"another search is running in {run.folder}; wait until it ends or stop it first."
    ]
    os.killpg(first.pid, signal.SIGINT)
    assert ended(first) == 130


def test_a_file_that_cannot_grow_ends_the_search_and_loses_nothing(runs: MakeRun) -> None:
    run = runs(20, 0, 0.05)
    driver = run.start()
    run.wait_for(5, driver)
    journal = run.folder / "journal.log"
    most = journal.stat().st_size + 1000  # a trial needs more
    resource.prlimit(driver.pid, resource.RLIMIT_FSIZE, (most, most))
    sentence = (
        f"{journal} cannot be written (File too large); the trials that it has are kept, and the "
        f"search goes on from them once it can be."
    )
    assert Refusal.of(driver) == Refusal(4, [sentence])
    assert journal.read_bytes().endswith(b"\n")
    before, _ = read_study(journal)
    assert before
    assert ended(run.start()) == 0
    run.check(kills=1)
    after, _ = read_study(journal)
    assert after[: len(before)] == before


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills", "seed"), [(0, 20, 1), (2, 20, 2)])
def test_campaign(runs: MakeRun, workers: int, kills: int, seed: int) -> None:
    run = runs(400, workers, 0.05)
    kill_at_random(run, kills, random.Random(seed))
    assert ended(run.start()) == 0
    run.check(kills)
