"""Fit: whether a problem's network, data, loss and metrics go together, before long work."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from paretoprune.criteria import fingerprint
from paretoprune.criteria.precision import in_mixed_precision
from paretoprune.criteria.statistics import loss_on
from paretoprune.search.evaluation import on_device, one_line
from paretoprune.search.metrics import device_of, evaluate, evaluating, forward, to_device
from paretoprune.search.objectives import MEASURED
from paretoprune.search.problem import Batch, Metric, Problem
from paretoprune.surgery import PruningGraph, prune
from paretoprune.surgery.inputs import agree_in_rows, count_rows, has_rows, join_rows
from paretoprune.surgery.trial_plans import whole_plan

_METRIC = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def check_problem(problem: Problem) -> None:
    """Verifies that the data is there and fits the model and the loss.

    Reads the calibration data and the first batches of the other splits.

    Raises:
        ValueError: If the model is no module, if a split is empty, can be read only once or cannot
            be used as it is, if the search split is drawn anew at every reading, or if the loss
            does not fit what the model returns and the targets.
    """
    if not isinstance(problem.model, nn.Module):
        raise ValueError(f"problem.model is a module, but got a {type(problem.model).__name__}.")
    problem = replace(problem, model=on_device(problem.model))  # loss and metrics may not follow
    for name in ("calibration", "validation", "recalibration", "refit"):
        batches = getattr(problem, name)
        if batches is not None:
            _check_batch(problem, name, _first(name, batches))
    first, again = (
        fingerprint.of_batches([_first("validation", problem.validation)]) for _ in range(2)
    )
    if first != again:
        raise ValueError(
            "problem.validation gives other batches every time it is read, so that candidates "
            "would be compared on different data; give it without shuffling, sampling and random "
            "augmentation."
        )
    _check_calibration(problem)
    for name, metric in problem.metrics.items():
        _check_metric(problem, name, metric)


def _check_metric(problem: Problem, name: str, metric: Metric) -> None:
    """Verifies that a metric has a name of its own and measures a number."""
    if name in MEASURED or not _METRIC.fullmatch(name):
        raise ValueError(
            f"a metric of problem.metrics is named by letters, digits and '_' and not as one that "
            f"is measured anyway ({', '.join(MEASURED)}), but got {name!r}."
        )
    batch = [_first("validation", problem.validation)]
    try:
        value = evaluate(problem.model, batch, problem.loss, {name: metric})[name]
    except Exception as error:
        raise ValueError(
            f"the metric {name!r} does not take the model's outputs with the targets of "
            f"problem.validation: {one_line(error)}"
        ) from error
    if not math.isfinite(value):
        raise ValueError(f"the metric {name!r} of a batch of problem.validation is {value}.")


def _check_calibration(problem: Problem) -> None:
    """Verifies that the calibration batches can be joined, and are numbers."""
    expected = _sizes(problem.example_inputs)
    ranks = [len(size) for size in expected]
    first: list[tuple[int, ...]] | None = None
    for inputs, _ in problem.calibration:
        sizes = _sizes(inputs)
        if [len(size) for size in sizes] != ranks:
            raise ValueError(
                f"problem.example_inputs are inputs as of problem.calibration, a batch of "
                f"examples, but they have {_said(expected)} and a batch has {_said(sizes)} as "
                f"the sizes of one example."
            )
        counts = {len(leaf) for leaf in tree_leaves(inputs) if has_rows(leaf)}
        if len(counts) > 1:
            raise ValueError(
                f"every input of problem.calibration has a dim of examples first, but a batch has "
                f"{' and '.join(map(str, sorted(counts)))} of them; what all examples share is a "
                f"buffer of the model, or repeated for each."
            )
        first = first or sizes
        if sizes != first:
            raise ValueError(
                f"problem.calibration has examples of {_said(first)} and of {_said(sizes)}; bring "
                f"all to the same size, as by padding them to one length."
            )
        for leaf in tree_leaves(inputs):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.isfinite().all():
                raise ValueError("the inputs of problem.calibration are not all finite numbers.")


def _sizes(inputs: Any) -> list[tuple[int, ...]]:
    """Returns the size of one example in each tensor of a network's inputs."""
    return [tuple(leaf.shape[1:]) for leaf in tree_leaves(inputs) if has_rows(leaf)]


def _said(sizes: Sequence[tuple[int, ...]]) -> str:
    return " and ".join("x".join(map(str, size)) or "1" for size in sizes)


