"""Sequential reconstruction: the pruned network is refitted, layer by layer, to the dense one.

The program runs once, pruned, on a few hundred training images. Right before a layer whose input
has changed runs, its weights are fitted by least squares so that what it adds to the residual
stream makes the stream what it is in the dense network; errors of earlier layers are corrected
and not carried on. No gradient, no training.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from paretoprune.surgery.consumers import Consumer, Norm, find_consumers
from paretoprune.surgery.execute import Execution, Values
from paretoprune.surgery.graph import PruningGraph
from paretoprune.surgery.inputs import Batches, gather_inputs, has_rows, sample_positions
from paretoprune.surgery.least_squares import Geometry, patches, ridge_fit, rows
from paretoprune.surgery.plan import PruningPlan
from paretoprune.surgery.program import Node
from paretoprune.surgery.progress import Parts
from paretoprune.surgery.static import IMAGES, SAMPLES, StaticReconstructor

_FLAT = 1e-3  # a BatchNorm gain below this share of the largest one carries nothing to fit


class Reconstructor:
    """Reconstructs many pruned networks of one dense network; the dense side is computed once.

    Args:
        model: The dense network; left untouched.
        graph: Its graph.
        calibration: A re-iterable of (inputs, targets) batches of training data.
        images: At most this many examples are used.
        samples: At most this many output positions per layer are used.

    Raises:
        ValueError: If `calibration` has no batch.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: PruningGraph,
        calibration: Batches,
        *,
        images: int = IMAGES,
        samples: int = SAMPLES,
    ) -> None:
        self._graph = graph
        self._inputs = gather_inputs(calibration, images)
        leaves = torch.utils._pytree.tree_leaves(self._inputs)
        self._count = next(len(leaf) for leaf in leaves if has_rows(leaf))
        self._consumers = {
            name: consumer
            for name, consumer in find_consumers(graph).items()
            if not consumer.fixed
        }
        self._samples = samples
        self._positions: dict[str, Tensor] = {}
        self._dense: dict[str, Tensor] = {}
        self._dense_shapes = {
            name: tuple(tensor.shape) for name, tensor in model.named_parameters()
        }
        self._observe(model)

    def _observe(self, model: nn.Module) -> None:
        """Runs the dense network once and keeps what every layer should reproduce."""
        wanted: dict[str, list[Consumer]] = {}
        for consumer in self._consumers.values():
            wanted.setdefault(consumer.target, []).append(consumer)

        def after(node: Node, values: Values) -> None:
            for consumer in wanted.get(node.name, ()):
                value = values[node.name]
                geometry = consumer.geometry
                total = value.numel() // value.shape[1 if geometry.kernel else -1]
                positions = sample_positions(total, self._samples, value.device)
                self._positions[consumer.node] = positions
                self._dense[consumer.node] = rows(value, geometry, positions).clone()

        Execution(self._graph).run(model, self._inputs, after=after)

    def __call__(
        self, small: nn.Module, plan: PruningPlan, *, progress: Parts | None = None
    ) -> nn.Module:
        """Returns a reconstructed copy of a pruned network.

        Args:
            small: `prune(model, graph, plan)`; left untouched.
            plan: The plan it was pruned with.
            progress: Called after every layer with (layers done, layers in all).
        """
        result = copy.deepcopy(small)
        tensors = dict([*result.named_parameters(), *result.named_buffers()])
        mask = self._graph.kept_mask(plan)
        changed = {self._graph.extents[name].result for name in plan.removed}
        total = sum(consumer.weight in tensors for consumer in self._consumers.values())
        done = 0
        execution = Execution(self._graph, plan)

        def before(node: Node, values: Values) -> None:
            nonlocal done
            consumer = self._consumers.get(node.name)
            if consumer is None:
                return
            done += 1
            weight = tensors[consumer.weight]
            cut = weight.shape[1] != self._dense_shapes[consumer.weight][1]
            if cut or consumer.source in changed:
                units = self._graph.units.get((consumer.weight, 0))
                kept = None if units is None else mask[units].nonzero().squeeze(1)
                known = execution.ahead(consumer.ahead, values, self._count)
                self._refit(consumer, tensors, known, kept)
                changed.add(node.name)
            if progress is not None:
                progress(done, total)

        def after(node: Node, values: Values) -> None:
            if any(name in changed for name in node.refs()):
                changed.add(node.name)

        execution.run(result, self._inputs, before=before, after=after)
        return result

    def _refit(
        self, consumer: Consumer, tensors: dict[str, Tensor], values: Values, kept: Tensor | None
    ) -> None:
        weight = tensors[consumer.weight].detach()
        bias = tensors[consumer.bias].detach() if consumer.bias else None
        inputs = values[consumer.source]
        geometry = dataclasses.replace(
            consumer.geometry, groups=_groups(consumer.geometry, weight, inputs)
        )
        positions = self._positions[consumer.node]
        features = patches(inputs, geometry, positions)
        targets = self._dense[consumer.node]
        if kept is not None:
            targets = targets.index_select(1, kept.to(targets.device))
        fitted = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        if consumer.shortcut is not None:
            targets = targets - rows(values[consumer.shortcut], geometry, positions)
            if consumer.norm is not None:
                targets, fitted = _before_norm(targets, consumer.norm, tensors)
        if consumer.offset is not None:
            targets = targets - values[consumer.offset]
        prior = weight.reshape(geometry.groups, len(weight) // geometry.groups, -1)
        goals = targets.reshape(len(positions), geometry.groups, -1).transpose(0, 1)
        intercept = bias is not None or consumer.norm is not None
        fit = ridge_fit(features, goals, prior, intercept=intercept)
        new = torch.where(
            fitted[:, None], fit.weight.reshape(len(weight), -1), prior.flatten(0, 1)
        )
        shift = fit.bias.reshape(-1)
        weight.copy_(new.reshape(weight.shape))
        if bias is not None:
            bias.copy_(torch.where(fitted, shift, bias))
        elif consumer.norm is not None:  # BN(conv + shift) is BN with its mean lowered by shift
            tensors[consumer.norm.mean].sub_(torch.where(fitted, shift, 0))


def reconstruct(
    small: nn.Module,
    model: nn.Module,
    graph: PruningGraph,
    plan: PruningPlan,
    calibration: Batches,
    *,
    method: Literal["sequential", "static"] = "sequential",
    progress: Parts | None = None,
) -> nn.Module:
    """Returns a copy of a pruned network, refitted without training to the dense network.

    Args:
        small: `prune(model, graph, plan)`; left untouched.
        model: The dense network; left untouched.
        graph: Its graph.
        plan: The plan `small` was pruned with.
        calibration: A re-iterable of (inputs, targets) batches of training data; a few hundred
            images are enough.
        method: `sequential` walks the pruned network in order and corrects earlier errors;
            `static` fits every layer on the dense network's activations, without running the
            pruned one.
        progress: Called after every layer with (layers done, layers in all).

    Raises:
        ValueError: If there is no batch, or the method is unknown.
    """
    if method == "sequential":
        return Reconstructor(model, graph, calibration)(small, plan, progress=progress)
    if method == "static":
        return StaticReconstructor(model, graph, calibration)(small, plan, progress=progress)
    raise ValueError(f"method is 'sequential' or 'static', but got {method!r}.")


def _groups(geometry: Geometry, weight: Tensor, inputs: Tensor) -> int:
    if geometry.groups == 1:
        return 1
    return inputs.shape[1] // weight.shape[1]


def _before_norm(targets: Tensor, norm: Norm, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns targets before a BatchNorm, and which channels its gain lets through at all."""
    deviation = (tensors[norm.variance] + norm.epsilon).sqrt()
    scale = tensors[norm.scale].detach() if norm.scale else torch.ones_like(deviation)
    shift = tensors[norm.shift].detach() if norm.shift else torch.zeros_like(deviation)
    gain = scale / deviation
    through = gain.abs() > _FLAT * gain.abs().max()
    safe = torch.where(through, gain, 1.0)
    return (targets - shift) / safe + tensors[norm.mean], through
