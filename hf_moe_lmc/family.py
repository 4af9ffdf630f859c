"""A family of MoE models as data: which tensors form a block, and what their axes mean.

A family maps key templates to one line in the axis notation, `roles: axes`:

    "mlp.gate.weight":                      "router: expert model"
    "mlp.experts.{expert}.up_proj.weight":  "up: unit model"
    "mlp.experts.gate_up_proj":             "gate up: expert (half unit) model"
    "mlp.experts.down_proj":                "down: expert model unit"

Axis words, in the order of the axes on disk: `expert`, `unit` (hidden unit of an expert), `shared` (unit of the shared
expert), `model` (residual width), `latent` (width that the experts see where it is another), `rank` (width of a layer
inside the router), `token` (entry of the vocabulary), `choice` (one of the experts of a token), `half` (counts the roles
of a tensor that holds several), `1`.
Parentheses join axes that are one axis on disk, the slower one first: `(half unit)` is all gate rows and then all up rows,
`(unit half)` is interleaved. `{expert}` in a key stands for the expert's number.

A block has one bank of experts, or several: a role `bank.role` belongs to a further bank, whose experts move among
themselves only, and `expert` and `unit` then mean that bank's. `|` joins banks along the experts of one tensor, or along
the numbers in the key:

    "mlp.router.classifier.weight":         "router | zero.router: expert model"
    "mlp.experts.{expert}.up_proj.weight":  "up | vision.up: unit model"

A tensor of the block that no symmetry acts on is `fixed` (`fixed: rank model`; a bare `fixed` may be there or not, in any
shape). Where one name is found in two orientations, both are listed,
and shapes that fit both are an error.

From this one declaration follow reading, acting, writing, the shapes to expect, and the accounting: under an MoE block
every tensor is claimed by exactly one template and every role is filled exactly once. Several templates for one role are
the layouts that the family is found in.

Numbers and kinds that a configuration decides are expressions over its attributes, as AutoConfig reads them, and over
`layer`; `attr('name', default)` reads an attribute that not every configuration has.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pkgutil import iter_modules
from types import CodeType
from typing import Any

from hf_moe_lmc.errors import FamilyError, shown

AXIS_WORDS = ("expert", "unit", "shared", "model", "latent", "rank", "token", "choice", "half", "1")
EXPERT_ROLES = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
SHARED_ROLES = tuple(f"shared_{role}" for role in EXPERT_ROLES)
EXPERT_VECTORS = (
    "router",
    "router_bias",
    "correction_bias",  # steers the selection only
    "expert_scale",  # multiplies the output of an expert
)  # whole tensors whose rows move with the experts
WHOLE_ROLES = (
    *EXPERT_VECTORS,
    "expert_table",  # integers that name experts: their values are relabelled
    *SHARED_ROLES,
    "shared_router",  # the scalar gate of a shared expert: no freedom
    "fixed",
)

PACKED = ("_blocks", "_scales")  # what quantised weights lie in: roles like `gate_up_blocks`, opaque bytes of each expert

ROUTER_KINDS = ("softmax", "sigmoid", "sqrtsoftplus", "sparsemixer")


@dataclass(frozen=True)
class UnitKind:
    """What a hidden unit allows besides changing places: its up row times s, its down column divided by s**power.

    Attributes:
        order: whether units may change places at all.
        sign: whether s may be negative; scale: whether |s| may differ from 1.
        offset: the constant added to the up projection before it multiplies; its bias b becomes s (b + offset) - offset.
        words: the same, for people.
    """

    name: str
    words: str
    order: bool = True
    sign: bool = False
    scale: bool = False
    power: int = 1
    offset: int = 0

    def allows(self, *, sign: bool, scale: bool) -> bool:
        return (self.sign or not sign) and (self.scale or not scale)


UNIT_KINDS = {
    kind.name: kind
    for kind in (
        UnitKind(
            "swiglu", "the up row of each times s and its down column divided by s, s of either sign", sign=True, scale=True
        ),
        UnitKind(
            "clamped", "the signs of the up row and the down column of each together (the clamp binds the scale)", sign=True
        ),
        UnitKind("plain", "no sign and no scale"),
        UnitKind("shifted", "no sign and no scale (the up projection enters as up + 1)"),
        UnitKind(
            "affine",
            "the up row of each times s, its bias b to s (b + 1) - 1, its down column divided by s, s of either sign",
            sign=True,
            scale=True,
            offset=1,
        ),
        UnitKind("relu", "the up row of each times s > 0 and its down column divided by s", scale=True),
        UnitKind("relu2", "the up row of each times s > 0 and its down column divided by s squared", scale=True, power=2),
        UnitKind("rigid", "hidden units stay where they are", order=False),
    )
}


def split_role(role: str) -> tuple[str, str]:
    """The bank ('' for the first) and the role within it."""
    bank, _, base = role.rpartition(".")
    return bank, base


def is_expert_role(role: str) -> bool:
    """Whether each expert of a bank has one of it."""
    base = split_role(role)[1]
    return base in EXPERT_ROLES or (base.endswith(PACKED) and not base.startswith("shared_"))


def bank_size(sizes: Mapping[str, int], bank: str, word: str) -> int:
    """The size of an axis word in a bank; words that the bank does not have for itself are the block's."""
    return sizes[f"{bank}.{word}"] if f"{bank}.{word}" in sizes else sizes[word]


