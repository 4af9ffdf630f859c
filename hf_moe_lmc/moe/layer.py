"""The named-axis view of one MoE block: the only code that interprets key names and axes on disk.

Whatever the layout, an expert's matrices come out in one canonical form, [unit, model] (down transposed, so that the row
of a hidden unit is a row everywhere), a router is [expert, model]. Anything that answers `read(role, expert)` in that
form is a source: a block on disk, the same block in other coordinates, a point between two blocks. `MoELayer.assemble`
turns any source back into the bytes of the layout on disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.quantization import Quantization, dequantize, scale_grid
from hf_moe_lmc.errors import CheckpointError
from hf_moe_lmc.moe.block import Claim
from hf_moe_lmc.moe.family import LayerFacts, MoEFamily
from hf_moe_lmc.moe.notation import (
    AXIS_WORDS,
    UNIT_KINDS,
    UnitKind,
    bank_size,
    is_expert_role,
    split_role,
)
from hf_moe_lmc.moe.quantised import matrix_axes, matrix_shape, stacked
from hf_moe_lmc.symmetry.group import LayerSymmetry

CANONICAL = ("expert", "1", *(word for word in AXIS_WORDS if word not in ("expert", "1", "half")), "packed")


class LayerSource(Protocol):
    """The tensors of one MoE block in canonical form."""

    def read(self, role: str, expert: int | None = None) -> Tensor:
        """The tensor of `role`: [unit, model] (or [unit], [model]) of one expert, or the block's, experts first.

        The dtype is the stored one, or the wider one that a computation needed.
        """


@dataclass(frozen=True)
class Piece:
    """A contiguous range of one tensor on disk: one expert of it, or all of it that belongs to one bank.

    Attributes:
        first: its first element.
        count: its elements.
        parts: (role, expert) of what it holds, in the order of the `half` axis.
    """

    first: int
    count: int
    parts: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class MoELayer:
    """One MoE block of a checkpoint.

    Attributes:
        index: number of its layer.
        facts: what the configuration says of it; the shapes on disk agree.
        claims: by tensor name; together, each role of the family is held exactly once.
        quantization: of its experts; whole experts can then change places, nothing else.
    """

    checkpoint: Checkpoint
    family: MoEFamily
    index: int
    facts: LayerFacts
    claims: Mapping[str, Claim]
    quantization: Quantization | None = None

    @property
    def sizes(self) -> Mapping[str, int]:
        return self.facts.sizes

    @cached_property
    def units(self) -> Mapping[str, UnitKind]:
        """What hidden units allow, by bank ('' is the first), and of the `shared` expert."""
        return dict.fromkeys(self.facts.units, UNIT_KINDS["rigid"]) if self.quantization else self.facts.units

    @cached_property
    def holders(self) -> dict[tuple[str, int | None], tuple[Claim, int]]:
        """(role, expert named by the key) -> the claim that holds it, and the segment of it."""
        return {
            (role, claim.expert): (claim, segment)
            for claim in self.claims.values()
            for segment in claim.segments
            for role in claim.spec.segments[segment]
        }

    @cached_property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(role for role, _ in self.holders))

    @property
    def expert_roles(self) -> tuple[str, ...]:
        """Roles that every expert of a bank has, e.g. gate, up, down."""
        return tuple(role for role in self.roles if is_expert_role(role))

    @property
    def experts(self) -> int:
        return self.sizes["expert"]

    @cached_property
    def banks(self) -> dict[str, Bank]:
        """The banks of experts, the first one ('') first."""
        names = dict.fromkeys(["", *(split_role(role)[0] for role in self.roles)])
        names = {name: None for name in names if bank_size(self.sizes, name, "expert")}
        return {name: Bank(self, name) for name in names}

    @cached_property
    def expert_numel(self) -> int:
        """Elements of the largest expert."""
        return max(bank.expert_numel for bank in self.banks.values())

    def identity(self) -> LayerSymmetry:
        """The identity of this block's group."""
        parts = {
            name: LayerSymmetry.identity(bank.experts, bank.unit_count, bank.shared_count) for name, bank in self.banks.items()
        }
        own = parts.pop("")
        return replace(own, others=parts)

    def random(self, generator: torch.Generator, *, groups: int = 1, scale: float = 1.0) -> LayerSymmetry:
        """A random element of this block's group; `scale`: see LayerSymmetry.random."""
        parts = {name: bank.random(generator, groups=1 if name else groups, scale=scale) for name, bank in self.banks.items()}
        own = parts.pop("")
        return replace(own, others=parts)

    def problems(self, symmetry: LayerSymmetry) -> list[str]:
        """What in a valid symmetry of these sizes the hidden units of this block do not allow."""
        return [problem for name, bank in self.banks.items() for problem in bank.problems(symmetry.bank(name))]

    def read(self, role: str, expert: int | None = None) -> Tensor:
        claim, segment = self.holders.get((role, expert)) or self.holders[role, None]
        if split_role(role)[1] == "expert_table":
            return self._read_table(claim)
        roles = claim.spec.segments[segment]
        fixed = {} if len(roles) == 1 else {"half": roles.index(role)}
        if is_expert_role(role) and claim.expert is None:
            assert expert is not None
            fixed["expert"] = expert
        return self._read_at(claim, segment, fixed)

    def _read_table(self, claim: Claim) -> Tensor:
        """A table of token experts; raises CheckpointError where it names an expert that there is not."""
        values = self._read_at(claim, 0, {})
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < self.experts:
            raise CheckpointError(
                f"{self.checkpoint.name}: {claim.name} names experts {int(values.min())} to {int(values.max())}, there are "
                f"{self.experts}, numbered from 0"
            )
        return values

    def values(self, role: str, expert: int | None = None) -> Tensor:
        """As `read`, with quantised weights in float32."""
        held = self._quantised.get((role, expert)) or self._quantised.get((role, None))
        if held is None or self.quantization is None:
            return self.read(role, expert)
        weight, scales = held
        shape = matrix_shape(scales, self.sizes, self.quantization)
        halves = stacked(scales, self.quantization)
        block = self.quantization.block_of(self.checkpoint.tensors[weight.name].dtype)
        fused = scales.expert is None and expert is not None

        def part(claim: Claim) -> tuple[Tensor, tuple[int, ...]]:
            own = self.checkpoint.tensors[claim.name].shape
            own = own[1:] if fused else own
            return self.checkpoint.read(claim.name, (expert or 0) * math.prod(own) if fused else 0, math.prod(own)), own

        factors, own = part(scales)
        grid = scale_grid(own, shape, block, halves)
        assert grid is not None
        values = dequantize(part(weight)[0].view(shape[0], -1), factors.view(grid), block, halves)
        rows, columns = matrix_axes(scales, self.quantization)
        axes = [*rows, *columns]
        known = {**self.sizes, "half": len(scales.weight_roles), "1": 1}
        values = values.view([bank_size(known, split_role(role)[0], word) for word in axes])
        if "half" in axes:
            values = values.select(axes.index("half"), scales.weight_roles.index(role))
            axes.remove("half")
        return values.permute([axes.index(axis) for axis in CANONICAL if axis in axes])

    @cached_property
    def _quantised(self) -> dict[tuple[str, int | None], tuple[Claim, Claim]]:
        """(role, expert named by the key) -> the tensor that holds its quantised values, and its scales."""
        found = {}
        for claim in self.claims.values():
            if claim.part and claim.part.ending == "_scales":
                weight = self.claims.get(f"{claim.part.weight}_blocks") or self.claims[claim.part.weight]
                for role in claim.weight_roles:
                    found[role, claim.expert] = (weight, claim)
        return found

    def _read_at(self, claim: Claim, segment: int, fixed: Mapping[str, int]) -> Tensor:
        """The tensor at the given indices of some axes, the other axes in canonical order; reads the least range."""
        axes = list(claim.spec.axes)
        shape = list(claim.axis_sizes(self.sizes, segment))
        first = self._segment_start(claim, segment)
        while axes and axes[0] in fixed:  # leading indices narrow the range
            first += fixed[axes.pop(0)] * math.prod(shape[1:])
            shape.pop(0)
        values = self.checkpoint.read(claim.name, first, math.prod(shape)).view(shape)
        for axis in [axis for axis in axes if axis in fixed]:
            values = values.select(axes.index(axis), fixed[axis])
            axes.remove(axis)
        return values.permute([axes.index(axis) for axis in CANONICAL if axis in axes])

    def _segment_start(self, claim: Claim, segment: int) -> int:
        """First element of a segment of a tensor."""
        before = [other for other in claim.segments if other < segment]
        return sum(math.prod(claim.axis_sizes(self.sizes, other)) for other in before)

    def pieces(self, name: str) -> Iterator[Piece]:
        """The pieces of tensor `name`, in the order on disk; each is as large as one expert, or as the router."""
        claim = self.claims[name]
        for segment in claim.segments:
            roles = claim.spec.segments[segment]
            numel = math.prod(claim.axis_sizes(self.sizes, segment))
            if not numel:
                continue  # a bank without experts
            first = self._segment_start(claim, segment)
            if is_expert_role(roles[0]) and claim.expert is None:
                experts = bank_size(self.sizes, split_role(roles[0])[0], "expert")
                numel //= experts
                for expert in range(experts):
                    yield Piece(first + expert * numel, numel, tuple((role, expert) for role in roles))
            else:
                yield Piece(first, numel, tuple((role, claim.expert) for role in roles))

    def assemble(self, name: str, piece: Piece, source: LayerSource) -> Tensor:
        """The values of `piece` in this layout, taken from `source`: one row, in the dtype of the source."""
        spec = self.claims[name].spec
        axes = [axis for axis in spec.axes if axis != "half"]
        if is_expert_role(spec.roles[0]) and "expert" in axes:
            axes.remove("expert")
        canonical = [axis for axis in CANONICAL if axis in axes]
        parts = [source.read(role, expert).permute([canonical.index(axis) for axis in axes]) for role, expert in piece.parts]
        if len(parts) == 1:
            return parts[0].reshape(-1)
        half = [axis for axis in spec.axes if axis in (*axes, "half")].index("half")
        return torch.stack(parts, dim=half).view(-1)


