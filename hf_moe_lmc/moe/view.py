"""The named-axis view of one MoE block: the only code that interprets key names and axes on disk.

Whatever the layout, an expert's matrices have one canonical form, [unit, model]: down is transposed, so that a hidden unit is
a row everywhere. A router is [expert, model]. There are two ways to ask for a tensor:

- `stored(role, expert)`: as it is on disk, or is to be; in its own dtype, and of quantized weights the opaque parts;
- `values(role, expert)`: the numbers to compute with; the same, but quantized weights are dequantized to float32.

Anything that answers `stored` is a LayerSource: a block on disk, the same block in other coordinates, a point between two
blocks. `BlockView.assemble` turns any source back into the bytes of the layout on disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.quantization import Quantization, dequantize, scale_grid
from hf_moe_lmc.errors import CheckpointError
from hf_moe_lmc.moe.block import Claim
from hf_moe_lmc.moe.family import LayerConfig
from hf_moe_lmc.moe.notation import AXIS_WORDS, UNIT_KINDS, UnitKind, bank_size, is_expert_role, split_role
from hf_moe_lmc.moe.quantized import matrix_axes, matrix_shape, stacked

CANONICAL = ("expert", "1", *(word for word in AXIS_WORDS if word not in ("expert", "1", "half")), "packed")


class LayerSource(Protocol):
    """The tensors of one MoE block in canonical form, as they are stored or are to be."""

    def stored(self, role: str, expert: int | None = None) -> Tensor:
        """The tensor of `role`: [unit, model] (or [unit], [model]) of one expert, or the block's, experts first.

        The dtype is that on disk, or the wider one that a computation needed: whoever writes casts once.
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
class BlockView:
    """The tensors of one MoE block of a checkpoint, by role and expert.

    Attributes:
        index: number of its layer.
        config: what the configuration says of it; the shapes on disk agree.
        claims: by tensor name; together, each role of the family is held exactly once.
        quantization: of its experts; whole experts can then change places, nothing else.
    """

    checkpoint: Checkpoint
    index: int
    config: LayerConfig
    claims: Mapping[str, Claim]
    quantization: Quantization | None = None

    @property
    def sizes(self) -> Mapping[str, int]:
        return self.config.sizes

    @cached_property
    def units(self) -> Mapping[str, UnitKind]:
        """What hidden units allow, by bank, and of the `shared` expert."""
        return dict.fromkeys(self.config.units, UNIT_KINDS["rigid"]) if self.quantization else self.config.units

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
    def experts(self) -> int:
        """Experts of the first bank."""
        return self.sizes["expert"]

    @property
    def router(self) -> str:
        """Kind of router."""
        return self.config.router

    @property
    def expert_roles(self) -> tuple[str, ...]:
        """Roles that every expert of a bank has, e.g. gate, up, down."""
        return tuple(role for role in self.roles if is_expert_role(role))

    @cached_property
    def value_roles(self) -> tuple[str, ...]:
        """Roles whose values can be computed: those stored as they are, and those of quantized weights, which lie in parts."""
        return tuple(dict.fromkeys([*self.roles, *(role for role, _ in self._quantized)]))

    def width(self, role: str) -> int:
        """What the experts' matrices of `role` read: the residual width, or a latent one."""
        specs = [claim.spec for (held, _), (claim, _) in self.holders.items() if held == role]
        specs += [claim.part.spec for (held, _), (_, claim) in self._quantized.items() if held == role and claim.part]
        return next(bank_size(self.sizes, split_role(role)[0], word) for word in ("model", "latent") if word in specs[0].axes)

    def stored(self, role: str, expert: int | None = None) -> Tensor:
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
        """The same as numbers to compute with: quantized weights are dequantized to float32."""
        parts = self._quantized.get((role, expert)) or self._quantized.get((role, None))
        if parts is None or self.quantization is None:
            return self.stored(role, expert)
        return self._dequantized(role, expert, *parts, self.quantization)

    def _dequantized(self, role: str, expert: int | None, weight: Claim, scales: Claim, quantization: Quantization) -> Tensor:
        """The values of one expert's matrix, float32 in canonical form, from the tensors of its codes and its scales."""
        shape = matrix_shape(scales, self.sizes, quantization)
        halves = stacked(scales, quantization)
        block = quantization.block_of(self.checkpoint.tensors[weight.name].dtype)
        factors, factors_shape = self._part(scales, expert)
        grid = scale_grid(factors_shape, shape, block, halves)
        assert grid is not None
        codes, _ = self._part(weight, expert)
        values = dequantize(codes.view(shape[0], -1), factors.view(grid), block, halves)
        rows, columns = matrix_axes(scales, quantization)
        axes = [*rows, *columns]
        known = {**self.sizes, "half": len(scales.weight_roles), "1": 1}
        values = values.view([bank_size(known, split_role(role)[0], word) for word in axes])
        if "half" in axes:
            values = values.select(axes.index("half"), scales.weight_roles.index(role))
            axes.remove("half")
        return values.permute([axes.index(axis) for axis in CANONICAL if axis in axes])

    def _part(self, claim: Claim, expert: int | None) -> tuple[Tensor, tuple[int, ...]]:
        """One expert's share of the codes or the scales of a quantized weight, as a row, and its shape."""
        shape = self.checkpoint.tensors[claim.name].shape
        if claim.expert is not None or expert is None:
            return self.checkpoint.read(claim.name), shape
        count = math.prod(shape[1:])
        return self.checkpoint.read(claim.name, expert * count, count), shape[1:]

    @cached_property
    def _quantized(self) -> dict[tuple[str, int | None], tuple[Claim, Claim]]:
        """(role, expert named by the key) -> the tensor that holds its quantized values, and its scales."""
        parts = {}
        for claim in self.claims.values():
            if claim.part and claim.part.ending == "_scales":
                weight = self.claims.get(f"{claim.part.weight}_blocks") or self.claims[claim.part.weight]
                for role in claim.weight_roles:
                    parts[role, claim.expert] = (weight, claim)
        return parts

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
        parts = [source.stored(role, expert).permute([canonical.index(axis) for axis in axes]) for role, expert in piece.parts]
        if len(parts) == 1:
            return parts[0].reshape(-1)
        half = [axis for axis in spec.axes if axis in (*axes, "half")].index("half")
        return torch.stack(parts, dim=half).view(-1)
