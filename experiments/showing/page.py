"""The interactive page of a search, offline: front, table, architecture, ratios, progress."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from paretoprune.experiments.showing.architecture import architecture_figure
from paretoprune.experiments.showing.architecture import title as architecture_title
from paretoprune.experiments.showing.importance import Importance, caption, importance_figure
from paretoprune.experiments.showing.plots import BUDGET, DENSE, FRONT, GONE, SEED, TRIAL
from paretoprune.experiments.showing.summary import (
    accuracy_range,
    advantages,
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
from paretoprune.experiments.showing.tables import (
    WORDS,
    Row,
    dense_numbers,
    number_heads,
    numbers,
    words,
)
from paretoprune.experiments.showing.view import SearchView
from paretoprune.experiments.units import format_count, format_percent

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #0f172a; margin: 0 auto; padding: 1.5rem;
       max-width: 1100px; background: #fff; }
h1 { font-size: 1.35rem; margin: 0 0 .3rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .2rem; }
p { margin: .2rem 0; color: #475569; max-width: 75ch; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #e2e8f0; }
th { font-weight: 600; color: #475569; } .word { text-align: left; }
tr.dense td { color: #64748b; } .scroll { overflow-x: auto; }
"""


def front_page(view: SearchView, found: Importance | None = None) -> str:
    """Returns one self-contained HTML page, about 5 MB, that works offline.

    Args:
        view: The search.
        found: Which decisions mattered; None where the trials do not tell.
    """
    first, *others = [
        front_figure(view),
        _sized(architecture_figure(view), len(view.sizes)),
        ratios_figure(view),
        hypervolume_figure(view),
    ]
    front, architecture, ratios, volume = [_html(first, library=True), *map(_html, others)]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(view.name)}: Pareto front</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>{escape(headline(view)).replace(" %", "&nbsp;%")}</h1>
<p>{escape(counts(view))}; {len(view.front_rows)} of them form the Pareto front: no other trial has
{advantages(view)} at once. MACs are the papers' FLOPs (one multiply-accumulate = 1).
Point at a mark for the trial behind it, drag to zoom, double-click to see everything.</p>
{front}
<h2>Members of the front</h2>
<p>Export one with <code>paretoprune export RUN --trial N --to DIR</code>.</p>
<div class="scroll">{_table(view)}</div>
<h2>The best network</h2>
<p>{escape(architecture_title(view))}. Groups in the order of the network, each with the channels
of all layers that shrink together; it bears the name of the first of them.</p>
{architecture}
<h2>What the front removes from each group</h2>
<p>One column per member, MACs falling; groups in the order of the network. A block that is removed
whole is red.</p>
{ratios}
<h2>Hypervolume of the front over trials</h2>
<p>How much of the space of the objectives the front dominates; it can only rise.</p>
{volume}
{_decisions(found)}
</body></html>
"""


def _html(figure: Any, *, library: bool = False) -> str:
    """Returns a figure for the page; the first one brings plotly's code along."""
    config = {"displaylogo": False, "responsive": True}
    return str(figure.to_html(full_html=False, include_plotlyjs=library, config=config))


def _sized(figure: Any, bars: int) -> Any:
    """Returns a figure of horizontal bars in the style of the page."""
    figure.update_layout(**_layout(min(150 + 20 * bars, 1800)))
    figure.update_yaxes(automargin=True)
    return figure


def _decisions(found: Importance | None) -> str:
    """Returns the section about which decisions mattered; nothing where trials do not tell."""
    if found is None:
        return ""
    figure = _html(_sized(importance_figure(found), len(found.shares)))
    return f"<h2>Which decisions mattered</h2>\n<p>{escape(caption(found))}</p>\n{figure}"


def front_figure(view: SearchView) -> Any:
    """Returns the plotly figure of accuracy and loss over the MACs share."""
    from plotly.subplots import make_subplots

    names = measured(view)
    figure = make_subplots(
        rows=len(names), cols=1, shared_xaxes=True, vertical_spacing=0.09,
        subplot_titles=[title(view, name) for name in names],
    )  # fmt: skip
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    for at, name in enumerate(names, start=1):
        for trace in _traces(view, name, legend=at == 1):
            figure.add_trace(trace, row=at, col=1)
        _landmarks(figure, view, name, at)
    figure.update_xaxes(range=list(share_range(view)), ticksuffix=" %")
    figure.update_xaxes(title_text="MACs left, share of the dense network", row=len(names), col=1)
    figure.update_layout(
        **_layout(380 * len(names) + 60),
        hovermode="closest",
        legend={"orientation": "h", "y": -0.11, "yanchor": "top", "x": 0},
    )
    return figure


