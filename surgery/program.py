"""Program: the dense network as a flat list of ATen operations, exported once.

The list is our own and not `torch.fx`, so that it pickles, travels to workers, and holds names
instead of modules.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from paretoprune.surgery.copying import kept_activations

Shape = tuple[int, ...]
FILLS = {"zeros": 0, "ones": 0, "full": 0, "new_zeros": 1, "new_ones": 1, "new_full": 1}
"""Operators that make a value of one number, with the position of its sizes."""


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

    @property
    def operator(self) -> str:
        """Short name of an ATen operator, as `relu` for `aten.relu_.default`; else empty."""
        if self.kind != "call" or not self.target.startswith("aten."):
            return ""
        return self.target.split(".")[1].removesuffix("_")

    @property
    def is_buffer(self) -> bool:
        """Whether it is a buffer, which no training changes; `torch.export` names it so."""
        return self.kind == "parameter" and not self.name.startswith("p_")

    @property
    def in_place(self) -> bool:
        """Whether the operator overwrites its first argument."""
        packet = self.target.rpartition(".")[0]
        return self.kind == "call" and packet.endswith("_") and not packet.endswith("__")

    def refs(self) -> Iterator[str]:
        """Yields the names of the values that the node reads."""
        yield from references((self.args, dict(self.kwargs)))


@dataclass(frozen=True)
class Program:
    """The nodes in execution order, and the names of the values that the model returns.

    Attributes:
        nodes: Every value by name, in execution order.
        outputs: Names of the returned values; one that is returned twice, twice.
        batch: Size of the first dim of the example inputs.
        keywords: Names of the keyword arguments, in the order of the inputs.
        unrolled: The module whose code takes the examples of a batch one by one, of which the
            nodes hold as many steps as the exported batch had; None if there is none.
    """

    nodes: Mapping[str, Node]
    outputs: tuple[str, ...]
    batch: int
    keywords: tuple[str, ...] = ()
    unrolled: str | None = None

    def users(self) -> dict[str, list[Node]]:
        """Returns, for every value, the nodes that read it; model outputs read as a node."""
        users: dict[str, list[Node]] = {name: [] for name in self.nodes}
        for node in self.nodes.values():
            for name in dict.fromkeys(node.refs()):
                users[name].append(node)
        return users

    def read_for_outputs(self) -> set[str]:
        """Returns the names of the values that an output depends on, overwritten ones, too."""
        found: set[str] = set()
        memory: set[str] = set()  # that of the values found, by the value that made it
        for name in self.outputs:
            found.add(name)
            memory.add(self._made_by(name))
        for node in reversed(list(self.nodes.values())):
            overwritten = node.args[0] if node.in_place and node.args else None
            read = isinstance(overwritten, Ref) and self._made_by(overwritten.name) in memory
            if read or node.name in found:
                for name in node.refs():
                    found.add(name)
                    memory.add(self._made_by(name))
        return found

    def _made_by(self, name: str) -> str:
        """Returns the value of whose memory a value is a part, itself if it is none's."""
        node = self.nodes[name]
        while node.kind == "call" and node.args and isinstance(node.args[0], Ref):
            schema = getattr(resolve_target(node.target), "_schema", None)
            if schema is not None and all(each.alias_info is None for each in schema.returns):
                break
            node = self.nodes[node.args[0].name]
        return node.name


def references(value: Any) -> Iterator[str]:
    """Yields the names of the values that a nested argument refers to."""
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from references(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from references(item)


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
    shared = {id(tensor): tensor for tensor in tensors}
    return copy.deepcopy(model, kept_activations(model) | shared)


def own_copy(inputs: Any) -> Any:
    """Returns the inputs with every tensor cloned: a network may change its input in place."""
    return torch.utils._pytree.tree_map_only(Tensor, torch.clone, inputs)


def device_of(values: Iterable[Any]) -> torch.device:
    """Returns the device of the first tensor; the CPU if there is none."""
    found = (value.device for value in values if isinstance(value, Tensor))
    return next(found, torch.device("cpu"))


def constant_on(node: Node, device: torch.device) -> Tensor | None:
    """Returns the tensor of a constant on a device; no module carries it there with the model."""
    return None if node.value is None else node.value.to(device)


Instead = Callable[[Callable[..., Any], list[Any], dict[str, Any]], Any]
"""(operator, args, kwargs) -> what stands for the operator's value."""


def call(
    node: Node,
    values: Mapping[str, Any],
    scaled: Callable[[int], int],
    device: torch.device,
    computed: Instead | None = None,
) -> Any:
    """Returns the value of a call.

    Args:
        node: The call.
        values: The values that it reads, by name.
        scaled: Turns a multiple of the traced batch size into that of this batch.
        device: Where the network is now; the code may have written down where it was traced.
        computed: What computes the value instead of the operator.
    """

    def resolve(value: Any) -> Any:
        if isinstance(value, Ref):
            return values[value.name]
        if isinstance(value, BatchSize):
            return scaled(value)
        if isinstance(value, torch.device):
            return device
        if isinstance(value, (tuple, list)):
            return type(value)(resolve(item) for item in value)
        return value

    args = [resolve(argument) for argument in node.args]
    kwargs = {key: resolve(value) for key, value in node.kwargs.items()}
    operator = resolve_target(node.target)
    return operator(*args, **kwargs) if computed is None else computed(operator, args, kwargs)


@functools.cache
def resolve_target(target: str) -> Any:
    """Returns the callable that a node's `target` names."""
    if target == "getitem":
        return operator.getitem
    if target.startswith("operator."):
        return getattr(operator, target.removeprefix("operator."))
    namespace, packet, overload = target.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
