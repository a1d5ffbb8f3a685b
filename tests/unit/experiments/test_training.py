"""Training learns, is repeatable, leaves its input alone, and says when it cannot work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from paretoprune.experiments.training import Training, train
from paretoprune.search.metrics import evaluate

INPUTS = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
BATCHES = [(x, (x.sum(1) > 0).long()) for x in INPUTS.split(16)]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2)
    )


def test_it_learns_and_leaves_its_input_alone() -> None:
    model = network().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = train(model, BATCHES, Training(epochs=20, learning_rate=0.1))
    assert evaluate(trained, BATCHES)["accuracy"] > 0.95
    assert not trained.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_depends_on_its_arguments_alone() -> None:
    results = []
    for seed in (1, 1, 2):
        torch.rand(1)  # the global generator moves on, training must not notice
        trained = train(network(), BATCHES, Training(epochs=2, learning_rate=0.1, seed=seed))
        results.append(trained.state_dict()["0.weight"])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_global_generator_is_left_alone() -> None:
    model = network()
    state = torch.get_rng_state()
    train(model, BATCHES, Training(epochs=1, learning_rate=0.1))
    assert torch.equal(state, torch.get_rng_state())


def test_the_learning_rate_warms_up_and_decays_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.SGD.step

    def spy(self: torch.optim.SGD, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    train(network(), BATCHES, Training(epochs=5, learning_rate=0.4, warmup=0.2))
    assert len(rates) == 20
    assert max(rates) == pytest.approx(0.4)
    assert rates.index(max(rates)) == 4
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.01


def test_biases_and_norms_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    zero_loss = [(torch.zeros(4, 4), torch.zeros(4).long())]
    settings = Training(epochs=1, learning_rate=0.1, weight_decay=1.0, warmup=0.0)
    trained = train(model, zero_loss, settings, loss=lambda outputs, _: outputs.sum() * 0)
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(trained.state_dict()[name], model.state_dict()[name])
    assert (
        trained.state_dict()["0.weight"].abs().sum() < model.state_dict()["0.weight"].abs().sum()
    )


def test_frozen_parameters_stay() -> None:
    model = network()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    trained = train(model, BATCHES, Training(epochs=1, learning_rate=0.1))
    assert torch.equal(trained.state_dict()["0.weight"], model.state_dict()["0.weight"])
    assert not torch.equal(trained.state_dict()["4.bias"], model.state_dict()["4.bias"])


def test_progress_comes_with_the_time_left() -> None:
    lines: list[str] = []
    train(network(), BATCHES, Training(epochs=2, learning_rate=0.1), progress=lines.append)
    assert [line.split(",")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert lines[-1].endswith("0 s left")


def test_divergence_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"diverged: the loss is (nan|inf) in epoch .* than 1e\+30"
    ):
        train(network(), BATCHES, Training(epochs=20, learning_rate=1e30))


def test_no_batches_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        train(network(), [], Training(epochs=1, learning_rate=0.1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("learning_rate", 0.0),
        ("warmup", 1.0),
        ("momentum", 0.0),
        ("weight_decay", -1.0),
        ("label_smoothing", 1.0),
    ],
)
def test_values_outside_their_range(field: str, value: float) -> None:
    arguments: dict[str, Any] = {"epochs": 1, "learning_rate": 0.1, field: value}
    with pytest.raises(ValueError, match=f"`{field}` must .*, but got {value}"):
        Training(**arguments)
