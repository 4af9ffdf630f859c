"""Matching the hidden units of two experts: Git Re-Basin's weight matching, and its extension to sign and scale.

What a unit allows is its kind's (`UnitKind`): its up row times s, its down column divided by s**power, where s may be
negative, or of any magnitude, or neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from hf_moe_lmc.assignment import assign
from hf_moe_lmc.family import UNIT_KINDS, UnitKind
from hf_moe_lmc.layer import Bank

UnitMethod = Literal["plain", "scaled"]

SCALE_GAIN = 0.01  # scales are kept where they lower an expert's remaining squared distance by more than this share
BLOCK = 8 << 20  # bytes of one row block of a unit cost matrix


@dataclass(frozen=True)
class UnitRows:
    """The weights of one expert by hidden unit, float32: a unit's row of gate and up (with its bias), its down column.

    Attributes:
        gate: [unit, model (+ 1 with a bias)]; [unit, 0] where the expert has no gate.
        up: [unit, model (+ 1 with a bias)]; the bias counts from the kind's offset, so that a scale acts on all of it.
        down: [unit, model].
        down_bias: [model], or None; it belongs to no unit.
        kind: what the units allow.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    down_bias: Tensor | None = None
    kind: UnitKind = UNIT_KINDS["swiglu"]

    @cached_property
    def norm_ratio(self) -> Tensor:
        """(||u|| / ||d||)^(1 / (1 + power)) of each unit, nan where either is 0: what balances the two norms."""
        up, down = self.up.norm(dim=1), self.down.norm(dim=1)
        return torch.where((up > 0) & (down > 0), up / down, torch.nan).pow(1 / (1 + self.kind.power))

    @classmethod
    def of(cls, bank: Bank, expert: int | None, device: torch.device) -> UnitRows:
        """Reads one routed expert of a bank, or with `expert` None the shared one."""
        prefix = "" if expert is not None else "shared_"
        kind = bank.kind if expert is not None else bank.shared_kind

        def read(role: str) -> Tensor:
            return bank.read(prefix + role, expert).to(device=device, dtype=torch.float32)

        def rows(role: str, offset: int = 0) -> Tensor:
            bias = f"{role}_bias"
            return torch.cat([read(role), read(bias)[:, None] + offset], dim=1) if prefix + bias in bank.roles else read(role)

        up = rows("up", kind.offset)
        gate = rows("gate") if prefix + "gate" in bank.roles else up[:, :0]
        return cls(gate, up, read("down"), read("down_bias") if prefix + "down_bias" in bank.roles else None, kind)

    @cached_property
    def squared_norm(self) -> float:
        return _squared(self.gate) + _squared(self.up) + _squared(self.down)

    def squared_distance(self, other: UnitRows) -> float:
        """Squared Frobenius distance, from differences."""
        total = sum(_squared(getattr(self, role) - getattr(other, role)) for role in ("gate", "up", "down"))
        return total + self._bias_distance(other)

    def _bias_distance(self, other: UnitRows) -> float:
        return 0.0 if self.down_bias is None or other.down_bias is None else _squared(self.down_bias - other.down_bias)


@dataclass(frozen=True)
class UnitMatch:
    """The hidden units of B's expert in A's coordinates.

    Attributes:
        order: int64 [unit]; scale: float32 [unit], exactly +-1 unless `scaled`.
        squared_norm: squared Frobenius norm of A's expert.
        squared_before: squared distance with the units as they were.
        squared_after: the remaining squared distance.
    """

    order: Tensor
    scale: Tensor
    scaled: bool
    squared_norm: float
    squared_before: float
    squared_after: float


