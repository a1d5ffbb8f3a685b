"""prune: a dense model and a plan in, a smaller equal model out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from paretoprune.surgery.attributes import follow_numbers, follow_weights
from paretoprune.surgery.copying import copied
from paretoprune.surgery.graph import PruningGraph
from paretoprune.surgery.plan import PruningPlan
from paretoprune.surgery.record import Recorded
from paretoprune.surgery.resize import padded_widths
from paretoprune.surgery.skip import Skip


def prune(model: nn.Module, graph: PruningGraph, plan: PruningPlan) -> nn.Module:
    """Returns a new module without the units and blocks that the plan does not keep.

    Every parameter and buffer is copied once, already at its new size; nothing is shared with
    the input, which is left untouched.

    Args:
        model: The dense network that `graph` was traced from (weights may differ).
        graph: From `trace`.
        plan: What to keep.

    Raises:
        ValueError: If the plan does not fit the network.
    """
    mask = graph.kept_mask(plan)
    keep = _kept_positions(graph, mask)
    memo: dict[int, Any] = {}
    for name in plan.removed:
        memo[id(model.get_submodule(name))] = Skip().train(model.training)
    aliases: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        if not _inside(name, plan.removed) or id(tensor) in tensors:
            aliases.setdefault(id(tensor), []).append(name)
            tensors[id(tensor)] = tensor
    touched: list[str] = []
    for key, tensor in tensors.items():
        cuts = [keep[name] for name in aliases[key] if name in keep]
        memo[key] = _sliced(tensor, cuts)
        touched += aliases[key] if cuts else []
    small = copied(model, memo)
    _follow(small, graph, mask, plan, touched)
    for name, recording in graph.recorded.items():
        if name in plan.removed or _inside(name, plan.removed):
            continue
        if any(parameter.startswith(f"{name}.") for parameter in touched):
            module = small.get_submodule(name)
            small.set_submodule(name, Recorded(module, recording.resized(graph, mask)))
    _forget_caches(small)
    return small


def _forget_caches(small: nn.Module) -> None:
    """Makes modules forget what they keep for evaluation, which has the dense sizes.

    Such modules (LeViT's attention keeps its gathered biases) forget it when training begins.
    """
    for module in small.modules():
        if type(module).train is not nn.Module.train:
            modes = [(inner, inner.training) for inner in module.modules()]
            module.train(True)
            module.train(False)
            for inner, mode in modes:
                inner.training = mode


def _inside(name: str, blocks: tuple[str, ...]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def _kept_positions(graph: PruningGraph, mask: Tensor) -> dict[str, dict[int, Tensor]]:
    """Returns, by parameter and axis, the positions that stay, where any goes."""
    keep: dict[str, dict[int, Tensor]] = {}
    lines: dict[int, Tensor | None] = {}  # many axes share one line of units
    for (name, axis), units in graph.units.items():
        if id(units) not in lines:
            kept = mask[units]
            lines[id(units)] = None if bool(kept.all()) else kept.nonzero().squeeze(1)
        positions = lines[id(units)]
        if positions is not None:
            keep.setdefault(name, {})[axis] = positions
    return keep


def _sliced(tensor: Tensor, cuts: list[dict[int, Tensor]]) -> Tensor:
    data = tensor.detach()
    axes = {axis: positions for cut in cuts for axis, positions in cut.items()}
    for axis, positions in axes.items():
        data = data.index_select(axis, positions.to(data.device))
    if not axes:
        data = data.clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(data, requires_grad=tensor.requires_grad)
    return data


def _follow(
    small: nn.Module,
    graph: PruningGraph,
    mask: Tensor,
    plan: PruningPlan,
    touched: Sequence[str],
) -> None:
    modules = dict(small.named_modules(remove_duplicate=False))
    for name in dict.fromkeys(parameter.rpartition(".")[0] for parameter in touched):
        if name in modules:
            follow_weights(modules[name])
    for name, numbers in graph.numbers.items():
        if _inside(f"{name}.", plan.removed):
            continue
        sizes: dict[int, set[int]] = {}
        for number in numbers:
            sizes.setdefault(number.value, set()).add(number.kept(mask))
        follow_numbers(small.get_submodule(name), sizes, _sequences(graph, name, mask))
    for name, (dim, units) in graph.pads.items():
        if _inside(f"{name}.", plan.removed):
            continue
        pad: Any = small.get_submodule(name)
        pad.padding = tuple(padded_widths(pad.padding, dim, mask[units]))


def _sequences(
    graph: PruningGraph, module: str, mask: Tensor
) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Returns what the sizes of the parts become, for every split in a module's code."""
    sequences = {}
    for name, cut in graph.cuts.items():
        if graph.program.nodes[name].module == module:
            sequences[_differences(cut.stops)] = _differences(cut.kept(mask))
    return sequences


def _differences(stops: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in pairwise(stops))


def masked_tensors(model: nn.Module, graph: PruningGraph, plan: PruningPlan) -> dict[str, Tensor]:
    """Returns the dense parameters and buffers with every unit that goes zeroed in all slices.

    `torch.func.functional_call(model, masked, inputs)` then computes what the pruned network
    does: the oracle of surgery.

    Raises:
        ValueError: If the plan does not fit the network.
    """
    mask = graph.kept_mask(plan)
    masked = {
        name: tensor.detach().clone()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    with torch.no_grad():
        for (name, axis), units in graph.units.items():
            gone = (~mask[units]).nonzero().squeeze(1)
            if gone.numel() and name in masked:
                masked[name].index_fill_(axis, gone.to(masked[name].device), 0)
    return masked
