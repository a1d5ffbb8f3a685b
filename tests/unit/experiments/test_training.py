"""Training learns, is repeatable, leaves its input alone, and says when it cannot work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretoprune.experiments.data.sources import ImageArray
from paretoprune.experiments.data.splits import TrainingBatches
from paretoprune.experiments.training import Training, distillation_loss, train
from paretoprune.search.metrics import evaluate
from paretoprune.search.problem import Batch
from tests.unit.versioned import Versioned

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


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_biases_and_norms_do_not_decay(optimizer: Literal["sgd", "adamw"]) -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    zero_loss = [(torch.zeros(4, 4), torch.zeros(4).long())]
    settings = Training(
        epochs=1, learning_rate=0.1, optimizer=optimizer, weight_decay=1.0, warmup=0.0
    )
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
    assert lines[-1].endswith("images/s, 0 s left")


def test_divergence_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"diverged: the loss is (nan|inf) in epoch .* than 1e\+30"
    ):
        train(network(), BATCHES, Training(epochs=20, learning_rate=1e30))


class Broken(Exception):
    """Stands for a killed process."""


class Breaking(TrainingBatches):
    """Breaks off in the middle of one epoch."""

    breaks = -1
    begun = -1  # the first batch alone is read once before, to tell the data apart

    def epoch(self, number: int) -> Iterator[Batch]:
        self.begun += 1
        for at, batch in enumerate(super().epoch(number)):
            if (self.begun, at) == (self.breaks + 1, 1):
                raise Broken
            yield batch


PIXELS = torch.randint(
    0, 256, (48, 6, 6, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
)


def small_images(
    kind: type[TrainingBatches] = TrainingBatches, seed: int = 5, pixels: Tensor = PIXELS
) -> Any:
    source = ImageArray(pixels, torch.arange(48) % 3, (0.5,), (0.5,), shift=1)
    return kind(source, torch.arange(48), 16, seed=seed)


def convolutional(channels: int = 4) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(16 * channels, 3),
    )


EVERYTHING = Training(
    epochs=4, learning_rate=0.1, label_smoothing=0.1, distillation=0.5, average=0.9, seed=1
)


@pytest.mark.parametrize(
    "other", [{}, {"draws": 2}, {"optimizer": "adamw", "learning_rate": 0.01}], ids=str
)
@pytest.mark.parametrize("breaks", [0, 2, 3])
def test_a_broken_training_goes_on_and_ends_the_same_bit_for_bit(
    tmp_path: Path, breaks: int, other: dict[str, Any]
) -> None:
    teacher, settings = convolutional(8), replace(EVERYTHING, **other)
    whole = train(convolutional(), small_images(), settings, teacher=teacher)
    file = tmp_path / "training.part"
    breaking = small_images(Breaking)
    breaking.breaks = breaks
    with pytest.raises(Broken):
        train(convolutional(), breaking, settings, teacher=teacher, checkpoint=file)
    assert file.exists() == (breaks > 0)
    lines: list[str] = []
    resumed = train(
        convolutional(),
        small_images(),
        settings,
        teacher=teacher,
        checkpoint=file,
        progress=lines.append,
    )
    assert [line.split(",")[0] for line in lines] == [f"epoch {n}/4" for n in range(breaks + 1, 5)]
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())


def test_batches_without_numbers_are_read_again(tmp_path: Path) -> None:
    class Drawn(list[Batch]):
        generator = torch.Generator().manual_seed(4)

        def __iter__(self) -> Iterator[Batch]:
            order = torch.randperm(len(self), generator=self.generator).tolist()
            return (self[at] for at in order)

    settings, file = Training(epochs=3, learning_rate=0.1), tmp_path / "part"
    Drawn.generator.manual_seed(4)
    whole = train(network(), Drawn(BATCHES), settings, checkpoint=file)
    Drawn.generator.manual_seed(4)
    again = train(network(), Drawn(BATCHES), settings, checkpoint=file)  # all epochs are there
    other = train(network(), Drawn(BATCHES), replace(settings, seed=1), checkpoint=file)
    assert torch.equal(whole.state_dict()["0.weight"], again.state_dict()["0.weight"])
    assert not torch.equal(whole.state_dict()["0.weight"], other.state_dict()["0.weight"])


def test_a_checkpoint_of_another_training_is_not_taken(tmp_path: Path) -> None:
    file = tmp_path / "part"
    train(convolutional(), small_images(), Training(epochs=1, learning_rate=0.1), checkpoint=file)
    settings = Training(epochs=1, learning_rate=0.2)
    fresh = train(convolutional(), small_images(), settings)
    lines: list[str] = []
    found = train(
        convolutional(), small_images(), settings, checkpoint=file, progress=lines.append
    )
    assert torch.equal(fresh.state_dict()["0.weight"], found.state_dict()["0.weight"])
    file.write_bytes(file.read_bytes()[:100])  # power was lost
    found = train(
        convolutional(), small_images(), settings, checkpoint=file, progress=lines.append
    )
    assert [line for line in lines if str(file) in line] == [
        f"{file} is of a training with another network, other data or other settings; it is not "
        f"taken, and this one begins anew",
        f"{file} cannot be read (Error while deserializing header: invalid header "
        f"length); this training begins anew",
    ]
    assert torch.equal(fresh.state_dict()["0.weight"], found.state_dict()["0.weight"])


def test_a_checkpoint_leaves_out_what_is_no_tensor(tmp_path: Path) -> None:
    model, settings = Versioned(*convolutional().children()), Training(epochs=1, learning_rate=0.1)
    lines: list[str] = []
    for _ in range(2):
        last = train(
            model, small_images(), settings, checkpoint=tmp_path / "part", progress=lines.append
        )
        assert torch.equal(
            last.state_dict()["0.weight"],
            train(convolutional(), small_images(), settings).state_dict()["0.weight"],
        )
    assert len(lines) == 1, "the second takes the epoch that is done"


def scaled_loss(outputs: Tensor, targets: Tensor, by: float = 1.0) -> Tensor:
    return by * F.cross_entropy(outputs, targets)


def of_scale(by: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, targets: by * F.cross_entropy(outputs, targets)


def squares(model: nn.Module) -> Tensor:
    return torch.stack([one.square().sum() for one in model.parameters()]).sum()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"loss": partial(scaled_loss, by=2.0)}, {"loss": None}),
        ({"loss": scaled_loss}, {"loss": partial(scaled_loss, by=3.0)}),
        ({"loss": partial(scaled_loss, by=2.0)}, {"loss": partial(scaled_loss, by=3.0)}),
        ({"loss": of_scale(2.0)}, {"loss": of_scale(3.0)}),
        (
            {"loss": lambda outputs, targets: 2 * F.cross_entropy(outputs, targets)},
            {"loss": lambda outputs, targets: 3 * F.cross_entropy(outputs, targets)},
        ),
        ({"penalty": squares}, {"penalty": None}),
        ({"batches": small_images(seed=1)}, {"batches": small_images(seed=2)}),
        ({"batches": small_images()}, {"batches": small_images().resized(36, 12)}),
        ({"batches": small_images()}, {"batches": small_images(pixels=PIXELS.flip(0))}),
        ({"batches": [*small_images()]}, {"batches": [*small_images().epoch(1)]}),
    ],
)
def test_what_a_training_depends_on_tells_its_checkpoint_apart(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    settings, file = Training(epochs=1, learning_rate=0.1), tmp_path / "part"

    def trained(given: dict[str, Any], checkpoint: Path | None = None) -> Tensor:
        batches = given.get("batches", small_images())
        others = {name: value for name, value in given.items() if name != "batches"}
        model = train(
            convolutional(),
            batches,
            settings,
            checkpoint=checkpoint,
            progress=lines.append,
            **others,
        )
        weight: Tensor = model.state_dict()["0.weight"]
        return weight

    lines: list[str] = []
    trained(before, file)
    lines.clear()
    trained(before, file)
    assert lines == []  # its own is taken: no epoch is trained
    found = trained(after, file)
    assert "not taken, and this one begins anew" in lines[0]
    assert torch.equal(found, trained(after))
    assert not torch.equal(found, trained(before))


def test_momentum_goes_on_in_the_layout_of_its_weights(tmp_path: Path) -> None:
    """Optimizers take their fast path where both have the same strides."""
    strides: list[tuple[object, object]] = []
    step = torch.optim.SGD.step

    def spy(self: torch.optim.SGD, *args: Any, **kwargs: Any) -> Any:
        for parameter, state in self.state.items():
            strides.append((parameter.stride(), state["momentum_buffer"].stride()))
        return step(self, *args, **kwargs)

    model = convolutional().to(memory_format=torch.channels_last)
    settings, file = Training(epochs=2, learning_rate=0.1), tmp_path / "part"

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, small_images(), settings, checkpoint=file, progress=stop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", spy)
        train(model, small_images(), settings, checkpoint=file)
    assert strides
    assert all(own == other for own, other in strides)


def test_settings_of_cudnn_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn, seen = torch.backends.cudnn, list[tuple[bool, bool, bool]]()
    monkeypatch.setattr(cudnn, "allow_tf32", False)
    monkeypatch.setattr(cudnn, "benchmark", True)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append((cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic))
        return F.cross_entropy(outputs, targets)

    train(network(), BATCHES, Training(epochs=1, learning_rate=0.1), loss=loss)
    assert set(seen) == {(False, False, True)}
    assert (cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic) == (False, True, False)


def test_distillation_is_the_divergence_of_softened_outputs() -> None:
    student, teacher = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).double()
    expected = 9 * F.kl_div(
        (student / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="batchmean"
    )
    found = distillation_loss(student, teacher, 3.0)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert float(distillation_loss(teacher, teacher, 3.0)) == 0


def test_a_student_learns_from_its_teacher_alone() -> None:
    teacher = train(network(), BATCHES, Training(epochs=20, learning_rate=0.1))
    wrong = [(x, torch.zeros_like(y)) for x, y in BATCHES]
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    settings = Training(epochs=20, learning_rate=0.1, distillation=1.0)
    student = train(network(), wrong, settings, teacher=teacher)
    assert evaluate(student, BATCHES)["accuracy"] > 0.9
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    with pytest.raises(ValueError, match="distillation needs a teacher"):
        train(network(), BATCHES, settings)


class Recurring(TrainingBatches):
    """Has two epochs, again and again."""

    def epoch(self, number: int) -> Iterator[Batch]:
        return super().epoch(number % 2)


def test_a_teacher_sees_every_batch_that_recurs_once() -> None:
    teacher, asked = convolutional(8), []
    hook = teacher.get_submodule("0").register_forward_hook(
        lambda module, *_: asked.append(module.training)
    )
    kept = train(convolutional(), small_images(), replace(EVERYTHING, draws=2), teacher=teacher)
    hook.remove()
    assert asked == [False] * 2 * len(small_images())
    expected = train(convolutional(), small_images(Recurring), EVERYTHING, teacher=teacher)
    other = train(convolutional(), small_images(), EVERYTHING, teacher=teacher)
    pairs = zip(kept.state_dict().values(), expected.state_dict().values(), strict=True)
    assert all(torch.equal(value, same) for value, same in pairs)
    assert not torch.equal(kept.state_dict()["0.weight"], other.state_dict()["0.weight"])
    with pytest.raises(ValueError, match=r"`draws` needs batches .* but got a list"):
        train(network(), BATCHES, Training(epochs=3, learning_rate=0.1, draws=2))


def test_mixup_mixes_what_network_and_teacher_see_and_the_losses_of_both_targets() -> None:
    inputs, targets = torch.eye(16), torch.arange(16) % 2
    seen, asked = list[Tensor](), list[Tensor]()
    student, teacher = nn.Linear(16, 2), nn.Linear(16, 2)
    for each in (student, teacher):  # hooks travel with the copy that is trained or asked
        each.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))

    def loss(outputs: Tensor, goals: Tensor) -> Tensor:
        asked.append(goals.clone())
        return F.cross_entropy(outputs, goals)

    settings = Training(epochs=3, learning_rate=0.1, distillation=0.5, mixup=0.4)
    train(student, [(inputs, targets)], settings, loss=loss, teacher=teacher)
    assert len(seen) == len(asked) == 6
    weights = set()
    for step in range(0, 6, 2):
        mixed, of_teacher = seen[step : step + 2]
        assert torch.equal(mixed, of_teacher)
        own, other = asked[step : step + 2]
        assert torch.equal(own, targets)
        weight = mixed.diagonal().min()
        partners = (mixed - weight * inputs).argmax(1)
        assert torch.equal(other, targets[partners])
        expected = weight * inputs + (1 - weight) * inputs[partners]
        torch.testing.assert_close(mixed, expected)
        weights.add(round(float(weight), 4))
    assert len(weights) == 3, "a weight for every batch"


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_step_is_that_of_a_loop_by_hand(optimizer: Literal["sgd", "adamw"]) -> None:
    torch.manual_seed(0)
    own, teacher = nn.Linear(4, 2), nn.Linear(4, 2)
    settings = Training(
        epochs=2,
        learning_rate=0.05,
        optimizer=optimizer,
        warmup=0.0,
        momentum=0.5,
        weight_decay=0.1,
        label_smoothing=0.2,
        distillation=0.3,
        temperature=2.0,
    )
    trained = train(own, BATCHES, settings, teacher=teacher)
    decayed: list[dict[str, Any]] = [
        {"params": [own.weight]},
        {"params": [own.bias], "weight_decay": 0.0},
    ]
    by_hand: torch.optim.Optimizer
    if optimizer == "sgd":
        by_hand = torch.optim.SGD(decayed, momentum=0.5, weight_decay=0.1, nesterov=True)
    else:
        by_hand = torch.optim.AdamW(decayed, betas=(0.5, 0.999), weight_decay=0.1)
    for step, (inputs, targets) in enumerate(BATCHES * 2):
        for group in by_hand.param_groups:
            group["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * step / 8))
        outputs, taught = own(inputs), teacher(inputs).detach()
        learnt = F.kl_div(
            (outputs / 2).log_softmax(1), (taught / 2).softmax(1), reduction="batchmean"
        )
        loss = F.cross_entropy(outputs, targets, label_smoothing=0.2)
        by_hand.zero_grad()
        (0.3 * 4 * learnt + 0.7 * loss).backward()
        by_hand.step()
    torch.testing.assert_close(trained.weight, own.weight)
    torch.testing.assert_close(trained.bias, own.bias)


def test_mixed_targets_weigh_as_their_inputs_do() -> None:
    """The loss is linear in the targets, so that the first step tells how they were weighed."""
    inputs, goals = torch.eye(16), torch.arange(16.0)
    seen = list[Tensor]()
    student = nn.Linear(16, 16, bias=False)
    student.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    settings = Training(
        epochs=1, learning_rate=0.1, warmup=0.0, weight_decay=0.0, momentum=1e-9, mixup=0.4
    )

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.diagonal() * targets).sum()

    trained = train(student, [(inputs, goals)], settings, loss=loss)
    (mixed,) = seen
    wanted = mixed @ goals  # each example's target, mixed as its inputs are
    torch.testing.assert_close(trained.weight, student.weight - 0.1 * wanted[:, None] * mixed)


def test_the_average_has_averaged_statistics() -> None:
    running = list[Tensor]()

    class Watched(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            out = super().forward(input)
            assert self.running_mean is not None
            running.append(self.running_mean.clone())
            return out

    trained = train(Watched(4), BATCHES, Training(epochs=1, learning_rate=1e-9, average=0.8))
    expected = running[0]  # the first step sets it
    for value in running[1:]:
        expected = 0.8 * expected + 0.2 * value
    torch.testing.assert_close(trained.running_mean, expected)


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_targets_may_be_nested(mixup: float) -> None:
    settings = Training(epochs=2, learning_rate=0.1, mixup=mixup)
    nested = [(inputs, {"kind": [targets]}) for inputs, targets in BATCHES]
    plain = train(network(), BATCHES, settings, loss=F.cross_entropy)
    found = train(
        network(), nested, settings, loss=lambda o, targets: F.cross_entropy(o, *targets["kind"])
    )
    expected = plain.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


def test_mixup_is_drawn_alike_every_time_and_needs_floating_point() -> None:
    settings = Training(epochs=2, learning_rate=0.1, mixup=0.4)
    first, second = (train(network(), BATCHES, settings) for _ in range(2))
    plain = train(network(), BATCHES, replace(settings, mixup=0.0))
    weights = [each.state_dict()["0.weight"] for each in (first, second, plain)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    tokens = [(torch.zeros(4, 3).long(), torch.zeros(4).long())]
    with pytest.raises(ValueError, match=r"mixup needs inputs .* but got torch.int64 of shape"):
        train(nn.Embedding(2, 3), tokens, settings)


def test_the_average_decays_over_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    step = torch.optim.SGD.step

    def spy(self: torch.optim.SGD, *args: Any, **kwargs: Any) -> Any:
        done = step(self, *args, **kwargs)
        seen.append(self.param_groups[0]["params"][0].detach().clone())
        return done

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    trained = train(network(), BATCHES, Training(epochs=2, learning_rate=0.1, average=0.8))
    expected = seen[0]
    for weights in seen[1:]:
        expected = 0.8 * expected + 0.2 * weights
    torch.testing.assert_close(trained.state_dict()["0.weight"], expected)
    assert trained.state_dict().keys() == network().state_dict().keys()


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
        ("distillation", 1.5),
        ("temperature", 0.0),
        ("average", 1.0),
        ("draws", -1),
        ("mixup", -0.1),
    ],
)
def test_values_outside_their_range(field: str, value: float) -> None:
    arguments: dict[str, Any] = {"epochs": 1, "learning_rate": 0.1, field: value}
    with pytest.raises(ValueError, match=f"`{field}` must .*, but got {value}"):
        Training(**arguments)


def test_batches_that_recur_are_not_mixed() -> None:
    with pytest.raises(
        ValueError, match=r"`mixup` must .* be 0 where batches recur, but got 0\.2"
    ):
        Training(epochs=1, learning_rate=0.1, mixup=0.2, draws=1)
