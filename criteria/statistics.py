"""Statistics: what one pass of gradients over the calibration data tells about every unit.

Every gradient-based criterion reads its numbers here, so that they share one pass. Batches stream:
memory is the activations of `_AT_ONCE` examples (with curvature several times over), the mean
gradient, and a few numbers per unit. All is measured in eval mode, with the BatchNorm statistics
of the trained network.

Legend: n is the number of all units; theta_s the parameters with all that structure s does not
own zeroed; g the gradient and H the Hessian of the mean loss; w one parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretoprune.criteria.convolution import convolution
from paretoprune.criteria.differentiable import Outputs, leaves_of, run
from paretoprune.criteria.units import CONVOLUTIONS, LAYERS, Tap, Units
from paretoprune.surgery import PruningGraph
from paretoprune.surgery.execute import Values
from paretoprune.surgery.inputs import count_rows, some_rows
from paretoprune.surgery.program import Node, Ref

Loss = Callable[[Any, Any], Tensor]
"""(outputs, targets) -> scalar mean loss of a batch."""
_ACTIVATIONS = {
    *("relu", "relu6", "hardtanh", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish"),
    *("hardswish", "hardsigmoid", "sigmoid", "tanh", "softplus"),
}
_AT_ONCE = 32  # examples; more take more memory and, on a CPU, up to three times as long
_ELEMENTWISE = {"dropout", "feature_dropout", "clone", "contiguous", "alias", "detach"}


def loss_on(loss: Loss, device: torch.device, dtype: torch.dtype | None = None) -> Loss:
    """Returns a loss on a device: of a module with tensors, such as class weights, a copy.

    Args:
        loss: (outputs, targets) -> scalar mean loss.
        device: Where outputs and targets are.
        dtype: That floating-point tensors take on; None leaves theirs.
    """
    return copy.deepcopy(loss).to(device, dtype) if isinstance(loss, nn.Module) else loss


@dataclass(frozen=True, slots=True)
class Statistics:
    """Means over the calibration examples; vectors are float64 on the network's device.

    Attributes:
        examples: How many there were.
        gradient: g by parameter name, in the parameter's shape; parameters without one are not
            there.
        changes: Sum over coupled parameters of (theta_s.g)^2 of a batch, mean over batches; every
            weight that a unit makes or is read by counts. Shape (n,).
        fisher: Sum over all coupled weights of w^2 times the diagonal of the empirical Fisher
            matrix, which is estimated as the batch size times the squared gradient of a batch,
            mean over batches: unbiased where g is zero. Shape (n,).
        slopes: theta_s.g over the weights that a unit owns (`Units.owned`), shape (n,).
        leaks: Derivative of the loss by a leak around the unit's activations: the sum over
            positions of what enters an activation times the gradient of what leaves it, shape
            (n,). Zero for units without an activation of their own.
        curvature: theta_s H theta_all over owned weights, theta_all the sum of theta_s over the
            open units, shape (n,); None if it was not asked for.
    """

    examples: int
    gradient: Mapping[str, Tensor]
    changes: Tensor
    fisher: Tensor
    slopes: Tensor
    leaks: Tensor
    curvature: Tensor | None


def statistics(
    model: nn.Module,
    graph: PruningGraph,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss,
    *,
    curvature: bool = False,
) -> Statistics:
    """Returns the statistics of a network on calibration data.

    Args:
        model: The dense network; left untouched.
        graph: Its graph.
        batches: A re-iterable of (inputs, targets).
        loss: (outputs, targets) -> scalar mean loss.
        curvature: Whether the product with the Hessian is measured too, by a second backward
            pass through the first (Pearlmutter, Neural Computation 1994).

    Raises:
        ValueError: If there is no batch, or the loss has no gradient.
    """
    gathering = _Gathering(model, graph, loss, curvature)
    for inputs, targets in batches:
        gathering.add(inputs, targets)
    return gathering.result()


class _Gathering:
    """Sums over the batches so far."""

    def __init__(self, model: nn.Module, graph: PruningGraph, loss: Loss, curvature: bool) -> None:
        self._model, self._graph = model, graph
        self._leaves, self._tensors = leaves_of(model)
        self._units = Units(graph)
        self._activated = activation_units(graph)
        self._taps = {tap.node: tap for tap in self._units.taps} if curvature else {}
        self._norms = _norms_with_layers(graph, self._taps)
        self._convolutions = {
            name: convolution
            for name in self._taps
            if graph.program.nodes[name].operator in CONVOLUTIONS
        }
        nodes = graph.program.nodes.values() if curvature else ()
        self._smooth = {
            node.name: _hardsigmoid for node in nodes if node.operator == "hardsigmoid"
        }
        first = next(iter(self._leaves.values()), torch.zeros(0))
        device, self._dtype = first.device, first.dtype
        self._loss = loss_on(loss, device)
        self._vectors = {
            name: torch.zeros(self._units.count, dtype=torch.float64, device=device)
            for name in ("changes", "fisher", "leaks", "curvature")
        }
        self._open = self._units.open.to(device)
        self._gradient: dict[str, Tensor] = {}
        self._outputs: Outputs | None = None
        self._curvature = curvature
        self._examples = self._batches = 0

    def add(self, inputs: Any, targets: Any) -> None:
        """Adds the gradients of a batch."""
        if self._outputs is None:
            self._outputs = Outputs(self._model, self._graph, inputs)
        count = count_rows(targets)
        gradient: dict[str, Tensor] = {}
        for start in range(0, count, _AT_ONCE):
            few, part = some_rows((inputs, targets), start, start + _AT_ONCE)
            for name, value in self._part(self._outputs, few, part).items():
                scaled = value * (count_rows(part) / count)
                gradient[name] = gradient[name].add_(scaled) if name in gradient else scaled
        self._add_gradient(gradient, count)
        self._examples += count
        self._batches += 1

    def _part(self, outputs: Outputs, inputs: Any, targets: Any) -> dict[str, Tensor]:
        """Returns the gradient of some examples' mean loss, and adds all else about them."""
        entering: dict[str, Tensor] = {}
        leaving: dict[str, Tensor] = {}

        def before(node: Node, values: Values) -> None:
            if node.name in self._activated:
                value = values[node.args[0].name].detach()
                overwritten = node.in_place
                entering[node.name] = value.clone() if overwritten else value

        gates = torch.ones(1, self._units.count + 1, dtype=self._dtype, device=self._open.device)
        gates.requires_grad_()
        norms = {
            name: self._units.gated_norm(self._taps[name], self._taps.get(layer), gates)
            for name, layer in self._norms.items()
        }
        instead = {**norms, **self._convolutions, **self._smooth}
        merged = {*self._norms, *self._norms.values()}

        def after(node: Node, values: Values) -> None:
            if node.name in self._taps and node.name not in merged:
                tap = self._taps[node.name]
                values[node.name] = self._units.gated(values[node.name], tap, gates)
            if node.name in self._activated and values[node.name].requires_grad:
                leaving[node.name] = values[node.name]

        values = run(
            self._graph, self._tensors, inputs, before=before, after=after, instead=instead
        )
        loss = self._loss(outputs(values), targets)
        del values
        names, leaves = list(self._leaves), list(self._leaves.values())
        wanted = [*leaves, *leaving.values(), *([gates] if self._taps else [])]
        if not loss.requires_grad:
            raise ValueError(
                "criteria that take gradients need a loss that has one, but that of the problem "
                "does not depend on the outputs in a way that torch differentiates."
            )
        gradients = torch.autograd.grad(
            loss, wanted, create_graph=self._curvature, allow_unused=True
        )
        count = count_rows(targets)
        known = {n: g for n, g in zip(names, gradients, strict=False) if g is not None}
        if self._curvature:
            self._add_curvature(known, gates, gradients[-1] if self._taps else None, count)
        for name, gradient in zip(leaving, gradients[len(names) :], strict=False):
            if gradient is not None:
                self._add_leak(name, entering[name], gradient.detach(), count)
        return {name: gradient.detach() for name, gradient in known.items()}

    def _add_gradient(self, gradients: Mapping[str, Tensor], count: int) -> None:
        for name, gradient in gradients.items():
            before = self._gradient.get(name)
            scaled = gradient * count
            self._gradient[name] = scaled if before is None else before.add_(scaled)
        products = {name: g * self._leaves[name].detach() for name, g in gradients.items()}
        for name, axis in self._units.places(products):
            change = self._units.summed(products[name], name, axis)
            self._vectors["changes"] += change.square()
            squares = self._units.summed(products[name].square(), name, axis)
            self._vectors["fisher"] += count * squares

    def _add_leak(self, node: str, entering: Tensor, gradient: Tensor, count: int) -> None:
        axis, units = self._activated[node]
        if axis == 1:  # channels first: positions are next to each other
            shape = (*entering.shape[:2], -1)
            products = torch.linalg.vecdot(entering.reshape(shape), gradient.reshape(shape))
            line = products.sum(0).double()
        else:
            line = (entering * gradient).flatten(0, -2).sum(0).double()
        total = line.new_zeros(self._units.count + 1)
        places = units.remainder(self._units.count + 1).to(line.device)
        self._vectors["leaks"] += count * total.index_add(0, places, line)[:-1]

    def _add_curvature(
        self, gradients: Mapping[str, Tensor], gates: Tensor, slopes: Tensor | None, count: int
    ) -> None:
        """Adds the product of the Hessian with the sum of all open structures.

        The loss is differentiated twice by factors on the structures: gates on what taps put out,
        which saves the gradients of their weights, and the weights themselves elsewhere.
        """
        tapped = {name for tap in self._taps.values() for name in tap.weights}
        owned = {
            name: axis
            for name, axis in self._units.owned.items()
            if name in gradients and name not in tapped
        }
        slope = torch.zeros((), dtype=self._dtype, device=self._open.device)
        if slopes is not None:
            slope = slope + (slopes[0, :-1] * self._open).sum()
        for name, axis in owned.items():
            leaf = self._leaves[name].detach()
            mask = self._units.spread(self._open.to(leaf.dtype), name, axis, leaf.ndim)
            slope = slope + (gradients[name] * leaf * mask).sum()
        if not slope.requires_grad:
            return
        factors = [gates, *(self._leaves[name] for name in owned)]
        bend, *products = torch.autograd.grad(slope, factors, allow_unused=True)
        if bend is not None:
            self._vectors["curvature"] += count * bend[0, :-1].double()
        for (name, axis), product in zip(owned.items(), products, strict=True):
            if product is not None:
                summed = self._units.summed(product * self._leaves[name].detach(), name, axis)
                self._vectors["curvature"] += count * summed

    def result(self) -> Statistics:
        """Returns the means over all batches."""
        if not self._examples:
            raise ValueError("the criterion needs calibration data, but got no batch.")
        gradient = {name: total / self._examples for name, total in self._gradient.items()}
        slopes = torch.zeros_like(self._vectors["leaks"])
        for name, axis in self._units.owned.items():
            if name in gradient:
                product = gradient[name] * self._leaves[name].detach()
                slopes += self._units.summed(product, name, axis)
        vectors = self._vectors
        return Statistics(
            examples=self._examples,
            gradient=gradient,
            changes=vectors["changes"] / self._batches,
            fisher=vectors["fisher"] / self._batches,
            slopes=slopes,
            leaks=vectors["leaks"] / self._examples,
            curvature=vectors["curvature"] / self._examples if self._curvature else None,
        )


