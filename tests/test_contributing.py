"""The example of CONTRIBUTING.md works as it stands there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from paretoprune.criteria import select
from paretoprune.experiments.models import digits_resnet
from paretoprune.surgery import trace

GUIDE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


def test_the_criterion_in_15_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    (tmp_path / "l3.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = digits_resnet().eval()
    graph = trace(model, torch.zeros(2, 1, 8, 8))
    saliency = importlib.import_module("l3").L3()(model, graph, [])
    plan = select(graph, saliency, budget=0.5)
    assert graph.cost(plan).macs <= 0.5 * graph.cost().macs
