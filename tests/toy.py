"""A search over one group without a network, a small network on noise, and Ray on this machine.

Workers cannot import tests, so what they get of them travels by value: see `by_value`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray import cloudpickle
from torch import nn

from paretoprune.search import Candidate, Problem, Record
from paretoprune.search.evaluation import Evaluate
from paretoprune.search.ledger import Ledger
from paretoprune.search.objectives import directions_of
from paretoprune.search.searcher import Decisions, Executor, Searcher
from paretoprune.search.space import Suggester
from paretoprune.search.study import Study
from paretoprune.surgery import Cost, PruningPlan

UNITS = 200


def suggest(trial: Suggester) -> Candidate:
    """Decides how much of the group is kept."""
    return Candidate("l2", 1.0, offsets={"group": trial.suggest_float("share", 0, 1)})


def decode(candidate: Candidate) -> tuple[PruningPlan, Cost]:
    """Returns the plan that keeps so much; a unit is a MAC."""
    plan = PruningPlan({"group": tuple(range(1 + round(candidate.offsets["group"] * UNITS)))})
    return plan, Cost(units_of(plan), 1)


def units_of(plan: PruningPlan) -> int:
    """Returns how many units a plan keeps."""
    return len(plan.kept["group"])


def metrics_of(plan: PruningPlan) -> dict[str, float]:
    """Returns what an evaluation measures, in closed form."""
    return {"loss": 1 - units_of(plan) / UNITS, "macs": units_of(plan), "params": 1}


def searched(
    folder: Path,
    execute: Executor,
    evaluate: Evaluate,
    trials: int,
    *,
    seeds: Sequence[Mapping[str, Any]] = (),
    finished: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Returns the records of a search in a folder; exactly as many as were asked for."""
    study = Study(
        folder / "journal.log",
        directions_of(("loss", "macs")),
        sampler="random",
        seed=0,
        trials=trials,
    )
    study.begin(seeds, UNITS)
    searcher = Searcher(study, Decisions(suggest, decode), trials, 0, finished)
    try:
        execute(searcher, evaluate, Ledger(folder / "evals"))
        assert searcher.done
        records = study.records()
    finally:
        study.close()
    assert [record.number for record in records] == list(range(trials))
    return records


def noise() -> Problem:
    """Returns an untrained network of four classes with noise: all works, nothing is learned."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 40, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(40, 40, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(40, 4),
    ).eval()
    inputs, targets = torch.randn(32, 1, 8, 8), torch.arange(32) % 4
    batches = [(inputs, targets)]
    return Problem(model, inputs[:2], batches, batches)


@contextmanager
def by_value(module: str) -> Iterator[None]:
    """Sends what is defined in a test's module, and in this one, to workers by value."""
    with ExitStack() as stack:
        for name in (module, __name__):
            cloudpickle.register_pickle_by_value(sys.modules[name])
            stack.callback(cloudpickle.unregister_pickle_by_value, sys.modules[name])
        yield


@contextmanager
def local_ray(module: str) -> Iterator[None]:
    """Starts Ray with two cores on this machine; what a test's module defines goes by value."""
    with by_value(module):
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        try:
            yield
        finally:
            ray.shutdown()
