"""Study: the one truth of a search, kept by Optuna. The only file that imports optuna.

Every trial is in the study's storage with its decision, plan, cost, outcome and origin, so that
records are rebuilt from it alone. A trial that a dead driver left behind is asked again under its
own number. The sampler is seeded afresh for every trial, from the search's seed and the trial's
number: with one worker a search that was killed and resumed decides what an uninterrupted one
would have decided.
"""

from __future__ import annotations

import logging
import re
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import optuna
import sqlalchemy
import sqlalchemy.exc
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState

from paretoprune.search.checks import DAMAGE
from paretoprune.search.errors import RunLocked, StoreFailed
from paretoprune.search.journal import JournalFile, lock
from paretoprune.search.problem import Direction
from paretoprune.search.record import (
    SAMPLER,
    SEED,
    Completed,
    Failed,
    Infeasible,
    Record,
    Stopped,
    attributes_of,
    outcome_from_json,
    outcome_to_json,
    record_from_attributes,
)
from paretoprune.search.space import Suggester

_NAME = "paretoprune"
_LOCK = 7_274_766  # number of PostgreSQL's advisory lock, anything that others do not take
_TOLD = 6  # op code of Optuna's journal for a change of a trial's state
_SEEDED = "seeded"
_FINETUNED = "finetuned/"  # with the trial's number: Optuna changes no trial that is finished


