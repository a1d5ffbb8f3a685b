"""Each criterion against its formula, written out unit by unit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretoprune.criteria import CRITERIA, CostClass, SharedCalibration
from paretoprune.surgery import ChannelSlice, PrunableGroup, trace
from paretoprune.surgery.execute import Execution
from tests.unit.surgery.specimen import draw
from tests.unit.surgery.specimens import ZOO, traced

networks = pytest.mark.parametrize(
    "name", ["chain", "residual", "dense", "depthwise", "grouped", "mlp", "called_twice"]
)


def elements(tensors: Mapping[str, Tensor], item: ChannelSlice, unit: int) -> Tensor | None:
    """Returns the elements of a parameter that belong to a unit along one axis."""
    tensor = tensors.get(item.parameter)
    if tensor is None:
        return None
    return tensor.movedim(item.axis, 0)[list(item.indices[unit])]


def owned(model: nn.Module, group: PrunableGroup, unit: int) -> Iterator[tuple[str, Tensor]]:
    """Yields (parameter, elements of the unit) for every slice of the group."""
    parameters = dict(model.named_parameters())
    for item in group.slices:
        found = elements(parameters, item, unit)
        if found is not None:
            yield item.parameter, found.detach()


@networks
@pytest.mark.parametrize(
    ("criterion", "norm"),
    [
        ("l1", lambda weights: sum(w.abs().sum() for w in weights)),
        ("l2", lambda weights: sum(w.square().sum() for w in weights) ** 0.5),
    ],
)
def test_magnitudes_are_norms_of_all_coupled_weights_relative_to_their_mean(
    name: str, criterion: str, norm: Callable[[list[Tensor]], Tensor]
) -> None:
    model, graph = traced(name)
    saliency = CRITERIA[criterion]()(model, graph, [])
    dims = {key: parameter.ndim for key, parameter in model.named_parameters()}
    for group in graph.open_groups:
        norms = torch.stack(
            [
                norm([w for key, w in owned(model, group, unit) if dims[key] > 1])
                for unit in range(group.size)
            ]
        )
        torch.testing.assert_close(saliency[group.name], norms / norms.mean())


def test_bn_scale_is_the_mean_of_the_coupled_scales() -> None:
    model, graph = traced("residual")
    saliency = CRITERIA["bn_scale"]()(model, graph, [])
    scales = {key: p.detach().abs() for key, p in model.named_parameters()}
    torch.testing.assert_close(
        saliency["0.0"], (scales["0.1.weight"] + scales["2.conv2.1.weight"]) / 2
    )
    torch.testing.assert_close(saliency["2.conv1.0"], scales["2.conv1.1.weight"])


def test_bn_scale_prunes_groups_without_batch_norm_at_an_average_rate() -> None:
    model, graph = traced("two_inputs")  # `linear` has no BatchNorm, `conv.0` has one
    saliency = CRITERIA["bn_scale"]()(model, graph, [])
    known, other = saliency["conv.0"], saliency["linear"]
    assert known.min() <= other.min() < other.median() < other.max() <= known.max()
    norms = CRITERIA["l2"]()(model, graph, [])["linear"]
    assert torch.equal(other.argsort(), norms.argsort())


def test_bn_scale_of_a_network_without_batch_norm_follows_the_norms() -> None:
    model, graph = traced("attention")
    saliency, norms = (CRITERIA[name]()(model, graph, []) for name in ("bn_scale", "l2"))
    assert torch.equal(saliency["up"].argsort(), norms["up"].argsort())


def batches(name: str) -> list[tuple[Tensor, Tensor]]:
    return [(draw(ZOO[name].shape, 8), torch.randint(5, (8,))) for _ in range(3)]


@networks
def test_taylor_is_the_squared_first_order_change_summed_over_coupled_parameters(
    name: str,
) -> None:
    model, graph = traced(name)
    data = batches(name)
    saliency = CRITERIA["taylor"]()(model, graph, data)
    expected = {group.name: torch.zeros(group.size) for group in graph.open_groups}
    for inputs, targets in data:
        copied = copy.deepcopy(model)
        F.cross_entropy(copied(inputs), targets).backward()
        changes = {
            key: p.detach() * p.grad for key, p in copied.named_parameters() if p.grad is not None
        }
        for group in graph.open_groups:
            for item in group.slices:
                for unit in range(group.size):
                    change = elements(changes, item, unit)
                    if change is not None:
                        expected[group.name][unit] += change.sum().square() / len(data)
    for group in graph.open_groups:
        torch.testing.assert_close(
            saliency[group.name], expected[group.name], rtol=1e-3, atol=1e-8
        )


@pytest.mark.parametrize(
    "criterion", [name for name in CRITERIA if CRITERIA[name].cost > CostClass.WEIGHTS]
)
def test_criteria_that_need_data_say_so(criterion: str) -> None:
    model, graph = traced("mlp")
    with pytest.raises(ValueError, match=r"criterion needs calibration data, but got no batch"):
        CRITERIA[criterion]()(model, graph, [])


def test_a_loss_without_gradient_is_refused_in_one_sentence() -> None:
    model, graph = traced("mlp")
    wrong = lambda outputs, targets: (outputs.argmax(1) != targets).float().mean()  # noqa: E731
    data = SharedCalibration([(ZOO["mlp"].inputs(4), torch.zeros(4).long())], wrong)
    with pytest.raises(ValueError, match="need a loss that has one"):
        CRITERIA["taylor"]()(model, graph, data)


def test_random_depends_on_its_seed_alone() -> None:
    model, graph = traced("residual")
    kind = CRITERIA["random"]
    first, again, other = (kind(**{"seed": seed})(model, graph, []) for seed in (1, 1, 2))
    for group in first:
        assert torch.equal(first[group], again[group])
        assert not torch.equal(first[group], other[group])


def test_a_network_without_open_groups_has_no_saliencies() -> None:
    model = nn.Linear(3, 4)
    graph = trace(model, torch.randn(2, 3))
    data = [(torch.randn(4, 3), torch.randint(4, (4,)))]
    for kind in CRITERIA.values():
        assert kind()(model, graph, data) == {}


def test_fisher_is_the_scaled_square_of_batch_gradients_over_all_coupled_weights() -> None:
    model, graph = traced("residual")
    data = [*batches("residual"), (draw(ZOO["residual"].shape, 3), torch.tensor([0, 1, 2]))]
    saliency = CRITERIA["fisher"]()(model, graph, data)
    expected = {group.name: torch.zeros(group.size) for group in graph.open_groups}
    for inputs, targets in data:
        copied = copy.deepcopy(model)
        F.cross_entropy(copied(inputs), targets).backward()
        changes = {
            key: p.detach() * p.grad for key, p in copied.named_parameters() if p.grad is not None
        }
        for group in graph.open_groups:
            for item in group.slices:
                for unit in range(group.size):
                    change = elements(changes, item, unit)
                    if change is not None:
                        squares = change.square().sum() * len(targets)
                        expected[group.name][unit] += squares / (2 * len(data))
    for group in graph.open_groups:
        torch.testing.assert_close(
            saliency[group.name], expected[group.name], rtol=1e-3, atol=1e-8
        )


def test_lamp_divides_by_all_that_is_at_least_as_large() -> None:
    model, graph = traced("residual")
    saliency = CRITERIA["lamp"]()(model, graph, [])
    for group in graph.open_groups:
        squares = torch.stack(
            [
                torch.stack([w.square().sum() for _, w in owned(model, group, u) if w.ndim > 1])
                .sum()
                for u in range(group.size)
            ]
        )  # fmt: skip
        expected = torch.stack([s / squares[squares >= s].sum() for s in squares])
        torch.testing.assert_close(saliency[group.name], expected)
        assert saliency[group.name].max() == 1


def test_lamp_of_equal_units_is_equal() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    graph = trace(model, torch.randn(2, 3))
    assert torch.equal(CRITERIA["lamp"]()(model, graph, [])["0"], torch.full((4,), 0.25))


def test_geometric_median_sums_distances_of_concatenated_filters() -> None:
    model, graph = traced("residual")
    saliency = CRITERIA["geometric_median"]()(model, graph, [])
    weights = dict(model.named_parameters())
    filters = torch.cat(
        [weights[name].detach().flatten(1) for name in ("0.0.weight", "2.conv2.0.weight")], 1
    )
    sums = torch.stack([torch.stack([(a - b).norm() for b in filters]).sum() for a in filters])
    torch.testing.assert_close(saliency["0.0"], sums / sums.mean())


def test_geometric_median_of_a_duplicate_is_the_lowest() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    for parameter in model[0].parameters():
        parameter.detach()[1] = parameter.detach()[0] = parameter.detach().mean(0)
    graph = trace(model, torch.randn(2, 3))
    assert CRITERIA["geometric_median"]()(model, graph, [])["0"].argsort()[:2].sum() == 1


def test_mean_activation_is_what_the_readers_receive() -> None:
    model, graph = traced("residual")
    data = [*batches("residual"), (draw(ZOO["residual"].shape, 3), torch.tensor([0, 1, 2]))]
    saliency = CRITERIA["mean_activation"]()(model, graph, data)
    received: list[Tensor] = []
    layer = model.get_submodule("2.conv2.0")
    hook = layer.register_forward_pre_hook(lambda _, args: received.append(args[0].detach()))
    for inputs, _ in data:
        model(inputs)
    hook.remove()
    expected = torch.cat(received).abs().mean((0, 2, 3))
    torch.testing.assert_close(saliency["2.conv1.0"], expected / expected.mean())


def test_mean_activation_counts_negative_values_as_well() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    inputs = torch.randn(50, 4)
    graph = trace(model, inputs[:2])
    saliency = CRITERIA["mean_activation"]()(model, graph, [(inputs, torch.zeros(50))])
    expected = model[:2](inputs).detach().abs().mean(0)
    torch.testing.assert_close(saliency["0"], expected / expected.mean())


class Timed(nn.Module):
    """Takes a number first, and returns one tensor by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 6, 3), nn.Linear(6, 4)

    def forward(self, time: Tensor, x: Tensor) -> dict[str, Tensor]:
        y = time * self.head(torch.relu(self.conv(x)).mean((2, 3)))
        return {"out": y, "last": y}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(x)[0][:, -1])
        return out


