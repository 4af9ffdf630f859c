"""The named-axis view of one MoE block: the only code that interprets key names and axes on disk.

Whatever the layout, an expert's matrices come out in one canonical form, [unit, model] (down transposed, so that the row
of a hidden unit is a row everywhere), a router is [expert, model]. Anything that answers `read(role, expert)` in that
form is a source: a block on disk, the same block in other coordinates, a point between two blocks. `MoELayer.assemble`
turns any source back into the bytes of the layout on disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from hf_moe_lmc.checkpoint import Checkpoint
from hf_moe_lmc.errors import FamilyError, listing
from hf_moe_lmc.family import EXPERT_ROLES, SCALE_EXPONENT, MoEFamily, Template
from hf_moe_lmc.symmetry import LayerSymmetry

CANONICAL = ("expert", "1", "unit", "shared", "model")


class LayerSource(Protocol):
    """The tensors of one MoE block in canonical form."""

    def read(self, role: str, expert: int | None = None) -> Tensor:
        """The tensor of `role`: [unit, model] (or [unit], [model]) of one expert, or the block's, experts first.

        The dtype is the stored one, or the wider one that a computation needed.
        """


@dataclass(frozen=True)
class Claim:
    """One tensor on disk under a block: the template that claims it, and the expert that its key names."""

    name: str
    template: Template
    expert: int | None


@dataclass(frozen=True)
class Piece:
    """A contiguous range of one tensor on disk: one expert of it, or all of it.

    Attributes:
        first: its first element.
        parts: (role, expert) of what it holds, in the order of the `half` axis.
    """

    first: int
    parts: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class MoELayer:
    """One MoE block of a checkpoint.

    Attributes:
        index: number of its layer.
        sizes: size of every axis word, by the configuration; the shapes on disk agree.
        claims: by tensor name; together, each role of the family is held exactly once.
    """

    checkpoint: Checkpoint
    family: MoEFamily
    index: int
    sizes: Mapping[str, int]
    claims: Mapping[str, Claim]

    @cached_property
    def _holders(self) -> dict[tuple[str, int | None], Claim]:
        """(role, expert named by the key) -> the claim that holds it."""
        return {(role, claim.expert): claim for claim in self.claims.values() for role in claim.template.spec.roles}

    @cached_property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(role for role, _ in self._holders))

    @property
    def expert_roles(self) -> tuple[str, ...]:
        """Roles that every expert has, e.g. gate, up, down."""
        return tuple(role for role in self.roles if role in EXPERT_ROLES)

    @property
    def experts(self) -> int:
        return self.sizes["expert"]

    @property
    def expert_numel(self) -> int:
        """Elements of one expert."""
        return len([role for role in self.expert_roles if not role.endswith("bias")]) * self.sizes["unit"] * self.sizes["model"]

    def read(self, role: str, expert: int | None = None) -> Tensor:
        claim = self._holders.get((role, expert)) or self._holders[role, None]
        spec = claim.template.spec
        fixed = {} if len(spec.roles) == 1 else {"half": spec.roles.index(role)}
        if role in EXPERT_ROLES and claim.expert is None:
            assert expert is not None
            fixed["expert"] = expert
        return self._read_at(claim, fixed)

    def _read_at(self, claim: Claim, fixed: Mapping[str, int]) -> Tensor:
        """The tensor at the given indices of some axes, the other axes in canonical order; reads the least range."""
        axes = list(claim.template.spec.axes)
        shape = list(claim.template.spec.axis_sizes(self.sizes))
        first = 0
        while axes and axes[0] in fixed:  # leading indices narrow the range
            first += fixed[axes.pop(0)] * math.prod(shape[1:])
            shape.pop(0)
        values = self.checkpoint.read(claim.name, first, math.prod(shape)).view(shape)
        for axis in [axis for axis in axes if axis in fixed]:
            values = values.select(axes.index(axis), fixed[axis])
            axes.remove(axis)
        return values.permute([axes.index(axis) for axis in CANONICAL if axis in axes])

    def pieces(self, name: str) -> Iterator[Piece]:
        """The pieces of tensor `name`, in the order on disk; each is as large as one expert, or as the router."""
        claim = self.claims[name]
        spec = claim.template.spec
        if spec.roles[0] in EXPERT_ROLES and claim.expert is None:
            numel = math.prod(spec.axis_sizes(self.sizes)) // self.experts
            if spec.axes[0] != "expert":
                raise FamilyError(f"{self.family.name}: {claim.template.key}: the expert axis must come first on disk")
            for expert in range(self.experts):
                yield Piece(expert * numel, tuple((role, expert) for role in spec.roles))
        else:
            yield Piece(0, tuple((role, claim.expert) for role in spec.roles))

    def assemble(self, name: str, piece: Piece, source: LayerSource) -> Tensor:
        """The values of `piece` in this layout, taken from `source`: one row, in the dtype of the source."""
        spec = self.claims[name].template.spec
        axes = [axis for axis in spec.axes if axis != "half"]
        if spec.roles[0] in EXPERT_ROLES and "expert" in axes:
            axes.remove("expert")
        canonical = [axis for axis in CANONICAL if axis in axes]
        parts = [source.read(role, expert).permute([canonical.index(axis) for axis in axes]) for role, expert in piece.parts]
        if len(parts) == 1:
            return parts[0].reshape(-1)
        half = [axis for axis in spec.axes if axis in (*axes, "half")].index("half")
        return torch.stack(parts, dim=half).view(-1)


@dataclass(frozen=True)
class ActedLayer:
    """A block in the coordinates that a symmetry gives it.

    Orders alone move values in their own dtype. Scales are applied in float32 (float64 stays), and the result is not
    cast back: whoever writes casts once.
    """

    layer: LayerSource
    symmetry: LayerSymmetry

    def read(self, role: str, expert: int | None = None) -> Tensor:
        g = self.symmetry
        if role in EXPERT_ROLES:
            assert expert is not None
            values = self.layer.read(role, int(g.expert_order[expert]))
            return values if role == "down_bias" else _act_on_units(role, values, g.unit_order[expert], g.unit_scale[expert])
        values = self.layer.read(role)
        if role in ("shared_gate", "shared_up", "shared_down"):
            return _act_on_units(role, values, g.shared_order, g.shared_scale)
        if role == "shared_router":
            return values
        return values.index_select(0, g.expert_order)


def _act_on_units(role: str, values: Tensor, order: Tensor, scale: Tensor) -> Tensor:
    """Units in their new order; linear-branch rows times `scale`, down columns divided by it. values: [unit, ...]."""
    if not torch.equal(order, torch.arange(len(order))):
        values = values.index_select(0, order)
    exponent = SCALE_EXPONENT.get(role, 0)
    if exponent and not bool((scale == 1).all()):
        scale = scale.view(-1, *[1] * (values.ndim - 1))
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        values = values * scale if exponent > 0 else values / scale
    return values


def claim_block(
    checkpoint: Checkpoint, family: MoEFamily, index: int, names: Mapping[str, str], sizes: Mapping[str, int]
) -> MoELayer:
    """Claims every tensor under one MoE block and checks that the block is complete.

    Args:
        names: tensor names under the block, by their key below the layer.
        sizes: what the configuration says of every axis word.

    Raises:
        FamilyError: a tensor that no template claims, a role that is missing or filled twice, another shape.
    """
    claims: dict[str, Claim] = {}
    unclaimed = []
    for key, name in names.items():
        matches = [(template, match) for template in family.templates if (match := template.pattern.fullmatch(key))]
        if len(matches) != 1:
            unclaimed.append(name)
            continue
        template, match = matches[0]
        claims[name] = Claim(name, template, int(match["expert"]) if template.is_per_expert else None)
    layer = MoELayer(checkpoint, family, index, sizes, claims)
    problems = [f"{name}: not a tensor of an MoE block of family {family.name}" for name in unclaimed]
    problems += _role_problems(layer)
    for claim in claims.values():
        expected, found = claim.template.spec.shape(sizes), checkpoint.tensors[claim.name].shape
        if expected != found:
            problems.append(
                f"{claim.name}: expected shape {list(expected)} ({claim.template.spec.text}; "
                f"{', '.join(f'{word} {size}' for word, size in sizes.items())} by config.json), found {list(found)}"
            )
        elif not checkpoint.tensors[claim.name].dtype.is_floating_point or checkpoint.tensors[claim.name].dtype.itemsize < 2:
            problems.append(f"{claim.name}: dtype {checkpoint.tensors[claim.name].dtype} is quantised; dequantise first")
    if problems:
        raise FamilyError(f"{checkpoint.name}: layer {index} is not a whole MoE block:\n{listing(problems)}")
    return layer


def _role_problems(layer: MoELayer) -> list[str]:
    """Missing roles and roles filled twice."""
    held: dict[tuple[str, int | None], list[str]] = {}
    for claim in layer.claims.values():
        for role in claim.template.spec.roles:
            experts = range(layer.experts) if claim.expert is None and role in EXPERT_ROLES else [claim.expert]
            for expert in experts:
                held.setdefault((role, expert), []).append(claim.name)
    prefix = layer.family.layer_prefix.format(layer=layer.index)
    problems = []
    for role, templates in _templates_by_role(layer.family, layer.sizes).items():
        for expert in range(layer.experts) if role in EXPERT_ROLES else [None]:
            if (role, expert) not in held:
                likely = [template for template in templates if _fits_layout(template, layer)] or templates
                keys = " or ".join(prefix + template.key.replace("{expert}", str(expert)) for template in likely)
                problems.append(f"missing: {keys} ({role})")
    for (role, expert), names in held.items():
        if len(names) > 1:
            problems.append(f"{role} is given twice, by {' and '.join(names)}")
        if expert is not None and expert >= layer.experts:
            problems.append(f"{names[0]}: config.json says {layer.experts} experts, numbered from 0")
    return problems


def _fits_layout(template: Template, layer: MoELayer) -> bool:
    """Whether a template belongs to the layout of what is there (of several, a message names the likely key)."""
    present = [claim.template for claim in layer.claims.values()]
    holds_experts = [one.is_per_expert for one in present if one.spec.roles[0] in EXPERT_ROLES]
    same_form = template.spec.roles[0] not in EXPERT_ROLES or template.is_per_expert in holds_experts
    return same_form and template.key.partition(".")[0] in {one.key.partition(".")[0] for one in present}


def _templates_by_role(family: MoEFamily, sizes: Mapping[str, int]) -> dict[str, list[Template]]:
    """The templates that may fill each role which a configuration of these sizes has."""
    found: dict[str, list[Template]] = {}
    for template in family.templates:
        if all(sizes.get(word, 1) for word in template.spec.axes):
            for role in template.spec.roles:
                found.setdefault(role, []).append(template)
    return found
