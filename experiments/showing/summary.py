"""What plots and pages say and draw of a search, apart from how: sentences, corners, ranges."""

from __future__ import annotations

from paretoprune.experiments.showing.tables import Row, pruning_ratios, quality, quality_of
from paretoprune.experiments.showing.view import SearchView
from paretoprune.experiments.units import format_count, format_percent
from paretoprune.search import Direction, Failed, Infeasible, Stopped


def headline(view: SearchView) -> str:
    """Returns one sentence: the best member of the front beside the dense network."""
    if not view.front_rows:
        return f"{view.name}: no completed trial yet."
    row, ranked_by = view.row(view.shown), view.objectives[0].name
    _, dense = quality(view.dense_metrics, ranked_by)
    return (
        f"{view.name}: trial {row.trial} keeps {format_percent(row.macs_ratio)} of the MACs "
        f"({format_count(row.macs)} of {format_count(view.dense.macs)}), "
        f"{quality_of(view.shown, ranked_by)} (dense {dense}) on the search split."
    )


def counts(view: SearchView) -> str:
    """Returns how the trials ended, such as `96 trials completed, 4 infeasible`."""
    done = len(view.rows)
    parts = [f"{done} trial{'' if done == 1 else 's'} completed"]
    parts += [
        f"{number} {word}"
        for word, number in (
            ("stopped early", view.count(Stopped)),
            ("infeasible", view.count(Infeasible)),
            ("failed", view.count(Failed)),
        )
        if number
    ]
    return ", ".join(parts)


def measured(view: SearchView) -> list[str]:
    """Returns accuracy and loss, or the loss alone where trials have no accuracy."""
    accurate = all(row.accuracy is not None for row in view.rows)
    return ["accuracy", "loss"] if accurate else ["loss"]


_COSTS = {"macs", "params", "latency"}


def qualities(view: SearchView) -> list[str]:
    """Returns the metrics that say how good a network is: first what alone is optimised."""
    asked = [one.name for one in view.objectives if one.name not in _COSTS]
    usual = [name for name in ("accuracy", "loss") if name in view.dense_metrics]
    return [*(name for name in asked if name not in usual), *usual]


def costs(view: SearchView) -> list[str]:
    """Returns the metrics that say what a network costs."""
    return ["macs_ratio", "params", *(["latency"] if "latency" in view.dense_metrics else [])]


_ADVANTAGES = {
    "loss": "a lower loss",
    "accuracy": "a higher accuracy",
    "macs": "fewer MACs",
    "params": "fewer params",
    "cka": "features more alike to the dense network's",
    "latency": "a lower latency",
}


_BETTER = {Direction.MINIMIZE: "lower", Direction.MAXIMIZE: "higher"}


def advantages(view: SearchView) -> str:
    """Returns what no other trial has at once of a member, as `a lower loss and fewer MACs`."""
    *first, last = [
        _ADVANTAGES.get(one.name) or f"a {_BETTER[one.direction]} {one.name}"
        for one in view.objectives
    ]
    return f"{', '.join(first)} and {last}"


def title(view: SearchView, name: str) -> str:
    """Returns the title of a picture of accuracy or loss."""
    said = {
        "accuracy": "Accuracy on the search split, %",
        "loss": "Loss on the search split, nats",
    }[name]
    return f"{said} (what is ranked)" if name == view.objectives[0].name else said


def value_of(row: Row, name: str) -> float:
    """Returns a row's accuracy in percent, or its loss in nats."""
    value = getattr(row, name)
    return float(value) * (100 if name == "accuracy" else 1)


def steps(view: SearchView, name: str) -> tuple[list[float], list[float]]:
    """Returns the front as a step line: at each MACs share, the best value at or below it.

    Args:
        view: The search.
        name: `accuracy` (in percent) or `loss`.

    Returns:
        The corners: MACs shares in percent, ending at the budget, and values.
    """
    better = max if name == "accuracy" else min
    xs: list[float] = []
    ys: list[float] = []
    for row in reversed(view.front_rows):
        x, y = 100 * row.macs_ratio, value_of(row, name)
        if ys:
            xs.append(x)
            ys.append(ys[-1])
            y = better(y, ys[-1])
        xs.append(x)
        ys.append(y)
    if ys:
        xs.append(max(100 * view.target_ratio, xs[-1]))
        ys.append(ys[-1])
    return xs, ys


