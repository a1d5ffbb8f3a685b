"""Recorded modules: for code that cannot follow its own weights.

Some code derives sizes from the shape of its input (the head width of a Swin attention is its
input's channels over its heads) and so cannot lose heads or channels alone, whatever its
attributes say. Such a module is replaced by one with the same parameters that runs the operations
which the export recorded, with sizes that follow the plan. It takes any batch size, but otherwise
inputs of the traced shape.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from paretoprune.surgery.execute import Execution, Values
from paretoprune.surgery.export import unfused
from paretoprune.surgery.graph import PruningGraph
from paretoprune.surgery.program import (
    BatchSize,
    Node,
    Ref,
    as_call,
    call,
    own_copy,
    resolve_target,
)
from paretoprune.surgery.resize import resized
from paretoprune.surgery.rules import RULES

_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout"}
CONSTANT = "recorded_constant_"
"""How the names of the buffers begin that hold a recording's constants."""
_TYPES = (torch.dtype, torch.memory_format, torch.layout)


@dataclass(frozen=True)
class Recording:
    """What one call of a module computes.

    Attributes:
        steps: Operations, and the parameters and constants they read; parameters by their names
            within the module, constants by the names of buffers that hold them.
        inputs: For every leaf of the arguments, the value it is; None if nothing reads it.
        outputs: What the module returns, with the names of values in place of tensors.
        batch: Size of the first dim of the first tensor among the arguments.
        constants: Tensors in the code, by the names of the buffers that will hold them.
    """

    steps: tuple[Node, ...]
    inputs: tuple[str | None, ...]
    outputs: Any
    batch: int
    constants: Mapping[str, Tensor] = field(default_factory=dict)

    def resized(self, graph: PruningGraph, mask: Tensor) -> Recording:
        """Returns the recording with the sizes that it has after surgery."""
        steps = tuple(
            step if step.kind != "call" else resized(graph, step, mask) for step in self.steps
        )
        return dataclasses.replace(self, steps=steps)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values; the constants are not among them."""
        steps = [
            [step.name, step.kind, step.target, _encoded(step.args), _encoded(dict(step.kwargs))]
            for step in self.steps
        ]
        return {
            "steps": steps,
            "inputs": list(self.inputs),
            "outputs": _encoded(self.outputs),
            "batch": self.batch,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any], constants: Mapping[str, Tensor]) -> Recording:
        """Returns the recording that `to_json` wrote.

        Args:
            data: What it wrote.
            constants: Its constants.

        Raises:
            ValueError: If it names an operator that surgery does not know, or is no recording.
        """
        steps = []
        for name, kind, target, args, kwargs in data["steps"]:
            if kind != "parameter" and (kind != "call" or not is_known(target)):
                raise ValueError(f"{target!r} is no operator that a recorded module may run.")
            steps.append(Node(name, kind, target, tuple(_decoded(args)), _decoded(kwargs)))
        outputs, batch = _decoded(data["outputs"]), int(data["batch"])
        return Recording(tuple(steps), tuple(data["inputs"]), outputs, batch, constants)


class Recorded(nn.Module):
    """Runs a recording with the parameters of the module it replaces.

    Attributes:
        recording: What it runs; its constants are buffers of the module.

    Args:
        module: The module whose parameters, buffers, children and attributes it takes over.
        recording: What to run.
    """

    def __init__(self, module: nn.Module, recording: Recording) -> None:
        super().__init__()
        self.__dict__.update(module.__dict__)
        self._buffers = dict(self._buffers)
        for name, value in recording.constants.items():
            self.register_buffer(name, value.clone())
        self.recording = dataclasses.replace(recording, constants={})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the module would."""
        leaves = pytree.tree_leaves((args, kwargs))
        # Not len: an export of the pruned network may make it symbolic.
        first = next(leaf for leaf in leaves if _has_rows(leaf))
        rows = first.shape[0]
        names = self.recording.inputs
        values: Values = {n: v for n, v in zip(names, leaves, strict=True) if n is not None}

        def scaled(size: int) -> int:
            return int(size) * rows // self.recording.batch  # type: ignore[no-any-return]

        steps = self.recording.steps
        tensors = {step.name: step.target for step in steps if step.kind == "parameter"}
        for step in steps:
            if step.kind == "parameter":
                values[step.name] = self._tensor(step.target)
            else:
                values[step.name] = call(
                    self._in_mode(step, tensors), values, scaled, first.device
                )
        return _filled(self.recording.outputs, values)

    def _tensor(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        return getattr(self.get_submodule(path), leaf)  # type: ignore[no-any-return]

    def _in_mode(self, step: Node, tensors: Mapping[str, str]) -> Node:
        """Returns the step in the module's mode: recorded in eval mode, trained with dropout.

        Args:
            step: An operation.
            tensors: Names of parameters and buffers, by the names of their values.
        """
        if step.operator == "batch_norm" and isinstance(step.args[3], Ref):
            return self._normalizing(step, tensors.get(step.args[3].name, ""))
        if self.training and step.operator in _DROPOUTS:
            return dataclasses.replace(step, args=(*step.args[:2], True))
        return step

    def _normalizing(self, step: Node, mean: str) -> Node:
        """Returns a batch norm in the mode of the module that owns its running mean.

        A norm has a mode and a momentum of its own, and counts its batches: recalibration trains
        norms alone, and averages over all batches.
        """
        owner = self.get_submodule(mean.rpartition(".")[0])
        if not owner.training:
            return step
        momentum = step.args[6]
        if isinstance(owner, _NormBase):
            momentum = _counted_momentum(owner)
        return dataclasses.replace(step, args=(*step.args[:5], True, momentum, *step.args[7:]))


def _counted_momentum(norm: _NormBase) -> float:
    """Counts a batch of training; returns the share that it has in the running statistics."""
    if not norm.track_running_stats:
        return 0.0
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # the plain average over all batches
            return 1 / float(norm.num_batches_tracked)
    return norm.momentum or 0.0


def is_known(target: str) -> bool:
    """Returns whether an operator is one that surgery has a rule for, or an elementwise one."""
    if target == "getitem":
        return True
    namespace, _, _ = target.partition(".")
    if namespace != "aten" or len(target.split(".")) != 3:
        return False
    try:
        operator = resolve_target(target)
    except AttributeError:
        return False
    packet = target.rsplit(".", 1)[0]
    known = packet in RULES or packet.removesuffix("_") in RULES
    return known or torch.Tag.pointwise in operator.tags


def record(
    model: nn.Module, graph: PruningGraph, names: Iterable[str], example_inputs: Any
) -> dict[str, Recording]:
    """Returns the recordings of the modules that can be recorded.

    A module cannot be if it is called twice, reads what is no argument of it, returns what is no
    tensor, contains a removable block, or runs an operator that surgery does not know.

    Args:
        model: The dense network, in eval mode.
        graph: Its graph.
        names: Qualified names of modules.
        example_inputs: Inputs of one run, which tells which value is which argument.
    """
    calls = _calls(model, names, example_inputs)
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
    batch = next(len(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if _has_rows(leaf))
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
    outputs = _names(output, named)
    rows = next((len(leaf) for leaf in arguments if _has_rows(leaf)), 0)
    if outputs is None or rows * program.batch % batch:
        return None
    rows = rows * program.batch // batch  # of the batch that was exported
    return Recording(tuple(steps), tuple(inputs), outputs, rows, constants) if rows else None


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


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
    """Returns the output with a `Ref` for every tensor; None if it is anything else."""
    if isinstance(output, Tensor):
        names = [name for name, value in values.items() if _equal(output, value)]
        return Ref(names[-1]) if names else None
    if isinstance(output, (tuple, list)) and type(output) in (tuple, list):
        items = [None if item is None else _names(item, values) for item in output]
        whole = all((a is None) == (b is None) for a, b in zip(items, output, strict=True))
        return type(output)(items) if whole and any(items) else None
    return None


def _filled(outputs: Any, values: Values) -> Any:
    if isinstance(outputs, Ref):
        return values[outputs.name]
    if isinstance(outputs, (tuple, list)):
        return type(outputs)(_filled(item, values) for item in outputs)
    return outputs


def _encoded(value: Any) -> Any:
    """Returns an argument as JSON; what JSON has no form for becomes a dict of one key."""
    if isinstance(value, Ref):
        return {"ref": value.name}
    if isinstance(value, BatchSize):
        return {"batch": int(value)}
    if isinstance(value, _TYPES):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):  # `call` puts the one of the inputs in its place
        return {"device": "cpu"}
    if isinstance(value, tuple):
        return {"tuple": [_encoded(item) for item in value]}
    if isinstance(value, list):
        return [_encoded(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {key: _encoded(item) for key, item in value.items()}}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, item),) = value.items()
    match kind:
        case "ref":
            return Ref(item)
        case "batch":
            return BatchSize(item)
        case "tuple":
            return tuple(_decoded(part) for part in item)
        case "dict":
            return {key: _decoded(part) for key, part in item.items()}
        case "float":
            return float(item)
        case "device":
            return torch.device("cpu")
        case "torch":
            found = getattr(torch, item, None)
            if isinstance(found, _TYPES):
                return found
    raise ValueError(f"{value!r} is no argument of an operator.")
