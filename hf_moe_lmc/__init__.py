"""Align, interpolate and merge large Mixture-of-Experts language models.

The verbs of the command line are functions: `inspect`, `align`, `apply`, `barrier`, `merge`, `push`. What they hand
around are values: `ModelSymmetry`, `Alignment`, `BarrierReport`, `BarrierCurve`, `Inspection`. A new family of models is
a `MoEFamily`, made known with `register`.
"""

from hf_moe_lmc.alignment import Alignment, align, apply
from hf_moe_lmc.curve import BarrierCurve
from hf_moe_lmc.errors import InputError, MoELMCError
from hf_moe_lmc.family import MoEFamily, register
from hf_moe_lmc.hub import push
from hf_moe_lmc.inspection import Inspection, inspect
from hf_moe_lmc.interpolation import merge
from hf_moe_lmc.path import barrier
from hf_moe_lmc.report import BarrierReport
from hf_moe_lmc.symmetry import LayerSymmetry, ModelSymmetry

__all__ = [
    "Alignment",
    "BarrierCurve",
    "BarrierReport",
    "InputError",
    "Inspection",
    "LayerSymmetry",
    "MoEFamily",
    "MoELMCError",
    "ModelSymmetry",
    "align",
    "apply",
    "barrier",
    "inspect",
    "merge",
    "push",
    "register",
]
