"""What surgery must agree with, computed another way."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.convnext import LayerNorm2d

from paretoprune.surgery import Cost, PrunableGroup, PruningGraph, PruningPlan
from paretoprune.surgery.check import masked_outputs as surgery_masked_outputs


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Returns the tensors that a network returns, without gradients."""
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(call(model, inputs)) if isinstance(leaf, Tensor)]


def call(model: nn.Module, inputs: Any) -> Any:
    """Returns what the network returns for a tensor, tuple or dict of inputs."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def difference(expected: list[Tensor], actual: list[Tensor]) -> float:
    """Returns the largest difference relative to the largest expected value of each output."""
    assert [a.shape for a in expected] == [b.shape for b in actual]
    return max(
        ((a - b).abs().max() / a.abs().max().clamp_min(1e-12)).item()
        for a, b in zip(expected, actual, strict=True)
    )


def masked(model: nn.Module, graph: PruningGraph, plan: PruningPlan) -> nn.Module:
    """Returns a dense copy with all slices of the units that go set to zero."""
    dense = copy.deepcopy(model)
    tensors = dict([*dense.named_parameters(), *dense.named_buffers()])
    for name, kept in plan.kept.items():
        for item in graph.groups[name].slices:
            if (item.parameter, item.axis) in graph.divisors:
                continue
            gone = [p for unit, at in enumerate(item.indices) if unit not in kept for p in at]
            tensors[item.parameter].detach().index_fill_(item.axis, torch.tensor(gone).long(), 0)
    return dense


def masked_outputs(
    model: nn.Module, graph: PruningGraph, plan: PruningPlan, inputs: Any
) -> list[Tensor]:
    """Returns the outputs of the dense network with units masked and blocks passed by.

    Norms over masked units average over those that stay: their modules run on these alone. Where
    no weight of a module tells which these are, surgery's own oracle computes them.
    """
    dense = masked(model, graph, plan)
    tensors = dict(dense.named_parameters())
    for name in plan.removed:
        dense.get_submodule(name).register_forward_hook(lambda *call: call[1][0])
    for name in {module for group in plan.kept for module in graph.groups[group].statistics}:
        if f"{name}.weight" not in tensors:
            assert not plan.removed, "surgery's oracle leaves blocks in"
            return surgery_masked_outputs(model, graph, plan, inputs)
        gone = _gone(graph, plan, f"{name}.weight")
        kept = [unit for unit in range(len(tensors[f"{name}.weight"])) if unit not in gone]
        _run_on(dense.get_submodule(name), torch.tensor(kept))
    with unfused():
        return outputs(dense, inputs)


def _gone(graph: PruningGraph, plan: PruningPlan, parameter: str) -> set[int]:
    return {
        position
        for name, kept in plan.kept.items()
        for item in graph.groups[name].slices
        if item.parameter == parameter
        for unit, positions in enumerate(item.indices)
        if unit not in kept
        for position in positions
    }


def _run_on(norm: Any, kept: Tensor) -> None:
    """Makes a norm read and write some of its channels alone, in place; others become zero."""
    small = copy.copy(norm)
    small._parameters = {
        name: None if tensor is None else nn.Parameter(tensor[kept])
        for name, tensor in norm._parameters.items()
    }
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        small.normalized_shape = (len(kept),)
    if isinstance(norm, nn.GroupNorm):
        small.num_channels = len(kept)
    dim = 1 if isinstance(norm, (nn.GroupNorm, LayerNorm2d)) else -1

    def forward(x: Tensor) -> Tensor:
        result = type(norm).forward(small, x.index_select(dim, kept))
        return torch.zeros_like(x).index_copy(dim, kept, result)

    norm.forward = forward


@contextmanager
def unfused() -> Iterator[None]:
    """Runs torch's transformer layers module by module, as in training."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def counted(model: nn.Module, inputs: Any) -> Cost:
    """Returns the cost that torch counts for one example, and all parameters."""
    with unfused(), FlopCounterMode(display=False) as counter:
        outputs(model, inputs)
    batch = len(tree_leaves(inputs)[0])
    macs, rest = divmod(counter.get_total_flops(), 2 * batch)
    assert rest == 0
    return Cost(macs=macs, params=sum(parameter.numel() for parameter in model.parameters()))


def plans(graph: PruningGraph) -> st.SearchStrategy[PruningPlan]:
    """Draws plans over the open groups and the blocks."""

    def keep(group: PrunableGroup) -> st.SearchStrategy[tuple[int, ...]]:
        least = 2 if group.statistics else 1  # a norm of one channel is little more than its sign
        return st.sets(st.integers(0, group.size - 1), min_size=least).map(
            lambda units: tuple(sorted(units))
        )

    kept = st.fixed_dictionaries({}, optional={g.name: keep(g) for g in graph.open_groups})
    blocks = sorted(graph.blocks)
    removed = st.sets(st.sampled_from(blocks)) if blocks else st.just(set[str]())
    return st.builds(lambda kept, removed: PruningPlan(kept, tuple(removed)), kept, removed)


def carried_over(graph: PruningGraph, first: PruningPlan, again: PruningGraph) -> set[str]:
    """Returns the groups that are the same ones in a pruned network as in the dense one.

    Others may be: a depthwise convolution of one channel is a plain one, and parts of unequal size
    that become equal are coupled from then on.
    """

    def places(group: PrunableGroup) -> set[tuple[str, int, int]]:
        return {(item.parameter, item.axis, len(item.indices[0])) for item in group.slices}

    return {
        group.name
        for group in again.open_groups
        if (dense := graph.groups.get(group.name)) is not None
        and dense.frozen is None
        and group.size == len(first.kept.get(group.name, range(dense.size)))
        and places(group) <= places(dense)
    }


def half(graph: PruningGraph) -> PruningPlan:
    """Returns the plan that keeps every second unit."""
    return PruningPlan({g.name: tuple(range(0, g.size, 2)) for g in graph.open_groups})


def state(model: nn.Module) -> dict[str, Any]:
    """Returns copies of everything about a network that surgery must leave untouched."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "tensors": {name: (id(tensor), tensor.detach().clone()) for name, tensor in tensors},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in tensors},
        "required": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: (list(module._forward_hooks), list(module._forward_pre_hooks))
            for name, module in model.named_modules()
        },
        "attributes": {name: repr(module) for name, module in model.named_modules()},
    }


def same(a: Any, b: Any) -> bool:
    """Whether two values of `state` are equal, tensors bit by bit."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)


def loss(result: Any) -> Tensor:
    """Returns a scalar that depends on everything the network returns."""
    leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return torch.stack([F.mse_loss(leaf, torch.ones_like(leaf)) for leaf in leaves]).sum()
