"""export: a record becomes a folder that loads, after it was rebuilt, measured and compared."""

from __future__ import annotations

import copy
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paretoprune.experiments.exporting.card import CardFacts, Measured, model_card, weights_bytes
from paretoprune.experiments.exporting.formats import ExportFailed, Written, write_format
from paretoprune.experiments.measuring.counting import thop_macs
from paretoprune.experiments.measuring.reports import REPORTS, Report, check_reports
from paretoprune.experiments.places import check_folder
from paretoprune.experiments.runs import library_versions
from paretoprune.search import Batch, Completed, Problem, Record
from paretoprune.search.evaluation import Evaluator, first_line, on_device
from paretoprune.search.latency import Latency, measure_latency
from paretoprune.search.metrics import evaluate, forward
from paretoprune.search.weights import FINETUNED, Weights, trained_weights
from paretoprune.surgery import (
    Cost,
    PruningGraph,
    PruningPlan,
    load,
    save,
    trace,
)
from paretoprune.surgery.inputs import count_rows
from paretoprune.surgery.progress import Parts, Progress, silent

_TOLERANCE = 1e-5
"""Largest relative difference between the outputs of the network and of its reloaded copy."""


@dataclass(frozen=True)
class Exported:
    """An export that was reloaded and compared.

    Attributes:
        directory: The folder.
        model: The network in memory, in eval mode on the CPU.
        dense: What was measured of the dense network.
        small: What was measured of the exported network.
        written: What was measured of each file beside the weights.
        reports: What else was measured.
    """

    directory: Path
    model: nn.Module
    dense: Measured
    small: Measured
    written: tuple[Written, ...]
    reports: tuple[Report, ...] = ()


def check_destination(directory: Path) -> None:
    """Verifies that an export may be written; to be called before long work.

    Raises:
        ValueError: If something is there already, or the folder above it cannot be written.
    """
    if directory.exists():
        raise ValueError(f"{directory} exists already; export into a new folder.")
    check_folder(directory.parent)


