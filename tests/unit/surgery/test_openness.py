"""What torch and people write for one idea leaves the same groups open, and they prune exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretoprune.surgery import PruningPlan, load, prune, save, trace
from tests.unit.surgery.oracles import counted, difference, half, masked_outputs, outputs
from tests.unit.surgery.specimen import draw, settle
from tests.unit.surgery.specimens import ZOO
from tests.unit.surgery.zoo_attention import Derived, Transformer


class UnitLength(nn.Module):
    """Channels of unit length: the length is repeated as often as there are channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x: Tensor) -> Any:
        x = F.normalize(self.first(x), dim=1) * self.scale
        return self.out(F.relu(self.second(x)).mean((2, 3)))


class Padded(nn.Module):
    """Attention of torch that repeats which tokens are padding for every head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(4, 8), nn.Linear(8, 5)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        padding = x[..., 0] > 1
        x = self.embed(x)
        x = x + self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        return self.out(x)


class Stretched(nn.Module):
    """Repeats a value along the tokens and along features that it adds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.time, self.mix = nn.Linear(4, 8), nn.Linear(4, 6), nn.Linear(12, 7)
        self.out = nn.Linear(13, 2)

    def forward(self, x: Tensor) -> Any:
        first = x[:, :1].expand(-1, x.shape[1], -1)
        gate = x[:, :1, :1].expand(-1, x.shape[1], -1)
        y = F.relu(self.mix(torch.cat([F.relu(gate * self.stem(x)), first], 2)))
        return self.out(torch.cat([y, F.relu(self.time(first))], 2))


class Queries(nn.Module):
    """Learned queries that attend to tokens, with a shortcut around."""

    def __init__(self, repeated: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.queries, self.repeated = nn.Parameter(torch.randn(1, 3, 8)), repeated
        self.embed, self.norm = nn.Linear(4, 6), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
        self.up, self.down, self.out = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        queries, x = self.repeated(self.queries, len(x)), self.embed(x)
        queries = queries + self.down(F.gelu(self.up(self.norm(queries))))
        return self.out(queries + self.attention(queries, x, x, need_weights=False)[0])


class Scan(nn.Module):
    """A selective state space: steps, states and channels meet in outer products."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.project, self.parts = nn.Linear(4, 10), nn.Linear(10, 8), (2, 3, 3)
        self.step, self.decay = nn.Linear(2, 10), nn.Parameter(torch.randn(10, 3))
        self.out = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Any:
        x = F.silu(self.into(x))
        step, write, read = self.project(x).split(self.parts, -1)
        step = F.softplus(self.step(step))[..., None]
        kept = torch.exp(-step * self.decay.exp())
        new = step * write[:, :, None] * x[..., None]
        state = torch.zeros(1)
        for t in range(x.shape[1]):
            state = kept[:, t] * state + new[:, t]
        return self.out((state * read[:, -1, None]).sum(-1))


TOKENS = (6, 4)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "unit_length": (UnitLength, (3, 6, 6), {"first": 8, "second": 6}),
    "padded": (Padded, TOKENS, {"embed": 8, "attention": 4}),
    "stretched": (Stretched, TOKENS, {"stem": 8, "mix": 7, "time": 6}),
    "expanded_queries": (
        lambda: Queries(lambda queries, batch: queries.expand(batch, -1, -1)),
        TOKENS,
        {"embed": 6, "up": 12, "down": 8, "attention": 2},
    ),
    "repeated_queries": (
        lambda: Queries(lambda queries, batch: queries[0][None].repeat(batch, 1, 1)),
        TOKENS,
        {"embed": 6, "up": 12, "down": 8, "attention": 2},
    ),
    "scan": (Scan, TOKENS, {"into": 10, "project": 2}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_are_open_and_prune_exactly_on_any_batch(name: str) -> None:
    build, shape, opened = NETWORKS[name]
    torch.manual_seed(0)
    model = build().eval().requires_grad_(False)  # torch's counter fails on views that learn
    settle(model)
    graph = trace(model, draw(shape, 2))
    assert {group.name: group.size for group in graph.open_groups} == opened
    assert graph.cost() == counted(model, draw(shape, 2))
    thirds = {g.name: tuple(range(0, g.size, 3)) for g in graph.open_groups}
    for plan in (half(graph), PruningPlan(thirds)):
        small = prune(model, graph, plan)
        assert graph.cost(plan) == counted(small, draw(shape, 2))
        for batch in (1, 2, 5):
            inputs = draw(shape, batch)
            expected = masked_outputs(model, graph, plan, inputs)
            assert difference(expected, outputs(small, inputs)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["encoder", "encoder_norm_first"])
def test_networks_of_half_precision_open_the_same_groups_and_blocks(
    name: str, dtype: torch.dtype
) -> None:
    model, inputs = ZOO[name].network().to(dtype), ZOO[name].inputs().to(dtype)
    graph = trace(model, inputs)
    assert {group.name: group.size for group in graph.open_groups} == ZOO[name].opened
    assert tuple(graph.blocks) == ZOO[name].blocks
    small = prune(model, graph, half(graph))
    expected = masked_outputs(model, graph, half(graph), inputs)
    assert difference(expected, outputs(small, inputs)) < 16 * torch.finfo(dtype).eps


class SlightlyOff(nn.Module):
    """Code that counts the channels, which matters less than rounding to half precision does."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.hidden(x))
        return self.out(x) + 1 + x.shape[1] / 500


def test_what_is_wrong_in_half_precision_is_not_taken_for_rounding() -> None:
    torch.manual_seed(0)
    model = SlightlyOff().to(torch.bfloat16)
    graph = trace(model, torch.randn(2, 4, dtype=torch.bfloat16))
    assert not graph.open_groups


class Einsum(nn.Module):
    """An einsum of an image with itself, its averages, or a part of these, seen as averages."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.out, self.equation = nn.LazyLinear(5), equation

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        y = self.second(x)
        operands = {"bchw": y, "bc": y.mean((2, 3)), "bcd": (y * x).flatten(2)}
        inputs = self.equation.partition("->")[0].split(",")
        x = torch.einsum(self.equation, *[operands[letters] for letters in inputs])
        return self.out(x.flatten(2).mean(2) if x.ndim > 2 else x)


@pytest.mark.parametrize(
    "equation",
    [
        "bchw,bc->bchw",
        "bchw,bc->bc",
        "bchw->bc",
        "bchw->bcwh",
        "bchw,bchw->bc",
        "bchw,bcd->bc",
        "bchw,bcd->bhw",
        "bchw,bcd->bhd",
    ],
)
def test_an_einsum_costs_what_torch_multiplies(equation: str) -> None:
    torch.manual_seed(0)
    model, inputs = Einsum(equation).eval(), draw((3, 6, 6), 2)
    model(inputs)
    graph = trace(model, inputs)
    for plan in (PruningPlan(), half(graph)):
        small = prune(model, graph, plan)
        assert graph.cost(plan) == counted(small, inputs)
        expected = masked_outputs(model, graph, plan, inputs)
        assert difference(expected, outputs(small, inputs)) < 1e-5


class Between(nn.Module):
    """An operator between two convolutions."""

    def __init__(self, operator: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6, 2)
        self.operator = operator

    def forward(self, x: Tensor) -> Any:
        return self.out(F.relu(self.second(self.operator(self.first(x)))).mean((2, 3)))


@pytest.mark.parametrize(
    "operator",
    [
        F.logsigmoid,
        torch.absolute,
        torch.negative,
        lambda x: torch.subtract(x, x.mean((2, 3), keepdim=True)),
        lambda x: torch.multiply(x, torch.divide(x, 2)),
        lambda x: torch.moveaxis(torch.moveaxis(x, 1, -1).flip(1), -1, 1),
        lambda x: x / torch.linalg.norm(x, dim=1, keepdim=True),
        lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
        lambda x: torch.rot90(x, 1, (2, 3)),
        lambda x: torch.triu(x, 1) + torch.tril(x),
        lambda x: torch.cat([x, x[:, :0] * x[:, :0]], 1),
    ],
)
def test_an_operator_by_another_name_leaves_channels_open(
    operator: Callable[[Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    model, inputs = Between(operator).eval(), draw((3, 7, 6), 2)
    graph = trace(model, inputs)
    assert {group.name: group.size for group in graph.open_groups} == {"first": 8, "second": 6}
    small = prune(model, graph, half(graph))
    assert graph.cost(half(graph)) == counted(small, inputs)
    for batch in (1, 2, 5):
        inputs = draw((3, 7, 6), batch)
        expected = masked_outputs(model, graph, half(graph), inputs)
        assert difference(expected, outputs(small, inputs)) < 1e-5


class Turned(nn.Module):
    """A weight whose axes are moved in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 8), nn.Linear(6, 3)
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Any:
        x = F.linear(F.relu(self.first(x)), torch.moveaxis(self.weight, 0, 1))
        return self.out(F.relu(x))


