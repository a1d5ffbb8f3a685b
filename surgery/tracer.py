"""Tracer: walks a program on channel labels and notes what parameters and costs depend on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from paretoprune.surgery.labels import Labels, Unions
from paretoprune.surgery.program import Node, Program, Ref, Shape, resolve_target
from paretoprune.surgery.rules import RULES

Value = Labels | tuple[Labels, ...] | None


@dataclass(frozen=True)
class MacsTerm:
    """MACs of one operator: `coefficient` times the number of kept positions of each factor.

    Attributes:
        node: Name of the operator's node.
        coefficient: MACs for one kept position of every factor, for one example.
        factors: Labels along the axes that surgery may shorten.
    """

    node: str
    coefficient: float
    factors: tuple[Tensor, ...]


class Tracer:
    """The state of one walk; operator rules read values from it and report to it.

    Attributes:
        values: Labels of every value so far.
        unions: Which labels are equal or stay.
        axes: For every parameter axis that has channels, their labels.
        producers: Parameter axes whose channels an operator makes, in execution order.
        pads: For every channel-padding module its (dim, labels of the padded value).
    """

    def __init__(self, program: Program, model: nn.Module) -> None:
        self.program = program
        self.unions = Unions()
        self.values: dict[str, Value] = {}
        self.axes: dict[tuple[str, int], Tensor] = {}
        self.producers: list[tuple[str, int]] = []
        self.terms: list[MacsTerm] = []
        self.pads: dict[str, tuple[int, Labels]] = {}
        self._elements: dict[str, Labels] = {}
        self._modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))

    def walk(self) -> None:
        """Runs every node's rule, then freezes what the model returns."""
        for node in self.program.nodes.values():
            if node.kind == "call":
                self._call(node)
            elif node.kind != "parameter":
                self.values[node.name] = _unlabelled(node.shape)
        for name in self.program.outputs:
            self._freeze(self.value(Ref(name)), "reaches the model's output")

    def _call(self, node: Node) -> None:
        packet = node.target.rsplit(".", 1)[0]
        in_place = packet.endswith("_") and not packet.endswith("__")
        rule = RULES.get(packet.removesuffix("_") if in_place else packet)
        if rule is None and _is_pointwise(node.target):
            rule = RULES["pointwise"]
        if rule is not None:
            result = rule(self, node)
        else:
            for name in node.refs():
                self._freeze(self.value(Ref(name)), f"reaches {packet}, which has no rule")
            self.counted(node)
            result = _unlabelled(node.shape)
        self.values[node.name] = result
        if in_place and node.args and isinstance(node.args[0], Ref):
            self.values[node.args[0].name] = result

    def value(self, ref: Any) -> Value:
        """Returns the labels of an argument; a parameter used directly gets one per element."""
        if not isinstance(ref, Ref):
            return None
        node = self.program.nodes[ref.name]
        if node.kind != "parameter":
            return self.values[ref.name]
        if node.target not in self._elements:
            shape: Shape = node.shape  # type: ignore[assignment]
            ids = self.unions.fresh(math.prod(shape)).reshape(shape)
            self._elements[node.target] = Labels(ids, shape)
        return self._elements[node.target]

    def labels(self, ref: Any) -> Labels:
        """Returns the labels of an argument that is one tensor."""
        value = self.value(ref)
        if not isinstance(value, Labels):
            raise TypeError(f"expected one tensor, but got {value!r} for {ref!r}.")
        return value

    def parameter(self, ref: Any) -> str | None:
        """Returns the qualified name of an argument that is a parameter or buffer, else None."""
        if isinstance(ref, Ref) and self.program.nodes[ref.name].kind == "parameter":
            return self.program.nodes[ref.name].target
        return None

    def shape(self, ref: Any) -> Shape:
        """Returns the shape of an argument that is one tensor."""
        return self.program.nodes[ref.name].shape  # type: ignore[return-value]

    def module_of(self, node: Node) -> nn.Module:
        """Returns the innermost module that runs the node."""
        return self._modules[node.module]

    def record(self, parameter: str, axis: int, ids: Tensor, *, makes: bool = False) -> None:
        """Notes that the channels `ids` lie along an axis of a parameter.

        Args:
            parameter: Qualified name.
            axis: The axis.
            ids: Labels along it.
            makes: Whether the operator makes these channels, rather than reads them.
        """
        key = (parameter, axis)
        if makes and key not in self.producers:
            self.producers.append(key)
        if key in self.axes:  # the parameter is used twice: both uses lose the same channels
            self.unions.unify(self.axes[key], ids, "is used twice, once with fixed channels")
        else:
            self.axes[key] = ids.clone()

    def macs(self, node: Node, per_position: float, *factors: Tensor) -> None:
        """Notes `per_position` MACs of the whole batch per kept position of every factor."""
        self.terms.append(MacsTerm(node.name, per_position / self.program.batch, factors))

    def counted(self, node: Node) -> None:
        """Notes the MACs of an operator without channels, as torch itself counts them."""
        meta = _to_meta(self.program, (node.args, dict(node.kwargs)))
        try:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                resolve_target(node.target)(*meta[0], **meta[1])
        except Exception:  # an operator without a meta kernel has no MACs torch could count
            return
        if counter.get_total_flops():
            self.macs(node, counter.get_total_flops() / 2)

    def freeze(self, labels: Labels, reason: str) -> Labels:
        """Declares that the value's channels stay; returns it without labels."""
        self.unions.freeze(labels.ids, reason)
        return Labels.none(labels.shape)

    def _freeze(self, value: Value, reason: str) -> None:
        for labels in value if isinstance(value, tuple) else (value,):
            if isinstance(labels, Labels):
                self.unions.freeze(labels.ids, reason)

    def parameter_axes(self, classes: Tensor, frozen: dict[int, str]) -> None:
        """Turns labels per element into labels along one axis, where they vary along one only.

        Args:
            classes: Class of every label.
            frozen: Reasons by frozen class; classes that lie across axes are added.
        """
        for name, labels in self._elements.items():
            ids = classes[labels.ids]
            for axis in range(ids.ndim):
                others = [dim for dim in range(ids.ndim) if dim != axis]
                line = ids.amin(others) if others else ids
                shape = [-1 if dim == axis else 1 for dim in range(ids.ndim)]
                if line.numel() > 1 and bool((line.reshape(shape) == ids).all()):
                    self.axes.setdefault((name, axis), line)
                    break
            else:
                for root in ids.unique().tolist():
                    frozen.setdefault(root, f"lies across several axes of {name}")


def _unlabelled(shape: Any) -> Value:
    if shape is None:
        return None
    if shape and isinstance(shape[0], (tuple, type(None))):
        return tuple(Labels.none(item) for item in shape if item is not None)
    return Labels.none(shape)


def _is_pointwise(target: str) -> bool:
    tags = getattr(resolve_target(target), "tags", ())
    return torch.Tag.pointwise in tags


def _to_meta(program: Program, value: Any) -> Any:
    if isinstance(value, Ref):
        shape: Shape = program.nodes[value.name].shape  # type: ignore[assignment]
        return torch.empty(shape, device="meta")
    if isinstance(value, (tuple, list)):
        return type(value)(_to_meta(program, item) for item in value)
    if isinstance(value, dict):
        return {key: _to_meta(program, item) for key, item in value.items() if key != "device"}
    return value
