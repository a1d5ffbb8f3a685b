"""Measured latency: warm-up, repeats in turns, and the device and versions it holds for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from paretoprune.search.metrics import device_of, evaluating, forward, to_device

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

    def improves_on(self, dense: Latency) -> bool:
        """Returns whether this is shorter by more than both spreads, so not by chance alone."""
        return self.milliseconds + self.spread < dense.milliseconds - dense.spread

    def __str__(self) -> str:
        digits = 2 if self.milliseconds >= 1 else 3
        return f"{self.milliseconds:.{digits}f} ± {self.spread:.{digits}f} ms"


def measure_latency(
    models: Sequence[nn.Module], inputs: Any, seconds: float = 2.0
) -> list[Latency]:
    """Returns the latency of each model on the same inputs.

    Args:
        models: On one device; in eval mode while they are measured.
        inputs: A tensor, tuple of arguments or dict of keyword arguments.
        seconds: See `time_in_turns`.
    """
    inputs = to_device(inputs, device_of(models[0]))  # once: the way there is no part of a pass
    with ExitStack() as modes:
        for model in models:
            modes.enter_context(evaluating(model))
        return time_in_turns([partial(forward, model, inputs) for model in models], seconds)


def time_in_turns(passes: Sequence[Callable[[], object]], seconds: float = 2.0) -> list[Latency]:
    """Returns the latency of each forward pass.

    They take turns, so that a slower moment of the machine hits all alike. On a CPU torch uses
    one thread: with more, other work on the machine decides the result.

    Args:
        passes: Each runs once when it is called.
        seconds: Time to spend on all of them together, warm-up apart; at least ten passes each.
    """
    times: list[list[float]] = [[] for _ in passes]
    with torch.no_grad(), one_thread():
        for run in passes:
            for _ in range(_WARM_UP):
                run()
        end = time.perf_counter() + seconds
        while len(times[0]) < 10 or (time.perf_counter() < end and len(times[0]) < 1000):
            for run, measured in zip(passes, times, strict=True):
                measured.append(seconds_of(run))
    return [_summary(measured) for measured in times]


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch use one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def seconds_of(run: Callable[[], object]) -> float:
    """Returns the wall time of a call, what it left running on a GPU included."""
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    """Waits for what is left running on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _summary(seconds: list[float]) -> Latency:
    low, middle, high = (1000 * value for value in statistics.quantiles(seconds, n=4))
    return Latency(middle, (high - low) / 2, len(seconds))
