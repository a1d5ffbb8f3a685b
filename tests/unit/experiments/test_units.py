"""FLOPs targets are read and written without doubt about their meaning."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretoprune.experiments.units import (
    format_count,
    format_percent,
    format_target,
    names,
    parse_flops,
    parse_fraction,
)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("50%", 0.5),
        (" 12.5 % ", 0.125),
        ("100%", 1.0),
        ("60M", 60_000_000),
        ("1.2G", 1_200_000_000),
        (".5M", 500_000),
        ("200k", 200_000),
        ("60000000", 60_000_000),
    ],
)
def test_a_target_is_a_share_or_macs(text: str, target: float) -> None:
    parsed = parse_flops(text)
    assert parsed == target
    assert isinstance(parsed, type(target))


@pytest.mark.parametrize("text", ["", "half", "-5%", "0%", "101%", "0.5", "50", "60MB", "5e7"])
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="but got"):
        parse_flops(text)


@given(st.integers(min_value=1000, max_value=10**12))
def test_macs_survive_being_written(macs: int) -> None:
    assert parse_flops(format_target(macs)) == macs


@pytest.mark.parametrize(
    ("text", "advice"),
    [("50", "write 50%"), ("0.5", "write 0.5% \\(or 50%"), ("0", "write it as")],
)
def test_a_bare_small_number_is_told_to_take_a_percent_sign(text: str, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        parse_flops(text)


@pytest.mark.parametrize(("text", "value"), [("0.9", 0.9), ("90%", 0.9), ("1", 1), (" 0% ", 0)])
def test_accuracies_are_fractions_or_percentages(text: str, value: float) -> None:
    assert parse_fraction(text, "an accuracy") == value


@pytest.mark.parametrize("text", ["90", "101%", "-0.1", "most", "nan", "%", ""])
def test_other_accuracies_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"such as 0\.9, or 90%, but got"):
        parse_fraction(text, "an accuracy")


def test_commas_separate_names() -> None:
    assert names(" l1, taylor,,l1,") == ("l1", "taylor")
    assert names("") == ()
    with pytest.raises(ValueError, match="commas separate names, but got ', ' without any"):
        names(", ")


def test_numbers_for_people() -> None:
    assert format_target(0.5) == "50%"
    assert format_target(60_000_000) == "60M"
    assert format_count(125_485_696) == "125.5 M"
    assert format_count(4_133_700_000) == "4.13 G"
    assert format_count(853_018) == "853.0 k"
    assert format_count(12) == "12"
    assert format_percent(0.4984) == "49.8 %"
