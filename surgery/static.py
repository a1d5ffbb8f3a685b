"""Static least squares: every layer is fitted on the dense network's activations alone.

For a layer with inputs U the Gram matrix G = U'U is taken once; when only the inputs K are kept,
the weights that best reproduce the dense outputs are W G[:, K] (G[K, K] + lambda I)^-1. A plan
costs one small solve per layer and no forward pass.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from paretoprune.surgery.consumers import Consumer, find_consumers
from paretoprune.surgery.execute import Execution, Values
from paretoprune.surgery.graph import PruningGraph
from paretoprune.surgery.inputs import Batches, gather_inputs, sample_positions
from paretoprune.surgery.least_squares import output_positions, patches, solve_ridge
from paretoprune.surgery.plan import PruningPlan
from paretoprune.surgery.program import Node
from paretoprune.surgery.progress import Parts

IMAGES = 512
"""Calibration examples by default."""
SAMPLES = 8192
"""Output positions per layer by default."""


class StaticReconstructor:
    """Refits pruned networks of one dense network from Gram matrices that are taken once.

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
        self._weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
        self._consumers = {
            name: consumer
            for name, consumer in find_consumers(graph).items()
            if not consumer.fixed
            and consumer.geometry.groups == 1
            and (consumer.weight, 1) in graph.units
        }
        self._grams: dict[str, tuple[Tensor, Tensor]] = {}

        def before(node: Node, values: Values) -> None:
            consumer = self._consumers.get(node.name)
            if consumer is not None:
                features = self._features(consumer, values[consumer.source], samples)
                mean = features.mean(0)
                if consumer.bias is None and consumer.norm is None:  # nothing can carry a shift
                    mean = torch.zeros_like(mean)
                centred = features - mean
                self._grams[node.name] = ((centred.T @ centred).double(), mean)

        Execution(graph).run(model, gather_inputs(calibration, images), before=before)

    @staticmethod
    def _features(consumer: Consumer, inputs: Tensor, samples: int) -> Tensor:
        total = output_positions(inputs, consumer.geometry)
        positions = sample_positions(total, samples, inputs.device)
        return patches(inputs, consumer.geometry, positions)[0]

    def __call__(
        self, small: nn.Module, plan: PruningPlan, *, progress: Parts | None = None
    ) -> nn.Module:
        """Returns a refitted copy of a pruned network.

        Args:
            small: `prune(model, graph, plan)`; left untouched.
            plan: The plan it was pruned with.
            progress: Called after every layer with (layers done, layers in all).
        """
        result = copy.deepcopy(small)
        tensors = dict([*result.named_parameters(), *result.named_buffers()])
        mask = self._graph.kept_mask(plan)
        for done, consumer in enumerate(self._consumers.values(), 1):
            kept = mask[self._graph.units[consumer.weight, 1]]
            if consumer.weight in tensors and not bool(kept.all()):
                self._refit(consumer, tensors, mask, kept)
            if progress is not None:
                progress(done, len(self._consumers))
        return result

    def _refit(
        self, consumer: Consumer, tensors: dict[str, Tensor], mask: Tensor, kept: Tensor
    ) -> None:
        weight = tensors[consumer.weight].detach()
        dense = self._weights[consumer.weight]
        rows = self._graph.units.get((consumer.weight, 0))
        if rows is not None:
            dense = dense[mask[rows].to(dense.device)]
        dense = dense.flatten(1)
        gram, mean = self._grams[consumer.node]
        inside = kept.repeat_interleave(dense.shape[1] // len(kept)).to(dense.device)
        cross = gram[inside] @ dense.double().T
        new = solve_ridge(gram[inside][:, inside][None], cross[None], dense[None, :, inside])[0]
        weight.copy_(new.reshape(weight.shape))
        shift = dense @ mean - new @ mean[inside]
        if consumer.bias is not None:
            tensors[consumer.bias].detach().add_(shift)
        elif consumer.norm is not None:  # BN(conv + shift) is BN with its mean lowered by shift
            tensors[consumer.norm.mean].sub_(shift)
