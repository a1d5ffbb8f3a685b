"""`paretoprune recede`: sparsity training as a step of its own, which every search then shares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
import typer

from paretoprune.criteria import fingerprint
from paretoprune.criteria.receding import Receding, recede
from paretoprune.experiments.commands.long_step import LongStep
from paretoprune.experiments.commands.progress import long_step, progress_console
from paretoprune.experiments.commands.traced import traced_problem
from paretoprune.experiments.places import check_folder
from paretoprune.search import checks, evaluate
from paretoprune.search.evaluation import Moved, on_device
from paretoprune.search.layout import channels_last
from paretoprune.search.metrics import device_of
from paretoprune.search.problem import Batch
from paretoprune.search.weights import write_weights


def recede_network(
    model: str,
    to: Path,
    *,
    data: str | None,
    weights: str | None,
    settings: Mapping[str, Any],
    quiet: bool,
) -> None:
    """Trains on all training images outside the search split, with the training augmentation.

    A problem without training batches gives its images for recalibration, or for calibration. A
    file beside `to` holds what was done, epoch by epoch, until all is.

    Raises:
        ValueError: If an argument cannot be meant, the network has no BatchNorm with scales, or
            the training diverges.
    """
    checks.check_count("--epochs", settings["epochs"], 1)
    checks.check_count("--seed", settings["seed"], 0)
    if to.suffix != ".safetensors":  # --weights goes by it
        raise ValueError(f"--to takes a file that ends in .safetensors, but got {to}.")
    if to.exists():
        raise ValueError(f"{to} exists already; take another --to.")
    check_folder(to.parent)
    to.parent.mkdir(parents=True, exist_ok=True)
    problem, graph = traced_problem(
        model, data=data, weights=weights, seed=settings["seed"], quiet=quiet
    )
    network = channels_last(on_device(problem.model), graph)
    parts = (problem.training, problem.recalibration, problem.calibration)
    batches = next(part for part in parts if part is not None)
    checkpoint = to.with_suffix(".part")
    with long_step(progress_console(), "Receding", quiet=quiet) as progress:
        told = _Told(
            batches,
            device_of(network),
            settings["epochs"],
            progress,
            fingerprint.of_batches(problem.calibration),  # of the same images, and read plain
        )
        receded = recede(
            network,
            told,
            problem.loss,
            Receding(**settings),
            checkpoint=checkpoint,
            progress=told.tell,
        )
    write_weights(receded, to)
    checkpoint.unlink(missing_ok=True)
    for name, each in (("before", network), ("receded", receded)):
        measured = evaluate(each, problem.validation, problem.loss)
        shown = ", ".join(f"{key} {value:.4f}" for key, value in measured.items())
        typer.echo(f"{name}: {shown} on the search split")
    typer.echo(f"written: {to}; use it with --weights {to} --criteria receding")


class _Told:
    """Training batches on a device that tell how far the training is, and of which data it is."""

    def __init__(
        self,
        batches: Iterable[Batch],
        device: torch.device,
        epochs: int,
        progress: LongStep,
        data: str,
    ) -> None:
        self._batches = Moved(batches, device)
        self._length = length_hint(batches)
        self._epochs = epochs
        self._progress = progress
        self._data = data
        self._epoch = 0
        self._last = ""

    def __repr__(self) -> str:
        """Returns what tells the data apart; a checkpoint goes by it."""
        return f"<batches of {self._data}>"

    def __length_hint__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        self._epoch += 1
        line = f"{self._last}epoch {self._epoch}/{self._epochs}"
        for done, batch in enumerate(self._batches):
            self._progress(line, done, self._length)
            yield batch

    def tell(self, line: str) -> None:
        """Takes the line of an epoch that is done."""
        self._progress(line)
        self._last = f"{line}; "
