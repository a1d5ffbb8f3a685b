"""RayWorkers: evaluations on the cores, GPUs or nodes of a Ray cluster. The only file with ray.

Ray Tune places the evaluations, keeps its actors for the next one and starts a new actor where one
died. It decides nothing and stores nothing: the study is the one truth, and Tune's own state is
thrown away. Ctrl-C ends a run at once, without waiting for evaluations.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
from ray import cloudpickle, tune
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.train._internal import storage
from ray.tune.experiment import Trial
from ray.tune.search import Searcher as TuneSearcher

from paretoprune.search.deadline import deadline
from paretoprune.search.errors import WorkersFailed
from paretoprune.search.evaluation import Evaluate, attempt, one_line
from paretoprune.search.ledger import Ledger, Task
from paretoprune.search.record import Failed, outcome_from_json, outcome_to_json
from paretoprune.search.searcher import Tasks

T = TypeVar("T")
_Node = tuple[int, float]
"""Cores and GPUs."""

_RETRIES = 2  # of an evaluation whose worker died
_UNREACHABLE = 60  # times, a second apart, that a worker may be out of reach beside that
_PAUSE = 1.0  # seconds
_PER_GPU = 4  # workers that share a GPU by default
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Where a container finds the core time that it may use in a period, and the period."""
_SESSION = "_get_ray_train_session_dir"  # where Tune looks for the folder of a local Ray
_PACKAGES = ("criteria", "experiments", "search", "surgery")
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no csv, json and tensorboard file per trial
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # Tune's snapshots are never read
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # its graceful end would wait for evaluations
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # they are outcomes, told in one line
    "RAY_AIR_NEW_OUTPUT": "0",  # progress is the listeners' business
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a problem may name its data by relative paths
}


@dataclass(frozen=True, slots=True)
class RayWorkers:
    """An `Executor` that evaluates in parallel on Ray Tune.

    Attributes:
        workers: Evaluations at a time; None takes one per core of the cluster, or where it has
            GPUs up to four per GPU.
        address: Of a running cluster, which is sent this package; None starts Ray on this
            machine. A connection that the caller has is used as it is.
        gpus: GPUs of each evaluation, a fraction shares one; None lets up to four share one.
        seconds: Most that an evaluation may take, the first of a worker with what is prepared for
            all of its others; None sets no limit. A worker that takes longer is killed.
        most: Tasks that there are at a time; more workers are not started.
    """

    workers: int | None = None
    address: str | None = None
    gpus: float | None = None
    seconds: float | None = None
    most: int | None = None

    def __call__(self, tasks: Tasks, evaluate: Evaluate, ledger: Ledger) -> None:
        """Runs tasks; see `Executor`.

        Raises:
            RuntimeError: If the workers cannot start.
            ValueError: If the cluster does not have the GPUs that evaluations are to have.
        """
        with (
            _quiet_tune(),
            _connection(self.address, self.workers),
            _scratch() as folder,
        ):
            share = _share(_nodes(), self.workers, self.gpus, self.most)
            search = _TuneSearch(tasks, share.workers)
            with search.own_errors():
                tune.run(
                    tune.with_parameters(
                        _Worker,
                        evaluate=evaluate,
                        ledger=ledger,
                        share=share,
                        seconds=self.seconds,
                    ),
                    name="search",
                    search_alg=search,
                    num_samples=-1,
                    resources_per_trial={"cpu": share.cores, "gpu": share.gpus},
                    reuse_actors=True,
                    max_failures=_RETRIES,
                    raise_on_failed_trial=False,
                    storage_path=folder,
                    verbose=0,
                    callbacks=[_Failures(search)],
                    trial_dirname_creator=lambda trial: str(trial.trial_id),
                    _remote=False,  # the study stays in this process, under a Ray client too
                )


