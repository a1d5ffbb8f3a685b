"""PROscore: the angle to the zero filter in projective space after a gradient step.

IPPRO, arXiv:2507.14171 (ICCV workshops 2025). Every filter F is embedded as [F : D] with D = |F|,
so that all have the same angle to the zero filter [0 : 1], whose tangent |F| / D is 1. One step of
gradient descent on F and on D follows; filters that moved towards zero go first. D is the factor
of a leak around the filter's activation, psi(x) = sigma(x) + (D - |F|) x, which leaves the network
as it is and has the derivative d = dL/dD = sum of (what enters sigma) * (dL / what leaves it).

With g = dL/dF, r = |F| and a step lambda:

    literal:     |F - lambda g| / | r - lambda d |
    normalised:  |F/r - eta r g| / | 1 - eta d |       a step of eta r^2 on F and eta r on D
    slope:       d - <F, g>                            the derivative of both at eta = 0

The literal score is the one that reviewers of the paper restate; the embedding, the normalised and
the slope form, and the choice of the step, are derived. Only the normalised form and the slope do
not change when a filter is rescaled and the network's function is not.

F is the filter's weight and bias without the norm's scale and shift; coupled filters are
concatenated and their leaks summed. A block is scored like a sum of its units, by their mean.
Gradients are taken in eval mode, with the BatchNorm statistics of the trained network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from paretoprune.criteria.base import Calibration, CostClass
from paretoprune.criteria.shared import SharedCalibration
from paretoprune.criteria.units import Units
from paretoprune.surgery import PruningGraph

Form = Literal["normalised", "literal", "slope"]
_STEP = 0.1


@dataclass(frozen=True, slots=True)
class Proscore:
    """Tangent of a filter's angle to the zero filter after a gradient step.

    Attributes:
        form: `normalised` is invariant to the scale of filters, `literal` is not, `slope` is the
            limit of small steps, whose values may be negative.
        step: eta, or lambda for `literal`; None takes 0.1 over the largest |d| + r |g| (for
            `literal` over the largest (|d| + |g|) / r), so that no filter crosses zero.
    """

    form: Form = "normalised"
    step: float | None = None
    summary: ClassVar[str] = "angle to the zero filter in projective space after a gradient step"
    paper: ClassVar[str] = "IPPRO, arXiv:2507.14171 (partly derived)"
    cost: ClassVar[CostClass] = CostClass.GRADIENTS

    def __post_init__(self) -> None:
        if self.form not in ("normalised", "literal", "slope"):
            raise ValueError(f"form is 'normalised', 'literal' or 'slope', but got {self.form!r}.")

    def __call__(
        self, model: nn.Module, graph: PruningGraph, calibration: Calibration
    ) -> Mapping[str, Tensor]:
        """See `Criterion`.

        Raises:
            ValueError: If `calibration` has no batch.
        """
        measured = SharedCalibration.of(calibration).statistics(model, graph)
        units = Units(graph)
        parameters = dict(model.named_parameters())
        norm, push, along = (torch.zeros_like(measured.leaks) for _ in range(3))
        for name, axis in units.filters.items():
            if name not in parameters:  # a fixed filter
                continue
            weight = parameters[name].detach().double()
            norm += units.summed(weight.square(), name, axis)
            if name in measured.gradient:
                gradient = measured.gradient[name].double()
                push += units.summed(gradient.square(), name, axis)
                along += units.summed(weight * gradient, name, axis)
        scores = proscore(
            norm.sqrt(), push.sqrt(), along, measured.leaks, form=self.form, step=self.step
        )
        return units.by_group(scores)


def proscore(
    norm: Tensor, push: Tensor, along: Tensor, leak: Tensor, *, form: Form, step: float | None
) -> Tensor:
    """Returns the scores of filters; zero filters have 0, but the slope of theirs.

    Args:
        norm: r = |F| of every filter, float64, shape (n,).
        push: |g|, likewise.
        along: <F, g>, likewise.
        leak: d, likewise.
        form: See the module.
        step: See `Proscore`.
    """
    if form == "slope":
        return leak - along
    alive = norm > 0
    safe = torch.where(alive, norm, 1.0)
    # in homogeneous coordinates of norm 1 both forms are one, with a step of their own
    scale = norm if form == "normalised" else 1 / safe
    turn = 1.0 if form == "normalised" else 1 / safe
    if step is None:
        most = float((turn * leak.abs() + scale * push).max()) if len(norm) else 0.0
        step = _STEP / most if most > 0 else 0.0
    twist = along if form == "normalised" else along / safe.square()
    length = (1 - 2 * step * twist + (step * scale * push).square()).clamp_min(0).sqrt()
    drop = (1 - step * turn * leak).abs().clamp_min(torch.finfo(norm.dtype).tiny)
    return torch.where(alive, length / drop, 0.0)
