"""Searches on real Ray workers; one local cluster for all."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from paretoprune.search import (
    Completed,
    Failed,
    Outcome,
    ParetoFront,
    Record,
    SearchInfo,
    read_run,
    search,
)
from paretoprune.search.workers import RayWorkers
from paretoprune.surgery import PruningPlan
from tests.toy import UNITS, local_ray, metrics_of, noise, searched, units_of

TRIALS = 8


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    """Starts Ray once."""
    with local_ray(__name__):
        yield


@dataclass
class Evaluation:
    """Writes a line per start into `log`, and behaves as told.

    Attributes:
        log: One line per evaluation: units, process, torch threads, working directory.
        wrong: What the evaluation of the seed does: `raises`, `dies` (the first time), `always
            dies`, or nothing wrong; `meets` waits for a second worker.
    """

    log: Path
    wrong: str = ""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        with self.log.with_name("arrivals").open("a") as file:
            file.write(f"{os.getpid()}\n")

    def __call__(self, plan: PruningPlan, seed: int) -> dict[str, float]:
        units = units_of(plan)
        before = self.log.read_text() if self.log.exists() else ""
        with self.log.open("a") as file:
            file.write(f"{units} {os.getpid()} {torch.get_num_threads()} {Path.cwd()}\n")
        if units == 1 + UNITS // 2:  # the seed
            first = not any(line.startswith(f"{units} ") for line in before.splitlines())
            if self.wrong == "raises":
                raise RuntimeError("made to fail")
            if self.wrong == "always dies" or (self.wrong == "dies" and first):
                os.kill(os.getpid(), signal.SIGKILL)
        wait_until = time.monotonic() + 300
        while self.wrong == "meets" and len(self._processes()) < 2:
            assert time.monotonic() < wait_until, "no second worker"
            time.sleep(0.05)
        return metrics_of(plan)

    def _processes(self) -> set[str]:
        return {line[1] for line in self.lines()}

    def lines(self) -> list[list[str]]:
        return [line.split(maxsplit=3) for line in self.log.read_text().splitlines()]


def run(folder: Path, evaluation: Evaluation, workers: int = 2) -> list[Outcome]:
    """Runs a search; returns the outcomes by number."""
    seeds = [{"share": 0.5}]
    records = searched(folder, RayWorkers(workers), evaluation, TRIALS, seeds=seeds)
    return [record.outcome for record in records]


def test_workers_evaluate_every_plan_once(tmp_path: Path) -> None:
    evaluation = Evaluation(tmp_path / "log", "meets")
    outcomes = run(tmp_path, evaluation)
    assert all(isinstance(outcome, Completed) for outcome in outcomes)
    lines = evaluation.lines()
    assert max(Counter(line[0] for line in lines).values()) == 1
    processes = {line[1] for line in lines}
    assert len(processes) == 2
    arrivals = (tmp_path / "arrivals").read_text().split()
    assert sorted(arrivals) == sorted(processes)  # model and data come once, not with every trial
    assert str(os.getpid()) not in processes
    assert {line[2] for line in lines} == {"1"}  # two workers on two cores
    assert {line[3] for line in lines} == {str(Path.cwd())}  # relative paths mean the same


def test_an_evaluation_that_raises_is_a_failed_trial(tmp_path: Path) -> None:
    evaluation = Evaluation(tmp_path / "log", "raises")
    outcomes = run(tmp_path, evaluation)
    assert outcomes[0] == Failed("RuntimeError: made to fail")
    assert all(isinstance(outcome, Completed) for outcome in outcomes[1:])
    assert len({line[1] for line in evaluation.lines()}) <= 2  # it costs no worker


def test_a_worker_that_is_killed_is_replaced_and_its_plan_evaluated(tmp_path: Path) -> None:
    evaluation = Evaluation(tmp_path / "log", "dies")
    outcomes = run(tmp_path, evaluation)
    assert all(isinstance(outcome, Completed) for outcome in outcomes)
    counts = Counter(line[0] for line in evaluation.lines())
    assert counts.pop(str(1 + UNITS // 2)) == 2
    assert set(counts.values()) == {1}


@pytest.mark.slow
def test_a_plan_that_kills_every_worker_is_a_failed_trial(tmp_path: Path) -> None:
    evaluation = Evaluation(tmp_path / "log", "always dies")
    outcomes = run(tmp_path, evaluation)
    assert isinstance(outcomes[0], Failed)
    assert outcomes[0].error.startswith("its worker died 3 times: ")
    assert all(isinstance(outcome, Completed) for outcome in outcomes[1:])


class Unwelcome(Evaluation):
    """Cannot be unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return _refuse, ()


def _refuse() -> None:
    raise ModuleNotFoundError("No module named 'yours'")


def test_workers_that_cannot_start_end_the_search_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"the workers cannot start: .*No module named 'yours'"):
        run(tmp_path, Unwelcome(tmp_path / "log"))


class Broken:
    """A listener that raises after some records."""

    def started(self, info: SearchInfo) -> None: ...

    def finished(self, record: Record, front: ParetoFront) -> None:
        if record.number == 2:
            raise RuntimeError("no server")

    def ended(self, error: BaseException | None) -> None: ...


def test_a_real_search_and_the_error_of_a_listener(tmp_path: Path) -> None:
    same: dict[str, Any] = {"sampler": "random"}  # others decide by what is finished so far
    with pytest.raises(RuntimeError, match=r"^no server$"):
        search(noise(), 0.5, 6, **same, workers=2, run_dir=tmp_path, listeners=[Broken()])
    resumed = search(noise(), 0.5, 6, **same, workers=0, run_dir=tmp_path)
    whole = search(noise(), 0.5, 6, **same, workers=0)
    assert resumed.records
    assert [(r.number, r.plan) for r in resumed.records] == [
        (r.number, r.plan) for r in whole.records
    ]


def test_latency_is_measured_on_workers(tmp_path: Path) -> None:
    names = ("loss", "latency")
    front = search(noise(), 0.5, 2, workers=2, run_dir=tmp_path, objectives=names)
    info = read_run(tmp_path)
    assert info.objectives[1].reference == info.metrics["latency"] > 0
    assert (tmp_path / "dense").is_dir()  # where the worker wrote it
    for record in front.records:
        assert isinstance(record.outcome, Completed)
        assert record.outcome.metrics["latency"] > 0
