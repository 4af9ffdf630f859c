"""Weight matching of two MoE blocks: the paper's Algorithm 1, over the whole symmetry of gated experts.

Two stages, each a linear assignment problem and without data:

1. the order of the experts, from the router rows (`gate`, Eq. 10) or from Gram matrices that no symmetry of the hidden
   units changes (`expert`, Eq. 11 generalised to gate, up and down);
2. for each matched pair of experts, the order of the hidden units (Git Re-Basin's weight matching), and with `scaled`
   units the sign and scale of the linear branch as well.

The two stages are not the joint optimum over both; nothing here claims that they are.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from hf_moe_lmc.assignment import assign_groups
from hf_moe_lmc.errors import CheckpointError, InputError
from hf_moe_lmc.layer import ActedLayer, MoELayer
from hf_moe_lmc.order import expert_cost, gate_cost
from hf_moe_lmc.symmetry import LayerSymmetry
from hf_moe_lmc.units import UnitMatch, UnitMethod, UnitRows, match_units

OrderMethod = Literal["gate", "expert", "best"]


def check_methods(order: str, units: str) -> None:
    """Raises InputError for an unknown `order` or `units`."""
    for what, value, known in (("order", order, get_args(OrderMethod)), ("units", units, get_args(UnitMethod))):
        if value not in known:
            raise InputError(f"{what} {value!r}: expected one of {', '.join(known)}")


@dataclass(frozen=True)
class Matching:
    """The group element that takes one block of B close to A's, and how close.

    Distances are Frobenius norms of differences, of the routed experts' weights unless named otherwise.

    Attributes:
        order_method: the order that was kept, `gate` or `expert`.
        candidates: distance after the units for each order that was tried.
        expert_cost_form: form and, for a sketch, number of columns of the `expert` cost; None if not computed.
        norm: Frobenius norm of A's routed experts.
        scales_kept: number of experts (the shared one included) whose scales paid.
    """

    symmetry: LayerSymmetry
    order_method: str
    candidates: dict[str, float]
    expert_cost_form: str | None
    norm: float
    distance_before: float
    distance_after_order: float
    distance_after_units: float
    router_distance_before: float
    router_distance_after: float
    shared_distance_before: float
    shared_distance_after: float
    scales_kept: int
    seconds: float

    @property
    def is_trivial(self) -> bool:
        """Whether the blocks were equal to begin with."""
        return self.distance_before == self.router_distance_before == self.shared_distance_before == 0


@dataclass
class _Pairs:
    """Matched pairs of experts, each computed once."""

    a: MoELayer
    b: MoELayer
    units: UnitMethod
    device: torch.device
    matches: dict[tuple[int, int], UnitMatch] = field(default_factory=dict)

    def match(self, i: int, j: int) -> UnitMatch:
        if (i, j) not in self.matches:
            of_a, of_b = _finite_rows(self.a, i, self.device), _finite_rows(self.b, j, self.device)
            self.matches[i, j] = match_units(of_a, of_b, self.units)
        return self.matches[i, j]

    def squared_before(self, i: int, j: int) -> float:
        if (i, j) in self.matches:
            return self.matches[i, j].squared_before
        return _finite_rows(self.a, i, self.device).squared_distance(_finite_rows(self.b, j, self.device))


def match_layer(
    a: MoELayer,
    b: MoELayer,
    *,
    groups: int = 1,
    order: OrderMethod = "best",
    units: UnitMethod = "scaled",
    device: torch.device | None = None,
) -> Matching:
    """Algorithm 1 of the paper on one pair of blocks.

    Args:
        groups: expert groups that bind; experts then move only within and with their groups.
        order: `gate`, `expert`, or `best`: whichever leaves the lower distance of the expert weights once the units are
            matched (if both agree, the units are matched once).
        units: `plain` or `scaled`.

    Memory: two experts in float32, one float64 [unit, unit] matrix, and the workspace of `expert_cost`.
    """
    started = time.perf_counter()
    device = device or torch.device("cpu")
    for layer in (a, b):
        _check_router(layer)
    form = None
    orders: dict[str, Tensor] = {}
    if order in ("gate", "best"):
        orders["gate"] = assign_groups(gate_cost(a, b, a.roles, a.family.router), groups)
    if order in ("expert", "best"):
        cost = expert_cost(a, b, units, device)
        _check_finite(cost.values, a, b)
        form = cost.form if cost.columns is None else f"{cost.form} of {cost.columns} columns"
        orders["expert"] = assign_groups(cost.values, groups)
    pairs = _Pairs(a, b, units, device)
    candidates = {
        method: sum(pairs.match(i, int(j)).squared_after for i, j in enumerate(chosen)) ** 0.5
        for method, chosen in orders.items()
    }
    method = min(candidates, key=lambda name: candidates[name])
    chosen = orders[method]
    matches = [pairs.match(i, int(j)) for i, j in enumerate(chosen)]
    shared = _match_shared(a, b, units, device)
    symmetry = LayerSymmetry(
        expert_order=chosen,
        unit_order=torch.stack([match.order for match in matches]),
        unit_scale=torch.stack([match.scale for match in matches]),
        shared_order=shared.order,
        shared_scale=shared.scale,
    )
    router = a.read("router").double()
    return Matching(
        symmetry=symmetry,
        order_method=method,
        candidates=candidates,
        expert_cost_form=form,
        norm=sum(match.squared_norm for match in matches) ** 0.5,
        distance_before=sum(pairs.squared_before(i, i) for i in range(a.experts)) ** 0.5,
        distance_after_order=sum(match.squared_before for match in matches) ** 0.5,
        distance_after_units=candidates[method],
        router_distance_before=float((router - b.read("router").double()).norm()),
        router_distance_after=float((router - ActedLayer(b, symmetry).read("router").double()).norm()),
        shared_distance_before=shared.squared_before**0.5,
        shared_distance_after=shared.squared_after**0.5,
        scales_kept=sum(match.scaled for match in matches) + int(shared.scaled),
        seconds=time.perf_counter() - started,
    )


def _check_router(layer: MoELayer) -> None:
    """Raises CheckpointError, naming the first row that is not finite."""
    bad = (~layer.read("router").isfinite()).any(dim=1).nonzero()
    if len(bad):
        raise _not_finite(layer, f"router row {int(bad[0])}")


def _check_finite(cost: Tensor, a: MoELayer, b: MoELayer) -> None:
    """Raises CheckpointError, naming the expert of A or B that makes a cost [expert, expert] not finite."""
    bad = ~cost.isfinite()
    if bool(bad.any()):
        of_a = bad.all(dim=1)
        layer, number = (a, of_a) if bool(of_a.any()) else (b, bad.any(dim=0))
        raise _not_finite(layer, f"expert {int(number.nonzero()[0])}")


def _not_finite(layer: MoELayer, what: str) -> CheckpointError:
    return CheckpointError(f"{layer.checkpoint.name}: layer {layer.index}: {what} holds NaN or infinite weights")


def _match_shared(a: MoELayer, b: MoELayer, units: UnitMethod, device: torch.device) -> UnitMatch:
    if not a.sizes.get("shared"):
        return UnitMatch(torch.arange(0), torch.ones(0), False, 0.0, 0.0, 0.0)
    return match_units(_finite_rows(a, None, device), _finite_rows(b, None, device), units)


def _finite_rows(layer: MoELayer, expert: int | None, device: torch.device) -> UnitRows:
    """One routed expert, or with None the shared one; raises CheckpointError where it is not finite."""
    rows = UnitRows.of(layer, layer.roles, expert, device)
    if not math.isfinite(rows.squared_norm):
        raise _not_finite(layer, "the shared expert" if expert is None else f"expert {expert}")
    return rows
