"""Small transformers: the ways in which people write attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.unit.surgery.zoo_norms import WrittenRMSNorm


class Transformer(nn.Module):
    """Attention and an MLP over a stream of eight features, both with a shortcut."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(4, 8), attention
        self.up, self.down, self.out = nn.Linear(8, 11), nn.Linear(11, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        x = x + self.attention(x)
        x = x + self.down(F.gelu(self.up(x)))
        return self.out(x.mean(1))


class InModel(nn.Module):
    """Attention in the code of the model itself, which derives the head width from its input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.project = nn.Linear(4, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down, self.out = nn.Linear(8, 11), nn.Linear(11, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        n, t, c = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.project(mixed.transpose(1, 2).reshape(n, t, c))
        x = x + self.down(F.gelu(self.up(x)))
        return self.out(x.mean(1))


class Derived(nn.Module):
    """Derives the head width from its input, and so cannot follow when heads or inputs go."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.project, self.heads = nn.Linear(8, 24), nn.Linear(8, 8), 4
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Any:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
        mixed = self.drop(scores.softmax(-1)) @ v
        return self.project(mixed.transpose(1, 2).reshape(n, t, c))


class Fused(nn.Module):
    """One layer makes queries, keys and values; sizes are attributes, as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = 4, 2, 2**-0.5
        self.qkv, self.proj = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        n, t, _ = x.shape
        parts = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Separate(nn.Module):
    """Three layers make queries, keys and values, with sizes as Hugging Face names them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = 2, 3, 6
        self.query, self.key, self.value = (nn.Linear(8, 6) for _ in range(3))
        self.dense = nn.Linear(6, 8)

    def heads(self, x: Tensor) -> Tensor:
        sizes = (*x.shape[:-1], self.num_attention_heads, self.attention_head_size)
        return x.view(sizes).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / self.attention_head_size**0.5
        mixed = torch.matmul(F.softmax(scores, -1), v).permute(0, 2, 1, 3).contiguous()
        return self.dense(mixed.view((*mixed.shape[:-2], self.all_head_size)))


class Grouped(nn.Module):
    """Two query heads share each head of keys and values, repeated by hand or by torch."""

    def __init__(self, *, by_torch: bool) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim, self.by_torch = 6, 3, 4, by_torch
        self.wq, self.wo = nn.Linear(8, 24, bias=False), nn.Linear(24, 8, bias=False)
        self.wk, self.wv = (nn.Linear(8, 12, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        n, t, _ = x.shape
        q = self.wq(x).view(n, t, self.n_heads, self.head_dim).transpose(1, 2)
        k = self.wk(x).view(n, t, self.n_kv_heads, self.head_dim).transpose(1, 2)
        v = self.wv(x).view(n, t, self.n_kv_heads, self.head_dim).transpose(1, 2)
        if not self.by_torch:
            k, v = (y.repeat_interleave(self.n_heads // self.n_kv_heads, 1) for y in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.by_torch)
        return self.wo(mixed.transpose(1, 2).reshape(n, t, -1))


class Repeated(nn.Module):
    """Grouped queries whose keys are repeated by an expanded dim, as in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = 6, 3, 4
        self.wq, self.wo = nn.Linear(8, 24, bias=False), nn.Linear(24, 8, bias=False)
        self.wk, self.wv = (nn.Linear(8, 12, bias=False) for _ in range(2))

    def repeat(self, x: Tensor) -> Tensor:
        n, t, h, d = x.shape
        times = self.n_heads // self.n_kv_heads
        return x[:, :, :, None, :].expand(n, t, h, times, d).reshape(n, t, h * times, d)

    def forward(self, x: Tensor) -> Any:
        n, t, _ = x.shape
        q = self.wq(x).view(n, t, self.n_heads, self.head_dim)
        k = self.repeat(self.wk(x).view(n, t, self.n_kv_heads, self.head_dim))
        v = self.repeat(self.wv(x).view(n, t, self.n_kv_heads, self.head_dim))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.wo(mixed.transpose(1, 2).reshape(n, t, -1))


class Einsum(nn.Module):
    """Projections and attention as einsums, their weights parameters of three dims."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(3, 8, 4) * 0.3) for _ in range(3))
        self.bias, self.out = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4, 8))

    def forward(self, x: Tensor) -> Any:
        q = torch.einsum("bnc,hcd->bnhd", x, self.q) + self.bias
        k, v = (torch.einsum("bnc,hcd->bnhd", x, weight) for weight in (self.k, self.v))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * 0.5
        mixed = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)
        return torch.einsum("bnhd,hdc->bnc", mixed, self.out)


class Masked(nn.Module):
    """Attention with a causal mask, and with a table of biases for every head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 2, 4
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.randn(2, 6, 6))
        self.mask = nn.Buffer(torch.ones(6, 6, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Any:
        n, t, _ = x.shape
        q, k, v = (
            y.view(n, t, self.heads, self.width).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.unsqueeze(0))
        mixed = mixed + F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        mixed = mixed + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Windowed(nn.Module):
    """Swin's attention: windows, cyclic shift, and a bias per head and relative position."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.window = 2, 3
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(5, 2))
        places = torch.arange(3)
        self.index = nn.Buffer(places[:, None] - places[None] + 2)

    def forward(self, x: Tensor) -> Any:
        n, t, c = x.shape
        x = torch.roll(x, 1, 1).view(n, t // self.window, self.window, c).flatten(0, 1)
        qkv = self.qkv(x)
        sizes = (len(x), self.window, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.reshape(sizes).permute(2, 0, 3, 1, 4)
        scores = (q * (c // self.num_heads) ** -0.5).matmul(k.transpose(-2, -1))
        bias = self.table[self.index.view(-1)].view(self.window, self.window, -1)
        scores = scores + bias.permute(2, 0, 1).unsqueeze(0)
        mixed = F.softmax(scores, -1).matmul(v).transpose(1, 2).reshape(len(x), self.window, c)
        return torch.roll(self.proj(mixed).view(n, t, c), -1, 1)


class Torch(nn.Module):
    """Multi-head attention of torch, with or without the weights it can return."""

    def __init__(self, *, batch_first: bool, need_weights: bool, **options: Any) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
        self.batch_first, self.need_weights = batch_first, need_weights

    def forward(self, x: Tensor) -> Any:
        x = x if self.batch_first else x.transpose(0, 1)
        mixed, weights = self.inner(x, x, x, need_weights=self.need_weights)
        if weights is not None:
            mixed = mixed * (
                1 + (weights.amax(-1) if self.batch_first else weights.amax(-1).t())[..., None]
            )
        return mixed if self.batch_first else mixed.transpose(0, 1)


class Crossed(nn.Module):
    """Two streams of different width; the queries of one read the other."""

    def __init__(self, *, widths: tuple[int, int] | None) -> None:
        super().__init__()
        self.query = nn.Linear(4, 8)
        self.key, self.value = (nn.Linear(4, width) for width in widths or (8, 8))
        kdim, vdim = widths or (None, None)
        self.attention = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=vdim, batch_first=True)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor, memory: Tensor) -> Any:
        q, k, v = F.relu(self.query(x)), F.relu(self.key(memory)), F.relu(self.value(memory))
        return self.out((q + self.attention(q, k, v)[0]).mean(1))


class Encoder(nn.Module):
    """Encoder layers of torch."""

    def __init__(self, *, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=norm_first)
        self.embed, self.out = nn.Linear(4, 8), nn.Linear(8, 5)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.encoder(self.embed(x)).mean(1))


class Decoder(nn.Module):
    """A decoder layer of torch, which reads a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.memory, self.out = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 5)
        self.decoder = nn.TransformerDecoderLayer(8, 2, 12, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Any:
        return self.out(self.decoder(self.embed(x), self.memory(memory)).mean(1))


class Llama(nn.Module):
    """A language model's layer: RMS norms, rotary positions, grouped queries, SwiGLU."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n_heads, self.head_dim = 4, 4
            self.wq, self.wk, self.wv = (nn.Linear(8, 16, bias=False) for _ in range(3))
            self.wo = nn.Linear(16, 8, bias=False)

        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
            n, t, _ = x.shape
            q, k, v = (
                f(x).view(n, t, self.n_heads, self.head_dim).transpose(1, 2)
                for f in (self.wq, self.wk, self.wv)
            )
            q, k = (y * cos + self.rotated(y) * sin for y in (q, k))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.wo(mixed.transpose(1, 2).reshape(n, t, -1))

        @staticmethod
        def rotated(x: Tensor) -> Tensor:
            first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
            return torch.cat((-second, first), -1)

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w3 = (nn.Linear(8, 12, bias=False) for _ in range(2))
            self.w2 = nn.Linear(12, 8, bias=False)

        def forward(self, x: Tensor) -> Any:
            return self.w2(F.silu(self.w1(x)) * self.w3(x))

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 8)
        self.norm1, self.norm2, self.norm3 = (WrittenRMSNorm(8) for _ in range(3))
        self.attention, self.mlp = self.Attention(), self.Gated()
        self.out = nn.Linear(8, 9, bias=False)
        angles = torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.1]).repeat(2))
        self.cos, self.sin = nn.Buffer(angles.cos()), nn.Buffer(angles.sin())

    def forward(self, tokens: Tensor) -> Any:
        x = self.tokens(tokens)
        x = x + self.attention(self.norm1(x), self.cos, self.sin)
        return self.out(self.norm3(x + self.mlp(self.norm2(x))))


class Vision(nn.Module):
    """A ViT: class token, position table, layer scale, pre-norm blocks."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
            self.attention = Fused()
            self.scale1, self.scale2 = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
            self.mlp = nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 8))

        def forward(self, x: Tensor) -> Any:
            x = x + self.scale1 * self.attention(self.norm1(x))
            return x + self.scale2 * self.mlp(self.norm2(x))

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.blocks = nn.Sequential(self.Block(), self.Block())
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])