@dataclass(frozen=True)
class TensorSpec:
    """One line of the notation, parsed.

    Attributes:
        segments: the roles that it holds, bank by bank along the experts; several in one segment have a `half` axis.
        groups: axis words of each axis on disk, e.g. (("expert",), ("half", "unit"), ("model",)).
    """

    text: str
    segments: tuple[tuple[str, ...], ...]
    groups: tuple[tuple[str, ...], ...]

    @cached_property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for segment in self.segments for role in segment)

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """All axis words, slowest first."""
        return tuple(word for group in self.groups for word in group)

    @property
    def is_fixed(self) -> bool:
        return self.roles == ("fixed",)

    @cached_property
    def banks(self) -> tuple[str, ...]:
        """The bank of each segment."""
        return tuple(split_role(segment[0])[0] for segment in self.segments)

    def axis_sizes(self, sizes: Mapping[str, int], segment: int = 0) -> tuple[int, ...]:
        """The size of each of `axes` in one segment."""
        own = {"half": len(self.segments[segment]), "1": 1}
        return tuple(own[word] if word in own else bank_size(sizes, self.banks[segment], word) for word in self.axes)

    def shape(self, sizes: Mapping[str, int], segment: int | None = None) -> tuple[int, ...]:
        """The shape on disk: of one segment, or of all along the experts."""
        segments = range(len(self.segments)) if segment is None else [segment]
        shapes = []
        for one in segments:
            known = dict(zip(self.axes, self.axis_sizes(sizes, one), strict=True))
            shapes.append(tuple(math.prod(known[word] for word in group) for group in self.groups))
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()


