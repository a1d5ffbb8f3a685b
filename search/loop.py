"""search: the whole of a search, from a problem and a FLOPs target to a Pareto front."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from paretoprune.criteria import Criterion
from paretoprune.search import checks
from paretoprune.search.errors import SearchInterrupted
from paretoprune.search.evaluation import Evaluate, Evaluator
from paretoprune.search.front import ParetoFront
from paretoprune.search.ledger import Ledger
from paretoprune.search.listener import Listener, SearchInfo
from paretoprune.search.prepare import Request, prepare
from paretoprune.search.problem import Problem
from paretoprune.search.record import Record
from paretoprune.search.saliency import Progress, silent
from paretoprune.search.searcher import Decisions, Executor, Searcher, run_inline

if TYPE_CHECKING:  # `import paretoprune.search` must not import optuna
    from paretoprune.search.study import Study

JOURNAL = "journal.log"
"""File of the study in a run's folder."""
EVALUATIONS = "evals"
"""Folder of the ledger in a run's folder."""


def search(
    problem: Problem,
    flops: float | int,
    trials: int,
    *,
    criteria: Sequence[str] | Mapping[str, Criterion] = ("obs", "obs_per_mac", "taylor"),
    objectives: Sequence[str] = ("loss", "macs"),
    sampler: str = "damage",
    seed: int = 0,
    workers: int | None = None,
    address: str | None = None,
    gpus_per_trial: float | None = None,
    trial_timeout: float | None = None,
    run_dir: Path | None = None,
    storage: str | None = None,
    saliency_dir: Path | None = None,
    listeners: Sequence[Listener] = (),
    progress: Progress = silent,
) -> ParetoFront:
    """Returns the Pareto front of pruned networks within a FLOPs target.

    A run whose folder holds a study is resumed: the search goes on until exactly `trials` trials
    are finished in all, that is completed, failed or infeasible. A plan that was evaluated
    before is not evaluated again; trials that come to it take its metrics.

    Args:
        problem: The dense network and its data.
        flops: The target: a float in (0, 1] is the share of the dense MACs that a plan may keep,
            an int the MACs themselves.
        trials: How many trials are to be finished, those of a resumed run included.
        criteria: Names in `CRITERIA`, or criteria by a name of your own.
        objectives: Names of the metrics to optimise, two or more: `loss`, `accuracy`, `macs`,
            `params`, `cka` (similarity of the last features to the dense network's).
        sampler: `damage` (see `search.damage`), or Optuna's `tpe`, `nsga2`, `nsga3`, `gp` or
            `random`.
        seed: Seed of the sampler and of every evaluation; with one worker the same seed gives the
            same search.
        workers: Evaluations at a time on Ray; None takes one per core, or up to four per GPU; 0
            evaluates in this process without Ray.
        address: Of a running Ray cluster; None starts Ray on this machine.
        gpus_per_trial: GPUs of each evaluation, below 1 to share one; None lets up to four share
            one.
        trial_timeout: Seconds after which an evaluation is a failed trial and its worker is
            killed; None sets no limit. A worker's first evaluation also prepares what all of its
            others share.
        run_dir: Folder of the run; None takes a temporary one that is deleted.
        storage: URL of a database with the study, of SQLite or PostgreSQL; None takes a journal
            in `run_dir`. A database holds one search.
        saliency_dir: Folder of saliencies that several searches share; None keeps them in
            `run_dir`.
        listeners: Told what happens.
        progress: Called with (what is measured, parts done, parts in all or 0 where that is not
            known) before the first trial.

    Raises:
        ValueError: If an argument is out of range, or the data does not fit the model.
        InfeasibleBudget: If no plan meets the target; names the smallest reachable MACs.
        UnsupportedModel: If the network cannot be traced.
        ConnectionError: If no cluster answers at `address`.
        RunLocked: If another search is running in the same folder or database.
        StoreFailed: If the study cannot be opened or written; finished trials are kept.
        SearchInterrupted: After Ctrl-C; a KeyboardInterrupt, with the front until then.
    """
    checks.check_flops(flops)
    checks.check_count("trials", trials, 1)
    checks.check_count("seed", seed, 0)
    checks.check_workers(workers, gpus_per_trial, trial_timeout)
    checks.check_objectives(objectives)
    checks.check_sampler(sampler)
    named = checks.criteria_by_name(criteria)
    request = Request(flops, trials, named, tuple(objectives), saliency_dir)
    checks.check_address(address, workers)
    checks.check_problem(problem)
    with ExitStack() as stack:
        folder = run_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(_database_failures(storage or folder))
        study = _open(storage, folder, request, sampler, seed)
        stack.callback(study.close)
        prepared = prepare(problem, request, folder, study, progress)
        space = prepared.space
        history = study.records()
        following = _Following(prepared.info, listeners)

        def finished(record: Record) -> None:
            history.append(record)
            following(record)

        decide = space.fixed
        if sampler == checks.DAMAGE:
            decide = partial(prepared.damage_model(seed), history)
        study.begin(space.seeds(trials), prepared.info.target, decide)
        searcher = Searcher(
            study, Decisions(space.suggest, prepared.decode), trials, seed, finished
        )
        return following.run(
            _executor(workers, address, gpus_per_trial, trial_timeout),
            searcher,
            Evaluator(problem, prepared.graph, similarity="cka" in request.objectives),
            Ledger(folder.resolve() / EVALUATIONS),
        )


