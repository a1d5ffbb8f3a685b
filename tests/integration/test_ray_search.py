"""Searches on real Ray workers; one local cluster for all."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle
from torch import nn

from paretoprune.search import (
    Candidate,
    Completed,
    Failed,
    Outcome,
    ParetoFront,
    Problem,
    Record,
    SearchInfo,
    search,
)
from paretoprune.search.ledger import Ledger
from paretoprune.search.searcher import Decisions, Searcher
from paretoprune.search.space import Suggester
from paretoprune.search.study import Study
from paretoprune.search.workers import RayWorkers
from paretoprune.surgery import Cost, PruningPlan

UNITS = 64
TRIALS = 8


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    """Starts Ray once; workers cannot import this file, so its classes travel by value."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def suggest(trial: Suggester) -> Candidate:
    return Candidate("l2", 1.0, offsets={"group": trial.suggest_float("share", 0, 1)})


def decode(candidate: Candidate) -> tuple[PruningPlan, Cost]:
    plan = PruningPlan({"group": tuple(range(1 + round(candidate.offsets["group"] * UNITS)))})
    return plan, Cost(len(plan.kept["group"]), 1)


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
        units = len(plan.kept["group"])
        before = self.log.read_text() if self.log.exists() else ""
        with self.log.open("a") as file:
            file.write(f"{units} {os.getpid()} {torch.get_num_threads()} {Path.cwd()}\n")
        if units == 1 + UNITS // 2:  # the seed
            first = not any(line.startswith(f"{units} ") for line in before.splitlines())
            if self.wrong == "raises":
                raise RuntimeError("made to fail")
            if self.wrong == "always dies" or (self.wrong == "dies" and first):
                os.kill(os.getpid(), signal.SIGKILL)
        wait_until = time.monotonic() + 30
        while self.wrong == "meets" and len(self._processes()) < 2:
            assert time.monotonic() < wait_until, "no second worker within 30 s"
            time.sleep(0.05)
        return {"loss": 1 - units / UNITS, "macs": units, "params": 1}

    def _processes(self) -> set[str]:
        return {line[1] for line in self.lines()}

    def lines(self) -> list[list[str]]:
        return [line.split(maxsplit=3) for line in self.log.read_text().splitlines()]


def run(folder: Path, evaluation: Evaluation, workers: int = 2) -> list[Outcome]:
    """Runs a search; returns the outcomes by number."""
    study = Study(
        folder / "journal.log", ("loss", "macs"), sampler="random", seed=0, trials=TRIALS
    )
    study.begin([{"share": 0.5}], UNITS)
    searcher = Searcher(study, Decisions(suggest, decode), TRIALS, 0, lambda record: None)
    try:
        RayWorkers(workers)(searcher, evaluation, Ledger(folder / "evals"))
        assert searcher.done
        records = study.records()
        assert [record.number for record in records] == list(range(TRIALS))
        return [record.outcome for record in records]
    finally:
        study.close()


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

    def ended(self, front: ParetoFront, interrupted: bool) -> None: ...


def problem() -> Problem:
    """A small untrained network on noise."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 40, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(40, 4),
    ).eval()
    inputs, targets = torch.randn(32, 1, 8, 8), torch.arange(32) % 4
    batches = [(inputs, targets)]
    return Problem(model, inputs[:2], batches, batches)


def test_a_real_search_and_the_error_of_a_listener(tmp_path: Path) -> None:
    same: dict[str, Any] = {"sampler": "random"}  # others decide by what is finished so far
    with pytest.raises(RuntimeError, match=r"^no server$"):
        search(problem(), 0.5, 6, **same, workers=2, run_dir=tmp_path, listeners=[Broken()])
    resumed = search(problem(), 0.5, 6, **same, workers=0, run_dir=tmp_path)
    whole = search(problem(), 0.5, 6, **same, workers=0)
    assert resumed.records
    assert [(r.number, r.plan) for r in resumed.records] == [
        (r.number, r.plan) for r in whole.records
    ]
