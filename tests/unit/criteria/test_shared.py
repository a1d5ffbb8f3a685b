"""Criteria share passes over the calibration data, and never a pass of other weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from paretoprune.criteria import CRITERIA, CostClass, SharedCalibration, block_saliency
from paretoprune.surgery import PruningPlan, trace
from tests.unit.surgery.specimen import draw
from tests.unit.surgery.specimens import ZOO, traced


class Counted:
    """Batches that count how often they are read from the start."""

    def __init__(self) -> None:
        self.batches = [(draw(ZOO["residual"].shape, 8), torch.randint(5, (8,))) for _ in range(2)]
        self.reads = 0

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        self.reads += 1
        return iter(self.batches)


def test_gradient_based_criteria_share_one_pass() -> None:
    model, graph = traced("residual")
    counted = Counted()
    shared = SharedCalibration(counted)
    for name in ("sosp_h", "taylor", "fisher", "proscore"):
        alone = CRITERIA[name]()(model, graph, counted.batches)
        together = CRITERIA[name]()(model, graph, shared)
        for group in alone:
            torch.testing.assert_close(together[group], alone[group])
    assert counted.reads == 1


def test_criteria_of_the_elimination_share_it() -> None:
    model, graph = traced("residual")
    counted = Counted()
    shared = SharedCalibration(counted)
    for name in ("obs", "obs_per_mac"):
        together = CRITERIA[name]()(model, graph, shared)
        alone = CRITERIA[name]()(model, graph, counted.batches)
        assert all(torch.equal(together[group], alone[group]) for group in alone)
        block_saliency(CRITERIA[name](), together, model, graph, shared)
    assert counted.reads == 1


def test_changed_weights_and_other_graphs_are_measured_anew() -> None:
    model, graph = traced("residual")
    model = copy.deepcopy(model)
    counted = Counted()
    shared = SharedCalibration(counted)
    before = shared.statistics(model, graph).changes
    next(model.parameters()).detach().mul_(2)
    after = shared.statistics(model, graph).changes
    assert counted.reads == 2
    assert not torch.equal(before, after)
    shared.statistics(model, trace(model, ZOO["residual"].inputs()))
    assert counted.reads == 3


def test_curvature_is_measured_when_it_is_not_there_yet() -> None:
    model, graph = traced("residual")
    counted = Counted()
    shared = SharedCalibration(counted)
    assert shared.statistics(model, graph).curvature is None
    assert shared.statistics(model, graph, curvature=True).curvature is not None
    assert shared.statistics(model, graph).curvature is not None
    assert counted.reads == 2


def test_the_loss_is_the_problems_own() -> None:
    model, graph = traced("named_inputs")
    inputs = draw(ZOO["named_inputs"].shape, 8)
    goal = torch.randn(8, 5)
    data = SharedCalibration([(inputs, goal)], F.mse_loss)
    found = data.statistics(model, graph).gradient
    F.mse_loss(model(**inputs), goal).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
        parameter.grad = None
    for name in ("taylor", "sosp_h", "sosp_i"):
        assert all((v > 0).any() for v in CRITERIA[name]()(model, graph, data).values())


def test_cost_classes_are_ordered_and_read_well() -> None:
    assert str(min(CostClass)) == "weights alone"
    assert len({str(cost) for cost in CostClass}) == len(CostClass)
    assert CRITERIA["sosp_h"].cost > CRITERIA["taylor"].cost > CRITERIA["l2"].cost


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_removable_block_has_a_finite_saliency(criterion: str) -> None:
    model, graph = traced("residual")
    data = Counted()
    kind = CRITERIA[criterion]()
    saliency = kind(model, graph, data)
    scores = block_saliency(kind, saliency, model, graph, data)
    assert list(scores) == list(graph.blocks)
    assert all(0 <= score < float("inf") for score in scores.values())


def test_blocks_of_additive_criteria_have_the_mean_of_their_units() -> None:
    model, graph = traced("residual")
    saliency = CRITERIA["l2"]()(model, graph, [])
    scores = block_saliency(CRITERIA["l2"](), saliency, model, graph, [])
    assert scores["2"] == pytest.approx(float(saliency["2.conv1.0"].mean()))


def test_blocks_of_obs_have_the_error_that_is_left_without_them() -> None:
    model, graph = traced("residual")
    shared = SharedCalibration(Counted())
    errors = CRITERIA["obs"]()(model, graph, shared)
    scores = block_saliency(CRITERIA["obs"](), errors, model, graph, shared)
    assert scores["2"] == pytest.approx(float(errors["2.conv1.0"].max()))
    per_mac = CRITERIA["obs_per_mac"]()
    ratios = block_saliency(per_mac, per_mac(model, graph, shared), model, graph, shared)
    saved = graph.cost().macs - graph.cost(PruningPlan(removed=("2",))).macs
    assert ratios["2"] == pytest.approx(scores["2"] / saved, rel=1e-5)
