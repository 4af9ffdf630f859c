"""The named-axis view of one MoE block: the only code that interprets key names and axes on disk.

Whatever the layout, an expert's matrices have one canonical form, [unit, model]: down is transposed, so that a hidden unit is
a row everywhere. A router is [expert, model]. Quantized weights are read as the numbers that they stand for.

Anything that answers `stored(role, expert)` is a LayerSource: a block on disk, the same block in other coordinates, a point
between two blocks. `BlockView.assemble` turns any source back into the values of the layout on disk.
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
from hf_moe_lmc.errors import CheckpointError
from hf_moe_lmc.moe.block import Claim
from hf_moe_lmc.moe.family import LayerConfig
from hf_moe_lmc.moe.notation import AXIS_WORDS, UnitKind, bank_size, is_expert_role, split_role

CANONICAL = ("expert", "1", *(word for word in AXIS_WORDS if word not in ("expert", "1", "half")))


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
    """

    checkpoint: Checkpoint
    index: int
    config: LayerConfig
    claims: Mapping[str, Claim]

    @property
    def sizes(self) -> Mapping[str, int]:
        return self.config.sizes

    @property
    def units(self) -> Mapping[str, UnitKind]:
        """What hidden units allow, by bank, and of the `shared` expert."""
        return self.config.units

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

    def width(self, role: str) -> int:
        """What the experts' matrices of `role` read: the residual width, or a latent one."""
        specs = [claim.spec for (held, _), (claim, _) in self.holders.items() if held == role]
        return next(bank_size(self.sizes, split_role(role)[0], word) for word in ("model", "latent") if word in specs[0].axes)

    def stored(self, role: str, expert: int | None = None) -> Tensor:
        claim, segment = self.holders.get((role, expert)) or self.holders[role, None]
        if split_role(role)[1] == "expert_table":
            return self._read_table(claim)
        return self._read_at(claim, segment, self._fixed(claim, segment, role, expert))

    def leading(self, role: str, expert: int, count: int) -> Tensor:
        """The first `count` entries of one matrix of an expert along the axis that is slowest on disk: one short range.

        Returns:
            [unit, count] where that is the model's, [count, model] where it is the hidden units'.
        """
        claim, segment = self.holders.get((role, expert)) or self.holders[role, None]
        return self._read_at(claim, segment, self._fixed(claim, segment, role, expert), count)

    def slowest_axis(self, role: str) -> str:
        """The axis of one expert's matrix that is slowest on disk: `unit`, `model` or `latent`."""
        claim, segment = self.holders.get((role, 0)) or self.holders[role, None]
        fixed = self._fixed(claim, segment, role, 0)
        return next(axis for axis in claim.spec.axes if axis not in fixed)

    def _fixed(self, claim: Claim, segment: int, role: str, expert: int | None) -> dict[str, int]:
        """The indices of the axes that a role of an expert has one place on."""
        roles = claim.spec.segments[segment]
        fixed = {} if len(roles) == 1 else {"half": roles.index(role)}
        if is_expert_role(role) and claim.expert is None:
            assert expert is not None
            fixed["expert"] = expert
        return fixed

    def _read_table(self, claim: Claim) -> Tensor:
        """A table of token experts; raises CheckpointError where it names an expert that there is not."""
        values = self._read_at(claim, 0, {})
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < self.experts:
            raise CheckpointError(
                f"{self.checkpoint.name}: {claim.name} names experts {int(values.min())} to {int(values.max())}, there are "
                f"{self.experts}, numbered from 0"
            )
        return values

    def _read_at(self, claim: Claim, segment: int, fixed: Mapping[str, int], count: int | None = None) -> Tensor:
        """The tensor at the given indices of some axes, the other axes in canonical order; reads the least range.

        With a count, of the slowest axis that is left only so many entries.
        """
        axes = list(claim.spec.axes)
        shape = list(claim.axis_sizes(self.sizes, segment))
        first = self._segment_start(claim, segment)
        while axes and axes[0] in fixed:  # leading indices narrow the range
            first += fixed[axes.pop(0)] * math.prod(shape[1:])
            shape.pop(0)
        if count is not None:
            shape[0] = min(shape[0], count)
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

    def piece_of(self, role: str, expert: int | None) -> tuple[str, Piece]:
        """The tensor and the range of it that hold a role of an expert, or of the block."""
        claim, _ = self.holders.get((role, expert)) or self.holders[role, None]
        return next((claim.name, piece) for piece in self.pieces(claim.name) if (role, expert) in piece.parts)

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
