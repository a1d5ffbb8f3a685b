"""Small networks with norms, of which some average over the channels themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.unit.surgery.zoo import classifier


class Normed(nn.Module):
    """A group norm and a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, 1, 1), nn.GroupNorm(2, 8)
        self.conv2, self.norm2 = nn.Conv2d(8, 6, 3, 1, 1), nn.LayerNorm(6)
        self.hidden, self.out = nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.conv2(F.relu(self.norm1(self.conv1(x))))
        x = self.norm2(x.mean((2, 3)))
        return self.out(F.gelu(self.hidden(x)))


class Around(nn.Module):
    """A norm between convolutions, behind which every channel counts."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), norm(), nn.Conv2d(8, 6, 3)
        self.head = classifier(6)

    def forward(self, x: Tensor) -> Any:
        return self.head(F.relu(self.second(F.relu(self.norm(self.first(x))))))


class OverTokens(nn.Module):
    """A norm over the features of tokens, with a shortcut around what follows."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(4, 8), norm()
        self.up, self.down, self.out = nn.Linear(8, 11), nn.Linear(11, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.out(x.mean(1))


class FunctionalNorm(nn.Module):
    """A layer norm that is called as a function, with the shape of its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias)


class WrittenNorm(nn.Module):
    """A layer norm written by hand."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        return self.weight * (x - mean) / torch.sqrt(variance + 1e-6) + self.bias


class WrittenRMSNorm(nn.Module):
    """The RMS norm of language models."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class ResponseNorm(nn.Module):
    """Global response normalisation: norms over space, relative to their mean over channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Any:
        size = x.norm(p=2, dim=1, keepdim=True)
        return x + self.weight * (x * (size / (size.mean(-1, keepdim=True) + 1e-6))) + self.bias


class StandardisedWeight(nn.Conv2d):
    """A convolution whose weight is standardised per output channel before use."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        mean, deviation = flat.mean(1), flat.std(1) + 1e-5
        weight = (flat - mean[:, None]) / deviation[:, None]
        return F.conv2d(x, weight.view_as(self.weight), self.bias, self.stride, self.padding)


class SpatialGate(nn.Module):
    """Gates over positions, from the mean and from the extremes over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 7, 3, 1, 1)
        self.gate, self.head = nn.Conv2d(1, 1, 3, 1, 1), classifier(7)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.conv1(x))
        x = x * torch.sigmoid(self.gate(x.mean(1, keepdim=True)))
        x = F.relu(self.conv2(x))
        largest = x.amax(1, keepdim=True) - x.min(1, keepdim=True).values
        return self.head(x * torch.sigmoid(self.gate(largest)))
