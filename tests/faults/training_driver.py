"""A search that trains, to be run as a process and killed; not a test itself.

Usage: python training_driver.py FOLDER STRATEGY WORKERS, with 0 workers for no Ray. The network is
trained for an epoch on the digits; what the search trains lies in FOLDER/weights.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from paretoprune.experiments.data.opening import load_data
from paretoprune.experiments.data.splits import TrainingBatches, split
from paretoprune.experiments.finetuning import FineTuner
from paretoprune.experiments.models import digits_resnet
from paretoprune.experiments.training import Training, train
from paretoprune.search import Finetuning, Problem, search

EPOCHS = 12
CRITERIA = {"optuna": ("l2", "bn_scale"), "everything": ("l2",)}


def main(folder: Path, strategy: str, workers: int) -> None:
    """Runs or resumes the search."""
    data = load_data("digits", seed=0)
    splits = split(data.train, seed=0)
    batches = TrainingBatches(data.train, splits.training, 128, seed=0)
    torch.manual_seed(0)
    model = train(digits_resnet(), batches, Training(epochs=1, learning_rate=0.1))
    problem = Problem(
        model,
        splits.calibration[0][0][:2],
        calibration=splits.calibration,
        validation=splits.validation,
        training=batches,
        name="digits",
    )
    tuner = FineTuner.of(problem, distil=True)
    tuner = replace(tuner, training=replace(tuner.training, average=0.9))
    greedy = strategy == "everything"
    finetuning = Finetuning(
        tuner, epochs=0 if greedy else EPOCHS, top=2, recovery=EPOCHS if greedy else 0
    )
    search(
        problem,
        0.5,
        4,
        strategy=strategy,
        criteria=CRITERIA[strategy],
        finetuning=finetuning,
        workers=workers,
        run_dir=folder,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
