"""A block in the coordinates of a group element."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_moe_lmc.moe.notation import (
    EXPERT_VECTORS,
    SHARED,
    UnitKind,
    is_expert_role,
    split_role,
)
from hf_moe_lmc.moe.view import LayerSource
from hf_moe_lmc.runtime.memory import reused
from hf_moe_lmc.symmetry.elements import UnitSymmetry
from hf_moe_lmc.symmetry.group import LayerSymmetry

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # what numpy calls any dtype of a size

Elements = Mapping[int, LayerSymmetry | Future[LayerSymmetry]]  # by layer; one may still be on its way


@dataclass(frozen=True)
class ActedLayer:
    """A block in the coordinates that a symmetry gives it.

    Permutations alone move values in their own dtype. Scales are applied in float32 (float64 stays), and the result is not
    cast back: the writer casts once.

    Attributes:
        units: what hidden units allow, as in MoELayer: it says how a scale enters.
    """

    layer: LayerSource
    symmetry: LayerSymmetry
    units: Mapping[str, UnitKind]

    def stored(self, role: str, expert: int | None = None) -> Tensor:
        bank, base = split_role(role)
        if base.startswith("shared_"):
            values = self.layer.stored(role)
            return _act_on_units(base.removeprefix("shared_"), values, self.symmetry.shared, self.units[SHARED])
        g = self.symmetry.banks[bank]
        if is_expert_role(role):
            assert expert is not None
            values = self.layer.stored(role, int(g.expert_order[expert]))
            return _act_on_units(base, values, g.units(expert), self.units[bank])
        values = self.layer.stored(role)
        if base == "expert_table":
            return g.expert_order.argsort().to(values.dtype)[values]
        return values.index_select(0, g.expert_order) if base in EXPERT_VECTORS else values


@dataclass(frozen=True)
class AwaitedLayer:
    """A block in coordinates that are still being computed: a read waits for them.

    Attributes:
        units: as in ActedLayer.

    Raises, when read:
        CancelledError: they will not come.
    """

    layer: LayerSource
    symmetry: Future[LayerSymmetry]
    units: Mapping[str, UnitKind]

    @property
    def acted(self) -> ActedLayer:
        """The block in these coordinates, once they are there."""
        return ActedLayer(self.layer, self.symmetry.result(), self.units)

    def stored(self, role: str, expert: int | None = None) -> Tensor:
        return self.acted.stored(role, expert)


def _permuted(values: Tensor, permutation: Tensor) -> Tensor:
    """values[permutation] along the units, laid out in memory as `values` are.

    Where units are the inner axis on disk, numpy gathers within each row, ten times faster than torch gathers columns.
    """
    if values.ndim == 2 and values.stride(0) < values.stride(1):
        kind = _BITS[values.dtype.itemsize]
        raw, out = values.t().view(kind), reused(values.numel(), kind).view(values.shape[1], values.shape[0])
        np.take(raw.numpy(), permutation.numpy(), axis=1, out=out.numpy(), mode="clip")  # no index is out of range
        return out.view(values.dtype).t()
    return torch.index_select(values, 0, permutation, out=reused(values.numel(), values.dtype).view(values.shape))


def _act_on_units(base: str, values: Tensor, g: UnitSymmetry, kind: UnitKind) -> Tensor:
    """Units permuted; up rows times the scale, down columns divided by it to the kind's power. values: [unit, ...].

    What has no axis of units comes back as it is: a down bias, a shared expert's gate.
    """
    if not len(g.order) or base not in ("gate", "up", "down", "gate_bias", "up_bias"):
        return values
    if not torch.equal(g.order, torch.arange(len(g.order))):
        values = _permuted(values, g.order)
    if base in ("up", "up_bias", "down") and not bool((g.scale == 1).all()):
        scale = g.scale.view(-1, *[1] * (values.ndim - 1))
        if bool((scale.abs() == 1).all()) and not kind.offset:
            return values * (scale**kind.power if base == "down" else scale).to(values.dtype)  # signs are exact in any dtype
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if base == "down":
            return values / scale**kind.power
        if base == "up_bias" and kind.offset:
            return (values + kind.offset) * scale - kind.offset
        return values * scale
    return values