def _layout(height: int) -> dict[str, Any]:
    return {
        "template": "plotly_white",
        "height": height,
        "margin": {"l": 60, "r": 20, "t": 50, "b": 50},
        "font": {"family": "system-ui, sans-serif", "color": DENSE},
    }


def _traces(view: SearchView, name: str, *, legend: bool) -> list[Any]:
    import plotly.graph_objects as go

    def marks(rows: Sequence[Row], label: str, marker: dict[str, Any]) -> Any:
        return go.Scatter(
            x=[100 * row.macs_ratio for row in rows],
            y=[value_of(row, name) for row in rows],
            mode="markers",
            name=label,
            legendgroup=label,
            showlegend=legend,
            marker=marker,
            text=[hover(row) for row in rows],
            hovertemplate="%{text}<extra></extra>",
        )

    others = [row for row in view.rows if not row.on_front]
    sampled = [row for row in others if row.origin != "seed"]
    seeds = [row for row in others if row.origin == "seed"]
    on_front = ["diamond" if row.origin == "seed" else "circle" for row in view.front_rows]
    edge = [SEED if row.origin == "seed" else "white" for row in view.front_rows]
    xs, ys = steps(view, name)
    line = go.Scatter(
        x=xs, y=ys, mode="lines", line={"color": FRONT, "width": 2}, hoverinfo="skip",
        showlegend=False,
    )  # fmt: skip
    return [
        marks(sampled, "trial", {"color": TRIAL, "size": 7, "opacity": 0.75}),
        marks(
            seeds,
            "one-shot baseline",
            {"symbol": "diamond-open", "color": SEED, "size": 9, "line": {"width": 1.5}},
        ),
        line,
        marks(
            view.front_rows,
            "Pareto front (diamond: a one-shot baseline)"
            if "diamond" in on_front
            else "Pareto front",
            {
                "color": FRONT,
                "size": 10,
                "symbol": on_front,
                "line": {"width": 1.5, "color": edge},
            },
        ),
    ]


def hover(row: Row) -> str:
    """Returns what pointing at a trial shows, one fact a line."""
    lines = [
        f"<b>trial {row.trial}</b>" + (" (one-shot baseline)" if row.origin == "seed" else ""),
        f"MACs {format_count(row.macs)}, {format_percent(row.macs_ratio)} of the dense network",
    ]
    if row.accuracy is not None:
        lines.append(f"accuracy {format_percent(row.accuracy, 2)}")
    lines += [
        f"loss {row.loss:.4f}",
        f"params {format_count(row.params)}",
        f"criterion {escape(row.criterion)}, {escape(row.allocation)}",
        f"removed blocks: {escape(', '.join(row.removed)) or 'none'}",
    ]
    return "<br>".join(lines)


def _landmarks(figure: Any, view: SearchView, name: str, at: int) -> None:
    """Adds budget and dense network to one panel, and scales it."""
    target = 100 * view.target_ratio
    figure.add_vline(x=target, line={"color": BUDGET, "width": 1.5, "dash": "dash"}, row=at, col=1)
    if at == 1:
        figure.add_annotation(
            x=target, y=0.01, yref="y domain", yanchor="bottom", xanchor="left", xshift=5,
            text=f"budget {target:.4g} %", font={"color": BUDGET, "size": 12}, showarrow=False,
            row=at, col=1,
        )  # fmt: skip
    if name == "accuracy":
        figure.update_yaxes(range=list(accuracy_range(view)), ticksuffix=" %", row=at, col=1)
    else:
        ticks = [digit * 10.0**power for power in range(-6, 3) for digit in (1, 2, 5)]
        labels = [f"{tick:g}" for tick in ticks]
        low, high = map(math.log10, loss_range(view))
        figure.update_yaxes(
            type="log", tickvals=ticks, ticktext=labels, range=[low, high], row=at, col=1
        )
    if name in view.dense_metrics:
        dense = view.dense_metrics[name] * (100 if name == "accuracy" else 1)
        _dense(figure, view, dense, at, log=name == "loss")


