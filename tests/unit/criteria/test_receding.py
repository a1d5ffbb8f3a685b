"""SigBN and its regulariser against their formulas; the training resumes where it stopped."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretoprune.criteria import CRITERIA, Bounds, select
from paretoprune.criteria.receding import (
    Receding,
    SigBatchNorm,
    gammas,
    is_receded,
    recede,
    receding_penalty,
    to_batch_norm,
    to_sigbn,
)
from paretoprune.surgery import prune, trace
from paretoprune.surgery.prune import masked_tensors
from tests.unit.surgery.specimen import settle


class Small(nn.Module):
    """Three layers with BatchNorms, the last but one inside a block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv1, self.bn1 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.head(x.mean((2, 3)))


def network() -> Small:
    model = Small()
    settle(model)
    return model.eval()


def data() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(4)
    return [(torch.randn(12, 1, 6, 6), torch.arange(12) % 3) for _ in range(3)]


@pytest.mark.parametrize("training", [False, True])
def test_sigbn_is_a_batch_norm_of_a_bounded_scale_without_shift(training: bool) -> None:
    norm = nn.BatchNorm2d(4)
    settle(norm)
    sig = to_sigbn(norm).train(training)
    (gamma,) = gammas(sig)
    gamma.detach().normal_()
    plain = nn.BatchNorm2d(4).train(training)
    plain.load_state_dict(norm.state_dict())
    plain.weight.data = gamma.detach().sigmoid()
    nn.init.zeros_(plain.bias)
    x = torch.randn(6, 4, 3, 3)
    torch.testing.assert_close(sig(x), plain(x))
    assert isinstance(sig, SigBatchNorm)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(sig.norm, name), getattr(plain, name))


def test_conversion_keeps_the_order_of_scales_and_bounds_them() -> None:
    model = network()
    before = model.bn1.weight.detach().clone()
    sig = to_sigbn(model)
    scales = gammas(sig)[1].detach().sigmoid()
    torch.testing.assert_close(scales, 0.95 * before / before.max())
    assert torch.equal(model.bn1.weight, before)
    assert len(gammas(sig)) == 3


def test_a_norm_whose_scales_are_all_zero_is_as_weak_as_can_be() -> None:
    model = network()
    nn.init.zeros_(model.bn1.weight)
    scales = gammas(to_sigbn(model))[1].detach().sigmoid()
    torch.testing.assert_close(scales, torch.full((8,), 1e-4))
    trained = recede(model, data(), F.cross_entropy, Receding(epochs=1))
    assert all(tensor.isfinite().all() for tensor in trained.state_dict().values())


def test_conversion_back_is_exact_in_eval_mode() -> None:
    sig = to_sigbn(network())
    for gamma in gammas(sig):
        gamma.detach().normal_(0, 3)
    plain = to_batch_norm(sig)
    x = torch.randn(5, 1, 6, 6)
    torch.testing.assert_close(plain(x), sig(x), rtol=1e-6, atol=1e-6)
    assert not gammas(plain)
    assert [name for name, _ in plain.named_parameters()] == [
        name for name, _ in network().named_parameters()
    ]
    assert is_receded(plain)
    assert not is_receded(network())


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_the_gradient_of_the_penalty_is_its_formula(offset: float) -> None:
    gamma = torch.linspace(-30, 12, 200).double().requires_grad_()
    s = torch.sigmoid(gamma.detach() + offset)
    penalty = receding_penalty(gamma, offset)
    torch.testing.assert_close(penalty, (s * (1 - s.log())).sum())
    (gradient,) = torch.autograd.grad(penalty, gamma)
    torch.testing.assert_close(gradient, -s * (1 - s) * s.log(), rtol=1e-9, atol=1e-15)


def push(gamma: float, offset: float) -> float:
    leaf = torch.tensor([gamma]).double().requires_grad_()
    (gradient,) = torch.autograd.grad(receding_penalty(leaf, offset), leaf)
    return float(gradient)


def test_the_penalty_pushes_weak_channels_and_leaves_strong_and_dead_ones() -> None:
    assert push(6, 3) < 1e-5
    assert push(-20, 0) < 1e-6
    assert push(0, 0) == pytest.approx(0.173, abs=1e-3)
    assert push(3, 0) == pytest.approx(2.2e-3, abs=5e-5)
    assert push(6, 0) == pytest.approx(6.1e-6, abs=1e-7)
    assert push(0, 3) == pytest.approx(push(3, 0))
    beyond = [push(g, 0) for g in torch.linspace(-1.17, 8, 50).tolist()]
    assert beyond == sorted(beyond, reverse=True)


