"""trace finds the groups of every network, freezes what it cannot follow, and touches nothing."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d

from paretoprune.criteria import differentiable
from paretoprune.surgery import PruningPlan, UnsupportedModel, prune, trace
from paretoprune.surgery.trial_plans import half_plan, trial_plans
from tests.unit.surgery.oracles import (
    call,
    counted,
    difference,
    half,
    loss,
    masked_outputs,
    outputs,
    same,
    state,
)
from tests.unit.surgery.specimen import settle
from tests.unit.surgery.specimens import ZOO, traced

everything = pytest.mark.parametrize("name", ZOO)


@everything
def test_groups_and_blocks_are_the_expected_ones(name: str) -> None:
    graph = traced(name)[1]
    assert {group.name: group.size for group in graph.open_groups} == ZOO[name].opened
    frozen = {group.name: group.frozen or "" for group in graph.groups.values() if group.frozen}
    assert frozen.keys() == ZOO[name].frozen.keys()
    for group, reason in ZOO[name].frozen.items():
        assert reason in frozen[group]
    assert tuple(graph.blocks) == ZOO[name].blocks
    assert tuple(graph.recorded) == ZOO[name].recorded
    averages = {group.name: group.statistics for group in graph.open_groups if group.statistics}
    assert averages == ZOO[name].statistics


@everything
def test_slices_lie_inside_the_parameters_and_do_not_overlap(name: str) -> None:
    model, graph = traced(name)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    seen: set[tuple[str, int, int]] = set()
    for group in graph.groups.values():
        for item in group.slices:
            assert len(item.indices) == group.size
            assert len({len(positions) for positions in item.indices}) == 1
            for position in (p for positions in item.indices for p in positions):
                assert 0 <= position < tensors[item.parameter].shape[item.axis]
                assert (item.parameter, item.axis, position) not in seen
                seen.add((item.parameter, item.axis, position))


@everything
def test_the_dense_cost_is_the_one_torch_counts(name: str) -> None:
    model, graph = traced(name)
    assert graph.cost() == counted(model, ZOO[name].inputs())


@everything
def test_a_graph_pickles(name: str) -> None:
    graph = traced(name)[1]
    again = pickle.loads(pickle.dumps(graph))
    assert again.groups == graph.groups
    assert again.blocks == graph.blocks
    assert again.cost(half(graph)) == graph.cost(half(graph))


@everything
def test_the_model_is_left_untouched(name: str) -> None:
    model = ZOO[name].network().train()
    inputs = ZOO[name].inputs(4)
    loss(call(model, inputs)).backward()
    next(model.children()).eval()
    next(model.parameters()).requires_grad_(False)
    hook = next(model.children()).register_forward_hook(lambda *_: None)
    before, random = state(model), torch.get_rng_state()
    trace(model, inputs)
    assert same(state(model), before)
    assert torch.equal(torch.get_rng_state(), random)
    hook.remove()


def test_tracing_is_deterministic() -> None:
    model, graph = traced("residual")
    again = trace(model, ZOO["residual"].inputs())
    assert again.groups == graph.groups
    assert list(again.groups) == list(graph.groups)
    assert list(again.blocks) == list(graph.blocks)


@pytest.mark.parametrize("batch", [1, 3])
def test_groups_and_costs_do_not_depend_on_the_batch(batch: int) -> None:
    for name in ("residual", "shuffled", "tokens", "attention", "unflattened"):
        model, graph = traced(name)
        again = trace(model, ZOO[name].inputs(batch))
        assert [(g.name, g.slices) for g in again.groups.values()] == [
            (g.name, g.slices) for g in graph.groups.values()
        ]
        assert again.cost(half(graph)) == graph.cost(half(graph))


def test_a_tied_parameter_counts_once_under_its_first_name() -> None:
    graph = traced("called_twice")[1]
    names = {item.parameter for group in graph.groups.values() for item in group.slices}
    assert "first.weight" in names
    assert "second.weight" not in names


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x if x.sum() > 0 else -x


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Any:
        raise KeyError("no such thing")


@pytest.mark.parametrize("model", [Branching(), Failing()], ids=["branching", "failing"])
def test_what_export_refuses_is_one_clear_sentence(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModel, match=rf"cannot trace {type(model).__name__}.*; wrap"):
        trace(model, torch.randn(2, 3))


class WithoutGradients(nn.Module):
    """A stem that is run without gradients, and zeros of another value's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden, self.out = nn.Linear(4, 6), nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            x = torch.relu(self.stem(x))
        x = self.hidden(x)
        return self.out(torch.where(x > 0, x, torch.zeros_like(x)))


