"""Criteria: a model and its groups in, one saliency per unit out.

A new criterion is one file, and one line in `CRITERIA`.
"""

from collections.abc import Mapping
from types import MappingProxyType

from paretoprune.criteria.base import Calibration, CostClass, Criterion
from paretoprune.criteria.blocks import block_saliency
from paretoprune.criteria.bn_scale import BnScale
from paretoprune.criteria.bounds import UNBOUNDED, Bounds
from paretoprune.criteria.cka import Cka
from paretoprune.criteria.consensus import Consensus
from paretoprune.criteria.fisher import Fisher
from paretoprune.criteria.geometric_median import GeometricMedian
from paretoprune.criteria.kl import Kl
from paretoprune.criteria.lamp import Lamp
from paretoprune.criteria.magnitude import L1, L2
from paretoprune.criteria.mean_activation import MeanActivation
from paretoprune.criteria.obs import Obs, ObsPerMac
from paretoprune.criteria.proscore import Proscore
from paretoprune.criteria.random import Random
from paretoprune.criteria.receding import Receding
from paretoprune.criteria.select import largest_macs, select, smallest_macs, target_macs
from paretoprune.criteria.shared import SharedCalibration
from paretoprune.criteria.sosp import SospH, SospI
from paretoprune.criteria.taylor import Taylor

CRITERIA: Mapping[str, type[Criterion]] = MappingProxyType(
    {
        "l1": L1,
        "l2": L2,
        "bn_scale": BnScale,
        "lamp": Lamp,
        "geometric_median": GeometricMedian,
        "mean_activation": MeanActivation,
        "taylor": Taylor,
        "fisher": Fisher,
        "proscore": Proscore,
        "sosp_h": SospH,
        "sosp_i": SospI,
        "kl": Kl,
        "cka": Cka,
        "consensus": Consensus,
        "obs": Obs,
        "obs_per_mac": ObsPerMac,
        "receding": Receding,
        "random": Random,
    }
)
"""Criteria by name; call the class without arguments for the defaults."""

__all__ = [
    "CRITERIA",
    "UNBOUNDED",
    "Bounds",
    "Calibration",
    "CostClass",
    "Criterion",
    "SharedCalibration",
    "block_saliency",
    "largest_macs",
    "select",
    "smallest_macs",
    "target_macs",
]
