"""Whether a problem fits together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from paretoprune.search import Completed, Finetuning, Metric, Problem, search
from paretoprune.search.evaluation import Evaluator
from paretoprune.search.fit import check_problem, check_trainable
from paretoprune.surgery import trace


def once(problem: Problem) -> Any:
    return iter(list(problem.validation))


@pytest.mark.parametrize(
    ("split", "make", "message"),
    [
        ("calibration", lambda p: [], r"problem\.calibration must have at least one batch"),
        ("validation", once, r"problem\.validation is read many times"),
        (
            "calibration",
            lambda p: [(torch.zeros(2), {"boxes": torch.zeros(2), "of": "two"})],
            r"with a row per example, but got \(\(2,\), \{'boxes': \(2,\), 'of': str\}\)",
        ),
        (
            "validation",
            lambda p: [(torch.zeros(2, 1, 8, 8), [torch.zeros(2), torch.zeros(3)])],
            r"with a row per example, but got \(\(2, 1, 8, 8\), \[\(2,\), \(3,\)\]\)",
        ),
        ("validation", lambda p: [torch.zeros(2)], r"problem\.validation is \(inputs, targets\)"),
        ("recalibration", lambda p: [], r"problem\.recalibration must have at least one"),
        (
            "validation",
            lambda p: [(torch.zeros(2, 3, 8, 8), torch.zeros(2).long())],
            r"the model does not take a batch of problem\.validation",
        ),
        (
            "validation",
            lambda p: [(torch.zeros(2, 1, 8, 8), torch.zeros(3).long())],
            r"outputs \(\(2, 4\)\) with the targets \(\(3,\)\) of problem\.validation",
        ),
        (
            "validation",
            lambda p: [(torch.full((2, 1, 8, 8), float("nan")), torch.zeros(2).long())],
            r"on problem\.validation is nan, and must be finite",
        ),
        (
            "calibration",
            lambda p: [
                *p.calibration,
                (torch.full((2, 1, 8, 8), math.inf), p.validation[0][1][:2]),
            ],
            r"inputs of problem\.calibration are not all finite",
        ),
        (
            "calibration",
            lambda p: [*p.calibration, (torch.zeros(2, 1, 8, 9), torch.zeros(2).long())],
            r"problem\.calibration has examples of 1x8x8 and of 1x8x9; bring all to the same size",
        ),
        (
            "example_inputs",
            lambda p: torch.zeros(1, 8, 8),
            r"have 8x8 and a batch has 1x8x8 as the sizes of one example",
        ),
        (
            "validation",
            lambda p: DataLoader(TensorDataset(*p.validation[0]), batch_size=8, shuffle=True),
            r"problem\.validation gives other batches every time it is read",
        ),
        (
            "validation",
            lambda p: [(inputs, torch.ones(len(inputs), 4)) for inputs, _ in p.validation],
            r"cross entropy.* are floats that are no probabilities of shape \(\d+, 4\); give `l",
        ),
        ("loss", lambda p: lambda o, t: 0.5, r"problem\.loss returns a tensor .*, but got float"),
        ("loss", lambda p: lambda o, t: o, r"problem\.loss returns a tensor .*, but got shape"),
        ("model", lambda p: nn.Linear, r"problem\.model is a module, but got a type"),
        (
            "metrics",
            lambda p: {"loss": Metric(lambda o, t: 1.0)},
            "not as one that is measured anyway .*, but got 'loss'",
        ),
        (
            "metrics",
            lambda p: {"iou": Metric(lambda o, t: o[:, 9].mean())},
            r"the metric 'iou' does not take the model's outputs .*: IndexError: index 9",
        ),
        (
            "metrics",
            lambda p: {"iou": Metric(lambda o, t: math.nan)},
            "the metric 'iou' of a batch of problem.validation is nan",
        ),
    ],
)
def test_data_that_does_not_fit_is_named(
    problem: Problem, split: str, make: Callable[[Problem], Any], message: str
) -> None:
    changed: Any = {split: make(problem)}
    with pytest.raises(ValueError, match=message):
        check_problem(replace(problem, **changed))


def test_what_all_examples_share_is_no_input(problem: Problem) -> None:
    class Placed(nn.Linear):
        def forward(self, input: Tensor, places: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(input + places)

    batches = [((torch.randn(6, 3), torch.randn(1, 3)), torch.arange(6) % 4)]
    placed = replace(
        problem,
        model=Placed(3, 4),
        example_inputs=batches[0][0],
        calibration=batches,
        validation=batches,
    )
    with pytest.raises(ValueError, match="a batch has 1 and 6 of them; what all examples share"):
        check_problem(placed)


def test_one_logit_is_no_class_for_the_cross_entropy(problem: Problem) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    batches = [(inputs, 1.0 * targets[:, None]) for inputs, targets in problem.validation]
    regression = replace(problem, model=model, calibration=batches, validation=batches)
    with pytest.raises(ValueError, match=r"network returns \(\d+, 1\) .* such as F\.mse_loss"):
        check_problem(regression)
    check_problem(replace(regression, loss=F.mse_loss))


class Tasks(nn.Module):
    """Tells a class and a place from the same features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.kind, self.place = nn.Linear(8, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x).mean((2, 3))
        return {"kind": self.kind(features), "place": self.place(features)}


