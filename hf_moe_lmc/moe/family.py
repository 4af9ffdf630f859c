"""A family of MoE models as data: which tensors form a block, and what their axes mean.

A family maps key templates below a layer to one line each in the axis notation (see `notation`).

From this one declaration follow reading, acting, writing, the shapes to expect, and the accounting: under an MoE block
every tensor is claimed by exactly one template and every role is filled exactly once. Several templates for one role are
the layouts that the family is found in.

Numbers and kinds that a configuration decides are expressions over its attributes, as AutoConfig reads them, and over
`layer`; `attr('name', default)` reads an attribute that not every configuration has.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType
from typing import Any

from hf_moe_lmc.checkpoints.mtp import COUNTS
from hf_moe_lmc.errors import FamilyError, shown
from hf_moe_lmc.moe.notation import (
    ROUTER_KINDS,
    SHARED,
    SHARED_ROLES,
    UNIT_KINDS,
    TensorSpec,
    UnitKind,
    is_expert_role,
    parse_spec,
    split_role,
)
from hf_moe_lmc.symmetry.banks import FIRST

# Prefixes of multi-token-prediction layers; the decoder block may stand in a part of its own.
MTP_PREFIXES = tuple(f"mtp.layers.{{layer}}.{part}" for part in ("", "mtp_block.", "transformer_block.", "transformer_layer."))


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

    def pattern(self, tower: str | None) -> re.Pattern[str]:
        """Matches the keys of its layers, in the given tower or in any."""
        before = r"(?P<tower>(?:.*\.)?)" if tower is None else re.escape(tower)
        return re.compile(before + numbered(self.stem) + "(?P<rest>.+)")


def numbered(prefix: str) -> str:
    """A prefix with `{layer}` as a regular expression, the number being a group."""
    return re.escape(prefix).replace(r"\{layer\}", "(?P<layer>0|[1-9][0-9]*)")


@dataclass(frozen=True)
class LayerConfig:
    """What a configuration says of one MoE layer.

    Attributes:
        sizes: of every axis word; router: one of ROUTER_KINDS.
        units: kind of hidden units by bank, and of the `shared` expert.
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
        mtp_prefixes: what stands before every key of such a layer where it has a prefix of its own, in any tower.
        mtp_counts: what a configuration may call the number of these layers.
        bank_units: unit kind of further banks, and of `shared` where it is not that of the first bank.
        when: role, or key template of a fixed tensor -> whether layer number `layer` has it, an expression; None: it may be
            there or not.
        blocks: prefixes below a layer under which every tensor must be claimed; by default the first parts of the templates.
        stacks: where a model has several stacks of layers: layers are numbered through, in this order.
        towers: model type of a composite model -> what the keys of its text tower begin with, where several towers fit.

    Raises:
        FamilyError: templates that contradict each other or the notation.

    Example:
        A block of experts without biases, each in tensors of its own, as Mixtral has it on the Hub:

        >>> family = MoEFamily(
        ...     name="example",
        ...     model_types=("example_moe",),
        ...     router="softmax",
        ...     units="swiglu",
        ...     weights={
        ...         "block_sparse_moe.gate.weight": "router: expert model",
        ...         "block_sparse_moe.experts.{expert}.w1.weight": "gate: unit model",
        ...         "block_sparse_moe.experts.{expert}.w3.weight": "up: unit model",
        ...         "block_sparse_moe.experts.{expert}.w2.weight": "down: model unit",
        ...     },
        ...     sizes={"expert": "num_local_experts", "unit": "intermediate_size", "model": "hidden_size"},
        ... )
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(num_local_experts=8, intermediate_size=14336, hidden_size=4096)
        >>> family.at(config, layer=0).sizes
        {'expert': 8, 'unit': 14336, 'model': 4096}
        >>> family.templates[3].spec.shape(family.at(config, layer=0).sizes)
        (4096, 14336)
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
    mtp_prefixes: tuple[str, ...] = MTP_PREFIXES
    mtp_counts: tuple[str, ...] = COUNTS
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
    def mtp_patterns(self) -> tuple[re.Pattern[str], ...]:
        """Match the keys of multi-token-prediction layers under prefixes of their own."""
        return tuple(
            re.compile(f"(?P<prefix>(?P<stack>(?:.*\\.)?){numbered(prefix)})(?P<rest>.+)") for prefix in self.mtp_prefixes
        )

    @cached_property
    def telling(self) -> tuple[re.Pattern[str], ...]:
        """Match the keys that only an MoE layer has; a shared expert may be what a dense layer has as well."""
        return tuple(
            template.pattern
            for template in self.templates
            if not template.spec.is_fixed and split_role(template.spec.roles[0])[1] not in SHARED_ROLES
        )

    @cached_property
    def banks(self) -> tuple[str, ...]:
        """Names of the banks, the first one first."""
        return tuple(dict.fromkeys([FIRST, *(split_role(role)[0] for t in self.templates for role in t.spec.roles)]))

    def at(self, config: Any, layer: int) -> LayerConfig:
        """What a configuration says of one MoE layer."""
        sizes = {word: self.number(expression, config, layer=layer) for word, expression in self.sizes.items()}
        kinds = {FIRST: self.units, SHARED: self.units, **self.bank_units}
        return LayerConfig(
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