@pytest.mark.parametrize("name", ["taylor", "sosp_h", "sosp_i"])
@pytest.mark.parametrize("recurrent", [True, False])
def test_recurrent_layers_are_kept_from_cudnn(name: str, recurrent: bool) -> None:
    """It has their gradients in training mode alone, and no second ones."""
    torch.manual_seed(0)
    model = (
        Recurrent() if recurrent else nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    )
    inputs = torch.randn(8, 4, 5) if recurrent else torch.randn(8, 5)
    graph, used = trace(model.eval(), inputs), set[bool]()

    def watched(*arguments: Any, **named: Any) -> Any:
        used.add(torch.backends.cudnn.enabled)
        return ahead(*arguments, **named)

    ahead = Execution.ahead
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Execution, "ahead", watched)
        CRITERIA[name]()(model, graph, [(inputs, torch.arange(8) % 3)])
    assert used == {not recurrent}
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("name", ["kl", "taylor", "obs"])
def test_numbers_come_first_and_outputs_twice(name: str) -> None:
    torch.manual_seed(0)
    inputs = (torch.tensor(2.0), torch.randn(8, 1, 6, 6))
    model = Timed().eval()
    graph = trace(model, inputs)
    batches = [(inputs, torch.arange(8) % 4)]

    def loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs["out"], targets)

    found = CRITERIA[name]()(model, graph, SharedCalibration(batches, loss))
    assert found["conv"].shape == (6,)
    assert bool(found["conv"].isfinite().all())
