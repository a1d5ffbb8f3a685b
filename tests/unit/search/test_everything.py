"""In every step the candidate that is more alike to its parent goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paretoprune.criteria import Bounds
from paretoprune.criteria.kl import Kl
from paretoprune.experiments.finetuning import FineTuner
from paretoprune.experiments.models import digits_resnet
from paretoprune.experiments.training import Training
from paretoprune.search import (
    Completed,
    Failed,
    Finetuning,
    Metric,
    ParetoFront,
    Problem,
    Record,
    SearchInfo,
    SearchInterrupted,
    SearchStuck,
    evaluate,
    read_run,
    search,
)
from paretoprune.search import everything as strategy
from paretoprune.search.everything import CandidateStep, difference
from paretoprune.search.weights import RECOVERED, Weights
from paretoprune.surgery import PruningPlan, prune, reconstruct, trace

CRITERION = {"kl": Kl(images=16)}


class Stopping:
    """Stops a search with Ctrl-C after some trials."""

    def __init__(self, after: int) -> None:
        self.after = after

    def started(self, info: SearchInfo) -> None:
        """Nothing to do."""

    def finished(self, record: Record, front: ParetoFront) -> None:
        self.after -= 1
        if not self.after:
            raise KeyboardInterrupt

    def ended(self, error: BaseException | None) -> None:
        """Nothing to do."""


def run(
    problem: Problem,
    run_dir: Path,
    flops: float = 0.2,
    trials: int = 100,
    stop: int = 10**9,
    recovery: int = 0,
    **more: Any,
) -> list[Record]:
    trainer = FineTuner([*problem.calibration], Training(epochs=1, learning_rate=0.05))
    search(
        problem,
        flops,
        trials,
        strategy="everything",
        criteria=CRITERION,
        finetuning=Finetuning(trainer, recovery=recovery) if recovery else None,
        workers=0,
        run_dir=run_dir,
        listeners=[Stopping(stop)],
        **more,
    )
    return list(read_run(run_dir).records)


def macs(record: Record) -> int:
    assert record.cost is not None
    return record.cost.macs


def similarity(record: Record) -> float:
    assert isinstance(record.outcome, Completed)
    return record.outcome.metrics["cka_to_parent"]


def steps_of(records: list[Record]) -> list[list[Record]]:
    """Groups records by step: neurons come after a layer, or alone when no layer is left."""
    steps: list[list[Record]] = []
    for record in records:
        if record.origin == "layer" or not steps or len(steps[-1]) == 2:
            steps.append([])
        steps[-1].append(record)
    return steps


def winner(step: list[Record]) -> Record:
    return max(step, key=lambda one: (similarity(one), one.origin == "layer"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Problem, Path, list[Record]]:
    """A search to its end."""
    torch.manual_seed(0)
    inputs = torch.randn(48, 1, 8, 8)
    targets = torch.arange(48) % 10
    batches = [(inputs[:24], targets[:24]), (inputs[24:], targets[24:])]
    certainty = Metric(lambda outputs, targets: outputs.softmax(1).amax(1).mean())
    problem = Problem(
        digits_resnet().eval(),
        inputs[:2],
        batches[:1],
        batches[1:],
        metrics={"certainty": certainty},
        name="noise",
    )
    folder = tmp_path_factory.mktemp("everything")
    return problem, folder, run(problem, folder, 0.75)


def test_the_more_similar_candidate_is_the_next_parent(
    whole: tuple[Problem, Path, list[Record]],
) -> None:
    problem, folder, records = whole
    graph = trace(problem.model, problem.example_inputs)
    steps = steps_of(records)
    assert len(steps) >= 2
    parent = PruningPlan()
    for step in steps:
        before = graph.cost(parent).macs
        assert before > read_run(folder).target  # or the search had ended
        for record in step:
            plan = record.plan
            assert plan is not None
            assert macs(record) == graph.cost(plan).macs < before
            gone = set(plan.removed) - set(parent.removed)
            assert len(gone) == (record.origin == "layer")
            for group, units in plan.kept.items():
                assert set(units) <= set(parent.kept.get(group, range(graph.groups[group].size)))
        if len(step) == 2:
            layer, neurons = step
            assert [layer.origin, neurons.origin] == ["layer", "neurons"]
            lost = max(macs(layer), read_run(folder).target)
            assert 0.99 * lost < macs(neurons) <= lost
        best = winner(step).plan
        assert best is not None
        parent = best
    assert graph.cost(parent).macs <= read_run(folder).target


def test_a_candidate_is_its_parent_cut_and_refitted(
    whole: tuple[Problem, Path, list[Record]], tmp_path: Path
) -> None:
    problem, folder, records = whole
    graph = trace(problem.model, problem.example_inputs)
    weights = Weights.of_run(folder)
    first, second = steps_of(records)[:2]
    parent = winner(first).plan
    plan = second[-1].plan
    assert parent is not None
    assert plan is not None
    large = weights.network(problem.model, graph, parent, RECOVERED)
    own = trace(large, problem.example_inputs)
    step = difference(parent, plan, own)
    small = reconstruct(prune(large, own, step), large, own, step, problem.calibration)
    kept = weights.network(problem.model, graph, plan, RECOVERED)
    images = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(kept(images), small(images), rtol=1e-4, atol=1e-5)
    measured = evaluate(kept, problem.validation, metrics=problem.metrics)
    assert isinstance(second[-1].outcome, Completed)
    told = {name: second[-1].outcome.metrics[name] for name in ("loss", "accuracy", "certainty")}
    assert told == pytest.approx(measured, rel=1e-4)
    assert trace(kept, problem.example_inputs).cost() == second[-1].cost
    again = CandidateStep(problem, graph, Weights(tmp_path), None)
    with pytest.raises(ValueError, match="trained weights are missing"):
        again(plan, 0, parent)


@pytest.mark.parametrize(("recovery", "stop"), [(0, 3), (1, 1), (1, 2)])
def test_a_search_that_was_interrupted_goes_on(
    problem: Problem, tmp_path: Path, recovery: int, stop: int
) -> None:
    expected = run(problem, tmp_path / "whole", trials=6, recovery=recovery)
    with pytest.raises(SearchInterrupted):
        run(problem, tmp_path / "run", trials=6, stop=stop, recovery=recovery)
    assert len(read_run(tmp_path / "run").records) == stop
    resumed = run(problem, tmp_path / "run", trials=6, recovery=recovery)

    def facts(records: list[Record]) -> list[object]:
        return [
            (one.number, one.origin, one.candidate, one.plan, similarity(one)) for one in records
        ]

    assert facts(resumed) == facts(expected)
    with pytest.raises(ValueError, match="recovery differ"):
        run(problem, tmp_path / "run", trials=6, recovery=2)


def test_trials_are_a_limit_and_can_be_raised(problem: Problem, tmp_path: Path) -> None:
    assert len(run(problem, tmp_path, trials=5)) == 4
    assert len(run(problem, tmp_path, trials=6)) == 6


def test_candidates_that_fail_leave_the_step_to_the_other(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = CandidateStep._similarity
    failing = {"layer"}

    def similar(self: CandidateStep, *networks: object) -> float:
        plan = networks[-1]
        assert isinstance(plan, PruningPlan)
        if ("layer" if plan.removed else "neurons") in failing:
            raise RuntimeError("made to fail")
        return real(self, *networks)  # type: ignore[arg-type]

    monkeypatch.setattr(CandidateStep, "_similarity", similar)
    records = run(problem, tmp_path, trials=4)
    assert [isinstance(one.outcome, Failed) for one in records] == [True, False] * 2
    assert not any(one.plan.removed for one in records[1::2] if one.plan)
    failing.add("neurons")
    with pytest.raises(SearchStuck, match=r"no candidate of step 3 could be evaluated: .*made to"):
        run(problem, tmp_path, trials=8)
    assert len(read_run(tmp_path).records) == 6
    failing.clear()  # what made them fail is mended: the step is tried again under new numbers
    records = run(problem, tmp_path, trials=8)
    assert [isinstance(one.outcome, Failed) for one in records[4:]] == [True, True, False, False]
    assert [one.plan for one in records[4:6]] == [one.plan for one in records[6:8]]


def test_a_network_that_has_nothing_left_is_told(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strategy.Everything, "_candidates", lambda self: iter(()))
    with pytest.raises(SearchStuck, match=r"nothing can be removed any more at [\d,]+ MACs"):
        run(problem, tmp_path)


def test_it_takes_one_criterion(problem: Problem) -> None:
    with pytest.raises(ValueError, match="takes one criterion, but got l1, l2"):
        search(problem, 0.5, 4, strategy="everything", criteria=("l1", "l2"), workers=0)
    with pytest.raises(ValueError, match=r"latency is no objective of it"):
        search(problem, 0.5, 4, strategy="everything", objectives=("latency", "loss"), workers=0)
    with pytest.raises(ValueError, match=r"cka is no objective of it, but got \['loss', 'cka'\]"):
        search(problem, 0.5, 4, strategy="everything", objectives=("loss", "cka"), workers=0)
    with pytest.raises(ValueError, match="unknown strategy 'all'; available: optuna, everything"):
        search(problem, 0.5, 4, strategy="all", workers=0)


def test_every_step_keeps_to_multiples_and_exclusions(
    whole: tuple[Problem, Path, list[Record]], tmp_path: Path
) -> None:
    problem = whole[0]
    graph = trace(problem.model, problem.example_inputs)
    bounds = Bounds(multiple=4, exclude=("layer2.1", "layer3.0.conv1"))
    records = run(problem, tmp_path, flops=0.4, bounds=bounds)
    assert min(map(macs, records)) <= 0.4 * graph.cost().macs
    for record in records:
        assert record.plan is not None
        assert set(record.plan.removed) <= set(bounds.blocks(graph))
        for name, units in record.plan.kept.items():
            assert len(units) in bounds.counts(graph, graph.groups[name]).tolist()
    with pytest.raises(ValueError, match=r"other settings \(bounds differ\)"):
        run(problem, tmp_path, flops=0.4, bounds=Bounds(multiple=4))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"bounds": Bounds(max_ratio=0.5)}, "no ratio of the dense network .* got 0 to 0.5"),
        ({"bounds": Bounds(min_ratio=0.1)}, "no ratio of the dense network .* got 0.1 to 1"),
        ({"granularity": "stage"}, "no offsets that groups could share, .* is 'stage'"),
    ],
)
def test_what_its_steps_do_not_know_is_refused(
    problem: Problem, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(problem, tmp_path, **more)


torch.manual_seed(0)
DENSE = digits_resnet().eval()
GRAPH = trace(DENSE, torch.randn(2, 1, 8, 8))


@st.composite
def plans(draw: st.DrawFn) -> tuple[PruningPlan, PruningPlan]:
    """A plan, and one that takes more."""
    first, second = {}, {}
    for group in GRAPH.open_groups:
        order = draw(st.permutations(range(group.size)))
        # a group of one unit counts as frozen, and may freeze what it meets
        sizes = sorted(draw(st.tuples(*[st.integers(2, group.size)] * 2)))
        first[group.name], second[group.name] = order[: sizes[1]], order[: sizes[0]]
    blocks = draw(st.lists(st.sampled_from(sorted(GRAPH.blocks)), unique=True))
    some = blocks[: draw(st.integers(0, len(blocks)))]
    return (
        PruningPlan({n: tuple(u) for n, u in first.items()}, tuple(some)),
        PruningPlan({n: tuple(u) for n, u in second.items()}, tuple(blocks)),
    )


@settings(max_examples=10, deadline=None)
@given(plans())
def test_parent_and_difference_make_the_plan(pair: tuple[PruningPlan, PruningPlan]) -> None:
    parent, plan = pair
    small = prune(DENSE, GRAPH, parent)
    own = trace(small, torch.randn(2, 1, 8, 8))
    step = difference(parent, plan, own)
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(prune(small, own, step)(images), prune(DENSE, GRAPH, plan)(images))