def test_its_strongest_push_is_at_an_importance_of_0_2356() -> None:
    gamma = torch.linspace(-4, 2, 600_001).double().requires_grad_()
    (gradient,) = torch.autograd.grad(receding_penalty(gamma), gamma)
    assert gradient.max().item() == pytest.approx(0.260345, abs=1e-6)
    strongest = gamma[gradient.argmax()].sigmoid().item()
    assert strongest == pytest.approx(0.235610, abs=1e-5)


def test_terms_rise_from_zero_to_one() -> None:
    gamma = torch.linspace(-15, 15, 300).double()
    terms = [float(receding_penalty(g[None])) for g in gamma]
    assert terms == sorted(terms)
    assert 0 < terms[0] < 1e-4
    assert 1 - 1e-6 < terms[-1] < 1


def test_a_channel_that_receded_wholly_carries_nothing() -> None:
    sig = to_sigbn(network())
    gamma = gammas(sig)[1]
    gamma.detach()[2] = -200
    x = torch.randn(5, 1, 6, 6)
    before = sig(x)
    inner: Any = sig
    inner.conv1.weight.detach()[2].normal_()
    torch.testing.assert_close(sig(x), before)


def test_a_receded_network_pruned_equals_itself_masked() -> None:
    model = recede(network(), data(), F.cross_entropy, Receding(epochs=1))
    x = torch.randn(5, 1, 6, 6)
    graph = trace(model, x[:2])
    saliency = CRITERIA["receding"]()(model, graph, data())
    plan = select(graph, saliency, budget=0.5, bounds=Bounds(minimum=3))
    assert all(len(kept) >= 3 for kept in plan.kept.values())
    masked = torch.func.functional_call(model, masked_tensors(model, graph, plan), (x,))
    torch.testing.assert_close(prune(model, graph, plan)(x), masked, rtol=1e-4, atol=1e-5)


def test_a_global_quantile_removes_about_its_share_of_the_units() -> None:
    model = recede(network(), data(), F.cross_entropy, Receding(epochs=1))
    graph = trace(model, torch.randn(2, 1, 6, 6))
    saliency = CRITERIA["receding"]()(model, graph, data())
    scores = torch.cat(list(saliency.values()))
    gone = sum(int((values < scores.quantile(0.4)).sum()) for values in saliency.values())
    assert gone == pytest.approx(0.4 * len(scores), abs=1)
    for group in graph.open_groups:
        scales = [
            dict(model.named_parameters())[item.parameter].detach()
            for item in group.slices
            if item.parameter.endswith("weight") and item.parameter.startswith("bn")
        ]
        torch.testing.assert_close(saliency[group.name], torch.stack(scales).mean(0))


def test_training_changes_what_it_returns_and_nothing_else() -> None:
    model = network()
    model.stem.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = data()
    random = torch.get_rng_state()
    receded = recede(model, batches, F.cross_entropy, Receding(epochs=2))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    again = recede(model, data(), F.cross_entropy, Receding(epochs=2))
    assert all(torch.equal(v, receded.state_dict()[n]) for n, v in again.state_dict().items())
    assert set(receded.state_dict()) == set(before)
    flags = {name: p.requires_grad for name, p in receded.named_parameters()}
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert not receded.training


def test_a_stronger_penalty_makes_scales_recede() -> None:
    weak, strong = (
        recede(network(), data(), F.cross_entropy, Receding(epochs=5, strength=strength))
        for strength in (0.0, 3.0)
    )
    sums = [
        sum(float(p.detach().sum()) for n, p in m.named_parameters() if n.startswith("bn"))
        for m in (weak, strong)
    ]
    assert sums[1] < 0.8 * sums[0]


