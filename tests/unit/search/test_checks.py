"""What is wrong is said before long work, with the options."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from paretoprune.criteria import CRITERIA
from paretoprune.search import Finetuning, Metric, Problem, search
from paretoprune.search.checks import criteria_by_name
from paretoprune.search.fit import check_problem, check_trainable
from paretoprune.search.objectives import chance_loss, objectives_of
from paretoprune.surgery import Cost, trace

DENSE = Cost(macs=100, params=10)


def never(network: nn.Module, **_settings: Any) -> nn.Module:
    """A trainer that is not called."""
    raise AssertionError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flops": 0.0}, r"flops as a fraction lies in \(0, 1\], but got 0\.0"),
        ({"flops": 1.5}, r"flops as a fraction lies in \(0, 1\], but got 1\.5"),
        ({"flops": 0}, "flops in MACs must be at least 1, but got 0"),
        ({"flops": True}, r"flops is a fraction \(float\) or MACs \(int\), but got True"),
        ({"flops": "50%"}, "but got '50%'"),
        ({"trials": 0}, "trials must be a whole number of at least 1, but got 0"),
        ({"trials": 1.5}, r"trials must be a whole number of at least 1, but got 1\.5"),
        (
            {"trials": 1, "strategy": "everything"},
            "trials must be a whole number of at least 2, but got 1",
        ),
        ({"seed": -1}, "seed must be a whole number of at least 0, but got -1"),
        ({"workers": -1}, "workers must be a whole number of at least 0, but got -1"),
        ({"gpus_per_trial": -0.1}, r"below 1 or a whole number, but got -0\.1"),
        ({"gpus_per_trial": 1.5}, r"below 1 or a whole number, but got 1\.5"),
        ({"gpus_per_trial": 0.25}, r"gpus_per_trial is 0\.25, but workers is 0"),
        ({"trial_timeout": 0.0}, r"trial_timeout is seconds above 0, but got 0\.0"),
        ({"trial_timeout": float("nan")}, "trial_timeout is seconds above 0, but got nan"),
        ({"trial_timeout": 9.0}, "trial_timeout is 9 s, but workers is 0: an evaluation in this"),
        ({"criteria": ("l3",)}, "unknown criterion 'l3'; available: l1, l2, "),
        ({"criteria": ()}, "a search needs a criterion; available: l1, "),
        ({"criteria": "l2"}, "a sequence of names, but got the string 'l2'"),
        (
            {"sampler": "tps"},
            "unknown sampler 'tps'; available: damage, tpe, nsga2, nsga3, gp, random",
        ),
        (
            {"sampler": "tpe", "strategy": "everything"},
            "the strategy everything decides without a sampler, but got 'tpe'",
        ),
        (
            {"finetuning": Finetuning(never, epochs=1, recovery=2)},
            "recovery trains the candidates of the strategy everything alone, but got 2 epochs",
        ),
        ({"objectives": ("loss", "flops")}, "unknown objective 'flops'; available: loss, "),
        ({"objectives": ("loss",)}, r"two or more different objectives, but got \['loss'\]"),
        ({"objectives": ("loss", "loss")}, "two or more different objectives"),
        (
            {"granularity": "layer"},
            "unknown granularity 'layer'; available: group, stage, uniform",
        ),
    ],
)
def test_arguments_are_checked_first(
    problem: Problem, arguments: dict[str, Any], message: str
) -> None:
    values: dict[str, Any] = {"flops": 0.5, "trials": 2, "workers": 0, **arguments}
    with pytest.raises(ValueError, match=message):
        search(problem, **values)


def once(problem: Problem) -> Any:
    return iter(list(problem.validation))


@pytest.mark.parametrize(
    ("split", "make", "message"),
    [
        ("calibration", lambda p: [], r"problem\.calibration must have at least one batch"),
        ("validation", once, r"problem\.validation is read many times"),
        (
            "calibration",
            lambda p: [(torch.zeros(2), {"boxes": torch.zeros(2)})],
            r"with targets a tensor, but got \(Tensor, dict\)",
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


def test_checks_leave_the_model_in_its_mode(problem: Problem) -> None:
    problem.model.train()
    check_problem(problem)
    assert all(module.training for module in problem.model.modules())


def test_criteria_come_by_name_or_as_objects() -> None:
    assert criteria_by_name(["l2", "l1"]) == {"l2": CRITERIA["l2"](), "l1": CRITERIA["l1"]()}
    mine = {"mine": CRITERIA["l1"]()}
    assert criteria_by_name(mine) == mine


def test_references_of_objectives(problem: Problem) -> None:
    batch = next(iter(problem.validation))
    chance = chance_loss(problem.model, batch, problem.loss)
    assert chance == pytest.approx(torch.log(torch.tensor(4.0)).item())
    names = ("loss", "accuracy", "macs", "params")
    objectives = objectives_of(names, DENSE, {"loss": 0.1, "accuracy": 0.9}, chance)
    assert [o.reference for o in objectives] == [chance, 0.0, 100.0, 10.0]
    assert [o.direction.value for o in objectives] == [
        "minimize",
        "maximize",
        "minimize",
        "minimize",
    ]


class Heads(NamedTuple):
    """What a network with two heads returns."""

    logits: Tensor
    more: dict[str, Tensor]


def test_the_level_of_chance_of_a_network_with_several_outputs() -> None:
    class TwoHeads(nn.Linear):
        def forward(self, input: Tensor) -> Heads:  # type: ignore[override]
            logits = super().forward(input)
            return Heads(logits, {"doubled": 2 * logits})

    def loss(outputs: Heads, targets: Tensor) -> Tensor:
        first = F.cross_entropy(outputs.logits, targets)
        return first + F.cross_entropy(outputs.more["doubled"], targets)

    batch = torch.randn(6, 3), torch.arange(6) % 4
    assert chance_loss(TwoHeads(3, 4), batch, loss) == pytest.approx(2 * math.log(4))


@pytest.mark.parametrize("chance", [float("nan"), float("inf"), 0.5])
def test_a_loss_without_a_level_of_chance_counts_from_above_the_dense_loss(chance: float) -> None:
    (loss,) = objectives_of(("loss",), DENSE, {"loss": 3.0}, chance)
    assert loss.reference == 7.0


def test_an_objective_that_is_not_measured() -> None:
    with pytest.raises(ValueError, match=r"'accuracy' is not measured .*; measured: loss, macs"):
        objectives_of(("accuracy", "macs"), DENSE, {"loss": 1.0}, 2.0)


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
