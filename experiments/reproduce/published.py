"""Rows that the papers print, as far as they could be read; the only file with such numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Published:
    """A row of a paper.

    Attributes:
        table: Which of our tables it stands beside: a CSV's stem.
        network: As in `experiments.models`.
        method: As the paper calls it.
        reduction: Percent removed: of the FLOPs, or of the filters for `receding`.
        delta: Change of top-1 against their own dense network, points; None if not printed.
        accuracy: Top-1, percent; None if neither printed nor measured from released weights.
        source: Where it was read.
    """

    table: str
    network: str
    method: str
    reduction: float
    delta: float | None
    accuracy: float | None
    source: str


_EVERYTHING = "arXiv:2506.04513, tables I, II and IV; accuracy: released dense weights plus delta"
_LAYERS = "arXiv:2405.17081, slides; accuracy: measured on released weights"
_RECEDING = "authors' notebook of arXiv:2204.06404, best epoch on the test split"
_RIVALS = "Torch-Pruning, reproduce/readme.md"


def _rows(
    table: str,
    network: str,
    method: str,
    source: str,
    values: list[tuple[float, float | None, float | None]],
) -> list[Published]:
    return [
        Published(table, network, method, reduction, delta, accuracy, source)
        for reduction, delta, accuracy in values
    ]


PUBLISHED: tuple[Published, ...] = (
    *_rows("everything", "resnet32", "Pruning Everything", _EVERYTHING, [
        (57.40, 0.71, 92.41), (61.99, 0.09, 91.79), (87.06, -2.83, 88.87), (96.15, -7.63, 84.07),
    ]),
    *_rows("everything", "resnet44", "Pruning Everything", _EVERYTHING, [
        (71.31, 0.66, 92.55), (83.19, -1.26, 90.63),
    ]),
    *_rows("everything", "resnet56", "Pruning Everything", _EVERYTHING, [
        (53.70, 0.91, 93.19), (62.79, 0.96, 93.24), (69.24, 0.53, 92.81), (72.67, 0.19, 92.47),
        (79.88, -0.49, 91.79), (86.37, -1.36, 90.92),
    ]),
    *_rows("everything", "resnet110", "Pruning Everything", _EVERYTHING, [
        (48.29, 1.47, None), (69.90, 0.86, None), (73.16, 0.60, None), (75.55, 0.49, None),
        (95.82, -2.91, None),
    ]),
    *_rows("everything", "resnet56", "CKA layer pruning", _LAYERS, [
        (37.52, 1.25, 93.56), (56.29, 0.95, 93.27), (60.04, 0.78, 93.10), (75.05, 0.08, 92.40),
        (84.72, None, 91.36),
    ]),
    *_rows("everything", "resnet56", "DepGraph", _RIVALS, [
        (52.6, 0.24, 93.77), (61.1, 0.11, 93.64),
    ]),
    *_rows("receding", "vgg16", "receding", _RECEDING, [
        (0, None, 93.63), (50, None, 93.67), (90, None, 90.88),
    ]),
    *_rows("receding", "vgg16", "l1", _RECEDING, [
        (0, None, 93.87), (50, None, 93.67), (90, None, 89.95),
    ]),
    *_rows("receding", "vgg16", "plain", _RECEDING, [
        (0, None, 93.58), (50, None, 92.93), (90, None, 84.05),
    ]),
    *_rows("receding", "resnet56", "receding", _RECEDING, [
        (0, None, 93.22), (50, None, 93.26), (90, None, 90.01),
    ]),
    *_rows("receding", "resnet56", "l1", _RECEDING, [
        (0, None, 94.03), (50, None, 93.37), (90, None, 89.91),
    ]),
    *_rows("receding", "resnet56", "plain", _RECEDING, [
        (0, None, 93.54), (50, None, 93.51), (90, None, 88.81),
    ]),
)  # fmt: skip
"""Papers of SOSP and PROscore: no row on CIFAR-10 could be read."""
