"""recalibrate: BatchNorm statistics re-estimated on training batches."""

from __future__ import annotations

import copy
from collections.abc import Sized

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from paretoprune.surgery.inputs import Batches
from paretoprune.surgery.program import as_call
from paretoprune.surgery.progress import Parts


def recalibrate(
    small: nn.Module, calibration: Batches, *, progress: Parts | None = None
) -> nn.Module:
    """Returns a copy whose BatchNorm statistics are those of the calibration batches.

    Statistics are the plain average over batches; 1,000 to 2,000 class-balanced training images
    with the training augmentation are enough. A network without BatchNorm comes back unchanged,
    and so do norms that no batch reaches, as in an auxiliary head.

    Args:
        small: A network; left untouched.
        calibration: A re-iterable of (inputs, targets) batches of training data.
        progress: Called after every batch with (batches done, batches in all or 0 if unknown).

    Raises:
        ValueError: If there is no batch.
    """
    result = copy.deepcopy(small)
    norms = _norms(result)
    modes = {module: module.training for module in result.modules()}
    result.eval()
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # averages over all batches
    total = len(calibration) if isinstance(calibration, Sized) else 0
    done = 0
    with torch.no_grad():
        for inputs, _ in calibration:
            args, kwargs = as_call(inputs)
            result(*args, **kwargs)
            done += 1
            if progress is not None:
                progress(done, total)
    if not done:
        raise ValueError("recalibration needs calibration data, but got no batch.")
    for norm, before in zip(norms, _norms(small), strict=True):
        norm.momentum = before.momentum
        if norm.num_batches_tracked is not None and not norm.num_batches_tracked:
            for name, buffer in before.named_buffers():
                norm.get_buffer(name).copy_(buffer)
    for module, training in modes.items():
        module.training = training
    return result


def _norms(network: nn.Module) -> list[_NormBase]:
    return [
        module
        for module in network.modules()
        if isinstance(module, _NormBase) and module.track_running_stats
    ]