def _dense(figure: Any, view: SearchView, value: float, at: int, *, log: bool) -> None:
    figure.add_scatter(
        x=[0, 100], y=[value, value], mode="lines+markers", row=at, col=1,
        line={"color": DENSE, "width": 1, "dash": "dot"},
        marker={"symbol": "star", "size": [0, 15], "color": DENSE},
        name="dense network", legendgroup="dense", showlegend=at == 1,
        hovertemplate=f"<b>dense network</b><br>MACs {format_count(view.dense.macs)}, 100 %"
        f"<br>{value:.4g}<br>params {format_count(view.dense.params)}<extra></extra>",
    )  # fmt: skip
    low, _ = loss_range(view) if log else accuracy_range(view)
    shown = max(value, low)
    figure.add_annotation(
        x=0, xref="x domain", xanchor="left", y=math.log10(shown) if log else shown,
        yanchor="bottom", showarrow=False, font={"color": DENSE, "size": 12}, row=at, col=1,
        text=f"dense network: {value:.4g}{', below the axis' if value < low else ''}",
    )  # fmt: skip


def _table(view: SearchView) -> str:
    head = "".join(f"<th>{name}</th>" for name in number_heads(view.dense_metrics))
    head += "".join(f"<th class=word>{name}</th>" for name in WORDS)
    dense = _line(dense_numbers(view.dense, view.dense_metrics), ["–", "–"], "dense")
    lines = [_line(numbers(row), words(row, most_blocks=99)) for row in view.front_rows]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{dense}{''.join(lines)}</tbody></table>"


def _line(counted: Sequence[str], named: Sequence[str], style: str = "") -> str:
    cells = "".join(f"<td>{escape(text)}</td>" for text in counted)
    cells += "".join(f"<td class=word>{escape(text)}</td>" for text in named)
    return f"<tr class='{style}'>{cells}</tr>"


def ratios_figure(view: SearchView) -> Any:
    """Returns the plotly heat map of the pruning ratio of each group along the front."""
    import plotly.graph_objects as go

    names, matrix = ratio_matrix(view)
    labels = [f"{row.trial} ({100 * row.macs_ratio:.0f} %)" for row in view.front_rows]
    near_one = 0.9999
    figure = go.Figure(
        go.Heatmap(
            z=matrix, x=labels, y=names, zmin=0, zmax=1, xgap=1, ygap=1,
            colorscale=[[0, "#f7fbff"], [near_one / 2, "#6baed6"], [near_one, "#08306b"],
                        [near_one, GONE], [1, GONE]],
            colorbar={"title": {"text": "pruning ratio"}, "tickformat": ".0%", "thickness": 14},
            hovertemplate="%{y}<br>trial %{x}<br>%{z:.0%} of the units removed<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(**_layout(min(180 + 16 * len(names), 1400)))
    figure.update_yaxes(autorange="reversed", tickfont_size=10)
    figure.update_xaxes(title_text="trial (MACs left)", type="category")
    return figure


def hypervolume_figure(view: SearchView) -> Any:
    """Returns the plotly figure of the hypervolume over trials."""
    import plotly.graph_objects as go

    series = view.hypervolumes()
    figure = go.Figure(
        go.Scatter(
            x=[number for number, _ in series], y=[value for _, value in series],
            mode="lines", line={"shape": "hv", "color": FRONT},
            hovertemplate="after trial %{x}: %{y:.4f}<extra></extra>",
        )
    )  # fmt: skip
    seeds = [record.number for record in view.records if record.origin == "seed"]
    if seeds:
        figure.add_vrect(
            x0=-0.5, x1=max(seeds) + 0.5, fillcolor=SEED, opacity=0.1, line_width=0,
            annotation_text="one-shot baselines", annotation_position="top left",
        )  # fmt: skip
    figure.update_layout(**_layout(320))
    figure.update_xaxes(title_text="trial")
    return figure
