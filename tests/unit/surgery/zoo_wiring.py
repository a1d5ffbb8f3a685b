"""Small networks with unusual wiring: parameters in the code, several inputs and outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.unit.surgery.zoo import Residual, classifier, conv_bn


class Scaled(nn.Module):
    """Layer scale and an additive table, both parameters used directly."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.scale = nn.Parameter(torch.rand(6, 1, 1))
        self.table = nn.Parameter(torch.randn(1, 6, 8, 8))
        self.mean = nn.Buffer(torch.randn(1, 6, 1, 1))
        self.head = classifier(6)

    def forward(self, x: Tensor) -> Any:
        x = self.conv1(x) + self.table
        x = x + self.scale * self.conv2(F.relu(x))
        return self.head(F.relu(x - self.mean))


class FixedFilters(nn.Module):
    """Filters that are buffers: a blur per channel, a transform of all, a fixed random layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_bn(3, 6), nn.Conv2d(6, 8, 3)
        self.blur = nn.Buffer(
            torch.tensor([1.0, 2.0, 1.0]).outer(torch.ones(3)).repeat(6, 1, 1, 1)
        )
        self.transform = nn.Buffer(torch.linalg.qr(torch.randn(8, 8)).Q[:, :, None, None])
        self.projection = nn.Buffer(torch.randn(12, 8))
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.first(x))
        x = F.conv2d(x, self.blur / 12, stride=2, padding=1, groups=x.shape[1])
        x = F.conv2d(F.relu(self.second(x)), self.transform)
        x = F.linear(F.relu(x).mean((2, 3)), self.projection)
        return self.out(F.relu(x))


class TwoInputs(nn.Module):
    """Images and vectors, given by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = conv_bn(3, 6), nn.Linear(4, 7)
        self.out = nn.Linear(13, 5)

    def forward(self, image: Tensor, vector: Tensor) -> Any:
        image = F.relu(self.conv(image)).mean((2, 3))
        return self.out(torch.cat([image, F.relu(self.linear(vector))], 1))


class TwoOutputs(nn.Module):
    """Two heads; the features are returned as well and so must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_bn(3, 6), conv_bn(6, 8)
        self.classes, self.boxes = classifier(8), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = F.relu(self.first(x))
        features = F.relu(self.second(x))
        return self.classes(features), {"boxes": self.boxes(x), "features": features}


class Auxiliary(nn.Module):
    """A head that only training returns, though it always runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_bn(3, 6), conv_bn(6, 8)
        self.early = nn.Sequential(conv_bn(6, 7), nn.ReLU(inplace=True), classifier(7))
        self.head = classifier(8)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.first(x))
        early = self.early(x)
        late = self.head(F.relu(self.second(x)))
        return (late, early) if self.training else late


class FixedView(nn.Module):
    """Writes the number of channels into a view: the code then breaks on fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_bn(3, 6), conv_bn(6, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.second(F.relu(self.first(x)))).mean((2, 3))
        return self.head(x.view(-1, 8))


class Tokens(nn.Module):
    """Patches become tokens beside a class token, with positions added."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.positions = nn.Parameter(torch.randn(1, 5, 6))
        self.up, self.down, self.out = nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        x = x + self.down(F.relu(self.up(x)))
        return self.out(x[:, 0] + x.mean(1))


class Squared(nn.Module):
    """An image size that equals the sizes of a view by chance, and bits that are viewed."""

    def __init__(self) -> None:
        super().__init__()
        self.crop, self.channels = (8, 8), 8
        self.mix = nn.Conv1d(8, 12, 1)

    def forward(self, x: Tensor) -> Any:
        if self.training:
            x = F.interpolate(x, self.crop)
        x = x.mean(3).view(x.shape[0], self.channels, 8)
        if not self.training:
            x = (x.view(torch.int32) & -65536).view(torch.float32)
        return self.mix(x)


class Partly(nn.Module):
    """Makes a layer as it runs, with numbers that cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Any:
        x = nn.Unflatten(1, (4, 4))(self.inner(x))
        return self.outer(F.relu(x).flatten(1))


class Viewed(nn.Module):
    """Views features as images of a size that is an attribute."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, *self.shape)


def generator(view: nn.Module, norm: nn.Module) -> nn.Module:
    """Returns a network from 10 numbers to an image, by way of 4 channels of 4 x 4."""
    grows, paints = nn.ConvTranspose2d(4, 6, 4, 2, 1), nn.Conv2d(6, 3, 3)
    return nn.Sequential(nn.Linear(10, 64), view, norm, nn.ReLU(), grows, nn.ReLU(), paints)


class Unflattened(nn.Module):
    """Split into parts and unflattened by sizes that the code computes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 12, 3), nn.Conv2d(6, 8, 1)
        self.head = classifier(8)

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        left, right = x.split(x.shape[1] // 2, 1)
        x = self.mix(F.relu(left) * right)
        x = x.unflatten(1, (2, x.shape[1] // 2)).transpose(1, 2).flatten(1, 2)
        return self.head(F.relu(x))


class Nested(nn.Module):
    """Residual blocks inside nested containers, and a shortcut around them all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.stage = nn.Sequential(nn.Sequential(Residual(6, 6)), Residual(6, 6))
        self.mix, self.head = nn.Conv2d(6, 6, 1), classifier(6)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.mix(self.stage(x)) + x))


class Upsampled(nn.Module):
    """Down, up and joined again, as in a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep = conv_bn(3, 6), conv_bn(6, 8, 3, 2)
        self.up, self.out = nn.Upsample(scale_factor=2), nn.Conv2d(14, 3, 1)

    def forward(self, x: Tensor) -> Any:
        skip = F.relu(self.first(x))
        deep = self.up(F.relu(self.deep(skip)))
        return self.out(torch.cat([skip, deep], 1))


class Embedded(nn.Module):
    """Integer inputs look up rows of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.out = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Any:
        return self.out(F.relu(self.hidden(self.table(tokens).mean(1))))


class TiedTransposed(nn.Module):
    """The decoder is the encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.encoder, self.out = nn.Linear(4, 9), nn.Linear(9, 6), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Any:
        code = F.relu(self.encoder(F.relu(self.first(x))))
        return self.out(F.linear(code, self.encoder.weight.t()))


class Recurrent(nn.Module):
    """A GRU between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru = nn.Linear(4, 6), nn.GRU(6, 7, batch_first=True)
        self.hidden, self.out = nn.Linear(7, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        return self.out(F.relu(self.hidden(self.gru(self.embed(x))[0][:, -1])))
