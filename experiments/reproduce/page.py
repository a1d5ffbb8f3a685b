"""docs/results.md: our rows beside the published ones, made from the CSVs and from nothing else.

    python -m paretoprune.experiments.reproduce.page

A row that was not run in full says so; a published row that we have no row for stands alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import mean

from paretoprune.experiments.benchmarks.rows import RESULTS, read
from paretoprune.experiments.measuring.robustness import EPSILONS
from paretoprune.experiments.reproduce.published import PUBLISHED, Published

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results.md"
TITLES = {
    "everything": ("Pruning Everything, Everywhere, All at Once", "FLOPs"),
    "receding": ("Receding Neuron Importances", "filters"),
    "sosp": ("SOSP", "structures"),
    "sosp-bottlenecks": ("SOSP: widened where it removes little", "parameters"),
    "proscore": ("PROscore", "FLOPs"),
}
_APART = ("reduction", "method", "epochs", "images", "test_images", "full", "recovery",
          "batch_size", "learning_rate", "trials", "criterion", "draws", "again",
          "mixup")  # fmt: skip
"""Columns of which rows with other values are no repetitions of each other."""
HEAD = """# Results beside the published ones

Made by `python -m paretoprune.experiments.reproduce.page` from the CSVs in `experiments/results/`;
how each is measured stands in the script of the same name in `experiments/reproduce/`. Accuracies
are top-1 on the test split of CIFAR-10, absolute, because the papers' dense networks differ by
more than a point. “FLOPs” are MACs. *Part* marks rows with fewer epochs, training or test images
than the full run; nothing is estimated.
"""


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(RESULTS), encoding="utf-8")


def page(results: Path) -> str:
    """Returns the page in Markdown.

    Args:
        results: Folder of the CSVs.
    """
    parts = [HEAD]
    for table, (title, what) in TITLES.items():
        rows = read(results / f"{table}.csv")
        published = [row for row in PUBLISHED if row.table == table]
        if rows or published:
            parts.append(f"## {title}\n\n" + "\n".join(_table(rows, published, what)) + "\n")
        reported = [row for row in rows if row.get("fgsm_8") or row.get("latency_ms")]
        if reported:
            parts.append(f"### {title}: robustness and energy\n\n{_reported(reported, what)}\n")
    if rows := read(results / "sosp-time.csv"):
        parts.append(f"## SOSP: seconds on 256 images\n\n{_timed(rows)}\n")
    return "\n".join(parts)


def _table(rows: list[dict[str, str]], published: list[Published], what: str) -> Iterator[str]:
    networks = dict.fromkeys([one.network for one in published] + [r["network"] for r in rows])
    extra = _extra(rows, what)
    heads = ["network", f"{what} removed", "method", *extra.values()]
    yield f"| {' | '.join([*heads, 'top-1 before fine-tuning', 'top-1', 'run'])} |"
    yield f"|---|---:|---|{'---:|' * len(extra)}---:|---:|---|"
    for network in networks:
        ours = [row for row in rows if row["network"] == network]
        theirs = [one for one in published if one.network == network]
        lines = [*(_theirs(one, len(extra)) for one in theirs), *_ours(ours, extra)]
        for _, line in sorted(lines, key=lambda pair: pair[0]):
            yield line
    sources = dict.fromkeys(f"{one.method}: {one.source}" for one in published)
    if sources:
        yield f"\nPublished: {'; '.join(sources)}."


def _extra(rows: Iterable[Mapping[str, str]], what: str) -> dict[str, str]:
    """Returns the columns that our rows alone have, with their heads."""
    columns = {"large_removed": "units of large norm removed"}
    if what != "FLOPs":
        columns["macs_reduction"] = "FLOPs removed"
    return {name: head for name, head in columns.items() if any(row.get(name) for row in rows)}


def _theirs(row: Published, extra: int) -> tuple[float, str]:
    change = "" if row.delta is None else f" ({row.delta:+.2f} points)"
    accuracy = "–" if row.accuracy is None else f"{row.accuracy:.2f}"
    cells = [
        row.network,
        f"{row.reduction:.2f} %",
        f"{row.method}, published",
        *["–"] * (extra + 1),
    ]
    return row.reduction, f"| {' | '.join([*cells, f'{accuracy}{change}', ''])} |"


def _ours(rows: Iterable[Mapping[str, str]], extra: Iterable[str]) -> Iterator[tuple[float, str]]:
    """Yields a line per method, reduction and scale: the mean over its seeds, with the range."""
    groups: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name, "") for name in _APART), []).append(row)
    for (reduction, method, epochs, images, tested, full, recovery, *_), own in groups.items():
        removed = own[0].get("macs_reduction") if "recovery" in own[0] else reduction
        total = _total(own[0], epochs)
        run = f"{total} epoch{'' if total == '1' else 's'}"
        if own[0].get("again", "0") != "0":
            run += f", {own[0]['again']} of them again"
        if own[0].get("draws", "0") != "0":
            run += f" ({own[0]['draws']} drawn)"
        if own[0].get("mixup", "0.0") != "0.0":
            run += f" with mixup {own[0]['mixup']}"
        run += f" of {int(images):,} images"
        if recovery not in ("", "0"):
            run += f", {recovery} of them per candidate" if method == "greedy" else ""
        if full != "True":
            run = f"*part*: {run}, {int(tested):,} tested"
        cells = [own[0]["network"], f"{float(removed or reduction):.2f} %", f"**{method}**"]
        cells += [f"{_spread(own, name)} %" for name in extra]
        cells += [_spread(own, name) for name in ("accuracy_before", "accuracy")]
        yield float(reduction), f"| {' | '.join([*cells, run])} |"


def _reported(rows: list[dict[str, str]], what: str) -> str:
    """Returns a table of `--report`'s columns: that of the dense network → that of the row."""
    columns = {
        **{f"fgsm_{epsilon}": f"FGSM {epsilon}/255" for epsilon in EPSILONS},
        "corrupted": "corrupted",
        "latency_ms": "ms per 128 images",
        "joules_per_1000": "J per 1,000 images",
    }
    heads = ["network", f"{what} removed", "method", "images", *columns.values(), "Wh", "g CO2"]
    lines = [f"| {' | '.join(heads)} |", f"|---|---:|---|{'---:|' * (len(heads) - 3)}"]
    for row in rows:
        removed = float(row.get("macs_reduction") or row["reduction"])
        cells = [row["network"], f"{removed:.2f} %", f"**{row['method']}**"]
        cells += [row["robust_images"] or "–"]
        cells += [
            f"{row[f'dense_{name}']} → {row[name]}" if row[name] else "–" for name in columns
        ]
        cells += [f"{1e3 * float(row['work_kwh']):.3g}" if row["work_kwh"] else "–"]
        lines.append(f"| {' | '.join([*cells, row['work_co2_grams'] or '–'])} |")
    note = (
        "Dense network → pruned one; accuracies in percent of the first images of the test split, "
        "as many as stand there. The last two columns are what the row itself took: search, "
        "training and measuring."
    )
    return "\n".join([*lines, "", note])


def _timed(rows: list[dict[str, str]]) -> str:
    """Returns the seconds of criteria on networks of more and more structures."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    seconds = {(row["network"], row["method"]): row["criterion_seconds"] for row in rows}
    sizes = {row["network"]: (int(row["structures"]), int(row["params"])) for row in rows}
    lines = [
        f"| network | structures | params | {' | '.join(methods)} |",
        f"|---|---:|---:|{'---:|' * len(methods)}",
    ]
    for network, (structures, params) in sizes.items():
        shown = (seconds.get((network, method), "–") for method in methods)
        lines.append(f"| {network} | {structures:,} | {params:,} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _total(row: Mapping[str, str], epochs: str) -> str:
    return row.get("epochs_total") or epochs


def _spread(rows: list[Mapping[str, str]], name: str) -> str:
    """Returns the mean of a column, with half its range where there are several seeds."""
    try:
        values = [float(row[name]) for row in rows]
    except ValueError:
        return rows[0][name] or "–"
    half = (max(values) - min(values)) / 2
    return f"{mean(values):.2f}" + (f" ± {half:.2f} (n={len(values)})" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
