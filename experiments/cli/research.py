"""Commands for those who compare criteria: criteria, compare, bottlenecks, recede."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paretoprune.experiments.cli.app import app
from paretoprune.experiments.cli.options import (
    RUNS,
    AsJson,
    Data,
    Exclude,
    MaxRatio,
    MinRatio,
    Model,
    Multiple,
    Quiet,
    RunsDir,
    Seed,
    Weights,
)


@app.command(epilog="Example: [bold]paretoprune criteria[/bold]")
def criteria() -> None:
    """List the criteria that can rank units, with what each needs and its paper."""
    from paretoprune.experiments.commands import criteria as command

    command.criteria()


@app.command(
    epilog="Example: [bold]paretoprune compare resnet56-cifar10 --data cifar10:DIR "
    "--weights FILE --flops 70%,50%,30%,15%[/bold]"
)
def compare(
    model: Model,
    flops: Annotated[
        str,
        typer.Option(
            metavar="TARGETS", help="FLOPs targets, such as 70%,50%,30%.", show_default=False
        ),
    ],
    data: Data = None,
    weights: Weights = None,
    criteria: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Criteria to compare.",
            show_default="all that need no pass per unit",
        ),
    ] = None,
    blocks: Annotated[
        bool, typer.Option("--blocks", help="Rank units and blocks together, too.")
    ] = False,
    multiple: Multiple = 1,
    min_ratio: MinRatio = "0",
    max_ratio: MaxRatio = "1",
    exclude: Exclude = "",
    seed: Seed = 0,
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder for CSV and plot.", show_default="in the runs folder"
        ),
    ] = None,
    runs_dir: RunsDir = RUNS,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare criteria one-shot at equal FLOPs: table, CSV, plot and a run in MLflow."""
    from paretoprune.experiments.commands import compare as command
    from paretoprune.experiments.commands.options import bounds_of

    command.compare(
        model,
        flops,
        data=data,
        weights=weights,
        criteria=criteria,
        blocks=blocks,
        bounds=bounds_of(multiple, min_ratio, max_ratio, exclude),
        seed=seed,
        to=to,
        runs_dir=runs_dir,
        quiet=quiet,
        as_json=as_json,
    )


@app.command(
    epilog="Example: [bold]paretoprune bottlenecks resnet56-cifar10 --flops 50% --to wide[/bold]"
)
def bottlenecks(
    model: Model,
    flops: Annotated[
        str,
        typer.Option(
            metavar="TARGET", help="Budget of the ranking, such as 50%.", show_default=False
        ),
    ],
    data: Data = None,
    weights: Weights = None,
    criterion: Annotated[str, typer.Option(help="What ranks units.")] = "sosp_h",
    factor: Annotated[float, typer.Option(help="How many times as wide they become.")] = 2.0,
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write the widened network, untrained, for surgery.load.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    runs_dir: RunsDir = RUNS,
    quiet: Quiet = False,
) -> None:
    """Show the layers that a global ranking spares, and widen them for training anew."""
    from paretoprune.experiments.commands import bottlenecks as command

    command.bottlenecks(
        model,
        flops,
        data=data,
        weights=weights,
        criterion=criterion,
        factor=factor,
        to=to,
        seed=seed,
        runs_dir=runs_dir,
        quiet=quiet,
    )


@app.command(
    epilog="Example: [bold]paretoprune recede resnet56-cifar10 --epochs 10 "
    "--to receded.safetensors[/bold]"
)
def recede(
    model: Model,
    to: Annotated[
        Path, typer.Option(metavar="FILE", help="New file of weights.", show_default=False)
    ],
    data: Data = None,
    weights: Weights = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 10,
    strength: Annotated[float, typer.Option(help="Weight of the penalty.")] = 1e-4,
    offset: Annotated[float, typer.Option(help="Offset of the penalty.")] = 0.0,
    learning_rate: Annotated[float, typer.Option(help="Of the weights.")] = 0.01,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Let BatchNorm scales recede by a short sparsity training; goes on where it was stopped."""
    from paretoprune.experiments.commands import recede as command

    settings = {
        "epochs": epochs,
        "strength": strength,
        "offset": offset,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    command.recede_network(model, to, data=data, weights=weights, settings=settings, quiet=quiet)
