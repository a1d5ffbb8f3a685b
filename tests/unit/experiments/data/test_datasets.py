"""CIFAR-10 and folders of images open in their layouts, and fail in one sentence."""

from __future__ import annotations

import hashlib
import pickle
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from paretoprune.experiments.data.datasets import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preparation,
    cifar10,
    digits,
    image_folder,
)


def write_npz(file: Path, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    np.savez(file, images=images, labels=labels)
    return images, labels


def test_npz_parts_are_read_in_order(tmp_path: Path) -> None:
    parts = [write_npz(tmp_path / f"train-{i}.npz", 20, i)[0] for i in range(2)]
    write_npz(tmp_path / "test.npz", 10, 9)
    train, test = cifar10(tmp_path, "train"), cifar10(tmp_path, "test")
    assert (len(train), len(test)) == (40, 10)
    assert train.labels().tolist() == [*range(10)] * 4
    inputs, _ = train.read(torch.tensor([25]))
    mean, std = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
    expected = ((parts[1][5] / 255 - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(inputs[0].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_missing_npz_part_is_named(tmp_path: Path) -> None:
    write_npz(tmp_path / "train-0.npz", 10, 0)
    with pytest.raises(ValueError, match=r"has no test\.npz"):
        cifar10(tmp_path, "test")


@pytest.mark.parametrize("content", [b"", b"no zip at all"])
def test_a_damaged_npz_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train-0.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"train-0\.npz is no npz file"):
        cifar10(tmp_path, "train")


def test_a_truncated_npz_file_is_named(tmp_path: Path) -> None:
    write_npz(tmp_path / "train-0.npz", 10, 0)
    whole = (tmp_path / "train-0.npz").read_bytes()
    (tmp_path / "train-0.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"train-0\.npz is no npz file"):
        cifar10(tmp_path, "train")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((4, 3, 32, 32), np.uint8), np.arange(4), r"uint8 of shape \(4, 3, 32, 32\)"),
        (np.zeros((4, 32, 32, 3), np.float32), np.arange(4), r"float32 of shape \(4, 32, 32, 3\)"),
        (np.zeros((4, 32, 32, 3), np.uint8), np.arange(3), r"labels of shape \(3,\)"),
        (np.zeros((4, 32, 32, 3), np.uint8), np.eye(4), r"labels of shape \(4, 4\)"),
    ],
)
def test_images_and_labels_of_another_form_are_refused(
    tmp_path: Path, images: Any, labels: Any, message: str
) -> None:
    np.savez(tmp_path / "train-0.npz", images=images, labels=labels)
    with pytest.raises(ValueError, match=rf"\(n, 32, 32, 3\), and n labels, but .*{message}"):
        cifar10(tmp_path, "train")


def test_labels_may_be_a_column(tmp_path: Path) -> None:
    images, column = np.zeros((4, 32, 32, 3), np.uint8), np.arange(4)[:, None]
    np.savez(tmp_path / "train-0.npz", images=images, labels=column)
    assert cifar10(tmp_path, "train").labels().tolist() == [0, 1, 2, 3]


def test_an_npz_file_with_other_arrays_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "train-0.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="arrays 'images' and 'labels'"):
        cifar10(tmp_path, "train")


def write_torchvision_layout(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Writes the download's layout with two tiny parts, and their checksums where it looks."""
    from torchvision.datasets import CIFAR10

    folder = root / CIFAR10.base_folder
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    contents = {
        "data_batch_1": {"data": rows[:4], "labels": [0, 1, 2, 3]},
        "test_batch": {"data": rows[4:], "labels": [8, 9]},
        "batches.meta": {"label_names": [str(i) for i in range(10)]},
    }
    checksums = {}
    for name, content in contents.items():
        written = pickle.dumps(content)
        (folder / name).write_bytes(written)
        checksums[name] = hashlib.md5(written).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", checksums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", checksums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": checksums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return rows


def test_the_torchvision_layout_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_torchvision_layout(tmp_path, monkeypatch)
    train, test = cifar10(tmp_path, "train"), cifar10(tmp_path, "test")
    assert train.labels().tolist() == [0, 1, 2, 3]
    assert test.labels().tolist() == [8, 9]
    expected = torch.from_numpy(rows[5].reshape(3, 32, 32).transpose(1, 2, 0).copy())
    assert torch.equal(test.images[1], expected)


def test_a_damaged_torchvision_layout_is_not_downloaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_torchvision_layout(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"holds no CIFAR-10 .* that can be read"):
        cifar10(tmp_path, "test")


def test_a_failed_download_is_one_sentence_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(ValueError, match=r"downloading it failed: .*no network") as caught:
        cifar10(tmp_path / "typo" / "data", "train")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "typo").exists()


def write_images(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 3) -> None:
    for shade, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            image = Image.new("RGB", (40, 30), (shade * 100, number * 20, 7))
            image.save(folder / name / f"{number}.png")


@pytest.mark.parametrize("test_folder", ["val", "test"])
def test_images_are_cropped_and_normalised(tmp_path: Path, test_folder: str) -> None:
    write_images(tmp_path / "train")
    write_images(tmp_path / test_folder, each=1)
    train, test = image_folder(tmp_path, "train"), image_folder(tmp_path, "test")
    labels = train.labels()
    assert labels is not None
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    inputs, targets = test.read(torch.tensor([1]))
    assert inputs.shape == (1, 3, 224, 224)
    assert targets.tolist() == [1]
    torch.testing.assert_close(
        inputs[0, 0, 100, 100], torch.tensor((100 / 255 - IMAGENET_MEAN[0]) / IMAGENET_STD[0])
    )
    augmented, _ = train.read(torch.tensor([0]), torch.Generator().manual_seed(0))
    assert augmented.shape == (1, 3, 224, 224)


def test_images_are_prepared_as_a_network_wants_them(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_images(tmp_path / part, each=1)
    preparation = Preparation((64, 80), (0.5,) * 3, (0.25,) * 3, "bicubic")
    train = image_folder(tmp_path, "train", preparation)
    plain, _ = train.read(torch.tensor([1]))
    augmented, _ = train.read(torch.tensor([1]), torch.Generator().manual_seed(0))
    for images in (plain, augmented):
        assert images.shape == (1, 3, 64, 80)
        torch.testing.assert_close(images[0, 0, 9, 9], torch.tensor((100 / 255 - 0.5) / 0.25))
    own = Preparation(plain=lambda image: torch.full((3, 224, 224), float(image.width)))
    assert image_folder(tmp_path, "train", own).read(torch.tensor([0]))[0][0, 0, 0, 0] == 40


def test_a_missing_image_folder_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "train")
    with pytest.raises(ValueError, match=r"train/ and val/ \(or test/\), but .* \['train'\]"):
        image_folder(tmp_path, "train")
    with pytest.raises(ValueError, match="nowhere is no folder of images: it is not there"):
        image_folder(tmp_path / "nowhere", "train")


def test_other_test_classes_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "train")
    write_images(tmp_path / "val", classes=("cat", "horse"))
    with pytest.raises(ValueError, match=r"same classes, but differ in \['dog', 'horse'\]"):
        image_folder(tmp_path, "train")


def test_a_class_without_images_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "train")
    write_images(tmp_path / "val", each=0)
    with pytest.raises(ValueError, match="needs images in every class folder"):
        image_folder(tmp_path, "test")


def test_a_training_folder_without_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match="one folder of images per class"):
        image_folder(tmp_path, "train")


def test_digits_are_divided_once_and_for_all() -> None:
    train, test = digits("train"), digits("test")
    assert (len(train), len(test)) == (1347, 450)
    inputs, _ = train.read(torch.arange(len(train)))
    assert inputs.shape == (1347, 1, 8, 8)
    assert abs(float(inputs.mean())) < 0.05
    assert abs(float(inputs.std()) - 1) < 0.05
    assert torch.equal(train.images, digits("train").images)
