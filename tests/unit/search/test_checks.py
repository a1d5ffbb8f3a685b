"""What is wrong is said before long work, with the options."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretoprune.criteria import CRITERIA
from paretoprune.search import Finetuning, Problem, search
from paretoprune.search.checks import criteria_by_name
from paretoprune.search.objectives import chance_loss, objectives_of
from paretoprune.surgery import Cost

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
