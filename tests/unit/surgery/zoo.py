"""Small networks, each with one construct that surgery must follow or refuse to touch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGES = (3, 8, 8)


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Returns a convolution without bias and its BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


def classifier(channels: int) -> nn.Sequential:
    """Returns global average pooling and a linear layer to five classes."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def chain() -> nn.Module:
    """Returns conv-bn-relu twice."""
    return nn.Sequential(
        conv_bn(3, 8), nn.ReLU(), nn.MaxPool2d(2), conv_bn(8, 6), nn.ReLU(True), classifier(6)
    )


class Residual(nn.Module):
    """A ResNet block, with a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn(inputs, outputs, 3, stride), conv_bn(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


def residual() -> nn.Module:
    """Returns residual blocks with and without projection."""
    return nn.Sequential(
        conv_bn(3, 6), nn.ReLU(), Residual(6, 6), Residual(6, 8, 2), Residual(8, 8), classifier(8)
    )


class PreActivation(nn.Module):
    """A pre-activation block: the identity without condition on the sign of its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 7, 3, 1, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(7), nn.Conv2d(7, channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Any:
        branch = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(self.bn2(branch)))


def pre_activation() -> nn.Module:
    """Returns pre-activation blocks."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), PreActivation(6), PreActivation(6), nn.BatchNorm2d(6), classifier(6)
    )


class SignedResidual(nn.Module):
    """Ends in a ReLU although its input may be negative: no identity without its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 6, 1), Residual(6, 6), classifier(6)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.block(self.stem(x)))


class Dense(nn.Module):
    """A dense block: every layer reads all features before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(4 + 3 * i), nn.ReLU(), nn.Conv2d(4 + 3 * i, 3, 3, 1, 1))
            for i in range(3)
        )
        self.head = classifier(13)

    def forward(self, x: Tensor) -> Any:
        features = self.stem(x)
        for layer in self.layers:
            features = torch.cat([features, layer(features)], 1)
        return self.head(features)


def depthwise() -> nn.Module:
    """Returns depthwise convolutions, the second with two outputs per input."""
    return nn.Sequential(
        conv_bn(3, 6),
        nn.ReLU6(),
        nn.Conv2d(6, 6, 3, 1, 1, groups=6, bias=False),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 12, 3, 2, 1, groups=6),
        nn.Hardswish(),
        nn.Conv2d(12, 8, 1),
        classifier(8),
    )


def grouped() -> nn.Module:
    """Returns a grouped convolution; whole groups are its units."""
    return nn.Sequential(
        conv_bn(3, 12), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=4), nn.ReLU(), classifier(8)
    )


class Excitation(nn.Module):
    """A squeeze-and-excite gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = conv_bn(3, 8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = classifier(8)

    def forward(self, x: Tensor) -> Any:
        x = F.silu(self.conv(x))
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.head(x * gate)


def flattened() -> nn.Module:
    """Returns a linear layer that reads every position of every channel."""
    return nn.Sequential(
        conv_bn(3, 6, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(96, 7), nn.ReLU(), nn.Linear(7, 5)
    )


class Padded(nn.Module):
    """Option-A blocks, whose shortcut is padded by a module or in the code."""

    def __init__(self, *, by_module: bool) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = conv_bn(3, 4), conv_bn(4, 8, 3, 2), conv_bn(8, 8)
        self.pad = nn.ConstantPad3d((0, 0, 0, 0, 1, 3), 0.0) if by_module else None
        self.block = Residual(8, 8)
        self.head = classifier(8)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        branch = self.conv2(F.relu(self.conv1(x)))
        x = x[:, :, ::2, ::2]
        shortcut = F.pad(x, (0, 0, 0, 0, 1, 3)) if self.pad is None else self.pad(x)
        return self.head(self.block(F.relu(branch + shortcut)))


class CalledTwice(nn.Module):
    """One convolution at two places, and a linear layer whose weight is tied to another's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = conv_bn(3, 6), nn.Conv2d(6, 6, 3, 1, 1), conv_bn(6, 9)
        self.first, self.second = nn.Linear(9, 9, bias=False), nn.Linear(9, 9)
        self.second.weight = self.first.weight
        self.out = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.conv(F.relu(self.conv(F.relu(self.stem(x))))))
        x = self.norm(x).amax((2, 3))
        return self.out(F.relu(self.second(F.relu(self.first(x)))))


class Gated(nn.Module):
    """Halves of the channels gate each other; the halves must lose the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = conv_bn(3, 10), nn.Conv2d(5, 6, 1)
        self.head = classifier(6)

    def forward(self, x: Tensor) -> Any:
        value, gate = self.conv(x).chunk(2, 1)
        return self.head(F.gelu(self.out(value * torch.sigmoid(gate))))


class Shuffled(nn.Module):
    """A channel shuffle of two branches: both must lose the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv_bn(3, 6), nn.Conv2d(3, 6, 3, 1, 1)
        self.mix = nn.Conv2d(12, 12, 3, groups=12)
        self.out, self.head = nn.Conv2d(12, 7, 1), classifier(7)

    def forward(self, x: Tensor) -> Any:
        x = torch.cat([F.relu(self.left(x)), self.right(x)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(self.out(self.mix(x))))


class Ruleless(nn.Module):
    """A cumulative sum over channels, for which there is no rule: they stay, the others go."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv_bn(3, 6), conv_bn(6, 7), conv_bn(7, 6)
        self.head = classifier(6)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.second(F.relu(self.first(x))).cumsum(1))
        return self.head(F.relu(self.third(x)))


def mlp() -> nn.Module:
    """Returns linear layers alone, with normalisation and dropout."""
    return nn.Sequential(
        nn.Linear(10, 12),
        nn.ReLU(),
        nn.Linear(12, 9),
        nn.BatchNorm1d(9),
        nn.Dropout(0.3),
        nn.Tanh(),
        nn.Linear(9, 5),
    )


def one_dimensional() -> nn.Module:
    """Returns convolutions over sequences."""
    return nn.Sequential(
        nn.Conv1d(3, 8, 5, 2, 2),
        nn.BatchNorm1d(8),
        nn.LeakyReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(8, 6, 3, dilation=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


def three_dimensional() -> nn.Module:
    """Returns convolutions over volumes."""
    return nn.Sequential(
        nn.Conv3d(2, 6, 3, padding=1),
        nn.BatchNorm3d(6),
        nn.ELU(),
        nn.AvgPool3d(2),
        nn.Conv3d(6, 4, (1, 3, 3)),
        nn.Flatten(),
        nn.Linear(4 * 2 * 1 * 1, 5),
    )


def transposed() -> nn.Module:
    """Returns transposed convolutions, one of them grouped."""
    return nn.Sequential(
        conv_bn(3, 8, 3, 2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, 2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 12, 3, 2, 1, 1, groups=3),
        nn.PReLU(12),
        nn.Conv2d(12, 3, 1),
    )