class _Worker(tune.Trainable):
    """One actor; evaluates a task per trial and is reused for the next."""

    def setup(self, config: dict[str, Any], **parameters: Any) -> None:
        share: _Share = parameters["share"]
        torch.set_num_threads(share.cores)
        if not share.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves all of them visible
        _log_errors()
        self._evaluate: Evaluate = parameters["evaluate"]
        self._ledger: Ledger = parameters["ledger"]
        self._seconds: float | None = parameters["seconds"]
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._task = Task.from_json(json.loads(new_config["task"]))
        return True

    def step(self) -> dict[str, Any]:
        with deadline(self._seconds, self._give_up):  # the next worker finds this in the ledger
            outcome = self._ledger.evaluate(self._evaluate, self._task)
        return {"outcome": json.dumps(outcome_to_json(outcome)), "done": True}

    def _give_up(self) -> None:
        late = Failed(f"it took longer than its limit of {self._seconds:g} s.", "timeout")
        self._ledger.write(self._task.key, late)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save: an evaluation is one step."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load."""


def _log_errors() -> None:
    """Writes the tracebacks of failed evaluations to the log that Ray keeps of this worker."""
    logger = logging.getLogger(attempt.__module__)
    logger.setLevel(logging.DEBUG)
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())


class _TuneSearch(TuneSearcher):
    """Hands tasks to Tune and outcomes back.

    Args:
        searcher: What Tune works for.
        workers: Tasks at a time; Tune itself would ask far ahead.
    """

    def __init__(self, searcher: Tasks, workers: int) -> None:
        super().__init__()
        self._searcher = searcher
        self._workers = workers
        self._running: dict[str, Task] = {}
        self._failures: dict[str, str] = {}
        self._told = False
        self._error: Exception | None = None

    def suggest(self, trial_id: str) -> Any:
        if self._error is not None:
            raise self._error  # Tune carries on after an error in `on_trial_complete`
        if self._searcher.done:
            return self.FINISHED
        if len(self._running) >= self._workers:
            return None
        task = self._own(self._searcher.next)
        if task is None:
            return self.FINISHED if self._searcher.done else None
        self._running[trial_id] = task
        return {"task": json.dumps(task.to_json())}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        task = self._running.pop(trial_id, None)
        if task is None or self._error is not None:
            return
        if result is not None and "outcome" in result:
            outcome = outcome_from_json(json.loads(result["outcome"]))
            self._told = True
        elif error:
            reason = self._failures.get(trial_id, "out of memory, perhaps")
            outcome = Failed(f"its worker died {_RETRIES + 1} times: {reason}", "worker")
        else:
            return  # stopped unfinished: the trial stays open, and a resumed search asks it again
        self._own(lambda: self._searcher.tell(task, outcome))

    def failed(self, trial: Trial) -> None:
        """Keeps why a worker died; Tune tells a searcher only that it did."""
        file = trial.pickled_error_file
        if file is None:
            return
        error = cloudpickle.loads(Path(file).read_bytes())
        self._failures[trial.trial_id] = one_line(error)
        if isinstance(error, ActorUnavailableError) and trial.max_failures < _UNREACHABLE:
            trial.max_failures += 1  # of a dead node, until Ray notices that it places on one
            time.sleep(_PAUSE)
        never = isinstance(error, RayActorError) and error.actor_init_failed
        if never and not self._told:  # else it is this node's, such as one that came late
            reason = str(error).strip().splitlines()[-1]  # where Ray puts what the actor raised
            self._error = WorkersFailed(f"the workers cannot start: {reason}")
            raise self._error

    def _own(self, step: Callable[[], T]) -> T:
        """Returns what a step of our own returns; keeps its error, which Tune would wrap."""
        try:
            return step()
        except Exception as error:
            self._error = error
            raise

    @contextmanager
    def own_errors(self) -> Iterator[None]:
        """Raises the error of a step of our own instead of what Tune made of it."""
        try:
            yield
        except Exception:
            if self._error is None:
                raise
        if self._error is not None:
            raise self._error

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class _Failures(tune.Callback):
    """Tells the search why a worker died."""

    def __init__(self, search: _TuneSearch) -> None:
        self._search = search

    def on_trial_recover(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._search.failed(trial)


@dataclass(frozen=True, slots=True)
class _Share:
    """How many workers there are, and what each gets: cores (= torch threads) and GPUs."""

    workers: int
    cores: int
    gpus: float


def _nodes() -> list[_Node]:
    """Returns what the nodes of the cluster have."""
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(int(node.get("CPU", 0)), node.get("GPU", 0.0)) for node in found]


