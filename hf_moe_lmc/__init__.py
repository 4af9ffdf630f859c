"""Align, interpolate and merge large Mixture-of-Experts language models.

The verbs of the command line are functions: `inspect`, `known_families` (the verb `families`), `selftest`, `align`, `apply`,
`barrier`, `merge`, `push`, `demo`. What they hand around are values: `ModelSymmetry`, `Alignment`, `BarrierReport`,
`BarrierCurve`, `Inspection`, `Catalogue`, `SelfTest`. A new family of models is a `MoEFamily`, made known with `register`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_moe_lmc.alignment import Alignment, align, apply
    from hf_moe_lmc.catalogue import Catalogue, known_families
    from hf_moe_lmc.curve import BarrierCurve
    from hf_moe_lmc.errors import InputError, MoELMCError
    from hf_moe_lmc.example import demo
    from hf_moe_lmc.family import MoEFamily, register
    from hf_moe_lmc.hub import push
    from hf_moe_lmc.inspection import Inspection, inspect
    from hf_moe_lmc.measurement import barrier
    from hf_moe_lmc.merging import merge
    from hf_moe_lmc.path import load_interpolated
    from hf_moe_lmc.planning import Plan, plan_align, plan_apply, plan_merge
    from hf_moe_lmc.proof import SelfTest
    from hf_moe_lmc.recognition import selftest
    from hf_moe_lmc.report import BarrierReport
    from hf_moe_lmc.symmetry import LayerSymmetry, ModelSymmetry

# Resolved on first use: torch and transformers take seconds to import, and a usage message needs neither.
_HOMES = {
    "Alignment": "alignment",
    "BarrierCurve": "curve",
    "BarrierReport": "report",
    "Catalogue": "catalogue",
    "InputError": "errors",
    "Inspection": "inspection",
    "LayerSymmetry": "symmetry",
    "MoEFamily": "family",
    "MoELMCError": "errors",
    "ModelSymmetry": "symmetry",
    "Plan": "planning",
    "SelfTest": "proof",
    "align": "alignment",
    "apply": "alignment",
    "barrier": "measurement",
    "demo": "example",
    "inspect": "inspection",
    "load_interpolated": "path",
    "known_families": "catalogue",
    "merge": "merging",
    "plan_align": "planning",
    "plan_apply": "planning",
    "plan_merge": "planning",
    "push": "hub",
    "register": "family",
    "selftest": "recognition",
}

__all__ = [
    "Alignment",
    "BarrierCurve",
    "BarrierReport",
    "Catalogue",
    "InputError",
    "Inspection",
    "LayerSymmetry",
    "MoEFamily",
    "MoELMCError",
    "ModelSymmetry",
    "Plan",
    "SelfTest",
    "align",
    "apply",
    "barrier",
    "demo",
    "inspect",
    "known_families",
    "load_interpolated",
    "merge",
    "plan_align",
    "plan_apply",
    "plan_merge",
    "push",
    "register",
    "selftest",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