def parse_spec(text: str) -> TensorSpec:
    """Parses `roles: axes`.

    Raises:
        FamilyError: repeating the text, with what is wrong in it.
    """
    if text.strip() == "fixed":
        return TensorSpec(text, (("fixed",),), ())
    match = re.fullmatch(r"\s*([a-z_. |]+?)\s*:\s*(.+?)\s*", text)
    if match is None:
        raise FamilyError(f"{text!r}: expected 'roles: axes', as in 'up: unit model'")
    segments = tuple(tuple(segment.split()) for segment in match[1].split("|"))
    tokens = re.findall(r"\([^()]*\)|[^\s()]+|[()]", match[2])
    groups = tuple(tuple(token.strip("()").split()) for token in tokens)
    spec = TensorSpec(text, segments, groups)
    words = spec.axes
    if unknown := [role for role in spec.roles if split_role(role)[1] not in (*EXPERT_ROLES, *WHOLE_ROLES)]:
        raise FamilyError(f"{text!r}: unknown role {unknown[0]!r}; expected one of {', '.join((*EXPERT_ROLES, *WHOLE_ROLES))}")
    if unknown := [word for word in words if word not in AXIS_WORDS]:
        raise FamilyError(f"{text!r}: unknown axis word {unknown[0]!r}; expected one of {', '.join(AXIS_WORDS)}")
    if any(not group for group in groups) or (len(set(words)) != len(words) and not spec.is_fixed):
        raise FamilyError(f"{text!r}: an axis is empty or named twice")
    if any(("half" in words) != (len(segment) > 1) for segment in segments):
        raise FamilyError(f"{text!r}: several roles need an axis 'half', and only they do")
    if len({is_expert_role(role) for role in spec.roles}) > 1:
        raise FamilyError(f"{text!r}: roles of single experts and of the whole block cannot share a tensor")
    if "expert" in words and words[0] != "expert" and (len(segments) > 1 or is_expert_role(spec.roles[0])):
        raise FamilyError(f"{text!r}: the expert axis must come first, so that an expert is one range on disk")
    return spec


@dataclass(frozen=True)
class Template:
    """A key template (relative to its layer) with the meaning of the tensors that it claims: one, or one per orientation."""

    key: str
    specs: tuple[TensorSpec, ...]

    @property
    def spec(self) -> TensorSpec:
        """What it holds, in the first of its orientations: all hold the same roles."""
        return self.specs[0]

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.key).replace(r"\{expert\}", "(?P<expert>0|[1-9][0-9]*)"))

    @property
    def is_per_expert(self) -> bool:
        return "{expert}" in self.key


@dataclass(frozen=True)
class Stack:
    """A run of layers under one prefix.

    Attributes:
        prefix: what stands before every key of a layer.
        layers: how many there are, an expression.
        moe_layers: whether layer number `layer` is an MoE layer, an expression.
    """

    prefix: str
    layers: str = "num_hidden_layers"
    moe_layers: str = "True"

    @cached_property
    def stem(self) -> str:
        """The prefix from the component before the layer's number on: `layers.{layer}.`"""
        head, _, tail = self.prefix.partition(".{layer}")
        return head.rpartition(".")[2] + ".{layer}" + tail

    @cached_property
    def tower(self) -> str:
        """What stands before the stem: `model.`, or something longer in a composite model."""
        return self.prefix.removesuffix(self.stem)


@dataclass(frozen=True)
class LayerFacts:
    """What a configuration says of one MoE layer.

    Attributes:
        sizes: of every axis word; router: one of ROUTER_KINDS.
        units: kind of hidden units by bank ('' is the first), and of the `shared` expert.
        when: roles that are there (True), absent (False), or may be either (None); others are there if their sizes are not 0.
    """

    sizes: Mapping[str, int]
    router: str
    units: Mapping[str, UnitKind]
    when: Mapping[str, bool | None]


