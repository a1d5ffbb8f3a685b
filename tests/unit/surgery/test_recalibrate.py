"""recalibrate sets BatchNorm statistics to those of the calibration batches, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paretoprune.surgery import prune, recalibrate, trace
from paretoprune.surgery.record import record
from paretoprune.surgery.recorded import Recorded
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


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.second, self.slow = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6, momentum=None)

    def forward(self, x: Tensor) -> Any:
        return self.slow(self.second(torch.relu(self.norm(self.conv(x)))))


def recorded() -> tuple[nn.Module, nn.Module]:
    """Returns a network, and one of the same weights whose body is recorded."""
    torch.manual_seed(0)
    layers = [Body(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)]
    model, inputs = nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8)
    recording = record(model, trace(model, inputs), ["0"], inputs)["0"]
    other = copy.deepcopy(model)
    other[0] = Recorded(other[0], recording)
    return model, other


def test_norms_inside_a_recorded_module_are_recalibrated_like_all_others() -> None:
    model, other = recorded()
    data = batches()
    expected, result = recalibrate(model, data), recalibrate(other, data)
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(result.get_buffer(name), buffer)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_recorded_module_trains_its_norms_as_its_code_would(frozen: bool) -> None:
    for network in (networks := recorded()):
        network.train()
        network.get_submodule("0.norm").train(not frozen)
        torch.manual_seed(1)
        for inputs, _ in batches(2):
            network(inputs)
    for name, buffer in networks[0].named_buffers():
        torch.testing.assert_close(networks[1].get_buffer(name), buffer)


class Auxiliary(nn.Module):
    """A head that runs in training alone, and a norm that counts no batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.instance = nn.InstanceNorm2d(3, track_running_stats=True)

    def forward(self, x: Tensor) -> Any:
        x = self.instance(self.norm(x))
        return (x, self.head(x)) if self.training else x


def test_statistics_that_no_batch_reaches_stay() -> None:
    model, data = Auxiliary(), batches()
    model(data[0][0])
    before = copy.deepcopy(model)
    result: Any = recalibrate(model, data)
    assert int(result.norm.num_batches_tracked) == len(data)
    for name in ("head", "instance"):
        for a, b in zip(
            result.get_submodule(name).buffers(),
            before.get_submodule(name).buffers(),
            strict=True,
        ):
            assert torch.equal(a, b)


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
