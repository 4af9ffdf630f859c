"""Align, interpolate and merge large Mixture-of-Experts language models.

The verbs of the command line are functions: `inspect`, `compare`, `known_families` (the verb `families`), `selftest`, `align`,
`apply`, `barrier`, `merge`, `push`, `demo`. `plan_align`, `plan_apply`, `plan_barrier` and `plan_merge` take the arguments of
their verb and return its `Plan`: a dry run. What they hand around are values: `ModelSymmetry`, `Alignment`, `BarrierReport`,
`BarrierCurve`, `Inspection`, `Comparison`, `Catalogue`, `SelfTest`, `Published`. A new family of models is a `MoEFamily`, made
known with `register`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_moe_lmc.errors import ForeignError, InputError, MoELMCError, MoELMCWarning
    from hf_moe_lmc.example.demo import demo
    from hf_moe_lmc.matching.alignment import Alignment
    from hf_moe_lmc.moe.catalogue import Catalogue, known_families
    from hf_moe_lmc.moe.family import MoEFamily
    from hf_moe_lmc.moe.registry import register
    from hf_moe_lmc.perplexity.curve import BarrierCurve
    from hf_moe_lmc.perplexity.report import BarrierReport
    from hf_moe_lmc.proof.recognition import selftest
    from hf_moe_lmc.proof.verdict import SelfTest
    from hf_moe_lmc.publishing.push import Published, push
    from hf_moe_lmc.symmetry.group import LayerSymmetry, ModelSymmetry
    from hf_moe_lmc.verbs.align import align, plan_align
    from hf_moe_lmc.verbs.apply import apply, plan_apply
    from hf_moe_lmc.verbs.barrier import barrier, plan_barrier
    from hf_moe_lmc.verbs.compare import compare
    from hf_moe_lmc.verbs.comparison import Comparison
    from hf_moe_lmc.verbs.inspect import Inspection, inspect
    from hf_moe_lmc.verbs.loading import load_interpolated
    from hf_moe_lmc.verbs.merge import merge, plan_merge
    from hf_moe_lmc.verbs.planning import Plan

__version__ = "0.1.0"

# Resolved on first use: torch and transformers take seconds to import, and a usage message needs neither.
_HOMES = {
    "Alignment": "matching.alignment",
    "BarrierCurve": "perplexity.curve",
    "BarrierReport": "perplexity.report",
    "Catalogue": "moe.catalogue",
    "Comparison": "verbs.comparison",
    "ForeignError": "errors",
    "InputError": "errors",
    "Inspection": "verbs.inspect",
    "LayerSymmetry": "symmetry.group",
    "MoEFamily": "moe.family",
    "MoELMCError": "errors",
    "MoELMCWarning": "errors",
    "ModelSymmetry": "symmetry.group",
    "Plan": "verbs.planning",
    "Published": "publishing.push",
    "SelfTest": "proof.verdict",
    "align": "verbs.align",
    "apply": "verbs.apply",
    "barrier": "verbs.barrier",
    "compare": "verbs.compare",
    "demo": "example.demo",
    "inspect": "verbs.inspect",
    "load_interpolated": "verbs.loading",
    "known_families": "moe.catalogue",
    "merge": "verbs.merge",
    "plan_align": "verbs.align",
    "plan_barrier": "verbs.barrier",
    "plan_apply": "verbs.apply",
    "plan_merge": "verbs.merge",
    "push": "publishing.push",
    "register": "moe.registry",
    "selftest": "proof.recognition",
}

__all__ = [
    "Alignment",
    "BarrierCurve",
    "BarrierReport",
    "Catalogue",
    "Comparison",
    "ForeignError",
    "InputError",
    "Inspection",
    "LayerSymmetry",
    "MoEFamily",
    "MoELMCError",
    "MoELMCWarning",
    "ModelSymmetry",
    "Plan",
    "Published",
    "SelfTest",
    "align",
    "apply",
    "barrier",
    "compare",
    "demo",
    "inspect",
    "known_families",
    "load_interpolated",
    "merge",
    "plan_align",
    "plan_apply",
    "plan_barrier",
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
