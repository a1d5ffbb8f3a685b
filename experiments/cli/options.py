"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RUNS = Path("runs")

Model = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|MODEL",
        help="A recipe (digits, resnet56-cifar10, …), or a network: torchvision:NAME, timm:NAME "
        "or package.module:function.",
        show_default=False,
    ),
]


def run_names(context: typer.Context, incomplete: str) -> list[str]:
    """Returns the runs that a shell may complete, the newest first."""
    from paretoprune.experiments.runs import list_runs

    folder = Path(context.params.get("runs_dir") or RUNS)
    return [name for name in list_runs(folder) if name.startswith(incomplete)]


Run = Annotated[
    str, typer.Argument(help="Name of a run.", show_default=False, autocompletion=run_names)
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="cifar10:DIR, imagefolder:DIR, digits or package.module:function. A network needs "
        "it; a recipe has its own.",
        show_default=False,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Trained weights (.safetensors, .pt), or the library's own, such as DEFAULT.",
        show_default=False,
    ),
]
RunsDir = Annotated[Path, typer.Option(metavar="DIR", help="Folder of the runs.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _seed(value: int) -> int:
    # a training seeds every epoch with (seed << 20) + epoch, of which torch takes 63 bits
    if not 0 <= value < 2**43:
        raise typer.BadParameter(f"a seed lies in 0 to {2**43 - 1}, but got {value}.")
    return value


Seed = Annotated[int, typer.Option(help="Seed of data splits and sampler.", callback=_seed)]

Multiple = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="Keep channels in multiples of N, as hardware likes them, or all of a group.",
        show_default="any number",
    ),
]
MinRatio = Annotated[
    str,
    typer.Option(metavar="RATIO", help="Remove at least so much of every group: 0.1 or 10%."),
]
MaxRatio = Annotated[
    str,
    typer.Option(metavar="RATIO", help="Remove at most so much of every group: 0.8 or 80%."),
]
Exclude = Annotated[
    str,
    typer.Option(
        metavar="A,B",
        help="Leave groups, modules and blocks whole: names of [bold]paretoprune inspect[/bold] "
        "or patterns such as layer1.*",
        show_default="nothing",
    ),
]
