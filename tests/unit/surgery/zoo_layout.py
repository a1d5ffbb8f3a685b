"""Small networks that move channels about: parts, shuffles, pixels, branches, containers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.unit.surgery.zoo import classifier, conv_bn


class Cut(nn.Module):
    """Takes the first four channels, or as many as an attribute says."""

    def __init__(self, *, by_attribute: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = conv_bn(3, 8), conv_bn(4, 7), conv_bn(7, 6)
        self.head, self.width = classifier(6), 4 if by_attribute else None

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.first(x))
        x = x[:, : self.width] if self.width is not None else x[:, :4]
        return self.head(F.relu(self.third(F.relu(self.second(x)))))


class PartialConvolution(nn.Module):
    """FasterNet: a convolution of some channels, the others pass."""

    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.active, self.passive = 3, 5
            self.conv = nn.Conv2d(3, 3, 3, 1, 1)

        def forward(self, x: Tensor) -> Any:
            first, rest = torch.split(x, [self.active, self.passive], 1)
            return torch.cat([self.conv(first), rest], 1)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.partial = conv_bn(3, 8), self.Partial()
        self.mix, self.head = conv_bn(8, 7), classifier(7)

    def forward(self, x: Tensor) -> Any:
        return self.head(F.relu(self.mix(self.partial(F.relu(self.stem(x))))))


class Halves(nn.Module):
    """Convolutions read the unequal parts of one output; the sizes of the parts are numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.left, self.right = conv_bn(3, 9), conv_bn(3, 5), conv_bn(6, 6)
        self.head = classifier(11)

    def forward(self, x: Tensor) -> Any:
        left, right = F.relu(self.conv(x)).split((3, 6), 1)
        return self.head(torch.cat([F.relu(self.left(left)), F.relu(self.right(right))], 1))


class Parts(nn.Module):
    """Equal parts by chunk, by split of a computed size, and by unbind of a view; then stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv_bn(3, 12), conv_bn(4, 10), conv_bn(5, 12)
        self.out, self.head = nn.Conv2d(6, 7, 1), classifier(7)

    def forward(self, x: Tensor) -> Any:
        a, b, c = F.relu(self.first(x)).chunk(3, 1)
        y = self.second(a + b * c)
        a, b = y.split(y.shape[1] // 2, 1)
        y = self.third(F.relu(a) * torch.sigmoid(b))
        a, b = y.unflatten(1, (2, y.shape[1] // 2)).unbind(1)
        return self.head(self.out(torch.stack([F.relu(a), b, a * b], 0).sum(0)))


class Pixels(nn.Module):
    """Space to depth and back, and padding and rolling in space."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = conv_bn(3, 3), nn.Conv2d(12, 6, 3, 1, 1)
        self.wide, self.out = nn.Conv2d(6, 20, 3), nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.pixel_unshuffle(F.relu(self.stem(x)), 2)
        x = F.pad(F.relu(self.deep(x)).roll((1, -1), (2, 3)), (1, 1, 1, 1))
        return self.out(F.pixel_shuffle(F.relu(self.wide(x)), 2).flip(3))


class ShuffledByOperator(nn.Module):
    """A channel shuffle of two groups by torch's own operator."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shuffle = conv_bn(3, 8), nn.ChannelShuffle(2)
        self.mix, self.out = nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 6, 1)
        self.head = classifier(6)

    def forward(self, x: Tensor) -> Any:
        x = self.shuffle(F.relu(self.stem(x)))
        return self.head(F.relu(self.out(self.mix(x))))


class ShuffledInCode(nn.Module):
    """Shuffles the channels of two groups by a number in the code, which cannot follow them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped = conv_bn(3, 8), nn.Conv2d(8, 8, 3, 1, 1, groups=2)
        self.mix, self.head = nn.Conv2d(8, 7, 3), classifier(7)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.grouped(F.relu(self.conv(x))))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(self.mix(x)))


class ShuffleUnit(nn.Module):
    """ShuffleNet V2: one half passes, the other is convolved, then both are shuffled."""

    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(
                conv_bn(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1, groups=4), conv_bn(4, 4, 1)
            )

        def forward(self, x: Tensor) -> Any:
            passed, x = x.chunk(2, 1)
            x = torch.cat([passed, F.relu(self.branch(x))], 1)
            n, c, h, w = x.size()
            return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.units, self.head = conv_bn(3, 8), nn.Sequential(), classifier(8)
        self.units = nn.Sequential(self.Unit(), self.Unit())

    def forward(self, x: Tensor) -> Any:
        return self.head(self.units(F.relu(self.stem(x))))


