"""`paretoprune inspect`: what can be pruned in a network, for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from paretoprune.criteria import smallest_macs
from paretoprune.experiments.commands.progress import long_step, progress_console, results_console
from paretoprune.experiments.recipes import build_problem
from paretoprune.experiments.references import LIBRARIES, library_network, library_preparation
from paretoprune.experiments.units import format_count, format_percent
from paretoprune.surgery import PrunableGroup, PruningGraph, PruningPlan, trace
from paretoprune.surgery.progress import Lines


def inspection(graph: PruningGraph) -> dict[str, Any]:
    """Returns groups, blocks and totals of a network as plain values.

    `half_frees` is the share of the dense MACs that goes when half of a group's units go,
    `frees` the share that goes with a block.
    """
    dense = graph.cost()
    smallest = smallest_macs(graph, tuple(graph.blocks))
    return {
        "macs": dense.macs,
        "params": dense.params,
        "smallest_macs": smallest,
        "groups": [_group(graph, group) for group in graph.groups.values()],
        "blocks": [
            {
                "name": block.name,
                "frees": _freed(graph, PruningPlan(removed=(block.name,))),
                "groups": list(block.groups),
            }
            for block in graph.blocks.values()
        ],
        "recorded": list(graph.recorded),
    }


def _group(graph: PruningGraph, group: PrunableGroup) -> dict[str, Any]:
    half = tuple(range(group.size - group.size // 2))
    open_ = group.frozen is None
    return {
        "name": group.name,
        "units": group.size,
        "half_frees": _freed(graph, PruningPlan({group.name: half})) if open_ else 0.0,
        "parameters": list(dict.fromkeys(one.parameter for one in group.slices)),
        "frozen": group.frozen,
        "statistics": list(group.statistics),
    }


def _freed(graph: PruningGraph, plan: PruningPlan) -> float:
    return round(1 - graph.cost(plan).macs / graph.cost().macs, 6)


def print_inspection(console: Console, name: str, facts: dict[str, Any]) -> None:
    """Prints what `inspection` returned, in at most 100 columns."""
    for part in _parts(name, facts):
        console.print(part)


def _parts(name: str, facts: dict[str, Any]) -> Iterator[Table | str]:
    opened = [group for group in facts["groups"] if group["frozen"] is None]
    frozen = [group for group in facts["groups"] if group["frozen"] is not None]
    share = facts["smallest_macs"] / facts["macs"]
    yield (
        f"[bold]{name}[/bold]: {format_count(facts['macs'])} MACs (the papers' FLOPs; one "
        f"multiply-accumulate = 1), {format_count(facts['params'])} params; surgery reaches down "
        f"to {format_percent(share)} of the MACs"
    )
    table = _table("prunable group", ("units", "half frees"), "coupled layers")
    room = 70 - max((len(group["name"]) for group in opened), default=0)
    for group in opened:
        layers = dict.fromkeys(one.rpartition(".")[0] or one for one in group["parameters"])
        table.add_row(
            group["name"] + ("*" if group["statistics"] else ""),
            str(group["units"]),
            format_percent(group["half_frees"]),
            _names(list(layers), room),
        )
    yield table
    if any(group["statistics"] for group in opened):
        yield (
            "* averaged over by layer norms or the like, whose statistics change: a pruned "
            "network equals the masked one with averages over the units that stay.\n"
        )
    if facts["blocks"]:
        blocks = _table("removable block", ("frees",), "groups that go with it")
        for block in facts["blocks"]:
            inside = _names(block["groups"], 75 - len(block["name"])) or "none"
            blocks.add_row(block["name"], format_percent(block["frees"]), inside)
        yield blocks
    else:
        yield "No block can be removed whole.\n"
    if frozen:
        reasons = _table("frozen group", ("units",), "why")
        for group in frozen:
            reasons.add_row(group["name"], str(group["units"]), group["frozen"])
        yield reasons
    if facts["recorded"]:
        yield (
            f"{_count(len(facts['recorded']), 'module')} whose code cannot follow: once they lose "
            f"units they run their recorded operations, at the traced input size and any batch "
            f"size: {_names(facts['recorded'], 300)}.\n"
        )
    units = sum(group["units"] for group in opened)
    yield (
        f"In all: {_count(len(opened), 'prunable group')} with {_count(units, 'unit')}, "
        f"{_count(len(facts['blocks']), 'removable block')}, "
        f"{_count(len(frozen), 'frozen group')}."
    )


def _table(first: str, numbers: tuple[str, ...], last: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(last, overflow="fold")
    return table


def _names(names: Sequence[str], room: int) -> str:
    """Returns as many names as fit into `room` characters, and how many more there are."""
    shown: list[str] = []
    for name in names:
        if shown and len(", ".join([*shown, name])) > room - len(" and 99 more"):
            return f"{', '.join(shown)} and {len(names) - len(shown)} more"
        shown.append(name)
    return ", ".join(shown)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def inspect(
    model: str, *, data: str | None, weights: str | None, seed: int, as_json: bool
) -> None:
    """Prints what can be pruned in a recipe's or library's network, as a table or as JSON."""
    with long_step(progress_console(), f"Tracing {model}", quiet=as_json) as progress:
        network, inputs = _network(model, data, weights, seed, progress)
        facts = inspection(trace(network, inputs))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        print_inspection(results_console(), model, facts)


def _network(
    model: str, data: str | None, weights: str | None, seed: int, progress: Lines
) -> tuple[nn.Module, Any]:
    """Returns a network and example inputs; a library's network needs no data for that."""
    library, _, _ = model.partition(":")
    if library in LIBRARIES and data is None:
        network = library_network(model, classes=None, weights=weights).model
        size = (3, *library_preparation(model, weights).size)
        shape = "x".join(map(str, size))
        progress(f"without --data, its inputs are taken to be {shape} images")
        generator = torch.Generator().manual_seed(seed)
        return network, torch.randn(2, *size, generator=generator)
    problem = build_problem(model, data=data, weights=weights, seed=seed, progress=progress)
    return problem.model, problem.example_inputs
