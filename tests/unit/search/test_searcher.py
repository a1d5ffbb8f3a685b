"""The searcher: exactly the trials asked for, and every plan evaluated once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paretoprune.search import Completed, Failed, Infeasible, Record
from paretoprune.search.ledger import Ledger, Task
from paretoprune.search.record import outcome_from_json, outcome_to_json
from paretoprune.search.searcher import Searcher, run_inline
from paretoprune.search.study import Study

OpenStudy = Callable[..., Study]
MakeSearcher = Callable[..., Searcher]
Analytic = Any  # the class lives in conftest.py, which cannot be imported


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "evals")


def test_runs_exactly_the_trials_asked_for(
    open_study: OpenStudy, searcher_of: MakeSearcher, analytic: Analytic, ledger: Ledger
) -> None:
    study, finished = open_study(), list[Record]()
    searcher = searcher_of(study, analytic, 25, finished.append)
    run_inline(searcher, analytic, ledger)
    assert searcher.done
    assert study.records() == finished
    assert [r.number for r in finished] == list(range(25))
    assert [r.origin for r in finished[:3]] == ["seed", "seed", "sampler"]
    study.close()


def test_a_plan_is_evaluated_once(
    open_study: OpenStudy, searcher_of: MakeSearcher, analytic: Analytic, ledger: Ledger
) -> None:
    analytic.units = 2  # at most eight plans
    study = open_study()
    run_inline(searcher_of(study, analytic, 40), analytic, ledger)
    assert len(study.records()) == 40
    assert max(Counter(analytic.evaluated).values()) == 1
    by_plan: dict[Any, set[float]] = {}
    for record in study.records():
        assert isinstance(record.outcome, Completed)
        by_plan.setdefault(record.plan, set()).add(record.outcome.metrics["loss"])
    assert all(len(losses) == 1 for losses in by_plan.values())
    study.close()


def test_trials_with_the_same_plan_wait_for_the_first(
    open_study: OpenStudy, searcher_of: MakeSearcher, analytic: Analytic
) -> None:
    analytic.units = 1  # one plan
    study = open_study()
    searcher = searcher_of(study, analytic, 5)
    task = searcher.next()
    assert task is not None
    assert searcher.next() is None
    assert not searcher.done
    searcher.tell(task, Completed({"loss": 1.0, "macs": 2.0}, 3.0))
    assert searcher.done
    assert [r.outcome.seconds for r in study.records() if isinstance(r.outcome, Completed)] == [
        3.0,
        0.0,
        0.0,
        0.0,
        0.0,
    ]
    study.close()


def test_a_failed_evaluation_is_an_outcome(
    open_study: OpenStudy, searcher_of: MakeSearcher, analytic: Analytic, ledger: Ledger
) -> None:
    analytic.failing = lambda plan: len(plan.kept["a"]) % 2 == 0
    study = open_study()
    run_inline(searcher_of(study, analytic, 20), analytic, ledger)
    failed = [r for r in study.records() if isinstance(r.outcome, Failed)]
    assert failed
    assert {r.outcome for r in failed} == {Failed("RuntimeError: made to fail")}
    assert len(study.records()) == 20
    study.close()


def test_an_infeasible_candidate_is_not_evaluated(
    open_study: OpenStudy, searcher_of: MakeSearcher, analytic: Analytic, ledger: Ledger
) -> None:
    analytic.infeasible = lambda candidate: candidate.offsets["a"] > 0.4
    study = open_study()
    run_inline(searcher_of(study, analytic, 20), analytic, ledger)
    infeasible = [r for r in study.records() if isinstance(r.outcome, Infeasible)]
    assert infeasible
    assert all(r.plan is None and r.cost is None for r in infeasible)
    assert len(analytic.evaluated) == 20 - len(infeasible)
    study.close()


def test_a_resumed_search_evaluates_nothing_twice(
    open_study: OpenStudy, searcher_of: MakeSearcher, analytic: Analytic, ledger: Ledger
) -> None:
    study = open_study()
    searcher = searcher_of(study, analytic, 12)
    for _ in range(5):
        task = searcher.next()
        assert task is not None
        searcher.tell(task, ledger.evaluate(analytic, task))
    task = searcher.next()
    assert task is not None
    ledger.evaluate(analytic, task)  # finished, and the driver dies before it is told
    study.close()

    study = open_study()
    run_inline(searcher_of(study, analytic, 12), analytic, ledger)
    assert [r.number for r in study.records()] == list(range(12))
    assert max(Counter(analytic.evaluated).values()) == 1
    study.close()


def test_a_finished_search_asks_for_nothing(
    open_study: OpenStudy, searcher_of: MakeSearcher, analytic: Analytic, ledger: Ledger
) -> None:
    study = open_study()
    run_inline(searcher_of(study, analytic, 4), analytic, ledger)
    for trials in (4, 2):
        searcher = searcher_of(study, analytic, trials)
        assert searcher.done
        assert searcher.next() is None
    more = searcher_of(study, analytic, 6)
    run_inline(more, analytic, ledger)
    assert len(study.records()) == 6
    study.close()


def task_of(analytic: Analytic) -> Task:
    plan, _ = analytic.decode(analytic.suggest(Fixed()))
    return Task(plan, 0)


class Fixed:
    """Decides the middle."""

    def suggest_float(self, name: str, low: float, high: float) -> float:
        return (low + high) / 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"outcome": "lost"}', '{"outcome": "failed"}']
)
def test_a_spoilt_ledger_file_is_evaluated_again(
    analytic: Analytic, ledger: Ledger, content: str
) -> None:
    task = task_of(analytic)
    outcome = ledger.evaluate(analytic, task)
    file = ledger.folder / f"{task.key}.json"
    file.write_text(content)
    again = ledger.evaluate(analytic, task)
    assert isinstance(outcome, Completed)
    assert isinstance(again, Completed)
    assert again.metrics == outcome.metrics
    assert len(analytic.evaluated) == 2
    assert ledger.read(task.key) == again
    assert [f.name for f in ledger.folder.iterdir()] == [file.name]


def test_what_another_run_left_in_a_folder_is_not_taken(
    analytic: Analytic, tmp_path: Path
) -> None:
    """A node without shared storage keeps the folder of a run that is deleted elsewhere."""
    before, now = (Ledger(tmp_path / "evals", run) for run in ("first", "second"))
    task = task_of(analytic)
    before.write(task.key, Completed({"loss": -1.0, "macs": 1}, 0.0))
    outcome = now.evaluate(analytic, task)
    assert isinstance(outcome, Completed)
    assert outcome.metrics["loss"] > 0
    assert now.read(task.key) == outcome
    assert before.read(task.key) is None


def test_a_ledger_that_cannot_be_written_costs_no_evaluation(
    analytic: Analytic, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    ledger = Ledger(tmp_path / "file" / "evals")
    assert isinstance(ledger.evaluate(analytic, task_of(analytic)), Completed)


@pytest.mark.parametrize(
    "outcome", [Completed({"loss": 0.5, "macs": 3}, 1.5), Failed("why"), Infeasible("why")]
)
def test_outcomes_survive_json(outcome: Completed | Failed | Infeasible) -> None:
    assert outcome_from_json(outcome_to_json(outcome)) == outcome


def test_not_an_outcome() -> None:
    with pytest.raises(
        ValueError, match="completed, stopped, failed or infeasible, but got 'lost'"
    ):
        outcome_from_json({"outcome": "lost"})
