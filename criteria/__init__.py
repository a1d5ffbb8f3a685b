"""Criteria: a model and its groups in, one saliency per unit out.

A new criterion is one file, and one line in `CRITERIA`.
"""

from collections.abc import Mapping
from types import MappingProxyType

from paretoprune.criteria.base import Calibration, Criterion
from paretoprune.criteria.bn_scale import BnScale
from paretoprune.criteria.magnitude import L1, L2
from paretoprune.criteria.obs import Obs, ObsPerMac
from paretoprune.criteria.random import Random
from paretoprune.criteria.select import select, smallest_macs, target_macs
from paretoprune.criteria.taylor import Taylor

CRITERIA: Mapping[str, type[Criterion]] = MappingProxyType(
    {
        "l1": L1,
        "l2": L2,
        "bn_scale": BnScale,
        "taylor": Taylor,
        "obs": Obs,
        "obs_per_mac": ObsPerMac,
        "random": Random,
    }
)
"""Criteria by name; call the class without arguments for the defaults."""

__all__ = ["CRITERIA", "Calibration", "Criterion", "select", "smallest_macs", "target_macs"]
