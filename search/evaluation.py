"""Evaluator: a plan in, metrics out. Knows neither samplers nor workers."""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from paretoprune.criteria.ablation import penultimate_features
from paretoprune.criteria.cka import cka_to_dense
from paretoprune.search.latency import measure_latency
from paretoprune.search.layout import channels_last
from paretoprune.search.metrics import device_of, evaluate, evaluate_until, to_device
from paretoprune.search.problem import Batch, Problem
from paretoprune.search.racing import dominated, estimated
from paretoprune.search.record import Completed, Failed, Outcome, Stopped
from paretoprune.surgery import PruningGraph, PruningPlan, Reconstructor, prune
from paretoprune.surgery.copying import copied
from paretoprune.surgery.inputs import gather_inputs
from paretoprune.surgery.progress import Parts

_LOG = logging.getLogger(__name__)
TIMED_SECONDS = 1.0
"""Time spent on the latency of a candidate and the dense network, at least ten passes each."""
SIMILAR_IMAGES = 512
"""Examples on which a candidate is compared with the dense network."""
FINAL_IMAGES = 4000
"""Examples on which the network that is handed out is reconstructed, at most."""
FINAL_SAMPLES = 65536
"""Output positions per layer of that reconstruction, at most."""
_NO_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
"""What errors of torch's CPU allocator, the CUDA driver, cuBLAS and cuDNN say without memory."""
Evaluate = Callable[..., Mapping[str, float] | Completed | Stopped]
"""(plan, seed) -> metrics, among them every objective and `macs`; picklable, to reach workers.

Where tasks have a parent, it takes its plan as `parent`; where they have a rival, the losses of
the rival's batches as `rival`. It may return an outcome in the place of metrics.
"""


def attempt(evaluate: Evaluate, plan: PruningPlan, seed: int) -> Outcome:
    """Returns the outcome of an evaluation.

    The only place where errors are caught: one candidate that goes wrong must not end the search.
    Its traceback is logged, which a worker of Ray keeps.

    Raises:
        torch.AcceleratorError: If the GPU was used wrongly, as by an index out of range: it then
            refuses whatever this process asks of it.
    """
    start = time.perf_counter()
    outcome: Outcome
    try:
        measured = evaluate(plan, seed)
    except Exception as error:
        memory = _out_of_memory(error)
        if isinstance(error, torch.AcceleratorError) and not memory:
            raise
        _LOG.debug("an evaluation failed", exc_info=True)
        outcome = Failed(one_line(error), "memory" if memory else "error")
    else:
        if not isinstance(measured, (Completed, Stopped)):
            measured = Completed(measured, 0.0)
        outcome = _finite(replace(measured, seconds=time.perf_counter() - start))
    give_back_memory()  # here, where neither networks nor an error hold what was allocated
    return outcome


def _finite(outcome: Completed | Stopped) -> Outcome:
    wrong = {n: value for n, value in outcome.metrics.items() if not math.isfinite(value)}
    if wrong:
        return Failed(f"metrics must be finite, but got {wrong}.", "not finite")
    return outcome


