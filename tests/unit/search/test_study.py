"""The study keeps every trial, over any number of drivers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from paretoprune.search import (
    SAMPLERS,
    Candidate,
    Completed,
    Failed,
    Infeasible,
    Record,
    RunLocked,
    read_run,
)
from paretoprune.search.study import AskedTrial, Study, check_storage, read_study
from paretoprune.surgery import Cost, PruningPlan

OpenStudy = Callable[..., Study]
LIMIT = 100
PLAN = PruningPlan({"a": (0, 2)}, ("block",))


def share(trial: AskedTrial) -> float:
    """Decides the one parameter of these tests."""
    return trial.suggester.suggest_float("share", 0, 1)


def record(trial: AskedTrial, value: float, **changes: Any) -> Record:
    metrics = {"loss": 1 - value, "macs": round(100 * value), "params": 3}
    values = {
        "number": trial.number,
        "candidate": Candidate("l2", 0.5, "uniform", {"a": value}, ("block",)),
        "plan": PLAN,
        "cost": Cost(round(100 * value), 3),
        "outcome": Completed(metrics, 0.25),
        "origin": trial.origin,
    }
    return Record(**{**values, **changes})


def run(study: Study, trials: int) -> list[float]:
    """Asks and tells trials; returns what was decided."""
    decided = []
    for _ in range(trials):
        trial = study.ask()
        decided.append(share(trial))
        study.tell(record(trial, decided[-1]))
    return decided


def test_records_come_back_from_the_study_alone(open_study: OpenStudy) -> None:
    study = open_study()
    study.begin([{"share": 0.5}], LIMIT)
    candidate = Candidate("taylor", 0.25)
    outcomes: list[dict[str, Any]] = [
        {},
        {"outcome": Failed("RuntimeError: no")},
        {"outcome": Failed("it took longer than its limit of 9 s.", "timeout")},
        {"outcome": Infeasible("too small"), "plan": None, "cost": None, "candidate": candidate},
    ]
    told = []
    for changes in outcomes:
        trial = study.ask()
        told.append(record(trial, share(trial), **changes))
        study.tell(told[-1])
    study.note("key", {"value": [1]})
    run = study.run
    study.close()

    study = open_study()
    assert study.records() == told
    assert study.run == run
    assert [r.origin for r in told] == ["seed", "sampler", "sampler", "sampler"]
    assert study.notes["key"] == {"value": [1]}
    study.close()


def test_a_trial_left_behind_is_asked_again_under_its_number(open_study: OpenStudy) -> None:
    study = open_study()
    study.begin([], LIMIT)
    run(study, 2)
    left = [study.ask() for _ in range(3)]
    decided = [share(trial) for trial in left[:2]]  # the third was not even decided
    study.close()

    study = open_study()
    study.begin([], LIMIT)
    again = [study.ask() for _ in range(4)]
    assert [trial.number for trial in again] == [2, 3, 4, 5]
    assert [share(trial) for trial in again[:2]] == decided
    for trial in again:
        study.tell(record(trial, share(trial)))
    assert [r.number for r in study.records()] == list(range(6))
    study.close()


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_a_resumed_study_decides_what_an_uninterrupted_one_decides(
    open_study: OpenStudy, tmp_path: Path, sampler: str
) -> None:
    whole = open_study(tmp_path / "whole.log", sampler=sampler)
    whole.begin([{"share": 0.5}], LIMIT)
    expected = run(whole, 30)
    whole.close()

    decided: list[float] = []
    for trials in (7, 12, 11):
        study = open_study(sampler=sampler)
        study.begin([{"share": 0.5}], LIMIT)
        decided += run(study, trials)
        study.ask()  # and here the driver dies
        study.close()
    assert decided == expected


def test_another_seed_decides_otherwise(open_study: OpenStudy, tmp_path: Path) -> None:
    decided = []
    for seed in (0, 1):
        study = open_study(tmp_path / f"{seed}.log", seed=seed)
        study.begin([], LIMIT)
        decided.append(run(study, 3))
        study.close()
    assert decided[0] != decided[1]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_begins_with_the_seeds(open_study: OpenStudy, sampler: str) -> None:
    study = open_study(sampler=sampler, trials=14)
    study.begin([{"share": 0.5}, {"share": 0.25}], LIMIT)
    decided = run(study, 14)
    assert decided[:2] == [0.5, 0.25]
    assert all(0 <= value <= 1 for value in decided)
    study.close()


def test_an_evolutionary_sampler_breeds_from_the_seeds(open_study: OpenStudy) -> None:
    names = [f"gene/{index}" for index in range(8)]
    study = open_study(sampler="nsga2", trials=40)  # a population of four
    study.begin([dict.fromkeys(names, value) for value in (0.11, 0.22, 0.33, 0.44)], LIMIT)
    genes = []
    for _ in range(8):
        trial = study.ask()
        genes += [trial.suggester.suggest_float(name, 0, 1) for name in names]
        study.tell(record(trial, genes[-1]))
    inherited = [gene for gene in genes[32:] if gene in (0.11, 0.22, 0.33, 0.44)]
    assert len(inherited) > 16
    study.close()


def test_seeds_are_put_in_once_and_whole(
    open_study: OpenStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = [{"share": value} for value in (0.1, 0.2, 0.3)]
    study = open_study()
    enqueue = optuna.Study.enqueue_trial

    def dies_after_the_first(self: optuna.Study, *args: Any, **kwargs: Any) -> None:
        enqueue(self, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(optuna.Study, "enqueue_trial", dies_after_the_first)
        with pytest.raises(KeyboardInterrupt):
            study.begin(seeds, LIMIT)
    study.close()

    for _ in range(2):
        study = open_study()
        study.begin(seeds, LIMIT)
        study.close()
    study = open_study()
    assert run(study, 4)[:3] == [0.1, 0.2, 0.3]
    study.close()


def test_optuna_is_told_what_is_feasible(open_study: OpenStudy, tmp_path: Path) -> None:
    study = open_study()
    study.begin([{"share": 0.5}, {"share": 1.0}], limit=60)
    run(study, 2)
    trial = study.ask()
    share(trial)
    infeasible = Infeasible("too small")
    study.tell(record(trial, 0.1, outcome=infeasible, plan=None, cost=None))
    study.close()

    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal.log"))
    loaded = optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(backend))
    constraints = [t.constraints for t in loaded.get_trials()]
    assert constraints == [{"macs": -10.0}, {"macs": 40.0}, {"macs": 60.0}]
    assert [t.number for t in loaded.best_trials] == [0]


def test_a_driver_that_died_while_telling_tells_again(
    open_study: OpenStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study()
    study.begin([], LIMIT)
    trial = study.ask()
    told = record(trial, share(trial))

    def dies(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(optuna.Study, "tell", dies)
        with pytest.raises(KeyboardInterrupt):
            study.tell(told)
    study.close()

    study = open_study()
    study.begin([], LIMIT)
    assert study.ask().number == told.number
    study.tell(told)
    assert study.records() == [told]
    study.close()


def test_what_is_told_survives_a_loss_of_power(
    open_study: OpenStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Any] = []
    monkeypatch.setattr("os.fsync", synced.append)
    study = open_study()
    study.begin([], LIMIT)
    for outcome in ({}, {"outcome": Failed("no")}, {"outcome": Infeasible("too small")}):
        trial = study.ask()
        told = record(trial, share(trial), **outcome)
        before = len(synced)
        study.tell(told)
        assert len(synced) > before
    study.close()


def test_a_second_driver_is_refused(open_study: OpenStudy) -> None:
    study = open_study()
    with pytest.raises(RunLocked):
        open_study()
    study.close()


def test_a_reader_sees_a_running_study(open_study: OpenStudy, tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    with pytest.raises(FileNotFoundError):
        read_study(path)
    study = open_study()
    study.begin([], LIMIT)
    run(study, 3)
    study.ask()
    records, notes = read_study(path)
    assert records == study.records()
    assert notes == study.notes
    study.close()


def test_a_journal_without_a_study_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    path.touch()
    assert read_study(path) == ([], {})


def test_a_database_serves_as_well(open_study: OpenStudy, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = open_study(url)
    study.begin([{"share": 0.5}], LIMIT)
    run(study, 2)
    left = share(study.ask())
    study.close()

    study = open_study(url)
    study.begin([{"share": 0.5}], LIMIT)
    trial = study.ask()
    assert (trial.number, share(trial)) == (2, left)
    assert len(study.records()) == 2
    assert read_study(url)[0] == study.records()
    study.close()


def test_optuna_is_quiet_and_its_settings_stay(
    open_study: OpenStudy, capfd: pytest.CaptureFixture[str]
) -> None:
    level = logging.getLogger("optuna").level
    study = open_study()
    study.begin([{"share": 0.5}], LIMIT)
    run(study, 3)
    study.close()
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("optuna").level == level


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_what_is_fixed_is_not_decided(open_study: OpenStudy, sampler: str) -> None:
    study = open_study(sampler=sampler)
    study.begin(
        [{"share": 0.5, "budget": 1.0}], LIMIT, lambda number: {"budget": (1.0, 0.5)[number % 2]}
    )
    decided = []
    for _ in range(12):
        trial = study.ask()
        value = share(trial)
        decided.append(trial.suggester.suggest_categorical("budget", (1.0, 0.85, 0.5)))
        study.tell(record(trial, value))
    assert decided == [(1.0, 0.5)[number % 2] for number in range(12)]
    study.close()


def test_a_search_that_ended_before_its_first_trial_leaves_no_objectives_behind(
    open_study: OpenStudy, tmp_path: Path
) -> None:
    open_study(objectives=("loss", "macs")).close()  # optuna ignores the directions of a second
    study = open_study(objectives=("accuracy", "macs", "params"))
    trial = study.ask()
    metrics = {"loss": 0.1, "accuracy": 0.9, "macs": 50, "params": 3}
    study.tell(record(trial, share(trial), outcome=Completed(metrics, 0.1)))
    assert study.records()[0].outcome == Completed(metrics, 0.1)
    study.close()
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal.log"))
    storage = optuna.storages.JournalStorage(backend)
    (kept,) = optuna.load_study(study_name=None, storage=storage).trials
    assert kept.values == [0.9, 50, 3]


def test_reading_makes_no_database(tmp_path: Path) -> None:
    file = tmp_path / "moved.db"
    with pytest.raises(ValueError, match=r"holds no search: .*moved\.db is not there"):
        read_run(tmp_path, f"sqlite:///{file}")
    assert not file.exists()


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:mem?mode=memory&uri=true"]
)
def test_a_database_in_memory_holds_no_study(url: str) -> None:
    with pytest.raises(ValueError, match="a study lies in a file of SQLite or in PostgreSQL"):
        check_storage(url)


def test_a_folder_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lies in a folder that is there, but got"):
        check_storage(f"sqlite:///{tmp_path}")