def _population(trials: int) -> int:
    """Returns a population size that leaves an evolutionary sampler about ten generations."""
    return max(4, min(50, trials // 10))


_SAMPLERS: Mapping[str, Callable[[int, int], BaseSampler]] = MappingProxyType(
    {
        DAMAGE: lambda seed, trials: RandomSampler(seed=seed),  # of what the model leaves open
        "tpe": lambda seed, trials: TPESampler(seed=seed, multivariate=True),
        "nsga2": lambda seed, trials: NSGAIISampler(
            seed=seed, population_size=_population(trials)
        ),
        "nsga3": lambda seed, trials: NSGAIIISampler(
            seed=seed, population_size=_population(trials)
        ),
        "gp": lambda seed, trials: GPSampler(seed=seed, warn_independent_sampling=False),
        "random": lambda seed, trials: RandomSampler(seed=seed),
    }
)


class _Backend(JournalFile, BaseJournalBackend):
    """A `JournalFile` as Optuna's storage calls it; durable where a trial ends."""

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        return self.read(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.append(logs, durable=any(log["op_code"] == _TOLD for log in logs))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Optuna's notices, which are for its own users, off the terminal."""
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            yield
        finally:
            logger.setLevel(level)


@dataclass(frozen=True)
class AskedTrial:
    """A trial that waits for its outcome.

    Attributes:
        number: Its number, from 0.
        origin: `seed` or `sampler`.
        suggester: Decides parameters.
    """

    number: int
    origin: str
    suggester: Suggester


class Study:
    """The trials of one search, asked and told one at a time.

    Args:
        storage: Path of a journal file, or URL of a database as Optuna takes it.
        objectives: Names of the metrics to optimise, with their directions.
        sampler: One of `SAMPLERS`.
        seed: Seed of every decision.
        trials: How many trials the search is to have.

    Raises:
        RunLocked: If another process writes to the journal or drives the database.
        StoreFailed: If the journal or the database cannot be opened.
        ValueError: If the database is none that can be locked.
    """

    def __init__(
        self,
        storage: Path | str,
        objectives: Mapping[str, Direction],
        *,
        sampler: str,
        seed: int,
        trials: int,
    ) -> None:
        self._objectives = tuple(objectives)
        self._sampler = (sampler, seed, trials)
        self._limit = 0
        self._fixed: Callable[[int], Mapping[str, Any]] = lambda number: {}
        self._storage, self._close = _open_storage(storage)
        try:
            self._study = self._created([StudyDirection[way.name] for way in objectives.values()])
        except BaseException:
            self._close()
            raise
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        self._left_behind = list(running)
        self._asked: dict[int, optuna.Trial] = {}

    def _created(self, directions: list[StudyDirection]) -> optuna.Study:
        """Returns the study of the storage.

        Optuna ignores directions where there is one: that of a search that ended before its first
        trial is made anew.
        """
        with _quiet():
            study = optuna.create_study(
                storage=self._storage,
                study_name=_NAME,
                directions=directions,
                load_if_exists=True,
            )
            if study.directions == directions or study.get_trials(deepcopy=False):
                return study  # that a search resumes as it was is verified with its other settings
            optuna.delete_study(study_name=_NAME, storage=self._storage)
        return self._created(directions)

    @property
    def notes(self) -> Mapping[str, Any]:
        """What was noted about the search as a whole."""
        return self._study.user_attrs

    def note(self, key: str, value: Any) -> None:
        """Notes a JSON value about the search as a whole."""
        self._study.set_user_attr(key, value)

    @property
    def run(self) -> str:
        """What tells this search apart from all others, drawn when it is asked for first."""
        if "run" not in self.notes:
            self.note("run", secrets.token_hex(8))
        drawn: str = self.notes["run"]
        return drawn

    def records(self) -> list[Record]:
        """Returns the record of every finished trial, in the order of their numbers."""
        return _records(self._study)

    def begin(
        self,
        seeds: Sequence[Mapping[str, Any]],
        limit: int,
        fixed: Callable[[int], Mapping[str, Any]] = lambda number: {},
    ) -> None:
        """Makes the study ready to be asked.

        Args:
            seeds: Parameters of the trials that come before all others; ignored if the study has
                them already.
            limit: The constraint: the most MACs that a plan may have.
            fixed: Returns, for a trial's number, the parameters that its sampler may not decide.
        """
        self._limit = limit
        self._fixed = fixed
        if self.notes.get(_SEEDED):
            return
        there = len(self._study.get_trials(deepcopy=False))  # a kill may have cut this loop short
        for parameters in seeds[there:]:
            self._study.enqueue_trial(dict(parameters), user_attrs={"origin": SEED})
        self.note(_SEEDED, True)

    def ask(self) -> AskedTrial:
        """Returns the next trial: one that a dead driver left behind, a seed, or a new one."""
        if self._left_behind:
            frozen = self._left_behind.pop(0)
            trial = optuna.Trial(self._study, frozen._trial_id)
        else:
            trials = self._study.get_trials(deepcopy=False)
            if not any(trial.state == TrialState.WAITING for trial in trials):
                self._study.enqueue_trial(dict(self._fixed(len(trials))))
            trial = self._study.ask()
        self._study.sampler = self._sampler_for(trial.number)
        self._asked[trial.number] = trial
        origin = trial.user_attrs.get("origin", SAMPLER)
        if origin == SEED and isinstance(self._study.sampler, (NSGAIISampler, NSGAIIISampler)):
            _ = trial.relative_params  # enters the seed into the population of its generation
        return AskedTrial(trial.number, origin, trial)

    def _sampler_for(self, number: int) -> BaseSampler:
        name, seed, trials = self._sampler
        state = np.random.SeedSequence([seed, number]).generate_state(1)
        with _quiet():
            return _SAMPLERS[name](int(state[0]), trials)

    def tell(self, record: Record) -> None:
        """Stores what became of an asked trial; after return no kill loses it."""
        trial = self._asked.pop(record.number)
        for key, value in attributes_of(record).items():
            trial.set_user_attr(key, value)
        match record.outcome:
            case Completed(metrics=metrics) | Stopped(metrics=metrics):
                self._constrain(trial, metrics["macs"] - self._limit)
                self._study.tell(trial, [metrics[name] for name in self._objectives])
            case Failed():
                self._study.tell(trial, state=TrialState.FAIL)
            case Infeasible():  # PRUNED is how Optuna keeps a trial that has no values
                self._constrain(trial, float(self._limit))
                self._study.tell(trial, state=TrialState.PRUNED)

    def _constrain(self, trial: optuna.Trial, violation: float) -> None:
        """Sets the constraint, unless a driver that died before it could tell has done so."""
        if "macs" not in trial.constraints:
            trial.set_constraint("macs", violation)

    def tell_finetuned(self, number: int, outcome: Completed | Failed) -> None:
        """Stores how the fine-tuning of a completed trial ended."""
        self.note(f"{_FINETUNED}{number}", outcome_to_json(outcome))

    def close(self) -> None:
        """Gives the storage free for another process."""
        self._close()


def read_study(storage: Path | str) -> tuple[list[Record], Mapping[str, Any]]:
    """Returns the records and notes of a search, which may be running in another process.

    Args:
        storage: Path of its journal file, or URL of its database.

    Raises:
        FileNotFoundError: If the file of the journal or of SQLite does not exist.
    """
    with database_failures(storage):
        opened, close = _open_storage(storage, read_only=True)
        try:
            with _quiet():
                study = optuna.load_study(study_name=_NAME, storage=opened)
            return _records(study), study.user_attrs
        except KeyError:  # the driver has only just begun
            return [], {}
        finally:
            close()


@contextmanager
def database_failures(storage: Path | str) -> Iterator[None]:
    """Says in one sentence what a database cannot do; a journal says it itself.

    Args:
        storage: Where the study is.

    Raises:
        StoreFailed: If its database raises in the block.
    """
    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__  # the database's own, below SQLAlchemy's and Optuna's
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        where = re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", str(storage))
        raise StoreFailed(
            f"the study in {where} cannot be used ({reason}); the trials that it has are kept."
        ) from error


def _open_storage(
    storage: Path | str, *, read_only: bool = False
) -> tuple[BaseStorage, Callable[[], None]]:
    """Returns the storage and what closes it."""
    if isinstance(storage, Path):
        backend = _Backend(storage, read_only=read_only)
        try:
            return JournalStorage(backend), backend.close
        except BaseException:
            backend.close()
            raise
    check_storage(storage)
    if read_only:
        _check_file(storage)
    with _quiet():
        database = optuna.storages.RDBStorage(storage)
        try:
            unlock = None if read_only else _lock_database(database)
        except BaseException:
            database.remove_session()
            database.engine.dispose()
            raise

    def close() -> None:
        database.remove_session()
        if unlock is not None:
            unlock()
        database.engine.dispose()

    return optuna.storages.get_storage(database), close


def check_storage(storage: str) -> None:
    """Verifies that a database is one that a study may lie in, without connecting to it.

    Args:
        storage: Its URL.

    Raises:
        ValueError: If it is neither SQLite, in a folder that is there, nor PostgreSQL with a
            driver: those drop a lock with its holder.
    """
    try:
        url = sqlalchemy.make_url(storage)
        kind = url.get_backend_name()
    except (sqlalchemy.exc.ArgumentError, ValueError):  # the latter for a port that is no number
        raise ValueError(
            f"a database is named by a URL such as sqlite:///trials.db or "
            f"postgresql://user:password@host/name, but got {storage.rpartition('@')[2]!r}."
        ) from None
    path = url.database or ":memory:"
    file = path if kind == "sqlite" and not path.startswith((":memory:", "file:")) else None
    if file is None and kind != "postgresql":
        got = url.set(query={}).render_as_string()  # without a password
        raise ValueError(f"a study lies in a file of SQLite or in PostgreSQL, but got {got}.")
    try:
        url.get_dialect().import_dbapi()
    except (ImportError, sqlalchemy.exc.NoSuchModuleError):
        raise ValueError(
            f"no driver for {url.drivername} is installed; for PostgreSQL: "
            f"pip install 'paretoprune[postgres]'."
        ) from None
    if file is not None and (Path(file).is_dir() or not Path(file).parent.is_dir()):
        raise ValueError(f"a file of SQLite lies in a folder that is there, but got {file}.")


def _check_file(storage: str) -> None:
    """Raises `FileNotFoundError` where opening a database of SQLite would create its file."""
    url = sqlalchemy.make_url(storage)
    if url.get_backend_name() == "sqlite" and url.database and not Path(url.database).exists():
        raise FileNotFoundError(url.database)


def _lock_database(database: optuna.storages.RDBStorage) -> Callable[[], None]:
    """Makes this process the only driver, until the returned function is called or it ends.

    Raises:
        RunLocked: If another process is.
    """
    url = database.engine.url
    if url.get_backend_name() == "sqlite" and url.database:
        path = Path(url.database)
        with ExitStack() as opened:
            file = opened.enter_context(path.with_name(f"{path.name}.lock").open("ab"))
            lock(file, path)
            return opened.pop_all().close
    connection = database.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    if not connection.exec_driver_sql(f"SELECT pg_try_advisory_lock({_LOCK})").scalar():
        connection.close()
        raise RunLocked(
            f"another search is running in the database {url.database!r}; wait until it ends "
            f"or stop it first."
        )
    return connection.close


def _records(study: optuna.Study) -> list[Record]:
    states = (TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED)
    trials = study.get_trials(deepcopy=False, states=states)
    records = [record_from_attributes(trial.number, trial.user_attrs) for trial in trials]
    notes = study.user_attrs
    return [_with_finetuning(one, notes.get(f"{_FINETUNED}{one.number}")) for one in records]


def _with_finetuning(record: Record, noted: Mapping[str, Any] | None) -> Record:
    outcome = None if noted is None else outcome_from_json(noted)
    return (
        replace(record, finetuned=outcome) if isinstance(outcome, Completed | Failed) else record
    )
