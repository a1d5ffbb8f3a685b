"""The command line. Commands import what they need when they run, so that `--help` is quick."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    name="paretoprune",
    help="Search for smaller networks: a FLOPs target in, a Pareto front out. "
    "FLOPs are counted as MACs (one multiply-accumulate = 1), as the papers do.",
    no_args_is_help=True,
    epilog="Exit status: 0 done; 1 the search found no network; 2 bad input, said in one "
    "sentence; 130 interrupted, and nothing that was done is lost.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|MODEL",
        help="A recipe (digits, resnet56-cifar10, …), or a network: torchvision:NAME, timm:NAME "
        "or package.module:function.",
        show_default=False,
    ),
]


def _runs(context: typer.Context, incomplete: str) -> list[str]:
    """Returns the runs that a shell may complete, the newest first."""
    from paretoprune.experiments.runs import list_runs

    folder = Path(context.params.get("runs_dir") or RUNS)
    return [name for name in list_runs(folder) if name.startswith(incomplete)]


Run = Annotated[
    str, typer.Argument(help="Name of a run.", show_default=False, autocompletion=_runs)
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
Seed = Annotated[int, typer.Option(help="Seed of data splits and sampler.")]

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

RUNS = Path("runs")


@app.command(epilog="Example: [bold]paretoprune inspect torchvision:resnet50[/bold]")
def inspect(
    model: Model,
    data: Data = None,
    weights: Weights = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Show what can be pruned: groups, removable blocks, MACs, and what is frozen and why."""
    from paretoprune.experiments import inspection

    inspection.inspect(model, data=data, weights=weights, seed=seed, as_json=as_json)


@app.command(
    epilog="Example: [bold]paretoprune search resnet56-cifar10 --data cifar10:DIR "
    "--weights FILE --flops 50% --trials 200[/bold]"
)
def search(
    model: Model,
    flops: Annotated[
        str,
        typer.Option(
            metavar="TARGET",
            help="What the pruned network may keep at most: a share such as 50%, or MACs such as "
            "60M (suffixes k, M, G).",
            show_default=False,
        ),
    ],
    data: Data = None,
    weights: Weights = None,
    trials: Annotated[int, typer.Option(help="Trials to finish.")] = 100,
    strategy: Annotated[
        str,
        typer.Option(
            help="optuna, where a sampler decides, or everything: step by step a layer or "
            "neurons leave, whichever changes less."
        ),
    ] = "optuna",
    criteria: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Criteria that may rank units; see [bold]paretoprune criteria[/bold].",
            show_default="obs,obs_per_mac,taylor; kl for everything",
        ),
    ] = None,
    objectives: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="What is optimised, two or more of loss, accuracy, macs, params, cka, "
            "latency; the first one ranks.",
        ),
    ] = "loss,macs",
    granularity: Annotated[
        str,
        typer.Option(
            help="What may depart from a criterion's ranking: every group, every stage (groups "
            "of equally large features) as one, or uniform: nothing."
        ),
    ] = "group",
    multiple: Multiple = 1,
    min_ratio: MinRatio = "0",
    max_ratio: MaxRatio = "1",
    exclude: Exclude = "",
    sampler: Annotated[
        str | None,
        typer.Option(
            help="damage, or Optuna's tpe, nsga2, nsga3, gp or random; everything has none.",
            show_default="damage",
        ),
    ] = None,
    finetune: Annotated[
        int,
        typer.Option(
            metavar="EPOCHS", help="Fine-tune the best of the front for so many epochs, at last."
        ),
    ] = 0,
    top: Annotated[
        int | None,
        typer.Option(metavar="K", help="How many of the front are fine-tuned.", show_default="3"),
    ] = None,
    distill: Annotated[
        bool, typer.Option("--distill", help="Let them learn from the dense network, too.")
    ] = False,
    recovery: Annotated[
        int,
        typer.Option(
            metavar="EPOCHS",
            help="With --strategy everything, train every candidate for so many epochs.",
        ),
    ] = 0,
    report: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="At last measure more of the best network and the dense one: robustness (reads "
            "the test images) and energy (also what this machine takes for the search and its "
            "fine-tuning; needs the package's extra of that name).",
            show_default="nothing more",
        ),
    ] = "",
    seed: Seed = 0,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Evaluations at a time; 0 evaluates in this process, without Ray.",
            show_default="one per core",
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="A Ray cluster, such as head:6379 or ray://head:10001.",
            show_default="this machine",
        ),
    ] = None,
    gpus_per_trial: Annotated[
        float | None,
        typer.Option(
            metavar="GPUS",
            help="GPUs of each evaluation; 0.25 lets four share one.",
            show_default="up to four share one",
        ),
    ] = None,
    trial_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Kill the worker of an evaluation that takes longer; the trial has failed.",
            show_default="none",
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Keep the trials in a database, one for each search: "
            "postgresql://user@host/name or sqlite:///file.",
            show_default="the run's folder",
        ),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the run.", show_default="made from the model"),
    ] = None,
    runs_dir: RunsDir = RUNS,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Search for plans on the FLOPs target and below; every trial and the front go to MLflow."""
    from paretoprune.experiments import commands

    options = commands.SearchOptions(
        model,
        flops,
        data,
        weights,
        trials,
        criteria,
        sampler,
        seed,
        workers,
        address,
        gpus_per_trial,
        trial_timeout,
        storage,
        strategy=strategy,
        finetune=finetune,
        top=top,
        distil=distill,
        recovery=recovery,
        report=report,
        objectives=objectives,
        granularity=granularity,
        multiple=multiple,
        min_ratio=min_ratio,
        max_ratio=max_ratio,
        exclude=exclude,
    )
    commands.search(options, run=run, runs_dir=runs_dir, quiet=quiet, as_json=as_json)


@app.command(epilog="Example: [bold]paretoprune resume resnet56-cifar10-50pct-1[/bold]")
def resume(
    run: Run, runs_dir: RunsDir = RUNS, quiet: Quiet = False, as_json: AsJson = False
) -> None:
    """Continue an interrupted search, and write to MLflow what it lacks of a finished one."""
    from paretoprune.experiments import commands

    commands.resume(run, runs_dir=runs_dir, quiet=quiet, as_json=as_json)


@app.command(epilog="Example: [bold]paretoprune front digits-50pct-1 --format csv[/bold]")
def front(
    run: Run,
    form: Annotated[
        Literal["table", "json", "csv"], typer.Option("--format", help="How to print it.")
    ] = "table",
    runs_dir: RunsDir = RUNS,
) -> None:
    """Print the Pareto front of a run, also while it is still searching."""
    from paretoprune.experiments import commands

    commands.front(run, form, runs_dir=runs_dir)


@app.command(epilog="Example: [bold]paretoprune ui resnet56-cifar10-50pct-1 --open[/bold]")
def ui(
    run: Annotated[
        str | None,
        typer.Argument(help="Name of a run.", show_default="the newest one", autocompletion=_runs),
    ] = None,
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 5000,
    browse: Annotated[bool, typer.Option("--open", help="Open the browser.")] = False,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Start the MLflow UI on this machine and say where it shows the front."""
    from paretoprune.experiments import server

    found = server.tracked(runs_dir, run)
    if found.is_remote:
        server.point_to(found, browse=browse, say=typer.echo)
    else:
        server.serve(found, port, browse=browse, say=typer.echo)


