"""SOSP: second-order structured pruning with correlations across all layers.

Nonnenmacher et al., ICLR 2022, arXiv:2110.11395. The equations are derived: the paper's method
section could not be read, and these follow from its abstract and a second-order expansion. A
structure s is a unit and owns the weights that make it (filter, bias, norm); theta_s is the
parameter vector with everything else zeroed.

SOSP-H takes the exact Hessian and all structures as partners, since most of them will go:

    saliency(s) = |theta_s.g| + 1/2 |theta_s H (sum of all theta_s')|

one gradient and one Hessian-vector product for all structures together. It is additive, so a
block's saliency, per unit that it removes, is the mean over its inner units.

SOSP-I takes the Gauss-Newton matrix G and counts the partners that have left already. With
Q_ss' = theta_s G theta_s' units leave greedily, the one with the least

    |theta_s.g| + 1/2 |Q_ss| + sum over gone s' of |Q_ss'|

first. That increment is the saliency: it never falls from one removal to the next (every
candidate's increment only grows, and each one taken was the least), so it carries the order.

Of the absolute values, only their places in these three lines are uncertain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from paretoprune.criteria.base import Calibration, CostClass
from paretoprune.criteria.differentiable import Outputs, leaves_of, run
from paretoprune.criteria.shared import SharedCalibration
from paretoprune.criteria.statistics import loss_on
from paretoprune.criteria.units import Units
from paretoprune.surgery import PruningGraph
from paretoprune.surgery.execute import Values
from paretoprune.surgery.inputs import count_rows, some_rows
from paretoprune.surgery.program import Node

_OUTPUTS = 2048  # of an example: their Hessian has so many squared numbers


@dataclass(frozen=True, slots=True)
class SospH:
    """Gradient and Hessian-vector product with all structures as partners."""

    summary: ClassVar[str] = "second-order loss change with the exact Hessian across all layers"
    paper: ClassVar[str] = "Nonnenmacher et al., ICLR 2022, arXiv:2110.11395 (derived)"
    cost: ClassVar[CostClass] = CostClass.HESSIAN

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Calibration
    ) -> Mapping[str, Tensor]:
        """See `Criterion`.

        Raises:
            ValueError: If `calibration` has no batch.
        """
        measured = SharedCalibration.of(calibration).statistics(model, graph, curvature=True)
        assert measured.curvature is not None, "it was asked for"
        return Units(graph).by_group(measured.slopes.abs() + measured.curvature.abs() / 2)


@dataclass(frozen=True, slots=True)
class SospI:
    """Greedy removal by gradient and Gauss-Newton correlations with what left before.

    Memory is quadratic in the number of units, time linear in examples times outputs. Units made
    by something else than a convolution, a linear layer or a norm leave last.

    Attributes:
        images: Calibration examples used at most, for the Gauss-Newton matrix.
    """

    images: int = 1000
    summary: ClassVar[str] = "greedy, Gauss-Newton correlations with the units gone before"
    paper: ClassVar[str] = "Nonnenmacher et al., ICLR 2022, arXiv:2110.11395 (derived)"
    cost: ClassVar[CostClass] = CostClass.JACOBIAN

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Calibration
    ) -> Mapping[str, Tensor]:
        """See `Criterion`.

        Raises:
            ValueError: If `calibration` has no batch, or the network does not return one tensor.
        """
        shared = SharedCalibration.of(calibration)
        units = Units(graph)
        slopes = shared.statistics(model, graph).slopes
        seen = torch.zeros(units.count + 1, dtype=torch.bool)
        for tap in units.taps:
            seen[tap.units] = True
        ranked = (seen[:-1] & units.open).to(slopes.device)
        increments = torch.zeros_like(slopes)
        if bool(ranked.any()):
            matrix = gauss_newton(model, graph, shared, self.images)
            increments[ranked] = greedy(slopes[ranked], matrix[ranked][:, ranked])
            increments[~ranked] = increments[ranked].max()
        return units.by_group(increments)


def greedy(slopes: Tensor, matrix: Tensor) -> Tensor:
    """Returns what each structure adds to the loss estimate when it leaves, shape (S,).

    Sorted by it, structures are in the order in which they leave.

    Args:
        slopes: theta_s.g, shape (S,).
        matrix: Q, shape (S, S).
    """
    increments = slopes.abs() + matrix.diagonal().abs().to(slopes.dtype) / 2
    couplings = matrix.abs()
    waiting = increments.clone()
    for _ in range(len(slopes)):
        leaving = int(waiting.argmin())
        increments[leaving] = waiting[leaving]
        waiting += couplings[leaving]
        waiting[leaving] = torch.inf
    return increments


def gauss_newton(
    model: nn.Module, graph: PruningGraph, calibration: SharedCalibration, images: int
) -> Tensor:
    """Returns Q_ss' = theta_s G theta_s' of all units of a graph, float64, shape (n, n).

    G is the mean over examples of J'RJ, J the Jacobian of the outputs and R the Hessian of the
    loss with respect to them; for a cross entropy diag(p) - pp'. Layers and norms are linear in
    their own weights, so J theta_s is the derivative with respect to a factor on all that the
    structure's layers put out: one backward pass per output for all structures together.

    Args:
        model: The dense network; left untouched.
        graph: Its graph.
        calibration: Training batches and the loss.
        images: At most this many examples are used.

    Raises:
        ValueError: If there is no batch, or the outputs are not one tensor per example, of few
            numbers.
    """
    units = Units(graph)
    _, tensors = leaves_of(model)
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    taps: dict[str, Any] = {tap.node: tap for tap in units.taps}
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    total = torch.zeros(units.count, units.count, dtype=torch.float64, device=device)
    outputs: Outputs | None = None
    seen = 0
    for inputs, targets in calibration:
        inputs, targets = some_rows((inputs, targets), 0, images - seen)
        outputs = outputs or Outputs(model, graph, inputs)
        count = count_rows(targets)
        dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
        gates = torch.ones(count, units.count + 1, dtype=dtype, device=device).requires_grad_()

        def after(node: Node, values: Values, gates: Tensor = gates) -> Tensor | None:
            tap = taps.get(node.name)
            return None if tap is None else units.gated(values[node.name], tap, gates)

        result = outputs(run(graph, tensors, inputs, after=after))
        if not isinstance(result, Tensor) or len(result) != count:
            raise ValueError(
                "sosp_i needs a network that returns one tensor with a row per example, but "
                f"got {type(result).__name__}."
            )
        columns = result.reshape(count, -1)
        if columns.shape[1] > _OUTPUTS:
            raise ValueError(
                f"sosp_i takes a backward pass for each of at most {_OUTPUTS} outputs of an "
                f"example, but the network returns {columns.shape[1]}; rank by sosp_h instead."
            )
        jacobian = torch.stack(
            [
                torch.autograd.grad(column.sum(), gates, retain_graph=True)[0][:, :-1]
                for column in columns.unbind(1)
            ],
            1,
        ).double()
        hessian = _loss_hessian(calibration, result.detach(), targets) * count
        total += torch.einsum("nds,nde,net->st", jacobian, hessian, jacobian)
        seen += count
        if seen >= images:
            break
    if not seen:
        raise ValueError("the sosp_i criterion needs calibration data, but got no batch.")
    return total / seen


def _loss_hessian(calibration: SharedCalibration, outputs: Tensor, targets: Any) -> Tensor:
    """Returns the Hessian of the mean loss by each example's outputs, shape (N, D, D)."""
    with torch.enable_grad():
        leaf = outputs.double().requires_grad_()
        goal = tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, targets)
        loss = loss_on(calibration.loss, leaf.device, leaf.dtype)(leaf, goal)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        rows = [
            torch.autograd.grad(column.sum(), leaf, retain_graph=True)[0].reshape(len(outputs), -1)
            for column in gradient.reshape(len(outputs), -1).unbind(1)
        ]
    return torch.stack(rows, 1).detach()