def _share(
    nodes: Sequence[_Node], workers: int | None, wanted: float | None, tasks: int | None = None
) -> _Share:
    """Returns what each worker gets: as many cores as still let all of them run at a time.

    Args:
        nodes: Of the cluster.
        workers: How many there are to be; None takes as many as fit.
        wanted: GPUs of each; None lets up to four share one.
        tasks: That there are at a time; None for more than workers.

    Raises:
        ValueError: If no node has the GPUs that are wanted for each, or cores beside them.
    """
    most = max(gpus for _, gpus in nodes)
    if wanted is not None and wanted > most:
        raise ValueError(
            f"every trial is to have {wanted:g} GPUs, but the node with most has {most:g}."
        )

    def room(threads: int, each: float) -> int:
        return sum(
            min(cores // threads, _fitting(gpus, each)) if each else cores // threads
            for cores, gpus in nodes
        )

    each = wanted if wanted is not None else 1 / _PER_GPU if most else 0.0
    if not room(1, each):
        raise ValueError(
            "a trial needs a core and, where the cluster has GPUs, a share of one on the same "
            f"node, but its nodes have {' and '.join(f'{c} cores with {g:g}' for c, g in nodes)} "
            "GPUs; give --gpus-per-trial 0 to leave the GPUs out."
        )
    workers = workers or room(1, each)
    workers = min(workers, tasks or workers)
    if wanted is None and most:
        fewest = math.ceil(workers / sum(gpus for _, gpus in nodes))
        # in the resolution of Ray
        shares = [math.floor(10_000 / one) / 10_000 for one in range(fewest, workers + 1)]
        each = next((one for one in shares if room(1, one) >= workers), shares[0])
    largest = max(cores for cores, _ in nodes)
    fitting = (threads for threads in range(largest, 1, -1) if room(threads, each) >= workers)
    return _Share(workers, next(fitting, 1), each)


def _fitting(gpus: float, wanted: float) -> int:
    """Returns how many workers fit on a node: one GPU serves several, or several serve one."""
    return int(gpus) * int(1 / wanted + 1e-9) if wanted < 1 else int(gpus / wanted)


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Configures Tune by the variables that it reads, and its logger, for the time of a run."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _scratch() -> Iterator[str]:
    """Yields a temporary folder for what Tune writes and nobody reads."""
    with tempfile.TemporaryDirectory(prefix="paretoprune-", ignore_cleanup_errors=True) as folder:
        original = getattr(storage, _SESSION)
        if ray.util.client.ray.is_connected():  # there is no session of Ray on this machine
            setattr(storage, _SESSION, lambda: folder)
        try:
            yield folder
        finally:
            setattr(storage, _SESSION, original)


@contextmanager
def _package() -> Iterator[str]:
    """Yields a folder with the code of this package, however it is installed here.

    Sent to a cluster, it is what the workers import: the code of the driver, and no other
    version that a node may have. A wheel would do the same but install all it depends on.
    """
    with tempfile.TemporaryDirectory(prefix="paretoprune-") as folder:
        whole = Path(folder, "paretoprune")
        for name in _PACKAGES:
            (source,) = import_module(f"paretoprune.{name}").__path__
            shutil.copytree(
                source, whole / name, ignore=shutil.ignore_patterns("__pycache__", "results")
            )
        yield str(whole)


def _cores() -> int:
    """Returns the cores that this process may use, within the quota of a container."""
    known = hasattr(os, "sched_getaffinity")  # not on macOS
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # not Linux, or no limit: then it says `max`
        quota, period = map(int, _QUOTA.read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores


@contextmanager
def _connection(address: str | None, workers: int | None) -> Iterator[None]:
    """Connects to Ray and leaves it again, unless the caller is connected already."""
    if ray.is_initialized():
        yield
        return
    if address is None:  # "local" always: a bare init attaches to whatever cluster ran here last
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of a search leaves here
        ray.init(
            address="local",
            num_cpus=max(_cores(), workers or 0),
            num_gpus=torch.cuda.device_count(),  # Ray finds none where NVML is missing
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    else:
        with _package() as folder:
            ray.init(
                address=address,
                runtime_env={"py_modules": [folder]},
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    try:
        yield
    finally:
        ray.shutdown()
