"""Pieces that any network is composed of: image to image, and tokens to tokens.

Every piece keeps the number of channels unless it is told how many to make. A piece that is a
residual block names in `last` the layers that end its branches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d

from tests.unit.surgery import zoo_attention, zoo_norms
from tests.unit.surgery.zoo import conv_bn

WIDTH = 8
"""Features of a token, and channels of an image on which all pieces fit."""


class Convolution(nn.Sequential):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self) -> None:
        super().__init__(conv_bn(WIDTH, WIDTH), nn.ReLU())


class Bottleneck(nn.Module):
    """A bottleneck residual block whose middle convolution is grouped; ends in a ReLU."""

    last: ClassVar = ("conv3.1",)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv3 = conv_bn(WIDTH, 6, 1), conv_bn(6, WIDTH, 1)
        self.conv2 = nn.Conv2d(6, 6, 3, 1, 1, groups=3)

    def forward(self, x: Tensor) -> Any:
        return F.relu(x + self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))


class PreActivation(nn.Module):
    """Norm and ReLU before every convolution."""

    last: ClassVar = ("conv2",)

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, 7, 3, 1, 1)
        self.norm2, self.conv2 = nn.GroupNorm(1, 7), nn.Conv2d(7, WIDTH, 3, 1, 1)

    def forward(self, x: Tensor) -> Any:
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class Inverted(nn.Module):
    """An inverted residual: expand, depthwise, squeeze-and-excite, project."""

    last: ClassVar = ("project.1",)

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.project = conv_bn(WIDTH, 12, 1), conv_bn(12, WIDTH, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, 1, 1, groups=12)
        self.down, self.up = nn.Conv2d(12, 5, 1), nn.Conv2d(5, 12, 1)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Any:
        y = F.hardswish(self.depthwise(F.silu(self.expand(x))))
        y = y * torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3), keepdim=True)))))
        return x + self.drop(self.project(y))


class ConvNeXt(nn.Module):
    """Depthwise convolution, layer norm, MLP, layer scale."""

    last: ClassVar = ("down",)

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, groups=WIDTH)
        self.norm, self.up, self.down = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 11),
            nn.Linear(11, WIDTH),
        )
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class Concatenated(nn.Module):
    """Appends new channels and reads them all, as in a dense block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv2d(WIDTH, 5, 3, 1, 1), nn.Conv2d(WIDTH + 5, WIDTH, 1)

    def forward(self, x: Tensor) -> Any:
        return self.mix(torch.cat([F.relu(self.conv(x)), x], 1))


class Gated(nn.Module):
    """One half of the channels gates the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(WIDTH, 12, 1), nn.Conv2d(6, WIDTH, 3, 1, 1)

    def forward(self, x: Tensor) -> Any:
        value, gate = self.conv(x).chunk(2, 1)
        return self.out(value * torch.sigmoid(gate))


class Partial(nn.Module):
    """Convolves the first channels, and passes the others."""

    def __init__(self) -> None:
        super().__init__()
        self.active, self.passive = 3, 5
        self.conv, self.mix = nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Any:
        first, rest = x.split([self.active, self.passive], 1)
        return F.relu(self.mix(torch.cat([self.conv(first), rest], 1)))


class Shuffled(nn.Module):
    """A grouped convolution, and a channel shuffle by a number that follows its groups."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = 2
        self.conv, self.mix = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, groups=2), conv_bn(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Any:
        n, c, h, w = x.shape
        x = (
            self.conv(x)
            .view(n, self.groups, c // self.groups, h, w)
            .transpose(1, 2)
            .reshape(n, c, h, w)
        )
        return F.relu(self.mix(x))


class DownAndUp(nn.Module):
    """A level of a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = conv_bn(WIDTH, 6, 3, 2), nn.ConvTranspose2d(6, 5, 2, 2)
        self.join = conv_bn(WIDTH + 5, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.join(torch.cat([x, self.up(F.relu(self.down(x)))], 1)))


class Branches(nn.Module):
    """Branches of several kinds that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv_bn(WIDTH, WIDTH), nn.Conv2d(WIDTH, WIDTH, 1)
        self.norm = LayerNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.left(x) + self.right(F.avg_pool2d(x, 3, 1, 1)) + x)


class Pixels(nn.Module):
    """Space to depth and back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(4 * WIDTH, 6, 1), nn.Conv2d(6, 4 * WIDTH, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.conv(F.pixel_unshuffle(x, 2)))
        return F.pixel_shuffle(self.up(x), 2)


class CalledTwice(nn.Module):
    """One convolution at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.InstanceNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.conv(self.norm(F.relu(self.conv(x)))))


class PreNorm(nn.Module):
    """A norm and a layer over tokens, with a shortcut around both."""

    def __init__(self, norm: nn.Module, inner: nn.Module, last: tuple[str, ...]) -> None:
        super().__init__()
        self.norm, self.inner = norm, inner
        self.last = tuple(f"inner.{name}" for name in last)

    def forward(self, x: Tensor) -> Any:
        return x + self.inner(self.norm(x))


class Mlp(nn.Sequential):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 11), nn.GELU(), nn.Linear(11, WIDTH))


IMAGE_PIECES: dict[str, Callable[[], nn.Module]] = {
    piece.__name__: piece
    for piece in (
        Convolution, Bottleneck, PreActivation, Inverted, ConvNeXt, Concatenated, Gated, Partial,
        Shuffled, DownAndUp, Branches, Pixels, CalledTwice,
    )
}  # fmt: skip
NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "RMSNorm": lambda: nn.RMSNorm(WIDTH),
    "WrittenNorm": lambda: zoo_norms.WrittenNorm(WIDTH),
    "WrittenRMSNorm": lambda: zoo_norms.WrittenRMSNorm(WIDTH),
}
TOKEN_PIECES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "Mlp": (Mlp, ("2",)),
    "SwiGLU": (zoo_attention.Llama.Gated, ("w2",)),
    "Derived": (zoo_attention.Derived, ("project",)),
    "Fused": (zoo_attention.Fused, ("proj",)),
    "Separate": (zoo_attention.Separate, ("dense",)),
    "Grouped": (lambda: zoo_attention.Grouped(by_torch=True), ("wo",)),
    "Repeated": (zoo_attention.Repeated, ("wo",)),
    "Torch": (
        lambda: zoo_attention.Torch(batch_first=True, need_weights=False),
        ("inner.out_proj",),
    ),
}


class Composed(nn.Module):
    """Pieces one after the other: on images, then on the tokens of a class head.

    Args:
        images: Names of image pieces.
        tokens: Names of (norm, token piece); none for a network of images alone.
    """

    def __init__(self, images: tuple[str, ...], tokens: tuple[tuple[str, str], ...]) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, WIDTH), nn.ReLU())
        self.images = nn.Sequential(*[IMAGE_PIECES[name]() for name in images])
        self.patches = nn.Conv2d(WIDTH, WIDTH, 4, 4) if tokens else None
        self.positions = nn.Parameter(torch.randn(1, 4, WIDTH)) if tokens else None
        self.tokens = nn.Sequential(
            *[
                PreNorm(NORMS[norm](), TOKEN_PIECES[piece][0](), TOKEN_PIECES[piece][1])
                for norm, piece in tokens
            ]
        )
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.images(self.stem(x))
        if self.patches is None:
            return self.head(x.mean((2, 3)))
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.tokens(x).mean(1))