def share_range(view: SearchView) -> tuple[float, float]:
    """Returns the MACs shares in percent between which a plot shows the trials."""
    shares = [100 * view.target_ratio, *(100 * row.macs_ratio for row in view.rows)]
    low, high = min(shares), max(shares)
    margin = max(0.06 * (high - low), 1.0)
    return max(0.0, low - margin), min(high + 2 * margin, 103.0)


def accuracy_range(view: SearchView) -> tuple[float, float]:
    """Returns the accuracies in percent that show the front without crowding it.

    Some baselines fall to chance; with them in range, the front would be one flat line.
    """
    front = [value_of(row, "accuracy") for row in view.front_rows]
    every = sorted(value_of(row, "accuracy") for row in view.rows)
    dense = 100 * view.dense_metrics.get("accuracy", front[0] / 100)
    top = max(*every, dense)
    low = min(*front, dense, every[len(every) // 4])
    margin = 0.06 * max(top - low, 1.0)
    return max(0.0, low - margin), top + margin


def loss_range(view: SearchView) -> tuple[float, float]:
    """Returns the losses in nats, on a logarithmic axis, that show the front without crowding it.

    A dense network that knows the search split by heart has a loss of nearly nothing; with it in
    range, the front would be one flat line.
    """
    front = [value_of(row, "loss") for row in view.front_rows]
    every = sorted(value_of(row, "loss") for row in view.rows)
    low, high = max(every[0], 1e-9), max(*front, every[3 * len(every) // 4], 1e-9)
    dense = view.dense_metrics.get("loss", low)
    if low / 10 < dense:
        low, high = min(low, dense), max(high, dense)
    margin = max((high / low) ** 0.06, 1.05)
    return low / margin, high * margin


def ratio_matrix(view: SearchView) -> tuple[list[str], list[list[float]]]:
    """Returns the groups, and per group the pruning ratio in each row of the front."""
    ratios = [pruning_ratios(record, view.sizes, view.blocks) for record in view.front.records]
    names = list(view.sizes)
    return names, [[ratio.get(name, 0.0) for ratio in ratios] for name in names]


def note(view: SearchView, run: str, asked: str = "", links: str = "") -> str:
    """Returns the description of a search in Markdown: its result, and how to read what is there.

    Args:
        view: The search.
        run: Name of its run.
        asked: What was searched, as a clause such as `60 trials with obs and taylor`.
        links: Where to go from here, as Markdown.
    """
    lines = [
        *([links, ""] if links else []),  # MLflow's fold covers what comes later
        f"**{headline(view)}**",
        "",
        f"{asked or 'Searched'}: {counts(view)}; {len(view.front_rows)} on the Pareto front. "
        f"Budget: at most {format_count(view.target)} MACs, {format_percent(view.target_ratio)} "
        f"of the dense network. MACs are the papers' FLOPs (one multiply-accumulate = 1).",
        "",
        "How to read this run:",
        "- Artifacts, `pareto/front.html`: the front, point at a mark for its trial; then the "
        "best network, the pruning ratios along the front, and, where there are trials enough to "
        "tell, which decisions mattered. The same as pictures beside it; the table in "
        "`front.json`.",
        "- Child runs: one per trial, named `tTRIAL ACCURACY @ SHARE OF THE MACS`; filter "
        "`tags.pareto = 'true'` for the front, which MLflow folds under this run. `macs_ratio` is "
        "the share of the MACs that is left, `flops_reduction` what is gone, "
        "`pruning_ratio.*` the share of units removed per stage, `plan.json` the exact decision.",
        "- `loss` and `accuracy` are measured on the search split: training data held out of "
        f"calibration, not the test data. {_ranked(view)}",
        *(
            [
                "- `latency`: milliseconds of a forward pass of the example inputs; see the "
                "documentation for how far to trust it."
            ]
            if "latency" in view.dense_metrics
            else []
        ),
        "- `origin = seed` marks the one-shot baselines that the search began with.",
        "",
        f"Export the best: `paretoprune export {run} --to DIR`; it becomes a registered model.",
    ]
    return "\n".join(lines)


def _ranked(view: SearchView) -> str:
    """Returns by what trials are ranked, as a sentence."""
    if view.objectives[0].name == "loss":
        return (
            "Trials are ranked by `loss`, because a trained network has often seen that split and "
            "its accuracy there saturates."
        )
    return f"Trials are ranked by `{view.objectives[0].name}`."
