"""The data sets that are known by name: CIFAR-10, folders of images, digits."""

from __future__ import annotations

import contextlib
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paretoprune.experiments.data.sources import DatasetSource, ImageArray

Split = Literal["train", "test"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preparation:
    """How a network wants its images.

    Attributes:
        size: Height and width.
        mean: Per channel, of pixels in [0, 1].
        std: Likewise.
        interpolation: Of a resize, as torchvision spells it.
        plain: From a PIL image to a normalised one, shape (c, *size), as it was meant for tests;
            None resizes to 8/7 of `size` and crops at the centre.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    plain: Callable[[Any], Tensor] | None = None


IMAGENET = Preparation()
"""The usual: 224x224, the ImageNet mean and std."""


def cifar10(directory: Path, split: Split) -> ImageArray:
    """Returns CIFAR-10, normalised with the ImageNet mean and std; 32x32 RGB, 10 classes.

    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.

    Args:
        directory: A folder of npz files with `images` (uint8, shape (n, 32, 32, 3)) and
            `labels`, or the root of torchvision's CIFAR10, downloaded if it is not there.
        split: Which part.

    Raises:
        ValueError: If the folder holds neither and the download fails, or files are damaged.
    """
    if any(directory.glob("*.npz")):
        images, targets = _cifar10_npz(directory, split)
    else:
        images, targets = _cifar10_torchvision(directory, split)
    return ImageArray(images, targets, IMAGENET_MEAN, IMAGENET_STD)


def _cifar10_npz(directory: Path, split: Split) -> tuple[Tensor, Tensor]:
    pattern = "train-*.npz" if split == "train" else "test.npz"
    files = sorted(directory.glob(pattern))
    if not files:
        raise ValueError(
            f"a CIFAR-10 folder of npz files has train-0.npz, … and test.npz, but {directory} "
            f"has no {pattern}."
        )
    images, labels = zip(*map(_npz_arrays, files), strict=True)
    return torch.from_numpy(np.concatenate(images)), _int64(np.concatenate(labels))


def _npz_arrays(file: Path) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    try:
        with file.open("rb") as opened, np.load(opened) as arrays:  # NumPy leaves a bad zip open
            images, labels = arrays["images"], arrays["labels"]
    except (KeyError, ValueError, OSError, EOFError, BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{file} is no npz file with the arrays 'images' and 'labels' ({error})."
        ) from error
    classes = labels.reshape(-1)  # Keras has them in a column
    like_cifar = images.dtype == np.uint8 and images.shape[1:] == (32, 32, 3)
    if not like_cifar or len(classes) != len(images):
        raise ValueError(
            f"a CIFAR-10 file has images, uint8 of shape (n, 32, 32, 3), and n labels, but {file} "
            f"has images, {images.dtype} of shape {images.shape}, and labels of shape "
            f"{labels.shape}."
        )
    return images, classes


def _cifar10_torchvision(directory: Path, split: Split) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import CIFAR10

    missing = not (directory / CIFAR10.base_folder).is_dir()
    absent = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        with warnings.catch_warnings():  # NumPy dislikes how these old pickles spell a dtype
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            dataset = CIFAR10(str(directory), train=split == "train", download=missing)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        for folder in absent:  # a download makes its folder first; only empty ones can go
            with contextlib.suppress(OSError):
                folder.rmdir()
        what = "and downloading it failed" if missing else "that can be read"
        raise ValueError(
            f"{directory} holds no CIFAR-10 (train-*.npz and test.npz, or {CIFAR10.base_folder}) "
            f"{what}: {error}."
        ) from error
    return torch.from_numpy(dataset.data), _int64(dataset.targets)


def image_folder(
    directory: Path, split: Split, preparation: Preparation = IMAGENET
) -> DatasetSource:
    """Returns a folder of images as torchvision's ImageFolder reads it, RGB.

    Plain images are prepared as the network wants them; the augmentation is a random resized
    crop and a flip, with the same size, mean and std.

    Args:
        directory: Holds train/ and val/ or test/, each with one folder of images per class.
        split: Which part.
        preparation: How the network wants its images.

    Raises:
        ValueError: If folders are missing, or the test classes are not the training classes.
    """
    from torchvision.datasets import ImageFolder

    train, test = _image_folders(directory)
    plain, augmented = _transforms(preparation)
    folder = str(train if split == "train" else test)
    try:
        return DatasetSource(
            ImageFolder(folder, plain), ImageFolder(folder, augmented), workers=None
        )
    except FileNotFoundError as error:  # a class without images
        raise ValueError(f"{folder} needs images in every class folder: {error}.") from error


def _transforms(
    preparation: Preparation,
) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """Returns what makes plain images, and augmented ones, of PIL images."""
    from torchvision import transforms

    size, mode = preparation.size, transforms.InterpolationMode(preparation.interpolation)
    normalise = [
        transforms.ToTensor(),
        transforms.Normalize(preparation.mean, preparation.std),
    ]
    resize = transforms.Resize(min(size) * 8 // 7, mode)
    plain = transforms.Compose([resize, transforms.CenterCrop(size), *normalise])
    crop = transforms.RandomResizedCrop(size, interpolation=mode)
    augmented = [crop, transforms.RandomHorizontalFlip(), *normalise]
    return preparation.plain or plain, transforms.Compose(augmented)


def _image_folders(directory: Path) -> tuple[Path, Path]:
    """Returns the training and the test folder, which have the same classes."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is no folder of images: it is not there, or a file.")
    train = directory / "train"
    test = next((directory / n for n in ("val", "test") if (directory / n).is_dir()), None)
    if not train.is_dir() or test is None:
        found = sorted(entry.name for entry in directory.glob("*/")) or "no folders"
        raise ValueError(
            f"an image folder holds train/ and val/ (or test/), but {directory} holds {found}."
        )
    classes = [{entry.name for entry in folder.glob("*/")} for folder in (train, test)]
    if not classes[0]:
        raise ValueError(f"{train} needs one folder of images per class, but holds none.")
    if classes[0] != classes[1]:
        odd = sorted(classes[0] ^ classes[1])[:3]
        raise ValueError(f"{train} and {test} need the same classes, but differ in {odd}.")
    return train, test


def digits(split: Split) -> ImageArray:
    """Returns the handwritten digits that come with scikit-learn; 8x8 grey, 10 classes.

    Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998. 1,347 training
    and 450 test images, the same division always. The augmentation moves by one pixel.

    Args:
        split: Which part.
    """
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = torch.from_numpy(loaded.images).to(torch.uint8).unsqueeze(-1)
    targets = _int64(loaded.target)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    chosen = order[:450] if split == "test" else order[450:]
    return ImageArray(
        images[chosen], targets[chosen], (0.3,), (0.37,), scale=16.0, shift=1, flip=False
    )


def _int64(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.int64)
