"""Program: the dense network as a flat list of ATen operations, exported once.

The list is our own and not `torch.fx`, so that it pickles, travels to workers, and holds names
instead of modules.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from paretoprune.surgery.errors import UnsupportedModel

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands among a node's arguments for the value of the node of that name."""

    name: str


class BatchSize(int):
    """An integer among a node's arguments that is a multiple of the batch size."""


@dataclass(frozen=True, slots=True)
class Node:
    """One value of the program.

    Attributes:
        name: Unique name of the value.
        kind: `input` (of the model), `parameter` (parameter or buffer), `constant` or `call`.
        target: Operator as `aten.relu.default`, or the qualified name of the parameter; of a
            tied one, the first.
        args: Positional arguments; values of other nodes are `Ref`.
        kwargs: Keyword arguments.
        shape: Shape of the value with the example inputs; for several values their shapes; None
            if it is no tensor.
        module: Qualified name of the innermost module that runs the operator.
        calls: The module calls around it, outermost first; a module that is called twice has
            two different entries.
        value: The tensor of a constant.
    """

    name: str
    kind: Literal["input", "parameter", "constant", "call"]
    target: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    shape: Shape | tuple[Shape, ...] | None = None
    module: str = ""
    calls: tuple[str, ...] = ()
    value: Tensor | None = None

    def refs(self) -> Iterator[str]:
        """Yields the names of the values that the node reads."""
        yield from _refs((self.args, dict(self.kwargs)))


@dataclass(frozen=True)
class Program:
    """The nodes in execution order, and the names of the values that the model returns.

    Attributes:
        nodes: Every value by name, in execution order.
        outputs: Names of the returned values.
        batch: Size of the first dim of the example inputs.
        keywords: Names of the keyword arguments, in the order of the inputs.
    """

    nodes: Mapping[str, Node]
    outputs: tuple[str, ...]
    batch: int
    keywords: tuple[str, ...] = ()

    def users(self) -> dict[str, list[Node]]:
        """Returns, for every value, the nodes that read it; model outputs read as a node."""
        users: dict[str, list[Node]] = {name: [] for name in self.nodes}
        for node in self.nodes.values():
            for name in dict.fromkeys(node.refs()):
                users[name].append(node)
        return users


