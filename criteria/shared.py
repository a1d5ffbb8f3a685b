"""SharedCalibration: calibration data with its loss, measured once for all criteria."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from torch import nn
from torch.nn import functional as F

from paretoprune.criteria import fingerprint
from paretoprune.criteria.statistics import Loss, Statistics, statistics
from paretoprune.surgery import PruningGraph
from paretoprune.surgery.progress import Parts, silent

Measured = TypeVar("Measured")


class SharedCalibration:
    """Calibration batches that remember what was measured on them.

    A criterion that is given plain batches measures for itself. Given this, criteria share one
    pass of gradients, as long as the network's weights stay the same.

    Args:
        batches: A re-iterable of (inputs, targets) batches of training data.
        loss: (outputs, targets) -> scalar mean loss.

    Attributes:
        progress: Called with (parts done, parts in all, or 0 where that is not known) as a
            criterion goes through batches or units; may be set.
    """

    def __init__(self, batches: Iterable[tuple[Any, Any]], loss: Loss = F.cross_entropy) -> None:
        self.batches = batches
        self.loss = loss
        self.progress: Parts = silent
        self._batches = 0  # as many as the last whole pass had
        self._known: dict[str, Any] = {}
        self._of: tuple[str, PruningGraph] | None = None

    @staticmethod
    def of(calibration: Iterable[tuple[Any, Any]]) -> SharedCalibration:
        """Returns `calibration` if it is shared already, else a new one for it alone."""
        if isinstance(calibration, SharedCalibration):
            return calibration
        return SharedCalibration(calibration)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        done = 0
        for done, batch in enumerate(self.batches, start=1):
            yield batch
            self.progress(done, self._batches)
        self._batches = done

    def once(
        self, key: str, model: nn.Module, graph: PruningGraph, measure: Callable[[], Measured]
    ) -> Measured:
        """Returns what `measure` returned at its first call for this network and key.

        Args:
            key: Names what is measured, with all settings.
            model: The dense network; other weights are another network.
            graph: Its graph.
            measure: Called without arguments.
        """
        self._forget_others(model, graph)
        if key not in self._known:
            self._known[key] = measure()
        known: Measured = self._known[key]
        return known

    def _forget_others(self, model: nn.Module, graph: PruningGraph) -> None:
        weights = fingerprint.of_model(model)
        if self._of is None or self._of[0] != weights or self._of[1] is not graph:
            self._known.clear()
            self._of = (weights, graph)

    def statistics(
        self, model: nn.Module, graph: PruningGraph, *, curvature: bool = False
    ) -> Statistics:
        """Returns the statistics of `model`, measured at most once.

        Statistics with curvature serve those who need none, so the criterion that needs it is
        best asked first.

        Args:
            model: The dense network; left untouched.
            graph: Its graph.
            curvature: Whether `Statistics.curvature` is needed.

        Raises:
            ValueError: If there is no batch.
        """

        def measure() -> Statistics:
            return statistics(model, graph, self, self.loss, curvature=curvature)

        self._forget_others(model, graph)
        whole = curvature or "curvature" in self._known
        return self.once("curvature" if whole else "gradients", model, graph, measure)
