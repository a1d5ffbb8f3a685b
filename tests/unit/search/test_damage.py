"""The damage model: it finds out which groups matter, and says so in offsets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import pytest
from torch import Tensor

from paretoprune.criteria import CRITERIA, Bounds
from paretoprune.search import (
    Candidate,
    Completed,
    Failed,
    Problem,
    Record,
    SearchSpace,
    Stopped,
)
from paretoprune.search.damage import DamageModel, parent_of, posterior
from paretoprune.search.show import metrics_of
from paretoprune.search.space import OFFSET, Decided
from paretoprune.surgery import PruningGraph, PruningPlan, trace
from tests.unit.search.test_space import Suggests

Saliencies = Mapping[str, Mapping[str, Tensor]]
DENSE = 0.1


@pytest.fixture
def graph(problem: Problem) -> PruningGraph:
    return trace(problem.model, problem.example_inputs)


@pytest.fixture
def saliencies(problem: Problem, graph: PruningGraph) -> Saliencies:
    return {"l2": CRITERIA["l2"]()(problem.model, graph, problem.calibration)}


@pytest.fixture
def space(graph: PruningGraph, saliencies: Saliencies) -> SearchSpace:
    return SearchSpace.of(graph, saliencies, graph.cost().macs // 2, list(graph.blocks))


class Truth:
    """A network whose loss grows with the units that groups lose, in one group above all."""

    def __init__(self, graph: PruningGraph, sore: str) -> None:
        self.graph = graph
        self.sore = sore

    def loss(self, plan: PruningPlan) -> float:
        gone = {
            g.name: g.size - len(plan.kept.get(g.name, range(g.size)))
            for g in self.graph.open_groups
        }
        gone |= {
            n: self.graph.groups[n].size for b in plan.removed for n in self.graph.blocks[b].groups
        }
        return DENSE + sum(n * (1.0 if name == self.sore else 0.02) for name, n in gone.items())

    def record(self, number: int, candidate: Candidate, plan: PruningPlan) -> Record:
        cost = self.graph.cost(plan)
        metrics = {"loss": self.loss(plan), "macs": cost.macs, "params": cost.params}
        return Record(number, candidate, plan, cost, Completed(metrics, 0.1))


def search_with(
    model: DamageModel, truth: Truth, space: SearchSpace, saliencies: Saliencies, trials: int
) -> list[Record]:
    """Returns the records of a search that the model leads, after the one-shot plans."""
    records: list[Record] = []
    seeds = [{**seed} for seed in space.seeds(6)]
    for number in range(trials):
        parameters = seeds[number] if number < len(seeds) else model(records, number)
        candidate = space.suggest(Suggests(parameters))
        plan = space.decode(candidate, truth.graph, saliencies)
        records.append(truth.record(number, candidate, plan))
    return records


def test_it_spares_the_group_that_matters(
    graph: PruningGraph, saliencies: Saliencies, space: SearchSpace
) -> None:
    for sore in list(space.ties)[:3]:
        truth = Truth(graph, sore)
        model = DamageModel(space, graph, saliencies, seed=0)
        records = search_with(model, truth, space, saliencies, 40)
        at_target = [r for r in records if r.candidate.budget == space.budget(1.0)]
        losses = [truth.loss(r.plan) for r in at_target if r.plan is not None]
        assert min(losses[3:]) <= min(losses[:3])  # which may be the best there is
        assert sorted(losses[-8:])[2] < 0.5 * np.mean(losses[:3])  # the rest explores
        late = [r.candidate.offsets for r in records[25:]]
        others = [tie for tie in space.ties if tie != sore]
        assert np.mean([o[sore] for o in late]) > np.mean([[o[t] for t in others] for o in late])


def test_proposals_are_whole_decisions_within_the_space_and_repeat(
    graph: PruningGraph, saliencies: Saliencies, space: SearchSpace
) -> None:
    truth = Truth(graph, next(iter(space.ties)))
    model = DamageModel(space, graph, saliencies, seed=3)
    records = search_with(model, truth, space, saliencies, 12)
    again = DamageModel(space, graph, saliencies, seed=3)
    for number in range(12, 20):
        proposal = model(records, number)
        assert proposal.keys() == space.seeds(1)[0].keys()
        assert proposal == again(records[::-1], number)
        assert proposal["budget"] == space.fixed(number)["budget"]
        offsets = [value for name, value in proposal.items() if name.startswith("offset/")]
        assert max(map(abs, offsets)) <= OFFSET
        space.suggest(Suggests(proposal))  # asserts every bound
    other = DamageModel(space, graph, saliencies, seed=4)
    assert other(records, 12) != model(records, 12)


def test_offsets_of_stages_are_learnt_and_without_offsets_nothing_is(
    graph: PruningGraph, saliencies: Saliencies
) -> None:
    target, blocks = graph.cost().macs // 2, list(graph.blocks)
    space = SearchSpace.of(
        graph, saliencies, target, blocks, granularity="stage", bounds=Bounds(multiple=2)
    )
    sore = next(iter(space.ties))
    truth = Truth(graph, sore)
    model = DamageModel(space, graph, saliencies, seed=0)
    records = search_with(model, truth, space, saliencies, 30)
    late = [record.candidate.offsets for record in records[15:]]
    other = next(name for name, tie in space.ties.items() if tie != space.ties[sore])
    assert np.mean([offsets[sore] for offsets in late]) > np.mean([o[other] for o in late])
    none = SearchSpace.of(graph, saliencies, target, blocks, granularity="uniform")
    model = DamageModel(none, graph, saliencies, seed=0)
    assert model(records, 30) == none.fixed(30)


def test_where_nothing_has_finished_it_departs_from_the_seeds(
    graph: PruningGraph, saliencies: Saliencies, space: SearchSpace
) -> None:
    model = DamageModel(space, graph, saliencies, seed=0)
    failed = Record(0, Candidate("l2", 0.5), PruningPlan(), graph.cost(), Failed("no"))
    proposals = [model([], number) for number in range(40)]
    assert proposals == [model([failed], number) for number in range(40)]
    for number, proposal in enumerate(proposals):
        space.suggest(Suggests(proposal))  # asserts every bound
        assert proposal["budget"] == space.fixed(number)["budget"]
        assert proposal["allocation"] == "global"
    mean = {tie: np.mean([each[f"offset/{tie}"] for each in proposals]) for tie in space.ties}
    assert space.streams
    assert min(mean[tie] for tie in space.streams) > max(
        mean[tie] for tie in space.ties if tie not in space.streams
    )


def test_a_trial_that_was_stopped_teaches_as_one_that_was_completed(
    graph: PruningGraph, saliencies: Saliencies, space: SearchSpace
) -> None:
    model = DamageModel(space, graph, saliencies, seed=0, mutated=0.0)
    truth = Truth(graph, next(iter(space.ties)))
    whole = search_with(model, truth, space, saliencies, 12)
    some = [
        replace(record, outcome=Stopped(metrics_of(record), 0.1)) if record.number % 2 else record
        for record in whole
    ]
    for number in (12, 13):
        assert model(some, number) == model(whole, number)
        assert model(some, number) != model(whole[::2], number)


def test_losses_of_other_budgets_teach_by_their_shares(
    graph: PruningGraph, saliencies: Saliencies, space: SearchSpace
) -> None:
    model = DamageModel(space, graph, saliencies, seed=0, mutated=0.0)
    truth = Truth(graph, next(iter(space.ties)))
    records = search_with(model, truth, space, saliencies, 16)
    scaled = [
        replace(r, outcome=Completed({"loss": 4 * metrics_of(r)["loss"]}, 0.1))
        if r.candidate.budget == space.budget(1.0)
        else r
        for r in records
    ]
    assert 1 < sum(new is not old for new, old in zip(scaled, records, strict=True)) < 15
    for number in (16, 17):
        assert model(scaled, number) == model(records, number)


def test_parents_are_the_best_of_their_budget_and_where_it_has_few_trials_of_others(
    graph: PruningGraph, space: SearchSpace
) -> None:
    candidates = [Candidate(str(place), space.budget(1.0)) for place in range(8)]
    candidates.append(Candidate("lower", space.budget(0.55)))
    records = [
        Record(n, each, PruningPlan(), graph.cost(), Completed({"loss": 1.0 + n}, 0.1))
        for n, each in enumerate(candidates)
    ]

    def likeliest(level: float) -> list[str]:
        generator = np.random.default_rng(0)
        draws = (parent_of(space.budget(level), records, generator) for _ in range(400))
        drawn = Counter(parent.criterion for parent in draws)
        return [name for name, _ in drawn.most_common(4)]

    assert likeliest(1.0) == ["0", "1", "2", "3"]
    assert likeliest(0.55) == ["lower", "0", "1", "2"]
    assert likeliest(0.7) == ["0", "1", "2", "3"]  # which has no trial itself


def test_the_best_decisions_of_a_budget_are_tried_as_they_are_at_the_others(
    graph: PruningGraph, saliencies: Saliencies, space: SearchSpace
) -> None:
    model = DamageModel(space, graph, saliencies, seed=0)
    truth = Truth(graph, next(iter(space.ties)))
    offsets = {name: 0.1 * place for place, name in enumerate(space.ties)}
    good = Candidate("l2", space.budget(1.0), offsets=offsets)
    records = [truth.record(0, good, space.decode(good, graph, saliencies))]
    for number in (1, 3, 5):
        proposal = model(records, number)
        assert proposal["budget"] < 1
        assert {name: proposal[f"offset/{name}"] for name in space.ties} == pytest.approx(offsets)
        candidate = space.suggest(Decided(proposal))
        records.append(truth.record(number, candidate, space.decode(candidate, graph, saliencies)))
        again = model(records, number + 6)  # the same budget: now it is known
        assert again["budget"] == proposal["budget"]
        assert {name: again[f"offset/{name}"] for name in space.ties} != pytest.approx(offsets)


def test_plans_that_are_being_evaluated_are_not_proposed_again(
    graph: PruningGraph, saliencies: Saliencies, space: SearchSpace
) -> None:
    model = DamageModel(space, graph, saliencies, seed=0)
    truth = Truth(graph, next(iter(space.ties)))
    good = Candidate("l2", space.budget(1.0), offsets={next(iter(space.ties)): 0.5})
    records = [truth.record(0, good, space.decode(good, graph, saliencies))]

    def plan(number: int, planned: Collection[PruningPlan]) -> PruningPlan:
        candidate = space.suggest(Decided(model(records, number, planned)))
        return space.decode(candidate, graph, saliencies)

    alone = [plan(number, ()) for number in range(1, 13)]
    assert len(set(alone)) < len(alone)  # the best of one budget is tried at the others
    planned: list[PruningPlan] = []
    for number in range(1, 13):  # twelve workers, of which none is done yet
        planned.append(plan(number, planned))
    assert len(set(planned)) == len(planned)


def test_plans_are_hardly_proposed_twice_unless_there_is_no_other(
    graph: PruningGraph, saliencies: Saliencies, space: SearchSpace
) -> None:
    truth = Truth(graph, next(iter(space.ties)))
    model = DamageModel(space, graph, saliencies, seed=0)
    records = search_with(model, truth, space, saliencies, 60)
    proposed = [record.plan for record in records[len(space.seeds(6)) :]]
    assert len(set(proposed)) > 0.9 * len(proposed)

    only, *others = space.ties
    bounds = Bounds(exclude=tuple(others))
    target = graph.cost().macs * 9 // 10
    one = SearchSpace.of(graph, saliencies, target, [], bounds=bounds)
    assert set(one.ties) == {only}
    model = DamageModel(one, graph, saliencies, seed=0)
    records = search_with(model, Truth(graph, only), one, saliencies, 12)
    assert len({record.plan for record in records}) <= len(one.levels)


def test_mutations_are_halved_every_thirty_trials(
    graph: PruningGraph, saliencies: Saliencies, space: SearchSpace
) -> None:
    model = DamageModel(space, graph, saliencies, seed=0, mutated=1.0)
    truth = Truth(graph, next(iter(space.ties)))
    parent = Candidate("l2", space.budget(1.0))
    records = [truth.record(number, parent, PruningPlan()) for number in range(61)]
    offsets = {f"offset/{tie}" for tie in space.ties.values()}

    def size(trials: int) -> float:
        proposals = [model(records[:trials], number) for number in range(100)]
        return float(np.mean([abs(each[name]) for each in proposals for name in offsets]))

    assert size(31) == pytest.approx(size(1) / 2, rel=0.1)
    assert size(61) == pytest.approx(size(1) / 4, rel=0.1)


def test_the_posterior_comes_close_to_true_coefficients() -> None:
    generator = np.random.default_rng(0)
    truth = generator.uniform(0.3, 2, 8)
    claims = generator.uniform(0, 0.3, (300, 8))
    damage = 0.4 + claims @ truth
    mean, precision = posterior(claims, damage, np.ones(8))
    assert np.abs(mean[1:] - truth).max() < 0.1
    assert mean[0] == pytest.approx(0.4, abs=0.1)
    few, loose = posterior(claims[:2], damage[:2], np.ones(8))
    assert np.linalg.det(loose) < np.linalg.det(precision)
    assert np.abs(few[1:] - 1).max() < np.abs(truth - 1).max()