def _hardsigmoid(operator: Callable[..., Any], args: list[Any], _: dict[str, Any]) -> Tensor:
    """Returns the hard sigmoid by operators that torch differentiates twice."""
    value = F.relu6(args[0] + 3) / 6
    overwrites = str(operator).endswith("hardsigmoid_.default")
    return args[0].copy_(value) if overwrites else value


def _norms_with_layers(graph: PruningGraph, taps: Mapping[str, Tap]) -> dict[str, str]:
    """Returns the BatchNorms among taps, each with the layer that it alone reads, or no name.

    Those without a scale or with the statistics of the batch are left out.
    """
    nodes, users = graph.program.nodes, graph.program.users()
    found: dict[str, str] = {}
    for name in taps:
        node = nodes[name]
        if node.operator == "batch_norm" and node.args[5] is False:
            source = node.args[0].name
            alone = [user.name for user in users[source]] == [name]
            layer = source in taps and nodes[source].operator in LAYERS and taps[source].axis == 1
            found[name] = source if layer and alone and source not in graph.program.outputs else ""
    return found


def activation_units(graph: PruningGraph) -> dict[str, tuple[int, Tensor]]:
    """Returns, by activation, the axis of its channels and the unit at each of them.

    Activations whose channels are not simply those of a layer, a norm or a sum are left out.
    """
    nodes = graph.program.nodes
    taps = {tap.node: (tap.axis, tap.units) for tap in Units(graph).taps}
    found: dict[str, tuple[int, Tensor]] = {}

    def channels(name: str) -> tuple[int, Tensor] | None:
        node = nodes[name]
        if name in taps:
            return taps[name]
        if node.operator not in _ELEMENTWISE | _ACTIVATIONS | {"add", "batch_norm"}:
            return None
        refs = [ref.name for ref in node.args if isinstance(ref, Ref)]
        values = refs[:2] if node.operator == "add" else refs[:1]
        known = (channels(ref) for ref in values)
        return next((each for each in known if each is not None), None)

    for node in nodes.values():
        if node.operator in _ACTIVATIONS and isinstance(node.args[0], Ref):
            known = channels(node.args[0].name)
            if known is not None:
                found[node.name] = known
    return found
