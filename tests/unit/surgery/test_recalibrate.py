"""recalibrate sets BatchNorm statistics to those of the calibration batches, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paretoprune.surgery import prune, recalibrate
from tests.unit.surgery.oracles import half, outputs, same, state
from tests.unit.surgery.specimens import ZOO, traced


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(2 * torch.randn(8, 3, 8, 8) + 1, torch.zeros(8)) for _ in range(count)]


def average(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the mean over batches of the means and of the unbiased variances of channels."""
    means = torch.stack([value.mean((0, 2, 3)) for value in values]).mean(0)
    variances = torch.stack([value.var((0, 2, 3)) for value in values]).mean(0)
    return means, variances


def test_statistics_are_averages_over_batches() -> None:
    model: Any = ZOO["chain"].network()
    data = batches()
    result: Any = recalibrate(model, data)
    with torch.no_grad():
        first = [model[0][0](x) for x, _ in data]
        means, variances = average(first)
        torch.testing.assert_close(result[0][1].running_mean, means)
        torch.testing.assert_close(result[0][1].running_var, variances)
        model.train()
        second = [model[3][0](model[:3](x)) for x, _ in data]
    torch.testing.assert_close(result[3][1].running_mean, average(second)[0])
    torch.testing.assert_close(result[3][1].running_var, average(second)[1])


@pytest.mark.parametrize("training", [True, False])
def test_everything_else_stays(training: bool) -> None:
    model: Any = ZOO["chain"].network().train(training)
    model[0][1].eval()
    model[3][1].momentum = 0.3
    before = state(model)
    result: Any = recalibrate(model, batches())
    assert same(state(model), before)
    assert same(state(result)["modes"], before["modes"])
    assert (result[0][1].momentum, result[3][1].momentum) == (0.1, 0.3)
    for a, b in zip(result.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_dropout_stays_off() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3)).train()
    data = batches(1)
    result: Any = recalibrate(model, data)
    torch.testing.assert_close(result[1].running_mean, average([data[0][0]])[0])


def test_it_is_deterministic_and_forgets_the_old_statistics() -> None:
    model, data = ZOO["residual"].network(), batches()
    once = recalibrate(model, data)
    for a, b in zip(once.buffers(), recalibrate(once, data).buffers(), strict=True):
        assert torch.equal(a, b)


def test_a_pruned_network_and_named_inputs() -> None:
    model, graph = traced("named_inputs")
    small = prune(model, graph, half(graph))
    data = [(ZOO["named_inputs"].inputs(8), torch.zeros(8))]
    assert len(outputs(recalibrate(small, data), data[0][0])) == 1


def test_a_network_without_batch_norm_comes_back_unchanged() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.Flatten())
    result = recalibrate(model, batches(1))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(outputs(result, x)[0], outputs(model, x)[0])


def test_progress_counts_batches() -> None:
    steps: list[tuple[int, int]] = []
    recalibrate(ZOO["chain"].network(), batches(), progress=lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    steps.clear()
    recalibrate(ZOO["chain"].network(), iter(batches(2)), progress=lambda *s: steps.append(s))
    assert steps == [(1, 0), (2, 0)]


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="recalibration needs calibration data, but got no batch"):
        recalibrate(ZOO["chain"].network(), [])
