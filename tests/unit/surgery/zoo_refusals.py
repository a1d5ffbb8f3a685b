"""Small networks with constructs that surgery refuses to touch, and says why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.unit.surgery.zoo import classifier, conv_bn


class WrittenInPlace(nn.Module):
    """Copies channels into a tensor of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = conv_bn(3, 6), conv_bn(8, 7), classifier(7)

    def forward(self, x: Tensor) -> Any:
        x = F.relu_(self.first(x))
        wide = torch.zeros(len(x), 8, 8, 8)
        wide[:, :6] = x
        return self.head(F.relu(self.second(wide)))


class ZerosInCode(nn.Module):
    """An option-A shortcut that concatenates zeros of a size in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = conv_bn(3, 6), conv_bn(6, 7), conv_bn(7, 9)
        self.head = classifier(9)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        wide = torch.cat([x, torch.zeros(len(x), 3, 8, 8)], 1)
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x))) + wide))


class Standardised(nn.Module):
    """Weights that are computed in the code or by a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = conv_bn(3, 6), nn.Conv2d(6, 7, 3)
        self.norm = parametrizations.weight_norm(nn.Conv2d(7, 8, 3))
        self.hidden, self.head = nn.Conv2d(8, 6, 1), classifier(6)

    def forward(self, x: Tensor) -> Any:
        weight = self.conv.weight
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        x = F.conv2d(F.relu(self.stem(x)), weight, self.conv.bias)
        return self.head(F.relu(self.hidden(F.relu(self.norm(F.relu(x))))))


class Multiplied(nn.Module):
    """Matrix products of activations, einsum, a gather of channels, and their product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv_bn(3, 6), conv_bn(3, 6), conv_bn(3, 7)
        self.fourth = conv_bn(3, 5)
        self.hidden, self.out = nn.Linear(6, 8), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Any:
        a, b, c = (f(x).flatten(2) for f in (self.first, self.second, self.third))
        all_at_once = self.fourth(x).mean((2, 3)).prod(1, keepdim=True)
        product = torch.einsum("ncl,ndl->ncd", a, b)
        picked = c.mean(2)[:, [0, 2, 5]]
        return self.out(torch.cat([F.relu(self.hidden(product.mean(1))), picked, all_at_once], 1))
