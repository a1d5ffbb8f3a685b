"""Networks are fine-tuned by what suits them: SGD behind BatchNorm, AdamW elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import convnext_tiny, resnet18, vgg11

from paretoprune.experiments.data.datasets import digits
from paretoprune.experiments.data.splits import TrainingBatches, split
from paretoprune.experiments.finetuning import (
    FINETUNING,
    FINETUNING_ADAMW,
    FineTuner,
    finetuning_for,
)
from paretoprune.experiments.training import Training, train
from paretoprune.search import Problem, evaluate
from paretoprune.search.evaluation import Evaluator
from paretoprune.surgery import PruningPlan, trace


class Transformer(nn.Module):
    """A small vision transformer for the digits, 2 x 2 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 2, 2)
        self.positions = nn.Parameter(torch.zeros(1, 16, 32))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(3)
        )
        self.norm = nn.LayerNorm(32)
        self.classifier = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            tokens = layer(tokens)
        classes: Tensor = self.classifier(self.norm(tokens).mean(1))
        return classes


class Mixed(nn.Sequential):
    """Normalises by batch in one place and by token in another."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.LayerNorm(4))


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (resnet18, FINETUNING),
        (convnext_tiny, FINETUNING_ADAMW),
        (vgg11, FINETUNING_ADAMW),
        (Transformer, FINETUNING_ADAMW),
        (Mixed, FINETUNING_ADAMW),
    ],
)
def test_the_norms_of_a_network_decide(network: type[nn.Module], expected: Training) -> None:
    with torch.device("meta"):
        assert finetuning_for(network()) is expected


def test_a_pruned_transformer_gets_better(tmp_path: Path) -> None:
    images = replace(digits("train"), shift=0)
    splits = split(images, seed=0)
    batches = TrainingBatches(images, splits.training, 64, seed=0)
    torch.manual_seed(0)
    learning = Training(epochs=12, learning_rate=2e-3, optimizer="adamw", weight_decay=0.05)
    problem = Problem(
        train(Transformer(), batches, learning),
        splits.calibration[0][0][:2],
        calibration=splits.calibration,
        validation=splits.validation,
        training=batches,
    )
    graph = trace(problem.model, problem.example_inputs)
    kept = {group.name: tuple(range(group.size // 2)) for group in graph.open_groups}
    small = Evaluator(problem, graph).network(PruningPlan(kept), seed=0)
    tuners = [FineTuner.of(problem, distil=False)]
    tuners.append(replace(tuners[0], training=FINETUNING))
    losses = [evaluate(small, problem.validation, problem.loss)["loss"]]
    for number, tuner in enumerate(tuners):
        part = tmp_path / f"{number}.part"
        tuned = tuner(small, epochs=6, seed=0, checkpoint=part, progress=lambda line: None)
        losses.append(evaluate(tuned, problem.validation, problem.loss)["loss"])
    before, suited, sgd = losses
    assert suited < before
    assert suited < sgd, "what suits a convolutional network would do as well"
