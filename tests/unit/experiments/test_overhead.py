"""The figures of the overhead benchmark, on times that are known."""

from __future__ import annotations

import pytest

from paretoprune.experiments.benchmarks.overhead import Clock, busy, figures


@pytest.mark.parametrize("workers", [1, 2])
def test_waiting_workers_are_overhead(workers: int) -> None:
    """Every worker computes for 0.9 s and waits for 0.1 s; two of them half a second apart."""
    clock = Clock()
    ends = sorted(n + 0.5 * worker for n in range(1, 12) for worker in range(workers))
    clock.trials = [(end, 0.9) for end in ends]
    clock.driver = [0.05 * n for n in range(len(ends))]
    clock.tasks = [2000] * len(ends)
    row = figures(clock, workers)
    assert row["overhead_percent"] == pytest.approx(10)
    assert row["own_seconds_per_trial"] == pytest.approx(0.9)
    assert row["driver_cpu_ms_per_trial"] == pytest.approx(50)
    assert row["trials_per_hour"] == pytest.approx(3600 * workers)
    assert row["sent_per_trial_kb"] == 2


def test_only_what_lies_between_counts() -> None:
    trials = [(1.0, 1.0), (2.5, 1.5), (9.0, 3.0)]
    assert busy(trials, 2.0, 7.0) == pytest.approx(0.5 + 1.0)


def test_too_few_trials_are_refused() -> None:
    clock = Clock()
    clock.trials = [(1.0, 1.0), (2.0, 1.0)]
    with pytest.raises(ValueError, match="2 trials are too few for 2 workers"):
        figures(clock, 2)