@app.command(
    epilog="Example: [bold]paretoprune export resnet56-cifar10-50pct-1 --max-flops 40% "
    "--to exports/small --format safetensors,onnx[/bold]"
)
def export(
    run: Run,
    to: Annotated[
        Path, typer.Option(metavar="DIR", help="New folder to write.", show_default=False)
    ],
    trial: Annotated[
        int | None, typer.Option(help="Number of the trial.", show_default="the best of the front")
    ] = None,
    max_flops: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET",
            help="Take the best of the front with at most so many MACs: 40% or 50M.",
            show_default=False,
        ),
    ] = None,
    min_accuracy: Annotated[
        str | None,
        typer.Option(
            metavar="ACCURACY",
            help="Take the smallest of the front with at least this accuracy on the search "
            "split: 0.9 or 90%.",
            show_default=False,
        ),
    ] = None,
    formats: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="A,B",
            help="onnx and pt2 (torch.export) are written beside safetensors; each is compared "
            "with the network on real inputs. onnx needs the package's extra of that name.",
        ),
    ] = "safetensors",
    report: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="Measure more, of the dense network and the pruned one: robustness (accuracy "
            "under FGSM and on 15 corruptions of the test images) and energy (of inference; "
            "needs the package's extra of that name).",
            show_default="nothing more",
        ),
    ] = "",
    runs_dir: RunsDir = RUNS,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a subnetwork with its model card, after rebuilding, measuring and reloading it."""
    from paretoprune.experiments import export_command

    choice = export_command.Choice(trial, max_flops, min_accuracy)
    export_command.export_run(
        run,
        choice,
        to,
        formats=formats,
        reports=report,
        runs_dir=runs_dir,
        quiet=quiet,
        as_json=as_json,
    )


@app.command(epilog="Example: [bold]paretoprune criteria[/bold]")
def criteria() -> None:
    """List the criteria that can rank units, with what each needs and its paper."""
    from paretoprune.experiments import commands

    commands.criteria()


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
) -> None:
    """Compare criteria one-shot at equal FLOPs: table, CSV, plot and a run in MLflow."""
    from paretoprune.experiments import commands, compare_command

    compare_command.compare(
        model,
        flops,
        data=data,
        weights=weights,
        criteria=criteria,
        blocks=blocks,
        bounds=commands.bounds_of(multiple, min_ratio, max_ratio, exclude),
        seed=seed,
        to=to,
        runs_dir=runs_dir,
        quiet=quiet,
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
    from paretoprune.experiments import bottlenecks_command

    bottlenecks_command.bottlenecks(
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
    from paretoprune.experiments import recede_command

    settings = {
        "epochs": epochs,
        "strength": strength,
        "offset": offset,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    recede_command.recede_network(
        model, to, data=data, weights=weights, settings=settings, quiet=quiet
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    Args:
        arguments: Without the program's name; None takes those of this process.

    Returns:
        0; 1 where a search found no network; 2 after bad input, said in one sentence on stderr;
        130 after Ctrl-C.
    """
    try:
        status = app(args=arguments, prog_name="paretoprune", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted", err=True)
        return 130
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        if sentence:
            typer.echo(f"error: {' '.join(sentence.split())}", err=True)
        return 2
    return status if isinstance(status, int) else 0


def _sentence(error: Exception) -> str | None:
    """Returns what to say about an error of the user's; None for a fault of the program."""
    usage = getattr(error, "format_message", None)
    if usage is not None:  # typer's own, whose class is not public
        message = str(usage()).rstrip(".")
        return message and f"{message}; see --help."  # without arguments, help was printed
    ours = type(error).__module__.startswith("paretoprune.")
    if isinstance(error, (ValueError, OSError)) or (ours and isinstance(error, RuntimeError)):
        return str(error)
    return None


if __name__ == "__main__":
    sys.exit(main())