def match_units(a: UnitRows, b: UnitRows, units: UnitMethod) -> UnitMatch:
    """Matches the hidden units of two experts by one linear assignment problem over `unit_cost`.

    Scales that do not pay are dropped for the whole expert, signs kept: two fine-tunes of one model are then rewritten
    without loss. They pay where they lower the remaining squared distance by more than SCALE_GAIN, and by more than three
    times what one free scale per unit gains on pure noise, 1 / (3 model). With `plain`, or where the kind of the units
    allows no more, only their order is matched, and where it allows not even that, nothing.
    """
    kind = a.kind
    order = assign(unit_cost(a, b, units)) if kind.order else torch.arange(len(a.up))
    order = order.to(a.up.device)
    norm, before = a.squared_norm, a.squared_distance(b)
    gate = _squared(a.gate - b.gate[order]) + a._bias_distance(b)
    up, down = b.up[order], b.down[order]
    on_up, on_down = (a.up * up).sum(dim=1), (a.down * down).sum(dim=1)
    signed, scalable = kind.sign and units == "scaled", kind.scale and units == "scaled"
    sign = _sign(on_up + on_down) if signed else torch.ones(len(order), device=order.device)
    after = gate + _scaled_distance(a, up, down, sign)
    if not scalable:
        return UnitMatch(order.cpu(), sign.cpu(), False, norm, before, after)
    ratio = a.norm_ratio / b.norm_ratio[order]
    ratio = torch.where(ratio.isnan(), 1, ratio)
    scale = _sign(ratio * on_up + on_down / ratio**kind.power) * ratio if signed else ratio
    after_scaled = gate + _scaled_distance(a, up, down, scale)
    scaled = after_scaled < (1 - max(SCALE_GAIN, 1 / a.down.shape[1])) * after
    if scaled:
        sign, after = scale, after_scaled
    return UnitMatch(order.cpu(), sign.cpu(), scaled, norm, before, after)


def unit_cost(a: UnitRows, b: UnitRows, units: UnitMethod) -> Tensor:
    """Cost of matching A's unit k with B's unit l, float64 [unit, unit], up to constants of each row and column.

    plain:  ||g - g'||^2 + ||u - u'||^2 + ||d - d'||^2.
    scaled: ||g - g'||^2 + min over the signs that the kind allows of ||u - s u'||^2 + ||d - d'/s^p||^2, with
    |s|^(1+p) = (||u|| ||d'||) / (||d|| ||u'||), the scale that balances the norms (1 where a norm is 0, or where the kind
    allows no scale), and p the kind's power.

    Computed in blocks of rows: besides the result, four times BLOCK bytes.
    """
    count, power = len(a.up), a.kind.power
    signed, scalable = a.kind.sign and units == "scaled", a.kind.scale and units == "scaled"
    cost = torch.empty(count, count, dtype=torch.float64)
    up, down = b.up.square().sum(dim=1), b.down.square().sum(dim=1)
    step = max(1, BLOCK // (4 * count))
    for first in range(0, count, step):
        rows = slice(first, first + step)
        block = (a.gate[rows] @ b.gate.T).mul_(-2)
        on_up, on_down = a.up[rows] @ b.up.T, a.down[rows] @ b.down.T
        if scalable:
            scale = a.norm_ratio[rows, None] / b.norm_ratio[None, :]
            scale.nan_to_num_(nan=1.0)
            inner = on_up.mul_(scale).add_(on_down.div_(scale.pow(power)))
        else:
            inner = on_up.add_(on_down)
        block.sub_(inner.abs_() if signed else inner, alpha=2)
        if scalable:
            scale.square_()
            block.add_(torch.mul(scale, up, out=on_up)).add_(torch.div(down, scale.pow_(power), out=on_down))
        cost[rows] = block.to("cpu", torch.float64)
    return cost


def _scaled_distance(a: UnitRows, up: Tensor, down: Tensor, scale: Tensor) -> float:
    return _squared(a.up - scale[:, None] * up) + _squared(a.down - down / scale[:, None] ** a.kind.power)


def _sign(values: Tensor) -> Tensor:
    return torch.where(values < 0, -1.0, 1.0)


def _squared(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
