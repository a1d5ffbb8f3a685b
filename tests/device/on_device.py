"""Runs everything that touches tensors on the emulated device; prints what failed, as JSON.

A process of its own, because the device stays registered in it.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from paretoprune.criteria import CRITERIA, SharedCalibration, select
from paretoprune.criteria.receding import Receding, recede
from paretoprune.experiments.data.splits import Batches, TrainingBatches
from paretoprune.experiments.finetuning import FINETUNING
from paretoprune.experiments.measuring.robustness import images_of, robustness
from paretoprune.experiments.models import digits_resnet
from paretoprune.experiments.recipes import build_problem
from paretoprune.experiments.training import train
from paretoprune.search import evaluate
from paretoprune.search.evaluation import Moved
from paretoprune.search.metrics import to_device
from paretoprune.search.objectives import chance_loss
from paretoprune.surgery import Reconstructor, prune, recalibrate, trace

sys.path.insert(0, str(Path(__file__).parent))
from emulated import DEVICE  # type: ignore[import-not-found]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "untrained.safetensors"
        save_file(digits_resnet().state_dict(), file)
        problem = build_problem("digits", weights=str(file))
    inputs, targets = next(iter(problem.calibration))
    problem = replace(problem, calibration=[(inputs[:64], targets[:64])])
    model = copy.deepcopy(problem.model).to(DEVICE)
    graph = trace(problem.model, problem.example_inputs)
    calibration = Moved(problem.calibration, DEVICE)
    plan = select(graph, CRITERIA["l2"]()(problem.model, graph, []), budget=0.5)

    def traced() -> None:
        there = trace(model, to_device(problem.example_inputs, DEVICE))
        assert there.groups == graph.groups

    def measured(name: str) -> None:
        found = CRITERIA[name]()(model, graph, calibration)
        expected = CRITERIA[name]()(problem.model, graph, problem.calibration)
        assert found.keys() == expected.keys()
        for group, values in expected.items():
            torch.testing.assert_close(found[group].cpu(), values, rtol=1e-3, atol=1e-6)

    def same(own: torch.nn.Module, other: torch.nn.Module) -> None:
        for name, value in other.state_dict().items():
            here = own.state_dict()[name]
            assert here.device == DEVICE
            torch.testing.assert_close(here.cpu(), value, rtol=1e-4, atol=1e-5)

    def recovered(kind: Callable[[Any, Any, Any], Any]) -> None:
        own = kind(model, prune(model, graph, plan), calibration)
        same(own, kind(problem.model, prune(problem.model, graph, plan), problem.calibration))

    def trained() -> None:
        data = problem.training
        assert isinstance(data, TrainingBatches)
        settings = replace(FINETUNING, distillation=0.7, mixup=0.4, average=0.9)
        small = prune(model, graph, plan)
        network = train(small, data.on(DEVICE), settings, teacher=model)
        assert next(network.parameters()).device == DEVICE
        losses = [
            evaluate(one, problem.validation, problem.loss)["loss"] for one in (small, network)
        ]
        assert losses[1] < losses[0]

    def robust() -> None:
        assert problem.test is not None
        source, indices, size = images_of(problem.test())
        some = Batches(source, indices[:64], size)
        found, expected = (robustness(one, some) for one in (model, problem.model))
        assert found == pytest.approx(expected, abs=0.01)

    def lossy() -> None:
        """A loss may hold tensors, which are where it was made."""
        mine = torch.nn.CrossEntropyLoss(weight=torch.linspace(0.5, 1.5, 10))
        batches = list(problem.calibration)

        def numbers(one: torch.nn.Module, data: Any) -> list[float]:
            shared = SharedCalibration(data, mine)
            scores = [CRITERIA[name]()(one, graph, shared) for name in ("taylor", "sosp_i")]
            sums = [float(values.sum()) for score in scores for values in score.values()]
            chance = chance_loss(one, batches[0], mine)
            return [evaluate(one, batches, mine)["loss"], chance, *sums]

        expected = numbers(problem.model, batches)
        assert numbers(model, calibration) == pytest.approx(expected, rel=1e-3)
        there = [(inputs.to(DEVICE), targets.to(DEVICE)) for inputs, targets in batches]
        settings = replace(FINETUNING, epochs=1)
        assert next(train(model, there, settings, loss=mine).parameters()).device == DEVICE
        recede(model, there, mine, Receding(epochs=1))

    checks: dict[str, Callable[[], Any]] = {
        "trace": traced,
        **{name: lambda name=name: measured(name) for name in CRITERIA},  # type: ignore[misc]
        "prune": lambda: same(prune(model, graph, plan), prune(problem.model, graph, plan)),
        "reconstruct": lambda: recovered(
            lambda dense, small, data: Reconstructor(dense, graph, data)(small, plan)
        ),
        "recalibrate": lambda: recovered(lambda dense, small, data: recalibrate(small, data)),
        "robustness": robust,
        "train": trained,
        "loss": lossy,
    }
    failures = {}
    for name in sys.argv[1:]:
        try:
            checks[name]()
        except Exception:
            failures[name] = traceback.format_exc()
    print(json.dumps(failures))


if __name__ == "__main__":
    main()