def test_the_learning_rate_falls_over_a_cosine_and_is_tenfold_for_gammas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[float]] = []
    step = torch.optim.SGD.step

    def spy(self: torch.optim.SGD, *args: Any, **kwargs: Any) -> Any:
        seen.append(sorted({group["lr"] for group in self.param_groups}))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    recede(network(), data(), F.cross_entropy, Receding(epochs=4, learning_rate=0.01))
    assert len(seen) == 12
    for at, share in enumerate((1.0, 0.8535534, 0.5, 0.1464466)):
        for rates in seen[3 * at : 3 * at + 3]:
            assert rates == pytest.approx([0.01 * share, 0.1 * share])


def test_only_weights_of_two_dims_or_more_decay() -> None:
    model = network()
    settings = Receding(epochs=1, strength=0.0, weight_decay=1.0)
    trained = recede(model, data(), lambda outputs, _: outputs.sum() * 0, settings)
    after = dict(trained.named_parameters())
    for name, before in to_batch_norm(to_sigbn(model)).named_parameters():
        if before.ndim > 1:
            assert after[name].abs().sum() < 0.99 * before.abs().sum()
        else:
            assert torch.equal(after[name], before)


class Interrupted(Exception):
    """Stands for a killed process."""


class Breaking:
    """Batches whose order is drawn at random, and which break off in one epoch."""

    def __init__(self, breaks: int | None = None) -> None:
        self.breaks = breaks
        self.epochs = 0
        self.generator = torch.Generator().manual_seed(8)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.epochs += 1
        batches = data()
        for at in torch.randperm(3, generator=self.generator).tolist():
            if self.epochs == self.breaks:
                raise Interrupted
            yield batches[at]


def test_a_broken_training_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    settings, file = Receding(epochs=4), tmp_path / "recede.safetensors"
    whole = recede(network(), Breaking(), F.cross_entropy, settings)
    model = network()
    torch.manual_seed(0)
    model = copy.deepcopy(model)
    whole = recede(model, Breaking(), F.cross_entropy, settings)
    with pytest.raises(Interrupted):
        recede(model, Breaking(3), F.cross_entropy, settings, checkpoint=file)
    lines: list[str] = []
    resumed = recede(
        model, Breaking(), F.cross_entropy, settings, checkpoint=file, progress=lines.append
    )
    assert [line.split(",")[0] for line in lines] == ["epoch 3/4", "epoch 4/4"]
    assert all(torch.equal(v, whole.state_dict()[n]) for n, v in resumed.state_dict().items())


@pytest.mark.parametrize("broken", ["other settings", "other data", "half a file"])
def test_a_checkpoint_that_is_not_ours_is_not_taken(tmp_path: Path, broken: str) -> None:
    model, file = network(), tmp_path / "recede.safetensors"
    other = Receding(epochs=2, strength=0.5 if broken == "other settings" else 1e-4)
    given = [(1 - x, y) for x, y in data()] if broken == "other data" else data()
    recede(model, given, F.cross_entropy, other, checkpoint=file)
    if broken == "half a file":
        file.write_bytes(file.read_bytes()[:100])
    fresh = recede(model, data(), F.cross_entropy, Receding(epochs=2))
    taken = recede(model, data(), F.cross_entropy, Receding(epochs=2), checkpoint=file)
    assert all(torch.equal(v, fresh.state_dict()[n]) for n, v in taken.state_dict().items())


@pytest.mark.parametrize(("rate", "why"), [(1e30, "the loss is"), (1e3, "scales reach 0 or 1")])
def test_divergence_is_said_in_a_sentence(rate: float, why: str) -> None:
    lines: list[str] = []
    settings = Receding(epochs=3, learning_rate=rate)
    with pytest.raises(ValueError, match=rf"training diverged \({why}.* lower learning rate"):
        recede(network(), data(), F.cross_entropy, settings, progress=lines.append)
    assert not lines, "an epoch that diverged is not told, and the first one did"


def test_a_network_without_scales_has_nothing_that_recedes() -> None:
    bare = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with pytest.raises(ValueError, match="scales of BatchNorms recede, but the network has none"):
        recede(bare, data(), F.cross_entropy, Receding())


def test_a_network_that_receded_is_scored_without_training() -> None:
    model = recede(network(), data(), F.cross_entropy, Receding(epochs=1))
    graph = trace(model, torch.randn(2, 1, 6, 6))
    first, second = (Receding(epochs=epochs)(model, graph, data()) for epochs in (1, 5))
    assert all(torch.equal(first[name], second[name]) for name in first)
