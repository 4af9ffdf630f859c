"""A family of MoE models as data: which tensors form a block, and what their axes mean.

A family maps key templates to one line in the axis notation, `roles: axes`:

    "mlp.gate.weight":                      "router: expert model"
    "mlp.experts.{expert}.up_proj.weight":  "up: unit model"
    "mlp.experts.gate_up_proj":             "gate up: expert (half unit) model"
    "mlp.experts.down_proj":                "down: expert model unit"

Axis words, in the order of the axes on disk: `expert`, `unit` (hidden unit of an expert), `shared` (unit of the shared
expert), `model` (residual width), `half` (counts the roles of a tensor that holds several), `1`. Parentheses join axes
that are one axis on disk, the slower one first: `(half unit)` is all gate rows and then all up rows, `(unit half)` would
be interleaved. `{expert}` in a key stands for the expert's number.

From this one declaration follow reading, acting, writing, the shapes to expect, and the accounting: under an MoE block
every tensor is claimed by exactly one template and every role is filled exactly once. Several templates for one role are
the layouts that the family is found in.

Numbers that a configuration decides are expressions over its attributes, as AutoConfig reads them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Literal

from hf_moe_lmc.errors import FamilyError

AXIS_WORDS = ("expert", "unit", "shared", "model", "half", "1")
EXPERT_ROLES = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
WHOLE_ROLES = (
    "router",
    "router_bias",
    "correction_bias",  # steers the selection only, moves with its expert
    "shared_gate",
    "shared_up",
    "shared_down",
    "shared_router",  # the scalar gate of a shared expert: no freedom
)
# The linear branch of a gated expert, act(gate) * up: its rows may be scaled if the columns of down are divided.
SCALE_EXPONENT = {"up": 1, "up_bias": 1, "down": -1, "shared_up": 1, "shared_down": -1}

RouterKind = Literal["softmax", "sigmoid"]
UnitKind = Literal["swiglu"]


@dataclass(frozen=True)
class TensorSpec:
    """One line of the notation, parsed.

    Attributes:
        roles: what the tensor holds; several where it has a `half` axis.
        groups: axis words of each axis on disk, e.g. (("expert",), ("half", "unit"), ("model",)).
    """

    text: str
    roles: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """All axis words, slowest first."""
        return tuple(word for group in self.groups for word in group)

    def axis_sizes(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple({"half": len(self.roles), "1": 1, **sizes}[word] for word in self.axes)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape on disk."""
        known = dict(zip(self.axes, self.axis_sizes(sizes), strict=True))
        return tuple(math.prod(known[word] for word in group) for group in self.groups)


def parse_spec(text: str) -> TensorSpec:
    """Parses `roles: axes`.

    Raises:
        FamilyError: repeating the text, with what is wrong in it.
    """
    match = re.fullmatch(r"\s*([a-z_ ]+?)\s*:\s*(.+?)\s*", text)
    if match is None:
        raise FamilyError(f"{text!r}: expected 'roles: axes', as in 'up: unit model'")
    roles = tuple(match[1].split())
    tokens = re.findall(r"\([^()]*\)|[^\s()]+|[()]", match[2])
    groups = tuple(tuple(token.strip("()").split()) for token in tokens)
    words = [word for group in groups for word in group]
    if unknown := [role for role in roles if role not in (*EXPERT_ROLES, *WHOLE_ROLES)]:
        raise FamilyError(f"{text!r}: unknown role {unknown[0]!r}; expected one of {', '.join((*EXPERT_ROLES, *WHOLE_ROLES))}")
    if unknown := [word for word in words if word not in AXIS_WORDS]:
        raise FamilyError(f"{text!r}: unknown axis word {unknown[0]!r}; expected one of {', '.join(AXIS_WORDS)}")
    if any(not group for group in groups) or len(set(words)) != len(words):
        raise FamilyError(f"{text!r}: an axis is empty or named twice")
    if ("half" in words) != (len(roles) > 1):
        raise FamilyError(f"{text!r}: several roles need an axis 'half', and only they do")
    if len({role in EXPERT_ROLES for role in roles}) > 1:
        raise FamilyError(f"{text!r}: roles of single experts and of the whole block cannot share a tensor")
    return TensorSpec(text, roles, groups)


