"""The plot of a comparison: accuracy over FLOPs, a panel per recovery, a line per criterion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paretoprune.experiments.comparison import RECOVERIES, Shot

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure


def comparison_png(shots: Sequence[Shot], title: str) -> Figure:
    """Returns accuracy (or loss, where there is none) over the MACs left.

    Criteria are told apart by colour and marker, and named in the order of the last panel's
    mean, best first.

    Args:
        shots: What was measured; those of one criterion, ranking and recovery make a line.
        title: For people.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure as MatplotlibFigure  # no pyplot: no global state

    panels = [recovery for recovery in RECOVERIES if any(s.recovery == recovery for s in shots)]
    lines = sorted({(s.criterion, s.ranking) for s in shots}, key=lambda line: -_mean(shots, line))
    figure = MatplotlibFigure(
        figsize=(4.6 * len(panels) + 2.2, 4.8), dpi=120, layout="constrained"
    )
    colours = colormaps["tab20"]
    for at, recovery in enumerate(panels):
        axis = figure.add_subplot(1, len(panels), at + 1)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e2e8f0", linewidth=0.7)
        axis.set_title(recovery, loc="left", fontsize=10)
        axis.set_xlabel("MACs left, % of the dense network")
        for index, (criterion, ranking) in enumerate(lines):
            points = sorted(
                (100 * s.macs_ratio, _value(s))
                for s in shots
                if (s.criterion, s.ranking, s.recovery) == (criterion, ranking, recovery)
            )
            if points:
                name = criterion if ranking == "units" else f"{criterion}, with blocks"
                axis.plot(
                    *zip(*points, strict=True),
                    label=name,
                    color=colours(index % 20),
                    marker="osD^vP*X"[index % 8],
                    markersize=4,
                    linewidth=1.2,
                )
        if not at:
            axis.set_ylabel("accuracy, %" if shots[0].accuracy is not None else "minus the loss")
    named: dict[str, Artist] = {}  # not every criterion is in every panel
    for axis in reversed(figure.axes):
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(
        list(named.values()), list(named), loc="outside right center", frameon=False, fontsize=8
    )
    figure.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold")
    return figure


def _value(shot: Shot) -> float:
    return -shot.loss if shot.accuracy is None else 100 * shot.accuracy


def _mean(shots: Sequence[Shot], line: tuple[str, str]) -> float:
    """Returns the mean value of a line with the best recovery there is."""
    own = [shot for shot in shots if (shot.criterion, shot.ranking) == line]
    last = max(own, key=lambda shot: RECOVERIES.index(shot.recovery)).recovery
    values = [_value(shot) for shot in own if shot.recovery == last]
    return sum(values) / len(values)
