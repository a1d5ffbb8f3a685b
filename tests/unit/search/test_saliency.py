"""Saliencies are measured once for the same weights, data, loss and settings, and never else."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretoprune.criteria import CRITERIA, CostClass, SharedCalibration, select
from paretoprune.criteria.taylor import Taylor
from paretoprune.search import Problem, SearchSpace
from paretoprune.search.saliency import Scores, blocks_by_damage, saliencies
from paretoprune.surgery import PruningGraph, PruningPlan, prune, trace

calls: list[str] = []


@dataclass(frozen=True)
class Counting:
    """Random saliencies that count their measurements."""

    seed: int = 0
    summary: ClassVar[str] = "counts"
    paper: ClassVar[str] = "none"
    cost: ClassVar[CostClass] = CostClass.WEIGHTS

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Any
    ) -> Mapping[str, Tensor]:
        calls.append(f"random {self.seed}")
        return CRITERIA["random"]()(model, graph, calibration)


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


class Setting:
    """A problem whose parts can be changed one at a time."""

    def __init__(self, problem: Problem, folder: Path) -> None:
        self.model = problem.model
        self.graph = trace(problem.model, problem.example_inputs)
        self.batches = list(problem.calibration)
        self.loss: Any = F.cross_entropy
        self.criteria: dict[str, Any] = {"mine": Counting()}
        self.folder = folder

    def scores(self) -> Scores:
        data = SharedCalibration(self.batches, self.loss)
        return saliencies(self.criteria, self.model, self.graph, data, self.folder)


@pytest.fixture
def setting(problem: Problem, tmp_path: Path) -> Setting:
    return Setting(problem, tmp_path)


def test_another_search_finds_them_with_blocks(setting: Setting) -> None:
    first = setting.scores()
    setting.model = copy.deepcopy(setting.model)
    setting.batches = [(inputs.clone(), targets) for inputs, targets in setting.batches]
    second = setting.scores()
    assert len(calls) == 1
    for group in setting.graph.open_groups:
        assert torch.equal(first.units["mine"][group.name], second.units["mine"][group.name])
    assert first.blocks == second.blocks
    assert set(first.blocks["mine"]) == set(setting.graph.blocks)


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, F.one_hot(targets, 4).float())


def weights(setting: Setting) -> None:
    setting.model = copy.deepcopy(setting.model)
    next(setting.model.parameters()).detach().view(-1)[0] += 1e-6


def statistics(setting: Setting) -> None:
    setting.model = copy.deepcopy(setting.model)
    next(setting.model.buffers()).view(-1)[0] += 1e-6


def data(setting: Setting) -> None:
    setting.batches = [(inputs * 1.001, targets) for inputs, targets in setting.batches]


def targets(setting: Setting) -> None:
    setting.batches = [(inputs, targets.flip(0)) for inputs, targets in setting.batches]


def loss(setting: Setting) -> None:
    setting.loss = mse


def smoothing(setting: Setting) -> None:
    setting.loss = nn.CrossEntropyLoss(label_smoothing=0.2)


def importance(setting: Setting) -> None:
    setting.loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 1.0, 1.0]))


def bound(scale: float) -> Any:
    def scaled(outputs: Tensor, targets: Tensor) -> Tensor:
        return scale * F.cross_entropy(outputs, targets)

    return scaled


def closure(setting: Setting) -> None:
    setting.loss = bound(2.0)


def settings(setting: Setting) -> None:
    setting.criteria = {"mine": Counting(seed=1)}


@pytest.mark.parametrize(
    ("change", "before"),
    [
        (weights, F.cross_entropy),
        (statistics, F.cross_entropy),
        (data, F.cross_entropy),
        (targets, F.cross_entropy),
        (settings, F.cross_entropy),
        (loss, F.cross_entropy),
        (smoothing, nn.CrossEntropyLoss()),
        (importance, nn.CrossEntropyLoss()),
        (closure, bound(1.0)),
    ],
)
def test_anything_else_is_measured_anew(setting: Setting, change: Any, before: Any) -> None:
    setting.loss = before
    setting.scores()
    setting.scores()
    assert len(calls) == 1
    change(setting)
    setting.scores()
    assert len(calls) == 2


def test_a_broken_file_is_measured_anew(setting: Setting) -> None:
    setting.scores()
    (file,) = setting.folder.glob("mine-*.safetensors")
    file.write_bytes(b"half a file")
    setting.scores()
    assert len(calls) == 2


def test_only_what_is_missing_is_measured_and_the_dearest_first(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting.scores()
    setting.criteria |= {"taylor": Taylor(), "sosp_h": CRITERIA["sosp_h"]()}
    passes: list[bool] = []
    measure = SharedCalibration.statistics

    def counted(self: SharedCalibration, *args: Any, **kwargs: Any) -> Any:
        passes.append("curvature" in self._known)
        return measure(self, *args, **kwargs)

    monkeypatch.setattr(SharedCalibration, "statistics", counted)
    scores = setting.scores()
    assert len(calls) == 1
    assert passes == [False, True]  # taylor finds what sosp_h measured
    assert list(scores.units) == ["mine", "taylor", "sosp_h"]


def test_a_joint_allocation_is_the_criterions_ranking_of_units_and_blocks(
    setting: Setting,
) -> None:
    setting.criteria = {"taylor": Taylor()}
    scores = setting.scores()
    blocks = {"taylor": dict.fromkeys(setting.graph.blocks, -1.0)}
    target = setting.graph.cost().macs // 2
    names = list(setting.graph.blocks)
    space = SearchSpace.of(setting.graph, scores.units, target, names, blocks)
    (joint,) = [s for s in space.seeds(300) if s["allocation"] == "joint" and s["budget"] == 1.0]

    class Fixed:
        def suggest_float(self, name: str, low: float, high: float) -> float:
            return float(joint[name])

        def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
            return int(joint[name])

        def suggest_categorical(self, name: str, choices: Any) -> Any:
            assert joint[name] in choices
            return joint[name]

    plan = space.decode(space.suggest(Fixed()), setting.graph, scores.units)
    assert plan.removed
    assert plan == select(
        setting.graph, scores.units["taylor"], budget=target, blocks=blocks["taylor"]
    )
    assert "joint" not in SearchSpace.of(setting.graph, scores.units, target, names).allocations


def test_progress_counts_every_batch_and_every_unit(problem: Problem, tmp_path: Path) -> None:
    setting = Setting(problem, tmp_path)
    said: list[tuple[str, int, int]] = []
    chosen = {name: CRITERIA[name]() for name in ("taylor", "cka")}
    shared = SharedCalibration(setting.batches)
    saliencies(
        chosen, setting.model, setting.graph, shared, tmp_path, lambda *step: said.append(step)
    )
    total = len(setting.batches)
    reading = [(done, whole) for what, done, whole in said if what == "reading calibration data"]
    assert reading == [(done, 0) for done in range(1, total + 1)]  # its first pass counts them
    assert ("saliencies of taylor", total, total) in said
    parts = sum(group.size for group in setting.graph.open_groups) + len(setting.graph.blocks)
    ablated = [done for what, done, whole in said if what.endswith("cka") and whole == parts]
    assert ablated == list(range(1, parts + 1))


def test_a_criterion_that_leaves_a_group_out_is_named(setting: Setting) -> None:
    class Forgetful(Counting):
        def __call__(self, *given: Any) -> Any:
            return dict(list(super().__call__(*given).items())[1:])

    setting.criteria = {"mine": Forgetful()}
    with pytest.raises(ValueError, match=r"every group .* Forgetful returned nothing for '"):
        setting.scores()


def test_a_criterion_written_at_a_prompt_is_measured_and_told_apart(setting: Setting) -> None:
    def typed(factor: float) -> Any:
        code = f"""
