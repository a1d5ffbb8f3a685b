"""A search without a network, and a small network without training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from paretoprune.search import Candidate, Problem, Record
from paretoprune.search.objectives import directions_of
from paretoprune.search.searcher import Decisions, Searcher
from paretoprune.search.space import Suggester
from paretoprune.search.study import Study
from paretoprune.surgery import Cost, InfeasibleBudget, PruningPlan


@dataclass
class Analytic:
    """Three groups of 16 units; loss falls and MACs rise with the units that are kept.

    Attributes:
        evaluated: Every plan that was evaluated, in order.
        failing: Which plans fail.
        infeasible: Which candidates have no plan.
    """

    units: int = 16
    evaluated: list[PruningPlan] = field(default_factory=list)
    failing: Callable[[PruningPlan], bool] = lambda plan: False
    infeasible: Callable[[Candidate], bool] = lambda candidate: False
    names: tuple[str, ...] = ("a", "b", "c")

    def suggest(self, trial: Suggester) -> Candidate:
        shares = {name: trial.suggest_float(f"offset/{name}", 0, 1) for name in self.names}
        return Candidate("l2", 1.0, offsets=shares)

    def decode(self, candidate: Candidate) -> tuple[PruningPlan, Cost]:
        if self.infeasible(candidate):
            raise InfeasibleBudget("no plan has 0 MACs")
        plan = PruningPlan(
            {
                name: tuple(range(max(1, round(share * self.units))))
                for name, share in candidate.offsets.items()
            }
        )
        return plan, self.cost(plan)

    def cost(self, plan: PruningPlan) -> Cost:
        a, b, c = (len(plan.kept[name]) for name in self.names)
        return Cost(macs=a * b + b * c, params=a + b + c)

    @property
    def decisions(self) -> Decisions:
        return Decisions(self.suggest, self.decode)

    def seeds(self) -> list[dict[str, float]]:
        return [{f"offset/{name}": share for name in self.names} for share in (1.0, 0.5)]

    def __call__(self, plan: PruningPlan, seed: int) -> dict[str, float]:
        self.evaluated.append(plan)
        if self.failing(plan):
            raise RuntimeError("made to fail\nsecond line")
        gone = [1 - len(plan.kept[name]) / self.units for name in self.names]
        loss = gone[0] ** 2 + 2 * gone[1] ** 2 + 3 * gone[2] ** 2
        cost = self.cost(plan)
        return {"loss": loss, "macs": cost.macs, "params": cost.params}


@pytest.fixture
def analytic() -> Analytic:
    """A new analytic problem."""
    return Analytic()


LIMIT = 512


@pytest.fixture
def open_study(tmp_path: Path) -> Callable[..., Study]:
    """Opens the study of a run folder."""

    def open_it(
        storage: Path | str = tmp_path / "journal.log",
        *,
        sampler: str = "tpe",
        seed: int = 0,
        trials: int = 30,
        objectives: tuple[str, ...] = ("loss", "macs"),
    ) -> Study:
        return Study(storage, directions_of(objectives), sampler=sampler, seed=seed, trials=trials)

    return open_it


def ignore(record: Record) -> None:
    """A listener that does nothing."""


@pytest.fixture
def searcher_of() -> Callable[..., Searcher]:
    """Returns a searcher of a study on an analytic problem."""

    def make(
        study: Study,
        analytic: Analytic,
        trials: int,
        finished: Callable[[Record], None] = ignore,
    ) -> Searcher:
        study.begin(analytic.seeds(), LIMIT)
        return Searcher(study, analytic.decisions, trials, 0, finished)

    return make


class Residual(nn.Module):
    """A block that can be removed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.bn1(self.conv1(inputs)))
        return torch.relu(inputs + self.bn2(self.conv2(hidden)))


def network() -> nn.Sequential:
    """Returns an untrained residual network of two stages for 8x8 images in 4 classes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        Residual(24),
        Residual(24),
        nn.Conv2d(24, 40, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(40),
        nn.ReLU(),
        Residual(40),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(40, 4),
    ).eval()


@pytest.fixture
def problem() -> Problem:
    """An untrained network on noise: everything works, nothing is learned."""
    model = network()
    inputs = torch.randn(48, 1, 8, 8)
    targets = torch.arange(48) % 4
    batches = [(inputs[:24], targets[:24]), (inputs[24:], targets[24:])]
    return Problem(model, inputs[:2], batches[:1], batches[1:], name="noise")
