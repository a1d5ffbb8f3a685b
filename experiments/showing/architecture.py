"""The picture of the best network: units left per group, beside the dense network's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paretoprune.experiments.showing.plots import FRONT, GONE, new_figure
from paretoprune.experiments.showing.tables import kept_units
from paretoprune.experiments.showing.view import SearchView
from paretoprune.experiments.units import format_percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WHOLE = "#e2e8f0"
"""Colour of the dense network's widths, behind those that are left."""


def best_widths(view: SearchView) -> dict[str, tuple[int, int]]:
    """Returns (units kept, units of the dense network) per group of the network that is shown.

    Groups in network order; 0 kept means that the group's block is removed.
    """
    kept = kept_units(view.shown, view.sizes, view.blocks)
    return {name: (kept[name], size) for name, size in view.sizes.items()}


def title(view: SearchView) -> str:
    """Returns which network is drawn."""
    share = format_percent(view.row(view.shown).macs_ratio)
    return f"Units left per group: trial {view.shown.number}, the best, at {share} of the MACs"


def architecture_png(view: SearchView) -> Figure:
    """Returns the picture of the best network; there must be a front."""
    from matplotlib.patches import Patch

    widths = best_widths(view)
    figure, (axis,) = new_figure(7.4, min(max(2.6, 1.4 + 0.19 * len(widths)), 30), 1)
    axis.grid(visible=False, axis="y")
    at = range(len(widths))
    dense = [size for _, size in widths.values()]
    axis.barh(at, dense, color=_WHOLE, height=0.8)
    axis.barh(at, [kept for kept, _ in widths.values()], color=FRONT, height=0.8)
    gone = [index for index, (kept, _) in enumerate(widths.values()) if kept == 0]
    axis.barh(gone, [dense[index] for index in gone], color=GONE, alpha=0.35, height=0.8)
    for index, (kept, size) in enumerate(widths.values()):
        axis.annotate(
            f"{kept} of {size}" if kept else "block removed",
            (size, index),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axis.set_yticks(at, list(widths), fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.18 * max(dense))
    axis.set_xlabel("units", fontsize=9)
    figure.suptitle(title(view), x=0.012, ha="left", fontsize=11)
    figure.legend(
        handles=[
            Patch(color=FRONT, label="left"),
            Patch(color=_WHOLE, label="of the dense network"),
            Patch(color=GONE, alpha=0.35, label="block removed whole"),
        ],
        loc="outside lower left",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    return figure


def architecture_figure(view: SearchView) -> Any:
    """Returns the plotly figure of the same."""
    import plotly.graph_objects as go

    widths = best_widths(view)
    names = list(widths)
    dense = [size for _, size in widths.values()]
    told = [f"{kept} of {size}" if kept else "block removed" for kept, size in widths.values()]
    common = {"y": names, "orientation": "h", "hovertext": told, "hoverinfo": "y+text"}
    figure = go.Figure(
        [
            go.Bar(
                x=dense,
                marker_color=[GONE if kept == 0 else _WHOLE for kept, _ in widths.values()],
                opacity=0.55,
                text=told,
                textposition="outside",
                name="dense network (red: its block is removed)",
                **common,
            ),
            go.Bar(
                x=[kept for kept, _ in widths.values()], marker_color=FRONT, name="left", **common
            ),
        ]
    )
    figure.update_layout(
        barmode="overlay", bargap=0.2, legend={"orientation": "h", "y": 1.0, "yanchor": "bottom"}
    )
    figure.update_yaxes(autorange="reversed", tickfont_size=10)
    figure.update_xaxes(title_text="units", range=[0, 1.15 * max(dense)])
    return figure