def export(
    problem: Problem,
    record: Record,
    directory: Path,
    *,
    weights: Weights | None = None,
    formats: Sequence[str] = (),
    reports: Sequence[str] = (),
    run: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Exported:
    """Writes the network of a record, with its card, and returns what was measured.

    The network is rebuilt as the search evaluated it and must have the record's metrics again;
    then it is reconstructed on more examples, where the problem has them. The test split is read
    at the end, and again by the report on robustness; the written folder is loaded again and its
    outputs are compared before it gets its name. After an error nothing is left of it.

    Args:
        problem: The problem of the search.
        record: A completed record.
        directory: The new folder.
        weights: Of the run, where networks were trained in it; they are taken as they are, those
            of a fine-tuning only where it came out no worse than it began.
        formats: What to write beside safetensors: names of `FORMATS`.
        reports: What to measure beyond accuracy, cost and latency: names of `REPORTS`.
        run: Name of the run, for the card.
        seed: Seed of the search.
        progress: Told the stages, and how far each is.

    Raises:
        ValueError: If `directory` exists, the record is not a completed one, a report cannot be
            measured, or weights that were trained are missing.
        ExportFailed: If the rebuilt or a written network is not the record's, or a format cannot
            hold it.
    """
    check_destination(directory)
    if record.plan is None or not isinstance(record.outcome, Completed):
        raise ValueError(f"trial {record.number} did not complete, so there is no network of it.")
    check_reports(reports, problem)
    progress("tracing the dense network", 0, 0)
    graph = trace(problem.model, problem.example_inputs)
    small = handed_out(problem, graph, record, weights=weights, seed=seed, progress=progress)
    search_metrics = _evaluated(small, problem, problem.validation)
    dense = copy.deepcopy(problem.model).cpu().eval()
    inputs, _ = next(iter(problem.validation))
    with _new_folder(directory) as folder:
        written = tuple(_written(formats, folder, dense, small, inputs, problem, progress))
        progress("measuring accuracy and latency", 0, 0)
        measured = _measure(problem, graph, record.plan, dense, small, search_metrics)
        reported = {name: REPORTS[name](problem, dense, small, progress) for name in reports}
        save(
            folder,
            small,
            record.plan,
            reference=problem.reference,
            arguments=problem.arguments,
            metrics={
                **measured[1].to_json(),
                "formats": {one.name: one.to_json() for one in written},
                "reports": {name: one.to_json() for name, one in reported.items()},
            },
            example_inputs=problem.example_inputs,
        )
        progress("loading it again and comparing outputs", 0, 0)
        _check_reloaded(problem, folder, small, inputs)
        facts = CardFacts(
            name=problem.name,
            run=run,
            record=record,
            conditions=_conditions(small),
            batch=count_rows(problem.example_inputs),
            libraries=library_versions(),
            reference=problem.reference,
        )
        (folder / "README.md").write_text(
            model_card(facts, *measured, written, [*reported.values()]), encoding="utf-8"
        )
    return Exported(directory, small, *measured, written, tuple(reported.values()))


def handed_out(
    problem: Problem,
    graph: PruningGraph,
    record: Record,
    *,
    weights: Weights | None,
    seed: int,
    progress: Progress,
) -> nn.Module:
    """Returns the network of a record as an export has it, in eval mode on the CPU.

    Args:
        problem: The problem of the search.
        graph: The dense network's graph.
        record: A completed record.
        weights: Of the run, where networks were trained in it.
        seed: Seed of the search.
        progress: Told the stages, and how far each is.

    Raises:
        ValueError: If weights that were trained are missing.
        ExportFailed: If the rebuilt network is not the record's.
    """
    assert record.plan is not None
    assert isinstance(record.outcome, Completed)
    rebuilding = partial(progress, "rebuilding the network layer by layer")
    evaluator = Evaluator(problem, graph)
    kind = trained_weights(record)
    rebuilt = _network(problem, evaluator, graph, record, weights, seed, rebuilding)
    expected = record.finetuned_metrics if kind == FINETUNED else record.outcome.metrics
    _check_loss(record, expected, _evaluated(rebuilt, problem, problem.validation))
    if problem.refit is not None and kind is None:
        progress("reconstructing it on more examples", 0, 0)
    small = evaluator.refitted(rebuilt, record.plan) if kind is None else rebuilt
    return small.cpu().eval()


def _written(
    formats: Sequence[str],
    folder: Path,
    dense: nn.Module,
    small: nn.Module,
    inputs: Any,
    problem: Problem,
    progress: Progress,
) -> Iterator[Written]:
    """Writes and compares the formats, one after the other."""
    for name in formats:
        progress(f"writing {name}, and comparing it on real inputs", 0, 0)
        with tempfile.TemporaryDirectory() as scratch:
            yield write_format(
                name, folder, dense, small, inputs, problem.example_inputs, Path(scratch)
            )


@contextmanager
def _new_folder(directory: Path) -> Iterator[Path]:
    """Yields a folder beside `directory` that takes its name at the end, or vanishes."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    folder = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        folder.rename(directory)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _network(
    problem: Problem,
    evaluator: Evaluator,
    graph: PruningGraph,
    record: Record,
    weights: Weights | None,
    seed: int,
    progress: Parts,
) -> nn.Module:
    """Returns the network of a record: with its trained weights, or rebuilt from its plan."""
    assert record.plan is not None
    kind = trained_weights(record)
    if kind is None:
        return evaluator.network(record.plan, seed, progress)
    if weights is None:
        raise ValueError(f"trial {record.number} was trained; its run's weights are needed.")
    return weights.network(problem.model, graph, record.plan, kind)


def _check_loss(
    record: Record, expected: Mapping[str, float], rebuilt: Mapping[str, float]
) -> None:
    """Verifies that the rebuilt network is the one that the search evaluated.

    By its loss: other devices and thread counts add numbers in another order, so the last digits
    may differ, and the prediction of an example on the border. Of a small loss a few percent are
    little.

    Raises:
        ExportFailed: If its loss is another.
    """
    before, now = expected["loss"], rebuilt["loss"]
    if abs(before - now) > min(1e-3 * max(1.0, abs(before)), 0.05 * abs(before) + 1e-7):
        raise ExportFailed(
            f"trial {record.number} had loss {before:.4g} in the search, but the network rebuilt "
            f"from its plan has {now:.4g}; weights or data must have changed since."
        )


def _measure(
    problem: Problem,
    graph: PruningGraph,
    plan: PruningPlan,
    dense: nn.Module,
    small: nn.Module,
    search_metrics: dict[str, float],
) -> tuple[Measured, Measured]:
    """Returns what the card says of the dense and of the exported network."""
    dense_metrics = _evaluated(dense, problem, problem.validation)
    dense_test, small_test = _test(problem, dense, small)
    dense_time, small_time = measure_latency((dense, small), problem.example_inputs)

    def measured(
        network: nn.Module,
        cost: Cost,
        search: dict[str, float],
        test: dict[str, float] | None,
        latency: Latency,
    ) -> Measured:
        return Measured(
            cost=cost,
            thop_macs=thop_macs(network, problem.example_inputs),
            file_bytes=_file_bytes(network, problem),
            widths=_widths(network),
            search=search,
            test=test,
            latency=latency,
        )

    return (
        measured(dense, graph.cost(), dense_metrics, dense_test, dense_time),
        measured(small, graph.cost(plan), search_metrics, small_test, small_time),
    )


def _test(
    problem: Problem, dense: nn.Module, small: nn.Module
) -> tuple[dict[str, float] | None, dict[str, float] | None]:
    """Returns the metrics of both networks on the test split, which only a report opens, too.

    With `examples`, their number.

    Raises:
        ValueError: If the split cannot be read twice, or the networks do not take its batches.
    """
    if problem.test is None:
        return None, None
    counts: list[int] = []

    def counted(batches: Iterable[Batch]) -> Iterator[Batch]:
        for inputs, targets in batches:
            counts.append(count_rows(targets))
            yield inputs, targets

    try:
        batches = problem.test()
        _check_read_twice(batches)
        before = _evaluated(dense, problem, batches)
        after = _evaluated(small, problem, counted(batches))
    except Exception as error:  # the search never read it, so that anything may be wrong with it
        raise ValueError(f"the test split cannot be measured: {first_line(error)}") from error
    examples = {"examples": sum(counts)}
    return before | examples, after | examples


def _evaluated(network: nn.Module, problem: Problem, batches: Iterable[Batch]) -> dict[str, float]:
    """Returns what is measured of a network on a split, on the GPU where there is one."""
    return evaluate(on_device(network), batches, problem.loss, problem.metrics)


def _check_read_twice(batches: Iterable[Batch]) -> None:
    if isinstance(batches, Iterator):
        raise ValueError(
            "it is read twice, but an iterator or generator ends after the first time; return a "
            "list or a data loader."
        )


def _file_bytes(network: nn.Module, problem: Problem) -> int:
    """Returns the size of a network's weights as an export writes them."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), network, PruningPlan(), example_inputs=problem.example_inputs)
        return weights_bytes(Path(folder))


def _check_reloaded(problem: Problem, folder: Path, small: nn.Module, inputs: Any) -> None:
    """Verifies that what was written loads and computes the same on real inputs.

    Raises:
        ExportFailed: If it does not.
    """
    reloaded = load(folder, problem.reference or (lambda: copy.deepcopy(problem.model).cpu()))
    with torch.no_grad():
        expected, actual = forward(small, inputs), forward(reloaded, inputs)
    try:
        torch.testing.assert_close(actual, expected, rtol=_TOLERANCE, atol=_TOLERANCE)
    except AssertionError as error:
        reason = str(error).splitlines()[0]
        raise ExportFailed(
            f"the written network does not compute what the one in memory does ({reason})."
        ) from error


def _conditions(model: nn.Module) -> str:
    """Returns what a latency holds for: the device and the version of torch."""
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.is_cuda:
        device = torch.cuda.get_device_name(parameter.device)
    else:
        device = f"{platform.machine()} CPU, 1 thread"
    return f"{device}, torch {torch.__version__}"


def _widths(model: nn.Module) -> tuple[int, ...]:
    """Returns the number of outputs of every convolution and linear layer.

    Kernels compute them in blocks, so that a number between two multiples takes the time of the
    larger one.
    """
    return tuple(
        module.weight.shape[0]
        for module in model.modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
    )