@dataclass(frozen=True)
class Bank:
    """The experts of one bank of a block, with the roles that are theirs.

    The first bank ('') holds the shared expert as well.
    """

    layer: MoELayer
    name: str

    @property
    def full_name(self) -> str:
        return f"{self.layer.checkpoint.name}: layer {self.layer.index}" + (f", bank {self.name}" if self.name else "")

    @cached_property
    def roles(self) -> tuple[str, ...]:
        """Its roles, without the bank's name; those that lie in parts are among them, see `MoELayer.values`."""
        roles = dict.fromkeys([*self.layer.roles, *(role for role, _ in self.layer._quantised)])
        return tuple(base for role in roles for bank, base in [split_role(role)] if bank == self.name)

    @property
    def router(self) -> str:
        return self.layer.facts.router

    @property
    def kind(self) -> UnitKind:
        return self.layer.units[self.name]

    @property
    def shared_kind(self) -> UnitKind:
        return self.layer.units["shared"]

    @property
    def experts(self) -> int:
        return bank_size(self.layer.sizes, self.name, "expert")

    @property
    def unit_count(self) -> int:
        """Hidden units of each expert; 0 where they have none, or none that is whole."""
        return bank_size(self.layer.sizes, self.name, "unit") if {"up", "down"} <= set(self.roles) else 0

    @property
    def shared_count(self) -> int:
        return self.layer.sizes.get("shared", 0) if "shared_up" in self.roles else 0

    @cached_property
    def width(self) -> int:
        """What the experts read: the residual width, or a latent one."""
        up = f"{self.name}.up" if self.name else "up"
        specs = [claim.spec for (role, _), (claim, _) in self.layer.holders.items() if role == up]
        specs += [claim.part.spec for (role, _), (_, claim) in self.layer._quantised.items() if role == up and claim.part]
        return next(bank_size(self.layer.sizes, self.name, word) for word in ("model", "latent") if word in specs[0].axes)

    @property
    def expert_numel(self) -> int:
        """Elements of one expert."""
        matrices = [role for role in ("gate", "up", "down") if role in self.roles]
        return len(matrices) * self.unit_count * self.width if self.unit_count else 0

    def read(self, role: str, expert: int | None = None) -> Tensor:
        """As LayerSource.read; quantised weights as the values that they stand for, in float32."""
        return self.layer.values(f"{self.name}.{role}" if self.name else role, expert)

    def random(self, generator: torch.Generator, *, groups: int = 1, scale: float = 1.0) -> LayerSymmetry:
        """A random element of this bank's group."""

        def drawn(kind: UnitKind) -> LayerSymmetry:
            return LayerSymmetry.random(
                self.experts,
                self.unit_count,
                self.shared_count,
                groups=groups,
                signs=kind.sign,
                scale=scale if kind.scale else 1.0,
                generator=generator,
            )

        routed, shared = drawn(self.kind), drawn(self.shared_kind)
        still = LayerSymmetry.identity(self.experts, self.unit_count, self.shared_count)
        return LayerSymmetry(
            expert_order=routed.expert_order,
            unit_order=(routed if self.kind.order else still).unit_order,
            unit_scale=routed.unit_scale,
            shared_order=(shared if self.shared_kind.order else still).shared_order,
            shared_scale=shared.shared_scale,
        )

    def problems(self, symmetry: LayerSymmetry) -> list[str]:
        """What in a valid symmetry of these sizes the hidden units of this bank do not allow."""
        found = []
        for what, kind, order, scale in (
            ("hidden units", self.kind, symmetry.unit_order, symmetry.unit_scale),
            ("the shared expert's hidden units", self.shared_kind, symmetry.shared_order, symmetry.shared_scale),
        ):
            where = f"layer {self.layer.index}" + (f", bank {self.name}" if self.name else "") + f": {what}"
            if not kind.order and not torch.equal(order, torch.arange(order.shape[-1]).expand_as(order)):
                found.append(f"{where} change places, but {kind.words}")
            if not kind.sign and bool((scale < 0).any()):
                found.append(f"{where} change sign; allowed: {kind.words}")
            if not kind.scale and bool((scale.abs() != 1).any()):
                found.append(f"{where} are scaled; allowed: {kind.words}")
        return found
