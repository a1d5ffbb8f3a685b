"""References name functions, library networks and weights; a mistake is one clear sentence."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from paretoprune.experiments.data.datasets import IMAGENET, IMAGENET_MEAN
from paretoprune.experiments.references import (
    call_reference,
    import_reference,
    library_network,
    library_preparation,
    load_weights,
)
from paretoprune.search.weights import write_weights
from tests.unit.versioned import Versioned


def offline(*_args: object, **_kwargs: object) -> None:
    raise OSError("no network")


def test_a_function_in_the_current_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "here_only"
    package.mkdir()
    (package / "nets.py").write_text("def net():\n    return 42\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert import_reference("here_only.nets:net")() == 42


@pytest.mark.parametrize("reference", ["json", "json:", ":loads", "json:no-name", "json:a.b"])
def test_another_form_is_refused(reference: str) -> None:
    with pytest.raises(ValueError, match=r"a reference reads package\.module:function, but got"):
        import_reference(reference)


def test_a_missing_module_is_named() -> None:
    with pytest.raises(ValueError, match=r"cannot import 'no_such_module'.*No module named"):
        import_reference("no_such_module:net")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import json\n\nraise RuntimeError('boom')\n", r"RuntimeError: boom \(.*wrong\.py:3\)"),
        ("import json\n\njson.loads('{')\n", r"JSONDecodeError: Expecting .* \(.*wrong\.py:3\)"),
        ("\ndef net(:\n", r"SyntaxError: .* \(.*wrong\.py:2\)"),
    ],
)
def test_a_module_that_fails_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    (tmp_path / "wrong.py").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ValueError, match=rf"cannot import 'wrong' of 'wrong:net': {said}\.$"):
        import_reference("wrong:net")


def test_a_missing_function_is_met_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="no function 'load_'; did you mean load or"):
        import_reference("json:load_")
    with pytest.raises(ValueError, match="no function 'version_info'"):
        import_reference("sys:version_info")


def test_a_function_gets_what_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    def net(width: int, depth: int = 3, **_others: Any) -> tuple[int, int]:
        return width, depth

    module = types.ModuleType("declares")
    monkeypatch.setattr(module, "net", net, raising=False)
    monkeypatch.setitem(sys.modules, "declares", module)
    assert call_reference("declares:net", width=5, seed=1) == (5, 3)
    with pytest.raises(ValueError, match=r"needs the argument 'width', but only .* given: seed"):
        call_reference("declares:net", seed=1)


def test_a_function_that_raises_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaders() -> None:
        raise FileNotFoundError("/data/none.csv")

    module = types.ModuleType("raises")
    monkeypatch.setattr(module, "loaders", loaders, raising=False)
    monkeypatch.setitem(sys.modules, "raises", module)
    words = (
        r"raises:loaders raised FileNotFoundError: /data/none\.csv \(.*test_references\.py:\d+\)"
    )
    with pytest.raises(ValueError, match=words):
        call_reference("raises:loaders")


def test_a_torchvision_network_has_the_classes_of_the_data() -> None:
    network = library_network("torchvision:squeezenet1_1", classes=7, weights=None)
    assert network.model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert (network.reference, network.arguments) == (
        "torchvision:squeezenet1_1",
        {"num_classes": 7},
    )
    assert not network.model.training


def test_an_unknown_torchvision_network_is_met_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown torchvision model 'resnet5'; did you mean res"):
        library_network("torchvision:resnet5", classes=None, weights=None)


def test_weights_that_are_neither_a_name_nor_a_file_are_refused() -> None:
    with pytest.raises(ValueError, match=r"neither a file nor .* are IMAGENET1K_V1, DEFAULT\."):
        library_network("torchvision:resnet18", classes=10, weights="IMAGENET1K_V9")


def test_torchvision_weights_from_a_file(tmp_path: Path) -> None:
    trained = library_network("torchvision:squeezenet1_1", classes=3, weights=None).model
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    network = library_network(
        "torchvision:squeezenet1_1", classes=3, weights=str(tmp_path / "weights.pth")
    )
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(network.model(images), trained.eval()(images))


def test_pretrained_weights_bring_their_own_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import GoogLeNet_Weights, googlenet

    state = googlenet(init_weights=False, aux_logits=True).state_dict()
    monkeypatch.setattr(GoogLeNet_Weights, "get_state_dict", lambda *_args, **_kwargs: state)
    network = library_network("torchvision:googlenet", classes=1000, weights="DEFAULT")
    assert network.arguments == {"aux_logits": False, "transform_input": True}
    rebuilt = googlenet(init_weights=False, **network.arguments).eval()
    rebuilt.load_state_dict(network.model.state_dict())
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(rebuilt(images), network.model(images))


def test_pretrained_weights_of_another_size_can_be_built_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torchvision.models import VisionTransformer, ViT_B_16_Weights, vit_b_16

    monkeypatch.setattr(ViT_B_16_Weights, "get_state_dict", lambda *_args, **_kwargs: {})
    monkeypatch.setattr(VisionTransformer, "load_state_dict", lambda *_args: None)
    with torch.device("meta"):
        network = library_network(
            "torchvision:vit_b_16", classes=1000, weights="IMAGENET1K_SWAG_E2E_V1"
        )
        assert network.arguments == {"image_size": 384}
        assert vit_b_16(**network.arguments).image_size == 384


@pytest.mark.parametrize(
    ("reference", "weights", "size", "mean"),
    [
        ("torchvision:inception_v3", "DEFAULT", 299, IMAGENET_MEAN[0]),
        ("torchvision:vit_b_16", "IMAGENET1K_SWAG_E2E_V1", 384, IMAGENET_MEAN[0]),
        ("torchvision:efficientnet_b7", "IMAGENET1K_V1", 600, IMAGENET_MEAN[0]),
        ("timm:vit_base_patch16_224", "DEFAULT", 224, 0.5),
        ("timm:vit_base_patch16_384", None, 384, 0.5),
        ("timm:inception_v3", "DEFAULT", 299, 0.5),
        ("timm:resnet18.a1_in1k", "some.safetensors", 224, IMAGENET_MEAN[0]),
    ],
)
def test_images_are_prepared_as_the_weights_of_a_library_were_tested(
    reference: str, weights: str | None, size: int, mean: float
) -> None:
    if reference.startswith("timm"):
        pytest.importorskip("timm")
    preparation = library_preparation(reference, weights)
    assert preparation.size == (size, size)
    assert preparation.mean[0] == pytest.approx(mean)
    assert preparation.plain is not None
    image = preparation.plain(Image.new("RGB", (50, 70), (128, 0, 0)))
    assert image.shape == (3, size, size)
    expected = (128 / 255 - preparation.mean[0]) / preparation.std[0]
    torch.testing.assert_close(image[0, 9, 9], torch.tensor(expected))


def test_a_torchvision_network_without_weights_of_its_own_takes_the_usual_images(
    tmp_path: Path,
) -> None:
    (tmp_path / "own.pt").touch()
    for weights in (None, str(tmp_path / "own.pt")):
        assert library_preparation("torchvision:inception_v3", weights) == IMAGENET


def test_what_no_library_knows_has_no_images_either() -> None:
    with pytest.raises(ValueError, match="unknown torchvision model 'resnet5'"):
        library_preparation("torchvision:resnet5", None)
    with pytest.raises(ValueError, match="neither a file nor weights of torchvision:resnet18"):
        library_preparation("torchvision:resnet18", "IMAGENET1K_V9")
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"unknown timm model 'resnet18\.bogus': Invalid"):
        library_preparation("timm:resnet18.bogus", None)


def test_a_failed_download_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import ResNet18_Weights

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(ValueError, match="'DEFAULT' of torchvision:resnet18 cannot be downloaded"):
        library_network("torchvision:resnet18", classes=1000, weights="DEFAULT")


def test_timm_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"needs the package timm; .*paretoprune\[timm\]"):
        library_network("timm:resnet18", classes=None, weights=None)


def test_timm_networks() -> None:
    pytest.importorskip("timm")
    network = library_network("timm:resnet10t", classes=4, weights=None)
    assert network.model(torch.zeros(1, 3, 64, 64)).shape == (1, 4)
    assert network.arguments == {"num_classes": 4}
    with pytest.raises(ValueError, match="unknown timm model 'resnet10x'; did you mean"):
        library_network("timm:resnet10x", classes=None, weights=None)


def normalised(width: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))


@pytest.mark.parametrize("name", ["net.safetensors", "net.pt"])
def test_weights_load_without_the_counters_of_batches(tmp_path: Path, name: str) -> None:
    state = normalised().state_dict()
    del state["1.num_batches_tracked"]
    file = tmp_path / name
    save_file(state, file) if name.endswith("safetensors") else torch.save(state, file)
    model = normalised()
    load_weights(model, file)
    assert torch.equal(model.state_dict()["0.weight"], state["0.weight"])


def test_a_checkpoint_that_wraps_its_state_dict(tmp_path: Path) -> None:
    model, other = normalised(), normalised()
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "net.pth")
    load_weights(other, tmp_path / "net.pth")
    assert torch.equal(other.state_dict()["0.weight"], model.state_dict()["0.weight"])


def test_weights_that_were_written_without_what_is_no_tensor(tmp_path: Path) -> None:
    model, other = Versioned(nn.Linear(3, 2)), Versioned(nn.Linear(3, 2))
    write_weights(model, tmp_path / "net.safetensors")
    load_weights(other, tmp_path / "net.safetensors")
    inputs = torch.randn(4, 3)
    assert torch.equal(other(inputs), model(inputs))


def test_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the weights '.*none\.pt' are not a file"):
        load_weights(normalised(), tmp_path / "none.pt")


def test_weights_of_another_network_name_the_keys(tmp_path: Path) -> None:
    save_file(nn.Linear(3, 2).state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"it lacks 0\.weight, 0\.bias, 1\.weight and 3 more and"):
        load_weights(normalised(), tmp_path / "net.safetensors")


def test_weights_of_another_size_name_the_shapes(tmp_path: Path) -> None:
    save_file(normalised(5).state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(
        ValueError, match=r"0\.weight has shape \(5, 3\), but .* \(2, 3\) \(6 such"
    ):
        load_weights(normalised(), tmp_path / "net.safetensors")


@pytest.mark.parametrize("name", ["net.safetensors", "net.pt"])
def test_damaged_weights_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no weights")
    with pytest.raises(ValueError, match=f"{name} cannot be read as weights") as caught:
        load_weights(normalised(), tmp_path / name)
    assert "\n" not in str(caught.value)


def test_code_in_weights_is_not_run(tmp_path: Path) -> None:
    torch.save(normalised(), tmp_path / "net.pt")  # a pickled module
    with pytest.raises(ValueError, match="not read because that could run code") as caught:
        load_weights(normalised(), tmp_path / "net.pt")
    assert "weights_only" not in str(caught.value)  # torch's own words advise to run it


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "net.pt")
    with pytest.raises(ValueError, match="must hold a dictionary of tensors"):
        load_weights(normalised(), tmp_path / "net.pt")
