"""PNG plots of a search: the front, the pruning ratios along it, hypervolume over trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paretoprune.experiments.showing.summary import (
    accuracy_range,
    counts,
    headline,
    loss_range,
    measured,
    ratio_matrix,
    share_range,
    steps,
    title,
    value_of,
)
from paretoprune.experiments.showing.tables import Row
from paretoprune.experiments.showing.view import SearchView

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FRONT, TRIAL, SEED, DENSE, BUDGET = "#1d4ed8", "#94a3b8", "#d97706", "#0f172a", "#be123c"
GONE = "#be123c"
"""One colour per role, the same in every plot; told apart by shape as well."""


def front_png(view: SearchView) -> Figure:
    """Returns accuracy and loss over the MACs share, with the front as a step line."""
    names = measured(view)
    figure, axes = new_figure(5.6 * len(names) + 0.6, 4.9, len(names))
    for axis, name in zip(axes, names, strict=True):
        _front_axis(axis, view, name)
    figure.suptitle(headline(view), x=0.012, ha="left", fontsize=11.5, fontweight="bold")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower left", ncols=len(labels), frameon=False, fontsize=9
    )
    figure.text(0.988, 0.018, counts(view), ha="right", va="bottom", fontsize=9, color="#475569")
    return figure


def new_figure(width: float, height: float, columns: int) -> tuple[Figure, Sequence[Axes]]:
    """Returns a figure of so many inches, and its empty axes side by side."""
    from matplotlib.figure import Figure as MatplotlibFigure  # no pyplot: no global state

    figure = MatplotlibFigure(figsize=(width, height), dpi=120, layout="constrained")
    axes = [figure.add_subplot(1, columns, at + 1) for at in range(columns)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e2e8f0", linewidth=0.7)
        axis.set_axisbelow(True)
    return figure, axes


def _front_axis(axis: Axes, view: SearchView, name: str) -> None:
    def scatter(rows: Sequence[Row], label: str, **style: object) -> None:
        xs = [100 * row.macs_ratio for row in rows]
        axis.scatter(xs, [value_of(row, name) for row in rows], label=label, **style)  # type: ignore[arg-type]

    others = [row for row in view.rows if not row.on_front]
    scatter(
        [row for row in others if row.origin != "seed"],
        "trial",
        s=16,
        color=TRIAL,
        alpha=0.75,
        linewidths=0,
    )
    scatter(
        [row for row in others if row.origin == "seed"],
        "one-shot baseline",
        s=34,
        marker="D",
        facecolors="none",
        edgecolors=SEED,
        linewidths=1.3,
    )
    xs, ys = steps(view, name)
    axis.plot(xs, ys, color=FRONT, linewidth=1.6, zorder=3)
    scatter(view.front_rows, "Pareto front", s=38, color=FRONT, edgecolors="white", zorder=4)
    seeds = [row for row in view.front_rows if row.origin == "seed"]
    if seeds:
        style = {"s": 90, "marker": "D", "facecolors": "none", "edgecolors": SEED, "zorder": 4}
        scatter(seeds, "one-shot on the front", linewidths=1.3, **style)
    _landmarks(axis, view, name)


def _landmarks(axis: Axes, view: SearchView, name: str) -> None:
    """Draws budget and dense network, scales and labels."""
    axis.axvline(
        100 * view.target_ratio, color=BUDGET, linewidth=1.2, linestyle=(0, (5, 3)), label="budget"
    )
    axis.set_xlim(share_range(view))
    axis.set_xlabel("MACs left, % of the dense network")
    if name == "accuracy":
        low, high = accuracy_range(view)
        axis.set_ylim(low, high)
        below = sum(value_of(row, name) < low for row in view.rows)
        note = f" ({below} trials lie below the axis)" if below else ""
        axis.set_title(f"{title(view, name)}{note}", loc="left", fontsize=10)
    else:
        _log_scale(axis)
        axis.set_ylim(*loss_range(view))
        axis.set_title(title(view, name), loc="left", fontsize=10)
    if name in view.dense_metrics:
        _dense_line(axis, view.dense_metrics[name] * (100 if name == "accuracy" else 1))


def _dense_line(axis: Axes, value: float) -> None:
    axis.axhline(value, color=DENSE, linewidth=1, linestyle=":")
    axis.scatter([100], [value], marker="*", s=150, color=DENSE, zorder=5)
    low, _ = axis.get_ylim()
    where = ", below the axis" if value < low else ""
    axis.text(
        0.01,
        max(value, low),
        f"★ dense network, 100 % of the MACs: {value:.4g}{where}",
        transform=axis.get_yaxis_transform(),
        va="bottom",
        fontsize=8.5,
        color=DENSE,
        clip_on=True,
    ).set_in_layout(False)


def _log_scale(axis: Axes) -> None:
    """Makes y logarithmic, with plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def ratios_png(view: SearchView) -> Figure:
    """Returns a heat map of the front: the share of each group's units that is removed."""
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    names, matrix = ratio_matrix(view)
    rows = view.front_rows
    height = min(max(2.8, 1.6 + 0.17 * len(names)), 14)
    figure, (axis,) = new_figure(min(max(6.4, 3.4 + 0.34 * len(rows)), 16), height, 1)
    axis.grid(visible=False)
    # a group that stays keeps a unit, so 1 means that its block is gone
    colours = colormaps["Blues"].with_extremes(over=GONE)
    shown = axis.imshow(matrix or [[0.0]], aspect="auto", vmin=0, vmax=0.9999, cmap=colours)
    every = max(1, len(names) // 60)
    axis.set_yticks(range(0, len(names), every), names[::every], fontsize=7)
    every = max(1, len(rows) // 30)
    labels = [f"{row.trial}\n{100 * row.macs_ratio:.0f}%" for row in rows]
    axis.set_xticks(range(0, len(rows), every), labels[::every], fontsize=7)
    axis.set_xlabel("trials of the front: number and MACs left", fontsize=9)
    figure.suptitle("What the front removes from each group", x=0.012, ha="left", fontsize=11)
    bar = figure.colorbar(shown, ax=axis, fraction=0.05, pad=0.02, extend="neither")
    bar.set_label("pruning ratio: share of the units removed", fontsize=8)
    figure.legend(
        handles=[Patch(color=GONE, label="block removed whole")],
        loc="outside lower right",
        frameon=False,
        fontsize=8,
    )
    return figure


def hypervolume_png(view: SearchView) -> Figure:
    """Returns the hypervolume of the front over trials."""
    figure, (axis,) = new_figure(6.8, 3.8, 1)
    series = view.hypervolumes()
    axis.step([number for number, _ in series], [v for _, v in series], where="post", color=FRONT)
    seeds = [record.number for record in view.records if record.origin == "seed"]
    if seeds:
        axis.axvspan(-0.5, max(seeds) + 0.5, color=SEED, alpha=0.10, linewidth=0)
        axis.text(
            max(seeds) + 0.7,
            0.03,
            "one-shot baselines end",
            color=SEED,
            fontsize=8,
            transform=axis.get_xaxis_transform(),
        )
    axis.set_xlabel("trial")
    axis.set_title("Hypervolume of the front (higher is better)", loc="left", fontsize=11)
    return figure
