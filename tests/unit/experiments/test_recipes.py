"""Recipes and MODEL references become problems; what does not fit is said before long work."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from paretoprune.experiments import models, recipes
from paretoprune.experiments.data import opening
from paretoprune.experiments.data.splits import split
from paretoprune.experiments.finetuning import FineTuner
from paretoprune.experiments.recipes import RECIPES, build_problem
from paretoprune.experiments.references import import_reference
from paretoprune.experiments.training import Training
from paretoprune.search.metrics import evaluate
from paretoprune.search.problem import Problem

MODULE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate
from paretoprune.search.problem import Problem

def net(num_classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))

def problem(seed):
    batches = [(torch.zeros(2, 4), torch.tensor([0, 1]))]
    return Problem(nn.Linear(4, 2), torch.zeros(2, 4), batches, batches, name=f"seed {seed}")

def broken():
    batches = [(torch.zeros(2, 5), torch.tensor([0, 1]))]
    return Problem(nn.Linear(4, 2), torch.zeros(2, 4), batches, batches)

def empty():
    return Problem(nn.Linear(4, 2), torch.zeros(2, 4), [], [])

def seeded(seed, num_classes):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

def greedy(seed, weights, progress):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def listening(progress):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def pairs():
    return TensorDataset(torch.rand(8000, 1, 8, 8), torch.arange(8000) % 10)

def loader():
    return DataLoader(pairs(), batch_size=100, shuffle=True), None

def collating():
    return DataLoader(pairs(), batch_size=100, collate_fn=lambda x: default_collate(x)), None

def unseen():
    labels = torch.arange(80) % 10
    test = TensorDataset(torch.rand(8, 1, 8, 8), torch.arange(8) + 4)
    return TensorDataset(torch.rand(80, 1, 8, 8), labels), test

def alike():
    return TensorDataset(torch.rand(80, 1, 8, 8), torch.full((80,), 3)), None

def text():
    return "net"
"""


@pytest.fixture(scope="module")
def _module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "user_nets.py").write_text(textwrap.dedent(MODULE))
    return folder


@pytest.fixture(autouse=True)
def _importable(_module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(_module))
    monkeypatch.delenv(recipes.DATA_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def digits() -> Problem:
    lines: list[str] = []
    problem = build_problem("digits", seed=1, progress=lines.append)
    assert len(lines) == 40
    return problem


def test_digits_are_learnt_without_the_search_split(digits: Problem) -> None:
    assert digits.test is not None
    assert evaluate(digits.model, digits.test())["accuracy"] >= 0.97
    assert evaluate(digits.model, digits.validation)["accuracy"] < 1
    assert not digits.model.training


def test_digits_can_be_built_again(digits: Problem) -> None:
    assert digits.reference is not None
    rebuilt = import_reference(digits.reference)(**digits.arguments).eval()
    rebuilt.load_state_dict(digits.model.state_dict())
    assert torch.equal(rebuilt(digits.example_inputs), digits.model(digits.example_inputs))


def test_the_same_arguments_give_the_same_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "DIGITS_TRAINING", Training(epochs=2, learning_rate=0.1))
    first = build_problem("digits", seed=1)
    torch.rand(3)
    again, other = (build_problem("digits", seed=seed) for seed in (1, 2))
    outputs = [problem.model(first.example_inputs) for problem in (first, again, other)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_digits_with_weights_are_not_trained(digits: Problem, tmp_path: Path) -> None:
    save_file(digits.model.state_dict(), tmp_path / "net.safetensors")
    lines: list[str] = []
    problem = build_problem(
        "digits", weights=str(tmp_path / "net.safetensors"), seed=1, progress=lines.append
    )
    assert lines == []
    assert torch.equal(problem.model(digits.example_inputs), digits.model(digits.example_inputs))


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """A folder as $PARETOPRUNE_DATA names it, with a tiny CIFAR-10 and untrained weights."""
    folder = tmp_path / "data" / "cifar10"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (80, 32, 32, 3), dtype=np.uint8)
    for part in ("train-0", "test"):
        np.savez(folder / f"{part}.npz", images=images, labels=np.arange(80) % 10)
    (tmp_path / "checkpoints").mkdir()
    state = models.resnet20().state_dict()
    save_file(state, tmp_path / "checkpoints" / "resnet20-cifar10.safetensors")
    return tmp_path


