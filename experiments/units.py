"""FLOPs targets, MACs and lists as people write them; MACs: one multiply-accumulate = 1."""

from __future__ import annotations

import re

_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_TARGET = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([%kMG]?)")


def parse_flops(text: str) -> float | int:
    """Returns a FLOPs target: a share of the dense MACs as a float, or MACs as an int.

    Args:
        text: `50%` is a share, `60M`, `1.2G`, `60000000` are MACs; suffixes k, M, G.

    Raises:
        ValueError: If `text` is neither, or lies outside (0 %, 100 %] or below 1 MAC.
    """
    match = _TARGET.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"a FLOPs target is a share such as 50% or a number of MACs such as 60M or 60000000 "
            f"(suffixes k, M, G), but got {text!r}."
        )
    number, suffix = float(match[1]), match[2]
    if suffix == "%":
        if not 0 < number <= 100:
            raise ValueError(f"a FLOPs share lies above 0% and at most at 100%, but got {text!r}.")
        return number / 100
    macs = round(number * _SUFFIXES[suffix])
    if suffix == "" and macs < 1000:  # 0.5 or 50 is a share that lost its percent sign
        share = f"{text.strip()}% (or 50% for one half)" if 0 < number <= 100 else "it as 50%"
        raise ValueError(
            f"a FLOPs target without suffix counts MACs and is at least 1000, but got {text!r}; "
            f"for a share write {share}."
        )
    return macs


def names(text: str) -> tuple[str, ...]:
    """Returns what commas separate, each once.

    Raises:
        ValueError: If there is nothing between the commas.
    """
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if text and not found:
        raise ValueError(f"commas separate names, but got {text!r} without any.")
    return found


def parse_fraction(text: str, what: str) -> float:
    """Returns a fraction: of `90%` or `0.9`.

    Args:
        text: What was written.
        what: Of what, with its article, such as `an accuracy`.

    Raises:
        ValueError: If `text` is neither, or lies outside [0, 1].
    """
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise ValueError(f"{what} is a fraction such as 0.9, or 90%, but got {text!r}.")
    return value


def format_count(count: float) -> str:
    """Returns a count in three to four significant digits with k, M or G, such as `62.7 M`."""
    for suffix in ("G", "M", "k"):
        scale = _SUFFIXES[suffix]
        if count >= scale:
            value = count / scale
            digits = 2 if value < 10 else 1
            return f"{value:.{digits}f} {suffix}"
    return f"{count:.0f}"


def format_target(target: float | int) -> str:
    """Returns a target as the command line takes it: `50%` or `60M`."""
    if isinstance(target, float):
        return f"{target * 100:g}%"
    for suffix in ("G", "M", "k"):
        scale = _SUFFIXES[suffix]
        if target >= scale and target % (scale // 100) == 0:
            return f"{target / scale:.15g}{suffix}"
    return str(target)


def format_percent(share: float, digits: int = 1) -> str:
    """Returns a share in [0, 1] as a percentage, such as `49.8 %`."""
    return f"{share * 100:.{digits}f} %"
