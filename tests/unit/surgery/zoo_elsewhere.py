"""Networks that do what those from elsewhere do: language models, speech, experts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.unit.surgery.zoo_attention import Transformer


class Heads(nn.Module):
    """Attention of four heads, whose scores get a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 4, 2
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def bias(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        n, t, _ = x.shape
        q, k, v = (
            f(x).view(n, t, self.heads, self.width).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(x))
        return self.o(mixed.transpose(1, 2).flatten(2))


class Relative(Heads):
    """A learned bias per head and distance, hidden where all heads are masked alike."""

    def __init__(self, *, added: bool) -> None:
        super().__init__()
        self.table, self.added = nn.Parameter(torch.randn(11, 4)), added

    def bias(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        bias = self.table[places[None] - places[:, None] + 5].permute(2, 0, 1)[None]
        seen = (places < 5).expand(len(x), 1, 1, -1)
        if self.added:
            return bias + torch.zeros(seen.shape).masked_fill(~seen, -9.0)
        return torch.where(seen, bias, -9.0)


class Sloped(Heads):
    """A bias by distance, of another slope for every head (ALiBi)."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Buffer(0.5 ** torch.arange(1.0, 5.0))

    def bias(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        return -self.slopes[:, None, None] * (places[None] - places[:, None]).abs()


class Coordinates(Heads):
    """A bias that a small network computes from a table of coordinates (Swin V2)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Buffer(torch.randn(11, 2))
        self.mlp = nn.Sequential(nn.Linear(2, 7), nn.ReLU(), nn.Linear(7, 4, bias=False))

    def bias(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        bias = self.mlp(self.table)[places[None] - places[:, None] + 5]
        return torch.sigmoid(bias.permute(2, 0, 1)) * 16


class Disentangled(nn.Module):
    """Scores by content and by distance, gathered for every pair of tokens (DeBERTa)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 4, 2
        self.distances, self.norm = nn.Parameter(torch.randn(11, 8)), nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        x = x.view(*x.shape[:2], self.heads, -1).permute(0, 2, 1, 3)
        return x.contiguous().view(-1, x.shape[2], x.shape[3])

    def forward(self, x: Tensor) -> Any:
        n, t, _ = x.shape
        q, k, v = (self.split(f(x)) for f in (self.q, self.k, self.v))
        far = self.split(self.k(self.norm(self.distances)[None])).repeat(n, 1, 1)
        places = torch.arange(t)
        index = (places[:, None] - places[None] + 5)[None].expand(q.shape[0], t, t)
        scores = q @ k.mT + torch.gather(q @ far.mT, -1, index)
        mixed = (scores.softmax(-1) @ v).view(n, self.heads, t, -1)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Turned(nn.Module):
    """A linear layer whose weight lies the other way round, and whose code says how wide it is."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.nf, self.nx = width, inputs
        self.weight = nn.Parameter(torch.randn(inputs, width) * 0.3)
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Any:
        product = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return product.view((*x.size()[:-1], self.nf))


class AllTurned(nn.Module):
    """Such layers, of which one is as wide as its input (GPT-2)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.square = Turned(4, 8), Turned(8, 8)
        self.up, self.down, self.out = Turned(8, 12), Turned(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.gelu(self.square(F.gelu(self.embed(x))))
        return self.out(self.down(F.gelu(self.up(x))))


class Experts(nn.Module):
    """Four experts whose weights are one tensor of three dims, of which each token takes some."""

    def __init__(self, *, picked: bool) -> None:
        super().__init__()
        self.embed, self.gate, self.out = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(8, 5)
        self.up = nn.Parameter(torch.randn(4, 8, 12) * 0.3)
        self.down = nn.Parameter(torch.randn(4, 12, 8) * 0.3)
        self.bias, self.picked = nn.Parameter(torch.randn(4, 12)), picked

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        gates = self.gate(x).softmax(-1)
        if self.picked:
            best, index = gates.max(-1)
            hidden = F.gelu((x[..., None, :] @ self.up[index])[..., 0, :] + self.bias[index])
            return self.out(
                x + best[..., None] * (hidden[..., None, :] @ self.down[index])[..., 0, :]
            )
        for expert in range(4):
            hidden = F.gelu(x @ self.up[expert] + self.bias[expert])
            x = x + gates[..., expert, None] * (hidden @ self.down[expert])
        return self.out(x)


class Layers(nn.Module):
    """Two convolutions and a linear layer with something done to their weights."""

    def __init__(self, change: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.first, self.second = (
            change(nn.Conv2d(3, 8, 3)),
            change(nn.Conv2d(8, 6, 3, bias=False)),
        )
        self.hidden, self.out = change(nn.Linear(6, 7)), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.second(F.relu(self.first(x)))).mean((2, 3))
        return self.out(F.relu(self.hidden(x)))


class Scaled(nn.Module):
    """Runs a layer with its weight times a number and a mask."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.mask = nn.Buffer((torch.rand(layer.weight.shape) > 0.3).float())

    def forward(self, x: Tensor) -> Any:
        weight = self.weight * 0.5 * self.mask
        return (F.conv2d if weight.ndim == 4 else F.linear)(x, weight, self.bias)


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nn.utils.weight_norm(layer)


class Spoken(nn.Module):
    """A grouped convolution over time whose weight has lengths along its kernel (wav2vec 2.0)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv1d(3, 8, 3), nn.Linear(8, 5)
        layer = nn.Conv1d(8, 8, 3, padding=1, groups=4)
        self.conv = parametrizations.weight_norm(layer, dim=2)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.out((x + F.gelu(self.conv(x))).mean(2))


class Fixed(nn.Module):
    """Normalises by statistics that are buffers, by division (ActNorm)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 5)
        self.mean, self.scale = nn.Buffer(torch.randn(1, 8, 1, 1)), nn.Buffer(torch.rand(8) + 0.5)
        self.variance = nn.Buffer(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu((self.first(x) - self.mean) / self.scale.view(1, -1, 1, 1))
        x = self.second(x) * self.variance[None, :, None, None].rsqrt()
        return self.out(F.relu(x).mean((2, 3)))


class Unfolded(nn.Module):
    """Runs a network on the pixels of windows, and folds these (MobileViT V2)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        n, _, h, w = x.shape
        x = F.unfold(self.first(x), 2, stride=2)
        x = F.relu(self.second(x.view(n, x.shape[1] // 4, 4, -1)))
        return self.out(F.fold(x.flatten(1, 2), (h, w), 2, stride=2).mean((2, 3)))


class Recurrent(nn.Module):
    """A recurrent layer between others, which starts from zeros or from what a layer says."""

    def __init__(self, kind: Callable[..., Any], *, begun: bool = False, **options: Any) -> None:
        super().__init__()
        self.embed, self.core = nn.Linear(4, 6), kind(6, 7, batch_first=True, **options)
        self.begin = nn.Linear(4, 7) if begun else None
        with torch.no_grad():
            width = self.core(torch.randn(1, 2, 6))[0].shape[-1]
        self.hidden, self.out = nn.Linear(width, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        state = None if self.begin is None else self.begin(x[:, 0])[None]
        y = self.core(F.relu(self.embed(x)), state)[0]
        return self.out(F.relu(self.hidden(y[:, -1])))


class Stepped(nn.Module):
    """A recurrent cell, step by step."""

    def __init__(self, kind: Callable[..., Any]) -> None:
        super().__init__()
        self.embed, self.cell, self.out = nn.Linear(4, 6), kind(6, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Any:
        state = None
        for step in F.relu(self.embed(x)).unbind(1):
            state = self.cell(step, state)
        return self.out(state[0] if isinstance(state, tuple) else state)


class Picking(nn.Module):
    """Tokens with the highest scores, by one of torch's functions."""

    def __init__(self, pick: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.score, self.pick = nn.Linear(4, 8), nn.Linear(8, 1), pick
        self.hidden, self.out = nn.Linear(8, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.embed(x))
        return self.out(F.relu(self.hidden(self.pick(x, self.score(x)[..., 0]))).mean(1))


class Prototypes(nn.Module):
    """Compares with a prototype for every class."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.classes = nn.Linear(4, 8), nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Any:
        return F.cosine_similarity(self.embed(x)[:, :, None], self.classes[None, None], -1)


class ThreeFactors(nn.Module):
    """An einsum of three values."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 8) for _ in range(3))
        self.out, self.equation = nn.Linear(8, 5), equation

    def forward(self, x: Tensor) -> Any:
        product = torch.einsum(self.equation, *[layer(x) for layer in self.layers])
        return self.out(product.flatten(1, -2).mean(1))


class Strict(nn.Module):
    """Patches whose module demands the width it was built for, and says how large the image is."""

    class Patches(nn.Module):
        def __init__(self, inputs: int, width: int) -> None:
            super().__init__()
            self.conv, self.inputs = nn.Conv2d(inputs, width, 2, 2), inputs

        def forward(self, x: Tensor) -> Any:
            if x.shape[1] != self.inputs:
                raise ValueError("another width")
            x = self.conv(x)
            return x.flatten(2).transpose(1, 2), x.shape[2], x.shape[3]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = self.Patches(3, 6), self.Patches(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x, height, width = self.first(x)
        x = F.relu(x).transpose(1, 2).unflatten(2, (height, width))
        return self.out(F.relu(self.second(x)[0]).mean(1))


def around(attention: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
    """Returns what builds a transformer around an attention."""
    return lambda: Transformer(attention(**options))


def recurrent(kind: Callable[..., Any], **options: Any) -> Callable[[], nn.Module]:
    """Returns what builds a network around a recurrent layer."""
    return lambda: Recurrent(kind, **options)


def gathered(x: Tensor, scores: Tensor) -> Tensor:
    best = scores.topk(3, 1).indices[..., None]
    return x.gather(1, best.expand(-1, -1, x.shape[-1]))