def test_a_cifar_recipe_from_the_data_folder(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(recipes.DATA_VARIABLE, str(cifar))
    problem = build_problem("resnet20-cifar10")
    assert problem.name == "resnet20-cifar10"
    assert problem.reference == "paretoprune.experiments.models:resnet20"
    assert problem.example_inputs.shape == (2, 3, 32, 32)
    assert sum(len(targets) for _, targets in problem.validation) == 20
    assert problem.recalibration is not None
    assert sum(len(targets) for _, targets in problem.recalibration) == 60


def test_a_cifar_recipe_ranks_on_augmented_images(
    cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(recipes.DATA_VARIABLE, str(cifar))
    found = build_problem("resnet20-cifar10").validation
    source = opening.load_data(f"cifar10:{cifar / 'data' / 'cifar10'}").train
    seen, plain = (split(source, seed=0, seen=seen).validation for seen in (True, False))
    images, expected, other = (
        torch.cat([inputs for inputs, _ in batches]) for batches in (found, seen, plain)
    )
    assert torch.equal(images, expected)
    assert not torch.equal(images, other)


def test_a_cifar_recipe_from_options(cifar: Path) -> None:
    weights = str(cifar / "checkpoints" / "resnet20-cifar10.safetensors")
    data = f"cifar10:{cifar / 'data' / 'cifar10'}"
    assert build_problem("resnet20-cifar10", data=data, weights=weights).test is not None
    with pytest.raises(ValueError, match=r"ResNet: it lacks layer1\.3\.conv1\.weight"):
        build_problem("resnet32-cifar10", data=data, weights=weights)


def test_a_cifar_recipe_says_what_it_lacks(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"needs --data cifar10:DIR \(or \$.*, which is not set"):
        build_problem("resnet56-cifar10")
    monkeypatch.setenv(recipes.DATA_VARIABLE, str(cifar))
    with pytest.raises(ValueError, match=r"needs --weights FILE .* has no checkpoints/resnet56"):
        build_problem("resnet56-cifar10")


def test_a_torchvision_network_on_digits_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"does not take .*\[2, 1, 8, 8\]"):
        build_problem("torchvision:squeezenet1_1", data="digits")


def test_a_torchvision_network_on_cifar(cifar: Path) -> None:
    lines: list[str] = []
    problem, again = (
        build_problem(
            "torchvision:squeezenet1_1",
            data=f"cifar10:{cifar / 'data' / 'cifar10'}",
            progress=lines.append,
        )
        for _ in range(2)
    )
    assert "untrained" in lines[0]
    state = again.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in problem.model.state_dict().items())
    assert dict(problem.arguments) == {"num_classes": 10}
    assert problem.reference == "torchvision:squeezenet1_1"
    assert problem.model(problem.example_inputs).shape == (2, 10)


def test_pretrained_weights_for_other_classes_are_refused(
    cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

    state = squeezenet1_1().state_dict()
    monkeypatch.setattr(SqueezeNet1_1_Weights, "get_state_dict", lambda *_a, **_k: state)
    with pytest.raises(ValueError, match=r"tells 1000 classes apart, but cifar10:.* has 10"):
        build_problem(
            "torchvision:squeezenet1_1",
            data=f"cifar10:{cifar / 'data' / 'cifar10'}",
            weights="DEFAULT",
        )


def test_a_network_function_learns_the_number_of_classes() -> None:
    problem = build_problem("user_nets:net", data="digits")
    assert problem.model(problem.example_inputs).shape == (2, 10)
    assert dict(problem.arguments) == {"num_classes": 10}
    assert problem.name == "user_nets:net"


def test_a_network_function_with_a_file_of_weights(tmp_path: Path) -> None:
    state = import_reference("user_nets:net")(num_classes=10).state_dict()
    save_file(state, tmp_path / "net.safetensors")
    problem = build_problem(
        "user_nets:net", data="digits", weights=str(tmp_path / "net.safetensors")
    )
    assert torch.equal(problem.model.state_dict()["1.weight"], state["1.weight"])


def test_a_network_function_is_built_again_with_its_seed() -> None:
    problem = build_problem("user_nets:seeded", data="digits", seed=3)
    assert dict(problem.arguments) == {"seed": 3, "num_classes": 10}
    rebuilt = import_reference("user_nets:seeded")(**problem.arguments)
    assert torch.equal(rebuilt[1].weight, problem.model.state_dict()["1.weight"])


def test_a_loader_trains_on_all_that_the_search_split_leaves() -> None:
    training = build_problem("user_nets:net", data="user_nets:loader").training
    assert training is not None
    assert len(training) == 6000 // 128


def test_a_part_of_a_loader_is_searched_with_but_not_trained_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opening, "MEMORY", 1)
    with pytest.warns(UserWarning, match="only the first 6,000 examples are read"):
        problem = build_problem("user_nets:narrow", data="user_nets:collating")
    with pytest.raises(ValueError, match="fine-tuning needs training data"):
        FineTuner.of(problem, distil=False)