def _refs(value: Any) -> Iterator[str]:
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _refs(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _refs(item)


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns (args, kwargs) of a model call.

    Args:
        example_inputs: A tensor, a tuple of arguments, or a dict of keyword arguments.
    """
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def shared_copy(model: nn.Module) -> nn.Module:
    """Returns a copy of the module tree that shares parameters and buffers with `model`."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def export_program(model: nn.Module, example_inputs: Any) -> Program:
    """Exports `model` in eval mode; the model itself is left untouched.

    A second export, of a batch twice as large, tells which integers in the code are batch sizes.

    Args:
        model: Any module that `torch.export` accepts.
        example_inputs: A tensor, a tuple of arguments, or a dict of keyword arguments.

    Raises:
        UnsupportedModel: If `torch.export` refuses the model.
    """
    args, kwargs = as_call(example_inputs)
    program = _export(model, args, kwargs)

    def twice(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.ndim and len(value) == program.batch
        return torch.cat([value, value]) if whole else value

    try:
        larger = _export(model, *torch.utils._pytree.tree_map(twice, (args, kwargs)))
        return _with_batch_sizes(program, larger)
    except ValueError:  # the model takes no other batch size, or its code depends on it otherwise
        return program


def _with_batch_sizes(program: Program, larger: Program) -> Program:
    """Returns the program with `BatchSize` where the program of two batches has twice as much.

    Raises:
        ValueError: If they differ otherwise.
    """

    def mark(value: Any, other: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(mark(a, b) for a, b in zip(value, other, strict=True))
        if isinstance(value, int) and not isinstance(value, bool) and value != other:
            if other != 2 * value or value % program.batch:
                raise ValueError(f"{value} becomes {other} for two batches.")
            return BatchSize(value)
        return value

    nodes = {}
    for node, other in zip(program.nodes.values(), larger.nodes.values(), strict=True):
        if node.target != other.target:
            raise ValueError(f"{node.target} becomes {other.target} for two batches.")
        nodes[node.name] = dataclasses.replace(node, args=mark(node.args, other.args))
    return dataclasses.replace(program, nodes=nodes)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(
                shared_copy(model).eval(), args, kwargs or None, strict=False
            )
    except Exception as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise UnsupportedModel(
            f"torch.export cannot trace {type(model).__name__} ({type(error).__name__}: "
            f"{said[:300]}); wrap the model in a module whose forward avoids that construct, or "
            f"pass example inputs that take another path."
        ) from error
    nodes: dict[str, Node] = {}
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    names = _first_names(model)
    state = {InputKind.PARAMETER, InputKind.BUFFER}
    outputs: tuple[str, ...] = ()
    for fx_node in exported.graph.nodes:
        shape = _shape(fx_node.meta.get("val"))
        name = fx_node.name
        if fx_node.op == "placeholder":
            spec = specs[name]
            if spec.kind in state:
                nodes[name] = Node(name, "parameter", names[str(spec.target)], shape=shape)
            elif spec.kind == InputKind.USER_INPUT:
                nodes[name] = Node(name, "input", name, shape=shape)
            else:
                value = exported.constants.get(str(spec.target))
                nodes[name] = Node(name, "constant", str(spec.target), shape=shape, value=value)
        elif fx_node.op == "call_function":
            calls, module = _stack(fx_node.meta)
            nodes[name] = Node(
                name,
                "call",
                _target_name(fx_node.target),
                args=_plain(fx_node.args),
                kwargs=_plain(dict(fx_node.kwargs)),
                shape=shape,
                module=module,
                calls=calls,
            )
        elif fx_node.op == "output":
            outputs = tuple(dict.fromkeys(_refs(_plain(fx_node.args))))
        else:  # a higher-order operator's body (torch.cond and friends)
            raise UnsupportedModel(
                f"{type(model).__name__} uses control flow that depends on data "
                f"({fx_node.target}), which surgery cannot follow; pass a module without it."
            )
    return Program(nodes, outputs, _batch(args, kwargs), tuple(kwargs))


def _first_names(model: nn.Module) -> dict[str, str]:
    """Returns, for every name of a parameter or buffer, the first name of the same tensor.

    That is the one that `named_parameters()` lists; `torch.export` uses the last.
    """
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(tensor), name)
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
    }


def resolve_target(target: str) -> Any:
    """Returns the callable that a node's `target` names."""
    if target == "getitem":
        return operator.getitem
    if target.startswith("operator."):
        return getattr(operator, target.removeprefix("operator."))
    namespace, packet, overload = target.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def _target_name(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    name = getattr(target, "__name__", "")
    if getattr(operator, name, None) is target:
        return f"operator.{name}"
    raise UnsupportedModel(
        f"surgery cannot follow the operator {target}; use a module without it."
    )


def _plain(value: Any) -> Any:
    if isinstance(value, torch.fx.Node):
        return Ref(value.name)
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(int(size) for size in value.shape)
    if isinstance(value, (tuple, list)):
        return tuple(_shape(item) for item in value)
    return None


def _stack(meta: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    calls: list[str] = []
    module = ""
    for key, (path, _) in meta.get("nn_module_stack", {}).items():
        if path:
            calls.append(path if "@" not in str(key) else f"{path.split('@')[0]}@{key}")
            module = path.split("@")[0]
    return tuple(calls), module


def _batch(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    for value in torch.utils._pytree.tree_leaves((args, dict(kwargs))):
        if isinstance(value, Tensor) and value.ndim:
            return int(value.shape[0])
    return 1
