"""Racing: what is clearly worse is stopped, what may be better never is."""

from __future__ import annotations

import math
import pickle
import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from paretoprune.search import (
    Completed,
    ParetoFront,
    Problem,
    Record,
    SearchInfo,
    SearchInterrupted,
    Stopped,
    evaluate,
    read_run,
    search,
)
from paretoprune.search.evaluation import Evaluator, attempt
from paretoprune.search.ledger import Ledger, Task
from paretoprune.search.racing import BOUNDS, dominated, estimated
from paretoprune.search.record import outcome_from_json, outcome_to_json
from paretoprune.surgery import PruningPlan, prune, reconstruct, trace

PLAN = PruningPlan({"3.conv1": tuple(range(12))}, removed=("8",))


def stopped_after(own: list[float], rival: list[float]) -> int | None:
    return next((n for n in range(1, len(own) + 1) if dominated(own[:n], rival)), None)


def test_an_equal_candidate_is_seldom_stopped_and_a_worse_one_soon() -> None:
    generator = random.Random(0)
    wrong, looks = 0, []
    for _ in range(2000):
        hard = [generator.gauss(0.5, 0.3) for _ in range(16)]  # batches differ, for both alike
        rival = [value + generator.gauss(0, 0.02) for value in hard]
        equal = [value + generator.gauss(0, 0.02) for value in hard]
        worse = [value + generator.gauss(0.1, 0.02) for value in hard]
        wrong += stopped_after(equal, rival) is not None
        looks.append(stopped_after(worse, rival))
    assert wrong < 2000 * 0.001 * len(BOUNDS)
    assert all(look is not None for look in looks)
    assert sorted(looks, key=lambda look: look or 0)[1000] == 6


@pytest.mark.parametrize("count", [4, 6, 8])
def test_nothing_is_stopped_without_a_rival_or_after_the_last_batch(count: int) -> None:
    worst = [100.0 + index for index in range(count)]
    assert not dominated(worst, [])
    assert not dominated(worst, [0.0] * count)
    assert dominated(worst, [0.0] * (count + 1))
    for broken in (math.nan, math.inf):  # fails at the end, in words of its own
        assert not dominated([broken, *worst[1:]], [0.0] * (count + 1))


def test_the_bounds_are_quantiles_of_students_t() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (4, 8):
        draws = torch.randn(2_000_000, count, generator=generator)
        statistic = draws.mean(1) / draws.std(1) * count**0.5
        share = (statistic > BOUNDS[count]).double().mean()
        assert share == pytest.approx(0.001, rel=0.15)


def test_an_estimate_is_exact_where_the_difference_is_the_same_everywhere() -> None:
    rival = [0.3, 0.9, 0.5, 0.7, 0.6, 0.1]
    own = [value + 0.2 for value in rival]
    assert estimated(own[:4], rival) == pytest.approx(sum(own) / 6)


@pytest.fixture
def batched(problem: Problem) -> Problem:
    inputs = torch.cat([batch for batch, _ in problem.validation])
    targets = torch.cat([batch for _, batch in problem.validation])
    parts = zip(inputs.split(len(inputs) // 8), targets.split(len(inputs) // 8), strict=True)
    return replace(problem, validation=list(parts))


def test_an_evaluation_stops_early_and_says_what_it_would_have_found(batched: Problem) -> None:
    graph = trace(batched.model, batched.example_inputs)
    evaluator = Evaluator(batched, graph)
    whole = evaluator(PLAN, 0)
    assert isinstance(whole, Completed)
    assert len(whole.losses) == len(list(batched.validation))
    small = prune(batched.model, graph, PLAN)
    small = reconstruct(small, batched.model, graph, PLAN, batched.calibration)
    singles = [evaluate(small, [batch], batched.loss)["loss"] for batch in batched.validation]
    assert whole.losses == pytest.approx(singles, rel=1e-4)
    better = tuple(loss - 0.5 for loss in whole.losses)
    stopped = attempt(lambda plan, seed: evaluator(plan, seed, better), PLAN, 0)
    assert isinstance(stopped, Stopped)
    assert stopped.metrics["loss"] == pytest.approx(sum(whole.losses) / len(whole.losses))
    assert stopped.metrics["macs"] == whole.metrics["macs"]
    worse = tuple(loss + 0.5 for loss in whole.losses)
    assert replace(evaluator(PLAN, 0, worse), seconds=0.0) == whole
    for outcome in (stopped, whole):
        assert outcome_from_json(outcome_to_json(outcome)) == outcome
        assert pickle.loads(pickle.dumps(outcome)) == outcome


def test_a_task_takes_its_rival_along(batched: Problem, tmp_path: Path) -> None:
    graph = trace(batched.model, batched.example_inputs)
    evaluator = Evaluator(batched, graph)
    whole = evaluator(PLAN, 0)
    assert isinstance(whole, Completed)
    task = Task(PLAN, 0, rival=tuple(loss - 0.5 for loss in whole.losses))
    assert Task.from_json(task.to_json()) == task
    assert isinstance(Ledger(tmp_path).evaluate(evaluator, task), Stopped)


def test_what_a_search_stops_is_dominated(batched: Problem, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "criteria": ("l2", "random"),
        "workers": 0,
        "run_dir": tmp_path,
    }
    front = search(batched, 0.4, 40, **arguments)
    stopped = [r for r in read_run(tmp_path).records if isinstance(r.outcome, Stopped)]
    assert stopped
    evaluator = Evaluator(batched, trace(batched.model, batched.example_inputs))
    found = front.to_dataframe()
    for record in stopped[:5]:
        assert record.plan is not None
        real = evaluator(record.plan, 0).metrics
        assert ((found["loss"] < real["loss"]) & (found["macs"] <= real["macs"])).any()
    assert search(batched, 0.4, 40, **arguments).records == front.records


class Breaking:
    """Ends a search by Ctrl-C after some trials."""

    def __init__(self, left: int) -> None:
        self.left = left

    def started(self, info: SearchInfo) -> None: ...

    def finished(self, record: Record, front: ParetoFront) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def ended(self, error: BaseException | None) -> None: ...


def test_what_is_stopped_does_not_depend_on_a_break(batched: Problem, tmp_path: Path) -> None:
    def searched(folder: Path, after: int) -> list[tuple[int, type, PruningPlan | None]]:
        settings: dict[str, Any] = {"criteria": ("l2", "random"), "workers": 0, "run_dir": folder}
        with suppress(SearchInterrupted):
            search(batched, 0.4, 40, listeners=[Breaking(after)], **settings)
        search(batched, 0.4, 40, **settings)
        return [(one.number, type(one.outcome), one.plan) for one in read_run(folder).records]

    whole = searched(tmp_path / "whole", 40)
    first = next(number for number, kind, _ in whole if kind is Stopped)
    assert searched(tmp_path / "broken", first) == whole


def test_what_is_no_matter_of_loss_and_macs_is_not_raced(batched: Problem, tmp_path: Path) -> None:
    """`test_what_a_search_stops_is_dominated` stops some of the same search for loss and MACs."""
    names = ("loss", "params")
    search(
        batched, 0.4, 40, objectives=names, criteria=("l2", "random"), workers=0, run_dir=tmp_path
    )
    assert not [r for r in read_run(tmp_path).records if isinstance(r.outcome, Stopped)]
