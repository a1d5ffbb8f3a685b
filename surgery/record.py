"""record: what modules compute, from one run of the program and of the network."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paretoprune.surgery.execute import Execution, Values
from paretoprune.surgery.export import unfused
from paretoprune.surgery.graph import PruningGraph
from paretoprune.surgery.inputs import has_rows, join_rows
from paretoprune.surgery.program import (
    Node,
    Ref,
    as_call,
    own_copy,
)
from paretoprune.surgery.recorded import CONSTANT, Recording, is_known

_PLAIN = (bool, int, float, str)


def record(
    model: nn.Module, graph: PruningGraph, names: Iterable[str], example_inputs: Any
) -> dict[str, Recording]:
    """Returns the recordings of the modules that can be recorded.

    A module cannot be if it is called twice, reads what is no argument of it, returns what is
    neither a tensor nor the same for any batch, contains a removable block, or runs an operator
    that surgery does not know.

    Args:
        model: The dense network, in eval mode.
        graph: Its graph.
        names: Qualified names of modules.
        example_inputs: Inputs of one run, which tells which value is which argument.
    """
    calls = _calls(model, names, example_inputs)
    if any(_plain(output) for _, output in calls.values()):
        calls = _on_any_batch(calls, model, example_inputs)
    members: dict[str, dict[str, Node]] = {name: {} for name in calls}
    for node in graph.program.nodes.values():
        for name in node.calls:
            if name in members and node.shape is not None:  # the others are assertions
                members[name][node.name] = node
    wanted = {ref for nodes in members.values() for node in nodes.values() for ref in node.refs()}
    wanted |= {name for nodes in members.values() for name in nodes}
    values: Values = {}

    def keep(node: Node, known: Values) -> None:
        if node.name in wanted:
            values[node.name] = known[node.name]
        for ref in node.refs():
            if ref in wanted and ref in known and graph.program.nodes[ref].kind == "input":
                values[ref] = known[ref]

    Execution(graph).run(model, example_inputs, after=keep)
    found = {}
    args, kwargs = as_call(example_inputs)
    batch = next(len(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if has_rows(leaf))
    for name, (arguments, output) in calls.items():
        recording = _recorded(name, model, graph, members[name], values, arguments, output, batch)
        if recording is not None:
            found[name] = recording
    return found


def _calls(model: nn.Module, names: Iterable[str], example_inputs: Any) -> dict[str, Any]:
    """Returns, for every module that is called once, its arguments' leaves and its output."""
    seen: dict[str, list[Any]] = {}
    handles = []
    for name in names:

        def hook(_: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            seen.setdefault(name, []).append((pytree.tree_leaves((args, kwargs)), output))

        module = model.get_submodule(name)
        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    args, kwargs = as_call(own_copy(example_inputs))
    try:
        with unfused(), torch.no_grad():  # values are compared with those of the program
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: runs[0] for name, runs in seen.items() if len(runs) == 1}


def _on_any_batch(
    calls: Mapping[str, Any], model: nn.Module, example_inputs: Any
) -> dict[str, Any]:
    """Returns the calls whose plain outputs (sizes of an image) are the same for twice the batch.

    Args:
        calls: From `_calls`.
        model: The dense network.
        example_inputs: Inputs of that run.
    """
    mixed = [name for name, (_, output) in calls.items() if _plain(output)]
    try:
        twice = _calls(model, mixed, join_rows(example_inputs, example_inputs))
    except Exception:  # the network takes no other batch
        twice = {}
    same = {name for name in twice if _plain(twice[name][1]) == _plain(calls[name][1])}
    return {name: call for name, call in calls.items() if name not in mixed or name in same}


def _plain(output: Any) -> list[Any]:
    """Returns the values in an output that are no tensors."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, _PLAIN)]


def _recorded(
    name: str,
    model: nn.Module,
    graph: PruningGraph,
    nodes: Mapping[str, Node],
    values: Values,
    arguments: Sequence[Any],
    output: Any,
    batch: int,
) -> Recording | None:
    program = graph.program
    if not nodes or any(extent.nodes < set(nodes) for extent in graph.extents.values()):
        return None
    if not all(is_known(node.target) for node in nodes.values()):
        return None
    inside = {}
    for full, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        if full.startswith(f"{name}."):
            inside[id(tensor)] = full.removeprefix(f"{name}.")
    state = dict([*model.named_parameters(), *model.named_buffers()])
    steps: list[Node] = []
    constants: dict[str, Tensor] = {}
    inputs: list[str | None] = [None] * len(arguments)
    for ref in dict.fromkeys(ref for node in nodes.values() for ref in node.refs()):
        source = program.nodes[ref]
        if ref in nodes:
            continue
        if source.kind == "parameter" and id(state.get(source.target)) in inside:
            target = inside[id(state[source.target])]
            steps.append(dataclasses.replace(source, target=target))
        elif source.kind == "constant" and source.value is not None:
            buffer = f"{CONSTANT}{len(constants)}"
            constants[buffer] = source.value
            steps.append(dataclasses.replace(source, kind="parameter", target=buffer, value=None))
        else:
            value = state.get(source.target) if source.kind == "parameter" else values.get(ref)
            position = _position(value, arguments)
            if position is None or inputs[position] is not None:
                return None
            inputs[position] = ref
    steps += nodes.values()
    named = {key: value for key, value in values.items() if key in nodes}
    try:
        outputs = _names(output, named)
    except LookupError:
        return None
    rows = next((len(leaf) for leaf in arguments if has_rows(leaf)), 0)
    if rows * program.batch % batch:
        return None
    rows = rows * program.batch // batch  # of the batch that was exported
    return Recording(tuple(steps), tuple(inputs), outputs, rows, constants) if rows else None


def _position(value: Any, leaves: Sequence[Any]) -> int | None:
    """Returns which leaf a value is; None if none or several are."""
    found = [index for index, leaf in enumerate(leaves) if _equal(leaf, value)]
    one = found and all(leaves[index] is leaves[found[0]] for index in found)
    return found[0] if one else None


def _equal(a: Any, b: Any) -> bool:
    """Whether two values are the same up to rounding, which depends on where tensors lie."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = a.nan_to_num(0, 0, 0).abs().amax().item() if a.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=1e-5 * scale, equal_nan=True)


def _names(output: Any, values: Mapping[str, Any]) -> Any:
    """Returns the output with a `Ref` for every tensor.

    Raises:
        LookupError: If a tensor is none of the values, or anything is neither tensor nor plain.
    """
    if isinstance(output, Tensor):
        names = [name for name, value in values.items() if _equal(output, value)]
        if names:
            return Ref(names[-1])
    elif isinstance(output, (tuple, list)) and type(output) in (tuple, list):
        return type(output)([_names(item, values) for item in output])
    elif output is None or isinstance(output, _PLAIN):
        return output
    raise LookupError(output)