def test_only_logits_of_classes_are_distilled() -> None:
    problem = build_problem("user_nets:net", data="user_nets:loader")
    assert FineTuner.of(problem, distil=True).teacher is problem.model
    one = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(1))
    one(problem.example_inputs)
    with pytest.raises(
        ValueError, match=r"distillation compares .* but .* returns shape \(\d+, 1\)"
    ):
        FineTuner.of(replace(problem, model=one), distil=True)
    several = [(inputs, {"kind": targets}) for inputs, targets in problem.calibration]
    with pytest.raises(ValueError, match=r"returns shape \(\d+, \d+\) for a dict; train without"):
        FineTuner.of(replace(problem, calibration=several), distil=True)


@pytest.mark.parametrize(
    ("model", "size", "mean"), [("timm:test_vit", 160, 0.5), ("torchvision:resnet18", 224, 0.485)]
)
def test_a_folder_of_images_is_prepared_for_a_network_of_a_library(
    model: str, size: int, mean: float, tmp_path: Path
) -> None:
    if model.startswith("timm"):
        pytest.importorskip("timm")
    for folder in (tmp_path / part / name for part in ("train", "val") for name in "ab"):
        folder.mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (20, 20)).save(folder / f"{number}.png")
    problem = build_problem(model, data=f"imagefolder:{tmp_path}")
    assert problem.test is not None
    for inputs in (problem.example_inputs, next(iter(problem.test()))[0]):
        assert inputs.shape[1:] == (3, size, size)
        assert float(inputs[0, 0, 0, 0]) == pytest.approx(-mean / (0.5 if mean == 0.5 else 0.229))


def test_a_function_may_return_a_problem() -> None:
    assert build_problem("user_nets:problem", seed=4).name == "seed 4"


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("digit", None, "unknown recipe 'digit'; did you mean digits"),
        ("resnet20-cifar", None, "did you mean resnet20-cifar10"),
        ("user_nets:net", None, "user_nets:net needs data; give --data cifar10:DIR"),
        ("torchvision:resnet18", None, "torchvision:resnet18 needs data"),
        ("user_nets:narrow", "digits", "tells 4 classes apart, but digits has 10"),
        ("user_nets:net", "user_nets:unseen", "10 classes apart, but the test set of .* has 12"),
        ("user_nets:net", "user_nets:alike", "have the class 3, so that there is nothing to tell"),
        ("user_nets:broken", None, "does not take a batch"),
        ("user_nets:problem", "digits", "brings its own data; leave --data out"),
        ("user_nets:empty", None, "must have at least one batch"),
        ("user_nets:listening", "digits", "needs 'progress', but .* loaded; give it a default"),
        ("user_nets:text", None, "must return a Problem or a network .* but returned a str"),
    ],
)
def test_what_cannot_be_built_is_explained(model: str, data: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_problem(model, data=data)
    assert "\n" not in str(caught.value)


def test_every_named_recipe_takes_the_options_of_the_command_line() -> None:
    assert set(RECIPES) == {"digits", *(f"resnet{n}-cifar10" for n in (20, 32, 44, 56))}


@pytest.mark.parametrize(("depth", "accuracy"), [(20, 0.9173)])
def test_published_accuracy(
    depth: int, accuracy: float, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(recipes.DATA_VARIABLE, str(data_root))
    problem = build_problem(f"resnet{depth}-cifar10")
    assert problem.test is not None
    assert evaluate(problem.model, problem.test())["accuracy"] == pytest.approx(accuracy, abs=1e-9)
