"""prune: a dense model and a plan in, a smaller equal model out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from paretoprune.surgery.attention import forget_dense_widths
from paretoprune.surgery.attributes import (
    follow_numbers,
    follow_weights,
    has_numbers,
    size_attributes,
)
from paretoprune.surgery.copying import copied
from paretoprune.surgery.graph import PruningGraph
from paretoprune.surgery.groups import layer_of
from paretoprune.surgery.plan import PruningPlan
from paretoprune.surgery.recorded import Recorded
from paretoprune.surgery.resize import padded_widths, viewed
from paretoprune.surgery.skip import Skip

_AT_ONCE = 2**18
"""Elements of whole rows that wait for their columns to be taken: they fit a cache."""


def prune(model: nn.Module, graph: PruningGraph, plan: PruningPlan) -> nn.Module:
    """Returns a new module without the units and blocks that the plan does not keep.

    Every parameter and buffer is copied once, already at its new size; nothing is shared with
    the input, which is left untouched.

    Args:
        model: The dense network that `graph` was traced from (weights may differ).
        graph: From `trace`.
        plan: What to keep.

    Raises:
        ValueError: If the plan does not fit the network, or the graph is one of another network.
    """
    mask = graph.kept_mask(plan)
    keep = _kept_positions(graph, mask)
    _demand_traced(model, graph, keep)
    removed = [model.get_submodule(name) for name in plan.removed]
    memo: dict[int, Any] = {id(block): Skip().train(model.training) for block in removed}
    outside = modules_outside(model, removed)
    aliases: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for module_name, module in outside.items():
        prefix = f"{module_name}." if module_name else ""
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                aliases.setdefault(id(tensor), []).append(prefix + key)
                tensors[id(tensor)] = tensor
    touched: list[str] = []
    for identity, tensor in tensors.items():
        cuts = [keep[name] for name in aliases[identity] if name in keep]
        memo[identity] = _sliced(tensor, cuts)
        if cuts:
            touched += aliases[identity]
    small = copied(model, memo)
    copies = {name: memo[id(module)] for name, module in outside.items()}
    _follow(copies, graph, mask, touched)
    for name, recording in graph.recorded.items():
        if name in copies and any(parameter.startswith(f"{name}.") for parameter in touched):
            runner = Recorded(copies[name], recording.resized(graph, mask))
            replace_module(small, name, runner)
    if touched:
        forget_dense_widths(copies.values())
    _forget_caches(copies.values())
    return small


def _forget_caches(modules: Iterable[nn.Module]) -> None:
    """Makes modules forget what they keep for evaluation, which has the dense sizes.

    Such modules (LeViT's attention keeps its gathered biases) forget it when training begins.
    """
    for module in modules:
        if type(module).train is not nn.Module.train:
            modes = [(inner, inner.training) for inner in module.modules()]
            module.train(True)
            module.train(False)
            for inner, mode in modes:
                inner.training = mode


def modules_outside(model: nn.Module, blocks: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Returns what is left of a network without some of its modules, under all its names.

    A module may be registered in several places; it is outside if any of them is.

    Args:
        model: The network.
        blocks: Modules of it that go, wherever they are registered.
    """
    gone = {id(block) for block in blocks}
    inside: set[str] = set()
    outside = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in gone or (name and name.rpartition(".")[0] in inside):
            inside.add(name)
        else:
            outside[name] = module
    return outside


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts another module where one is, in all places where it is registered.

    Args:
        model: The network, changed in place.
        name: Any of the module's names.
        new: What stands there from now on.

    Raises:
        AttributeError: If there is no such module.
        ValueError: If it is the network itself.
    """
    old = model.get_submodule(name)
    if old is model:
        raise ValueError("a network cannot be replaced within itself")
    for module in [*model.modules()]:
        for key, child in module._modules.items():
            if child is old:
                module._modules[key] = new


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


def _demand_traced(model: nn.Module, graph: PruningGraph, keep: Mapping[str, Any]) -> None:
    """Raises `ValueError` if what loses units is not there, or has another size."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, axes in keep.items():
        there = tensors.get(name)
        for axis in axes:
            wanted = len(graph.units[name, axis])
            size = there.shape[axis] if there is not None and axis < there.ndim else None
            if size != wanted:
                found = "no such tensor" if there is None else f"shape {tuple(there.shape)}"
                raise ValueError(
                    f"the graph is that of another network: {name} has {wanted} channels along "
                    f"axis {axis}, but {type(model).__name__} has {found}; trace this one."
                )


def _sliced(tensor: Tensor, cuts: list[dict[int, Tensor]]) -> Tensor:
    axes = {axis: positions for cut in cuts for axis, positions in cut.items()}
    data = _selected(tensor.detach(), axes) if axes else tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(data, requires_grad=tensor.requires_grad)
    return data


def _selected(data: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    """Returns the positions of a tensor that stay, by axis."""
    axes = {axis: positions.to(data.device) for axis, positions in axes.items()}
    if axes.keys() != {0, 1}:
        for axis, positions in axes.items():
            data = data.index_select(axis, positions)
        return data
    rows, columns = axes[0], axes[1]
    result = data.new_empty(len(rows), len(columns), *data.shape[2:])
    at_once = max(1, _AT_ONCE * len(data) // max(1, data.numel()))
    for some, place in zip(rows.split(at_once), result.split(at_once), strict=True):
        torch.index_select(data.index_select(0, some), 1, columns, out=place)
    return result


def _follow(
    copies: Mapping[str, nn.Module], graph: PruningGraph, mask: Tensor, touched: Sequence[str]
) -> None:
    """Rewrites what the modules of the copy, by name, say about their sizes."""
    for name in dict.fromkeys(map(layer_of, touched)):
        follow_weights(copies.get(name, copies[""]))  # a parameter of the network itself
    numbered = [name for name in graph.numbers if name in copies and has_numbers(copies[name])]
    written = {name: size_attributes(copies[name]) for name in numbered}
    for name in numbered:
        numbers = graph.numbers[name]
        sizes: dict[int, set[int]] = {}
        for number in numbers:
            sizes.setdefault(number.value, set()).add(number.kept(mask))
        alike = [other for other in numbered if type(copies[other]) is type(copies[name])]

        def own(attribute: str, name: str = name, alike: Sequence[str] = alike) -> int | None:
            return _own_size(attribute, name, alike, written, copies, graph)

        several = any(isinstance(value, tuple) for value in written[name].values())
        sequences = _sequences(graph, name, mask) if several else {}
        follow_numbers(copies[name], sizes, sequences, own)
    for name, (dim, units) in graph.pads.items():
        if name in copies:
            pad: Any = copies[name]
            pad.padding = tuple(padded_widths(pad.padding, dim, mask[units]))


def _own_size(
    attribute: str,
    name: str,
    alike: Sequence[str],
    written: Mapping[str, Mapping[str, Any]],
    copies: Mapping[str, nn.Module],
    graph: PruningGraph,
) -> int | None:
    """Returns what an attribute becomes that is a size of its module's own tensors.

    Several axes may be as long in one module, but hardly in all that are alike.

    Args:
        attribute: Name of the attribute.
        name: The module.
        alike: Modules of its class.
        written: The attributes that all had in the dense network.
        copies: Modules of the pruned network by name.
        graph: From `trace`.
    """
    common: set[tuple[str, int]] | None = None
    for other in alike:
        module = copies[other]
        found = {
            (key, axis)
            for key, tensor in (*module._parameters.items(), *module._buffers.items())
            for axis, size in enumerate(() if tensor is None else tensor.shape)
            if len(graph.units.get((f"{other}.{key}", axis), range(size)))
            == written[other].get(attribute)
        }
        common = found if common is None else common & found
    tensors = {**copies[name]._parameters, **copies[name]._buffers}
    sizes = {tensors[key].shape[axis] for key, axis in common or ()}  # type: ignore[union-attr]
    return sizes.pop() if len(sizes) == 1 else None


def _sequences(
    graph: PruningGraph, module: str, mask: Tensor
) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Returns what lists of sizes in a module's code become: those of splits and of views."""
    sequences: dict[tuple[int, ...], tuple[int, ...]] = {}
    for name in (*graph.cuts, *graph.layouts):
        node = graph.program.nodes[name]
        if node.module != module:
            continue
        if name in graph.cuts:
            cut = graph.cuts[name]
            sequences[_differences(cut.stops)] = _differences(cut.kept(mask))
        elif (sizes := viewed(graph, node, mask)) is not None:
            for first in range(2):  # code writes the size of the batch apart
                old = sizes[0][first:]
                if len(old) > 2 or node.operator == "unflatten":  # two are often those of an image
                    sequences.setdefault(old, sizes[1][first:])  # a split's parts are known better
    return sequences


def _differences(stops: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in pairwise(stops))


def masked_tensors(model: nn.Module, graph: PruningGraph, plan: PruningPlan) -> dict[str, Tensor]:
    """Returns the dense parameters and buffers with every unit that goes zeroed in all slices.

    Those that something is divided by stay as they are (`graph.divisors`).
    `torch.func.functional_call(model, masked, inputs)` then computes what the pruned network
    does: the oracle of surgery. Where a module is registered twice, pass `tie_weights=False`, or
    torch leaves the zeros in the model.

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
            if gone.numel() and name in masked and (name, axis) not in graph.divisors:
                masked[name].index_fill_(axis, gone.to(masked[name].device), 0)
    return masked
