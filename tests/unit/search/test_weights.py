"""Weights of a plan come back bit for bit, and those of another network are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from paretoprune.search.weights import FINETUNED, Weights
from paretoprune.surgery import PruningPlan, prune, trace
from tests.unit.versioned import Versioned

PLAN = PruningPlan({"0": (0, 2, 5)})


def test_weights_come_back_beside_a_state_that_is_no_tensor(tmp_path: Path) -> None:
    model = Versioned(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    graph = trace(model, torch.zeros(2, 4))
    trained = prune(model, graph, PLAN)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    weights = Weights.of_run(tmp_path)
    weights.write(trained, PLAN, FINETUNED)
    inputs = torch.randn(5, 4)
    assert torch.equal(weights.network(model, graph, PLAN, FINETUNED)(inputs), trained(inputs))


@pytest.mark.parametrize("odd", [{}, {"0.weight": torch.zeros(3, 4), "9.bias": torch.zeros(1)}])
def test_weights_of_another_network_are_refused(
    tmp_path: Path, odd: dict[str, torch.Tensor]
) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    graph = trace(model, torch.zeros(2, 4))
    weights = Weights.of_run(tmp_path)
    weights.write(prune(model, graph, PLAN), PLAN, FINETUNED)
    save_file(odd, weights.file(PLAN, FINETUNED))
    with pytest.raises(ValueError, match=r"does not fit Sequential: tensor '0\.\w+' is in one of"):
        weights.network(model, graph, PLAN, FINETUNED)