def _out_of_memory(error: Exception) -> bool:
    """Returns whether the machine or the GPU had no more; few that say so have a class."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(said in str(error) for said in _NO_MEMORY)
    )


def on_device(model: nn.Module) -> nn.Module:
    """Returns `model` on the GPU where there is one: itself if it is there, else a copy."""
    if not torch.cuda.is_available() or device_of(model).type == "cuda":
        return model
    return copied(model, {}).to("cuda")


@dataclass(frozen=True, slots=True)
class Moved:
    """Batches on the device of a model; re-iterable.

    Attributes:
        batches: (inputs, targets) batches.
        device: Where to.
    """

    batches: Iterable[Batch]
    device: torch.device

    def __iter__(self) -> Iterator[Batch]:
        for inputs, targets in self.batches:
            yield to_device(inputs, self.device), to_device(targets, self.device)


class Evaluator:
    """Prunes, reconstructs without training and measures; one for each worker.

    Args:
        problem: The dense network and its data.
        graph: Its graph.
        similarity: Whether `cka` is measured, too: how alike the features that the last layer
            reads are to the dense network's, on `SIMILAR_IMAGES` calibration examples.
        latency: Of the dense network, in milliseconds, from `search.dense`: then the candidates'
            `latency` is measured, too. None measures none.
    """

    def __init__(
        self,
        problem: Problem,
        graph: PruningGraph,
        *,
        similarity: bool = False,
        latency: float | None = None,
    ) -> None:
        self._problem = problem
        self._graph = graph
        self._similarity = similarity
        self._latency = latency
        self._features: tuple[Any, Tensor] | None = None
        self._dense: tuple[nn.Module, Reconstructor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # every worker computes its dense side itself
        return {
            **self.__dict__,
            "_problem": self._problem.sent,
            "_dense": None,
            "_features": None,
        }

    def __call__(
        self, plan: PruningPlan, seed: int, rival: Sequence[float] = ()
    ) -> Completed | Stopped:
        """Returns `macs`, `params`, and what `evaluate` measures on the search split.

        Stopped, with the loss estimated, where a rival is clearly better before all is measured.

        Args:
            plan: What to keep.
            seed: Seed of torch's generators; the caller's are left as they were.
            rival: Mean losses of the batches of the search split, of a plan that costs no more.
        """
        small = self.network(plan, seed)
        latency = {} if self._latency is None else {"latency": self._timed(small, self._latency)}
        small = channels_last(small, self._graph)
        measured = evaluate_until(
            small,
            self._problem.validation,
            self._problem.loss,
            self._problem.metrics,
            lambda losses: dominated(losses, rival),
        )
        metrics = {**measured.metrics, **latency}
        if self._similarity:
            inputs, dense = self._features or self._dense_features()
            metrics["cka"] = cka_to_dense(small, plan, self._graph, inputs, dense)
        cost = self._graph.cost(plan)
        costs = {"macs": float(cost.macs), "params": float(cost.params)}
        if not measured.whole:
            return Stopped({"loss": estimated(measured.losses, rival), **costs}, 0.0)
        return Completed({**metrics, **costs}, 0.0, measured.losses)

    def _timed(self, small: nn.Module, dense_milliseconds: float) -> float:
        """Returns the latency of a candidate in milliseconds.

        That is its share of the dense network's, both measured in turns here and now, times the
        dense network's that the search began with. So evaluations on a worker that shares its
        cores can be compared with those on an idle one.
        """
        model, _ = self._dense or self._prepare()
        dense, own = measure_latency((model, small), self._problem.example_inputs, TIMED_SECONDS)
        return dense_milliseconds * own.milliseconds / dense.milliseconds

    def network(self, plan: PruningPlan, seed: int, progress: Parts | None = None) -> nn.Module:
        """Returns the pruned and reconstructed network of a plan.

        Args:
            plan: What to keep.
            seed: Seed of torch's generators; the caller's are left as they were.
            progress: Called after every layer with (layers done, layers in all).
        """
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            model, reconstruct = self._dense or self._prepare()
            return reconstruct(prune(model, self._graph, plan), plan, progress=progress)

    def final(self, plan: PruningPlan, seed: int) -> nn.Module:
        """Returns the network of a plan as it is handed out: `refitted` of its `network`.

        Args:
            plan: What to keep.
            seed: Seed of torch's generators; the caller's are left as they were.
        """
        return self.refitted(self.network(plan, seed), plan)

    def refitted(self, candidate: nn.Module, plan: PruningPlan) -> nn.Module:
        """Returns a candidate as it is handed out.

        That is the candidate, or its plan reconstructed on the examples of `problem.refit`, which
        is slower: whichever has the lower loss on the search split.

        Args:
            candidate: The `network` of the plan.
            plan: What it keeps.
        """
        if self._problem.refit is None:
            return candidate
        model, _ = self._dense or self._prepare()
        more = Moved(self._problem.refit, device_of(model))
        reconstruct = Reconstructor(
            model, self._graph, more, images=FINAL_IMAGES, samples=FINAL_SAMPLES
        )
        refitted = reconstruct(prune(model, self._graph, plan), plan)
        give_back_memory()
        losses = [
            evaluate(network, self._problem.validation, self._problem.loss)["loss"]
            for network in (candidate, refitted)
        ]
        return refitted if losses[1] < losses[0] else candidate

    def _dense_features(self) -> tuple[Any, Tensor]:
        model, _ = self._dense or self._prepare()
        calibration = Moved(self._problem.calibration, device_of(model))
        inputs = gather_inputs(calibration, SIMILAR_IMAGES)
        self._features = inputs, penultimate_features(model, self._graph, inputs)
        return self._features

    def _prepare(self) -> tuple[nn.Module, Reconstructor]:
        model = on_device(self._problem.model)
        calibration = Moved(self._problem.calibration, device_of(model))
        self._dense = model, Reconstructor(model, self._graph, calibration)
        return self._dense


def give_back_memory() -> None:
    """Returns the memory of an evaluation to the system; glibc keeps it in fragments.

    Without it a worker grows by some 25 MB with every evaluation of a ResNet-20.
    """
    gc.collect(1)  # young reference cycles may still hold activations
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # for the other workers on the same GPU
    with suppress(OSError, AttributeError):  # other C libraries do not have it, nor need it
        ctypes.CDLL(None).malloc_trim(0)


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """Returns the kind of an error and the first line of its message."""
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0]}" if message else type(error).__name__
