"""Tracer: walks a program on channel labels and notes what parameters and costs depend on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from paretoprune.surgery.labels import Labels, Unions, compressed
from paretoprune.surgery.notes import MacsTerm, Number, Piece
from paretoprune.surgery.program import (
    BatchSize,
    Node,
    Program,
    Ref,
    Shape,
    resolve_target,
)
from paretoprune.surgery.rules import RULES, Rule, rule_of
from paretoprune.surgery.weight_axes import PARTS

Value = Labels | tuple[Labels, ...] | None


def _rules(operators: str) -> frozenset[Rule]:
    return frozenset(RULES[name] for name in operators.split())


_TAKES_TABLES = _rules(
    "pointwise aten.clone aten.cat aten.stack aten.expand aten.repeat aten.t "
    "aten.cosine_similarity"
)
"""Rules that see from the other operands along which dim of a table the channels lie."""
_TAKES_REPEATS = _rules(
    "pointwise aten.clone aten.expand aten.view aten.t aten.scaled_dot_product_attention "
    "aten.baddbmm aten.gather"
)
"""Rules that see from the other operands what a value is repeated over."""


class Tracer:
    """The state of one walk; operator rules read values from it and report to it.

    Attributes:
        values: Labels of every value so far.
        unions: Which labels are equal or stay.
        axes: For every parameter axis that has channels, their labels.
        producers: Parameter axes whose channels an operator makes, in execution order.
        pads: For every channel-padding module its (dim, labels of the padded value).
        weights: Names of the values that depend on parameters and buffers alone.
        batched: Names of the values that depend on the examples or on how many there are.
        splits: Labels over the dims that a channel dim was split into.
        numbers: Numbers in the code that count channels.
        cuts: For every node that cuts a channel dim: (dim, labels along it, boundaries).
        statistics: For every node that averages over channels: (dim, labels along it).
        companions: By parameter, those that are cut with it: (name, their axis by its axis).
    """

    def __init__(self, program: Program, model: nn.Module) -> None:
        self.program = program
        self.unions = Unions()
        self.values: dict[str, Value] = {}
        self.axes: dict[tuple[str, int], Tensor] = {}
        self.producers: list[tuple[str, int]] = []
        self.terms: list[MacsTerm] = []
        self.pads: dict[str, tuple[int, Labels]] = {}
        self.weights: set[str] = set()
        self.batched: set[str] = set()
        self.splits: list[Tensor] = []
        self.numbers: list[Number] = []
        self.cuts: dict[str, tuple[int, Tensor, tuple[int, ...]]] = {}
        self.statistics: dict[str, tuple[int, Tensor]] = {}
        self.companions: dict[str, list[tuple[str, dict[int, int]]]] = {}
        self._rule: Rule | None = None
        self._repeats: set[int] = set()
        self._conditions: list[tuple[Tensor, Tensor, list[int], str]] = []
        self._elements: dict[str, Labels] = {}
        self._shapes: dict[str, Shape] = {
            node.target: node.shape  # type: ignore[misc]
            for node in program.nodes.values()
            if node.kind == "parameter"
        }
        self._modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))

    def walk(self) -> None:
        """Runs every node's rule, then freezes what the model returns."""
        for node in self.program.nodes.values():
            refs = list(node.refs())
            grows = self._depends_on_batch(node, refs)
            made = bool(refs) and self.weights.issuperset(refs) and node.operator != "linear"
            if node.kind == "parameter" or (
                made and (not grows or rule_of(node.target) in _TAKES_TABLES)
            ):
                self.weights.add(node.name)
            if grows:
                self.batched.add(node.name)
                if node.in_place:
                    self.batched.update(refs[:1])
            if node.kind == "call" and not self.is_part_of_weight(node):
                self._call(node)
            elif node.kind not in ("call", "parameter"):
                self.values[node.name] = _unlabelled(node.shape)
        for name in self.program.outputs:
            self._freeze(self.value(Ref(name)), "reaches the model's output")

    def _depends_on_batch(self, node: Node, refs: Sequence[str]) -> bool:
        """Whether a value grows with the batch; a learned query does, once it is expanded.

        Args:
            node: The value.
            refs: Names of the values that it reads.
        """
        if node.kind == "input":  # another one is the same for all examples
            return bool(node.shape) and node.shape[0] == self.program.batch  # type: ignore[index]
        arguments = torch.utils._pytree.tree_leaves((node.args, dict(node.kwargs)))
        sized = any(isinstance(value, BatchSize) for value in arguments)
        return sized or not self.batched.isdisjoint(refs)

    def is_pointwise(self, node: Node) -> bool:
        """Returns whether a node computes element by element."""
        return rule_of(node.target) is RULES["pointwise"]

    def is_part_of_weight(self, node: Node) -> bool:
        """Returns whether a node cuts or scales weights, whose elements are asked for late."""
        if node.name not in self.weights:
            return False
        return (
            (self.is_pointwise(node) and not node.in_place)
            or node.operator in (*PARTS, "_weight_norm")
            or (
                node.target == "getitem"
                and self.program.nodes[node.args[0].name].operator in PARTS
            )
        )

    def _call(self, node: Node) -> None:
        rule = rule_of(node.target)
        if rule is not None:
            outer, self._rule = self._rule, rule
            result = rule(self, node)
            self._rule = outer
        elif node.shape is None:  # an assertion or a query of sizes: no channels flow
            result = None
        else:
            for name in node.refs():
                packet = node.target.rsplit(".", 1)[0]
                self._freeze(self.value(Ref(name)), f"reaches {packet}, which has no rule")
            self.counted(node)
            result = _unlabelled(node.shape)
        self.values[node.name] = result
        if node.in_place and node.args and isinstance(node.args[0], Ref):
            self.values[node.args[0].name] = result

    def value(self, ref: Any) -> Value:
        """Returns the labels of an argument; a parameter used directly gets one per element."""
        if not isinstance(ref, Ref):
            return None
        node = self.program.nodes[ref.name]
        if node.kind != "parameter":
            if ref.name not in self.values:
                self._call(node)
            return self.values[ref.name]
        if node.target not in self._elements:
            shape: Shape = node.shape  # type: ignore[assignment]
            ids = self.unions.fresh(math.prod(shape)).reshape(shape)
            self._elements[node.target] = Labels(ids, shape)
        return self._elements[node.target]

    def labels(self, ref: Any) -> Labels:
        """Returns the labels of an argument that is one tensor.

        Most rules see a table that is repeated for every example (learned queries) as tokens
        whose channels lie along the last dim, and nothing along dims that code repeats.
        """
        value = self.value(ref)
        if not isinstance(value, Labels):
            raise TypeError(f"expected one tensor, but got {value!r} for {ref!r}.")
        if self._is_tokens(ref):
            return self.as_tokens(value)
        if self._rule not in _TAKES_REPEATS and self.is_repeat(value):
            return self.freeze(value, "is repeated by the code")
        return value

    def tokens(self, ref: Ref) -> Labels:
        """Returns the labels of what a layer reads: a table, too, has its channels last there."""
        if self.is_weight(ref):
            value = self.value(ref)
            assert isinstance(value, Labels), "a layer reads one tensor"
            return self.as_tokens(value)
        return self.labels(ref)

    def as_tokens(self, labels: Labels) -> Labels:
        """Returns the labels made equal along all dims but the last that they vary along."""
        return self.narrowed(labels, labels.varying[:-1])

    def _is_tokens(self, ref: Ref) -> bool:
        """Whether the rule at work sees a weight as something that flows."""
        return (
            self._rule not in _TAKES_TABLES
            and ref.name in self.weights
            and ref.name in self.batched
        )

    def repeated(self, count: int) -> Tensor:
        """Returns new labels for a dim along which code repeats a value, shape (count,).

        They become those of the channels that the value meets there, and stay without.
        """
        ids = self.unions.fresh(count)
        self._repeats.update(ids.tolist())
        return ids

    def is_repeat(self, labels: Labels) -> bool:
        """Returns whether all labels are those of a dim along which code repeats a value."""
        return not self._repeats.isdisjoint(labels.ids.reshape(-1)[:1].tolist())  # may be empty

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

    def record(
        self,
        parameter: str,
        axis: int,
        ids: Tensor,
        *,
        makes: bool = False,
        piece: Piece | None = None,
    ) -> None:
        """Notes that the channels `ids` lie along an axis of a parameter.

        Args:
            parameter: Qualified name.
            axis: The axis.
            ids: Labels along it.
            makes: Whether the operator makes these channels, rather than reads them.
            piece: The part of the parameter that the operator reads, if not all of it.
        """
        key = (parameter, axis)
        if piece is not None and piece.axis == axis:
            ids = self._whole(key, piece, ids)
        if makes and key not in self.producers:
            self.producers.append(key)
        for other, along in self.companions.get(parameter, ()):
            if axis in along and self._shapes[other][along[axis]] == len(ids):
                self.record(other, along[axis], ids)
        if key in self.axes:  # the parameter is used twice: both uses lose the same channels
            self.unions.unify(self.axes[key], ids, "is used twice, once with fixed channels")
        else:
            self.axes[key] = ids.clone()

    def _whole(self, key: tuple[str, int], piece: Piece, ids: Tensor) -> Tensor:
        """Returns the labels along a parameter's axis of which some are known."""
        stops, size = piece.stops, piece.stops[-1]
        whole = self.axes[key] if key in self.axes else self.unions.fresh(size)
        start, stop = stops[piece.index], stops[piece.index + 1]
        self.unions.unify(whole[start:stop], ids, "is a part of a weight beside fixed channels")
        if len({b - a for a, b in itertools.pairwise(stops)}) == 1:  # equal parts stay equal
            parts = whole.reshape(len(stops) - 1, -1)
            self.unions.unify(parts, parts[:1], "is a part of a weight beside fixed channels")
        if piece.node.name not in self.cuts:
            shape = self.shape(piece.node.args[0])
            self.cut(piece.node, Labels.along(piece.dim, whole, shape), piece.dim, stops)
        return whole

    def read(self, item: Ref | Labels) -> Labels:
        """Returns the labels of an operand that may be given by its labels."""
        return item if isinstance(item, Labels) else self.labels(item)

    def is_weight(self, item: Ref | Labels) -> bool:
        """Returns whether an operand depends on parameters and buffers alone."""
        return isinstance(item, Ref) and item.name in self.weights and not self._is_tokens(item)

    def narrowed(self, labels: Labels, dims: Sequence[int]) -> Labels:
        """Returns the labels made equal along some dims."""
        ids = labels.ids
        for dim in dims:
            self.unions.unify(ids, ids.narrow(dim, 0, 1), "goes together with fixed channels")
            ids = ids.narrow(dim, 0, 1)
        return Labels(ids, labels.shape)

    def constant(self, ref: Ref, dims: Sequence[int], reason: str) -> Labels:
        """Returns the labels of a value that must stay whole along some dims.

        Where its labels also vary along other dims, those are the units; else the channels stay.
        """
        labels = self.labels(ref)
        if self.is_weight(ref) or set(labels.varying) - set(dims):
            return self.narrowed(labels, dims)
        return self.freeze(labels, reason)

    def meets(self, labels: Labels, other: Labels, repeated: list[int], reason: str) -> None:
        """Notes that two values meet, of which the other may be repeated along some dims.

        If the units turn out to lie along the repeated dims, the other value serves all of them
        and stays whole; else both lose the same channels.
        """
        if repeated:
            self._conditions.append((labels.ids, other.ids, repeated, reason))
        else:
            self.unions.unify(labels.ids, other.ids, reason)

    def settle(self) -> tuple[Tensor, dict[int, str]]:
        """Decides what reading alone left open; returns the class of every label.

        Classes are numbered from 0, the class of what always stays. With them come the reasons of
        those that are frozen.

        A split channel dim whose parts are not decided by what reads them has its units along
        the last part.
        """
        classes, frozen = self.unions.solve()
        for ids in self.splits:
            while len(varying := compressed(classes[ids], ids.shape).varying) > 1:
                self.narrowed(Labels(ids, tuple(ids.shape)), varying[:1])
                ids = ids.narrow(varying[0], 0, 1)
                classes, frozen = self.unions.solve()
        for ids, other, repeated, reason in self._conditions:
            varying = compressed(classes[ids], ids.shape).varying
            if set(varying) <= set(repeated):
                self.unions.freeze(other, "serves units that go as a whole")
            else:
                self.unions.unify(ids, other, reason)
                classes, frozen = self.unions.solve()
        classes, _ = self.unions.solve()
        self._unify_uses(classes)
        classes, frozen = self.unions.solve()
        roots, compact = classes.unique(return_inverse=True)  # the class of label 0 stays 0
        number = dict(zip(roots.tolist(), range(len(roots)), strict=True))
        return compact, {number[root]: reason for root, reason in frozen.items()}

    def _unify_uses(self, classes: Tensor) -> None:
        """Makes a table that is used both whole and in parts lose the same channels in all uses.

        Used whole it has one label per channel (`axes`), in parts one per element. Which axis the
        latter lie along is known late.
        """
        for (name, axis), line in self.axes.items():
            labels = self._elements.get(name)
            if labels is None:
                continue
            if compressed(classes[labels.ids], labels.shape).varying == (axis,):
                along = Labels.along(axis, line, labels.shape)
                self.unions.unify(labels.ids, along.ids, "is used twice, once in parts")

    def number(self, node: Node, value: int, labels: Labels, dim: int) -> None:
        """Notes that the code of a node's module writes how many positions a dim has."""
        if dim % len(labels.shape) in labels.varying:
            moved = labels.ids.movedim(dim, 0)
            if isinstance(value, BatchSize):  # the code says batch * heads, batch first
                value //= self.program.batch
                moved = moved[:value]
            self.numbers.append(Number(node.module, int(value), moved.reshape(len(moved), -1)))

    def cut(self, node: Node, labels: Labels, dim: int, stops: Sequence[int]) -> None:
        """Notes that a node cuts the channels along a dim at some boundaries."""
        line = labels.ids.movedim(dim, 0).reshape(labels.ids.shape[dim], -1)
        self.cuts[node.name] = (dim, line, tuple(stops))
        for start, stop in itertools.pairwise(stops):
            if stop > start:
                self.numbers.append(Number(node.module, stop - start, line[start:stop]))

    def statistic(self, node: Node, dim: int, line: Tensor) -> None:
        """Notes that a node averages over the channels along a dim."""
        self.statistics[node.name] = (dim, line)

    def macs(self, node: Node, per_position: float, *factors: Tensor) -> None:
        """Notes `per_position` MACs of the whole batch per kept position of every factor.

        What does not depend on the batch is computed once, however large that is.
        """
        batch = self.program.batch if node.name in self.batched else 1
        self.terms.append(MacsTerm(node.name, per_position / batch, factors))

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
                    first = labels.ids
                    for dim in others:
                        first = first.narrow(dim, 0, 1)
                    self.axes.setdefault((name, axis), first.reshape(-1))
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


def _to_meta(program: Program, value: Any) -> Any:
    if isinstance(value, Ref):
        shape: Shape = program.nodes[value.name].shape  # type: ignore[assignment]
        return torch.empty(shape, device="meta")
    if isinstance(value, (tuple, list)):
        return type(value)(_to_meta(program, item) for item in value)
    if isinstance(value, dict):
        return {key: _to_meta(program, item) for key, item in value.items() if key != "device"}
    return value
