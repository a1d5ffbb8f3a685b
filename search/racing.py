"""Racing: an evaluation ends early once its candidate is dominated beyond doubt.

The search split is measured batch by batch, for every candidate in the same order. A candidate's
rival is the best plan so far that costs no more MACs; it has a loss for each of the same batches.
After some of them a paired t test compares the two, as in F-Race (Birattari et al., GECCO 2002)
for configurations: the pairs take out that some batches are harder than others, which is most of
the variance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from types import MappingProxyType

BOUNDS: Mapping[int, float] = MappingProxyType(
    {4: 10.21, 6: 5.89, 8: 4.79, 12: 4.02, 16: 3.73, 24: 3.48, 32: 3.37, 64: 3.23, 128: 3.16}
)
"""After how many batches the two are compared, with the 99.9 % quantile of Student's t."""


def dominated(losses: Sequence[float], rival: Sequence[float]) -> bool:
    """Whether a candidate is worse than its rival, on the batches measured so far.

    Never after the last batch, where nothing is left to save, nor with losses that are not finite:
    those fail the whole evaluation.

    Args:
        losses: Mean losses of the candidate's batches so far.
        rival: Mean losses of all batches of the rival; empty without one.
    """
    count = len(losses)
    if count not in BOUNDS or count >= len(rival):
        return False
    differences = _differences(losses, rival)
    if not math.isfinite(fmean(differences)):
        return False
    error = stdev(differences) / math.sqrt(count)
    return fmean(differences) > BOUNDS[count] * error


def estimated(losses: Sequence[float], rival: Sequence[float]) -> float:
    """Returns the loss on the whole split: the rival's, plus the mean difference so far.

    All batches count alike, as they do but for the last one.
    """
    return fmean(rival) + fmean(_differences(losses, rival))


def _differences(losses: Sequence[float], rival: Sequence[float]) -> list[float]:
    return [own - other for own, other in zip(losses, rival, strict=False)]