def _first(name: str, batches: Iterable[Batch]) -> Batch:
    iterator = iter(batches)
    if iterator is batches:
        raise ValueError(
            f"problem.{name} is read many times, but an iterator or generator ends after the "
            f"first; pass a list or a data loader."
        )
    batch = next(iterator, None)
    if batch is None:
        raise ValueError(f"problem.{name} must have at least one batch, but it is empty.")
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and agree_in_rows(batch[1])):
        raise ValueError(
            f"a batch of problem.{name} is (inputs, targets) with targets a tensor, or tensors in "
            f"a tuple, list or dict, with a row per example, but got {_form(batch)}."
        )
    return batch[0], batch[1]


def _form(part: Any) -> str:
    """Returns how data is nested, with the shapes of tensors."""
    shown = tree_map(lambda leaf: tuple(getattr(leaf, "shape", ())) or type(leaf), part)
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", str(shown))


def _check_batch(problem: Problem, name: str, batch: Batch) -> None:
    model, (inputs, targets) = problem.model, batch
    with evaluating(model), torch.no_grad():
        try:
            outputs = forward(model, inputs)
        except Exception as error:
            raise ValueError(
                f"the model does not take a batch of problem.{name}: {error}"
            ) from error
        try:
            loss = loss_on(problem.loss, device_of(model))
            value = loss(outputs, to_device(targets, device_of(model)))
        except Exception as error:
            shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            default = problem.loss is F.cross_entropy
            more = "; give `loss` in a function that returns a Problem" if default else ""
            raise ValueError(
                f"the loss does not take the model's outputs ({shape}) with the targets "
                f"({_form(targets)}) of problem.{name}: {error}{more}"
            ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"problem.loss returns a tensor with one number, but got {got}.")
    if not math.isfinite(value):
        raise ValueError(
            f"the loss of the dense network on problem.{name} is {float(value)}, and must be "
            f"finite."
        )
    if problem.loss is F.cross_entropy:
        _check_classes(name, outputs, targets)


def _check_classes(name: str, outputs: Tensor, targets: Tensor) -> None:
    """Verifies that the cross entropy, the loss by default, is meant: it takes any floats."""
    classes = outputs.shape[min(1, outputs.dim() - 1)]
    if targets.is_floating_point():
        sums = targets.sum(min(1, targets.dim() - 1))
        shares = bool((targets >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), 1e-3)
        fits, got = shares, "floats that are no probabilities"
    else:
        fits, got = True, "integers"
    if fits and classes > 1:
        return
    raise ValueError(
        f"the loss is the cross entropy, for a logit of each of two classes or more and targets "
        f"that are classes, but the network returns {tuple(outputs.shape)} and the targets of "
        f"problem.{name} are {got} of shape {tuple(targets.shape)}; give `loss` in a function "
        f"that returns a Problem, such as F.mse_loss or F.binary_cross_entropy_with_logits."
    )


def check_trainable(problem: Problem, graph: PruningGraph) -> None:
    """Verifies that the network and what is left of it can be trained, by one step of each.

    A network may run other code in training than in evaluation, which is what was traced.

    Args:
        problem: The dense network and its data.
        graph: Its graph.

    Raises:
        ValueError: If the loss does not take what the network returns in training, or a pruned
            network does not run there.
    """
    inputs, targets = _some(problem.calibration)
    pruned = prune(problem.model, graph, whole_plan(graph))
    networks = {"the network": copy.deepcopy(problem.model), "the pruned network": pruned}
    for name, network in networks.items():
        network = on_device(network).train()
        device = device_of(network)
        cuda = [device] if device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=cuda):
                outputs = in_mixed_precision(network, to_device(inputs, device), device)
                loss_on(problem.loss, device)(outputs, to_device(targets, device)).backward()
        except Exception as error:
            raise ValueError(
                f"{name} cannot be trained: in training mode it raises {type(error).__name__}: "
                f"{error}; build the network without branches that run in training alone, such "
                f"as auxiliary heads, which are not pruned, or search without training."
            ) from error


def _some(batches: Iterable[Batch]) -> Batch:
    """Returns a batch of at least two examples, where there are: norms take no single one."""
    first = list(itertools.islice(batches, 2))
    if count_rows(first[0][1]) > 1 or len(first) == 1:
        return first[0]
    inputs, targets = join_rows(*first)
    return inputs, targets
