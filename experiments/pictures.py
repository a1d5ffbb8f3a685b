"""The pictures of a search that lie beside its page, by file name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from paretoprune.experiments import architecture, importance, plots
from paretoprune.experiments.view import SearchView

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pictures(view: SearchView) -> Iterator[tuple[str, Figure]]:
    """Yields (file name, figure) of a search with a front."""
    yield "front.png", plots.front_png(view)
    yield "architecture.png", architecture.architecture_png(view)
    yield "ratios.png", plots.ratios_png(view)
    yield "hypervolume.png", plots.hypervolume_png(view)
    found = importance.importance(view)
    if found is not None:
        yield "importance.png", importance.importance_png(found)
