"""trace: finds what can be removed from a network, and proves it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paretoprune.surgery.blocks import find_blocks
from paretoprune.surgery.check import Attempt, attempt, broken, telling_copy
from paretoprune.surgery.cost import Factor, Polynomial, Term
from paretoprune.surgery.divisors import find_divisors
from paretoprune.surgery.export import export_program
from paretoprune.surgery.graph import Cut, Extent, Number, PruningGraph
from paretoprune.surgery.groups import Block, ChannelSlice, PrunableGroup, layer_of
from paretoprune.surgery.labels import Labels
from paretoprune.surgery.plan import PruningPlan
from paretoprune.surgery.program import FILLS, Node, Program
from paretoprune.surgery.prune import modules_outside
from paretoprune.surgery.record import record
from paretoprune.surgery.recorded import Recording
from paretoprune.surgery.resize import VIEWS
from paretoprune.surgery.tracer import Tracer
from paretoprune.surgery.trial_plans import trial_plans


def trace(model: nn.Module, example_inputs: Any, *, exhaustive: bool = False) -> PruningGraph:
    """Returns the prunable groups, removable blocks and costs of a network.

    The network is exported once and walked on channel labels. Then about half the units of every
    group are pruned and compared with the masked dense network, then as many of all groups, then
    some of half of the groups, and likewise the blocks; what differs is narrowed down and frozen.
    The model is left untouched.

    Args:
        model: A module that `torch.export` accepts; random or trained.
        example_inputs: A tensor, tuple of arguments or dict of keyword arguments; batch first.
        exhaustive: Whether the self-check, which costs two forward passes for each of three
            plans, goes on to lose every unit of every group once without the others, and every
            block alone.

    Raises:
        UnsupportedModel: If `torch.export` refuses the model, or it returns nothing that could be
            compared, wraps another one, or has parameters without a shape or without values.
    """
    program = export_program(model, example_inputs)
    tracer = Tracer(program, model)
    tracer.walk()
    classes, frozen = tracer.settle()
    tracer.parameter_axes(classes, frozen)
    groups, unit_of_class = _form_groups(tracer, classes, frozen)
    extents = find_blocks(program)
    inside = {name: _inside(model, name) for name in extents}
    telling = telling_copy(model)
    recorded: dict[str, Recording] = {}
    while True:  # with less that can go, the self-check tries other plans
        graph = _build(tracer, classes, groups, unit_of_class, extents, inside, recorded)
        runs, more = _try(telling, graph, example_inputs)
        if more:
            recorded |= more
            continue
        groups_broken, blocks_broken = broken(
            telling, graph, example_inputs, runs, exhaustive=exhaustive
        )
        if not groups_broken and not blocks_broken:
            return graph
        for name, reason in groups_broken.items():
            groups[name] = dataclasses.replace(groups[name], frozen=reason)
        extents = {name: e for name, e in extents.items() if name not in blocks_broken}


def _try(
    model: nn.Module, graph: PruningGraph, example_inputs: Any
) -> tuple[dict[PruningPlan, Attempt], dict[str, Recording]]:
    """Returns the attempts at the plans of the self-check, up to one that asks for recordings.

    Args:
        model: The dense network.
        graph: Its graph.
        example_inputs: Inputs of one run.
    """
    runs: dict[PruningPlan, Attempt] = {}
    for plan in trial_plans(graph):
        runs[plan] = attempt(model, graph, plan, example_inputs)
        found = _recordings(model, graph, example_inputs, runs[plan].module)
        if found:
            return runs, found
    return runs, {}


def _recordings(
    model: nn.Module, graph: PruningGraph, example_inputs: Any, path: str
) -> dict[str, Recording]:
    """Returns what must stand for code that cannot follow half of the units going.

    That is the code of the module in which the pruned network raises, and of all others of its
    class. The network's own code is not among them: what is left shall be of its class.

    Args:
        model: The dense network.
        graph: Its graph.
        example_inputs: Inputs of one run.
        path: The innermost module with code of the user's that raises; empty if none does.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    known = {id(modules[name]) for name in graph.recorded}
    if not path or id(modules[path]) in known:  # a recording follows: something else is wrong
        return {}
    alike = [name for name, module in modules.items() if type(module) is type(modules[path])]
    found = record(model, graph, alike, example_inputs)
    return {name: item for name, item in found.items() if name not in graph.recorded}