def read_run(run_dir: Path, storage: str | None = None) -> SearchInfo:
    """Returns what a run is about and its records; a driver may be running it.

    Args:
        run_dir: Folder of the run.
        storage: Database URL of its study; None takes the journal in `run_dir`.

    Raises:
        ValueError: If there is no search in it, or one that has measured nothing yet.
    """
    from paretoprune.search.study import read_study

    try:
        records, notes = read_study(storage or run_dir / JOURNAL)
    except FileNotFoundError:
        raise ValueError(f"{run_dir} holds no search: {JOURNAL} is not there.") from None
    if "search" not in notes:
        raise ValueError(f"the search in {run_dir} has not measured the dense network yet.")
    return SearchInfo.from_json(notes["search"], tuple(records))


def _open(storage: str | None, folder: Path, request: Request, sampler: str, seed: int) -> Study:
    """Returns the study of a run, of which this process becomes the only driver."""
    from paretoprune.search.study import Study

    folder.mkdir(parents=True, exist_ok=True)
    return Study(
        storage or folder / JOURNAL,
        request.objectives,
        sampler=sampler,
        seed=seed,
        trials=request.trials,
    )


def _database_failures(storage: Path | str) -> AbstractContextManager[None]:
    from paretoprune.search.study import database_failures

    return database_failures(storage)


def _executor(
    workers: int | None, address: str | None, gpus: float | None, seconds: float | None
) -> Executor:
    if workers == 0:
        return run_inline
    from paretoprune.search.workers import RayWorkers

    return RayWorkers(workers, address, gpus, seconds)


class _Following:
    """Keeps the front as records come in, and tells the listeners."""

    def __init__(self, info: SearchInfo, listeners: Sequence[Listener]) -> None:
        self._info = info
        self._listeners = listeners
        self._front = info.front

    def __call__(self, record: Record) -> None:
        self._front = ParetoFront.of((*self._front.records, record), self._info.objectives)
        for listener in self._listeners:
            listener.finished(record, self._front)

    def run(
        self, execute: Executor, searcher: Searcher, evaluate: Evaluate, ledger: Ledger
    ) -> ParetoFront:
        """Runs the search to its end and returns the front."""
        for listener in self._listeners:
            listener.started(self._info)
        try:
            if not searcher.done:
                execute(searcher, evaluate, ledger)
        except KeyboardInterrupt:
            raise SearchInterrupted(self._front) from None
        finally:
            for listener in self._listeners:
                listener.ended(self._front, not searcher.done)
        return self._front