def test_code_that_switches_gradients_off_is_followed() -> None:
    graph = trace(WithoutGradients(), torch.randn(2, 4))
    assert {group.name: group.size for group in graph.open_groups} == {"stem": 6, "hidden": 7}


class Labelled(nn.Module):
    """Returns the best class alone."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        return self.out(F.relu(self.hidden(x))).argmax(1)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (Labelled(), r"^Labelled returns no floating-point tensor, .*; trace a module that"),
        (nn.Sequential(nn.LazyLinear(3)), r"^0.weight of Sequential has no shape yet; run one"),
        (nn.DataParallel(nn.Linear(4, 3)), r"^DataParallel .* inside, its attribute module\.$"),
        (torch.compile(nn.Linear(4, 3)), r"^OptimizedModule .*its attribute _orig_mod\.$"),
    ],
    ids=["labels", "lazy", "parallel", "compiled"],
)
def test_what_cannot_be_compared_or_is_no_network_yet_is_one_clear_sentence(
    model: Any, sentence: str
) -> None:
    with pytest.raises(UnsupportedModel, match=sentence):
        trace(model, torch.randn(2, 4))


def test_a_network_that_trains_on_several_devices_names_the_one_inside(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Linear(4, 3))
        with pytest.raises(UnsupportedModel, match=r"inside, its attribute module\.$"):
            trace(wrapped, torch.randn(2, 4))
    finally:
        torch.distributed.destroy_process_group()


class Cast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            return self.out(x)


def test_a_graph_inside_the_graph_is_one_clear_sentence() -> None:
    with pytest.raises(UnsupportedModel, match=r"Cast runs a graph inside its graph .*autocast"):
        trace(Cast(), torch.randn(2, 3))


class Narrow(nn.Module):
    """Layers of one channel, an unused layer, a constant and numbers among the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(4, 1), nn.Linear(1, 3), nn.Linear(3, 2)
        self.unused = nn.Linear(5, 5)

    def forward(self, x: Tensor, scale: float = 1.0, shift: Tensor | None = None) -> Any:
        x = self.two(torch.relu(self.one(x)) * scale + torch.arange(1.0))
        return self.out(x if shift is None else x + shift)


@pytest.mark.parametrize(
    "inputs", [torch.randn(2, 4), (torch.randn(2, 4), 2.0, None), {"x": torch.randn(2, 4)}]
)
def test_optional_arguments_constants_and_single_channels(inputs: Any) -> None:
    graph = trace(Narrow(), inputs)
    assert {group.name: group.size for group in graph.open_groups} == {"two": 3}
    assert graph.cost().params == sum(p.numel() for p in Narrow().parameters())


class Skip(nn.Module):
    """A residual block around a branch that reads a parameter of its neighbour."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Any:
        return x + self.norm(torch.relu(self.conv(x)))


def test_blocks_that_share_a_parameter_are_not_removable() -> None:
    shared = nn.Conv2d(6, 6, 3, 1, 1)
    alone = Skip(nn.Conv2d(6, 6, 3, 1, 1))
    layers = [Skip(shared), Skip(shared), alone, nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(nn.Conv2d(3, 6, 1), *layers, nn.Linear(6, 2))
    settle(model)
    assert tuple(trace(model, torch.randn(2, 3, 8, 8)).blocks) == ("3",)


class Shifted(nn.Module):
    """A ReLU block behind values whose sign a number in the code decides."""

    def __init__(self, shift: float, factor: float) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)
        self.block = self.Block()
        self.shift, self.factor = shift, factor

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 6, 3, 1, 1)

        def forward(self, x: Tensor) -> Any:
            return torch.relu(x + self.conv(x))

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.stem(x)) * self.factor + self.shift
        return self.head(self.block(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("shift", "factor", "removable"), [(1.0, 2.0, True), (-1e-9, 1.0, False), (0.0, -1e-9, False)]
)
def test_numbers_in_the_code_decide_whether_a_value_can_be_negative(
    shift: float, factor: float, removable: bool
) -> None:
    graph = trace(Shifted(shift, factor), torch.randn(2, 3, 8, 8))
    assert bool(graph.blocks) == removable


class OneWidth(nn.Module):
    """Four layers of equal width and one attribute for it, which two places in the code read."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 16
        sizes = (3, 16, 16, 16)
        self.layers = nn.ModuleList(nn.Conv2d(size, 16, 3, padding=1) for size in sizes)
        self.out = nn.Linear(16, 5)

    def norm(self, x: Tensor) -> Tensor:
        flat = x.view(x.shape[0], self.width, -1)
        flat = (flat - flat.mean(2, keepdim=True)) / (flat.std(2, keepdim=True) + 1e-5)
        return flat.view_as(x)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm(self.layers[0](x)))
        x = F.relu(self.layers[2](F.relu(self.layers[1](x))))
        return self.out(F.relu(self.norm(self.layers[3](x))).mean((2, 3)))


