"""search: the whole of a search, from a problem and a FLOPs target to a Pareto front."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType

from paretoprune.criteria import UNBOUNDED, Bounds, Criterion
from paretoprune.criteria.drafts import remove_dead_drafts
from paretoprune.search import checks
from paretoprune.search.dense import dense_latency
from paretoprune.search.errors import NothingCompleted, SearchInterrupted
from paretoprune.search.finetuning import Finetuning
from paretoprune.search.fit import check_problem
from paretoprune.search.front import ParetoFront
from paretoprune.search.ledger import Ledger
from paretoprune.search.listener import Listener, SearchInfo
from paretoprune.search.objectives import directions_of, measured_of
from paretoprune.search.prepare import Request
from paretoprune.search.problem import Problem
from paretoprune.search.record import Record, reasons
from paretoprune.search.searcher import Executor, run_inline
from paretoprune.search.stages import EVALUATIONS, Stage, Stages
from paretoprune.search.ties import Granularity
from paretoprune.search.weights import FOLDER
from paretoprune.surgery.progress import Progress, silent

JOURNAL = "journal.log"
"""File of the study in a run's folder."""
DENSE = "dense"
"""Folder of what was measured of the dense network on a worker, in a run's folder."""
DEFAULTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"optuna": ("obs", "obs_per_mac", "taylor"), "everything": ("kl",)}
)
"""Strategies, with the criteria that they take by default."""


