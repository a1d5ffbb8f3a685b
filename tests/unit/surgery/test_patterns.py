"""Patterns of networks from elsewhere (language models, speech, experts) are open and exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from paretoprune.surgery import PruningPlan, UnsupportedModel, load, prune, save, trace
from paretoprune.surgery.execute import Execution
from tests.unit.surgery import zoo_elsewhere as zoo
from tests.unit.surgery.oracles import counted, difference, half, masked_outputs, outputs
from tests.unit.surgery.specimen import draw, settle

TOKENS, IMAGES = (6, 4), (3, 8, 8)


@dataclasses.dataclass(frozen=True)
class Pattern:
    """What is known about a network.

    Attributes:
        build: Returns it with fresh weights.
        shape: Shape of one example.
        opened: Sizes of the groups that may be pruned.
        recorded: The modules that become recordings.
        counts: Whether torch counts its MACs; it counts none of an LSTM.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    opened: dict[str, int]
    recorded: tuple[str, ...] = ()
    counts: bool = True


HEADS = {"embed": 8, "attention.q": 4, "up": 11}
LAYERS = {"first": 8, "second": 6, "hidden": 7}
CORE = {"embed": 6, "core": 7, "hidden": 8}
PATTERNS = {
    "relative_added": Pattern(zoo.around(zoo.Relative, added=True), TOKENS, HEADS),
    "relative_chosen": Pattern(zoo.around(zoo.Relative, added=False), TOKENS, HEADS),
    "sloped": Pattern(zoo.around(zoo.Sloped), TOKENS, HEADS),
    "coordinates": Pattern(zoo.around(zoo.Coordinates), TOKENS, HEADS | {"attention.mlp.0": 7}),
    "disentangled": Pattern(zoo.around(zoo.Disentangled), TOKENS, HEADS),
    "turned": Pattern(zoo.AllTurned, TOKENS, {"embed": 8, "square": 8, "up": 12, "down": 8}),
    "experts": Pattern(lambda: zoo.Experts(picked=False), TOKENS, {"embed": 8, "up": 12}),
    "picked_experts": Pattern(lambda: zoo.Experts(picked=True), TOKENS, {"embed": 8, "up": 12}),
    "weight_norm": Pattern(lambda: zoo.Layers(parametrizations.weight_norm), IMAGES, LAYERS),
    "old_weight_norm": Pattern(lambda: zoo.Layers(zoo.old_weight_norm), IMAGES, LAYERS),
    "scaled": Pattern(lambda: zoo.Layers(zoo.Scaled), IMAGES, LAYERS),
    "spoken": Pattern(zoo.Spoken, (3, 12), {"stem": 4}),
    "fixed": Pattern(zoo.Fixed, IMAGES, {"first": 8, "second": 6}),
    "unfolded": Pattern(zoo.Unfolded, IMAGES, {"first": 8, "second": 6}),
    "gru": Pattern(zoo.recurrent(nn.GRU, num_layers=2), TOKENS, CORE),
    "begun": Pattern(
        zoo.recurrent(nn.GRU, begun=True), TOKENS, {"embed": 6, "begin": 7, "hidden": 8}
    ),
    "both_ways": Pattern(zoo.recurrent(nn.RNN, bidirectional=True, bias=False), TOKENS, CORE),
    "lstm": Pattern(zoo.recurrent(nn.LSTM, num_layers=2), TOKENS, CORE, counts=False),
    "projected": Pattern(
        zoo.recurrent(nn.LSTM, proj_size=5, bidirectional=True),
        TOKENS,
        {"embed": 6, "core#2": 5, "hidden": 8},
        counts=False,
    ),
    "gru_cell": Pattern(lambda: zoo.Stepped(nn.GRUCell), TOKENS, {"embed": 6, "cell": 7}),
    "lstm_cell": Pattern(lambda: zoo.Stepped(nn.LSTMCell), TOKENS, {"embed": 6, "cell": 7}),
    "gathered": Pattern(lambda: zoo.Picking(zoo.gathered), TOKENS, {"embed": 8, "hidden": 7}),
    "taken": Pattern(
        lambda: zoo.Picking(lambda x, s: torch.take_along_dim(x, s.argsort(1)[:, :3, None], 1)),
        TOKENS,
        {"embed": 8, "hidden": 7},
    ),
    "prototypes": Pattern(zoo.Prototypes, TOKENS, {"embed": 8}),
    "three_factors": Pattern(
        lambda: zoo.ThreeFactors("btc,btc,btc->btc"), TOKENS, {"layers.0": 8}
    ),
    "three_matrices": Pattern(
        lambda: zoo.ThreeFactors("btc,bsc,bsd->btd"), TOKENS, {"layers.0": 8, "layers.2": 8}
    ),
    "strict": Pattern(
        zoo.Strict, IMAGES, {"first.conv": 6, "second.conv": 8}, ("first", "second")
    ),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_are_open_and_prune_exactly_on_any_batch(name: str, tmp_path: Path) -> None:
    pattern = PATTERNS[name]
    torch.manual_seed(0)
    model = pattern.build().eval().requires_grad_(False)
    settle(model)
    outputs(model, draw(pattern.shape, 2))  # a hook may compute weights
    graph = trace(model, draw(pattern.shape, 2))
    assert {group.name: group.size for group in graph.open_groups} == pattern.opened
    assert tuple(graph.recorded) == pattern.recorded
    thirds = {g.name: tuple(range(0, g.size, 3)) for g in graph.open_groups}
    for plan in (PruningPlan(), half(graph), PruningPlan(thirds)):
        small = prune(model, graph, plan)
        if pattern.counts:
            assert graph.cost(plan) == counted(small, draw(pattern.shape, 1))
        save(tmp_path, small, plan)
        for batch in (1, 2, 5):
            inputs = draw(pattern.shape, batch)
            expected = masked_outputs(model, graph, plan, inputs)
            assert difference(expected, outputs(small, inputs)) < 1e-5
            assert difference(expected, outputs(load(tmp_path, pattern.build), inputs)) < 1e-5
            values = Execution(graph, plan).run(small, inputs)
            assert difference(expected, [values[name] for name in graph.program.outputs]) < 1e-5


class Cached(nn.Module):
    """Returns, beside its logits, an object that torch cannot look into (a cache of keys)."""

    class Cache:
        def __init__(self, keys: Tensor) -> None:
            self.keys = keys

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        hidden = F.relu(self.hidden(x))
        return {"logits": self.out(hidden), "cache": self.Cache(hidden)}


def test_what_a_network_returns_beside_tensors_is_passed_over() -> None:
    torch.manual_seed(0)
    model, inputs = Cached().eval(), torch.randn(2, 4)
    graph = trace(model, inputs)
    assert {group.name: group.size for group in graph.open_groups} == {"hidden": 8}
    small = prune(model, graph, half(graph))
    expected = masked_outputs(model, graph, half(graph), inputs)
    assert difference(expected, outputs(small, inputs)) < 1e-5
    assert isinstance(small(inputs)["cache"], Cached.Cache)


class Hidden(nn.Module):
    """Residual blocks that read a mask beside the stream, which they cast and reshape."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 11), nn.Linear(11, 8)

        def forward(self, x: Tensor, mask: Tensor) -> Any:
            flat = x.float().reshape(-1, x.shape[-1])
            flat = flat + self.down(F.relu(self.up(flat)) * mask.reshape(-1, 1))
            return flat.view(x.shape)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(4, 8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        mask = (x[..., :1] > 0).float()
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.out(x)


def test_blocks_that_read_a_mask_are_removable() -> None:
    torch.manual_seed(0)
    model, inputs = Hidden().eval(), draw(TOKENS, 3)
    graph = trace(model, inputs)
    assert tuple(graph.blocks) == ("blocks.0", "blocks.1")
    small = prune(model, graph, PruningPlan(removed=("blocks.0",)))
    model.blocks[0].down.requires_grad_(False).weight.zero_()  # type: ignore[operator, union-attr]
    model.blocks[0].down.bias.zero_()  # type: ignore[operator, union-attr]
    assert difference(outputs(model, inputs), outputs(small, inputs)) < 1e-6


class Selected(nn.Module):
    """Picks as many tokens as a value says."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.out(x[x[..., 0] > 0])


def test_sizes_that_depend_on_values_are_one_clear_sentence() -> None:
    with pytest.raises(UnsupportedModel, match="whose size depends on values"):
        trace(Selected(), draw(TOKENS, 2))


def test_networks_without_values_are_one_clear_sentence() -> None:
    with pytest.raises(UnsupportedModel, match=r"weight of Linear is on the meta device"):
        trace(nn.Linear(4, 3, device="meta"), torch.randn(2, 4))
    with pytest.raises(UnsupportedModel, match="Linear is on cpu, but example inputs are on meta"):
        trace(nn.Linear(4, 3), torch.empty(2, 4, device="meta"))
