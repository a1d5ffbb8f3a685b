"""`paretoprune recede`: sparsity training as a step of its own, which every search then shares."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from safetensors.torch import save_file

from paretoprune.criteria.receding import Receding, is_receded, recede
from paretoprune.experiments.progress import long_step, progress_console
from paretoprune.experiments.recipes import build_problem
from paretoprune.search import checks, evaluate
from paretoprune.search.evaluation import Moved, on_device
from paretoprune.search.metrics import device_of


def recede_network(
    model: str,
    to: Path,
    *,
    data: str | None,
    weights: str | None,
    settings: Mapping[str, Any],
    quiet: bool,
) -> None:
    """Trains on the images for recalibration, which have the training augmentation.

    A file beside `to` holds what was done, epoch by epoch, until all is.

    Raises:
        ValueError: If an argument cannot be meant, or the training diverges.
    """
    checks.check_count("--epochs", settings["epochs"], 1)
    checks.check_count("--seed", settings["seed"], 0)
    if to.exists():
        raise ValueError(f"{to} exists already; take another --to.")
    to.parent.mkdir(parents=True, exist_ok=True)
    console = progress_console()
    with long_step(console, f"Preparing {model}", quiet=quiet) as progress:
        problem = build_problem(
            model, data=data, weights=weights, seed=settings["seed"], progress=progress
        )
    network = on_device(problem.model)
    batches = Moved(problem.recalibration or problem.calibration, device_of(network))
    checkpoint = to.with_suffix(".part")
    with long_step(console, "Receding", quiet=quiet) as progress:
        receded = recede(
            network,
            batches,
            problem.loss,
            Receding(**settings),
            checkpoint=checkpoint,
            progress=progress,
        )
    assert is_receded(receded), "what is converted back has bounded scales and no shifts"
    save_file({name: t.cpu().contiguous() for name, t in receded.state_dict().items()}, to)
    checkpoint.unlink(missing_ok=True)
    for name, each in (("before", network), ("receded", receded)):
        measured = evaluate(each, problem.validation, problem.loss)
        shown = ", ".join(f"{key} {value:.4f}" for key, value in measured.items())
        typer.echo(f"{name}: {shown} on the search split")
    typer.echo(f"written: {to}; use it with --weights {to} --criteria receding")