class Typed:
    def __call__(self, model, graph, calibration):
        return {{g.name: {factor} * torch.arange(g.size) for g in graph.groups.values()}}
    def __repr__(self):
        return "Typed()"
"""
        names: dict[str, Any] = {"torch": torch, "__name__": "typed_at_a_prompt"}
        exec(code, names)
        return names["Typed"]()

    group = setting.graph.open_groups[0]
    for factor in (1.0, 2.0):
        setting.criteria = {"mine": typed(factor)}
        expected = factor * torch.arange(group.size)
        assert torch.equal(setting.scores().units["mine"][group.name], expected)


@pytest.mark.parametrize("broken", [False, True])
def test_blocks_are_ordered_by_the_loss_that_a_saved_mac_costs(
    setting: Setting, broken: bool
) -> None:
    model, graph = setting.model, setting.graph
    worst = next(iter(graph.blocks))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        value = F.cross_entropy(outputs, targets)
        return value * math.nan if broken and torch.equal(outputs, gone) else value

    (inputs, targets), *_ = setting.batches
    costs = {}
    with torch.no_grad():
        before = F.cross_entropy(model(inputs), targets)
        for block in graph.blocks:
            plan = PruningPlan(removed=(block,))
            outputs = prune(model, graph, plan)(inputs)
            saved = graph.cost().macs - graph.cost(plan).macs
            costs[block] = float(F.cross_entropy(outputs, targets) - before) / saved
        gone = prune(model, graph, PruningPlan(removed=(worst,)))(inputs)
    found = blocks_by_damage(model, graph, [(inputs, targets)], loss)
    expected = sorted(costs, key=lambda block: costs[block])
    if broken:
        expected = [*(block for block in expected if block != worst), worst]
    assert list(found) == expected


def test_another_version_of_a_criterion_measures_anew(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, found = setting.folder / "counting.py", inspect.getfile
    monkeypatch.setattr(inspect, "getfile", lambda it: str(code) if it is Counting else found(it))
    for version, measured in (("one", 1), ("one", 1), ("two", 2)):
        code.write_text(version)
        setting.scores()
        assert len(calls) == measured
