"""Residual networks for small images: the CIFAR ResNets and a smaller one for digits.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385, §4.2:
three stages of n basic blocks, depth 6n + 2, and shortcuts without parameters (option A: every
second position, new channels filled with zeros).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside an option-A shortcut.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output; at least `in_channels`.
        stride: Stride of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        new = channels - in_channels
        # A module and not F.pad: its `padding` is an attribute, which surgery can rewrite.
        self.shortcut = nn.ZeroPad3d((0, 0, 0, 0, new // 2, new - new // 2)) if new else None

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output, shape (n, channels, height/stride, width/stride)."""
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.shortcut is not None:
            x = self.shortcut(x)  # on (n, c, h, w) the padded third-last dim is the channels
        return F.relu(branch + x)


class ResNet(nn.Module):
    """A ResNet of three stages; stages two and three halve height and width.

    Args:
        blocks: Basic blocks per stage, n; the depth is 6n + 2.
        widths: Channels of the three stages, not decreasing.
        in_channels: Channels of the images.
        num_classes: Number of classes.
    """

    def __init__(
        self, blocks: int, widths: tuple[int, int, int], in_channels: int, num_classes: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(blocks, widths[0], widths[0], stride=1)
        self.layer2 = _stage(blocks, widths[0], widths[1], stride=2)
        self.layer3 = _stage(blocks, widths[1], widths[2], stride=2)
        self.linear = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits, shape (n, num_classes), of `images`, shape (n, c, h, w)."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def _stage(blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
    rest = (BasicBlock(channels, channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(in_channels, channels, stride), *rest)


def resnet20(num_classes: int = 10) -> ResNet:
    """Returns an untrained ResNet-20 for 32x32 RGB images: 40.6 MMACs, 0.27 M params."""
    return ResNet(3, (16, 32, 64), 3, num_classes)


def resnet32(num_classes: int = 10) -> ResNet:
    """Returns an untrained ResNet-32 for 32x32 RGB images: 68.9 MMACs, 0.46 M params."""
    return ResNet(5, (16, 32, 64), 3, num_classes)


def resnet44(num_classes: int = 10) -> ResNet:
    """Returns an untrained ResNet-44 for 32x32 RGB images: 97.2 MMACs, 0.66 M params."""
    return ResNet(7, (16, 32, 64), 3, num_classes)


def resnet56(num_classes: int = 10) -> ResNet:
    """Returns an untrained ResNet-56 for 32x32 RGB images: 125.5 MMACs, 0.85 M params."""
    return ResNet(9, (16, 32, 64), 3, num_classes)


def resnet110(num_classes: int = 10) -> ResNet:
    """Returns an untrained ResNet-110 for 32x32 RGB images: 252.9 MMACs, 1.73 M params."""
    return ResNet(18, (16, 32, 64), 3, num_classes)


def vgg16(num_classes: int = 10) -> nn.Sequential:
    """Returns an untrained VGG-16 with BatchNorm for 32x32 RGB images, with one linear layer.

    Simonyan & Zisserman, ICLR 2015, arXiv:1409.1556, in the form of arXiv:2204.06404: without the
    last max-pooling, and 2x2 average pooling before the linear layer.
    """
    layers: list[nn.Module] = []
    before = 3
    for stage, channels in enumerate((64, 128, 256, 512, 512)):
        if stage:
            layers.append(nn.MaxPool2d(2))
        for _ in range(2 if stage < 2 else 3):
            conv = nn.Conv2d(before, channels, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
            nn.init.kaiming_normal_(conv.weight)
            before = channels
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(512, num_classes))


def digits_resnet(num_classes: int = 10) -> ResNet:
    """Returns an untrained ResNet-14 for 8x8 grey images: 0.36 MMACs, 30 k params."""
    return ResNet(2, (8, 16, 24), 1, num_classes)
