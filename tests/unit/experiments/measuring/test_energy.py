"""Energy is measured, adds up over the drivers of a run, and needs its extra."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from paretoprune.experiments.measuring import energy, reports
from paretoprune.experiments.measuring.energy import (
    Meter,
    check_energy,
    energy_of_run,
    inference_energy,
    metered,
)
from paretoprune.experiments.measuring.reports import parse_reports
from paretoprune.experiments.models import digits_resnet
from paretoprune.search import Problem
from paretoprune.surgery.progress import silent


def test_work_takes_energy_and_time() -> None:
    with metered() as meter:
        matrix = torch.randn(400, 400)
        for _ in range(200):
            matrix = (matrix @ matrix).softmax(1)
    assert meter.kwh > 0
    assert meter.kg > 0
    assert meter.seconds > 0


def test_the_meter_is_silent() -> None:
    """The first one of a process says so before it has read how much it is to say."""
    code = "from paretoprune.experiments.measuring import energy\nwith energy.metered(): pass"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_energy_is_per_thousand_examples() -> None:
    used = inference_energy(digits_resnet(), torch.randn(20, 1, 8, 8), 20, 0.5)
    assert 0 < used.seconds < 60
    assert used.kwh > 0


def test_the_energy_of_all_passes_is_shared_by_their_examples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[None] = []
    model = digits_resnet()
    model.register_forward_hook(lambda *_given: calls.append(None))
    meter = Meter(kwh=1e-6, kg=2e-6, seconds=3.0)
    monkeypatch.setattr(energy, "metered", lambda: nullcontext(meter))
    used = inference_energy(model, torch.randn(20, 1, 8, 8), 20, 0.05)
    share = 1000 / (20 * (len(calls) - 1))  # the first pass warms up
    assert astuple(used) == pytest.approx((1e-6 * share, 2e-6 * share, 3 * share))


def test_the_report_on_energy_is_in_joules_and_grams(monkeypatch: pytest.MonkeyPatch) -> None:
    meters = iter([Meter(kwh=2 / 3.6e6, kg=0.004), Meter(kwh=1 / 3.6e6, kg=0.001)])
    monkeypatch.setattr(reports, "inference_energy", lambda *_given: next(meters))
    model, batches = digits_resnet(), [(torch.zeros(2, 1, 8, 8), torch.zeros(2).long())]
    problem = Problem(model, batches[0][0], batches, batches)
    report = reports.REPORTS["energy"](problem, model, model, silent)
    assert report.dense == pytest.approx({"energy_joules_per_1000": 2, "co2_grams": 4})
    assert report.pruned == pytest.approx({"energy_joules_per_1000": 1, "co2_grams": 1})
    assert report.line == "energy   1 J per 1,000 examples (dense 2 J, -50.0 %)"


def test_drivers_of_a_run_add_up(tmp_path: Path) -> None:
    energy_of_run(tmp_path, Meter(0.001, 0.0005, 10.0))
    line = energy_of_run(tmp_path, Meter(0.002, 0.0005, 5.0))
    assert "3 Wh, 1 g CO2 in 15 s" in line
    assert json.loads((tmp_path / "energy.json").read_text()) == pytest.approx(
        {"kwh": 0.003, "kg": 0.001, "seconds": 15.0}
    )


def test_names_of_reports_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_reports("robustness, energy,robustness") == ("robustness", "energy")
    assert parse_reports("") == ()
    with pytest.raises(ValueError, match="unknown report 'colour'; available: robustness, energy"):
        parse_reports("colour")
    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "codecarbon":
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install paretoprune\[energy\]"):
        check_energy()
