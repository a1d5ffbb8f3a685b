"""The pictures of a search that lie beside its page, by file name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from paretoprune.experiments.showing import architecture, plots
from paretoprune.experiments.showing.importance import Importance, importance_png
from paretoprune.experiments.showing.view import SearchView

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pictures(view: SearchView, found: Importance | None) -> Iterator[tuple[str, Figure]]:
    """Yields (file name, figure) of a search with a front.

    Args:
        view: The search.
        found: Which decisions mattered; None where the trials do not tell.
    """
    yield "front.png", plots.front_png(view)
    yield "architecture.png", architecture.architecture_png(view)
    yield "ratios.png", plots.ratios_png(view)
    yield "hypervolume.png", plots.hypervolume_png(view)
    if found is not None:
        yield "importance.png", importance_png(found)
