"""What a search costs beside its candidates: idle workers, the driver, and what is sent.

    python -m paretoprune.experiments.benchmarks.overhead --data cifar10:DIR --weights FILE

A candidate's own time is to prune, reconstruct and evaluate it. All else (the sampler, the budget
solver, Ray, the journal, MLflow) is overhead, which shows in two ways: workers that wait, and a
driver that takes time of the cores on which the workers compute. The same search runs with one
worker on one core, one worker on two cores, and two workers on two cores; driver and Ray share
these cores, and MLflow is written as on the command line. The first two trials of every worker, in
which it starts, are left out, and so is the end, where a worker finds nothing left to do.

Writes one row per setting to experiments/results/. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paretoprune.experiments.benchmarks.device import described
from paretoprune.experiments.benchmarks.rows import RESULTS, append
from paretoprune.experiments.recipes import build_problem
from paretoprune.experiments.runs import RunSpec
from paretoprune.experiments.tracking.store import store_of
from paretoprune.experiments.tracking.tracker import MlflowListener
from paretoprune.search import Completed, ParetoFront, Problem, Record, SearchInfo, Stopped, search
from paretoprune.search.evaluation import Evaluator
from paretoprune.search.ledger import Task
from paretoprune.search.loop import DEFAULTS
from paretoprune.surgery import trace

SETTINGS = ((1, 1), (1, 2), (2, 2))
"""Workers and cores; a worker has its share of the cores as threads."""
Row = dict[str, Any]


class Clock:
    """A listener that notes when trials end, how long each took, and the driver's CPU time."""

    def __init__(self) -> None:
        self.trials: list[tuple[float, float]] = []  # end, seconds of the evaluation
        self.driver: list[float] = []
        self.tasks: list[int] = []  # bytes

    def started(self, info: SearchInfo) -> None:
        """Nothing to note."""

    def finished(self, record: Record, front: ParetoFront) -> None:
        """Notes a trial; one that took the metrics of another has no time of its own."""
        if isinstance(record.outcome, Completed | Stopped) and record.outcome.seconds:
            assert record.plan is not None, "what was evaluated has a plan"
            self.trials.append((time.perf_counter(), record.outcome.seconds))
            self.driver.append(time.process_time())
            self.tasks.append(len(json.dumps(Task(record.plan, 0).to_json())))

    def ended(self, error: BaseException | None) -> None:
        """Nothing to note."""


def main() -> None:
    """Runs the benchmark with the arguments of this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", required=True, help="cifar10:DIR")
    parser.add_argument("--weights", required=True, help="trained weights, .safetensors")
    parser.add_argument("--flops", type=float, default=0.5, help="target as a fraction")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead.csv")
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < max(cores for _, cores in SETTINGS):
        parser.error("needs two cores")
    problem = build_problem("resnet56-cifar10", data=options.data, weights=options.weights, seed=0)
    sent = len(pickle.dumps(Evaluator(problem, trace(problem.model, problem.example_inputs))))
    options.out.unlink(missing_ok=True)
    first = 0
    with tempfile.TemporaryDirectory() as folder:
        for workers, cores in SETTINGS:
            clock = timed(problem, options.flops, options.trials, workers, cores, Path(folder))
            row = {"workers": workers, "cores": cores, **figures(clock, workers)}
            first = first or row["trials_per_hour"]
            row["speedup"] = round(row["trials_per_hour"] / first, 2)
            row["sent_once_mb"] = round(sent / 1e6, 1)
            row |= described()
            print(row, flush=True)
            append(options.out, [row])


def timed(
    problem: Problem, flops: float, trials: int, workers: int, cores: int, folder: Path
) -> Clock:
    """Returns what was noted of one search; saliencies are measured by the first alone."""
    run_dir = folder / f"{workers}-on-{cores}"
    run_dir.mkdir()
    spec = RunSpec("resnet56-cifar10", flops, trials, DEFAULTS["optuna"])
    clock = Clock()
    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(all_cores)[:cores])  # what is started inherits it
    try:
        search(
            problem,
            flops,
            trials,
            criteria=spec.criteria,
            workers=workers,
            run_dir=run_dir,
            saliency_dir=folder / "saliency",
            listeners=[MlflowListener(run_dir, spec, store=store_of(folder)), clock],
        )
    finally:
        os.sched_setaffinity(0, all_cores)
    return clock


def figures(clock: Clock, workers: int) -> Row:
    """Returns the figures of the time in which all workers had work."""
    first, last = 2 * workers - 1, len(clock.trials) - workers
    if last <= first:
        raise ValueError(f"{len(clock.trials)} trials are too few for {workers} workers.")
    begin, end = clock.trials[first][0], clock.trials[last][0]
    counted = last - first
    own = busy(clock.trials, begin, end)
    return {
        "trials": counted,
        "seconds": round(end - begin, 1),
        "own_seconds_per_trial": round(own / counted, 3),
        "overhead_percent": round(100 * (1 - own / (workers * (end - begin))), 2),
        "driver_cpu_ms_per_trial": round(
            1000 * (clock.driver[last] - clock.driver[first]) / counted, 1
        ),
        "trials_per_hour": round(3600 * counted / (end - begin)),
        "sent_per_trial_kb": round(sum(clock.tasks) / len(clock.tasks) / 1e3, 1),
    }


def busy(trials: Sequence[tuple[float, float]], begin: float, end: float) -> float:
    """Returns how many seconds of evaluations lie between two points in time.

    Args:
        trials: For each its end and its seconds.
        begin: What lies before does not count.
        end: What lies after does not count.
    """
    return sum(max(0.0, min(stop, end) - max(stop - seconds, begin)) for stop, seconds in trials)


if __name__ == "__main__":
    main()
