"""Repairs that need no text: what they make of each hidden unit of a gated expert, from A's and B''s alone.

Averaging two unrelated units leaves one that is shorter than both. `norms` gives each averaged unit the length that it should
have; `crossover` averages no units at all, but takes each of them whole from one parent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.moe.action import Elements
from hf_moe_lmc.moe.experts import MATRICES, Bank, SharedExpert
from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.notation import split_role
from hf_moe_lmc.moe.view import LayerSource
from hf_moe_lmc.runtime.notices import note
from hf_moe_lmc.symmetry.banks import in_bank, qualified
from hf_moe_lmc.writing.spans import TensorSource
from hf_moe_lmc.writing.streams import Between, InterpolatedLayer, MadeLayer, Merging, layers_at

OF_UNITS = (*MATRICES, "gate_bias", "up_bias")  # roles with a row for each hidden unit
SHARED = "shared_"


class UngatedError(InputError):
    """A model has no experts that a repair of gated experts could act on."""


@dataclass(frozen=True)
class OfUnits:
    """A repair of the hidden units of gated experts: the ends of the path, and all else, are those of the straight line.

    Attributes:
        maker: gives, for the roles of a block that hold such units, what makes the points of the block.
    """

    maker: Callable[[frozenset[str]], Callable[[InterpolatedLayer], MadeLayer]]

    def between(self, layer: MoELayer) -> Between:
        make = self.maker(frozenset(gated_roles(layer)))

        def point(index: int, a: LayerSource, b: LayerSource, t: float, rounded: bool = False) -> MadeLayer:
            straight = InterpolatedLayer(index, a, b, t, rounded)
            return straight if t in (0, 1) else make(straight)

        return point

    def outside(self, start: TensorSource) -> TensorSource:
        return start


@dataclass(frozen=True)
class NormedLayer:
    """A block on the straight line whose units have interpolated norms, (1 - t)|a| + t|b'|.

    That is each unit's rows of gate and up, and its column of down. Biases are averaged, as the router and all else.

    Attributes:
        gated: roles of gated experts that hold their units.
    """

    straight: InterpolatedLayer
    gated: frozenset[str]

    @property
    def parents(self) -> tuple[LayerSource, ...]:
        return self.straight.parents

    def stored(self, role: str, expert: int | None = None) -> Tensor:
        if role not in self.gated or base_of(role) not in MATRICES:
            return self.straight.stored(role, expert)
        t = self.straight.t
        a, b = (source.stored(role, expert).float() for source in self.parents)
        values = torch.lerp(a, b, t)
        found = values.norm(dim=1)
        wanted = torch.lerp(a.norm(dim=1), b.norm(dim=1), t)
        factor = torch.where(found > 0, wanted / found, 1.0)  # opposite units average to nothing, which has no direction
        return values.mul_(factor[:, None])


@dataclass(frozen=True)
class CrossedLayer:
    """A block on the straight line whose hidden units come whole from A or from B', gate, up and down with their biases.

    Of each expert's h units, those round((1 - t) h) are A's whose product of norms |gate| |up| |down| is largest beside that
    of B''s, and all others are B''s. Router and all else are averaged.

    Memory: the order of the units of each expert that has been asked for, 2 or 4 bytes a unit.

    Attributes:
        gated: roles of gated experts that hold their units.
        orders: the units of an expert, those that come from A first in front; shared by all points of the block.
    """

    straight: InterpolatedLayer
    gated: frozenset[str]
    orders: dict[tuple[str, int | None], Tensor]

    @property
    def parents(self) -> tuple[LayerSource, ...]:
        return self.straight.parents

    def stored(self, role: str, expert: int | None = None) -> Tensor:
        if role not in self.gated:
            return self.straight.stored(role, expert)
        a, b = (source.stored(role, expert) for source in self.parents)
        dtype = torch.promote_types(a.dtype, b.dtype)
        rows = self.from_a(role, expert)
        return torch.where(rows.view(-1, *[1] * (a.ndim - 1)), a.to(dtype), b.to(dtype))

    def from_a(self, role: str, expert: int | None) -> Tensor:
        """Which units of the expert that has this role come from A, bool [unit]."""
        before = role.removesuffix(base_of(role))
        order = self.orders.get((before, expert))
        if order is None:
            ratios = self._strength(before, expert, 0) - self._strength(before, expert, 1)
            order = ratios.nan_to_num(0.0, posinf=torch.inf, neginf=-torch.inf).argsort(descending=True, stable=True)
            self.orders[before, expert] = order.to(torch.int16 if len(order) <= 1 << 15 else torch.int32)
        found = torch.zeros(len(order), dtype=torch.bool)
        found[order[: round((1 - self.straight.t) * len(order))].long()] = True
        return found

    def _strength(self, before: str, expert: int | None, parent: int) -> Tensor:
        """The logarithm of |gate| |up| |down| of each unit, float64 [unit]."""
        source = self.parents[parent]
        return sum(
            (source.stored(before + role, expert).float().norm(dim=1).double().log() for role in MATRICES), torch.zeros(())
        )


def base_of(role: str) -> str:
    """The role within its bank and without `shared_`."""
    return split_role(role)[1].removeprefix(SHARED)


def gated_experts(layer: MoELayer) -> Iterator[Bank | SharedExpert]:
    """The banks of a block whose experts are gated MLPs, and its shared expert if that is one."""
    for bank in layer.banks.values():
        if bank.unit_count and set(MATRICES) <= set(bank.roles):
            yield bank
    if layer.shared.unit_count and set(MATRICES) <= set(layer.shared.roles):
        yield layer.shared


def gated_roles(layer: MoELayer) -> Iterator[str]:
    """The roles of a block with a row for each hidden unit of a gated expert."""
    for experts in gated_experts(layer):
        for role in experts.roles:
            if role in OF_UNITS:
                yield f"{SHARED}{role}" if isinstance(experts, SharedExpert) else qualified(experts.name, role)


def check_gated(model: MoEModel, repair: str) -> None:
    """Says which experts a repair leaves averaged, as they are no gated MLPs.

    Raises:
        UngatedError: all of them.
    """
    left: dict[str, int] = {}
    found = False
    for layer in model.layers.values():
        gated = list(gated_experts(layer))
        found = found or bool(gated)
        for bank in layer.banks.values():
            if bank.unit_count and bank not in gated:
                words = in_bank("routed experts", bank.name)
                left[words] = left.get(words, 0) + 1
        if layer.shared.unit_count and layer.shared not in gated:
            left["shared experts"] = left.get("shared experts", 0) + 1
    if not found:
        raise UngatedError(
            f"{model.checkpoint.name}: --repair {repair} acts on gated experts (gate, up and down), and those of family "
            f"{model.family.name} are not; take --repair none"
        )
    for words, count in left.items():
        note(f"repair {repair}: the {words} of {count} layers have no gate and stay averaged")


REPAIRS: Mapping[str, Merging] = {
    "norms": OfUnits(lambda gated: partial(NormedLayer, gated=gated)),
    "crossover": OfUnits(lambda gated: partial(CrossedLayer, gated=gated, orders={})),
}


def starts(a: MoEModel, b: MoEModel, elements: Elements, t: float) -> dict[str, dict[int, LayerSource]]:
    """The MoE layers that each repair without data gives between A and B' at t, by its name."""
    acted = b.acted(elements)
    return {name: layers_at(a, acted, t, repair) for name, repair in REPAIRS.items()}