def _form_groups(
    tracer: Tracer, classes: Tensor, frozen: Mapping[int, str]
) -> tuple[dict[str, PrunableGroup], dict[str, Tensor]]:
    """Returns the groups by name, and by name the label classes of their units.

    Units with the same slices, equally often in each, and the same reason form a group.
    """
    axes = {key: classes[ids] for key, ids in tracer.axes.items()}
    n_classes = int(classes.max()) + 1
    generator = torch.Generator().manual_seed(0)
    signature = torch.zeros(n_classes, dtype=torch.int64)
    for ids in axes.values():
        signature.index_add_(0, ids, torch.full_like(ids, _hash(generator)))
    reasons = {"": 0} | {reason: _hash(generator) for reason in dict.fromkeys(frozen.values())}
    if frozen:
        why = torch.tensor([reasons[reason] for reason in frozen.values()])
        signature.index_add_(0, torch.tensor(list(frozen)), why)
    members: dict[str, Tensor] = {}
    seen = torch.zeros(n_classes, dtype=torch.bool)
    seen[0] = True
    for parameter, axis in tracer.producers:
        ids = axes[parameter, axis]
        for key in signature[ids[~seen[ids]]].unique_consecutive().tolist():
            roots = _ordered_unique(ids[(signature[ids] == key) & ~seen[ids]])
            if len(roots):
                seen[roots] = True
                members[_unused(layer_of(parameter), members)] = roots
    groups = {}
    slices = _slices(axes, list(members.values()), n_classes)
    averages = _averages(tracer, classes, members)
    producing = _producing(tracer)
    read = tracer.program.read_for_outputs()
    for (name, roots), found in zip(members.items(), slices, strict=True):
        reason = frozen.get(int(roots[0]))
        if reason is None and len(roots) == 1:
            reason = "all its channels are one unit"
        reason = reason or _kept_by_makers(found, producing, read)
        groups[name] = PrunableGroup(name, len(roots), found, reason, averages[name])
    return groups, members


def _producing(tracer: Tracer) -> dict[tuple[str, int], list[Node]]:
    """Returns the nodes of every parameter that makes channels, by (its name, their axis)."""
    nodes: dict[str, list[Node]] = {}
    for node in tracer.program.nodes.values():
        if node.kind == "parameter":
            nodes.setdefault(node.target, []).append(node)
    return {place: nodes[place[0]] for place in tracer.producers}


def _kept_by_makers(
    slices: Sequence[ChannelSlice],
    producing: Mapping[tuple[str, int], Sequence[Node]],
    read: Collection[str],
) -> str | None:
    """Returns why all that makes some channels keeps them, or None.

    Args:
        slices: Where the channels lie.
        producing: See `_producing`.
        read: Names of the values that the outputs depend on.
    """
    makers = [n for item in slices for n in producing.get((item.parameter, item.axis), ())]
    if all(node.is_buffer for node in makers):  # few criteria know what its channels are worth
        return "is made by a filter that is a buffer, which nothing trains"
    if not any(node.name in read for node in makers):
        return "reaches no output in eval mode; training may read it"
    return None


def _averages(
    tracer: Tracer, classes: Tensor, members: Mapping[str, Tensor]
) -> dict[str, tuple[str, ...]]:
    """Returns, by group, the modules that average over its units."""
    owner = torch.full((int(classes.max()) + 1,), -1, dtype=torch.int64)
    for index, roots in enumerate(members.values()):
        owner[roots] = index
    found: list[dict[str, None]] = [{} for _ in members]
    for name, (_, line) in tracer.statistics.items():
        for index in owner[classes[line]].unique().tolist():
            if index >= 0:
                found[index][tracer.program.nodes[name].module] = None
    return dict(zip(members, map(tuple, found), strict=True))


def _hash(generator: torch.Generator) -> int:
    return int(torch.randint(-(2**62), 2**62, (1,), generator=generator).item())


def _ordered_unique(ids: Tensor) -> Tensor:
    return torch.tensor(list(dict.fromkeys(ids.tolist())), dtype=torch.int64)


def _unused(name: str, taken: Mapping[str, object]) -> str:
    number, unique = 2, name
    while unique in taken:
        unique = f"{name}#{number}"
        number += 1
    return unique


def _slices(
    axes: Mapping[tuple[str, int], Tensor], members: Sequence[Tensor], n_classes: int
) -> list[tuple[ChannelSlice, ...]]:
    """Returns the slices of every group, given the label classes of its units."""
    owner = torch.full((n_classes,), -1, dtype=torch.int64)
    unit = torch.zeros(n_classes, dtype=torch.int64)
    for index, roots in enumerate(members):
        owner[roots] = index
        unit[roots] = torch.arange(len(roots))
    slices: list[list[ChannelSlice]] = [[] for _ in members]
    for (parameter, axis), ids in axes.items():
        owners = owner[ids]
        for index in owners[owners >= 0].unique().tolist():
            positions = (owners == index).nonzero().squeeze(1)
            order = unit[ids[positions]].argsort(stable=True)
            table = positions[order].reshape(len(members[index]), -1).tolist()
            slices[index].append(ChannelSlice(parameter, axis, tuple(map(tuple, table))))
    return [tuple(found) for found in slices]


