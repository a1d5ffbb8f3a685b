"""A search without a network, to be run as a process and killed; not a test itself.

Usage: python driver.py FOLDER TRIALS WORKERS SECONDS [URL], with 0 workers for no Ray and the URL
of a database instead of a journal. Every evaluation takes SECONDS and writes a line to FOLDER/log
as it starts. Ends with status 0 when the search is done, 3 when another driver is at work, 4 when
the study cannot be written, 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from paretoprune.search import Candidate, RunLocked, StoreFailed
from paretoprune.search.ledger import Ledger, key_of
from paretoprune.search.objectives import directions_of
from paretoprune.search.searcher import Decisions, Executor, Searcher, run_inline
from paretoprune.search.space import Suggester
from paretoprune.search.study import Study, database_failures
from paretoprune.surgery import Cost, PruningPlan

UNITS = 100


def suggest(trial: Suggester) -> Candidate:
    """Decides how much two groups keep."""
    shares = {name: trial.suggest_float(f"offset/{name}", 0, 1) for name in ("a", "b")}
    return Candidate("l2", 1.0, offsets=shares)


def decode(candidate: Candidate) -> tuple[PruningPlan, Cost]:
    """Returns the plan that keeps so much."""
    kept = {name: 1 + round(share * UNITS) for name, share in candidate.offsets.items()}
    plan = PruningPlan({name: tuple(range(count)) for name, count in kept.items()})
    return plan, Cost(macs=kept["a"] * kept["b"], params=kept["a"] + kept["b"])


@dataclass
class Evaluation:
    """Takes its time, and writes down what it does."""

    folder: Path
    seconds: float

    def __call__(self, plan: PruningPlan, seed: int) -> dict[str, float]:
        """Returns metrics in closed form."""
        key = key_of(plan)
        again = "again" if (self.folder / "evals" / f"{key}.json").exists() else "start"
        with (self.folder / "log").open("a") as log:
            log.write(f"{again} {key} {os.getpid()}\n")
        time.sleep(self.seconds)
        a, b = (len(plan.kept[name]) for name in ("a", "b"))
        return {"loss": 1 / a + 2 / b, "macs": a * b, "params": a + b}


def main(folder: Path, trials: int, workers: int, seconds: float, url: str | None) -> int:
    """Runs or resumes the search; returns the exit status."""
    storage = url or folder / "journal.log"
    try:
        with database_failures(storage):
            return run(folder, trials, workers, seconds, storage)
    except RunLocked as error:
        print(error)
        return 3
    except StoreFailed as error:
        print(error)
        return 4


def run(folder: Path, trials: int, workers: int, seconds: float, storage: Path | str) -> int:
    """Does so, and raises what goes wrong with the study."""
    study = Study(storage, directions_of(("loss", "macs")), sampler="tpe", seed=0, trials=trials)
    study.begin([{"offset/a": share, "offset/b": share} for share in (1.0, 0.5)], UNITS**2)
    searcher = Searcher(study, Decisions(suggest, decode), trials, 0, lambda record: None)
    execute: Executor = run_inline
    if workers:
        from paretoprune.search.workers import RayWorkers

        execute = RayWorkers(workers)
    try:
        if not searcher.done:
            execute(searcher, Evaluation(folder, seconds), Ledger(folder / "evals"))
    except KeyboardInterrupt:
        return 130
    finally:
        study.close()
    return 0


if __name__ == "__main__":
    place, trials, workers, seconds, *rest = sys.argv[1:]
    url = rest[0] if rest else None
    sys.exit(main(Path(place), int(trials), int(workers), float(seconds), url))
