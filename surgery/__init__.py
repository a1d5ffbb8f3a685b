"""Surgery: a dense model and a plan in, a smaller equal model out.

Needs torch and safetensors alone.
"""

from paretoprune.surgery.cost import Cost
from paretoprune.surgery.errors import InfeasibleBudget, UnsupportedModel
from paretoprune.surgery.graph import PruningGraph
from paretoprune.surgery.groups import Block, ChannelSlice, PrunableGroup
from paretoprune.surgery.plan import PruningPlan
from paretoprune.surgery.prune import prune
from paretoprune.surgery.recalibrate import recalibrate
from paretoprune.surgery.reconstruct import Reconstructor, reconstruct
from paretoprune.surgery.serialization import load, save
from paretoprune.surgery.trace import trace

__all__ = [
    "Block",
    "ChannelSlice",
    "Cost",
    "InfeasibleBudget",
    "PrunableGroup",
    "PruningGraph",
    "PruningPlan",
    "Reconstructor",
    "UnsupportedModel",
    "load",
    "prune",
    "recalibrate",
    "reconstruct",
    "save",
    "trace",
]