@dataclass(frozen=True)
class Template:
    """A key template (relative to its layer) with the meaning of the tensors that it claims."""

    key: str
    spec: TensorSpec

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.key).replace(r"\{expert\}", "(?P<expert>0|[1-9][0-9]*)"))

    @property
    def is_per_expert(self) -> bool:
        return "{expert}" in self.key


@dataclass(frozen=True)
class MoEFamily:
    """The MoE layers of some model types.

    Attributes:
        name: how reports and saved symmetries call the family.
        model_types: values of `model_type` in config.json.
        router: `softmax` (its logits may be translated, so gate matching centres them) or `sigmoid`.
        units: symmetry of a hidden unit besides permutation; `swiglu`: sign and scale of the linear branch.
        weights: key template below a layer -> notation. See the module's documentation.
        sizes: axis word -> expression over the configuration; 0 or None where a configuration has no such part.
        top_k: experts per token, an expression.
        moe_layers: whether layer number `layer` is an MoE layer, an expression.
        groups: number of expert groups that bind, an expression.
        layer_prefix: what stands before every key of a layer.
        extra_layers: how many multi-token-prediction layers may follow the last layer, an expression.
    """

    name: str
    model_types: tuple[str, ...]
    router: RouterKind
    units: UnitKind
    weights: Mapping[str, str]
    sizes: Mapping[str, str]
    top_k: str = "num_experts_per_tok"
    moe_layers: str = "True"
    groups: str = "1"
    layer_prefix: str = "model.layers.{layer}."
    extra_layers: str = "0"
    templates: tuple[Template, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        templates = tuple(Template(key, parse_spec(text)) for key, text in self.weights.items())
        object.__setattr__(self, "templates", templates)
        for template in templates:
            for word in template.spec.axes:
                if word not in ("half", "1") and word not in self.sizes:
                    raise FamilyError(f"{self.name}: {template.key}: no size is given for axis {word!r}")
            if template.is_per_expert and "expert" in template.spec.axes:
                raise FamilyError(f"{self.name}: {template.key}: has {{expert}} in the key and on an axis")
            if template.spec.roles[0] in EXPERT_ROLES and not (template.is_per_expert or "expert" in template.spec.axes):
                raise FamilyError(f"{self.name}: {template.key}: nothing says which expert it belongs to")

    @cached_property
    def block_prefixes(self) -> tuple[str, ...]:
        """First parts of the templates: a tensor below one of them, in an MoE layer, belongs to the block."""
        return tuple(dict.fromkeys(template.key.partition(".")[0] + "." for template in self.templates))

    @cached_property
    def layer_pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.layer_prefix).replace(r"\{layer\}", "(?P<layer>0|[1-9][0-9]*)") + "(?P<rest>.+)")

    def evaluate(self, expression: str, config: Any, **known: int) -> Any:
        """Value of an expression of this family over `config`'s attributes.

        Raises:
            FamilyError: the configuration lacks an attribute, or holds a value of another type.
        """
        code = compile(expression, f"<{self.name}>", "eval")
        try:
            names = {name: known[name] if name in known else getattr(config, name) for name in code.co_names}
            return eval(code, {"__builtins__": {}}, names)  # the expression is ours; the configuration supplies values only
        except (AttributeError, TypeError) as error:
            raise FamilyError(f"{self.name}: cannot evaluate {expression!r} on config.json: {error}") from error


_FAMILIES: dict[str, MoEFamily] = {}


def register(family: MoEFamily) -> MoEFamily:
    """Makes `family` known under its model types; a later registration of a type is an error."""
    for model_type in family.model_types:
        if model_type in _FAMILIES:
            raise FamilyError(f"model type {model_type} is already described by family {_FAMILIES[model_type].name}")
    _FAMILIES.update(dict.fromkeys(family.model_types, family))
    return family


def families() -> dict[str, MoEFamily]:
    """All known families by model type."""
    data = import_module("hf_moe_lmc.families")  # each file registers itself
    for module in iter_modules(data.__path__):
        import_module(f"{data.__name__}.{module.name}")
    return dict(_FAMILIES)


def get_family(model_type: str, where: str) -> MoEFamily:
    """The family of `model_type`.

    Raises:
        FamilyError: unknown; the message lists what is known.
    """
    known = families()
    if model_type not in known:
        raise FamilyError(
            f"{where}: model type {model_type!r} has no MoE description here; known: {', '.join(sorted(known))}. "
            "The README says how to add a family"
        )
    return known[model_type]