class Causal(Derived):
    """Derives the head width from its input, and makes its mask and distances in the code."""

    def forward(self, x: Tensor) -> Any:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        places = torch.arange(t)
        far = (places[None] - places[:, None]).abs() + torch.eye(t) + torch.full((t, t), 0.5)
        scores = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1) - far
        later = torch.triu(torch.ones(t, t, dtype=torch.bool), 1) & ~torch.zeros(t, t).bool()
        mixed = scores.masked_fill(later, -100.0).softmax(-1) @ v
        return self.project(mixed.transpose(1, 2).reshape(n, t, c))


@pytest.mark.parametrize(
    ("build", "opened", "recorded"),
    [
        (Turned, {"first": 8, "weight": 6}, []),
        (
            lambda: Transformer(Causal()),
            {"embed": 8, "attention.qkv": 4, "up": 11},
            ["attention"],
        ),
    ],
)
def test_what_code_makes_of_weights_and_numbers_is_followed(
    build: Callable[[], nn.Module],
    opened: dict[str, int],
    recorded: list[str],
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model, inputs = build().eval(), draw(TOKENS, 2)
    graph = trace(model, inputs)
    assert {group.name: group.size for group in graph.open_groups} == opened
    assert list(graph.recorded) == recorded
    small = prune(model, graph, half(graph))
    save(tmp_path, small, half(graph))
    for network in (small, load(tmp_path, build)):
        for batch in (1, 2, 5):
            inputs = draw(TOKENS, batch)
            expected = masked_outputs(model, graph, half(graph), inputs)
            assert difference(expected, outputs(network, inputs)) < 1e-5
