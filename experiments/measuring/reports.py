"""Reports: what an export measures on request, of the dense network and of the pruned one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from paretoprune.experiments.measuring.energy import check_energy, inference_energy
from paretoprune.experiments.measuring.robustness import images_of, robustness, summary
from paretoprune.experiments.units import names
from paretoprune.search import Batch, Problem
from paretoprune.search.checks import check_name
from paretoprune.search.evaluation import on_device
from paretoprune.surgery.inputs import count_rows
from paretoprune.surgery.progress import Progress

ENERGY_SECONDS = 5.0
"""How long the energy of each network is measured."""


@dataclass(frozen=True)
class Report:
    """Something that was measured of both networks.

    Attributes:
        dense: By name.
        pruned: By name.
        line: The result in a line.
        markdown: A section of the card.
        tested: Whether it was measured on the test split.
    """

    dense: Mapping[str, float]
    pruned: Mapping[str, float]
    line: str
    markdown: str
    tested: bool = False

    @property
    def metrics(self) -> dict[str, float]:
        """The pruned network's values, and the dense one's as `dense_…`."""
        return {**self.pruned, **{f"dense_{name}": v for name, v in self.dense.items()}}

    def to_json(self) -> dict[str, Any]:
        """Returns the values, for JSON."""
        return {"dense": dict(self.dense), "pruned": dict(self.pruned)}


def check_reports(reports: Sequence[str], problem: Problem) -> None:
    """Verifies that reports can be measured of a problem; to be called before long work.

    Raises:
        ValueError: If one cannot.
    """
    if "robustness" in reports:
        images_of(_test_images(problem))


def _test_images(problem: Problem) -> Iterable[Batch]:
    if problem.test is None:
        raise ValueError("robustness is measured on test images, but there is no test split.")
    return problem.test()


def _robustness(
    problem: Problem, dense: nn.Module, small: nn.Module, progress: Progress
) -> Report:
    batches = _test_images(problem)
    before, after = (
        robustness(on_device(each), batches, progress=progress) for each in (dense, small)
    )
    shown = ", ".join(
        f"{name} {100 * after[key]:.2f} % (dense {100 * before[key]:.2f} %)"
        for name, key in (("FGSM 8/255", "fgsm_8"), ("corrupted", "corrupted"))
    )
    about = (
        "The same test images: attacked by FGSM with each network's own gradient, in pixel space; "
        "and with 15 common corruptions of 5 severities each, drawn from a fixed seed (not the "
        "files of CIFAR-10-C)."
    )
    table = "\n".join(summary(before, after))
    section = f"## Robustness\n\n{table}\n\n{about}"
    return Report(before, after, f"robust   {shown}", section, tested=True)


def _energy(problem: Problem, dense: nn.Module, small: nn.Module, progress: Progress) -> Report:
    inputs, _ = next(iter(problem.validation))
    examples = count_rows(inputs)
    values: list[dict[str, float]] = []
    for name, each in (("dense", dense), ("pruned", small)):
        progress(f"energy of the {name} network", 0, 0)
        used = inference_energy(each, inputs, examples, ENERGY_SECONDS)
        values.append({"energy_joules_per_1000": used.kwh * 3.6e6, "co2_grams": used.kg * 1e3})
    before, after = (one["energy_joules_per_1000"] for one in values)
    change = f"{100 * (after / before - 1):+.1f} %" if before else "not measurable"
    line = f"energy   {after:.3g} J per 1,000 examples (dense {before:.3g} J, {change})"
    text = (
        f"1,000 examples take {after:.3g} J, those of the dense network {before:.3g} J "
        f"({change}); processor, memory and GPU by codecarbon, {ENERGY_SECONDS:.0f} s each, in "
        f"batches of {examples}."
    )
    return Report(values[0], values[1], line, f"## Energy\n\n{text}")


REPORTS: Mapping[str, Callable[[Problem, nn.Module, nn.Module, Progress], Report]] = (
    MappingProxyType({"robustness": _robustness, "energy": _energy})
)
"""Reports by name: (problem, dense, pruned, progress) -> report."""


def parse_reports(text: str) -> tuple[str, ...]:
    """Returns the reports of a list with commas.

    Raises:
        ValueError: If one is unknown, or what measures it is not installed.
    """
    reports = names(text)
    for name in reports:
        check_name("report", name, REPORTS)
    if "energy" in reports:
        check_energy()
    return reports