class UNet(nn.Module):
    """Transposed convolutions on the way up, joined with the way down."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.deep = conv_bn(3, 4), conv_bn(4, 6), conv_bn(6, 8)
        self.up2, self.join2 = nn.ConvTranspose2d(8, 5, 2, 2), conv_bn(11, 6)
        self.up1, self.join1 = nn.ConvTranspose2d(6, 4, 2, 2), conv_bn(8, 5)
        self.out = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Any:
        first = F.relu(self.down1(x))
        second = F.relu(self.down2(F.max_pool2d(first, 2)))
        x = F.relu(self.deep(F.max_pool2d(second, 2)))
        x = F.relu(self.join2(torch.cat([self.up2(x), second], 1)))
        return self.out(F.relu(self.join1(torch.cat([self.up1(x), first], 1))))


class Unpooled(nn.Module):
    """SegNet: values go up to the positions that the way down took them from."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x, positions = F.max_pool2d(F.relu(self.down(x)), 2, return_indices=True)
        return self.out(F.max_unpool2d(F.relu(self.deep(x)), positions, [2, 2]))


class Sampled(nn.Module):
    """A spatial transformer: all channels are sampled where a small network says."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.head = conv_bn(3, 6), conv_bn(6, 7), classifier(7)
        self.where, self.grid = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        shift = self.grid(F.relu(self.where(x.mean((2, 3)))))[..., None]
        turn = torch.cat([torch.eye(2).expand(len(x), 2, 2), shift], 2)
        places = F.affine_grid(turn, list(x.shape), align_corners=False)
        x = F.grid_sample(x, places, align_corners=False)
        return self.head(F.relu(self.wide(x)))


class Cell(nn.Module):
    """A cell of a searched architecture: nodes that add what two earlier ones compute."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.separable = nn.Sequential(
            nn.Conv2d(6, 6, 3, 1, 1, groups=6, bias=False), conv_bn(6, 6, 1)
        )
        self.plain, self.wide = conv_bn(6, 6), conv_bn(6, 9, 1)
        self.head = classifier(21)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        first = self.separable(x) + F.max_pool2d(x, 3, 1, 1)
        second = self.plain(F.relu(first)) + F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return self.head(torch.cat([first, second, F.relu(self.wide(x))], 1))


class Mixer(nn.Module):
    """An MLP over tokens and one over features."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.tokens = nn.Sequential(nn.Linear(4, 7), nn.GELU(), nn.Linear(7, 4))
        self.features = nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.features(self.norm2(x))
        return self.head(x.mean(1))


@dataclass
class Detections:
    """What a detector returns."""

    classes: Tensor
    boxes: Tensor


torch.export.register_dataclass(Detections, serialized_type_name="tests.Detections")


class Detector(nn.Module):
    """Returns a dataclass inside a dict; one head is called on two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep, self.head = conv_bn(3, 6), conv_bn(6, 6, 3, 2), conv_bn(6, 7)
        self.classes, self.boxes = nn.Conv2d(7, 3, 1), nn.Conv2d(7, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Detections]:
        fine = F.relu(self.stem(x))
        scales = {"fine": fine, "coarse": F.relu(self.deep(fine))}
        features = {name: F.relu(self.head(scale)) for name, scale in scales.items()}
        return {
            name: Detections(self.classes(feature), self.boxes(feature))
            for name, feature in features.items()
        }


class Encoded(nn.Module):
    """Token and position tables, the first of which makes the logits too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 6), nn.Embedding(4, 6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, tokens: Tensor) -> Any:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)
        x = x + self.down(F.gelu(self.up(x)))
        return x @ self.tokens.weight.t()


class Volume(nn.Module):
    """Transposed convolutions over sequences and volumes, and a depthwise multiplier."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(3, 4, 3, 1, 1)
        self.multiplied = nn.Conv1d(4, 12, 3, 1, 1, groups=4)
        self.longer = nn.ConvTranspose1d(12, 6, 2, 2)
        self.volume = nn.Conv3d(6, 8, 1, groups=2)
        self.larger, self.out = nn.ConvTranspose3d(8, 5, 2, 2), nn.Conv3d(5, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.longer(F.relu(self.multiplied(F.relu(self.line(x))))))
        x = x.unflatten(2, (2, 2, 4))
        return self.out(F.relu(self.larger(F.relu(self.volume(x)))))