def search(
    problem: Problem,
    flops: float | int,
    trials: int,
    *,
    strategy: str = "optuna",
    criteria: Sequence[str] | Mapping[str, Criterion] | None = None,
    objectives: Sequence[str] = ("loss", "macs"),
    granularity: Granularity = "group",
    bounds: Bounds = UNBOUNDED,
    sampler: str | None = None,
    finetuning: Finetuning | None = None,
    seed: int = 0,
    workers: int | None = None,
    address: str | None = None,
    gpus_per_trial: float | None = None,
    trial_timeout: float | None = None,
    run_dir: Path | str | None = None,
    storage: str | None = None,
    saliency_dir: Path | None = None,
    listeners: Sequence[Listener] = (),
    progress: Progress = silent,
) -> ParetoFront:
    """Returns the Pareto front of pruned networks within a FLOPs target.

    A run whose folder holds a study is resumed: the search goes on until exactly `trials` trials
    are finished in all, that is completed, stopped early, failed or infeasible. A plan that was
    evaluated before is not evaluated again; trials that come to it take its metrics.

    With the strategy `everything` (see `search.everything`) the front has the whole way from the
    dense network to the target; `ParetoFront.best` takes the target.

    Args:
        problem: The dense network and its data.
        flops: The target: a float in (0, 1] is the share of the dense MACs that a plan may keep,
            an int the MACs themselves.
        trials: How many trials are to be finished, those of a resumed run included; at most so
            many with the strategy `everything`, which has two per step and needs two.
        strategy: `optuna`, where a sampler decides, or `everything`, the greedy choice between
            a layer and neurons in every step.
        criteria: Names in `CRITERIA`, or criteria by a name of your own; `everything` takes
            one. None takes `obs`, `obs_per_mac` and `taylor`, or `kl` for `everything`.
        objectives: Names of the metrics to optimise, two or more: `loss`, `accuracy`, `macs`,
            `params`, `cka` (similarity of the last features to the dense network's), `latency`
            (ms of a forward pass of the example inputs on a worker), or a name in
            `problem.metrics`. The first one ranks.
        granularity: How fine the decisions are: `group`, where every group may be pruned more or
            less than the ranking says, `stage`, where groups of equally large features share that,
            or `uniform`, where the ranking alone allocates.
        bounds: Multiples of channels, least and largest pruning ratios, and what stays whole;
            `everything` knows no ratios.
        sampler: `damage` (see `search.damage`), or Optuna's `tpe`, `nsga2`, `nsga3`, `gp` or
            `random`; None takes `damage`. `everything` has none.
        finetuning: Trains the best of the front after the last trial, and the candidates of
            `everything` as they are made; None trains nothing.
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
        ValueError: If an argument is out of range or would not be used, or the data does not fit
            the model.
        InfeasibleBudget: If no plan meets the target; names the reachable limit.
        UnsupportedModel: If the network cannot be traced.
        ConnectionError: If no cluster answers at `address`.
        SearchStuck: If the steps of `everything` cannot go on.
        NothingCompleted: If none of the trials completed; says why.
        RunLocked: If another search is running in the same folder or database.
        StoreFailed: If the study cannot be opened or written; finished trials are kept.
        SearchInterrupted: After Ctrl-C; a KeyboardInterrupt, with the front until then.
    """
    checks.check_flops(flops)
    measured = measured_of(problem.metrics)
    checks.check_name("strategy", strategy, DEFAULTS)
    named = checks.criteria_by_name(DEFAULTS[strategy] if criteria is None else criteria)
    checks.check_search(
        strategy,
        named,
        objectives=objectives,
        measured=measured,
        granularity=granularity,
        bounds=bounds,
        sampler=sampler,
        recovery=0 if finetuning is None else finetuning.recovery,
        trials=trials,
        seed=seed,
        workers=workers,
        gpus_per_trial=gpus_per_trial,
        trial_timeout=trial_timeout,
    )
    sampler = sampler or checks.DAMAGE
    request = Request(
        flops,
        trials,
        named,
        tuple(objectives),
        saliency_dir,
        granularity,
        bounds,
        trains=finetuning is not None,
    )
    checks.check_address(address, workers)
    check_problem(problem)
    from paretoprune.search.study import Study, database_failures  # imports optuna

    with ExitStack() as stack:
        folder = Path(run_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(database_failures(storage or folder))
        study = Study(
            storage or folder / JOURNAL,
            directions_of(objectives, measured),
            sampler=sampler,
            seed=seed,
            trials=trials,
        )
        stack.callback(study.close)
        for name in (EVALUATIONS, FOLDER):  # this is the only driver now
            remove_dead_drafts(folder / name)

        def on_worker() -> float:
            worker = _executor(workers, address, gpus_per_trial, None, 1)
            kept = Ledger(folder.resolve() / DENSE, study.run)
            return dense_latency(problem, worker, kept, seed)

        run = Stages(
            problem, request, folder, study, sampler, seed, finetuning, progress, on_worker
        )
        info, trials_of = run.steps() if strategy == "everything" else run.trials()
        following = _Following(info, listeners)

        def stages() -> Iterator[Stage]:
            yield trials_of(following)
            if not following.front.records:
                raise NothingCompleted(_failures(study.records()))
            if finetuning is not None and finetuning.epochs:
                yield run.finetuning(following.front, info.target, following)

        def executor(stage: Stage) -> Executor:
            seconds = trial_timeout if stage.timed else None
            return _executor(workers, address, gpus_per_trial, seconds, stage.most)

        return following.run(executor, stages())


def read_run(run_dir: Path | str, storage: str | None = None) -> SearchInfo:
    """Returns what a run is about and its records; a driver may be running it.

    Args:
        run_dir: Folder of the run.
        storage: Database URL of its study; None takes the journal in `run_dir`.

    Raises:
        ValueError: If there is no search in it, or one that has measured nothing yet.
    """
    from paretoprune.search.study import read_study

    try:
        records, notes = read_study(storage or Path(run_dir) / JOURNAL)
    except FileNotFoundError as error:
        missing = JOURNAL if storage is None else error.args[0]
        raise ValueError(f"{run_dir} holds no search: {missing} is not there.") from None
    if "search" not in notes:
        raise ValueError(f"the search in {run_dir} has not measured the dense network yet.")
    return SearchInfo.from_json(notes["search"], tuple(records))


def _failures(records: Sequence[Record]) -> str:
    why = "; ".join(f"{number} x {reason}" for reason, number in reasons(records).items())
    return f"none of {len(records)} trials completed: {why}"


def _executor(
    workers: int | None,
    address: str | None,
    gpus: float | None,
    seconds: float | None,
    most: int | None,
) -> Executor:
    """Returns what evaluates; `most` is how many tasks there are at a time."""
    if workers == 0:
        return run_inline
    from paretoprune.search.workers import RayWorkers

    return RayWorkers(workers, address, gpus, seconds, most)


class _Following:
    """Keeps the front as records come in, and tells the listeners."""

    def __init__(self, info: SearchInfo, listeners: Sequence[Listener]) -> None:
        self._info = info
        self._listeners = listeners
        self.front = info.front

    def __call__(self, record: Record) -> None:
        others = [one for one in self.front.records if one.number != record.number]
        self.front = ParetoFront.of((*others, record), self._info.objectives)
        for listener in self._listeners:
            listener.finished(record, self.front)

    def run(self, executor: Callable[[Stage], Executor], stages: Iterable[Stage]) -> ParetoFront:
        """Runs the stages of a search one after the other and returns the front."""
        error: BaseException | None = None
        begun: list[Listener] = []
        try:
            for listener in self._listeners:
                begun.append(listener)  # before: the start itself may be interrupted
                listener.started(self._info)
            for stage in stages:  # the next begins with the front that this one leaves
                if not stage.tasks.done:
                    executor(stage)(stage.tasks, stage.evaluate, stage.ledger)
        except BaseException as raised:
            error = raised
            if isinstance(raised, KeyboardInterrupt):
                raise SearchInterrupted(self.front) from None
            raise
        finally:
            for listener in begun:
                listener.ended(error)
        return self.front
