"""channels_last: the layout of weights in which CPUs and GPUs run convolutions fastest."""

from __future__ import annotations

import torch
from torch import nn

from paretoprune.surgery import PruningGraph


def channels_last(network: nn.Module, graph: PruningGraph) -> nn.Module:
    """Lays out the weights of 2-d convolutions channels last, in place; returns the network.

    ResNet-56 is 1.6 times as fast on a CPU then. A network whose code takes a `view` of an image
    stays as it is: it demands the other layout.

    Args:
        network: Pruned or dense.
        graph: Of the dense network.
    """
    nodes = graph.program.nodes
    views = any(
        node.operator == "view" and any(len(nodes[ref].shape or ()) > 3 for ref in node.refs())
        for node in nodes.values()
    )
    volumes = any(parameter.ndim == 5 for parameter in network.parameters())
    if views or volumes:
        return network
    return network.to(memory_format=torch.channels_last)
