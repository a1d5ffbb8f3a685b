"""Plots of what `benchmarks.search` measured: hypervolume over trials and wall time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.figure import Figure

from paretoprune.search.front import hypervolume


def draw_fronts(rows: list[dict[str, str]], file: Path) -> None:
    """Draws the hypervolume of each method's networks over wall time, a line per seed."""
    fronts: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        fronts.setdefault((row["method"], row["seed"]), []).append(row)
    methods = list(dict.fromkeys(method for method, _ in fronts))
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for (method, seed), found in fronts.items():
        points = grown(found)
        color = f"C{methods.index(method)}"
        label = method if seed == min(own for one, own in fronts if one == method) else None
        axes.step(*zip((0.0, 0.0), *points, strict=True), where="post", c=color, label=label)
        axes.plot(*zip(*points, strict=True), ".", c=color)
    axes.set_xlabel("seconds, the targets one after the other")
    axes.set_ylabel("hypervolume of loss and MACs, shares of their references")
    axes.legend()
    figure.savefig(file, dpi=110)


def grown(rows: Iterable[Mapping[str, str]]) -> list[tuple[float, float]]:
    """Returns (seconds, hypervolume) after each network of a method, largest target first.

    The hypervolume is that of a search: losses count from that of a uniform guess among ten
    classes, MACs from the dense network's.
    """
    points: list[list[float]] = []
    seconds, found = 0.0, []
    for row in sorted(rows, key=lambda row: -float(row["flops"])):
        points.append([float(row["search_loss"]) / math.log(10), float(row["macs_ratio"])])
        seconds += float(row["seconds"])
        found.append((seconds, hypervolume(np.array(points), np.ones(2))))
    return found


def draw_parts(rows: list[dict[str, str]], file: Path) -> None:
    """Draws the hypervolume over trials and over wall time, as the mean over the seeds.

    Variants that lack a seed of the whole search are left out.
    """
    seeds: dict[str, set[str]] = {}
    for row in rows:
        seeds.setdefault(row["variant"], set()).add(row["seed"])
    whole = seeds["search"]
    by_variant: dict[str, dict[int, list[dict[str, str]]]] = {}
    for row in rows:
        if row["seed"] in whole <= seeds[row["variant"]]:
            by_count = by_variant.setdefault(row["variant"], {})
            by_count.setdefault(int(row["trials"]), []).append(row)
    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, across, label in zip(
        panels, ("trials", "seconds"), ("trials", "seconds of evaluation"), strict=True
    ):
        for number, (variant, by_count) in enumerate(by_variant.items()):
            points = sorted(
                tuple(mean(float(row[name]) for row in own) for name in (across, "hypervolume"))
                for own in by_count.values()
            )
            style = "-" if variant == "search" else ("--", ":")[number // 10]
            axes.plot(*zip(*points, strict=True), style, marker=".", label=variant)
        axes.set_xlabel(f"{label}; mean over seeds {', '.join(sorted(whole))}")
    panels[0].set_ylabel("hypervolume of loss and MACs, shares of their references")
    panels[0].legend(fontsize="small", ncols=2)
    figure.savefig(file, dpi=110)
