"""search, from a problem to a front, in this process."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretoprune.criteria import CRITERIA, Bounds
from paretoprune.search import (
    Completed,
    Direction,
    Finetuning,
    Metric,
    NothingCompleted,
    ParetoFront,
    Problem,
    Record,
    RunLocked,
    SearchInfo,
    SearchInterrupted,
    evaluation,
    loop,
    read_run,
    search,
)
from paretoprune.search.dense import dense_latency
from paretoprune.search.evaluation import Evaluate, Evaluator
from paretoprune.search.ledger import Ledger
from paretoprune.search.objectives import directions_of
from paretoprune.search.searcher import Executor, Tasks, run_inline
from paretoprune.search.show import metrics_of
from paretoprune.search.study import Study
from paretoprune.surgery import InfeasibleBudget, PruningGraph, prune, trace


class Notes:
    """Writes down what a search tells; interrupts it after some trials."""

    def __init__(self, interrupt_after: int = 10**9) -> None:
        self.infos: list[SearchInfo] = []
        self.records: list[Record] = []
        self.fronts: list[ParetoFront] = []
        self.ends: list[type | None] = []
        self._after = interrupt_after

    def started(self, info: SearchInfo) -> None:
        self.infos.append(info)

    def finished(self, record: Record, front: ParetoFront) -> None:
        self.records.append(record)
        self.fronts.append(front)
        if len(self.records) == self._after:
            raise KeyboardInterrupt

    def ended(self, error: BaseException | None) -> None:
        self.ends.append(None if error is None else type(error))


def run(
    problem: Problem, run_dir: Path, notes: Notes, trials: int = 9, **more: Any
) -> ParetoFront:
    arguments = {"flops": 0.5, "workers": 0, "run_dir": run_dir, "listeners": [notes], **more}
    return search(problem, trials=trials, **arguments)


def test_a_search_returns_the_front_of_its_records(problem: Problem, tmp_path: Path) -> None:
    notes = Notes()
    front = run(problem, tmp_path, notes)
    (info,) = notes.infos
    graph = trace(problem.model, problem.example_inputs)
    assert (info.problem, info.trials) == ("noise", 9)
    assert set(info.criteria) <= set(CRITERIA)
    assert info.dense == graph.cost()
    assert info.target == graph.cost().macs // 2
    assert info.metrics.keys() == {"loss", "accuracy"}
    assert info.sizes == {group.name: group.size for group in graph.open_groups}
    assert info.blocks.keys() == graph.blocks.keys()
    assert notes.ends == [None]
    assert [r.number for r in notes.records] == list(range(9))
    assert front == notes.fronts[-1] == ParetoFront.of(notes.records, info.objectives)
    best = front.best(info.target)
    assert best.plan is not None
    assert best.cost is not None
    assert graph.cost(best.plan) == best.cost
    prune(problem.model, graph, best.plan)(problem.example_inputs)


def test_the_same_seed_gives_the_same_search(problem: Problem, tmp_path: Path) -> None:
    searches = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        notes = Notes()
        run(problem, tmp_path / name, notes, seed=seed)
        searches.append([(r.candidate, r.plan) for r in notes.records])
    assert searches[0] == searches[1] != searches[2]


def test_a_search_that_was_interrupted_goes_on(problem: Problem, tmp_path: Path) -> None:
    whole = Notes()
    expected = run(problem, tmp_path / "whole", whole)

    folder, notes = tmp_path / "run", Notes(interrupt_after=4)
    with pytest.raises(SearchInterrupted) as interruption:
        run(problem, folder, notes)
    assert interruption.value.front == notes.fronts[-1]
    assert notes.ends == [KeyboardInterrupt]
    assert isinstance(interruption.value, KeyboardInterrupt)

    resumed = Notes()
    front = run(problem, folder, resumed)
    assert resumed.infos[0].records == tuple(notes.records)
    assert resumed.ends == [None]
    records = [*notes.records, *resumed.records]
    assert [(r.number, r.candidate, r.plan) for r in records] == [
        (r.number, r.candidate, r.plan) for r in whole.records
    ]
    assert [r.number for r in front.records] == [r.number for r in expected.records]


def test_a_finished_search_is_only_told(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = run(problem, tmp_path, Notes())
    monkeypatch.setattr(Study, "ask", None)
    notes = Notes()
    assert run(problem, tmp_path, notes) == front
    assert (len(notes.infos[0].records), notes.records, notes.ends) == (9, [], [None])
    assert read_run(tmp_path).trials == 9


def test_more_trials_extend_a_search(problem: Problem, tmp_path: Path) -> None:
    run(problem, tmp_path, Notes(), trials=5)
    notes = Notes()
    run(problem, tmp_path, notes, trials=8)
    assert [r.number for r in notes.records] == [5, 6, 7]


class Counting:
    """A criterion that counts its calls."""

    summary = "counts"
    paper = "none"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Any
    ) -> Mapping[str, Tensor]:
        self.calls += 1
        return CRITERIA["l2"]()(model, graph, calibration)


def test_saliencies_are_computed_once_per_run(problem: Problem, tmp_path: Path) -> None:
    counting = Counting()
    for trials in (2, 3):
        run(problem, tmp_path, Notes(), trials, criteria={"mine": counting})
    assert counting.calls == 1
    (file,) = (tmp_path / "saliency").glob("mine-*.safetensors")
    file.write_bytes(b"half a file")
    run(problem, tmp_path, Notes(), 4, criteria={"mine": counting})
    assert counting.calls == 2
    assert {r.candidate.criterion for r in read_run(tmp_path).records} == {"mine"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"flops": 0.4}, r"other settings \(target differ\)"),
        ({"criteria": ("l1",)}, r"\(criteria differ\)"),
        ({"objectives": ("accuracy", "macs")}, r"\(objectives differ\)"),
        ({"bounds": Bounds(multiple=2)}, r"\(bounds differ\)"),
        ({"granularity": "uniform"}, r"\(ties, streams, granularity differ\)"),
    ],
)
def test_a_run_is_resumed_with_its_own_settings(
    problem: Problem, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    run(problem, tmp_path, Notes(), 2)
    with pytest.raises(ValueError, match=message):
        run(problem, tmp_path, Notes(), 3, **changed)


def test_a_run_is_resumed_with_its_own_weights(problem: Problem, tmp_path: Path) -> None:
    run(problem, tmp_path, Notes(), 2)
    other = copy.deepcopy(problem.model)
    with torch.no_grad():
        next(other.parameters()).mul_(1.01)
    with pytest.raises(ValueError, match=r"other settings \(weights differ\)"):
        run(replace(problem, model=other), tmp_path, Notes(), 3)


def test_a_run_is_resumed_with_its_own_data(problem: Problem, tmp_path: Path) -> None:
    run(problem, tmp_path, Notes(), 2)
    other = [(1.1 * inputs, targets) for inputs, targets in problem.validation]
    with pytest.raises(ValueError, match=r"other settings \(data differ\)"):
        run(replace(problem, validation=other), tmp_path, Notes(), 3)
    equal = [(inputs.clone(), targets.clone()) for inputs, targets in problem.validation]
    run(replace(problem, validation=equal), tmp_path, Notes(), 3)


def test_an_interrupt_while_the_start_is_told_ends_the_search_as_any_other(
    problem: Problem, tmp_path: Path
) -> None:
    class Interrupted(Notes):
        def started(self, info: SearchInfo) -> None:
            raise KeyboardInterrupt

    first, last = Interrupted(), Notes()
    with pytest.raises(SearchInterrupted):
        run(problem, tmp_path, first, listeners=[first, last])
    assert (first.ends, last.ends) == ([KeyboardInterrupt], [])  # `last` was told nothing
    assert run(problem, tmp_path, Notes()).records


@pytest.mark.parametrize("flops", [0.35, 0.5, 0.7])
def test_a_network_of_few_units_is_searched_at_any_target(
    problem: Problem, tmp_path: Path, flops: float
) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.ReLU()]
    narrow = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4)).eval()
    target = flops * trace(narrow, problem.example_inputs).cost().macs
    run(replace(problem, model=narrow), tmp_path, Notes(), 3, flops=flops, criteria=("l2",))
    macs = [one.cost.macs for one in read_run(tmp_path).records if one.cost is not None]
    assert len(macs) == 3  # none of them is infeasible
    assert 0.85 * target < max(macs) <= target


def test_a_run_has_one_driver(problem: Problem, tmp_path: Path) -> None:
    study = Study(
        tmp_path / "journal.log", directions_of(("loss", "macs")), sampler="tpe", seed=0, trials=2
    )
    with pytest.raises(RunLocked, match="another search is running in"):
        run(problem, tmp_path, Notes())
    study.close()


def test_an_unreachable_target_is_said_with_the_minimum(problem: Problem, tmp_path: Path) -> None:
    with pytest.raises(InfeasibleBudget, match=r"the smallest reachable is [\d,]+ MACs"):
        run(problem, tmp_path, Notes(), flops=10)
    with pytest.raises(ValueError, match="has not measured the dense network yet"):
        read_run(tmp_path)


@pytest.mark.parametrize("granularity", ["stage", "uniform"])
def test_a_search_within_bounds(problem: Problem, tmp_path: Path, granularity: str) -> None:
    bounds = Bounds(multiple=2, max_ratio=0.8, exclude=("4.conv1",))
    run(problem, tmp_path, Notes(), 14, granularity=granularity, bounds=bounds)
    graph, most = trace(problem.model, problem.example_inputs), 2 * (granularity == "stage")
    records = read_run(tmp_path).records
    assert {record.origin for record in records} == {"seed", "sampler"}
    for record in records:
        assert record.plan is not None
        assert "4" not in record.plan.removed
        assert len(set(record.candidate.offsets.values())) <= most
        for name, units in record.plan.kept.items():
            assert len(units) in bounds.counts(graph, graph.groups[name]).tolist()
    assert len({record.plan for record in records}) > 5


def test_bounds_out_of_reach_are_said_before_anything_is_measured(
    problem: Problem, tmp_path: Path
) -> None:
    unmeasured: dict[str, Any] = {"criteria": {"never": None}}  # would raise where it is called
    for bounds, words in (
        (Bounds(min_ratio=0.8), r"cannot be used up: the largest reachable within the bounds is "),
        (Bounds(max_ratio=0.1, exclude=("3", "4", "8")), r"the smallest reachable within the bou"),
    ):
        with pytest.raises(InfeasibleBudget, match=words + r".*[\d,]+ MACs \([\d.]+%\)"):
            run(problem, tmp_path, Notes(), bounds=bounds, **unmeasured)
    with pytest.raises(ValueError, match="no group, block or module matches 'layer9'"):
        run(problem, tmp_path, Notes(), bounds=Bounds(exclude=("layer9",)), **unmeasured)


def test_a_run_is_resumed_with_its_own_loss(problem: Problem, tmp_path: Path) -> None:
    run(problem, tmp_path, Notes(), 1)
    other = replace(problem, loss=F.multi_margin_loss)
    with pytest.raises(ValueError, match=r"\(loss differ\)"):
        run(other, tmp_path, Notes(), 2)


def test_a_metric_of_ones_own_is_an_objective(problem: Problem, tmp_path: Path) -> None:
    def margin(outputs: Tensor, targets: Tensor) -> Tensor:
        best = outputs.topk(2).values
        return (best[:, 0] - best[:, 1]).mean()

    measured = replace(problem, metrics={"margin": Metric(margin, unit="logits")})
    notes = Notes()
    front = run(measured, tmp_path, notes, objectives=("margin", "macs"))
    (info,) = notes.infos
    (first, _) = info.objectives
    assert (first.name, first.direction, first.unit) == ("margin", Direction.MAXIMIZE, "logits")
    assert first.reference == 0.0 < info.metrics["margin"]
    found = {one.number: metrics_of(one)["margin"] for one in front.records}
    best = front.best()
    assert best.number == max(found, key=lambda number: found[number])
    assert best.plan is not None
    small = Evaluator(measured, trace(problem.model, problem.example_inputs))
    again = small(best.plan, 0).metrics["margin"]
    assert again == pytest.approx(found[best.number], rel=1e-4)
    with pytest.raises(ValueError, match="unknown objective 'margin'; available: loss, "):
        run(problem, tmp_path / "other", Notes(), objectives=("margin", "macs"))


def test_a_search_of_which_nothing_completes_says_why(problem: Problem, tmp_path: Path) -> None:
    calls = 0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if not notes.infos:
            return F.cross_entropy(outputs, targets)
        raise RuntimeError("out of luck")

    notes = Notes()
    words = "none of 2 trials completed: 2 x failed: RuntimeError: out of luck"
    with pytest.raises(NothingCompleted, match=words):
        run(replace(problem, loss=loss), tmp_path, notes, 2)
    assert len(notes.records) == 2
    assert notes.ends == [NothingCompleted]


def test_a_folder_without_a_search(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no search"):
        read_run(tmp_path)


def test_without_a_run_folder_nothing_is_left(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    front = search(problem, 0.5, 3, workers=0)
    assert front.records
    assert list(tmp_path.iterdir()) == []


def test_a_listener_that_raises_ends_the_search_and_loses_nothing(
    problem: Problem, tmp_path: Path
) -> None:
    class Broken(Notes):
        def finished(self, record: Record, front: ParetoFront) -> None:
            raise RuntimeError("no server")

    broken = Broken()
    with pytest.raises(RuntimeError, match="no server"):
        run(problem, tmp_path, broken)
    assert broken.ends == [RuntimeError]
    assert len(read_run(tmp_path).records) == 1
    notes = Notes()
    run(problem, tmp_path, notes)
    assert [r.number for r in notes.records] == list(range(1, 9))


def test_other_objectives_and_a_database(problem: Problem, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    names = ("accuracy", "params", "macs")
    front = run(problem, tmp_path, Notes(), 4, objectives=names, storage=url, sampler="nsga2")
    assert tuple(o.name for o in front.objectives) == names
    assert read_run(tmp_path, url).front == front
    assert not (tmp_path / "journal.log").exists()


def test_the_dense_latency_is_measured_once_and_counts_from(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "TIMED_SECONDS", 0.02)
    names = ("loss", "macs", "latency")
    notes = Notes()
    run(problem, tmp_path, notes, 3, objectives=names)
    (info,) = notes.infos
    dense = info.metrics["latency"]
    assert {one.name: one.reference for one in info.objectives}["latency"] == dense
    resumed = Notes()
    front = run(problem, tmp_path, resumed, 5, objectives=names)
    assert resumed.infos[0].metrics["latency"] == dense
    assert front.objectives == info.objectives
    for record in [*notes.records, *resumed.records]:
        assert isinstance(record.outcome, Completed)
        assert 0 < record.outcome.metrics["latency"] < math.inf


def test_a_latency_that_cannot_be_measured_is_said(problem: Problem, tmp_path: Path) -> None:
    wrong = replace(problem, example_inputs=torch.randn(2, 5, 8, 8))
    with pytest.raises(ValueError, match=r"latency of the dense network cannot be .*5 channels"):
        dense_latency(wrong, run_inline, Ledger(tmp_path), 0)


def test_a_regression_has_no_accuracy(problem: Problem, tmp_path: Path) -> None:
    batches = [(inputs, torch.randn(len(targets), 4)) for inputs, targets in problem.validation]
    changed = replace(
        problem, calibration=batches, validation=batches, loss=nn.functional.mse_loss
    )
    front = run(changed, tmp_path, Notes(), 3, criteria=("l2",))
    for record in front.records:
        assert isinstance(record.outcome, Completed)
        assert record.outcome.metrics.keys() == {"loss", "macs", "params"}


def test_importing_imports_no_vendor() -> None:
    code = "import sys, paretoprune.search; print(*{'ray', 'optuna', 'mlflow'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == ""


def test_the_time_limit_is_that_of_trials_alone(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = list[float | None]()

    def executor(
        workers: object, address: object, gpus: object, seconds: float | None, most: object
    ) -> Executor:
        limits.append(seconds)
        return run_inline

    monkeypatch.setattr(loop, "_executor", executor)
    finetuning = Finetuning(lambda network, **_: network, epochs=1, top=1)
    search(problem, 0.5, 2, workers=1, trial_timeout=9.0, finetuning=finetuning)
    assert limits == [9.0, None]


def test_workers_side_by_side_are_hardly_given_a_plan_twice(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def side_by_side(tasks: Tasks, evaluate: Evaluate, ledger: Ledger) -> None:
        while running := list(islice(iter(tasks.next, None), 20)):
            for task in running:
                tasks.tell(task, ledger.evaluate(evaluate, task))

    monkeypatch.setattr(loop, "run_inline", side_by_side)
    notes = Notes()
    run(problem, tmp_path, notes, trials=60)
    plans = [record.plan for record in notes.records if record.origin == "sampler"]
    assert len(set(plans)) > 0.95 * len(plans)