def multitask_loss(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    kind = F.cross_entropy(outputs["kind"], targets["kind"])
    return kind + F.mse_loss(outputs["place"], targets["place"])


def test_several_targets_of_an_example_are_searched_with(problem: Problem) -> None:
    def tasks(targets: Tensor) -> dict[str, Tensor]:
        return {"kind": targets, "place": torch.rand(len(targets), 2)}

    def hits(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        return (outputs["kind"].argmax(1) == targets["kind"]).double().mean()

    batches = [(inputs, tasks(targets)) for inputs, targets in problem.calibration]
    held_out = [(inputs, tasks(targets)) for inputs, targets in problem.validation]
    mine = replace(
        problem,
        model=Tasks().eval(),
        calibration=batches,
        validation=held_out,
        loss=multitask_loss,
        metrics={"kind": Metric(hits)},
    )
    front = search(mine, 0.6, 3, criteria=("sosp_h", "obs"), workers=0)
    best = front.best()
    assert best.plan is not None
    assert isinstance(best.outcome, Completed)
    graph = trace(mine.model, mine.example_inputs)
    small = Evaluator(mine, graph).network(best.plan, 0)
    ((inputs, targets),) = held_out
    with torch.no_grad():
        outputs = small(inputs)
    assert best.outcome.metrics["loss"] == pytest.approx(float(multitask_loss(outputs, targets)))
    assert best.outcome.metrics["kind"] == pytest.approx(float(hits(outputs, targets)))
    check_trainable(mine, graph)


def test_checks_leave_the_model_in_its_mode(problem: Problem) -> None:
    problem.model.train()
    check_problem(problem)
    assert all(module.training for module in problem.model.modules())


class OnlyInTraining(nn.Module):
    """Runs a head in training that evaluation never sees, and may return what it says."""

    def __init__(self, returned: bool) -> None:
        super().__init__()
        self.returned = returned
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head, self.auxiliary = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        features = self.body(x).mean((2, 3))
        logits = self.head(features)
        if not self.training:
            return logits
        more = self.auxiliary(features)
        return (logits, more) if self.returned else logits + more


def never(network: nn.Module, **_settings: Any) -> nn.Module:
    """A trainer that is not called."""
    raise AssertionError


def test_norms_are_tried_on_more_than_one_example(problem: Problem, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    ((inputs, targets), *_) = problem.calibration
    single = [(inputs[at : at + 1], targets[at : at + 1]) for at in range(8)]
    mine = replace(problem, model=model.eval(), calibration=single)
    graph = trace(mine.model, mine.example_inputs)
    check_trainable(mine, graph)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        check_trainable(replace(mine, calibration=single[:1]), graph)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (True, "^the network cannot be trained: in training mode it raises TypeError: "),
        (False, "^the pruned network cannot be trained: in training mode it raises RuntimeError"),
    ],
)
def test_code_that_runs_in_training_alone_is_refused_before_long_work(
    problem: Problem, tmp_path: Path, returned: bool, message: str
) -> None:
    model = OnlyInTraining(returned).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mine = replace(problem, model=model)
    told: list[str] = []

    def progress(step: str, *_counts: int) -> None:
        told.append(step)

    training = Finetuning(never, epochs=1)
    with pytest.raises(ValueError, match=message):
        search(mine, 0.5, 1, workers=0, finetuning=training, run_dir=tmp_path, progress=progress)
    assert told == ["tracing the network"]
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert search(mine, 0.5, 1, workers=0).best is not None  # without training it is no obstacle
