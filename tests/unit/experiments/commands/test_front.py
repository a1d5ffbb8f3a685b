"""What a search prints at its end, also where it was interrupted at its very beginning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from paretoprune.experiments.commands.front import print_result
from paretoprune.experiments.showing.view import SearchView


def test_a_front_without_trials_gives_no_reasons(
    view: SearchView, capsys: pytest.CaptureFixture[str]
) -> None:
    print_result(replace(view, records=()), Path("runs/made-up"), as_json=False)
    assert capsys.readouterr().out == "No trial of made-up is finished yet.\n"
