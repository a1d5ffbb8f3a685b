"""Evaluations: pure, repeatable, and what goes wrong in one is an outcome."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paretoprune.criteria import CRITERIA, select
from paretoprune.criteria.ablation import penultimate_features
from paretoprune.search import Completed, Failed, Problem, evaluate, evaluation, search
from paretoprune.search.evaluation import (
    FINAL_IMAGES,
    FINAL_SAMPLES,
    Evaluator,
    Moved,
    attempt,
)
from paretoprune.surgery import PruningPlan, Reconstructor, prune, reconstruct, trace


@pytest.fixture
def plan() -> PruningPlan:
    return PruningPlan({"3.conv1": tuple(range(12))}, removed=("8",))


@pytest.fixture
def evaluator(problem: Problem) -> Evaluator:
    return Evaluator(problem, trace(problem.model, problem.example_inputs))


def test_metrics_are_those_of_the_reconstructed_network(
    problem: Problem, evaluator: Evaluator, plan: PruningPlan
) -> None:
    graph = trace(problem.model, problem.example_inputs)
    small = prune(problem.model, graph, plan)
    small = reconstruct(small, problem.model, graph, plan, problem.calibration)
    cost = graph.cost(plan)
    metrics = evaluator(plan, 0).metrics
    assert {k: metrics[k] for k in ("macs", "params")} == {
        "macs": cost.macs,
        "params": cost.params,
    }
    measured = evaluate(small, problem.validation, problem.loss)
    assert metrics["loss"] == pytest.approx(measured["loss"], rel=1e-4)
    assert metrics["accuracy"] == measured["accuracy"]


def test_an_evaluation_is_repeatable_and_touches_nothing(
    problem: Problem, evaluator: Evaluator, plan: PruningPlan
) -> None:
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    generator = torch.get_rng_state()
    first = evaluator(plan, 0)
    assert evaluator(plan, 0) == first
    assert pickle.loads(pickle.dumps(evaluator))(plan, 0) == first
    assert torch.equal(torch.get_rng_state(), generator)
    after = problem.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(parameter.grad is not None for parameter in problem.model.parameters())


def test_an_error_is_an_outcome_in_one_line(problem: Problem, plan: PruningPlan) -> None:
    def broken(outputs: object, targets: object) -> torch.Tensor:
        raise RuntimeError("out of luck\nand more")

    graph = trace(problem.model, problem.example_inputs)
    evaluator = Evaluator(replace(problem, loss=broken), graph)
    assert attempt(evaluator, plan, 0) == Failed("RuntimeError: out of luck")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_metrics_that_are_not_finite_are_a_failure(plan: PruningPlan, value: float) -> None:
    outcome = attempt(lambda plan, seed: {"loss": value, "macs": 1}, plan, 0)
    assert outcome == Failed(f"metrics must be finite, but got {{'loss': {value}}}.", "not finite")


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: bytearray(2**62),
        lambda: torch.empty(2**60, dtype=torch.uint8),
        pytest.param(
            lambda: torch.empty(2**50, dtype=torch.uint8, device="cuda"),
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ),
    ],
    ids=["python", "torch", "cuda"],
)
def test_too_little_memory_is_told_apart(
    plan: PruningPlan, allocate: Callable[[], object]
) -> None:
    def evaluation(plan: PruningPlan, seed: int) -> dict[str, float]:
        allocate()
        return {"loss": 1.0, "macs": 1}

    outcome = attempt(evaluation, plan, 0)
    assert isinstance(outcome, Failed)
    assert outcome.kind == "memory"


def test_the_gpu_s_memory_counts_as_memory(plan: PruningPlan) -> None:
    def evaluation(plan: PruningPlan, seed: int) -> dict[str, float]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    failed = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert attempt(evaluation, plan, 0) == Failed(failed, "memory")


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_libraries_of_the_gpu_without_memory_count_too(plan: PruningPlan, message: str) -> None:
    def evaluation(plan: PruningPlan, seed: int) -> dict[str, float]:
        raise (torch.AcceleratorError if "CUDA error: out" in message else RuntimeError)(message)

    outcome = attempt(evaluation, plan, 0)
    assert isinstance(outcome, Failed)
    assert outcome.kind == "memory"


def test_a_gpu_that_refuses_everything_from_now_on_is_no_outcome(plan: PruningPlan) -> None:
    def evaluation(plan: PruningPlan, seed: int) -> dict[str, float]:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    with pytest.raises(torch.AcceleratorError, match="device-side assert"):
        attempt(evaluation, plan, 0)


def test_ctrl_c_is_no_outcome(plan: PruningPlan) -> None:
    def interrupted(plan: PruningPlan, seed: int) -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(interrupted, plan, 0)


def test_seconds_are_measured(plan: PruningPlan) -> None:
    outcome = attempt(lambda plan, seed: {"loss": 1.0, "macs": 1}, plan, 0)
    assert isinstance(outcome, Completed)
    assert 0 <= outcome.seconds < 1
    with pytest.raises(TypeError):
        outcome.metrics["loss"] = 0.0  # type: ignore[index]
    assert pickle.loads(pickle.dumps(outcome)) == outcome


def test_moved_batches_can_be_read_again(problem: Problem) -> None:
    moved = Moved(problem.validation, torch.device("cpu"))
    assert len(list(moved)) == len(list(moved)) == 1


def test_cka_can_be_an_objective(problem: Problem) -> None:
    front = search(problem, 0.6, 4, criteria=("l2",), objectives=("cka", "macs"), workers=0)
    assert front.records
    for record in front.records:
        assert isinstance(record.outcome, Completed)
        assert 0 < record.outcome.metrics["cka"] <= 1 + 1e-9
    graph = trace(problem.model, problem.example_inputs)
    evaluator = Evaluator(problem, graph, similarity=True)
    small_plan = select(graph, CRITERIA["l2"]()(problem.model, graph, []), budget=0.2)
    whole, less = (evaluator(plan, 0).metrics["cka"] for plan in (PruningPlan(), small_plan))
    assert whole == pytest.approx(1)
    assert less < 0.999
    inputs = torch.cat([inputs for inputs, _ in problem.calibration])
    removed = PruningPlan(removed=tuple(graph.blocks))
    small = evaluator.network(removed, 0)
    layers = [m for m in small.modules() if isinstance(m, nn.Linear)]
    seen: list[Tensor] = []
    layers[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    small(inputs)
    assert torch.equal(penultimate_features(small, graph, inputs, removed), seen[0])


def test_a_latency_is_a_share_of_the_dense_network_s(
    problem: Problem, plan: PruningPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "TIMED_SECONDS", 0.02)
    graph = trace(problem.model, problem.example_inputs)
    assert "latency" not in Evaluator(problem, graph)(plan, 0).metrics
    short, long = (
        Evaluator(problem, graph, latency=dense)(plan, 0).metrics["latency"]
        for dense in (1e-3, 1e6)
    )
    assert 0 < 1e3 * short < long < 1e9  # whatever else the machine does meanwhile
    plain = Evaluator(problem, graph)(plan, 0).metrics
    timed = Evaluator(problem, graph, latency=1.0)(plan, 0).metrics
    assert {name: value for name, value in timed.items() if name != "latency"} == plain


def test_what_is_handed_out_is_the_better_of_two_reconstructions(
    problem: Problem, plan: PruningPlan
) -> None:
    graph = trace(problem.model, problem.example_inputs)
    inputs, targets = next(iter(problem.calibration))
    few = replace(problem, calibration=[(inputs[:16], targets[:16])])

    def loss_of(given: Problem) -> float:
        final = Evaluator(given, graph).final(plan, 0)
        return evaluate(final, given.validation, given.loss)["loss"]

    candidate = Evaluator(few, graph)(plan, 0).metrics["loss"]
    whole = Evaluator(problem, graph)(plan, 0).metrics["loss"]
    assert whole != pytest.approx(candidate, rel=1e-4)
    assert loss_of(few) == pytest.approx(candidate, rel=1e-5)  # in another memory layout
    better, worse = sorted(
        (few, problem), key=lambda each: Evaluator(each, graph)(plan, 0).metrics["loss"]
    )
    lowest = min(candidate, whole)
    for first, second in ((better, worse), (worse, better)):
        given = replace(first, refit=second.calibration)
        assert loss_of(given) == pytest.approx(lowest, rel=1e-5)


def test_what_is_handed_out_is_reconstructed_on_more(
    problem: Problem, plan: PruningPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    def spy(*args: Any, **kwargs: Any) -> Reconstructor:
        given.append(kwargs)
        return Reconstructor(*args, **kwargs)

    monkeypatch.setattr(evaluation, "Reconstructor", spy)
    graph = trace(problem.model, problem.example_inputs)
    Evaluator(replace(problem, refit=problem.calibration), graph).final(plan, 0)
    assert given == [{}, {"images": FINAL_IMAGES, "samples": FINAL_SAMPLES}]


def test_workers_are_sent_no_data_that_they_do_not_read(problem: Problem) -> None:
    heavy = torch.zeros(1_000_000)
    batches = [(heavy, torch.zeros(1))]
    graph = trace(problem.model, problem.example_inputs)
    given = replace(
        problem,
        refit=batches,
        recalibration=batches,
        training=batches,
        test=lambda: batches,
    )
    lean = pickle.dumps(Evaluator(problem, graph))
    assert len(pickle.dumps(Evaluator(given, graph))) < len(lean) + 1000