@dataclass(frozen=True)
class MoEFamily:
    """The MoE layers of some model types.

    Attributes:
        name: how reports and saved symmetries call the family.
        model_types: values of `model_type` in config.json, of a model or of the text tower of a composite one.
        router: kind of router, or an expression that gives it; logits of a `softmax` one may be translated.
        units: symmetry of a hidden unit besides permutation, one of UNIT_KINDS, or an expression that gives it.
        weights: key template below a layer -> notation, or several that differ in orientation. See the module.
        sizes: axis word (`bank.word` in a further bank) -> expression; 0 or None where a configuration has no such part.
        top_k: experts per token, an expression.
        moe_layers: whether layer number `layer` is an MoE layer, an expression.
        groups: number of expert groups that bind, an expression.
        layer_prefix: what stands before every key of a layer; in a composite model, only its end has to.
        layers: number of layers, an expression.
        extra_layers: how many multi-token-prediction layers may follow the last layer, an expression.
        bank_units: unit kind of further banks, and of `shared` where it is not that of the first bank.
        when: role, or key template of a fixed tensor -> whether layer number `layer` has it, an expression; None: it may be
            there or not.
        blocks: prefixes below a layer under which every tensor must be claimed; by default the first parts of the templates.
        stacks: where a model has several stacks of layers: layers are numbered through, in this order.
        towers: model type of a composite model -> what the keys of its text tower begin with, where several towers fit.
    """

    name: str
    model_types: tuple[str, ...]
    router: str
    units: str
    weights: Mapping[str, str | tuple[str, ...]]
    sizes: Mapping[str, str]
    top_k: str = "num_experts_per_tok"
    moe_layers: str = "True"
    groups: str = "1"
    layer_prefix: str = "model.layers.{layer}."
    layers: str = "num_hidden_layers"
    extra_layers: str = "attr('num_nextn_predict_layers', 0)"
    bank_units: Mapping[str, str] = field(default_factory=dict)
    when: Mapping[str, str | None] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    stacks: tuple[Stack, ...] = ()
    towers: Mapping[str, str] = field(default_factory=dict)
    templates: tuple[Template, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        templates = tuple(
            Template(key, tuple(parse_spec(text) for text in ((texts,) if isinstance(texts, str) else texts)))
            for key, texts in self.weights.items()
        )
        object.__setattr__(self, "templates", templates)
        if not self.stacks:
            object.__setattr__(self, "stacks", (Stack(self.layer_prefix, self.layers, self.moe_layers),))
        for template in templates:
            self._check(template)

    def _check(self, template: Template) -> None:
        where = f"{self.name}: {template.key}"
        if len({spec.segments for spec in template.specs}) > 1:
            raise FamilyError(f"{where}: its orientations hold different roles")
        for spec in template.specs:
            for word in spec.axes:
                known = {"half", "1", *self.sizes} | {name.rpartition(".")[2] for name in self.sizes}
                if word not in known:
                    raise FamilyError(f"{where}: no size is given for axis {word!r}")
            if template.is_per_expert and "expert" in spec.axes:
                raise FamilyError(f"{where}: has {{expert}} in the key and on an axis")
            if is_expert_role(spec.roles[0]) and not (template.is_per_expert or "expert" in spec.axes):
                raise FamilyError(f"{where}: nothing says which expert it belongs to")
            if len(spec.segments) > 1 and not (template.is_per_expert or "expert" in spec.axes):
                raise FamilyError(f"{where}: '|' joins along the experts, of which it has none")

    @cached_property
    def block_prefixes(self) -> tuple[str, ...]:
        """A tensor below one of them, in an MoE layer, belongs to the block."""
        return self.blocks or tuple(dict.fromkeys(template.key.partition(".")[0] + "." for template in self.templates))

    @cached_property
    def banks(self) -> tuple[str, ...]:
        """Names of the banks, the first ('') first."""
        return tuple(dict.fromkeys(["", *(split_role(role)[0] for t in self.templates for role in t.spec.roles)]))

    def at(self, config: Any, layer: int) -> LayerFacts:
        """What a configuration says of one MoE layer."""
        sizes = {word: self.number(expression, config, layer=layer) for word, expression in self.sizes.items()}
        kinds = {"": self.units, "shared": self.units, **self.bank_units}
        return LayerFacts(
            sizes=sizes,
            router=self.kind(self.router, config, ROUTER_KINDS, layer=layer),
            units={
                bank: UNIT_KINDS[self.kind(kind, config, tuple(UNIT_KINDS), layer=layer)]
                for bank, kind in {**dict.fromkeys(self.banks, self.units), **kinds}.items()
            },
            when={
                role: None if expression is None else bool(self.evaluate(expression, config, layer=layer))
                for role, expression in self.when.items()
            },
        )

    def evaluate(self, expression: str, config: Any, **known: int) -> Any:
        """Value of an expression of this family over `config`'s attributes.

        Raises:
            FamilyError: the configuration lacks an attribute, or holds a value of another type.
        """
        code, names = _compiled(expression)
        helpers = {"attr": lambda name, default: getattr(config, name, default), **_HELPERS}
        try:
            values = {name: known[name] if name in known else getattr(config, name) for name in names - helpers.keys()}
            # the expression is ours; the configuration supplies values only
            return eval(code, {"__builtins__": {}}, {**values, **helpers})
        except (AttributeError, TypeError, ValueError, ArithmeticError, IndexError, KeyError, RuntimeError) as error:
            raise FamilyError(f"{self.name}: cannot evaluate {expression!r} on config.json: {shown(error)}") from error

    def number(self, expression: str, config: Any, **known: int) -> int:
        """Value of an expression that counts something; nothing, such as None, is 0.

        Raises:
            FamilyError: see `evaluate`; or the value is no number.
        """
        value = self.evaluate(expression, config, **known) or 0
        try:
            return int(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise FamilyError(
                f"{self.name}: {expression!r} gives {shown(repr(value))} on config.json, expected a number"
            ) from error

    def kind(self, expression: str, config: Any, known_kinds: tuple[str, ...], **known: int) -> str:
        """A kind given by name or by an expression that yields a name.

        Raises:
            FamilyError: another name, which this package has no symmetry for.
        """
        value = expression if expression in known_kinds else self.evaluate(expression, config, **known)
        if not isinstance(value, str) or value not in known_kinds:
            raise FamilyError(
                f"{self.name}: {expression!r} gives {shown(repr(value))} on config.json, "
                f"expected one of {', '.join(known_kinds)}"
            )
        return str(value)


_HELPERS: dict[str, Any] = {
    "len": len,
    "min": min,
    "max": max,
    "isinstance": isinstance,
    "list": list,
    "int": int,
    "range": range,
}


def _compiled(expression: str) -> tuple[CodeType, set[str]]:
    """Its code, and the names that it reads."""
    tree = ast.parse(expression, mode="eval")
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return compile(tree, f"<{expression}>", "eval"), names


_FAMILIES: dict[str, MoEFamily] = {}
_REFUSALS: dict[str, str] = {}


def register(family: MoEFamily) -> MoEFamily:
    """Makes `family` known under its model types; a later registration of a type is an error."""
    for model_type in family.model_types:
        if model_type in _FAMILIES:
            raise FamilyError(f"model type {model_type} is already described by family {_FAMILIES[model_type].name}")
    _FAMILIES.update(dict.fromkeys(family.model_types, family))
    return family


def refuse(model_type: str, reason: str) -> None:
    """Makes known that a model type is not supported, and why."""
    _REFUSALS[model_type] = reason


def families() -> dict[str, MoEFamily]:
    """All known families by model type."""
    _load_data()
    return dict(_FAMILIES)


def refusals() -> dict[str, str]:
    """Reasons by model type that is known and refused."""
    _load_data()
    return dict(_REFUSALS)


def _load_data() -> None:
    data = import_module("hf_moe_lmc.families")  # each file registers itself
    for module in iter_modules(data.__path__):
        import_module(f"{data.__name__}.{module.name}")


def get_family(model_type: str, where: str) -> MoEFamily:
    """The family of `model_type`.

    Raises:
        FamilyError: refused, with the reason; or unknown, and the message lists what is known.
    """
    known = families()
    if model_type in _REFUSALS:
        raise FamilyError(f"{where}: model type {model_type!r} is not supported: {_REFUSALS[model_type]}")
    if model_type not in known:
        raise FamilyError(
            f"{where}: model type {model_type!r} has no MoE description here; known: {', '.join(sorted(known))}. "
            "The README says how to add a family"
        )
    return known[model_type]
