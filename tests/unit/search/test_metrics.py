"""evaluate is an exact mean over examples and leaves the network as it was."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paretoprune.search import Metric
from paretoprune.search.metrics import evaluate, to_device

LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.5], [1.0, 0.0]])
TARGETS = torch.tensor([0, 1, 1, 1, 1])


def test_batches_of_different_sizes_do_not_bias_the_mean() -> None:
    batches = [(LOGITS[:4], TARGETS[:4]), (LOGITS[4:], TARGETS[4:])]
    metrics = evaluate(nn.Identity(), batches)
    assert metrics["loss"] == pytest.approx(float(F.cross_entropy(LOGITS, TARGETS)))
    assert metrics["accuracy"] == pytest.approx(3 / 5)


def test_the_network_is_evaluated_in_eval_mode_and_left_in_its_own() -> None:
    norm = nn.BatchNorm1d(2).eval()
    model = nn.Sequential(nn.Dropout(0.9), norm)
    before = copy.deepcopy(norm.state_dict())
    metrics = [evaluate(model, [(LOGITS, TARGETS)]) for _ in range(2)]
    assert metrics[0] == metrics[1]
    assert (model.training, model[0].training, norm.training) == (True, True, False)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_the_mode_is_restored_after_an_error() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(RuntimeError):
        evaluate(model, [(LOGITS, TARGETS)])
    assert model.training


def test_no_examples_is_an_error() -> None:
    for batches in ([], [(LOGITS[:0], TARGETS[:0])]):
        with pytest.raises(ValueError, match="at least one example"):
            evaluate(nn.Identity(), batches)


def test_accuracy_is_left_out_where_it_has_no_meaning() -> None:
    regression = evaluate(nn.Identity(), [(LOGITS, LOGITS + 1)], F.mse_loss)
    assert regression == {"loss": 1.0}


def test_logits_among_other_outputs_have_an_accuracy() -> None:
    class Tagged(nn.Module):
        def forward(self, inputs: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=inputs, cache=None)

    def loss(outputs: SimpleNamespace, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, targets)

    assert evaluate(Tagged(), [(LOGITS, TARGETS)], loss)["accuracy"] == pytest.approx(3 / 5)


def test_one_logit_has_no_accuracy() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs[:, 0], targets.float())

    assert set(evaluate(nn.Identity(), [(LOGITS[:, :1], TARGETS)], loss)) == {"loss"}


def test_targets_that_name_no_class_are_not_counted() -> None:
    targets = torch.tensor([0, 1, -100, 255, 1])
    loss = torch.nn.CrossEntropyLoss(ignore_index=-100)
    found = evaluate(
        nn.Identity(), [(LOGITS, targets)], lambda o, t: loss(o, t.where(t < 2, -100))
    )
    assert found["accuracy"] == pytest.approx(2 / 3)


class Share:
    """Share of the outputs above 1, counted over batches as torchmetrics does."""

    def reset(self) -> None:
        self.above, self.seen = 0, 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.above += int((outputs > 1).sum())
        self.seen += outputs.numel()

    def compute(self) -> float:
        return self.above / self.seen


def test_metrics_of_ones_own_are_over_all_examples() -> None:
    batches = [(LOGITS[:4], TARGETS[:4]), (LOGITS[4:], TARGETS[4:])]
    shared = Share()
    metrics = {
        "largest": Metric(lambda outputs, targets: outputs.max(1).values.mean()),
        "share": Metric(shared),
    }
    for _ in range(2):
        found = evaluate(nn.Identity(), batches, metrics=metrics)
        assert found["largest"] == pytest.approx(LOGITS.max(1).values.mean().item())
        assert found["share"] == pytest.approx(2 / 10)
    assert not vars(shared)  # a copy counts


def test_accuracy_of_dense_labels_is_per_label() -> None:
    logits = torch.zeros(2, 3, 4, 4)
    logits[:, 1] = 1
    targets = torch.ones(2, 4, 4).long()
    targets[0, :2] = 2
    assert evaluate(nn.Identity(), [(logits, targets)])["accuracy"] == pytest.approx(24 / 32)


class TwoInputs(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


@pytest.mark.parametrize("inputs", [(LOGITS, LOGITS), {"a": LOGITS, "b": LOGITS}], ids=type)
def test_several_inputs(inputs: Any) -> None:
    assert evaluate(TwoInputs(), [(inputs, TARGETS)])["accuracy"] == pytest.approx(3 / 5)


def test_to_device_keeps_the_form() -> None:
    value = {"a": [LOGITS, (TARGETS, "text")]}
    moved = to_device(value, torch.device("meta"))
    assert moved["a"][0].is_meta
    assert moved["a"][1][0].is_meta
    assert moved["a"][1][1] == "text"
