"""The main job on real images in a few minutes: `python -m paretoprune.experiments.demo`.

Searches a ResNet-14 for scikit-learn's digits that is trained on the spot, exports the best, loads
it again and says what was verified, through the same code as the command line.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
import typer
from rich.console import Console

from paretoprune.experiments import models
from paretoprune.experiments.commands.export import Choice, export_run
from paretoprune.experiments.commands.options import SearchOptions
from paretoprune.experiments.commands.search import search
from paretoprune.experiments.data.opening import load_data
from paretoprune.experiments.units import format_percent
from paretoprune.search import evaluate
from paretoprune.surgery import load, trace

RUNS, EXPORT = Path("runs"), Path("exports/demo")
FLOPS, TRIALS = "50%", 48


def main() -> int:
    """Runs the demo and returns its exit status."""
    torch.set_num_threads(1)  # a network as small as this one only waits for other threads
    say = Console(highlight=False).rule
    say(f"1 of 3  search: digits, {FLOPS} of the FLOPs, {TRIALS} trials")
    options = SearchOptions("digits", FLOPS, trials=TRIALS)
    try:
        run = search(options, run=None, runs_dir=RUNS, quiet=False)
    except typer.Exit as stop:
        return stop.exit_code
    say(f"2 of 3  export the best to {EXPORT}")
    shutil.rmtree(EXPORT, ignore_errors=True)  # of an earlier demo
    export_run(run, Choice(), EXPORT, formats="safetensors", runs_dir=RUNS, quiet=False)
    say("3 of 3  load it and check")
    _check(EXPORT)
    typer.echo(f"\nopen the front in the MLflow UI:  paretoprune ui {run} --open")
    return 0


def _check(directory: Path) -> None:
    """Loads the export as a user would, and says its accuracy and FLOPs."""
    network = load(directory)
    test = load_data("digits", seed=0).test
    assert test is not None, "the digits have a test split"
    inputs, _ = next(iter(test()))
    macs = trace(network, inputs[:2]).cost().macs
    dense = trace(models.digits_resnet(), inputs[:2]).cost().macs
    typer.echo(
        f"verified: the network loaded from {directory} is right on "
        f"{format_percent(evaluate(network, test())['accuracy'], 2)} of the test images, with "
        f"{macs:,} of {dense:,} MACs ({format_percent(macs / dense)}; MACs are the papers' FLOPs)."
    )


if __name__ == "__main__":
    sys.exit(main())
