"""The commands of the main job: inspect, search, resume, front, ui, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

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
    Run,
    RunsDir,
    Seed,
    Weights,
    run_names,
)


@app.command(epilog="Example: [bold]paretoprune inspect torchvision:resnet50[/bold]")
def inspect(
    model: Model,
    data: Data = None,
    weights: Weights = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Show what can be pruned: groups, removable blocks, MACs, and what is frozen and why."""
    from paretoprune.experiments.commands import inspect as command

    command.inspect(model, data=data, weights=weights, seed=seed, as_json=as_json)


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
    learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            help="Peak learning rate of fine-tuning and recovery.",
            show_default="0.02 by SGD with BatchNorm, else 0.0001 by AdamW",
        ),
    ] = None,
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
    from paretoprune.experiments.commands import search as command
    from paretoprune.experiments.commands.options import SearchOptions

    options = SearchOptions(
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
        learning_rate=learning_rate,
        report=report,
        objectives=objectives,
        granularity=granularity,
        multiple=multiple,
        min_ratio=min_ratio,
        max_ratio=max_ratio,
        exclude=exclude,
    )
    command.search(options, run=run, runs_dir=runs_dir, quiet=quiet, as_json=as_json)


@app.command(epilog="Example: [bold]paretoprune resume resnet56-cifar10-50pct-1[/bold]")
def resume(
    run: Run,
    trials: Annotated[
        int | None,
        typer.Option(help="Trials to finish, more than the run has.", show_default="as before"),
    ] = None,
    runs_dir: RunsDir = RUNS,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Continue an interrupted search, or a finished one to more trials; complete MLflow."""
    from paretoprune.experiments.commands import search as command

    command.resume(run, trials, runs_dir=runs_dir, quiet=quiet, as_json=as_json)


@app.command(epilog="Example: [bold]paretoprune front digits-50pct-1 --format csv[/bold]")
def front(
    run: Run,
    form: Annotated[
        Literal["table", "json", "csv"], typer.Option("--format", help="How to print it.")
    ] = "table",
    runs_dir: RunsDir = RUNS,
) -> None:
    """Print the Pareto front of a run, also while it is still searching."""
    from paretoprune.experiments.commands import front as command

    command.front(run, form, runs_dir=runs_dir)


@app.command(epilog="Example: [bold]paretoprune ui resnet56-cifar10-50pct-1 --open[/bold]")
def ui(
    run: Annotated[
        str | None,
        typer.Argument(
            help="Name of a run.", show_default="the newest one", autocompletion=run_names
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 5000,
    browse: Annotated[bool, typer.Option("--open", help="Open the browser.")] = False,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Start the MLflow UI on this machine and say where it shows the front."""
    from paretoprune.experiments.tracking import server

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
    from paretoprune.experiments.commands import export as command

    choice = command.Choice(trial, max_flops, min_accuracy)
    command.export_run(
        run,
        choice,
        to,
        formats=formats,
        reports=report,
        runs_dir=runs_dir,
        quiet=quiet,
        as_json=as_json,
    )