class Compared(nn.Module):
    """A shortcut that is taken when shapes happen to be equal."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        layers = [nn.Conv2d(32, 24, 3) if i == 0 else nn.Conv2d(24, 24, 1) for i in range(7)]
        self.others, self.out = nn.Sequential(*layers), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.first(x))
        y = F.relu(self.second(x))
        y = y + x if y.shape == x.shape else y
        return self.out(self.others(y).mean((2, 3)))


class Together(nn.Module):
    """A table that is right only while two layers lose the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 16)
        self.between = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.table, self.out = nn.Parameter(torch.randn(5, 16)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.between(F.relu(self.first(x) + self.table))
        return self.out(F.relu(self.second(x)[:, :3] + self.table[:3]).mean(1))


@pytest.mark.parametrize(
    ("build", "shape", "plans"),
    [
        (
            OneWidth,
            (3, 8, 8),
            [{"layers.0": 8, "layers.3": 8}, {"layers.0": 8}, {"layers.0": 8, "layers.3": 12}],
        ),
        (Compared, (3, 8, 8), [{"first": 12, "second": 12}, {"second": 16}, {"first": 12}]),
        (Together, (5, 6), [{"first": 8, "second": 8}, {"first": 8}, {"second": 8}]),
    ],
)
def test_what_is_right_by_luck_in_some_plans_is_not_left_open(
    build: Any, shape: tuple[int, ...], plans: list[dict[str, int]]
) -> None:
    torch.manual_seed(0)
    model, inputs = build().eval(), torch.randn(2, *shape)
    graph = trace(model, inputs)
    is_open = {group.name for group in graph.open_groups}
    for counts in plans:
        kept = {name: tuple(range(count)) for name, count in counts.items() if name in is_open}
        plan = PruningPlan(kept)
        found = outputs(prune(model, graph, plan), inputs)
        assert difference(masked_outputs(model, graph, plan, inputs), found) < 1e-5


class Scaled(nn.Module):
    """Scales by the width of its input, which matters little, beside code that casts."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.stem, self.mix = nn.Linear(4, 16), nn.Linear(6, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor, step: Tensor) -> Any:
        angles = step[:, None].float() * torch.arange(4).to(torch.float32) * 0.01
        x = self.stem(x) + self.time(angles)
        return self.out(x + F.relu(self.mix(x)) * x.shape[1] ** -4)


def test_errors_like_rounding_are_told_from_it_though_the_code_casts_to_single_precision() -> None:
    torch.manual_seed(0)
    graph = trace(Scaled().eval(), (torch.randn(4, 6), torch.arange(4)))
    frozen = graph.groups["stem"].frozen or ""
    assert frozen.startswith("the self-check failed: outputs differ by")
    assert 1e-5 < float(frozen.split()[-4]) < 1e-3, "a difference that could be rounding"
    assert torch.get_default_dtype() == torch.float32


class Sampling(nn.Module):
    """A variational autoencoder, which draws in eval mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.mean, self.spread = nn.Linear(6, 9), nn.Linear(9, 4), nn.Linear(9, 4)
        self.decode, self.out = nn.Linear(4, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.encode(x))
        mean, spread = self.mean(x), self.spread(x)
        return self.out(F.relu(self.decode(mean + spread.exp() * torch.randn_like(spread))))


def test_a_network_that_draws_random_numbers_is_compared_on_the_same_ones() -> None:
    model, inputs = Sampling(), torch.randn(2, 6)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    graph = trace(model, inputs)
    assert {"encode": 9, "decode": 8}.items() <= {
        g.name: g.size for g in graph.open_groups
    }.items()
    assert torch.equal(torch.rand(3), expected), "and the caller's numbers go on"


def test_groups_that_fail_together_do_not_take_others_with_them() -> None:
    torch.manual_seed(0)
    graph = trace(Compared().eval(), torch.randn(2, 3, 8, 8))
    frozen = {group.name: group.frozen or "" for group in graph.groups.values() if group.frozen}
    assert frozen.keys() == {"first", "second", "out"}
    assert "the self-check failed: outputs differ by" in frozen["first"]
    assert "outputs differ by 0.0" not in frozen["first"] + frozen["second"]


def test_the_trial_plans_tell_sizes_apart_and_make_them_equal() -> None:
    widths = [16, 16, 16, 16, 32, 64]
    layers = [nn.Linear(a, b) for a, b in zip([4, *widths], [*widths, 3], strict=True)]
    graph = trace(nn.Sequential(*layers), torch.randn(2, 4))
    names = [str(index) for index in range(len(widths))]
    apart, level, some = trial_plans(graph)
    assert apart == half_plan(graph, names)
    assert len({len(apart.kept[name]) for name in names[:4]}) == 4
    assert {name: len(units) for name, units in level.kept.items()} == dict.fromkeys(names, 12)
    assert len(some.kept) == 3
    assert trial_plans(graph) == [apart, level, some]


class Aliased(nn.Module):
    """Residual blocks that are registered twice, and run under their second names."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(8, 6, 3, 1, 1), nn.Conv2d(6, 8, 3, 1, 1)

        def forward(self, x: Tensor) -> Any:
            return x + self.conv2(F.relu(self.conv1(x)))

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), self.Block(), self.Block())
        self.body = nn.Sequential(*self.net.children())
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.body(x).mean((2, 3)))


def test_modules_that_are_registered_twice() -> None:
    torch.manual_seed(0)
    model, inputs = Aliased().eval(), torch.randn(2, 3, 8, 8)
    before = state(model)
    graph = trace(model, inputs)
    assert [group.name for group in graph.open_groups] == ["net.0", "net.1.conv1", "net.2.conv1"]
    assert {name: block.groups for name, block in graph.blocks.items()} == {
        "body.1": ("net.1.conv1",),
        "body.2": ("net.2.conv1",),
    }
    plan = PruningPlan({"net.0": (0, 2, 5), "net.2.conv1": (1, 2)}, ("body.1",))
    small: Any = prune(model, graph, plan)
    assert small.net[1] is small.body[1]
    assert isinstance(small.net[1], nn.Identity)
    assert small.net[2] is small.body[2]
    assert counted(small, inputs) == graph.cost(plan)
    units = PruningPlan(plan.kept)
    found = outputs(prune(model, graph, units), inputs)
    assert difference(masked_outputs(model, graph, units, inputs), found) < 1e-5
    assert same(state(model), before)


class Again(nn.Module):
    """Returns one tensor by two names, and has a norm over channels or a removable block."""

    def __init__(self, *, block: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3, 1, 1), nn.Linear(6, 2)
        self.body = Shifted.Block() if block else LayerNorm2d(6)

    def forward(self, x: Tensor) -> Any:
        x = self.head(self.body(F.relu(self.stem(x))).mean((2, 3)))
        return {"out": x, "last": x}


@pytest.mark.parametrize("block", [True, False])
def test_a_tensor_that_is_returned_twice(block: bool) -> None:
    torch.manual_seed(0)
    model, inputs = Again(block=block).eval(), torch.randn(2, 3, 8, 8)
    graph = trace(model, inputs)
    assert [group.name for group in graph.open_groups] == ["stem"]
    assert tuple(graph.blocks) == (("body",) if block else ())
    small = prune(model, graph, half(graph))
    expected = masked_outputs(model, graph, half(graph), inputs)
    assert difference(expected, outputs(small, inputs)) < 1e-5
    returned = differentiable.Outputs(model, graph, inputs)
    values = differentiable.run(graph, dict(model.state_dict()), inputs)
    assert returned(values)["last"] is returned(values)["out"]