def _build(
    tracer: Tracer,
    classes: Tensor,
    groups: Mapping[str, PrunableGroup],
    members: Mapping[str, Tensor],
    extents: Mapping[str, Extent],
    inside: Mapping[str, Collection[str]],
    recorded: Mapping[str, Recording],
) -> PruningGraph:
    program = tracer.program
    n_classes = int(classes.max()) + 1
    unit = torch.full((n_classes,), -1, dtype=torch.int64)
    owner = torch.full((n_classes,), -1, dtype=torch.int64)
    start = 0
    for index, group in enumerate(groups.values()):
        if group.frozen is None:
            unit[members[group.name]] = torch.arange(start, start + group.size)
            owner[members[group.name]] = index
        start += group.size
    sizes = [group.size for group in groups.values()]

    def factor(ids: Tensor) -> Factor:
        owners = owner[classes[ids]]
        counts = owners[owners >= 0].bincount(minlength=len(sizes)).tolist()
        per_unit = {i: count // sizes[i] for i, count in enumerate(counts) if count}
        return Factor(int((owners < 0).sum()), per_unit)

    names = list(extents)
    macs = [
        Term(
            term.coefficient,
            tuple(factor(ids) for ids in term.factors),
            frozenset(i for i, n in enumerate(names) if term.node in extents[n].nodes),
        )
        for term in tracer.terms
    ]

    def gone_with(parameter: str) -> frozenset[int]:
        return frozenset(i for i, n in enumerate(names) if parameter in inside[n])

    shapes = {  # by name, so that a tied parameter counts once
        node.target: node.shape
        for node in program.nodes.values()
        if node.kind == "parameter" and not node.is_buffer
    }
    params = [
        _params_term(name, shape, tracer, factor, gone_with(name))  # type: ignore[arg-type]
        for name, shape in shapes.items()
    ]
    lines: dict[tuple[int, ...], Tensor] = {}  # equal lines are one tensor: found once per plan
    units = {}
    for key, ids in tracer.axes.items():
        line = unit[classes[ids]]
        units[key] = lines.setdefault(tuple(line.tolist()), line)
    pads = {}
    for module, (dim, labels) in tracer.pads.items():
        from_last = len(labels.shape) - 1 - dim
        pads[module] = (from_last, unit[classes[labels.ids.reshape(-1)]])
    return PruningGraph(
        program,
        groups,
        {name: Block(name, _inner(inside[name], groups)) for name in names},
        units={key: value for key, value in units.items() if bool((value >= 0).any())},
        pads=pads,
        layouts=_layouts(program, tracer, unit, classes),
        extents=extents,
        numbers=_numbers(tracer, unit, classes),
        cuts={
            name: Cut(dim, unit[classes[line]].amax(1), stops)
            for name, (dim, line, stops) in tracer.cuts.items()
            if bool((unit[classes[line]] >= 0).any())
        },
        statistics={
            name: (dim, unit[classes[line]])
            for name, (dim, line) in tracer.statistics.items()
            if bool((unit[classes[line]] >= 0).any())
        },
        recorded=recorded,
        divisors=find_divisors(program),
        macs=Polynomial(macs, len(groups), len(names)),
        params=Polynomial(params, len(groups), len(names)),
    )


def _params_term(
    name: str, shape: tuple[int, ...], tracer: Tracer, factor: Any, blocks: frozenset[int]
) -> Term:
    rest = 1
    factors = []
    for axis, size in enumerate(shape):
        if (name, axis) in tracer.axes:
            factors.append(factor(tracer.axes[name, axis]))
        else:
            rest *= size
    return Term(rest, tuple(factors), blocks)


def _numbers(tracer: Tracer, unit: Tensor, classes: Tensor) -> dict[str, tuple[Number, ...]]:
    found: dict[str, dict[tuple[int, tuple[int, ...]], Number]] = {}
    for number in tracer.numbers:
        units = unit[classes[number.ids]].unique(dim=1)
        key = (number.value, tuple(units.reshape(-1).tolist()))
        found.setdefault(number.module, {})[key] = Number(number.value, units)
    return {
        module: tuple(numbers.values())
        for module, numbers in found.items()
        if any(bool((number.units >= 0).any()) for number in numbers.values())
    }


def _layouts(program: Program, tracer: Tracer, unit: Tensor, classes: Tensor) -> dict[str, Tensor]:
    layouts = {}
    for node in program.nodes.values():
        value = tracer.values.get(node.name)
        grouped = node.operator.startswith("conv") and len(node.args) > 6 and node.args[6] > 1
        sized = grouped or node.operator in {*VIEWS, *FILLS, "group_norm"}
        if sized and isinstance(value, Labels) and value.present:
            layouts[node.name] = unit[classes[value.ids]]
    return layouts


def _inside(model: nn.Module, block: str) -> frozenset[str]:
    """Returns the parameters and buffers, by their first names, that go with a block.

    Not by their names: a block may be registered in several places, of which each tensor's first
    name tells another one than the block's.
    """
    outside = modules_outside(model, [model.get_submodule(block)]).values()
    staying = {
        id(tensor)
        for module in outside
        for tensor in (*module._parameters.values(), *module._buffers.values())
    }
    tensors = (*model.named_parameters(), *model.named_buffers())
    return frozenset(name for name, tensor in tensors if id(tensor) not in staying)


def _inner(inside: Collection[str], groups: Mapping[str, PrunableGroup]) -> tuple[str, ...]:
    return tuple(
        group.name
        for group in groups.values()
        if all(item.parameter in inside for item in group.slices)
    )
