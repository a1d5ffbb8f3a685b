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
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from paretoprune.surgery.execute import Values
from paretoprune.surgery.graph import PruningGraph
from paretoprune.surgery.inputs import has_rows
from paretoprune.surgery.program import (
    BatchSize,
    Node,
    Ref,
    call,
    resolve_target,
)
from paretoprune.surgery.resize import resized
from paretoprune.surgery.rules import rule_of

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
        first = next(leaf for leaf in leaves if has_rows(leaf))
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
        resolve_target(target)
    except AttributeError:
        return False
    return rule_of(target) is not None


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
