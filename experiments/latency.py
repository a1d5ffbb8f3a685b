"""Measured latency: warm-up, repeats in turns, and the device and versions it holds for."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from paretoprune.search.metrics import evaluating, forward

_WARM_UP = 5


@dataclass(frozen=True, slots=True)
class Latency:
    """Time of one forward pass of a batch.

    Attributes:
        milliseconds: Median over the repeats.
        spread: Half the distance between the quartiles, in milliseconds.
        repeats: Passes measured, after warm-up.
    """

    milliseconds: float
    spread: float
    repeats: int

    def __str__(self) -> str:
        return f"{self.milliseconds:.2f} ± {self.spread:.2f} ms"


def measure_latency(
    models: Sequence[nn.Module], inputs: Any, seconds: float = 2.0
) -> list[Latency]:
    """Returns the latency of each model on the same inputs.

    The models take turns, so that a slower moment of the machine hits all alike. On a CPU they
    use one thread: with more, other work on the machine decides the result.

    Args:
        models: On one device; in eval mode while they are measured.
        inputs: A tensor, tuple of arguments or dict of keyword arguments.
        seconds: Time to spend on all of them together, warm-up apart; at least ten passes each.
    """
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad(), _one_thread():
        for model in models:
            with evaluating(model):
                for _ in range(_WARM_UP):
                    forward(model, inputs)
        end = time.perf_counter() + seconds
        while len(times[0]) < 10 or (time.perf_counter() < end and len(times[0]) < 1000):
            for model, measured in zip(models, times, strict=True):
                measured.append(_one_pass(model, inputs))
    return [_summary(measured) for measured in times]


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _one_pass(model: nn.Module, inputs: Any) -> float:
    """Returns the seconds of one forward pass."""
    with evaluating(model):
        _wait()
        start = time.perf_counter()
        forward(model, inputs)
        _wait()
        return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _summary(seconds: list[float]) -> Latency:
    low, middle, high = (1000 * value for value in statistics.quantiles(seconds, n=4))
    return Latency(middle, (high - low) / 2, len(seconds))


def conditions(model: nn.Module) -> str:
    """Returns what a latency holds for: the device and the version of torch."""
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.is_cuda:
        device = torch.cuda.get_device_name(parameter.device)
    else:
        device = f"{platform.machine()} CPU, 1 thread"
    return f"{device}, torch {torch.__version__}"
